"""Token skipping: what it saves beside peers that save nothing, and what each policy costs on the bundled models.

    python benchmarks/skip.py --work WORK --speed
    python benchmarks/skip.py --work WORK --quality
    python benchmarks/skip.py --work WORK -o docs/benchmarks/skip.md

``--speed`` times a model with the layer shapes of Qwen3-30B-A3B (hidden 2048, 128 experts of 768, top-8, two layers,
random weights) and the bundled one, in prefill and decode, at several rates: all ways to skip run in turn in one
process. The thresholds are solved on the very tokens that are run. ``--quality`` solves every policy on the calibration
text and measures it on held-out text and tasks. Every measurement is a file of the work folder, so that an interrupted
run goes on where it stopped; the page is made of what is there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from skip_page import CONTROLS, MIDDLE, PREFILLS, TRAINED, Page, quality_file, speed_file, variants_of
from strategies import MODELS, ROWS, Bench, _score

from moeprune.experts import expert_layers
from moeprune.pipeline import BUNDLED
from moeprune.plans_skip import Renorm, SkipLayer, SkipPlan
from moeprune.runtime.masking import applied
from moeprune.runtime.policies import BUILTIN, DEFAULT, policy_named
from moeprune.runtime.skipping import Boundary, Gate, SkipCounter

RATES = ("0.25", "0.5", "0.75")
PROMPT, STEPS = 64, 32  # tokens before decoding, and decoded one by one
MODES: Mapping[str, tuple[int, int]] = {  # sequences, and tokens of each
    **{mode: (1, length) for mode, length in PREFILLS.items()},
    "decode, batch 1": (1, PROMPT + STEPS),
    "decode, batch 8": (8, PROMPT + STEPS),
}
DISTILLED = ["predicted-norm", "predicted-norm@1e-4", "zero-experts", "zeda"]  # NAME[@LR][=LEVEL]
LARGE, SMALL = "qwen3-30b-a3b shapes", "bundled"


# --- ways to skip the same slots --------------------------------------------------------------------------------------


class Zeroed(Boundary):
    """Skips nothing: the weights of the slots are set to zero, and all of them run."""

    def __init__(self, gate: Gate) -> None:
        super().__init__(gate.layer)
        self.gate = gate

    def run(self, hidden_TH: Any, index_TK: Any, gates_TK: Any) -> Any:
        """In the place of the experts."""
        assert self.below is not None
        keep_TK = self.gate.keep(hidden_TH, index_TK, gates_TK)
        return self.below(hidden_TH, index_TK, gates_TK * keep_TK)


class Sentinel(Zeroed):
    """Names an expert that is not there, which transformers' grouped_mm leaves out when experts are spread."""

    def run(self, hidden_TH: Any, index_TK: Any, gates_TK: Any) -> Any:
        """In the place of the experts."""
        assert self.below is not None
        experts: Any = self.layer.experts
        keep_TK = self.gate.keep(hidden_TH, index_TK, gates_TK)
        experts._is_expert_parallel = True
        try:
            return self.below(hidden_TH, index_TK.masked_fill(~keep_TK, experts.num_experts), gates_TK * keep_TK)
        finally:
            experts._is_expert_parallel = False


def solved(model: Any, ids_BT: Any, policy: str, rate: float) -> list[Gate]:
    """Gates whose thresholds give the rate on these tokens, each solved on what the gates before it lead to."""
    import torch

    from moeprune.runtime.thresholds import _Recorder, threshold_of

    own, gates = policy_named(policy), list[Gate]()
    for layer in expert_layers(model):
        top_k = int(layer.experts.config.num_experts_per_tok)  # type: ignore[union-attr, arg-type]
        if policy == "static-k":
            decision, head = SkipLayer(threshold=0.5 - round((1 - rate) * top_k)), None  # scores are minus the rank
        else:
            recorder = _Recorder(layer, own, floor=1)
            with applied([*gates, recorder]), torch.inference_mode():
                run_whole(model, ids_BT)
                decision, head, scored = recorder.result(0.0)
            decision = dataclasses.replace(decision, threshold=threshold_of([scored], rate))
        gates.append(Gate(layer, own, decision, head=head))
    return gates


