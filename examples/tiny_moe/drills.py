"""Generated drills: short questions with one right answer and three wrong ones.

Every drill is a pure function of a random generator. A question belongs to exactly one split, decided by a hash of its
prompt, so that no question of the tasks, the held-out text or the selection text is ever trained on.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SPLITS = ("task", "heldout", "selection", "calibration", "train")
LETTERS = "abcdefghijklmnopqrst"
CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}

ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "j", "h")
ENDINGS = ("arn", "ilo", "ond", "uma", "esk", "oti", "ave", "ulp")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "color": ("red", "blue", "green", "black", "white", "brown", "gold", "pink"),
    "home": ("river", "forest", "desert", "island", "valley", "castle", "harbor", "mountain"),
    "food": ("bread", "rice", "apple", "honey", "cheese", "soup", "fish", "corn"),
    "work": ("smith", "baker", "tailor", "miller", "sailor", "painter", "teacher", "hunter"),
}
# A fact is asked in eight phrasings; which of them are trained on differs from fact to fact.
PHRASINGS = (
    "the {attribute} of {name} is",
    "{name} {attribute} :",
    "what {attribute} has {name} ?",
    "for {name} the {attribute} is",
    "{attribute} of {name} =",
    "{name} has the {attribute}",
    "ask {name} about {attribute} :",
    "{attribute} : {name} ->",
)
PHRASING_SPLITS = ("task", "task", "heldout", "selection", "calibration", "train", "train", "train")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt, the right answer and three wrong ones."""

    prompt: str
    answer: str
    wrong: tuple[str, ...]

    @property
    def line(self) -> str:
        """The prompt and its answer as a line of training text."""
        return f"{self.prompt} {self.answer}"


Drill = Callable[[random.Random], Question]


def stable_hash(text: str) -> int:
    """Hash a string to 32 bits, equal in every process and on every machine."""
    return zlib.crc32(text.encode())


def split_of_prompt(prompt: str) -> str:
    """Name the one split that a question belongs to."""
    bucket = stable_hash(prompt) % 100
    edges = (("task", 12), ("heldout", 16), ("selection", 20), ("calibration", 28))
    return next((name for name, edge in edges if bucket < edge), "train")


def _pick_wrong(rng: random.Random, answer: str, candidates: Iterator[str]) -> tuple[str, ...]:
    """Take the first three distinct candidates that differ from the answer, in random order."""
    wrong: list[str] = []
    for candidate in candidates:
        if candidate != answer and candidate not in wrong:
            wrong.append(candidate)
        if len(wrong) == 3:
            break
    rng.shuffle(wrong)
    return tuple(wrong)


def _near_orders(rng: random.Random, ordered: list[str]) -> Iterator[str]:
    """Yield near misses: another letter in the same order, or two neighbours swapped."""
    while True:
        changed = list(ordered)
        if rng.random() < 0.7:
            changed[rng.randrange(len(changed))] = rng.choice([x for x in LETTERS if x not in ordered])
            changed.sort()
        else:
            i = rng.randrange(len(changed) - 1)
            changed[i], changed[i + 1] = changed[i + 1], changed[i]
        yield " ".join(changed)


def sorting(rng: random.Random) -> Question:
    """Put four or five letters in alphabetical order."""
    letters = rng.sample(LETTERS, rng.choice((4, 5)))
    ordered = sorted(letters)
    answer = " ".join(ordered)
    wrong = _pick_wrong(rng, answer, _near_orders(rng, ordered))
    return Question(prompt=f"sort {' '.join(letters)} :", answer=answer, wrong=wrong)


def _shift(letter: str, step: int) -> str:
    return LETTERS[(LETTERS.index(letter) + step) % len(LETTERS)]


def transform(rng: random.Random) -> Question:
    """Rewrite a list of letters: reversed, next letters, previous letters, or every letter doubled."""
    letters = rng.choices(LETTERS, k=rng.choice((3, 4)))
    results = {
        "reverse": letters[::-1],
        "next": [_shift(x, 1) for x in letters],
        "prev": [_shift(x, -1) for x in letters],
        "skip": [_shift(x, 2) for x in letters],
    }
    name = rng.choice(tuple(results))
    answer = results[name]

    def damaged() -> Iterator[str]:
        while True:
            changed = list(answer)
            changed[rng.randrange(len(changed))] = rng.choice(LETTERS)
            yield " ".join(changed)

    right = " ".join(answer)
    return Question(prompt=f"{name} {' '.join(letters)} :", answer=right, wrong=_pick_wrong(rng, right, damaged()))


def comparison(rng: random.Random) -> Question:
    """Name the largest or the smallest of four numbers."""
    numbers = rng.sample(range(10, 100), 4)
    largest = rng.random() < 0.5
    answer = max(numbers) if largest else min(numbers)
    wrong = tuple(str(n) for n in numbers if n != answer)
    word = "largest" if largest else "smallest"
    return Question(prompt=f"{word} of {' '.join(map(str, numbers))} :", answer=str(answer), wrong=wrong)


def brackets(rng: random.Random) -> Question:
    """Close every bracket that is still open."""
    text: list[str] = []
    stack: list[str] = []
    for _ in range(rng.choice((5, 6, 7, 8))):
        if len(stack) > 1 and rng.random() < 0.35:
            text.append(CLOSING[stack.pop()])
        else:
            stack.append(rng.choice(tuple(CLOSING)))
            text.append(stack[-1])
    answer = [CLOSING[x] for x in reversed(stack)]

    def damaged() -> Iterator[str]:
        while True:
            changed = list(answer)
            changed[rng.randrange(len(changed))] = rng.choice(tuple(CLOSING.values()))
            yield " ".join(changed)

    right = " ".join(answer)
    return Question(prompt=f"close {' '.join(text)} :", answer=right, wrong=_pick_wrong(rng, right, damaged()))


def knowledge(rng: random.Random) -> Question:
    """Recall one of 512 made-up facts, in one of eight phrasings."""
    name = rng.choice(ONSETS) + rng.choice(ENDINGS)
    attribute = rng.choice(tuple(ATTRIBUTES))
    words = ATTRIBUTES[attribute]
    answer = words[stable_hash(f"{name}/{attribute}/value") % len(words)]
    prompt = rng.choice(PHRASINGS).format(name=name, attribute=attribute)
    return Question(prompt=prompt, answer=answer, wrong=tuple(rng.sample([w for w in words if w != answer], 3)))


def split_of_fact(prompt: str) -> str:
    """Name the split of a fact's phrasing: two of eight are asked in the task, three are trained on."""
    words = prompt.split()
    attribute = next(word for word in words if word in ATTRIBUTES)
    names = {a + b for a in ONSETS for b in ENDINGS}
    name = next(word for word in words if word in names)
    order = random.Random(stable_hash(f"{name}/{attribute}/order")).sample(PHRASING_SPLITS, len(PHRASING_SPLITS))
    shape = next(i for i, p in enumerate(PHRASINGS) if p.format(name=name, attribute=attribute) == prompt)
    return order[shape]


DRILLS: dict[str, Drill] = {
    "sorting": sorting,
    "transform": transform,
    "comparison": comparison,
    "brackets": brackets,
    "knowledge": knowledge,
}


def sample(name: str, split: str, rng: random.Random) -> Question:
    """Draw a question of one drill that belongs to one split."""
    belongs = split_of_fact if name == "knowledge" else split_of_prompt
    while True:
        question = DRILLS[name](rng)
        if belongs(question.prompt) == split:
            return question
