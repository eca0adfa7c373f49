"""Whether a plan keeps what it promises: its own limit of lost answers, against what was seen."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from hfsparse_eval.report.statistics import Change


def verdict(
    seen: Change | None,
    shares: Mapping[str, float | None],
    promise: Mapping,
    lengths: Collection[int] = (),
    most: int = 0,
) -> str:
    """One sentence.

    seen: over all tasks that the dense model can do. shares: measured ones by name. promise: of
    `made.verified` in the plan: `limit`, the share of answers that may be lost, and the lengths it
    was verified at; empty where the plan has none. most: samples of each
    task, length and depth that were to be asked, if there were rounds.
    """
    if seen is None:
        return "nothing to judge: no task that the dense model can do has pairs"
    known = {name: value for name, value in shares.items() if value is not None}
    at = " and ".join(f"{name} {value:.2f}" for name, value in known.items())
    told = f"drop {_drop(seen)}" + (f" at {at}" if at else "")
    if "limit" not in promise:
        return f"{told}: no promise is stated, so none is kept or broken"
    limit = 100 * promise["limit"]
    word = judge(seen, limit)
    if not word and seen.each is None:
        judged = f"not decided against the promised {limit:.1f}: {seen.n} samples are too few"
    elif not word:
        judged = f"undecided against the promised {limit:.1f} {_after(seen, most)}"
    else:
        judged = f"{word} the promised {limit:.1f}{_by(seen)}"
    other = sorted(set(lengths) - set(promise.get("lengths", lengths)))
    if other:
        verified = ", ".join(map(str, promise["lengths"]))
        judged += f" (promised at {verified} tokens; here also {', '.join(map(str, other))})"
    return f"{told}: {judged}"


def judge(seen: Change, limit: float) -> str:
    """`within` a limit in points or `beyond` it; empty where the interval says neither."""
    if round(-seen.low, 1) <= limit:
        return "within"
    return "beyond" if -seen.high > limit else ""


def beyond(seen: Change, promise: Mapping) -> bool:
    """Whether the whole interval lies above the promised loss, if one is promised."""
    return -seen.high > 100 * promise.get("limit", float("inf"))


def order(seen: Change) -> str:
    """Whether an arm scores `above` or `below` another; empty where the interval says neither."""
    return "above" if seen.low > 0 else "below" if seen.high < 0 else ""


def comparison(seen: Change | None, other: str, most: int) -> str:
    """One sentence on the change from the arm `other`, for which samples were asked in rounds."""
    if seen is None:
        return f"no samples to compare with {other}"
    told = f"{_plain(seen.mean)} points [{_plain(seen.low)}, {_plain(seen.high)}] from {other}"
    if word := order(seen):
        return f"{told}: {word} it{_by(seen)}"
    return f"{told}: undecided {_after(seen, most)}"


def _drop(seen: Change) -> str:
    """The loss with its interval, which lies unevenly about it where it holds at any time."""
    if seen.each is None:
        return f"{_plain(-seen.mean)} ± {(seen.high - seen.low) / 2:.1f} points"
    return f"{_plain(-seen.mean)} points [{_plain(-seen.high)}, {_plain(-seen.low)}]"


def _by(seen: Change) -> str:
    return f", decided by {seen.n} samples" if seen.each else ""


def _after(seen: Change, most: int) -> str:
    """most: samples of each task, length and depth that were to be asked."""
    told = f"after {seen.n} samples"
    return told if seen.each < most else f"{told}, the most that were to be asked"


def _plain(points: float) -> str:
    """Without a minus before zero."""
    return f"{round(points, 1) + 0.0:.1f}"
