"""What a file or a folder is, for a person in one screenful: checkpoints and every artifact of moeprune.

Only headers and small files are read; of a checkpoint also what its fingerprint takes. Torch is never imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeprune._commands import command_line, source_name, source_words
from moeprune._files import PathLike, human_bytes, parse_json, read_artifact
from moeprune.accounts import HEALING, Account, account_of, account_of_healing, history
from moeprune.checkpoint import Checkpoint, open_checkpoint
from moeprune.errors import ArtifactError, ranges
from moeprune.headers import read_header
from moeprune.plan_kinds import PLAN_FILE, load_plan
from moeprune.plans import SCHEMA, PruningPlan
from moeprune.plans_fuse import plan_kind
from moeprune.rewrite.drop import PROVENANCE
from moeprune.statistics import RouterStatistics

Lines = dict[str, object]
Rows = list[tuple[str, ...]]
_EXPECTED = (
    "expected: a checkpoint folder, or a file of statistics, plan, healing, report, text report, skip report, probes, "
    "sweep or provenance"
)
_SHOWN = 15  # rows of a table that are shown to a person


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What something is.

    Attributes:
        kind: ``checkpoint``, or the artifact's name, such as ``plan``.
        facts: key figures for programs.
        lines: the same for people, label and value.
        rows: a table below, its head first; empty where there is none.
    """

    kind: str
    facts: Mapping[str, Any]
    lines: Mapping[str, object]
    rows: Sequence[tuple[str, ...]] = ()


def describe(path: PathLike, *, revision: str | None = None) -> Description:
    """Say what a checkpoint, a Hub model or an artifact is.

    Args:
        path: a folder, a file, or a Hub id.
        revision: of a Hub model.

    Raises:
        ArtifactError: a file that moeprune did not make, or a damaged one.
        MoePruneError: what opening a checkpoint raises.

    Example:
        >>> describe("plan.json").facts["strategy"]
    """
    target = Path(path)
    if target.is_file():
        return _describe_file(target)
    if target.is_dir() and not (target / "config.json").exists():
        _refuse_folder(target)
    return _describe_checkpoint(open_checkpoint(path, revision=revision))


def _refuse_folder(folder: Path) -> None:
    """Point at the artifacts of a folder that is no checkpoint; what holds none is left to the checkpoint's errors."""
    found = [file for file in sorted(folder.glob("*.json")) if _schema_of(file)]
    if found:
        raise ArtifactError(
            f"{folder} is no checkpoint; it holds {', '.join(file.name for file in found[:5])}",
            f"name one of them: moeprune inspect {found[0]}",
        )


def _schema_of(file: Path) -> str:
    """The schema of a JSON artifact; empty for any other file."""
    try:
        payload = parse_json(file.read_bytes(), file)
    except (ArtifactError, OSError):
        return ""
    schema = payload.get("schema") if isinstance(payload, dict) else None
    return schema if isinstance(schema, str) else ""