def ways_of(model: Any, ids_BT: Any, rate: float) -> dict[str, list[Boundary]]:
    """Every way to run the model that is measured beside the others; the first one is the model itself."""
    share = solved(model, ids_BT, "share", rate)
    ways: dict[str, list[Boundary]] = {"all slots": [], "gate, share": [*share]}
    for policy in ("static-k", DEFAULT):
        ways[f"gate, {policy}"] = [*solved(model, ids_BT, policy, rate)]
    ways["weights set to zero"] = [Zeroed(gate) for gate in share]
    if model.config._experts_implementation == "grouped_mm":
        ways["sentinel in grouped_mm"] = [Sentinel(gate) for gate in share]
    return ways


# --- speed ------------------------------------------------------------------------------------------------------------


def run_whole(model: Any, ids_BT: Any) -> None:
    """One forward pass."""
    import torch

    with torch.inference_mode():
        model(input_ids=ids_BT, use_cache=False, logits_to_keep=1)


def decoder(model: Any, ids_BT: Any) -> Callable[[], None]:
    """What decodes the given tokens one by one; the cache of those before them is made here."""
    import torch

    with torch.inference_mode():
        cache = model(input_ids=ids_BT[:, :PROMPT], use_cache=True, logits_to_keep=1).past_key_values

    def run() -> None:
        with torch.inference_mode():
            for step in range(PROMPT, PROMPT + STEPS):
                model(input_ids=ids_BT[:, step : step + 1], past_key_values=cache, use_cache=True)

    return run


def seconds_of(model: Any, ids_BT: Any, mode: str) -> float:
    """Seconds of a prefill, or of decoding."""
    work = (lambda: run_whole(model, ids_BT)) if mode in PREFILLS else decoder(model, ids_BT)
    settle(ids_BT.device)
    begin = time.perf_counter()
    work()
    settle(ids_BT.device)
    return time.perf_counter() - begin


def settle(device: Any) -> None:
    """Wait for what was given to a GPU."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


@contextlib.contextmanager
def timed_experts(model: Any, spent: list[float]) -> Iterator[None]:
    """Add up the seconds inside of experts, gates included."""
    with contextlib.ExitStack() as undo:
        for layer in expert_layers(model):
            experts: Any = layer.experts
            own = vars(experts).get("forward")

            def forward(*given: Any, inner: Any = experts.forward, **named: Any) -> Any:
                device = next(model.parameters()).device
                settle(device)
                begin = time.perf_counter()
                output = inner(*given, **named)
                settle(device)
                spent[0] += time.perf_counter() - begin
                return output

            experts.forward = forward
            undo.callback(vars(experts).__setitem__, "forward", own) if own else undo.callback(
                vars(experts).pop, "forward"
            )
        yield


def counts_of(model: Any, gates: Sequence[Boundary], ids_BT: Any, mode: str) -> SkipCounter:
    """What the gates let through while the mode runs."""
    counter = SkipCounter()
    own = [gate if isinstance(gate, Gate) else gate.gate for gate in gates if isinstance(gate, Gate | Zeroed)]
    with applied(own):
        work = (lambda: run_whole(model, ids_BT)) if mode in PREFILLS else decoder(model, ids_BT)
        for gate in own:
            gate.counter = counter
        work()
        for gate in own:
            gate.counter = None
    return counter


def measure_speed(model: Any, ids_BT: Any, mode: str, rate: float, rounds: int) -> dict[str, Any]:
    """All ways in turn, round by round, the first of which warms up."""
    ways = ways_of(model, ids_BT, rate)
    found: dict[str, dict[str, Any]] = {name: {"seconds": [], "experts": []} for name in ways}
    for number in range(1 + rounds):
        for name, gates in ways.items():
            with applied(gates):
                whole = seconds_of(model, ids_BT, mode)
                spent = [0.0]
                with timed_experts(model, spent):
                    seconds_of(model, ids_BT, mode)
            if number:
                found[name]["seconds"].append(whole)
                found[name]["experts"].append(spent[0])
    for name, gates in ways.items():
        counter = counts_of(model, gates, ids_BT, mode)
        runs_all = name in {"all slots", "weights set to zero"}
        found[name] |= {"rate": counter.rate, "flops": 1.0 if runs_all else 1 - counter.rate}
    return {"ways": found}


def large_model(dtype: str) -> Any:
    """Two layers of a model of 30 billion parameters, with random weights."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=4096,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def model_and_ids(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """A model, and token ids for it, of which each mode takes what it needs."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name == LARGE:
        ids = torch.randint(0, 4096, (max(PREFILLS.values()),), generator=torch.Generator().manual_seed(0))
        return large_model(dtype).to(device), ids.to(device)
    folder = BUNDLED / "model"
    text = "\n".join(json.loads(row)["text"] for row in (BUNDLED / "heldout.jsonl").read_text("utf-8").splitlines())
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"][: max(PREFILLS.values())])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    return model.to(device), ids.to(device)


