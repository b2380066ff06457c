"""``moeprune multiplex``: experts that share fused ones, and what came of it as text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeprune import _cli_options as opt
from moeprune import _cli_output as out
from moeprune import _files
from moeprune.healing.multiplexed import LR, STEPS

if TYPE_CHECKING:
    from moeprune.multiplexing import MultiplexResult


def multiplex(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Folder or Hub id; left out: the bundled model.")
    ] = None,
    keep: Annotated[int, typer.Option("--keep", metavar="N", help="Fused experts of each layer.")] = 0,
    rank: Annotated[int, typer.Option("--rank", metavar="R", help="Of the residuals of every original expert.")] = 8,
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="Steps of training in each layer.")] = STEPS,
    lr: Annotated[float, typer.Option("--lr", metavar="RATE", help="Learning rate at their start.")] = LR,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="The checkpoint.  [default: ./<name>-multiplexed<N>of<E>]"),
    ] = None,
    calibration: opt.Calibration = [],  # noqa: B006 - typer copies it
    num_samples: opt.NumSamples = 512,
    max_length: opt.MaxLength = 2048,
    shuffle: opt.Shuffle = False,
    pack: opt.Pack = False,
    batch_tokens: opt.BatchTokens = 8192,
    seed: opt.Seed = 0,
    device: opt.Device = None,
    dtype: opt.Dtype = "auto",
    memory: opt.Memory = None,
    device_memory: opt.DeviceMemory = None,
    trust_remote_code: opt.Trust = False,
    revision: opt.Revision = None,
    max_shard_size: opt.ShardSize = "5GB",
    overwrite: opt.Overwrite = False,
    dry_run: opt.DryRun = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Fuse experts that fire together and tell them apart by small residuals, trained layer by layer.

    The original router stays. Stock engines cannot run the result: moeprune.load does, and so does `moeprune eval`.
    """
    from moeprune import multiplexing

    result = multiplexing.multiplex(
        model,
        output,
        keep=keep,
        rank=rank,
        steps=steps,
        lr=lr,
        calibration=calibration,
        num_samples=num_samples,
        max_length=max_length,
        shuffle=shuffle,
        pack=pack,
        batch_tokens=batch_tokens,
        seed=seed,
        device=device,
        dtype=dtype,
        memory=opt.size_of(memory),
        device_memory=opt.size_of(device_memory),
        trust_remote_code=trust_remote_code,
        revision=revision,
        max_shard_size=_files.parse_size(max_shard_size),
        overwrite=overwrite,
        dry_run=dry_run,
    )
    out.say_notes(result.plan.notes if result.plan else ())
    if as_json:
        out.print_json(_as_object(result))
    else:
        out.show(_render(result))


def _render(result: MultiplexResult) -> str:
    before, after = result.expert_bytes
    size = f"routed experts with their residuals: {_files.human_bytes(before)} -> {_files.human_bytes(after)}"
    lines = [f"{size} ({after / before - 1:+.0%})"]
    if result.plan is None:
        lines += [out.render_forecast(result.forecast, "multiplexing")]
        return "\n".join([*lines, f"dry run: nothing was written to {result.output}"])
    for index, layer in sorted(result.plan.layers.items()):
        start, end = layer.loss
        lines.append(f"layer {index}: {len(layer.groups)} fused experts, held-out error {start:.1%} -> {end:.1%}")
    return "\n".join([*lines, f"checkpoint: {result.output}"])


def _as_object(result: MultiplexResult) -> dict[str, Any]:
    return {
        "output": str(result.output),
        "written": result.plan is not None,
        "expert_bytes": {"before": result.expert_bytes[0], "after": result.expert_bytes[1]},
        "plan": result.plan.to_dict() if result.plan else None,
        "forecast": result.forecast.to_dict() if result.forecast else None,
    }