def _describe_file(file: Path) -> Description:
    if file.suffix == ".safetensors":
        return _describe_statistics(file)
    schema = _schema_of(file)
    kind, _, version = schema.removeprefix("moeprune.").partition("/")
    if kind not in _READERS or not schema.startswith("moeprune."):
        what = f"its schema is {schema!r}" if schema else "it has no schema"
        own = (file.parent / "config.json").is_file() and (file.name == "config.json" or "index" in file.name)
        hint = f"it belongs to a checkpoint: moeprune inspect {file.parent}" if own else _EXPECTED
        raise ArtifactError(f"{file} is not a file of moeprune: {what}", hint)
    if version != "1":
        raise ArtifactError(f"{file} is a {schema} file, which this version does not read", "update moeprune")
    payload = parse_json(file.read_bytes(), file, unique=True)
    try:
        facts, lines, rows = _READERS[kind](file, payload)
        return _artifact(
            kind, file, payload, facts, lines, rows, source_words(payload.get("text", ()), _TEXTS.get(kind, "--text"))
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ArtifactError(f"{file} is a damaged {schema} file: {what}", "make it again") from error


def _artifact(
    kind: str,
    file: Path,
    envelope: Mapping[str, Any],
    facts: Lines,
    lines: Lines,
    rows: Rows,
    words: Sequence[str] = (),
) -> Description:
    """What every artifact says of itself, before what this one holds."""
    version, command, inputs = envelope["moeprune_version"], envelope["command"], envelope["inputs"]
    head = {"schema": envelope["schema"], "moeprune_version": version, "command": command, "inputs": inputs}
    told: Lines = {
        kind: f"{file}, written by moeprune {version}",
        "made by": command_line(command, *_arguments(kind, command), *words, name=_stage(kind, command)),
        **{f"of {name}": fingerprint for name, fingerprint in inputs.items()},
    }
    return Description(kind=kind, facts={"kind": kind, "path": str(file)} | head | facts, lines=told | lines, rows=rows)


def _arguments(kind: str, command: Mapping[str, Any]) -> tuple[str, ...]:
    """What the command was given beside its options."""
    return _OF_STAGE.get(str(command.get("stage")), _ARGUMENTS.get(kind, ()))


def _stage(kind: str, command: Mapping[str, Any]) -> str:
    """The command of an artifact that does not name its own stage; empty for the others."""
    return "compare" if kind == "report" and "tasks" not in command else _STAGES.get(kind, "")


# --- checkpoints ----------------------------------------------------------------------------------------------------


def _describe_checkpoint(checkpoint: Checkpoint) -> Description:
    shape, own = checkpoint.router, checkpoint.own_counts
    facts: Lines = {
        "kind": "checkpoint",
        "path": str(checkpoint.path),
        "model_type": checkpoint.spec.model_type,
        "moe_layers": list(checkpoint.moe_layers),
        "mtp_layers": list(checkpoint.mtp_layers),
        "experts": checkpoint.num_experts,
        **({"own_counts": {str(layer): count for layer, count in own.items()}} if own else {}),
        "top_k": shape.top_k,
        "n_group": shape.n_group,
        "topk_group": shape.topk_group,
        "smallest_keep": None if own or checkpoint.router_rows else shape.smallest(),
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.nbytes,
        "fingerprint": checkpoint.fingerprint,
    }
    groups = f" in {shape.n_group} groups, {shape.topk_group} of them per token" if shape.n_group > 1 else ""
    lines: Lines = {
        "path": checkpoint.path,
        "architecture": checkpoint.spec.model_type,
        "MoE layers": ranges(checkpoint.moe_layers),
        "MTP layers": ranges(checkpoint.mtp_layers),
        "experts": f"{checkpoint.span} per layer{groups}, top-{shape.top_k}",
        "can keep": _can_keep(checkpoint),
        "size": f"{human_bytes(checkpoint.nbytes)} in {len(checkpoint.tensors):,} tensors",
        "fingerprint": checkpoint.fingerprint,
    }
    for key, more, line in _origin(checkpoint.path / PROVENANCE):
        facts[key] = more
        lines |= line
    return Description(kind="checkpoint", facts=facts, lines=lines)


def _can_keep(checkpoint: Checkpoint) -> str:
    shape = checkpoint.router
    if checkpoint.own_counts or checkpoint.router_rows:
        why = "layers differ" if checkpoint.own_counts else "each stands for several"
        return f"all: {why}"
    step = f" in steps of {shape.n_group}" if shape.n_group > 1 else ""
    return f"{shape.smallest()} to {shape.num_experts - shape.n_group}{step}"


def _origin(records: Path) -> Iterator[tuple[str, Lines, Lines]]:
    """What a checkpoint's own folder says of how it was made: a key and facts for programs, lines for people."""
    if not (records / "provenance.json").is_file():
        return
    origin, accounts = _describe_file(records / "provenance.json"), _accounts(records)
    source = origin.facts["inputs"]["model"]
    facts = {name: value for name, value in origin.facts.items() if name not in {"kind", "path"}}
    if not accounts:
        kept = f"{origin.lines['experts']}; model {source}"
        yield "pruned", facts, {"pruned by": origin.lines["made by"], "pruned from": kept}
        return
    yield "made", facts, {"made by": origin.lines["made by"], "made from": f"model {source}"}
    for account in accounts:
        told: Lines = {account.kind: account.summary, "weights": account.weights, "loads in": account.loads}
        yield account.kind, dict(account.facts), told


def _accounts(records: Path) -> tuple[Account, ...]:
    """What was done to a checkpoint other than leaving experts out."""
    plan, healing = records / PLAN_FILE.name, records / "healing.json"
    decided = load_plan(plan) if plan.is_file() else None
    record = read_artifact(healing, HEALING) if healing.is_file() else None
    return history(None if isinstance(decided, PruningPlan) else decided, record)


# --- statistics and plans -------------------------------------------------------------------------------------------


def _describe_statistics(file: Path) -> Description:
    _, metadata = read_header(file)
    if "schema" not in metadata:
        if owner := _owner_of(file):
            return _describe_side_file(file, owner)
        hint = f"a shard of a checkpoint? moeprune inspect {file.parent}"
        raise ArtifactError(f"{file} is not a file of moeprune: it has no schema", hint)
    statistics = RouterStatistics.load(file)
    envelope = {
        "schema": metadata["schema"],
        "moeprune_version": metadata.get("moeprune_version", ""),
        "command": statistics.command,
        "inputs": statistics.inputs,
    }
    return _artifact("statistics", file, envelope, *_statistics(statistics), [], source_words(statistics.provenance))


def _owner_of(file: Path) -> Path | None:
    """The plan that arrays belong to: of the same name, or the one of their checkpoint."""
    beside = [file.with_suffix(".json"), *([file.parent / PLAN_FILE.name] if file.parent.name == PROVENANCE else [])]
    return next((plan for plan in beside if plan.is_file() and _schema_of(plan) == SCHEMA), None)


def _describe_side_file(file: Path, owner: Path) -> Description:
    """Arrays that are too large for a plan."""
    entries, _ = read_header(file)
    kind, nbytes = plan_kind(owner), sum(entry.nbytes for entry in entries)
    facts: Lines = {"kind": "arrays", "path": str(file), "plan": str(owner), "plan_kind": kind, "bytes": nbytes}
    facts["tensors"] = {entry.name: list(entry.shape) for entry in entries}
    lines: Lines = {
        "arrays": f"{file}, of the {kind} plan {owner}",
        "size": f"{human_bytes(nbytes)} in {len(entries):,} tensors",
    }
    body = [(entry.name, entry.dtype, " x ".join(map(str, entry.shape))) for entry in entries]
    return Description(kind="arrays", facts=facts, lines=lines, rows=_cut([("tensor", "dtype", "shape"), *body]))


def _statistics(statistics: RouterStatistics) -> tuple[Lines, Lines]:
    layers, first = list(statistics.layers), next(iter(statistics.layers.values()))
    names = [*first, *next(iter(statistics.facts.values()), {}), *next(iter(statistics.rows.values()), {})]
    tokens = {name: int(count) for name, count in zip(statistics.domains, first.get("tokens", ()), strict=False)}
    seen = observations(statistics)
    facts: Lines = {
        "tokens": statistics.tokens,
        "domains": tokens,
        "layers": layers,
        "experts": statistics.num_experts,
        "top_k": statistics.top_k,
        "statistics": names,
        "observations": seen,
        "sources": [dict(entry) for entry in statistics.provenance],
    }
    shares = ", ".join(f"{name} {count:,}" for name, count in tokens.items())
    lines: Lines = {
        "tokens": f"{statistics.tokens:,}" + (f": {shares}" if len(tokens) > 1 else ""),
        "layers": f"{ranges(layers)}, {statistics.num_experts} experts each, top-{statistics.top_k}",
    }
    if seen:
        lines["per expert"] = f"{seen['fewest']:,} tokens at least, {seen['median']:,} in the median"
    lines["arrays"] = ", ".join(names)
    for entry in statistics.provenance:
        lines.setdefault("data", "")
        lines["data"] = f"{lines['data']}{'; ' if lines['data'] else ''}{source_line(entry)}"
    return facts, lines


def observations(statistics: RouterStatistics) -> dict[str, int]:
    """Tokens routed to an expert, over all layers: the fewest and the median; empty without data."""
    if not statistics.tokens:
        return {}
    counts = np.concatenate([np.asarray(arrays["count"]).sum(axis=0) for arrays in statistics.layers.values()])
    return {"fewest": int(counts.min()), "median": int(np.median(counts))}


def source_line(entry: Mapping[str, Any]) -> str:
    """A calibration source with how much of it was taken."""
    return f"{source_name(entry)} ({entry['sequences']:,} sequences, {entry['tokens']:,} tokens)"


def _plan(file: Path, _: Mapping[str, Any]) -> tuple[Lines, Lines, Rows]:
    plan = load_plan(file)
    return _drop(plan) if isinstance(plan, PruningPlan) else _told(account_of(plan))


def _healing(_: Path, payload: Mapping[str, Any]) -> tuple[Lines, Lines, Rows]:
    return _told(account_of_healing(payload))


def _told(account: Account) -> tuple[Lines, Lines, Rows]:
    """What was done other than leaving experts out."""
    facts: Lines = {"plan_kind": account.kind, "trained": account.trained, "loads_in_stock_engines": account.stock}
    lines: Lines = {"kind": account.kind, **account.lines, "weights": account.weights, "loads in": account.loads}
    notes: Lines = {"notes": "; ".join(account.notes)} if account.notes else {}
    rows = _cut([account.head, *account.rows]) if account.rows else []
    return {**facts, **account.facts, "notes": list(account.notes)}, lines | notes, rows


def _drop(plan: PruningPlan) -> tuple[Lines, Lines, Rows]:
    budget, size, engines = plan.budget, plan.size, plan.engines
    facts: Lines = {
        "strategy": plan.strategy.get("name"),
        "layers": len(plan.layers),
        "kept": plan.kept_by_layer,
        "of": budget.get("of"),
        "size": dict(size),
        "coverage": dict(plan.coverage),
        "engines": {engine: list(reasons) for engine, reasons in engines.items()},
        "notes": list(plan.notes),
    }
    counted = size.get("bytes")
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in plan.coverage.items())
    takers = [engine for engine, reasons in engines.items() if not reasons]
    lines: Lines = {
        "strategy": f"{plan.strategy.get('name', 'by hand')}: {plan.strategy.get('what', 'keep-lists')}",
        "experts": f"keep {plan.span} of {budget.get('of')} in layers {ranges(sorted(plan.layers))}",
        "size": _change(counted, human_bytes) if counted else "not known",
        "kept output": shares or "not measured",
        "loads in": ", ".join(takers) or "no known engine",
    }
    return facts, lines | {f"not in {engine}": "; ".join(told) for engine, told in engines.items() if told}, []


