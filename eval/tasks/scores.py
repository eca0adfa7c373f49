"""The scores of an answer: RULER's two, and one of long answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

WORD = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")


@dataclass(frozen=True)
class Metric:
    """How an answer is scored, 0 to 1.

    measure: takes the answer's text in lower case, and `Draft.answers`.
    right: says in a report what counts as right.
    to_end: answers go on to their end and are kept token by token. Otherwise the score must only
    rise as text grows, so that an answer may end as soon as its score is 1.
    """

    measure: Callable[[str, Sequence[str]], float]
    right: str
    to_end: bool = False


def share_found(said: str, answers: Sequence[str]) -> float:
    """The share of the answers that the text contains.

    This is safe for numbers, names and coded words, but of qa_2's answers "no" is also found in
    "not".
    """
    return sum(answer.lower() in said for answer in answers) / len(answers)


def any_found(said: str, answers: Sequence[str]) -> float:
    """1 if the text contains one of the answers."""
    return float(any(answer.lower() in said for answer in answers))


def words_in_order(said: str, answers: Sequence[str]) -> float:
    """The share of the words wanted that came in their order."""
    match = SequenceMatcher(None, answers, WORD.findall(said), autojunk=False)
    return sum(block.size for block in match.get_matching_blocks()) / len(answers)


METRICS = {
    "all": Metric(share_found, "all of the right ones; of some, their share"),
    "part": Metric(any_found, "any of the right ones"),
    "sequence": Metric(words_in_order, "the words wanted in their order", to_end=True),
}


def score(output: str, answers: Sequence[str], metric: str = "all") -> float:
    """The score of `output` by one of METRICS."""
    return METRICS[metric].measure(clean(output).lower(), answers)


def clean(output: str) -> str:
    """Stripped, with control characters made line breaks, as RULER does before it scores."""
    return "".join("\n" if ord(c) < 32 else c for c in output.strip()).strip()
