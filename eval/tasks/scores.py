"""The scores of an answer, as RULER counts them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

WORD = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")


def score(output: str, answers: Sequence[str], metric: str = "all") -> float:
    """RULER's two scores. `all`: the share of the answers found; `part`: 1 if any was found.

    And one of long answers, `sequence`: the share of the words wanted that came in their order.

    An answer is found where the output contains it, in any case: safe for numbers, names and coded
    words, but of qa_2's answers "no" is also found in "not". Both scores only rise as text grows.
    """
    said = clean(output).lower()
    if metric == "sequence":
        match = SequenceMatcher(None, answers, WORD.findall(said), autojunk=False)
        return sum(block.size for block in match.get_matching_blocks()) / len(answers)
    found = [answer.lower() in said for answer in answers]
    return float(any(found)) if metric == "part" else sum(found) / len(found)


def clean(output: str) -> str:
    """Stripped, with control characters made line breaks, as RULER does before it scores."""
    return "".join("\n" if ord(c) < 32 else c for c in output.strip()).strip()
