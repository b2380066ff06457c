"""``moeprune skip``: leave out expert computation that tokens do not need."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeprune import _cli_options as opt
from moeprune import _cli_output as out
from moeprune import _files

if TYPE_CHECKING:
    from moeprune.gating import SkipResult
    from moeprune.plans_skip import SkipPlan


def skip(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Folder or Hub id; left out: the bundled model.")
    ] = None,
    skip_rate: Annotated[
        float, typer.Option("--skip-rate", metavar="R", help="Share of the (token, expert) slots to SKIP.")
    ] = 0.5,
    policy: Annotated[
        str | None, typer.Option("--policy", metavar="NAME", help="What scores slots; `--policy list` names all.")
    ] = None,
    renorm: Annotated[
        str,
        typer.Option(
            "--renorm",
            metavar="none|survivors|topk2:N",
            help="What weights are divided by: all top-k slots, those that run, or the N largest.",
        ),
    ] = "none",
    thresholds: Annotated[
        str,
        typer.Option("--thresholds", metavar="layer|global", help="Skip as much in every layer, or where it is cheap."),
    ] = "layer",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR|FILE.json", help="Checkpoint with its plan, or the plan alone."),
    ] = None,
    bake: Annotated[
        bool, typer.Option("--bake", help="With static-k: fewer experts per token in the config, for any engine.")
    ] = False,
    distill: Annotated[
        bool, typer.Option("--distill", help="Train the model with its gates to predict what it predicts without them.")
    ] = False,
    train: opt.TrainLevels = None,
    steps: opt.Steps = None,
    lr: opt.LearningRate = None,
    step_tokens: opt.StepTokens = None,
    schedule: opt.Schedule = None,
    temperature: opt.Temperature = None,
    mixed_precision: opt.Precision = None,
    calibration: opt.Calibration = [],  # noqa: B006 - typer copies it
    statistics_file: Annotated[
        Path | None,
        typer.Option("--statistics-file", metavar="FILE", help="Take thresholds from sketches; no model is run."),
    ] = None,
    heldout: Annotated[
        list[str],
        typer.Option("--heldout", metavar="[DOMAIN=]SOURCE", help="Text on which the cost is measured; repeatable."),
    ] = [],  # noqa: B006 - typer copies it
    curve: Annotated[
        str, typer.Option("--curve", metavar="R,R,...", help="Other rates to measure on the held-out text.")
    ] = "",
    tasks: opt.Tasks = "",
    include_path: opt.IncludePath = None,
    num_samples: opt.NumSamples = 512,
    max_length: opt.MaxLength = 2048,
    shuffle: opt.Shuffle = False,
    pack: opt.Pack = False,
    batch_tokens: opt.BatchTokens = 8192,
    seed: opt.Seed = 0,
    device: opt.Device = None,
    dtype: opt.Dtype = "auto",
    stream: opt.Stream = None,
    memory: opt.Memory = None,
    device_memory: opt.DeviceMemory = None,
    trust_remote_code: opt.Trust = False,
    revision: opt.Revision = None,
    max_shard_size: opt.ShardSize = "5GB",
    batch_size: opt.BatchSize = 16,
    limit: opt.Limit = None,
    num_fewshot: opt.FewShot = None,
    apply_chat_template: opt.ChatTemplate = None,
    max_gen_toks: opt.MaxGenToks = None,
    confirm_run_unsafe_code: opt.UnsafeCode = False,
    model_args: opt.ModelArgs = "",
    cache: opt.Cache = None,
    no_cache: opt.NoCache = False,
    margin: opt.Margin = 1.0,
    overwrite: opt.Overwrite = False,
    dry_run: opt.DryRun = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Skip a share of the expert computation, token by token, without training: thresholds solved layer by layer.

    The checkpoint is copied as it is: stock engines load it and skip nothing, moeprune.load runs it with its gates.
    Without MODEL: the bundled model, its texts and its tasks.
    """
    from moeprune import gating
    from moeprune.runtime.policies import BUILTIN, DEFAULT, TRAINED

    if policy == "list":
        known = {**BUILTIN, **TRAINED}
        if as_json:
            out.print_json({one.name: one.meaning for one in known.values()})
        else:
            out.show("\n".join(f"{one.name:<16}{one.meaning}" for one in known.values()))
        return
    recipe = {"steps": steps, "lr": lr, "step_tokens": step_tokens, "schedule": schedule, "temperature": temperature}
    if not distill:
        opt.check_only_with("--distill", train=train, mixed_precision=mixed_precision, **recipe)
    result = gating.skip(
        model,
        output,
        skip_rate=skip_rate,
        policy=policy or DEFAULT,
        renorm=renorm,
        thresholds=thresholds,
        calibration=calibration,
        statistics=statistics_file,
        bake=bake,
        distill=opt.recipe_of(batch_tokens, seed, precision=mixed_precision, **recipe) if distill else None,
        train=opt.names(train or "all"),
        heldout=heldout,
        curve=[_rate(name) for name in opt.names(curve)],
        tasks=opt.names(tasks),
        include_path=include_path,
        num_samples=num_samples,
        max_length=max_length,
        shuffle=shuffle,
        pack=pack,
        batch_tokens=batch_tokens,
        seed=seed,
        device=device,
        dtype=dtype,
        stream=stream,
        memory=opt.size_of(memory),
        device_memory=opt.size_of(device_memory),
        trust_remote_code=trust_remote_code,
        revision=revision,
        max_shard_size=_files.parse_size(max_shard_size),
        batch_size=batch_size,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        max_gen_toks=max_gen_toks,
        confirm_run_unsafe_code=confirm_run_unsafe_code,
        model_args=opt.model_args_of(model_args),
        cache=opt.cache_of(cache, unused=no_cache),
        margin=margin,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    out.say_notes(result.plan.notes if result.plan else ())
    if as_json:
        out.print_json(as_object(result))
    else:
        out.show(_render(result))
        if result.report is not None:
            out.print_report(result.report, None, as_json=False)


def _rate(text: str) -> float:
    from moeprune.errors import ConfigError

    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--curve must list numbers, not {text!r}", "such as 0.25,0.75") from None


def _render(result: SkipResult) -> str:
    plan = result.plan
    if plan is None:
        lines = [f"would take: {result.forecast}"] if result.forecast else []
        lines += [f"training would take: {result.training}"] if result.training else []
        return "\n".join([*lines, f"dry run: nothing was written to {result.output}"])
    lines = [f"{plan.policy}: {plan.rate:.1%} of the slots skipped on the calibration text ({plan.target:.1%} asked)"]
    if plan.layers:
        lines.append("by layer: " + ", ".join(f"{layer.rate:.1%}" for _, layer in sorted(plan.layers.items())))
    if plan.baked:
        lines.append("in the config: " + ", ".join(f"{key} = {value}" for key, value in plan.config_edits.items()))
    if plan.training:
        kl, best = plan.training["held_out_kl"], plan.training["best_step"]
        lines.append(f"distilled: KL {kl['before']:.4g} -> {kl['after']:.4g} on held-out calibration text, step {best}")
    if result.heldout is not None:
        from moeprune.evaluation.skip_report import render_skip_table

        lines += ["", render_skip_table(result.heldout).rstrip(), ""]
    if result.verification is not None:
        proof = result.verification
        how = " by their digests" if plan.training else ""  # a trained one has other weights than the source
        lines.append(f"verified: {proof.tensors} tensors{how} and {proof.files} other files equal the source")
    lines.append(f"{'plan' if result.verification is None else 'checkpoint'}: {result.output}")
    return "\n".join(lines)


def as_object(result: SkipResult) -> dict[str, Any]:
    """For ``--json``."""
    return {
        "output": str(result.output),
        "written": result.plan is not None,
        "plan": result.plan.to_dict() if result.plan else None,
        "forecast": result.forecast.to_dict() if result.forecast else None,
        "training_forecast": result.training.to_dict() if result.training else None,
        "verification": dataclasses.asdict(result.verification) if result.verification else None,
        "heldout": result.heldout.payload() if result.heldout is not None else None,
        "report": result.report.payload() if result.report is not None else None,
    }


def print_applied(plan: SkipPlan, output: Path, *, dry_run: bool, as_json: bool) -> None:
    """What was made of a plan."""
    from moeprune.accounts import account_of

    account = account_of(plan)
    if as_json:
        out.print_json({"output": str(output), "written": not dry_run, **account.facts})
        return
    done = f"dry run: nothing was written to {output}" if dry_run else f"checkpoint: {output}"
    out.show(f"{account.summary}\nloads in: {account.loads}\n{done}")