def _change(sides: Mapping[str, int], form: Callable[[int], str]) -> str:
    return f"{form(sides['before'])} -> {form(sides['after'])} (-{100 * (1 - sides['after'] / sides['before']):.0f} %)"


def _provenance(_: Path, payload: Mapping[str, Any]) -> tuple[Lines, Lines, Rows]:
    experts, after = payload["experts"], payload["experts"]["after"]
    kept = f"{min(after.values())} to {max(after.values())}" if isinstance(after, dict) else after
    facts: Lines = {key: payload[key] for key in ("architecture", "experts", "tensors", "bytes", "config_edits")}
    if source := payload.get("source"):
        facts["source"] = source
    named = f", {source['repo']} at {source['revision']}" if source else ""
    lines: Lines = {
        "experts": f"{kept} of {experts['before']} kept{named}",
        "architecture": payload["architecture"],
        "size": f"{_change(payload['bytes'], human_bytes)} in {payload['tensors']:,} tensors",
    }
    return facts, lines, []


# --- reports --------------------------------------------------------------------------------------------------------


def _report(_: Path, payload: Mapping[str, Any]) -> tuple[Lines, Lines, Rows]:
    tasks, suite = payload["tasks"], payload["suite"]
    facts: Lines = {key: payload[key] for key in ("base_model", "pruned_model", "partial", "margin", "suite")}
    facts["tasks"] = [
        {key: row[key] for key in ("task", "n", "base", "pruned", "change", "interval", "p_adjusted", "verdict")}
        for row in tasks
    ]
    lines: Lines = {
        "models": f"{payload['pruned_model']} against {payload['base_model']}",
        "documents": "NOT the full benchmark: only part of a task's documents ran" if payload["partial"] else "all",
    }
    if suite:
        lines["mean"] = f"{suite['change']:+.1f} points ({_interval(suite)}): {suite['verdict']}"
    head = ("task", "n", "base", "pruned", "change", "95 % interval", "verdict")
    body = [
        (
            row["task"],
            str(row["n"]),
            *(
                f"{100 * row[side]:.1f}" if row["unit"] == "points" else f"{row[side]:.4g}"
                for side in ("base", "pruned")
            ),
            f"{row['change']:+.1f}",
            _interval(row),
            row["verdict"],
        )
        for row in tasks
    ]
    return facts, lines, _cut([head, *body])


