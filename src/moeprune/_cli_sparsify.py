"""``moeprune sparsify``: weights or neurons inside the experts, and what came of it as text."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeprune import _cli_options as opt
from moeprune import _cli_output as out
from moeprune import _files

if TYPE_CHECKING:
    from moeprune.sparsifying import SparsifyResult


def sparsify(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Folder or Hub id; left out: the bundled model.")
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option("--sparsity", metavar="P", help="Fraction of the weights of every output row to make 0."),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option("--pattern", metavar="N:M", help="Keep N of every M consecutive weights, such as 2:4.")
    ] = None,
    neurons: Annotated[
        str | None,
        typer.Option("--neurons", metavar="P", help="Fraction of every expert's neurons to REMOVE: the file shrinks."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="The sparse checkpoint.  [default: ./<name>-<what stays>]"),
    ] = None,
    calibration: opt.Calibration = [],  # noqa: B006 - typer copies it
    statistics_file: Annotated[
        Path | None,
        typer.Option("--statistics-file", metavar="FILE", help="Decide from this file at once instead of calibrating."),
    ] = None,
    weights: opt.Weights = "",
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
    """Take weights or whole neurons out of the experts, layer by layer, and prove what was left alone.

    --sparsity and --pattern store zeros: the file does not shrink. --neurons makes the experts narrower.
    """
    from moeprune import sparsifying

    result = sparsifying.sparsify(
        model,
        output,
        sparsity=sparsity,
        pattern=pattern,
        neurons=neurons,
        calibration=calibration,
        statistics=statistics_file,
        weights=opt.weights_of(weights),
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


def _render(result: SparsifyResult) -> str:
    if result.plan is None or result.verification is None:
        lines = [f"would take: {result.sparsity}"]
        lines += [out.render_forecast(result.forecast, "sparsifying")] if result.forecast else []
        return "\n".join([*lines, f"dry run: nothing was written to {result.output}"])
    plan, proof, copied = result.plan, result.verification, result.verification.tensors - result.verification.computed
    sizes = _files.human_bytes(result.before), _files.human_bytes(result.after)
    taken = ", ".join(f"{layer.sparsity:.1%}" for layer in plan.layers.values())
    lines = [
        f"{result.sparsity}: {plan.measured:.1%} of the experts' weights {'are gone' if plan.width else 'are 0'}",
        *([f"by layer: {taken}"] if len({layer.gone for layer in plan.layers.values()}) > 1 else []),
        *([f"neurons of an expert: {plan.width}"] if plan.width else []),
        f"size: {sizes[0]} -> {sizes[1]} ({result.after / result.before - 1:+.0%})",
        f"verified: {copied} tensors and {proof.files} other files equal the source, and so do the weights that stayed",
        f"checkpoint: {result.output}",
    ]
    return "\n".join(lines)


def _as_object(result: SparsifyResult) -> dict[str, Any]:
    proof = result.verification
    return {
        "output": str(result.output),
        "written": proof is not None,
        "plan": result.plan.to_dict() if result.plan else None,
        "bytes": {"before": result.before, "after": result.after or None},
        "forecast": result.forecast.to_dict() if result.forecast else None,
        "verification": dataclasses.asdict(proof) if proof else None,
    }
