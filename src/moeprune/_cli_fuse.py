"""``moeprune fuse``: merge experts into fewer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeprune import _cli_options as opt
from moeprune import _cli_output as out
from moeprune import _files

if TYPE_CHECKING:
    from moeprune.fusing import FuseResult
    from moeprune.plans_fuse import FusePlan

_SEQUENTIAL = typer.Option(
    "--sequential", help="Group and merge every layer on what the fused ones before it give, as REAM does."
)
_NO_GUARD = typer.Option("--no-guard", help="Let super experts be merged.")


def fuse(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Folder or Hub id; left out: the bundled model.")
    ] = None,
    ratio: opt.Ratio = None,
    keep: opt.Keep = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="DIR", help="The fused checkpoint.  [default: ./<name>-fused-<left>of<E>]"
        ),
    ] = None,
    grouping: opt.GroupingName = None,
    merge: opt.MergeName = None,
    align: opt.Align = None,
    router: opt.RouterMode = None,
    sequential: Annotated[bool, _SEQUENTIAL] = False,
    calibration: opt.Calibration = [],  # noqa: B006 - typer copies it
    statistics_file: Annotated[
        Path | None,
        typer.Option("--statistics-file", metavar="FILE", help="Group by this file instead of calibrating."),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Execute this fuse plan instead of deciding.")
    ] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Write the plan to the file -o, and merge nothing.")
    ] = False,
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
    weights: opt.Weights = "",
    no_guard: Annotated[bool, _NO_GUARD] = False,
    round_to: opt.RoundTo = 1,
    mtp: opt.Mtp = "cut",
    max_shard_size: opt.ShardSize = "5GB",
    batch_size: opt.BatchSize = 16,
    limit: opt.Limit = None,
    cache: opt.Cache = None,
    no_cache: opt.NoCache = False,
    margin: opt.Margin = 1.0,
    overwrite: opt.Overwrite = False,
    dry_run: opt.DryRun = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Merge experts into fewer: collect, group, merge, verify and, with --eval, evaluate.

    Without MODEL: the bundled model and its tasks.
    """
    from moeprune import fusing

    decided = {
        "grouping": grouping,
        "merge": merge,
        "align": align,
        "router": router,
        "sequential": sequential or None,
        "weights": opt.weights_of(weights),
        "guard": False if no_guard else None,
        "mtp": None if mtp == "cut" else mtp,
    }
    result = fusing.fuse(
        model,
        output,
        ratio=ratio,
        keep=keep,
        calibration=calibration,
        statistics=statistics_file,
        plan=plan,
        plan_only=plan_only,
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
        round_to=round_to,
        max_shard_size=_files.parse_size(max_shard_size),
        batch_size=batch_size,
        limit=limit,
        cache=opt.cache_of(cache, unused=no_cache),
        margin=margin,
        overwrite=overwrite,
        dry_run=dry_run,
        **{name: value for name, value in decided.items() if value is not None},
    )
    out.say_notes(result.plan.notes if result.plan else ())
    print_fused(result, plan_only=plan_only, as_json=as_json)


def print_fused(result: FuseResult, *, plan_only: bool, as_json: bool) -> None:
    """All that a run made."""
    if as_json:
        out.print_json(_fused_object(result))
        return
    if result.plan is not None:
        out.show(render_fusion(result.plan))
    else:
        out.show(f"merge {result.of} experts of every layer into {result.kept}")
    if result.verification is not None:
        out.print_proof(result.verification, as_json=False)
    if result.report is not None:
        out.show("")
        out.print_report(result.report, None, as_json=False)
    if result.forecast is not None:
        out.show(out.render_forecast(result.forecast))
    if plan_only and result.plan is not None:
        out.show(f"plan: {result.output}")
    elif result.verification is None:
        out.show(f"dry run: nothing was written to {result.output}")
    else:
        out.show(f"checkpoint: {result.output}")
    if result.report is not None:
        out.show(f"report: {result.output / 'moeprune' / 'report' / 'report.md'}")


def _fused_object(result: FuseResult) -> dict[str, Any]:
    return {
        "output": str(result.output),
        "written": result.verification is not None,
        "kept": result.kept,
        "of": result.of,
        "plan": result.plan.to_dict() if result.plan else None,
        "forecast": result.forecast.to_dict() if result.forecast else None,
        "verification": out.proof_object(result.verification) if result.verification else None,
        "report": result.report.payload() if result.report else None,
    }


def render_fusion(plan: FusePlan) -> str:
    """What a fuse plan decides and means, for people."""
    groups = [group for layer in plan.layers.values() for group in layer.groups]
    largest, single = max(len(group.members) for group in groups), sum(not group.merged for group in groups)
    layers = f"{len(plan.layers)} layer{'s' * (len(plan.layers) != 1)}"
    name = plan.strategy.get("name", "by hand")
    how = f"{plan.merge}{', aligned' if plan.align else ''}, router {plan.router}"
    how += ", each layer on what the fused ones before it give" if plan.command.get("sequential") else ""
    lines = [
        f"{name}: merge {plan.budget.get('of')} experts into {plan.kept} in {layers}",
        f"merged by: {how}",
        f"groups: the largest has {largest} experts, {single} of {len(groups)} have one, which stays as it is",
    ]
    return "\n".join([*lines, *out.render_size(plan.size), *out.render_engines(plan.engines)])


def print_applied(plan: FusePlan, output: Path, *, dry_run: bool, as_json: bool) -> None:
    """What was made of a plan."""
    if as_json:
        facts = {key: plan.to_dict()[key] for key in ("budget", "strategy", "size", "engines", "notes", "config_edits")}
        out.print_json({"output": str(output), "written": not dry_run} | facts)
    else:
        what = f"dry run: nothing was written to {output}" if dry_run else f"checkpoint: {output}"
        out.show(f"{render_fusion(plan)}\n{what}")