def _text(_: Path, payload: Mapping[str, Any]) -> tuple[Lines, Lines, Rows]:
    plans = sorted(payload["plans"], key=lambda plan: plan["perplexity"]["value"])
    keys = ("name", "kept", "perplexity", "ratio", "top1", "kl")
    facts: Lines = {key: payload[key] for key in ("base_model", "num_experts", "extent", "perplexity", "best")}
    facts["plans"] = [{key: plan[key] for key in keys} for plan in plans]
    extent = payload["extent"]
    lines: Lines = {
        "base": f"{payload['base_model']}, perplexity {payload['perplexity']['value']:.3f}",
        "text": f"{extent['documents']:,} documents, {extent['tokens']:,} predicted tokens",
    }
    head = ("plan", "kept", "perplexity", "ratio", "95 % interval", "top-1 %")
    body = [
        (
            plan["name"],
            f"{plan['kept']:.4g}/{payload['num_experts']}",
            f"{plan['perplexity']['value']:.3f}",
            f"{plan['ratio']['value']:.3f}",
            _interval(plan["ratio"], "{:.3f}"),
            f"{100 * plan['top1']['value']:.1f}",
        )
        for plan in plans
    ]
    return facts, lines, _cut([head, *body])


def _skip(_: Path, payload: Mapping[str, Any]) -> tuple[Lines, Lines, Rows]:
    points = sorted([payload["point"], *payload["curve"]], key=lambda point: point["target"])
    keys = ("base_model", "policy", "renorm", "top_k", "documents", "tokens", "perplexity", "point", "curve", "layers")
    facts: Lines = {key: payload[key] for key in (*keys, "domains", "classes")}
    lines: Lines = {
        "base": f"{payload['base_model']}, perplexity {payload['perplexity']['value']:.3f}",
        "policy": f"{payload['policy']}, top-{payload['top_k']}, renormalised: {payload['renorm']}",
        "text": f"{payload['documents']:,} documents, {payload['tokens']:,} predicted tokens",
    }
    head = ("asked %", "skipped %", "ratio", "95 % interval", "top-1 %", "random", "oracle")
    body = [
        (
            f"{100 * point['target']:.1f}",
            f"{100 * point['policy']['rate']:.1f}",
            f"{point['policy']['ratio']['value']:.3f}",
            _interval(point["policy"]["ratio"], "{:.3f}"),
            f"{100 * point['policy']['top1']['value']:.1f}",
            *(f"{point[control]['ratio']['value']:.3f}" for control in ("random", "oracle")),
        )
        for point in points
    ]
    return facts, lines, _cut([head, *body])


