"""The bars of a profile run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hfsparse.progress import Bar, Clock


def silent(pairs: Iterable[tuple[str, object]]) -> Iterator:
    """Each item, without a bar."""
    for _, item in pairs:
        yield item


def bar(clock: Clock, pairs: Iterable[tuple[str, object]]) -> Iterator:
    """Each item, with a progress bar that shows its label; the bars of one job share a clock."""
    if not (pairs := list(pairs)):
        return  # all is known
    with Bar(clock=clock) as shown:
        task = shown.add_task(pairs[0][0], total=len(pairs))
        for label, item in pairs:
            shown.update(task, description=label)
            yield item
            shown.advance(task)
