"""The command line: options in, stages called, results on stdout, everything else on stderr.

Exit codes: 0 done, 1 failed after work began, 2 refused before, 3 a quality gate failed, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeprune import _files
from moeprune.errors import ConfigError, MoePruneError

if TYPE_CHECKING:
    from moeprune.evaluation.compare import EvalReport
    from moeprune.plans import PruningPlan

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Prune the experts of a Mixture-of-Experts checkpoint, and report honestly what it costs.",
)
stats_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Work with statistics files.")
app.add_typer(stats_app, name="stats")

# --- options that several commands share ----------------------------------------------------------------------------

Model = Annotated[str, typer.Argument(help="Checkpoint folder or Hub id.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that is not empty.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be written, write nothing.")]


def _set_quiet(value: bool) -> bool:
    _files.quiet.set(value)
    return value


def _set_verbosity(value: int) -> int:
    _verbosity[0] = value
    return value


_verbosity = [0]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", callback=_set_quiet, help="No progress and no notes.")]
Verbose = Annotated[int, typer.Option("-v", "--verbose", count=True, callback=_set_verbosity, help="-vv: tracebacks.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub model.")]

Calibration = Annotated[
    list[str],
    typer.Option(
        "--calibration",
        help="[DOMAIN=]SOURCE, repeatable: .jsonl .json .parquet .txt, or org/name[/config][@split].",
    ),
]
NumSamples = Annotated[int, typer.Option("--num-samples", help="Rows per source.")]
MaxLength = Annotated[int, typer.Option("--max-length", help="Tokens per sequence.")]
Shuffle = Annotated[bool, typer.Option("--shuffle", help="Draw rows with --seed instead of taking the first.")]
Pack = Annotated[bool, typer.Option("--pack", help="Join rows into full sequences.")]
BatchTokens = Annotated[int, typer.Option("--batch-tokens", help="Tokens per batch, padding included.")]
Seed = Annotated[int, typer.Option("--seed", help="For everything that draws.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, or auto to spread over all.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (the checkpoint's own), float32, bfloat16, float16.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]

Ratio = Annotated[str | None, typer.Option("--ratio", help="Fraction of the experts of each layer to REMOVE.")]
Keep = Annotated[int | None, typer.Option("--keep", help="Exact number of experts to keep in each layer.")]
StrategyName = Annotated[str | None, typer.Option("--strategy", help="See `moeprune strategies`.")]
Weights = Annotated[str, typer.Option("--weights", help="Domain weights: code=2,prose=1.")]
Protect = Annotated[str, typer.Option("--protect", help="Experts that must stay: LAYER:EXPERT,...")]
NoGuard = Annotated[bool, typer.Option("--no-guard", help="Let strategies drop super experts.")]
Target = Annotated[str, typer.Option("--target", help="Engines that must take the result: vllm,sglang,...")]
RoundTo = Annotated[int, typer.Option("--round-to", help="Make the kept count a multiple of this, rounding up.")]
Mtp = Annotated[str, typer.Option("--mtp", help="MTP layers: cut them like the last layer, or drop them.")]
ShardSize = Annotated[str, typer.Option("--max-shard-size", help="Bytes per file: 5GB, 512MiB.")]

Tasks = Annotated[str, typer.Option("--tasks", "--eval", help="lm-eval tasks or groups: a,b.")]
IncludePath = Annotated[Path | None, typer.Option("--include-path", "--include_path", help="Folder of more tasks.")]
Backend = Annotated[str, typer.Option("--model", help="Backend: hf, vllm or sglang.")]
ModelArgs = Annotated[str, typer.Option("--model-args", "--model_args", help="Backend arguments: k=v,... or JSON.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "--batch_size", help="Fixed, the same for both models.")]
Limit = Annotated[int | None, typer.Option("--limit", help="First N questions of each task; no full benchmark.")]
FewShot = Annotated[int | None, typer.Option("--num-fewshot", "--num_fewshot", help="Examples before each question.")]
ChatTemplate = Annotated[bool, typer.Option("--apply-chat-template", "--apply_chat_template", help="Ask as a chat.")]
Margin = Annotated[float, typer.Option("--margin", help="Loss in points that would be acceptable.")]
FailOn = Annotated[str, typer.Option("--fail-on", help="`loss`: exit with 3 when a task's verdict is a loss.")]


# --- stages ---------------------------------------------------------------------------------------------------------


@app.command()
def prune(
    model: Annotated[str | None, typer.Argument(help="Folder or Hub id; left out: the bundled model.")] = None,
    ratio: Ratio = None,
    keep: Keep = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder of the pruned checkpoint.")] = None,
    calibration: Calibration = [],  # noqa: B006 - typer copies it
    strategy: StrategyName = None,
    tasks: Tasks = "",
    include_path: IncludePath = None,
    num_samples: NumSamples = 512,
    max_length: MaxLength = 2048,
    shuffle: Shuffle = False,
    pack: Pack = False,
    batch_tokens: BatchTokens = 8192,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    revision: Revision = None,
    weights: Weights = "",
    protect: Protect = "",
    no_guard: NoGuard = False,
    target: Target = "",
    round_to: RoundTo = 1,
    mtp: Mtp = "cut",
    max_shard_size: ShardSize = "5GB",
    backend: Backend = "hf",
    model_args: ModelArgs = "",
    batch_size: BatchSize = 16,
    limit: Limit = None,
    num_fewshot: FewShot = None,
    apply_chat_template: ChatTemplate = False,
    margin: Margin = 1.0,
    fail_on: FailOn = "",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Collect, plan, apply, verify and, with --eval, evaluate. Without MODEL: the bundled model and its tasks."""
    from moeprune import pipeline
    from moeprune.rewrite.shards import parse_size

    _check_gate(fail_on)
    limited = {"limit": limit} if limit is not None or model is not None else {}
    result = pipeline.prune(
        model,
        output,
        ratio=ratio,
        keep=keep,
        calibration=calibration,
        strategy=strategy or pipeline.DEFAULT_STRATEGY,
        tasks=_names(tasks),
        calibration_options={
            "num_samples": num_samples,
            "max_length": max_length,
            "shuffle": shuffle,
            "pack": pack,
            "batch_tokens": batch_tokens,
            "seed": seed,
            "device": device,
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
        },
        evaluation=_evaluation(
            backend, model_args, batch_size, device, dtype, num_fewshot, apply_chat_template, trust_remote_code, seed
        )
        | ({"include_path": include_path} if include_path else {})
        | limited,
        margin=margin,
        max_shard_size=parse_size(max_shard_size),
        overwrite=overwrite,
        revision=revision,
        round_to=round_to,
        dry_run=dry_run,
        weights=_weights(weights),
        protect=_protect(protect),
        guard=not no_guard,
        mtp=mtp,
        target=_names(target),
        seed=seed,
    )
    _say_notes(result.plan.notes)
    if as_json:
        _print_json(_prune_object(result))
    else:
        _print_prune(result)
    _gate(result.report, fail_on)


