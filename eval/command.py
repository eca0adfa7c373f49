"""What every command does: check what was given, load the model, run, write the report."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

import typer

from hfsparse.errors import UsageError
from hfsparse.reading import local
from hfsparse.version import __version__
from hfsparse_eval.suites import Size, named

DATA = {"qa_1": "squad", "qa_2": "hotpotqa"}  # tasks that need data: the option that gives it


class Run:
    """What all commands do: check, load, run, write."""

    gold = known = False  # of conversations, as `Prompter` takes them

    def __init__(self, kind, model, plans, size: Size, seed, output, cap, arms=(), batch=1):
        from hfsparse_eval.run.results import writable

        self.kind, self.model, self.seed, self.output = kind, model, seed, local(output)
        self.size = size
        self.cap = None if cap is None else positive("max-new-tokens", cap)
        self.batch = positive("batch", batch)
        self.arms = _arms(plans or (), arms or ())
        writable(self.output)

    def suite(self, tasks, depths=(None,)) -> Callable:
        """What makes the samples of these tasks, once a prompter and the window are known."""

        def made(prompter, window: int | None):
            from hfsparse_eval.run.samples import Suite

            check_window(window, self.size.lengths)
            return Suite(tasks, self.size.lengths, self.size.samples, prompter, self.seed, depths)

        return made

    def go(
        self,
        made: Callable,
        device: str,
        dtype: str,
        beyond_window: bool,
        chat: str,
        measured: Callable | None = None,
        **named: str | None,
    ) -> None:
        """Run what `made` makes of a prompter and a window, by `measured` or as answers."""
        from hfsparse.models.loading import load
        from hfsparse.models.weights import weights_mark
        from hfsparse.models.window import limit
        from hfsparse.plan import ModelId
        from hfsparse_eval.report import heatmap
        from hfsparse_eval.report import page as report
        from hfsparse_eval.run.machine import session
        from hfsparse_eval.run.prompter import Prompter
        from hfsparse_eval.run.results import Results, Settings
        from hfsparse_eval.tasks import haystack as text

        world, device = _processes(device)
        model, tokenizer = load(self.model, device, dtype)
        window = limit(model, beyond_window)
        for arm in self.arms:
            arm.check(model)
        suite = made(Prompter(tokenizer, chat, self.gold, self.known), window)
        settings = Settings(
            kind=self.kind,
            model=self.model,
            fingerprint=ModelId.of(model).fingerprint,
            weights=weights_mark(model),
            version=__version__,
            dtype=str(model.dtype).removeprefix("torch."),
            seed=self.seed,
            chat=chat,
            max_new_tokens=self.cap,
            **{"prose": text.prose_source(), **named},
        )
        facts = [arm.facts() for arm in self.arms]
        with world.main_process_first():
            session = session(model.device)
            results = Results(self.output, settings, session, facts, world.process_index)
        world.wait_for_everyone()
        share = world.process_index, world.num_processes
        (measured or self._answered)(model, tokenizer, suite, results, share)
        world.wait_for_everyone()
        if not world.is_main_process:
            return
        results.merge()
        paths = report.save(results)
        if self.kind == "needle":
            paths += heatmap.save(results, suite.cases[0].task)
        for path in paths:
            typer.echo(path)
        if failed := results.failed:
            first = failed[0]
            raise UsageError(
                f"{len(failed)} rounds failed, the first at {first['id']} under {first['arm']} "
                f"({first['failed']}): the command that asked for them tries them again"
            )

    def _answered(self, model, tokenizer, suite, results, share) -> None:
        from hfsparse_eval.run import runner

        runner.run(model, tokenizer, suite, results, self.arms, self.cap, self.batch, share)


def _arms(plans, names) -> list:
    """Everything that is run beside the dense model; what can't be is an error here."""
    from hfsparse.plan import Plan
    from hfsparse_eval.arms import Sparse, peer

    found = [Sparse(Plan.load(path), path.stem) for path in plans] + [peer(n) for n in names]
    seen: dict = {}
    for arm in found:
        if (arm.name, arm.hash) in seen:
            raise UsageError(f"{arm.title} and {seen[arm.name, arm.hash]} are the same: give one")
        seen[arm.name, arm.hash] = arm.title
    return found


def _processes(device: str):
    """This process among those of `accelerate launch`, and the device that is its own."""
    from datetime import timedelta

    from accelerate import PartialState

    world = PartialState(cpu=device == "cpu", timeout=timedelta(days=7))
    if world.num_processes > 1 and device in ("auto", "cuda"):
        device = str(world.device)
    return world, device


def sized(suite: str | None, lengths: str | None, samples: int | None, usual: Size) -> Size:
    """What a suite's name stands for, or what is usual; a flag of its own goes before both."""
    size = named(suite) if suite else usual
    if lengths is not None:
        numbers = listed("lengths", lengths, int, lambda length: length > 0, "above 0")
        size = Size(size.samples, tuple(numbers))
    return size if samples is None else Size(positive("samples", samples), size.lengths)


def positive(name: str, number: int) -> int:
    if number < 1:
        raise UsageError(f"{name} is {number}: give 1 or more")
    return number


def pick(names: str, known: dict) -> list:
    chosen = []
    for name in _split(names):
        if name in DATA and name not in known and f"{name}_invented" in known:
            raise UsageError(
                f"{name} needs its data: give --{DATA[name]} FILE, or take {name}_invented"
            )
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise UsageError(f"unknown task {name}: did you mean {near[0]}? ({', '.join(known)})")
        chosen.append(known[name])
    if not chosen:
        raise UsageError(f"no task given: give some of {', '.join(known)}")
    return chosen


def listed(name: str, given: str, kind: type, fits: Callable, wanted: str) -> list:
    try:
        numbers = [kind(word) for word in _split(given)]
    except ValueError:
        numbers = []
    if not numbers or not all(map(fits, numbers)):
        raise UsageError(f"{name} is {given!r}: give numbers {wanted}, by commas")
    return numbers


def _split(words: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in words.split(",") if word.strip()))


def check_window(window: int | None, lengths: Sequence[int]) -> None:
    if window and max(lengths) > window:
        raise UsageError(
            f"length {max(lengths)} is beyond this model's window of {window} tokens: "
            f"give lengths up to {window}, or --beyond-window"
        )