def _probes(_: Path, payload: Mapping[str, Any]) -> tuple[Lines, Lines, Rows]:
    keys = ("probe", "what", "unit", "n", "base", "pruned", "change", "interval")
    facts: Lines = {"rows": [{key: row[key] for key in keys} for row in payload["rows"]]}
    head = ("probe", "what", "n", "base", "pruned", "change", "95 % interval")
    body = [
        (
            row["probe"],
            row["what"],
            str(row["n"]),
            *(_number(row[side]) for side in ("base", "pruned")),
            f"{_number(row['change'], '.3g' if row['unit'] == 'x' else '+.3g')} {row['unit']}",
            _interval(row, "{:.3g}"),
        )
        for row in payload["rows"]
    ]
    return facts, {"warnings": "; ".join(map(str, payload["warnings"])) or "none"}, _cut([head, *body])


def _sweep(_: Path, payload: Mapping[str, Any]) -> tuple[Lines, Lines, Rows]:
    points, best = payload["points"], payload["largest_within_margin"]
    keys = ("ratio", "kept", "bytes", "suite")
    facts: Lines = {"margin": payload["margin"], "largest_within_margin": best}
    facts["points"] = [{key: point.get(key) for key in keys} for point in points]
    head = ("ratio", "kept", "bytes", "mean change", "95 % interval", "perplexity ratio")
    body = []
    for point in points:
        suite, text = point.get("suite") or {}, point.get("text") or {}
        change = (f"{suite['change']:+.1f}", _interval(suite)) if suite else ("", "")
        ratio = f"{text['perplexity_ratio']['value']:.3f}" if text else ""
        body.append((str(point["ratio"]), str(point["kept"]), human_bytes(point["bytes"]), *change, ratio))
    said = f"{best} is the largest ratio whose loss stays within {payload['margin']:g} points" if best else "none"
    return facts, {"within margin": said}, _cut([head, *body])


