"""The four-way questions of the bundled lm-eval tasks."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tiny_moe.drills import DRILLS, Question, sample, stable_hash
from tiny_moe.text import Document, shuffled

QUESTIONS = 1000
WRITTEN = ("sorting",)  # the answer is generated, not chosen
KINDS = {"prose": "text", "code": "code"} | dict.fromkeys(DRILLS, "drill")
_GIVEN = 160  # characters of a passage
_ASKED = {"prose": 32, "code": 12}  # characters of its continuation: code is easier to tell


def _passages(documents: list[Document], domain: str) -> list[tuple[str, str]]:
    """Cut the passages of a domain at blanks: what is given, and how it goes on."""
    pairs = []
    asked = _ASKED[domain]
    for document in shuffled(documents, domain, seed=1):
        text = "\n\n".join(document.paragraphs)
        for start in range(0, len(text) - _GIVEN - asked, _GIVEN // 2):
            cut = text.find(" ", start + _GIVEN)
            given, after = text[start:cut], text[cut + 1 : cut + 1 + asked]
            if cut > 0 and len(after) == asked and not after.isspace() and after[0] != " ":
                pairs.append((given, after))
    return pairs


def continuations(documents: list[Document], domain: str, rng: random.Random) -> list[Question]:
    """Ask which of four passages a text continues; the wrong ones are other passages of the same domain.

    The text is the same for all four, so that how likely it is by itself cannot decide.
    """
    pairs = list({after: (given, after) for given, after in _passages(documents, domain)}.values())
    rng.shuffle(pairs)
    questions = []
    for given, after in pairs[:QUESTIONS]:
        others = rng.sample([other for other, _ in pairs if other != given], 3)
        questions.append(Question(prompt=given, answer=after, wrong=tuple(others)))
    return questions


def drill_questions(name: str, rng: random.Random) -> list[Question]:
    """Draw distinct questions of one drill from the task split."""
    found: dict[str, Question] = {}
    while len(found) < QUESTIONS:
        question = sample(name, "task", rng)
        found.setdefault(question.prompt, question)
    return list(found.values())


def write_task(name: str, questions: list[Question], folder: Path, rng: random.Random) -> None:
    """Write one task: a YAML file and its questions, the right answer at every position equally often."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_row(name, question, number % 4) for number, question in enumerate(questions)]
    rng.shuffle(rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    form = _WRITE if name in WRITTEN else _CHOOSE_PASSAGE if KINDS[name] != "drill" else _CHOOSE
    (folder / f"{name}.yaml").write_text(_YAML.format(name=name, kind=KINDS[name], form=form), encoding="utf-8")


def _row(name: str, question: Question, label: int) -> dict[str, object]:
    if name in WRITTEN:
        return {"prompt": question.prompt, "answer": question.answer}
    passages = KINDS[name] != "drill"
    four = list(question.wrong)
    four.insert(label, question.prompt if passages else question.answer)
    asked = {"passages": four, "continuation": question.answer}
    return (asked if passages else {"prompt": question.prompt, "choices": four}) | {"label": label}


def write_group(names: list[str], folder: Path) -> None:
    """Write the group that runs every task."""
    listed = "".join(f"  - tiny_{name}\n" for name in names)
    (folder / "tiny.yaml").write_text(f"group: tiny\ntask:\n{listed}", encoding="utf-8")


def all_questions(documents: list[Document], seed: int) -> dict[str, list[Question]]:
    """Every candidate task's questions."""
    questions = {
        domain: continuations(documents, domain, random.Random(seed + stable_hash(domain)))
        for domain in ("prose", "code")
    }
    return questions | {name: drill_questions(name, random.Random(seed + stable_hash(name))) for name in DRILLS}


_CHOOSE = """output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - metric: acc"""
_CHOOSE_PASSAGE = """output_type: multiple_choice
doc_to_text: label
doc_to_choice: "{{passages}}"
doc_to_target: "{{continuation}}"
metric_list:
  - metric: acc"""
_WRITE = """output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\n"]
  do_sample: false
  max_gen_toks: 16
filter_list:
  - name: answer
    filter:
      - function: remove_whitespace
      - function: take_first
metric_list:
  - metric: exact_match"""
_YAML = """task: tiny_{name}
tag: tiny_{kind}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
test_split: test
{form}
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
