"""Training stream, tokenizer, and the calibration, selection and held-out files."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tiny_moe.drills import DRILLS, sample
from tiny_moe.tasks import all_questions, write_group, write_task
from tiny_moe.text import Document, assert_disjoint, load_corpus, shuffled

VOCABULARY = 1024
END = "<|end|>"
CHARACTERS = 600  # of a row, about 200 tokens
ROWS = {"calibration": 420, "selection": 150, "heldout": 150}
DRILL_SHARE = 0.5


def drill_block(split: str, rng: random.Random) -> str:
    """Return lines of mixed drills, about one row long."""
    lines: list[str] = []
    while sum(map(len, lines)) < CHARACTERS:
        lines.append(sample(rng.choice(tuple(DRILLS)), split, rng).line)
    return "\n".join(lines)


def passages(documents: list[Document], domain: str, seed: int) -> Iterator[str]:
    """Yield rows of running text: whole paragraphs, cut at line ends."""
    for document in shuffled(documents, domain, seed):
        row = ""
        for paragraph in document.paragraphs:
            row = f"{row}\n\n{paragraph}" if row else paragraph
            if len(row) >= CHARACTERS:
                yield row[:CHARACTERS]
                row = ""


def write_splits(corpus: dict[str, list[Document]], folder: Path, seed: int) -> None:
    """Write calibration, selection and held-out rows, a third of each domain, mixed."""
    for split, count in ROWS.items():
        rng = random.Random(seed + count + len(split))
        rows = [{"text": drill_block(split, rng), "domain": "drills"} for _ in range(count // 3)]
        for domain in ("prose", "code"):
            texts = list(passages(corpus[split], domain, seed))[: count // 3]
            rows += [{"text": text, "domain": domain} for text in texts]
        rng.shuffle(rows)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def write_data(folder: Path, task_names: list[str], seed: int) -> None:
    """Write the text files and the tasks, and prove that no two splits share a passage."""
    corpus = load_corpus()
    assert_disjoint({split: ["\n\n".join(doc.paragraphs) for doc in docs] for split, docs in corpus.items()})
    folder.mkdir(parents=True, exist_ok=True)
    write_splits(corpus, folder, seed)
    questions = all_questions(corpus["task"], seed)
    for name in task_names:
        write_task(name, questions[name], folder / "tasks", random.Random(seed))
    write_group(task_names, folder / "tasks")


def train_tokenizer(corpus: dict[str, list[Document]], seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer on the training text."""
    rng = random.Random(seed)
    texts = [paragraph for document in corpus["train"] for paragraph in document.paragraphs]
    texts += [drill_block("train", rng) for _ in range(1500)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def training_stream(
    tokenizer: PreTrainedTokenizerFast, corpus: dict[str, list[Document]], tokens: int, seed: int
) -> NDArray[np.int64]:
    """Token ids of the training text, drills and running text in turn, as one long stream."""
    rng = random.Random(seed)
    end = tokenizer.eos_token_id
    stream: list[int] = []
    epoch = 0
    while len(stream) < tokens:
        rows = [row for domain in ("prose", "code") for row in passages(corpus["train"], domain, seed + epoch)]
        rng.shuffle(rows)
        for row in rows:
            stream += [*tokenizer(row)["input_ids"], end]
            while rng.random() < DRILL_SHARE:
                stream += [*tokenizer(drill_block("train", rng))["input_ids"], end]
            if len(stream) >= tokens:
                break
        epoch += 1
    return np.array(stream[:tokens])