def speed(options: argparse.Namespace) -> None:
    """Fill the work folder with what is missing."""
    import platform

    import torch
    import transformers

    device = torch.device(options.device)
    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for name in options.sizes:
        for dtype in options.dtypes:
            rates = [rate for rate in options.rates if rate == MIDDLE or dtype == options.dtypes[0]]
            jobs = [(mode, rate) for mode in MODES for rate in ("0", *rates)]
            files = {job: speed_file(options.work, options.device, name, dtype, *job) for job in jobs}
            if all(file.is_file() for file in files.values()):
                continue
            model, ids = model_and_ids(name, dtype, options.device)
            if options.implementation:
                model.set_experts_implementation(options.implementation)
            for (mode, rate), file in files.items():
                if file.is_file():
                    continue
                sequences, length = MODES[mode]
                ids_BT = ids[: sequences * length].view(sequences, length)
                found = measure_speed(model, ids_BT, mode, float(rate), options.rounds)
                implementation = str(model.config._experts_implementation)
                job = {"device_name": options.device, "model": name, "dtype": dtype, "mode": mode, "rate": rate}
                save(file, found | about | job | {"implementation": implementation})
                print(f"{name} {dtype} {mode} {rate}: {shown(found['ways'])}", flush=True)


def shown(ways: Mapping[str, Mapping[str, Any]]) -> str:
    """Medians of the ratios, for whoever watches."""
    base = np.array(ways["all slots"]["seconds"])
    return ", ".join(f"{name} {np.median(np.array(way['seconds']) / base):.2f}" for name, way in ways.items())


