"""Convert a checkpoint with llama.cpp's own converter: ``to_gguf.py LLAMA_CPP FOLDER OUT.gguf [OPTION ...]``.

Only the vocabulary is left out: the converter knows tokenizers by a digest of what they do, and random models have
none that it knows. Pruning copies the tokenizer's files and touches no token.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any


def no_vocabulary(model: Any) -> None:
    """What the converter itself writes for models without a tokenizer, and the number of tokens."""
    model._set_vocab_none()
    model.gguf_writer.add_vocab_size(model.hparams["vocab_size"])


def main(llama_cpp: str, folder: str, out: str, *options: str) -> None:
    """Run the converter's own command in this process, with every tensor stored as float32."""
    sys.path.insert(0, llama_cpp)
    converter = importlib.import_module("convert_hf_to_gguf")
    find_class = converter.get_model_class

    def without_vocabulary(*args: Any, **options: Any) -> Any:
        found = find_class(*args, **options)
        found.set_vocab = no_vocabulary
        return found

    converter.get_model_class = without_vocabulary
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", "f32", *options]
    converter.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
