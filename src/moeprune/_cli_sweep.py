"""``moeprune sweep``: what each ratio costs, as a table and a sentence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeprune import _cli_options as opt
from moeprune import _cli_output as out
from moeprune import _files

if TYPE_CHECKING:
    from moeprune.evaluation.curve import SweepReport
    from moeprune.sweeping import SweepOutlook

RATIOS = "0.125,0.25,0.5,0.625"


def sweep(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Folder or Hub id; left out: the bundled model.")
    ] = None,
    ratios: Annotated[
        str, typer.Option("--ratios", metavar="R,R,...", help="Fractions of the experts of each layer to REMOVE.")
    ] = RATIOS,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Report, plans, statistics and lm-eval's samples.")
    ] = Path("sweep"),
    strategy: Annotated[
        str, typer.Option("--strategy", metavar="NAME,...", help="One or several, see `moeprune strategies`.")
    ] = "",
    calibration: opt.Calibration = [],  # noqa: B006 - typer copies it
    statistics_file: Annotated[
        Path | None,
        typer.Option("--statistics-file", metavar="FILE", help="Plan from this file instead of calibrating."),
    ] = None,
    text: opt.Text = [],  # noqa: B006 - typer copies it
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
    blend: opt.Blend = "sum",
    protect_top: opt.ProtectTop = 0,
    protect: opt.Protect = "",
    no_guard: opt.NoGuard = False,
    target: opt.Target = "",
    round_to: opt.RoundTo = 1,
    budget: opt.BudgetName = "uniform",
    selection: opt.Selection = [],  # noqa: B006 - typer copies it
    mtp: opt.Mtp = "cut",
    batch_size: opt.BatchSize = 16,
    limit: opt.Limit = None,
    num_fewshot: opt.FewShot = None,
    apply_chat_template: opt.ChatTemplate = None,
    max_gen_toks: opt.MaxGenToks = None,
    confirm_run_unsafe_code: opt.UnsafeCode = False,
    model_args: opt.ModelArgs = "",
    margin: opt.Margin = 1.0,
    overwrite: opt.Overwrite = False,
    dry_run: opt.DryRun = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Plan at many ratios from one calibration and measure what each costs, in memory: nothing is rewritten.

    --text measures perplexity and agreement with the original, --eval accuracy with verdicts. A killed sweep goes on.
    """
    from moeprune import sweeping
    from moeprune.strategies import DEFAULT

    options: dict[str, Any] = {
        "ratios": opt.names(ratios),
        "strategy": strategies_of(strategy) or DEFAULT,
        "calibration": calibration,
        "statistics_file": statistics_file,
        "text": text,
        "tasks": opt.names(tasks),
        "include_path": include_path,
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
        "weights": opt.weights_of(weights),
        "blend": blend,
        "protect_top": protect_top,
        "protect": opt.protected_of(protect),
        "guard": not no_guard,
        "target": opt.names(target),
        "round_to": round_to,
        "budget": budget,
        "selection": selection,
        "mtp": mtp,
        "batch_size": batch_size,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "apply_chat_template": apply_chat_template,
        "max_gen_toks": max_gen_toks,
        "confirm_run_unsafe_code": confirm_run_unsafe_code or None,
        "model_args": opt.model_args_of(model_args) or None,
        "margin": margin,
        "overwrite": overwrite,
    }
    if dry_run:
        print_outlook(sweeping.forecast_sweep(model, output, **options), output, as_json=as_json)
    else:
        print_sweep(sweeping.sweep(model, output, **options), output, as_json=as_json)


def strategies_of(text: str) -> tuple[str, ...]:
    """``reap,S(1,1,1)`` as ``("reap", "S(1,1,1)")``."""
    return tuple(name.strip() for name in re.split(r",(?![^(]*\))", text) if name.strip())


def print_sweep(report: SweepReport, output: Path, *, as_json: bool) -> None:
    """One row per point, and the sentence."""
    from moeprune.evaluation.curve import render_sweep_table

    if as_json:
        out.print_json(report.payload())
    else:
        out.show(f"{render_sweep_table(report)}report: {output / 'sweep.md'}\npage: {output / 'report.html'}")


def print_outlook(found: SweepOutlook, output: Path, *, as_json: bool) -> None:
    """The sizes of the plans, and what the passes take."""
    if as_json:
        passes = {name: expected.to_dict() if expected else None for name, expected in found.passes.items()}
        points = {name: {"budget": dict(plan.budget), "size": dict(plan.size)} for name, plan in found.previews.items()}
        out.print_json({"output": str(output), "written": False, "points": points, "passes": passes})
        return
    for name, plan in found.previews.items():
        before, after = (plan.size["bytes"][when] for when in ("before", "after"))
        share = 100 * after / before
        kept = f"keep {plan.span} of {plan.budget['of']} experts"
        out.show(f"{name}: {kept}, {_files.human_bytes(after)} ({share:.0f} % of {_files.human_bytes(before)})")
    for doing, expected in found.passes.items():
        out.show(out.render_forecast(expected, doing))
    out.show(f"dry run: nothing was written to {output}")
