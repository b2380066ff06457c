"""A model without weights, whose decoder layers run one at a time.

The model's own forward pass prepares masks, positions and whatever else a layer is given; every other layer is replaced
by a stub that hands on what the layer before gave. So nothing about an architecture is known here.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from moeprune.checkpoint import Checkpoint
from moeprune.errors import CheckpointError, ConfigError, UnsupportedModelError, first_line
from moeprune.experts import expert_layers

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.overrides import TorchFunctionMode
    from transformers import PreTrainedModel

    Inputs = Mapping[str, torch.Tensor]
    State = tuple[torch.Tensor, ...]  # what a decoder layer gives: hidden states [B, S, H], and what few families add


_LARGE = 1 << 20  # elements


def build_skeleton(checkpoint: Checkpoint, *, dtype: str = "auto", trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a checkpoint with parameters that have shapes and no memory; buffers are real.

    Args:
        checkpoint: an opened checkpoint.
        dtype: of the parameters; ``auto`` is the checkpoint's own.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ConfigError: an unknown dtype.
        CheckpointError: transformers does not know the model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
            wanted = _dtype_of(config, checkpoint, dtype)
            for part in (config, config.get_text_config()):
                # A quantised source is dequantised as it is read, into a plain model.
                vars(part).pop("quantization_config", None)
            with init_empty_weights(include_buffers=False), _large_ones_nowhere():
                model = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise CheckpointError(f"transformers cannot build {checkpoint.path}: {first_line(error)}") from error
    return cast("PreTrainedModel", model.eval())


def _large_ones_nowhere() -> TorchFunctionMode:
    """Make large uninitialised tensors on the meta device, and not in memory first: there may not be enough for one."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Nowhere(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = dict(kwargs or {})
            if function is torch.empty and given.get("device") is None:
                empty = torch.empty(*args, **given | {"device": "meta"})
                if empty.numel() > _LARGE:
                    return empty
            return function(*args, **given)

    return Nowhere()


def _dtype_of(config: Any, checkpoint: Checkpoint, name: str) -> torch.dtype:
    """The dtype that transformers would load the checkpoint in."""
    import torch

    if name != "auto":
        return torch_dtype(name)
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(own, torch.dtype) and own.is_floating_point:
        return own
    plain = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    stored = (plain[entry.dtype] for entry in checkpoint.tensors.values() if entry.dtype in plain)
    return next(stored, torch.bfloat16)


def torch_dtype(name: str) -> torch.dtype:
    """The floating-point dtype of that name.

    Raises:
        ConfigError: there is none.
    """
    import torch

    chosen = getattr(torch, name, None)
    if not (isinstance(chosen, torch.dtype) and chosen.is_floating_point):
        raise ConfigError(f"unknown --dtype {name!r}", "auto, float32, bfloat16 or float16")
    return chosen


def handed_on(model: PreTrainedModel, length: int) -> int:
    """Bytes per token that a decoder layer hands on beside the hidden states, in sequences of ``length`` tokens.

    A family whose sparse attention chooses positions in some layers hands the choice on to the others.
    """
    [layer, *_] = [module for name, module in model.named_modules() if re.search(r"\blayers\.\d+$", name)]
    if "prev_topk_indices" not in inspect.signature(layer.forward).parameters:
        return 0
    return 8 * min(length, int(model.config.get_text_config().index_topk))


class LayerRunner:
    """Runs one decoder layer of a model on the states that the layer before it gave."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.path = _layers_path(model)
        owner, _, self._attribute = self.path.rpartition(".")
        self._owner = model.get_submodule(owner)
        self.layers: list[nn.Module] = list(getattr(self._owner, self._attribute))

    def embed(self, inputs: Inputs) -> State:
        """What the first decoder layer is given, for ``input_ids`` and ``attention_mask``, both [B, S]."""
        entry = _kinds()["entry"]()
        with self._arranged(0, entry), contextlib.suppress(_Stop):
            self.model.base_model(**inputs, use_cache=False)
        return _state_of(entry)

    def run(self, index: int, state: State, inputs: Inputs) -> State:
        """Run one layer.

        Args:
            index: of the decoder layer.
            state: what :meth:`embed` or the layer before gave.
            inputs: ``attention_mask`` [B, S].
        """
        real = _kinds()["real"](self.layers[index], state)
        with self._arranged(index, real, state), contextlib.suppress(_Stop):
            self.model.base_model(inputs_embeds=state[0], attention_mask=inputs["attention_mask"], use_cache=False)
        return _state_of(real)

    def logits(self, state: State, inputs: Inputs, positions: torch.Tensor) -> torch.Tensor:
        """Logits [B, len(positions), V] after the last layer."""
        with self._arranged(len(self.layers), None, state):
            given = {"inputs_embeds": state[0], "attention_mask": inputs["attention_mask"]}
            logits: torch.Tensor = self.model(**given, use_cache=False, logits_to_keep=positions).logits
        return logits

    @contextlib.contextmanager
    def _arranged(self, index: int, at: Any, before: State = ()) -> Iterator[None]:
        """Put ``at`` in the place of one layer, and stubs that hand on ``before`` in the place of those before it."""
        from torch import nn

        stub = _kinds()["stub"](before)
        stubs = [stub] * index + ([at] if at is not None else [])
        # As many as before: a model may walk through a list of kinds of layers beside them.
        arranged = nn.ModuleList(stubs + [stub] * (len(self.layers) - len(stubs)))
        setattr(self._owner, self._attribute, arranged)
        try:
            yield
        finally:
            setattr(self._owner, self._attribute, nn.ModuleList(self.layers))


def _state_of(module: nn.Module) -> State:
    return cast("State", module.state)


def _layers_path(model: PreTrainedModel) -> str:
    experts = expert_layers(model)[0].experts
    name = next(name for name, module in model.named_modules() if module is experts)
    path = re.match(r"(.*?\blayers)\.\d+\.", name)
    if path is None:
        raise UnsupportedModelError(f"cannot find the list of decoder layers above {name}", "use --no-stream")
    return path[1]


class _Stop(Exception):  # noqa: N818 - no error: the forward pass has got as far as it need
    """Ends a forward pass after the layer of interest."""


@functools.cache
def _kinds() -> dict[str, type[nn.Module]]:
    """What stands in the places of decoder layers; classes made once, since one of them is a cycle of references."""
    from torch import nn

    class Stub(nn.Module):
        """Gives what the layer before the one of interest gave: a tensor, or a tuple where there is more."""

        def __init__(self, state: State) -> None:
            super().__init__()
            self.state = state

        def forward(self, *_: Any, **__: Any) -> Any:
            return self.state[0] if len(self.state) == 1 else self.state

    class Entry(nn.Module):
        """Keeps what it is given."""

        state: State = ()

        def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> None:
            self.state = (hidden,)
            raise _Stop

    class Real(nn.Module):
        """The layer of interest, fed with a state whatever the model made of its inputs on the way."""

        def __init__(self, layer: nn.Module, state: State) -> None:
            super().__init__()
            self.layer = layer
            self.state = state

        def forward(self, _: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            output = self.layer(self.state[0], *args, **kwargs)
            self.state = output if isinstance(output, tuple) else (output,)
            raise _Stop

    return {"stub": Stub, "entry": Entry, "real": Real}
