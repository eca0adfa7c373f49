"""Whether a plan keeps what it promises: its own limit of lost answers, against what was seen."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from hfsparse_eval.report.statistics import Change


def verdict(
    seen: Change | None,
    shares: Mapping[str, float | None],
    promise: Mapping,
    lengths: Collection[int] = (),
) -> str:
    """One sentence.

    seen: over all tasks that the dense model can do. shares: measured ones by name. promise: of
    `made.verified` in the plan: `limit`, the share of answers that may be lost, and the lengths it
    was verified at; empty where the plan has none.
    """
    if seen is None:
        return "nothing to judge: no task that the dense model can do has pairs"
    known = {name: value for name, value in shares.items() if value is not None}
    at = " and ".join(f"{name} {value:.2f}" for name, value in known.items())
    half = (seen.high - seen.low) / 2
    told = f"drop {_plain(-seen.mean)} ± {half:.1f} points" + (f" at {at}" if at else "")
    if "limit" not in promise:
        return f"{told}: no promise is stated, so none is kept or broken"
    limit = 100 * promise["limit"]
    if round(-seen.low, 1) <= limit:
        judged = f"within the promised {limit:.1f}"
    elif beyond(seen, promise):
        judged = f"beyond the promised {limit:.1f}"
    else:
        judged = f"not decided against the promised {limit:.1f}: {seen.n} samples are too few"
    other = sorted(set(lengths) - set(promise.get("lengths", lengths)))
    if other:
        verified = ", ".join(map(str, promise["lengths"]))
        judged += f" (promised at {verified} tokens; here also {', '.join(map(str, other))})"
    return f"{told}: {judged}"


def beyond(seen: Change, promise: Mapping) -> bool:
    """Whether the whole interval lies above the promised loss, if one is promised."""
    return -seen.high > 100 * promise.get("limit", float("inf"))


def _plain(points: float) -> str:
    """Without a minus before zero."""
    return f"{round(points, 1) + 0.0:.1f}"