def save(file: Path, values: Mapping[str, Any]) -> None:
    """Write a measurement, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".part", delete=False) as handle:
        json.dump(values, handle)
    Path(handle.name).rename(file)


# --- quality ----------------------------------------------------------------------------------------------------------


def quality(options: argparse.Namespace) -> None:
    """Fill the work folder with what is missing."""
    from moeprune.evaluation.harness import prepare

    for model in options.models:
        jobs = [("none", "none", "0"), *((*one, rate) for rate in options.rates for one in variants_of(options, rate))]
        files = {job: quality_file(options.work, model, *job) for job in jobs}
        if all(file.is_file() for file in files.values()):
            continue
        bench = Bench(MODELS[model], options.limit)
        with prepare(bench.settings) as loaded:
            for job, file in files.items():
                if not file.is_file():
                    save(file, measure_quality(bench, loaded, options.work / model, *job))
                    print(model, *job, "done", flush=True)


def measure_quality(bench: Bench, loaded: Any, work: Path, policy: str, renorm: str, rate: str) -> dict[str, Any]:
    """What one policy does to held-out text and tasks."""
    if policy == "oracle":
        return on_text(bench, plan_of(bench, work, "share", "none", rate), control=True)
    if policy == "none":
        return on_text(bench, None) | on_tasks(bench, loaded, None)
    if policy.endswith(TRAINED):
        model, plan = distilled(bench, work, policy.removesuffix(TRAINED), rate)
        found = on_text(bench, plan, model) | on_tasks(bench, loaded, plan, model)
        return found | {"calibrated": plan.rate, "training": dict(plan.training)}
    plan = plan_of(bench, work, policy, renorm, rate)
    return on_text(bench, plan) | on_tasks(bench, loaded, plan) | {"calibrated": plan.rate}


def plan_of(bench: Bench, work: Path, policy: str, renorm: str, rate: str) -> SkipPlan:
    """The plan of a policy, solved on the calibration text and kept in the work folder."""
    import moeprune

    file = work / "plans" / f"{policy}-{renorm}-{rate}.json"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        moeprune.skip(
            bench.folder,
            file,
            skip_rate=float(rate),
            policy=policy,
            renorm=renorm,
            calibration=str(BUNDLED / "calibration.jsonl"),
            num_samples=ROWS,
            dtype="float32",
        )
    return dataclasses.replace(SkipPlan.load(file), renorm=Renorm.parse(renorm))


def distilled(bench: Bench, work: Path, policy: str, rate: str) -> tuple[Any, SkipPlan]:
    """A model that was trained with its gates on the calibration text, and its plan; both kept in the work folder."""
    import moeprune
    from moeprune.collectors.resident import load_model
    from moeprune.healing.distillation import Recipe

    folder = work / "distilled" / f"{policy}-{rate}"
    rest, _, level = policy.partition("=")
    name, _, lr = rest.partition("@")
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        moeprune.skip(
            bench.folder,
            folder,
            skip_rate=float(rate),
            policy=name,
            distill=Recipe(lr=float(lr)) if lr else Recipe(),
            train=level or "all",
            calibration=str(BUNDLED / "calibration.jsonl"),
            num_samples=ROWS,
            dtype="float32",
        )
    model = load_model(moeprune.open_checkpoint(folder), device="cpu", dtype="float32")
    return model, SkipPlan.load(folder / "moeprune" / "plan.json")


def on_text(bench: Bench, plan: SkipPlan | None, model: Any = None, *, control: bool = False) -> dict[str, Any]:
    """Sums by document of the held-out text, and the share of slots that were skipped there."""
    from moeprune.evaluation.evaluator import Masked, ResidentEvaluator, Variant
    from moeprune.evaluation.skip_report import measured_rate
    from moeprune.evaluation.skipped import Control, Gated, Tally, true_norm

    tally = Tally([0] * 10_000)
    variants: list[Variant] = [Masked({})] if plan is None else [Gated(plan, tally)]
    if control:
        variants += [Control(variants[0], true_norm, Tally([0] * 10_000))]  # type: ignore[arg-type]
    evaluator = bench.heldout
    if model is not None:
        evaluator = ResidentEvaluator(model, bench._encoded("heldout"), reference=bench.model)
    score = evaluator.score(variants)[-1]
    values = {
        "nll": score.losses.nll,
        "base_nll": score.base_losses.nll,
        "kl": score.kl,
        "same": score.same,
        "tokens": score.losses.tokens,
    }
    lists = {name: array.tolist() for name, array in values.items()}
    return lists | {"rate": measured_rate(tally) if plan is not None else 0.0}


def on_tasks(bench: Bench, loaded: Any, plan: SkipPlan | None, model: Any = None) -> dict[str, Any]:
    """Right answers by task, and what was skipped there."""
    from moeprune.evaluation.harness import run_model
    from moeprune.evaluation.samples import read_run
    from moeprune.runtime.skipping import attach, detach

    model = bench.model if model is None else model
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if plan is not None:
                attach(model, plan)
            run_model((model, bench.tokenizer), bench.settings, Path(scratch) / "run", loaded=loaded)
        finally:
            detach(model)
        run = read_run(Path(scratch) / "run")
    correct = {
        name: [_score(task.samples[key]) for key in sorted(task.samples)] for name, task in sorted(run.tasks.items())
    }
    return {"correct": correct, "task_rates": {name: skipped.rate for name, skipped in run.skipped.items()}}


def main() -> None:
    """Measure what is asked for, and write the page where nothing is or it is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of measurements, reused")
    parser.add_argument("-o", "--output", type=Path, help="Markdown file; stdout otherwise")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--rates", nargs="+", default=list(RATES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="of --speed; cuda has not been tried")
    parser.add_argument("--rounds", type=int, default=7, help="of --speed: all ways in turn, so often")
    parser.add_argument("--sizes", nargs="+", default=[LARGE, SMALL], choices=[LARGE, SMALL])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--implementation", help="of the experts: grouped_mm, batched_mm or eager")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--policies", nargs="+", default=[name for name in BUILTIN if name not in CONTROLS])
    parser.add_argument("--distilled", nargs="*", default=DISTILLED, help="of --quality: policies to train with, too")
    parser.add_argument("--limit", type=int, help="of --quality: first N questions of each task")
    options = parser.parse_args()
    if options.speed or options.quality:
        import torch

        torch.set_num_threads(options.threads)
        if options.speed:
            speed(options)
        if options.quality:
            quality(options)
        if options.output is None:
            return
    page = Page(options.work, options).render()
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(page, encoding="utf-8")
    else:
        print(page)


if __name__ == "__main__":
    main()