@app.command()
def collect(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Statistics file.")],
    calibration: Calibration = [],  # noqa: B006 - typer copies it
    num_samples: NumSamples = 512,
    max_length: MaxLength = 2048,
    shuffle: Shuffle = False,
    pack: Pack = False,
    batch_tokens: BatchTokens = 8192,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Run calibration data through a model and add up what its routers and experts do."""
    from moeprune import pipeline
    from moeprune.planner import coverage_warnings

    statistics = pipeline.collect(
        model,
        output,
        calibration=calibration,
        num_samples=num_samples,
        max_length=max_length,
        shuffle=shuffle,
        pack=pack,
        batch_tokens=batch_tokens,
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        revision=revision,
        overwrite=overwrite,
    )
    _say_notes(coverage_warnings(statistics))
    _print_statistics(output, statistics, as_json=as_json)


@stats_app.command()
def merge(
    files: Annotated[list[Path], typer.Argument(help="Statistics files of one model.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Merged file.")],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Add up statistics files: the result is that of all their data together."""
    from moeprune.statistics import RouterStatistics, merge_statistics

    _files.check_output_file(output, overwrite=overwrite)
    merged = merge_statistics(RouterStatistics.load(file) for file in files)
    merged.save(output)
    _print_statistics(output, merged, as_json=as_json)


@app.command()
def plan(
    statistics: Annotated[Path, typer.Argument(help="Statistics file.")],
    model: Model,
    ratio: Ratio = None,
    keep: Keep = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Plan file.")] = None,
    strategy: StrategyName = None,
    weights: Weights = "",
    protect: Protect = "",
    no_guard: NoGuard = False,
    target: Target = "",
    round_to: RoundTo = 1,
    mtp: Mtp = "cut",
    seed: Seed = 0,
    revision: Revision = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Decide which experts stay, and write it down as JSON."""
    from moeprune import pipeline

    if output is None and not dry_run:
        raise ConfigError("plan needs an output file", "pass -o plan.json, or --dry-run to look only")
    made = pipeline.plan(
        statistics,
        model,
        ratio=ratio,
        keep=keep,
        strategy=strategy or pipeline.DEFAULT_STRATEGY,
        weights=_weights(weights),
        protect=_protect(protect),
        guard=not no_guard,
        target=_names(target),
        round_to=round_to,
        mtp=mtp,  # type: ignore[arg-type]  # checked by the planner
        seed=seed,
        revision=revision,
        output=None if dry_run else output,
        overwrite=overwrite,
    )
    _say_notes(made.notes)
    if as_json:
        _print_json(made.to_dict())
    else:
        print(_render_plan(made) + ("" if dry_run else f"\nplan: {output}"))


@app.command()
def apply(
    model: Model,
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the pruned checkpoint.")],
    max_shard_size: ShardSize = "5GB",
    revision: Revision = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Write the pruned checkpoint that a plan describes, by copying bytes."""
    from moeprune import pipeline
    from moeprune.plans import PruningPlan
    from moeprune.rewrite.shards import parse_size

    decided = PruningPlan.load(plan_file)
    pipeline.apply(
        model,
        decided,
        output,
        max_shard_size=parse_size(max_shard_size),
        overwrite=overwrite,
        revision=revision,
        dry_run=dry_run,
    )
    if as_json:
        _print_json({"output": str(output), "written": not dry_run, "size": dict(decided.size)})
    else:
        print(
            _render_plan(decided) + (f"\nnothing written; {output} is free" if dry_run else f"\ncheckpoint: {output}")
        )


@app.command()
def verify(
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Pruned checkpoint.")],
    revision: Revision = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Prove that every tensor of a pruned checkpoint equals its bytes in the source."""
    from moeprune import pipeline

    proof = pipeline.verify(model, output, revision=revision)
    if as_json:
        _print_json(dataclasses.asdict(proof))
    else:
        print(f"verified: {_render_proof(proof)}")


@app.command(name="eval")
def evaluate(
    base: Annotated[str, typer.Argument(help="The original: folder or Hub id.")],
    pruned: Annotated[str, typer.Argument(help="The pruned checkpoint.")],
    tasks: Tasks,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the report.")],
    include_path: IncludePath = None,
    backend: Backend = "hf",
    model_args: ModelArgs = "",
    batch_size: BatchSize = 16,
    limit: Limit = None,
    num_fewshot: FewShot = None,
    apply_chat_template: ChatTemplate = False,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    margin: Margin = 1.0,
    fail_on: FailOn = "",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Run lm-eval tasks on both models with identical requests, and report the change per task."""
    from moeprune import pipeline

    _check_gate(fail_on)
    report = pipeline.evaluate(
        base,
        pruned,
        tasks=_names(tasks),
        output=output,
        include_path=include_path,
        margin=margin,
        overwrite=overwrite,
        limit=limit,
        **_evaluation(
            backend, model_args, batch_size, device, dtype, num_fewshot, apply_chat_template, trust_remote_code, seed
        ),
    )
    _print_report(report, output, as_json=as_json)
    _gate(report, fail_on)


@app.command()
def compare(
    base: Annotated[Path, typer.Argument(help="lm-eval output of the original, with samples.")],
    pruned: Annotated[Path, typer.Argument(help="lm-eval output of the pruned model, with samples.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder of the report.")] = None,
    margin: Margin = 1.0,
    metrics: Annotated[str, typer.Option("--metrics", help="Primary metric by task: arc_easy=acc_norm,...")] = "",
    fail_on: FailOn = "",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Compare two folders that lm-eval wrote with --log_samples, from any backend."""
    from moeprune import pipeline

    _check_gate(fail_on)
    chosen = dict(_pairs(metrics, "--metrics")) or None
    report = pipeline.compare(base, pruned, margin=margin, metrics=chosen, output=output, overwrite=overwrite)
    _print_report(report, output, as_json=as_json)
    _gate(report, fail_on)


# --- looking around -------------------------------------------------------------------------------------------------


@app.command()
def inspect(
    model: Model, revision: Revision = None, as_json: AsJson = False, quiet: Quiet = False, verbose: Verbose = 0
) -> None:
    """Say what a checkpoint is: architecture, layers, experts, groups, size, and the counts that can be kept."""
    from moeprune.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model, revision=revision)
    facts = {
        "path": str(checkpoint.path),
        "model_type": checkpoint.spec.model_type,
        "moe_layers": list(checkpoint.moe_layers),
        "mtp_layers": list(checkpoint.mtp_layers),
        "experts": checkpoint.num_experts,
        "top_k": checkpoint.top_k,
        "n_group": checkpoint.n_group,
        "topk_group": checkpoint.topk_group,
        "smallest_keep": checkpoint.router.smallest(),
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.nbytes,
        "fingerprint": checkpoint.fingerprint,
    }
    if as_json:
        _print_json(facts)
    else:
        print("\n".join(f"{name:<14} {value}" for name, value in facts.items()))


@app.command()
def strategies(as_json: AsJson = False) -> None:
    """List the strategies."""
    from moeprune.strategies import BUILTIN, DEFAULT

    if as_json:
        _print_json({name: {"summary": item.summary, "paper": item.paper} for name, item in BUILTIN.items()})
        return
    for name, item in BUILTIN.items():
        paper = f" (arXiv:{item.paper})" if item.paper else ""
        print(f"{name:<14} {item.summary}{paper}{'  [default]' if name == DEFAULT else ''}")
    print("S(b,alpha,beta) names any member of the saliency family")


@app.command()
def architectures(as_json: AsJson = False) -> None:
    """List the supported architectures."""
    from moeprune.architectures import ARCHITECTURES

    if as_json:
        _print_json(list(ARCHITECTURES))
    else:
        print("\n".join(ARCHITECTURES))


def _version(value: bool) -> None:
    if value:
        from moeprune import __version__

        print(f"moeprune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    pass


# --- reading options ------------------------------------------------------------------------------------------------


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _pairs(text: str, option: str) -> list[tuple[str, str]]:
    pairs = []
    for item in _names(text):
        key, equals, value = item.partition("=")
        if not equals or not key or not value:
            raise ConfigError(f"{option}: {item!r} is not NAME=VALUE")
        pairs.append((key, value))
    return pairs


def _weights(text: str) -> dict[str, float] | None:
    try:
        return {name: float(value) for name, value in _pairs(text, "--weights")} or None
    except ValueError:
        raise ConfigError(f"--weights {text!r}: a weight is not a number") from None


def _protect(text: str) -> dict[int, frozenset[int]] | None:
    layers: dict[int, set[int]] = {}
    for item in _names(text):
        layer, _, expert = item.partition(":")
        if not (layer.isdecimal() and expert.isdecimal()):
            raise ConfigError(f"--protect: {item!r} is not LAYER:EXPERT")
        layers.setdefault(int(layer), set()).add(int(expert))
    return {layer: frozenset(experts) for layer, experts in layers.items()} or None


def _evaluation(
    backend: str,
    model_args: str,
    batch_size: int,
    device: str | None,
    dtype: str,
    num_fewshot: int | None,
    apply_chat_template: bool,
    trust_remote_code: bool,
    seed: int,
) -> dict[str, Any]:
    """Options as fields of ``EvalSettings``."""
    arguments = json.loads(model_args) if model_args.startswith("{") else dict(_pairs(model_args, "--model-args"))
    return {
        "backend": backend,
        "model_args": arguments,
        "batch_size": batch_size,
        "device": device,
        "dtype": dtype,
        "num_fewshot": num_fewshot,
        "apply_chat_template": apply_chat_template,
        "trust_remote_code": trust_remote_code,
        "seed": seed,
    }


def _check_gate(fail_on: str) -> None:
    if fail_on not in {"", "loss"}:
        raise ConfigError(f"--fail-on knows only `loss`, not {fail_on!r}")


def _gate(report: EvalReport | None, fail_on: str) -> None:
    if fail_on and report is not None and any(task.verdict == "loss" for task in report.tasks):
        raise typer.Exit(3)


# --- printing -------------------------------------------------------------------------------------------------------


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, allow_nan=False, default=str))


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _say_notes(notes: Any) -> None:
    if not _files.quiet.get():
        for note in notes:
            _say(f"note: {note}")


def _render_plan(plan: PruningPlan) -> str:
    budget = plan.budget
    lines = [
        f"{plan.strategy.get('name')}: keep {plan.kept} of {budget.get('of')} experts in {len(plan.layers)} layers"
    ]
    size = plan.size.get("bytes")
    if size:
        saved = 100 * (1 - size["after"] / size["before"])
        lines.append(
            f"size: {_files.human_bytes(size['before'])} -> {_files.human_bytes(size['after'])} (-{saved:.0f} %)"
        )
    parameters = plan.size.get("parameters")
    if parameters:
        lines.append(f"parameters: {parameters['before']:,} -> {parameters['after']:,}")
    if plan.coverage:
        shares = ", ".join(f"{domain} {100 * share:.0f} %" for domain, share in plan.coverage.items())
        lines.append(f"expert output kept, by norm: {shares}")
    verdicts = [f"{engine}: {'; '.join(reasons) or 'yes'}" for engine, reasons in plan.engines.items()]
    lines.append("loads in  " + "   ".join(verdicts))
    return "\n".join(lines)


def _render_proof(proof: Any) -> str:
    return f"{proof.tensors} tensors ({_files.human_bytes(proof.nbytes)}) and {proof.files} files equal the source"


def _print_statistics(output: Path, statistics: Any, *, as_json: bool) -> None:
    facts = {
        "output": str(output),
        "tokens": statistics.tokens,
        "domains": list(statistics.domains),
        "layers": list(statistics.layers),
        "experts": statistics.num_experts,
    }
    if as_json:
        _print_json(facts)
    else:
        domains = ", ".join(statistics.domains) or "none"
        print(f"{statistics.tokens:,} tokens, domains {domains}, {len(statistics.layers)} layers\nstatistics: {output}")


def _print_report(report: EvalReport, output: Path | None, *, as_json: bool) -> None:
    from moeprune.evaluation.report import render_table

    if as_json:
        _print_json(json.loads(report.to_json()) if isinstance(report.to_json(), str) else report.to_json())
    else:
        print(render_table(report) + (f"\nreport: {output / 'report.md'}" if output else ""))


def _prune_object(result: Any) -> dict[str, Any]:
    report = result.report
    return {
        "output": str(result.output),
        "written": result.verification is not None,
        "plan": result.plan.to_dict(),
        "verification": dataclasses.asdict(result.verification) if result.verification else None,
        "report": json.loads(report.to_json()) if report is not None else None,
    }


def _print_prune(result: Any) -> None:
    from moeprune.evaluation.report import render_table

    print(_render_plan(result.plan))
    if result.verification is None:
        print(f"nothing written; {result.output} is free")
        return
    print(f"verified: {_render_proof(result.verification)}")
    if result.report is not None:
        print("\n" + render_table(result.report) + "\n")
    print(f"checkpoint: {result.output}")
    if result.report is not None:
        print(f"report:     {result.output / 'moeprune' / 'report' / 'report.md'}")


# --- running --------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: the one place that catches everything."""
    _files.reset_work()
    _files.quiet.set(False)
    _verbosity[0] = 0
    command: Callable[..., Any] = typer.main.get_command(app)
    try:
        code = command(args=arguments, prog_name="moeprune", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except MoePruneError as error:
        return _fail(error, error.message, error.hint)
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except typer.Abort:
        return 130
    except OSError as error:
        return _fail(error, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", "")
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # click's usage errors
            error.show()
            return int(error.exit_code)
        return _fail(
            error, f"unexpected {type(error).__name__}: {error}", "run again with -vv and report the traceback"
        )


def _fail(error: BaseException, message: str, hint: str) -> int:
    if _verbosity[0] >= 2:
        traceback.print_exception(error)
    _say(f"error: {' '.join(message.split())}")
    if hint:
        _say(f"hint: {hint}")
    return 1 if _files.work_begun() else 2