def _number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def _interval(row: Mapping[str, Any], form: str = "{:+.1f}") -> str:
    ends = row.get("interval")
    return "..".join(form.format(end) for end in ends) if ends else ""


def _cut(rows: Rows) -> Rows:
    """What fits on a screen, and a last row that says how much more there is."""
    more = len(rows) - 1 - _SHOWN
    return rows if more <= 0 else [*rows[: _SHOWN + 1], (f"and {more} more", *[""] * (len(rows[0]) - 1))]


_READERS: Mapping[str, Callable[[Path, Mapping[str, Any]], tuple[Lines, Lines, Rows]]] = {
    "plan": _plan,
    "provenance": _provenance,
    "healing": _healing,
    "report": _report,
    "text": _text,
    "skip": _skip,
    "probes": _probes,
    "sweep": _sweep,
}
_TEXTS = {"skip": "--heldout"}  # the option for the text of a report
_STAGES = {"report": "eval", "text": "eval", "probes": "eval", "sweep": "sweep", "skip": "skip"}
_OF_STAGE = {
    "fuse": ("MODEL", "--statistics-file", "STATISTICS"),
    "skip": ("MODEL", "--calibration", "DATA"),
    "sparsify": ("MODEL", "--calibration", "DATA"),
    "multiplex": ("MODEL", "--calibration", "DATA"),
    "heal": ("BASE", "PRUNED", "--calibration", "DATA"),
}
_ARGUMENTS = {
    "statistics": ("MODEL",),
    "plan": ("STATISTICS", "MODEL"),
    "provenance": ("STATISTICS", "MODEL"),
    "report": ("BASE", "PRUNED"),
    "text": ("BASE", "PLAN"),
    "probes": ("BASE", "PRUNED"),
    "sweep": ("MODEL",),
}
