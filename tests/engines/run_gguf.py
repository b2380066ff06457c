"""Run token ids through llama.cpp and save the logits: ``run_gguf.py MODEL.gguf IDS.npy LOGITS.npy``.

A program of its own, because llama.cpp ends the whole process where it meets a count that it cannot take.
"""

from __future__ import annotations

import sys
from typing import Any

import llama_cpp
import numpy as np


def load(path: str, length: int) -> tuple[Any, Any]:
    """A model and a context for one sequence: float32 throughout, plain attention, one thread."""
    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers = 0
    options.load_mtp = True  # not run here, but their shapes are checked
    model = llama_cpp.llama_model_load_from_file(path.encode(), options)
    if not model:
        sys.exit(f"llama.cpp does not load {path}")
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = length
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, settings)
    if not context:
        sys.exit(f"llama.cpp makes no context for {path}")
    return model, context


def main(path: str, ids_file: str, out: str) -> None:
    """Save the logits of every position of one sequence, [T, V]."""
    ids_T = np.load(ids_file)
    llama_cpp.llama_backend_init()
    model, context = load(path, len(ids_T))
    batch = llama_cpp.llama_batch_init(len(ids_T), 0, 1)
    batch.n_tokens = len(ids_T)
    for position, token in enumerate(ids_T.tolist()):
        batch.token[position], batch.pos[position], batch.logits[position] = token, position, 1
        batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
    failure = llama_cpp.llama_decode(context, batch)
    if failure:
        sys.exit(f"llama_decode returned {failure}")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    logits = llama_cpp.llama_get_logits(context)
    np.save(out, np.ctypeslib.as_array(logits, shape=(len(ids_T), vocabulary)))


if __name__ == "__main__":
    main(*sys.argv[1:])
