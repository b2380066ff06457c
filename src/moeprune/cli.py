"""The command line: options in, stages called, results on stdout, everything else on stderr.

The text of options is read in ``_cli_options``, results are laid out in ``_cli_output``, and errors become exit codes
in ``_cli_run``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeprune import _cli_fuse, _cli_inspect, _cli_listing, _cli_publish, _cli_report, _cli_skip, _files
from moeprune import _cli_options as opt
from moeprune import _cli_output as out
from moeprune._cli_eval import print_outlook
from moeprune._cli_heal import heal
from moeprune._cli_multiplex import multiplex
from moeprune._cli_probes import print_probes, run_probes
from moeprune._cli_run import exit_code
from moeprune._cli_skip import skip
from moeprune._cli_sparsify import sparsify
from moeprune._cli_sweep import sweep
from moeprune.catalogue import PATHS
from moeprune.errors import ConfigError
from moeprune.plans_fuse import FusePlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moeprune.evaluation.compare import EvalReport

app = typer.Typer(
    add_completion=False,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Prune the experts of a Mixture-of-Experts checkpoint, and report honestly what it costs.",
)
stats_app = typer.Typer(rich_markup_mode=None, help="Work with statistics files.")
app.add_typer(stats_app, name="stats")


# --- stages ---------------------------------------------------------------------------------------------------------


@app.command()
def prune(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Folder or Hub id; left out: the bundled model.")
    ] = None,
    ratio: opt.Ratio = None,
    keep: opt.Keep = None,
    output: opt.OutputFolder = None,
    calibration: opt.Calibration = [],  # noqa: B006 - typer copies it
    strategy: opt.StrategyName = None,
    heal: Annotated[
        str, typer.Option("--heal", metavar="layerwise", help="Fit the pruned layers to the original's afterwards.")
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
    statistics: opt.StatisticNames = "",
    paths: opt.Paths = PATHS,
    trust_remote_code: opt.Trust = False,
    revision: opt.Revision = None,
    weights: opt.Weights = "",
    blend: opt.Blend = "sum",
    protect_top: opt.ProtectTop = 0,
    protect: opt.Protect = "",
    no_guard: opt.NoGuard = False,
    target: opt.Target = "",
    round_to: opt.RoundTo = 1,
    budget: opt.BudgetName = "uniform",
    allow_non_uniform: opt.NonUniform = False,
    rearrange: opt.Rearrange = 1,
    selection: opt.Selection = [],  # noqa: B006 - typer copies it
    mtp: opt.Mtp = "cut",
    max_shard_size: opt.ShardSize = "5GB",
    backend: opt.Backend = "hf",
    model_args: opt.ModelArgs = "",
    batch_size: opt.BatchSize = 16,
    limit: opt.Limit = None,
    num_fewshot: opt.FewShot = None,
    apply_chat_template: opt.ChatTemplate = None,
    max_gen_toks: opt.MaxGenToks = None,
    confirm_run_unsafe_code: opt.UnsafeCode = False,
    launcher: opt.Launcher = None,
    cache: opt.Cache = None,
    no_cache: opt.NoCache = False,
    margin: opt.Margin = 1.0,
    fail_on: opt.FailOn = "",
    overwrite: opt.Overwrite = False,
    dry_run: opt.DryRun = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Collect, plan, apply, verify and, with --eval, evaluate. Without MODEL: the bundled model and its tasks."""
    from moeprune import oneshot
    from moeprune.strategies import DEFAULT

    _check_gate(fail_on, evaluated=bool(tasks) or model is None)
    result = oneshot.prune(
        model,
        output,
        ratio=ratio,
        keep=keep,
        calibration=calibration,
        strategy=strategy or DEFAULT,
        heal=heal,
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
        statistics=opt.names(statistics),
        paths=paths,
        trust_remote_code=trust_remote_code,
        revision=revision,
        weights=opt.weights_of(weights),
        blend=blend,
        protect_top=protect_top,
        protect=opt.protected_of(protect),
        guard=not no_guard,
        target=opt.names(target),
        round_to=round_to,
        budget=budget,
        allow_non_uniform=allow_non_uniform,
        rearrange=rearrange,
        selection=selection,
        mtp=mtp,
        max_shard_size=_files.parse_size(max_shard_size),
        backend=backend,
        model_args=opt.model_args_of(model_args),
        batch_size=batch_size,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        max_gen_toks=max_gen_toks,
        confirm_run_unsafe_code=confirm_run_unsafe_code,
        launcher=launcher,
        cache=opt.cache_of(cache, unused=no_cache),
        margin=margin,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    out.say_notes(result.plan.notes)
    out.print_pruned(result, as_json=as_json)
    _gate(result.report, fail_on)


@app.command()
def collect(
    model: opt.Model,
    output: opt.OutputFile,
    calibration: opt.Calibration = [],  # noqa: B006 - typer copies it
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
    layers: opt.Layers = "",
    statistics: opt.StatisticNames = "",
    paths: opt.Paths = PATHS,
    trust_remote_code: opt.Trust = False,
    revision: opt.Revision = None,
    overwrite: opt.Overwrite = False,
    dry_run: opt.DryRun = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Run calibration data through a model and add up what its routers and experts do."""
    from moeprune import pipeline
    from moeprune.collectors.distributed import from_environment, refuse_many
    from moeprune.planner import coverage_warnings

    options: dict[str, Any] = {
        "calibration": calibration,
        "num_samples": num_samples,
        "max_length": max_length,
        "shuffle": shuffle,
        "pack": pack,
        "batch_tokens": batch_tokens,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "stream": stream,
        "memory": opt.size_of(memory),
        "device_memory": opt.size_of(device_memory),
        "layers": opt.layers_of(layers),
        "statistics": opt.names(statistics),
        "paths": paths,
        "trust_remote_code": trust_remote_code,
        "revision": revision,
        "overwrite": overwrite,
    }
    if dry_run:
        refuse_many("a dry run")
        out.print_forecast(pipeline.forecast(model, output, **options), output, as_json=as_json)
        return
    collected = pipeline.collect(model, output, **options)
    if not from_environment().first:
        return  # process 0 tells what came of all of them
    nothing = ["no calibration data: only strategies that need none can plan from this file"]
    out.say_notes(coverage_warnings(collected) if collected.tokens else nothing)
    out.print_statistics(output, collected, as_json=as_json)


@stats_app.command()
def merge(
    files: Annotated[list[Path], typer.Argument(metavar="STATISTICS", help="Statistics files of one model.")],
    output: opt.OutputFile,
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Add up statistics files: the result is that of all their data together."""
    from moeprune.statistics import RouterStatistics, merge_statistics

    _files.check_output_file(output, overwrite=overwrite)
    merged = merge_statistics(RouterStatistics.load(file) for file in files)
    merged.save(output)
    out.print_statistics(output, merged, as_json=as_json)


@app.command()
def plan(
    statistics: opt.Statistics,
    model: opt.Model,
    ratio: opt.Ratio = None,
    keep: opt.Keep = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Plan file.")] = None,
    strategy: opt.StrategyName = None,
    weights: opt.Weights = "",
    blend: opt.Blend = "sum",
    protect_top: opt.ProtectTop = 0,
    protect: opt.Protect = "",
    no_guard: opt.NoGuard = False,
    target: opt.Target = "",
    round_to: opt.RoundTo = 1,
    budget: opt.BudgetName = "uniform",
    allow_non_uniform: opt.NonUniform = False,
    rearrange: opt.Rearrange = 1,
    selection: opt.Selection = [],  # noqa: B006 - typer copies it
    max_length: opt.MaxLength = 2048,
    batch_tokens: opt.BatchTokens = 8192,
    device: opt.Device = None,
    dtype: opt.Dtype = "auto",
    stream: opt.Stream = None,
    memory: opt.Memory = None,
    device_memory: opt.DeviceMemory = None,
    trust_remote_code: opt.Trust = False,
    mtp: opt.Mtp = "cut",
    seed: opt.Seed = 0,
    revision: opt.Revision = None,
    overwrite: opt.Overwrite = False,
    dry_run: opt.DryRun = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Decide which experts stay, and write it down as JSON."""
    from moeprune import pipeline
    from moeprune.strategies import DEFAULT

    if output is None and not dry_run:
        raise ConfigError("plan needs an output file", "pass -o plan.json, or --dry-run to look only")
    running = {
        "max_length": None if max_length == 2048 else max_length,
        "batch_tokens": None if batch_tokens == 8192 else batch_tokens,
        "device": device,
        "dtype": None if dtype == "auto" else dtype,
        "stream": stream,
        "memory": opt.size_of(memory),
        "device_memory": opt.size_of(device_memory),
        "trust_remote_code": trust_remote_code or None,
    }
    made = pipeline.plan(
        statistics,
        model,
        ratio=ratio,
        keep=keep,
        strategy=strategy or DEFAULT,
        weights=opt.weights_of(weights),
        blend=blend,  # type: ignore[arg-type]  # checked by the planner
        protect_top=protect_top,
        protect=opt.protected_of(protect),
        guard=not no_guard,
        target=opt.names(target),
        round_to=round_to,
        budget=budget,
        allow_non_uniform=allow_non_uniform,
        rearrange=rearrange,
        selection=selection,
        mtp=mtp,  # type: ignore[arg-type]  # checked by the planner
        seed=seed,
        revision=revision,
        output=None if dry_run else output,
        overwrite=overwrite,
        **{name: value for name, value in running.items() if value is not None},
    )
    out.say_notes(made.notes)
    out.print_plan(made, None if dry_run else output, as_json=as_json)


@app.command()
def apply(
    model: opt.Model,
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file.")],
    output: opt.OutputFolder = None,
    max_shard_size: opt.ShardSize = "5GB",
    revision: opt.Revision = None,
    overwrite: opt.Overwrite = False,
    dry_run: opt.DryRun = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Write the checkpoint that a plan describes: pruned or gated by copying bytes, or fused."""
    from moeprune import pipeline
    from moeprune.plans_skip import SkipPlan

    written, decided = pipeline.apply_plan(
        model,
        plan_file,
        output,
        max_shard_size=_files.parse_size(max_shard_size),
        overwrite=overwrite,
        revision=revision,
        dry_run=dry_run,
    )
    if isinstance(decided, FusePlan):
        _cli_fuse.print_applied(decided, written, dry_run=dry_run, as_json=as_json)
    elif isinstance(decided, SkipPlan):
        _cli_skip.print_applied(decided, written, dry_run=dry_run, as_json=as_json)
    else:
        out.print_applied(decided, written, dry_run=dry_run, as_json=as_json)


@app.command()
def verify(
    model: opt.Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Pruned checkpoint.")],
    revision: opt.Revision = None,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Prove that every tensor of a pruned checkpoint equals its bytes in the source."""
    from moeprune import pipeline

    out.print_proof(pipeline.verify(model, output, revision=revision), as_json=as_json)


@app.command(name="eval")
def evaluate(
    context: typer.Context,
    base: Annotated[str, typer.Argument(metavar="BASE", help="The original: folder or Hub id.")],
    pruned: Annotated[
        list[str],
        typer.Argument(
            metavar="PRUNED",
            help="With --tasks a pruned checkpoint, folder or Hub id; with --text plan files or pruned folders.",
        ),
    ],
    output: opt.ReportFolder,
    tasks: opt.Tasks = "",
    text: opt.Text = [],  # noqa: B006 - typer copies it
    probes: opt.Probes = False,
    include_path: opt.IncludePath = None,
    backend: opt.Backend = "hf",
    model_args: opt.ModelArgs = "",
    batch_size: opt.BatchSize = 16,
    limit: opt.Limit = None,
    num_fewshot: opt.FewShot = None,
    apply_chat_template: opt.ChatTemplate = None,
    max_gen_toks: opt.MaxGenToks = None,
    confirm_run_unsafe_code: opt.UnsafeCode = False,
    launcher: opt.Launcher = None,
    cache: opt.Cache = None,
    no_cache: opt.NoCache = False,
    device: opt.Device = None,
    dtype: opt.Dtype = "auto",
    trust_remote_code: opt.Trust = False,
    seed: opt.Seed = 0,
    revision: opt.Revision = None,
    margin: opt.Margin = 1.0,
    fail_on: opt.FailOn = "",
    num_samples: opt.NumSamples = 512,
    max_length: opt.MaxLength = 2048,
    shuffle: opt.Shuffle = False,
    pack: opt.Pack = False,
    batch_tokens: opt.BatchTokens = 8192,
    stream: opt.Stream = None,
    memory: opt.Memory = None,
    device_memory: opt.DeviceMemory = None,
    overwrite: opt.Overwrite = False,
    dry_run: opt.DryRun = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Run lm-eval tasks on both models with identical requests, score any number of plans on text, or probe a pair."""
    from moeprune import pipeline, scoring

    _check_kind(context, pruned, tasks=tasks, text=text, probes=probes)
    _check_gate(fail_on)
    probed = None
    if text or probes:
        options: dict[str, Any] = {
            "text": text,
            "output": output,
            "num_samples": num_samples,
            "max_length": max_length,
            "shuffle": shuffle,
            "pack": pack,
            "batch_tokens": batch_tokens,
            "seed": seed,
            "device": device,
            "dtype": dtype,
            "stream": stream,
            "memory": opt.size_of(memory),
            "device_memory": opt.size_of(device_memory),
            "trust_remote_code": trust_remote_code,
            "revision": revision,
            "overwrite": overwrite,
        }
        if probes:
            probed = run_probes(base, pruned[0], options)
        elif dry_run:
            expected = scoring.forecast_text(base, pruned, **options)
            out.print_forecast(expected, output, as_json=as_json, doing="scoring")
        else:
            out.print_text_report(scoring.evaluate_text(base, pruned, **options), output, as_json=as_json)
        if not tasks:
            if probed is not None:
                print_probes(probed, None, output, as_json=as_json)
            return
    asked: dict[str, Any] = {
        "tasks": opt.names(tasks),
        "output": output,
        "include_path": include_path,
        "backend": backend,
        "model_args": opt.model_args_of(model_args),
        "batch_size": batch_size,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "apply_chat_template": apply_chat_template,
        "max_gen_toks": max_gen_toks,
        "confirm_run_unsafe_code": confirm_run_unsafe_code,
        "launcher": launcher,
        "device": device,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "seed": seed,
        "revision": revision,
        "margin": margin,
        "overwrite": overwrite or probes,  # which were written there
    }
    if dry_run:
        print_outlook(pipeline.outlook(base, pruned[0], **asked), output, as_json=as_json)
        return
    report = pipeline.evaluate(base, pruned[0], cache=opt.cache_of(cache, unused=no_cache), **asked)
    if probed is not None:
        print_probes(probed, report, output, as_json=as_json)
        _cli_report.redraw(output, pruned[0])
    else:
        out.print_report(report, output, as_json=as_json)
    _gate(report, fail_on)


# What only one of the two kinds of evaluation knows.
_OF_TASKS = {
    *("include_path", "backend", "model_args", "batch_size", "limit", "num_fewshot", "apply_chat_template"),
    *("max_gen_toks", "confirm_run_unsafe_code", "launcher", "cache", "no_cache", "margin", "fail_on"),
}
_OF_TEXT = {
    *("num_samples", "max_length", "shuffle", "pack", "batch_tokens", "stream", "memory", "device_memory"),
}
_NOT_OF_PROBES = {"pack", "dry_run"}


def _check_kind(
    context: typer.Context, pruned: Sequence[str], *, tasks: str, text: Sequence[str], probes: bool
) -> None:
    """Refuse what would silently do nothing in this kind of evaluation."""
    if not probes and bool(tasks) == bool(text):
        hint = "--tasks asks lm-eval's questions of a checkpoint, --text measures perplexity under plans"
        raise ConfigError("eval takes either --tasks or --text, or --probes", hint)
    if (tasks or probes) and len(pruned) > 1:
        kind = "--tasks evaluates" if tasks else "--probes compares"
        raise ConfigError(f"{kind} one checkpoint, not {len(pruned)}", "--text compares many plans")
    if tasks and Path(pruned[0]).suffix == ".json":
        raise ConfigError(f"--tasks evaluates a checkpoint, and {pruned[0]} is a plan", "apply it first")
    idle = (set() if tasks else _OF_TASKS) | (set() if text or probes else _OF_TEXT)
    idle |= _NOT_OF_PROBES if probes else set()
    kind = "--probes" if probes else "--text" if text else "--tasks"
    for option in context.command.params:
        source = str(getattr(context.get_parameter_source(str(option.name)), "name", ""))
        if option.name in idle and source == "COMMANDLINE":
            raise ConfigError(f"{option.opts[0]} does nothing with {kind}", "leave it out")


@app.command()
def compare(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="lm-eval output of the original, with samples.")],
    pruned: Annotated[Path, typer.Argument(metavar="PRUNED", help="lm-eval output of the pruned model.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="Folder of the report.")] = None,
    margin: opt.Margin = 1.0,
    metrics: Annotated[
        str, typer.Option("--metrics", metavar="TASK=METRIC,...", help="Primary metrics: arc_easy=acc_norm,...")
    ] = "",
    fail_on: opt.FailOn = "",
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Compare two folders that lm-eval wrote with --log_samples, from any backend."""
    from moeprune import pipeline

    _check_gate(fail_on)
    chosen = opt.pairs(metrics, "--metrics") or None
    report = pipeline.compare(base, pruned, margin=margin, metrics=chosen, output=output, overwrite=overwrite)
    out.print_report(report, output, as_json=as_json)
    _gate(report, fail_on)


def _check_gate(fail_on: str, *, evaluated: bool = True) -> None:
    if fail_on not in {"", "loss"}:
        raise ConfigError(f"--fail-on knows no {fail_on!r}", "write --fail-on loss")
    if fail_on and not evaluated:
        raise ConfigError("--fail-on judges an evaluation, and no task is named", "name tasks with --eval")


def _gate(report: EvalReport | None, fail_on: str) -> None:
    if fail_on and report is not None and any(task.verdict == fail_on for task in report.tasks):
        raise typer.Exit(3)


app.command()(_cli_report.report)
app.command()(_cli_publish.card)
app.command()(_cli_publish.push)
app.command()(sweep)
app.command()(_cli_fuse.fuse)
app.command()(sparsify)
app.command()(multiplex)
app.command()(heal)
app.command()(skip)


# --- looking around -------------------------------------------------------------------------------------------------

app.command()(_cli_inspect.inspect)
app.command()(_cli_listing.strategies)
app.command()(_cli_listing.statistics)
app.command()(_cli_listing.architectures)


def _version(value: bool) -> None:
    if value:
        from moeprune import __version__

        out.show(f"moeprune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        out.say(context.get_help())
        raise typer.Exit(2)
    if context.invoked_subcommand != "collect":
        from moeprune.collectors.distributed import refuse_many

        refuse_many(f"`moeprune {context.invoked_subcommand}`")


# --- running --------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    command = typer.main.get_command(app)
    return exit_code(lambda: command(args=arguments, prog_name="moeprune", standalone_mode=False))
