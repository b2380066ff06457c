"""``moeprune heal``: train a pruned model until it does again what its original does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeprune import _cli_options as opt
from moeprune import _cli_output as out
from moeprune import _files

if TYPE_CHECKING:
    from moeprune.repairing import HealResult

_TRAIN = typer.Option(
    "--train",
    metavar="LEVEL",
    help="What moves. layerwise, experts: all, experts, down, router. logits: router, experts, attention, norms, all.",
)
_MINUTES = typer.Option(
    "--minutes", metavar="N", help="layerwise, experts: for all layers, instead of --steps; no two runs are then alike."
)


def heal(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The original: folder or Hub id.")],
    pruned: Annotated[str, typer.Argument(metavar="PRUNED", help="What was made from it.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The healed checkpoint.")],
    calibration: opt.Calibration = [],  # noqa: B006 - typer copies it
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help="layerwise: one layer in memory. closed-form: so too, by least squares. experts: so too, and each "
            "expert of a sparsified model by itself. logits: the whole model. lora: adapters on its attention.",
        ),
    ] = "layerwise",
    train: Annotated[str | None, _TRAIN] = None,
    steps: opt.Steps = None,
    minutes: Annotated[float | None, _MINUTES] = None,
    lr: opt.LearningRate = None,
    step_tokens: opt.StepTokens = None,
    schedule: opt.Schedule = None,
    temperature: opt.Temperature = None,
    precision: opt.Precision = None,
    rank: Annotated[int | None, typer.Option("--rank", metavar="N", help="lora: rank of the adapters.")] = None,
    alpha: Annotated[int | None, typer.Option("--alpha", metavar="N", help="lora: their scale is N over it.")] = None,
    num_samples: opt.NumSamples = 512,
    max_length: opt.MaxLength = 2048,
    shuffle: opt.Shuffle = False,
    pack: opt.Pack = False,
    seed: opt.Seed = 0,
    device: opt.Device = None,
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
    """Train a pruned, fused or sparsified model until it does again what its original does."""
    from moeprune import mending

    given = {
        "train": train,
        "steps": steps,
        "minutes": minutes,
        "lr": lr,
        "step_tokens": step_tokens,
        "schedule": schedule,
        "temperature": temperature,
        "precision": precision,
        "r": rank,
        "alpha": alpha,
        "memory": opt.size_of(memory),
        "device_memory": opt.size_of(device_memory),
    }
    result = mending.heal(
        base,
        pruned,
        output,
        method=method,
        calibration=calibration,
        num_samples=num_samples,
        max_length=max_length,
        shuffle=shuffle,
        pack=pack,
        seed=seed,
        device=device,
        trust_remote_code=trust_remote_code,
        revision=revision,
        max_shard_size=_files.parse_size(max_shard_size),
        overwrite=overwrite,
        dry_run=dry_run,
        **{name: value for name, value in given.items() if value is not None},
    )
    print_healed(result, as_json=as_json)


def print_healed(result: HealResult, *, as_json: bool) -> None:
    """How much closer to its original the model came."""
    if as_json:
        out.print_json(out.healed_object(result))
        return
    if result.before is None or result.after is None:
        out.show(out.render_heal_forecast(result.forecast))
        out.show(f"dry run: nothing was written to {result.output}")
        return
    out.show(out.render_healing(result))
    out.show(f"checkpoint: {result.output}")
