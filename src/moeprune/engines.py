"""What engines ask of a pruned checkpoint, read from their sources: one rule a line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moeprune.checkpoint import Checkpoint

ENGINES = ("transformers", "vllm", "sglang", "llama.cpp")
# Families whose GGUF file holds the MTP layers that the config announces; the other converters leave them out.
_GGUF_WITH_MTP = {"glm4_moe", "glm4_moe_lite", "glm_moe_dsa"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    """The numbers of a pruned checkpoint that engines look at."""

    kept: int
    top_k: int
    n_group: int
    topk_group: int
    lacks_mtp: bool  # announced and not there, in a family that converts them

    @property
    def grouped(self) -> bool:
        return self.n_group > 1

    @property
    def uneven(self) -> bool:
        return self.kept % self.n_group > 0

    @property
    def reachable(self) -> int:
        return self.topk_group * (self.kept // self.n_group)

    @property
    def power_of_two(self) -> bool:
        return self.kept & (self.kept - 1) == 0


_Rule = tuple[str, Callable[[_Result], bool], str]
_REFUSALS: tuple[_Rule, ...] = (
    ("transformers", lambda it: it.uneven, "the experts do not divide over the groups"),
    ("transformers", lambda it: it.grouped and it.kept < 2 * it.n_group, "groups are ranked by their two best experts"),
    ("transformers", lambda it: it.grouped and it.reachable < it.top_k, "it would pick masked experts, silently"),
    ("transformers", lambda it: not it.grouped and it.reachable < it.top_k, "a token cannot reach its top-k experts"),
    ("vllm", lambda it: it.grouped and (it.uneven or it.kept <= it.n_group), "it would route without groups, silently"),
    ("vllm", lambda it: it.reachable < it.top_k, "a token cannot reach its top-k experts"),
    ("sglang", lambda it: it.uneven or it.reachable < it.top_k, "a token cannot reach its top-k experts"),
    ("llama.cpp", lambda it: it.kept > 512, "more than 512 experts"),
    ("llama.cpp", lambda it: it.grouped and it.uneven, "the experts do not divide over the groups"),
    ("llama.cpp", lambda it: it.grouped and it.topk_group >= it.n_group, "topk_group must be smaller than n_group"),
    ("llama.cpp", lambda it: it.reachable < it.top_k, "a token cannot reach its top-k experts"),
    ("llama.cpp", lambda it: it.lacks_mtp, "the config announces MTP layers that are not there"),
)
_ONE_COUNT = "it reads one number of experts for all layers"
# Still right, on a slower path.
_REMARKS: tuple[_Rule, ...] = (
    (
        "vllm",
        lambda it: it.kept % 4 > 0 or it.kept > 512 or it.top_k >= it.reachable,
        "its FlashInfer-TRTLLM kernels want a multiple of 4, at most 512, and more experts in reach than top-k",
    ),
    (
        "vllm",
        lambda it: not it.grouped and it.kept % 64 > 0 and not (it.power_of_two and it.kept <= 256),
        "its fused top-k kernel wants a power of two or a multiple of 64",
    ),
    (
        "sglang",
        lambda it: not it.power_of_two and (it.grouped or it.kept > 512 or it.top_k > 8),
        "its fused routing kernels want a power of two",
    ),
    (
        "llama.cpp",
        lambda it: it.kept not in {288, 576} and not it.power_of_two,
        "its fused CUDA top-k wants a power of two, 288 or 576",
    ),
)


def engine_verdicts(checkpoint: Checkpoint, kept: int, fewest: int | None = None) -> dict[str, tuple[str, ...]]:
    """Reasons why each engine would not take the result, or not run it right; none means it will.

    Args:
        checkpoint: the source.
        kept: experts that stay in each layer, or the most that any layer keeps.
        fewest: the least that any layer keeps, where layers differ.
    """
    spec, differ = checkpoint.spec, fewest is not None
    result = _result(checkpoint, kept if fewest is None else fewest)
    return {
        engine: tuple(
            ([] if engine in spec.engines else [f"no loader for {spec.model_type}"])
            + ([_ONE_COUNT] if differ and engine != "transformers" else [])
            + [reason for name, broken, reason in _REFUSALS if name == engine and broken(result)]
        )
        for engine in ENGINES
    }


def engine_remarks(checkpoint: Checkpoint, kept: int) -> dict[str, list[str]]:
    """What each engine could use a fast kernel for before pruning and cannot any more."""
    before, after = _result(checkpoint, checkpoint.num_experts), _result(checkpoint, kept)
    remarks: dict[str, list[str]] = {}
    for engine, slower, remark in _REMARKS:
        if slower(after) and not slower(before) and engine in checkpoint.spec.engines:
            remarks.setdefault(engine, []).append(remark)
    return remarks


def _result(checkpoint: Checkpoint, kept: int) -> _Result:
    spec = checkpoint.spec
    absent = bool(spec.announced_mtp(checkpoint.config)) and not checkpoint.mtp_layers
    return _Result(
        kept=kept,
        top_k=checkpoint.top_k,
        n_group=checkpoint.n_group,
        topk_group=checkpoint.topk_group,
        lacks_mtp=absent and spec.model_type in _GGUF_WITH_MTP,
    )
