"""The steps of every command: check the request, load, begin a session, fill it, finish it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from hfsparse.errors import UsageError
from hfsparse.reading import local
from hfsparse.version import __version__
from hfsparse_eval.arms import Arm, Dense, Sparse, peer
from hfsparse_eval.options import ROUND, Size, check_positive
from hfsparse_eval.run.results import Results, Settings, writable
from hfsparse_eval.run.world import Session, World, join


@dataclass(frozen=True)
class Request:
    """What a command was asked for."""

    kind: str  # the command
    model: str
    output: Path
    arms: Sequence[Arm]
    seed: int
    chat: str
    facts: Sequence[dict]  # of the arms
    cap: int | None  # of new tokens of an answer
    batch: int
    most: int | None  # samples of each task at each length, if a run may be decided by fewer


def check_request(
    kind: str,
    model: str,
    output: Path,
    plans: Iterable[str] | None = None,
    peers: Iterable[str] | None = None,
    seed: int = 0,
    chat: str = "auto",
    cap: int | None = None,
    batch: int = 1,
    most: int | None = None,
) -> Request:
    """The request; UsageError for what can be known to be wrong before a model is loaded."""
    output = local(output)
    if cap is not None:
        check_positive("max-new-tokens", cap)
    check_positive("batch", batch)
    arms = _read_arms(plans or (), peers or ())
    facts = [arm.facts() for arm in arms]
    if most:
        from hfsparse_eval.report import decided

        facts = decided.add_until(facts, most)
    writable(output)
    return Request(kind, model, output, arms, seed, chat, facts, cap, batch, most)


def _read_arms(plans: Iterable[str], peers: Iterable[str]) -> list[Arm]:
    """Everything that is run beside the dense model."""
    from hfsparse.plan.sources import name_of, open_plan

    found = [Sparse(open_plan(plan), name_of(plan)) for plan in plans] + [peer(n) for n in peers]
    seen: dict = {}
    for arm in found:
        if (arm.name, arm.hash) in seen:
            raise UsageError(f"{arm.title} and {seen[arm.name, arm.hash]} are the same: give one")
        seen[arm.name, arm.hash] = arm.title
    return found


@dataclass(frozen=True)
class Loaded:
    """A request, and the model that it is for."""

    request: Request
    world: World
    model: Any
    tokenizer: Any
    window: int | None  # tokens; None: any length

    def prompter(self, gold: bool = False, known: bool = False):
        """Makes tokens of drafts; `gold` and `known` are of conversations."""
        from hfsparse_eval.run.prompter import Prompter

        return Prompter(self.tokenizer, self.request.chat, gold, known)

    def suite(self, tasks, size: Size, depths=(None,), **rules):
        """The samples of these tasks; UsageError where a length is beyond the model's window."""
        from hfsparse_eval.run.samples import Suite

        prompter = self.prompter(**rules)
        self.check_lengths(size)
        return Suite(tasks, size.lengths, size.samples, prompter, self.request.seed, depths)

    def check_lengths(self, size: Size) -> None:
        if self.window and max(size.lengths) > self.window:
            raise UsageError(
                f"length {max(size.lengths)} is beyond this model's window of {self.window} "
                f"tokens: give lengths up to {self.window}, or --beyond-window"
            )


def load_model(request: Request, device: str, dtype: str, beyond_window: bool) -> Loaded:
    """The model on this process's device; UsageError or PlanError where an arm can't run it."""
    from hfsparse.models.loading import load
    from hfsparse.models.window import limit

    world, device = join(device)
    model, tokenizer = load(request.model, device, dtype)
    window = limit(model, beyond_window)
    for arm in request.arms:
        arm.check(model)
    return Loaded(request, world, model, tokenizer, window)


def begin(loaded: Loaded, **settings: str | int | None) -> Session:
    """Open the results, or refuse a folder of another run. settings: further ones of `Settings`."""
    from hfsparse.models.weights import weights_mark
    from hfsparse.plan import ModelId
    from hfsparse_eval.run.machine import describe
    from hfsparse_eval.tasks.haystack import prose_source

    request, world, model = loaded.request, loaded.world, loaded.model
    shared = Settings(
        kind=request.kind,
        model=request.model,
        fingerprint=ModelId.of(model).fingerprint,
        weights=weights_mark(model),
        version=__version__,
        dtype=str(model.dtype).removeprefix("torch."),
        seed=request.seed,
        chat=request.chat,
        max_new_tokens=request.cap,
        **{"prose": prose_source(), **settings},
    )
    with world.first_process_first():
        machine = describe(model.device)
        results = Results(request.output, shared, machine, request.facts, world.index)
    return Session(model, loaded.tokenizer, results, request.arms, world)


def finish(session: Session, grid: str | None = None) -> None:
    """Write the report once all processes are done, and say where; UsageError if a sample failed.

    grid: the task that a heat map is drawn of.
    """
    from hfsparse_eval.report import heatmap, page

    results = session.results
    session.gather()
    if session.world.index:
        return
    paths = page.save(results)
    if grid:
        paths += heatmap.save(results, grid)
    for path in paths:
        typer.echo(path)
    if failed := results.failed:
        first = failed[0]
        raise UsageError(
            f"{len(failed)} rounds failed, the first at {first['id']} under {first['arm']} "
            f"({first['failed']}): the command that asked for them tries them again"
        )


def ask(loaded: Loaded, suite, grid: str | None = None, **settings: str | None) -> None:
    """A whole session: every answer that the results lack, or that decides, and the report.

    UsageError where the dense model is certain to do too badly at all that could decide.
    """
    from hfsparse_eval.report.pairs import MIN_SCORE
    from hfsparse_eval.run import runner

    request, session = loaded.request, begin(loaded, **settings)
    usual = [((Dense(), *session.arms), suite)]
    for arms, samples in _rounds(session, suite, request) if request.most else usual:
        runner.run(session, samples, request.cap, request.batch, arms)
    finish(session, grid)
    if request.most and not _promising(session, suite).cases:
        raise UsageError(
            f"the dense model is certain to score below {100 * MIN_SCORE:.0f} % of every task at "
            "every length: there is nothing to decide. Give tasks or lengths that it can do"
        )


def _rounds(session: Session, suite, request: Request) -> Iterator[tuple]:
    """The arms that are undecided, and the samples that may decide; none in the end.

    The dense model answers first: what it can't do no arm is asked. All processes look at all
    results, so each comes to the same rounds.
    """
    from hfsparse_eval.report.decided import list_open

    step, arms = max(ROUND, request.batch), session.arms
    for count in range(step, request.most + step, step):
        yield (Dense(),), _promising(session, suite).first(count)
        session.gather()
        promising = _promising(session, suite).first(count)
        if not promising.cases:
            return
        yield arms, promising
        session.gather()
        undecided = list_open(session.results.lines, request.facts)
        if not undecided:
            return
        pairs = zip(session.arms, request.facts, strict=True)
        arms = [arm for arm, facts in pairs if facts in undecided]


def _promising(session: Session, suite):
    """The samples of tasks and lengths that the dense model may do well enough."""
    from hfsparse_eval.report.decided import list_hopeless

    return suite.without({(x.task, int(x.length)) for x in list_hopeless(session.results.lines)})
