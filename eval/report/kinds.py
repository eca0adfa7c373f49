"""What the report of each command says that others' don't. A command is one row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hfsparse_eval.report import perplexity, recall
from hfsparse_eval.report.pairs import Outcome
from hfsparse_eval.report.render import Part
from hfsparse_eval.report.sections import by_position, by_turn, list_flipped

AS_RULER = "Scores are RULER's, in percent: the share of the answers found; for qa, any one found."
EARLY = "generation stops early once every answer was said"


@dataclass(frozen=True)
class Kind:
    """How the results of a command are reported."""

    scored: str = AS_RULER  # what scores are
    caps: str = "what each task asks for"  # of new tokens
    ends: str = EARLY  # where an answer ends
    unused: Sequence[str] = ()  # facts that say nothing of such a run
    promised: bool = True  # whether plans are verified on such tasks
    # Its heading, and what stands under it for each arm:
    section: tuple[str, Callable[[Outcome], Part]] | None = None
    # What stands in place of verdicts and scores, from the good lines and the arms:
    page: Callable[[Sequence[Mapping], Sequence[Mapping]], list[Part]] | None = None


KINDS = {
    "ruler": Kind(caps="as RULER: 128, vt 30, cwe 120, fwe 50, qa 32"),
    "needle": Kind(),
    "turns": Kind(
        scored="Scores in percent: the share of the answers found, the mean of the turns.",
        section=("By turn", by_turn),
    ),
    "custom": Kind(
        scored="Scores in percent; lengths are rounded up to powers of two.",
        unused=("prose haystack",),
        promised=False,
        section=("Flipped", list_flipped),
    ),
    "decode": Kind(
        scored="Scores in percent: the share of the words wanted that came in their order.",
        ends="answers go on to their end",
        promised=False,
        section=("Agreement with dense", by_position),
    ),
    "ppl": Kind(page=perplexity.page, unused=("prompts", "new tokens", "prose haystack")),
    "recall": Kind(page=recall.page),
}
