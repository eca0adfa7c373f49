"""The settings of `profile` and `verify`: each is defined here once.

    settings = Settings(method="duo", lengths=(2048,))  # UsageError for what can't work

A field of `Settings` holds a setting's type and default and, by `setting`, all else that is known
of it. The keywords of `profile`, the options of `hfsparse profile`, the keys of recipes, what a
resumed run must have in common with the one before and what a plan says of its making are read off
the fields. A new setting is a field here and the place that uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from functools import wraps
from inspect import Parameter, Signature, signature
from itertools import chain
from math import inf
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

from hfsparse.errors import UsageError
from hfsparse.profiler.methods import DRAWN, METHODS

Check = Callable[[str, Any], str | None]  # of a setting's name and value: why it is refused

BUDGET = ", of the layers without a window of their own; 1 is no limit"


def setting(
    default: Any,
    help: str | None = None,
    *,
    check: Check | None = None,
    suits: Callable[[Any], str | None] | None = None,
    recipe: bool = True,
    identity: bool = False,
    made: bool = False,
    proof: bool = False,
    flags: tuple[str, ...] = (),
    **option: Any,
) -> Any:
    """A field of `Settings`.

    `help` is that of its option; without it the command has no option of this name. `check` says
    why a value is refused, `suits` why it is beside the other settings; None is always taken.
    Recipes may set it if `recipe`. `identity`: measurements depend on it. `made`: a plan says it
    under `made`. `proof`: `verify` takes it, too. `flags` are an option's own names, `option` is
    passed on to typer.
    """
    about = {"help": help, "check": check, "suits": suits, "recipe": recipe, "identity": identity}
    about |= {"made": made, "proof": proof, "flags": flags, "option": option}
    return field(default=default, metadata=about)


def within(fits: Callable[[Any], bool], refusal: str) -> Check:
    """A check that a value fits; the refusal has the value at its `{}`."""
    return lambda name, value: None if fits(value) else refusal.format(value)


def one_of(names: Callable[[], Iterable[str]], refusal: str) -> Check:
    """A check that a value is a known name; the refusal has value and names at its `{}`."""

    def check(name: str, value: str) -> str | None:
        return None if value in names() else refusal.format(value, ", ".join(names()))

    return check


def _proxies() -> tuple[str, ...]:
    from hfsparse.profiler.measure.proxies import PROXIES  # torch, only where one is given

    return PROXIES


def _refuse_share(name: str, share: float) -> str | None:
    return None if 0 < share <= 1 else f"{name} is {share}: give more than 0 and at most 1"


def _refuse_loss(settings: Settings) -> str | None:
    if settings.one_pass:
        return None
    return (
        f"{settings.methods(' with ')} knows no loss to keep within {settings.loss}: leave it out, "
        f"or use {', '.join(DRAWN)} alone"
    )


def _refuse_proxy(settings: Settings) -> str | None:
    proxy, method = settings.proxy, settings.method
    if method == "duo":
        return None
    return f"proxy {proxy} ranks heads for duo, not for {method}: leave it out"


def _refuse_curves(settings: Settings) -> str | None:
    if settings.one_pass:
        return None
    return (
        f"{settings.methods(' with ')} draws no curves: leave them out, or use "
        f"{', '.join(DRAWN)} alone"
    )


def _selectors() -> tuple[str, ...]:
    from hfsparse.selectors import SELECTORS  # torch, only where one is given

    return tuple(kind for kind, selector in SELECTORS.items() if hasattr(selector, "pages"))


def _refuse_selector(settings: Settings) -> str | None:
    selector, method = settings.selector, settings.method
    if method != "balanced":
        return f"selector {selector} is offered by balanced, not by {method}: leave it out"
    if settings.decode_share == 1 and settings.loss is None:
        return (
            f"selector {selector} saves nothing where decode_share is 1, no limit: give a smaller "
            "decode_share, or leave the selector out"
        )
    return None


def _evictions() -> tuple[str, ...]:
    from hfsparse.evictions import EVICTIONS  # torch, only where one is given

    return tuple(EVICTIONS)


def _refuse_eviction(settings: Settings) -> str | None:
    eviction, method = settings.eviction, settings.method
    if method == "balanced":
        return None
    return f"eviction {eviction} is offered by balanced, not by {method}: leave it out"


def _refuse_cache_gib(settings: Settings) -> str | None:
    gib, share = settings.cache_gib, settings.cache_share
    if share != Settings.cache_share:
        return f"cache_gib is {gib} and cache_share {share}, both of the cache: give one of the two"
    if settings.method == "moa":
        return f"cache_gib {gib} is of one length, moa keeps its budgets at all: give cache_share"
    return None


def _refuse_at(settings: Settings) -> str | None:
    if settings.cache_gib is not None:
        return None
    return f"at is {settings.at}, where cache_gib counts, and there is none: give that, too"


def _refuse_unknown_bits(name: str, bits: tuple[int | str, ...]) -> str | None:
    if 16 in bits and len({*bits}) == len(bits) and {*bits} <= {16, 8, 4, "fp8"}:
        return None
    return (
        f"bits are {show_bits(bits)}: give 16, to which heads return that lose too much, and what "
        "else they may have of 8, fp8 and 4, such as 16,8,4"
    )


def show_bits(bits: Iterable[int | str]) -> str:
    """As the option takes them."""
    return ",".join(map(str, bits))


def _refuse_bits(settings: Settings) -> str | None:
    if settings.method == "balanced":
        return None
    given = show_bits(settings.bits)
    return f"bits {given} are offered by balanced, not by {settings.method}: leave them out"


METHOD = one_of(lambda: METHODS, "no method {}: there is {}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one call of `profile` is asked for, apart from the model; its docstring says more."""

    out: str | Path | None = setting(None, recipe=False, proof=True)
    lengths: tuple[int, ...] | None = setting(
        None,
        "Tokens of a sample, by commas; else 1024,2048, on a GPU up to 16384, and no more than the "
        "model's window.",
        proof=True,
    )
    samples: int = setting(
        6,
        "Samples at each length.",
        check=within(lambda count: count >= 1, "samples is {}: give 1 or more"),
        made=True,
        min=1,
    )
    prefill_density: float = setting(
        0.4, f"Share of query-key pairs to compute in the prefill{BUDGET}.", check=_refuse_share
    )
    cache_share: float = setting(
        0.8, f"Share of the KV cache's bytes to keep{BUDGET}.", check=_refuse_share
    )
    cache_gib: float | None = setting(
        None,
        "In place of --cache-share: GiB that the whole cache of one row of --at tokens may take.",
        check=within(lambda gib: 0 < gib < inf, "cache_gib is {}: give more than 0, in GiB"),
        suits=_refuse_cache_gib,
        made=True,
    )
    at: int | None = setting(
        None,
        "Tokens in the row at which --cache-gib counts; else the longest of --lengths.",
        check=within(lambda tokens: tokens >= 1, "at is {}: give tokens in a row, 1 or more"),
        suits=_refuse_at,
        made=True,
        min=1,
    )
    decode_share: float = setting(
        0.25,
        f"Share of keys and values to read in decode, indexes counted{BUDGET}.",
        check=_refuse_share,
    )
    loss: float | None = setting(
        None,
        "The smallest shares within these budgets that lose no more: docs/profiling.md.",
        check=within(
            lambda x: 0 <= x <= 1,
            "loss is {}: give 0 to 1, a share of what rings alone would lose",
        ),
        suits=_refuse_loss,
    )
    seed: int = setting(0, "Of the samples.", made=True, proof=True)
    data: str | Path | None = setting(
        None,
        'Your own texts: "text", or "prompt" and perhaps "answer", one object a line.',
        recipe=False,
        proof=True,
        metavar="FILE.jsonl",
    )
    method: str = setting(
        "balanced", "How patterns are chosen.", check=METHOD, identity=True, made=True
    )
    prefill_method: str | None = setting(
        None,
        "Another method for prompts, where --method keeps the cache full.",
        check=METHOD,
        identity=True,
        made=True,
    )
    selector: str | None = setting(
        None,
        "balanced: what chooses keys in decode, and has its table made; else quest and lowrank.",
        check=one_of(_selectors, "no selector {}: there is {}"),
        suits=_refuse_selector,
        identity=True,
        made=True,
    )
    eviction: str | None = setting(
        None,
        "balanced: what kv heads may keep by content, beside rings; a later question has no say.",
        check=one_of(_evictions, "no eviction {}: there is {}"),
        suits=_refuse_eviction,
        identity=True,
        made=True,
    )
    bits: tuple[int | str, ...] | None = setting(
        None,
        "balanced: bits of cached numbers, of 16, 8, fp8 and 4, by commas; else 16 alone.",
        check=_refuse_unknown_bits,
        suits=_refuse_bits,
        identity=True,
        made=True,
    )
    verify: bool = setting(
        True, "Try the plan on trials and texts; give back heads that fail, or widen budgets."
    )
    drop: float = setting(
        0.01,
        "Greatest share of answers that may be lost against dense.",
        check=within(lambda x: 0 <= x < 1, "drop is {}: give 0 or more, and less than 1"),
        proof=True,
    )
    # A twentieth of what the far context is worth to the least of the key tokens, or a tenth of the
    # probability of the right token.
    nats: float = setting(
        0.1,
        "Greatest mean loss on tokens that need the far context.",
        check=within(
            lambda x: 0 <= x < inf, "nats is {}: give 0 or more, what a key token may lose"
        ),
        proof=True,
    )
    verify_samples: int = setting(
        12,
        "Trials at each length that tell what is lost, and, in profile, as many that choose.",
        check=within(
            lambda count: count >= 1, "verify_samples is {}: give 1 or more, or no verification"
        ),
        proof=True,
        min=1,
    )
    proxy: str | None = setting(
        None,
        "duo: rank heads by copy, mass or error instead of training gates.",
        check=one_of(_proxies, "no proxy {}: there is {}"),
        suits=_refuse_proxy,
    )
    recipe: str | None = setting(None, recipe=False, made=True)
    curves: str | Path | None = setting(
        None,
        "Draw recall by density, and loss by budget.",
        suits=_refuse_curves,
        recipe=False,
        metavar="FILE.png",
    )
    beyond_window: bool = setting(
        False,
        "Go beyond the length that the model is made for.",
        proof=True,
        flags=("--beyond-window",),
    )
    progress: bool = setting(False, recipe=False, proof=True)

    def __post_init__(self) -> None:
        given = {each.name: each.metadata for each in fields(self)}
        given = {name: about for name, about in given.items() if getattr(self, name) is not None}
        problems = chain(
            (
                each["check"](name, getattr(self, name))
                for name, each in given.items()
                if each["check"]
            ),
            (each["suits"](self) for each in given.values() if each["suits"]),
        )
        if problem := next(filter(None, problems), None):
            raise UsageError(problem)

    def methods(self, between: str) -> str:
        """The names of the methods that choose."""
        return between.join(name for name in (self.prefill_method, self.method) if name)

    @property
    def one_pass(self) -> bool:
        """Whether one method chooses, and measures candidates on every head."""
        return self.prefill_method is None and METHODS[self.method].one_pass

    @property
    def identity(self) -> dict[str, Any]:
        """What measurements depend on. Defaults are left out, so that runs which were begun before
        a setting existed go on."""
        changed = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.metadata["identity"] and getattr(self, each.name) != each.default
        }
        changed.pop("prefill_method", None)
        return changed | {"method": self.methods(" and ")}

    @property
    def provenance(self) -> dict[str, Any]:
        """What a plan says under `made`."""
        found = {name: getattr(self, name) for name in self.names("made")}
        found = {x: [*value] if type(value) is tuple else value for x, value in found.items()}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def names(cls, about: str) -> list[str]:
        """The settings that have this: an argument of `setting`."""
        return [each.name for each in fields(cls) if each.metadata[about]]


P, S, A, B, R = ParamSpec("P"), TypeVar("S"), TypeVar("A"), TypeVar("B"), TypeVar("R")


class WithKeywords(Protocol[P, S]):
    """A decorator of functions whose last argument is settings."""

    @overload
    def __call__(self, work: Callable[[A, Any, S], R]) -> Callable[Concatenate[A, Any, P], R]: ...

    @overload
    def __call__(
        self, work: Callable[[A, B, Any, S], R]
    ) -> Callable[Concatenate[A, B, Any, P], R]: ...


def with_keywords(settings: Callable[P, S], part: str | None = None) -> WithKeywords[P, S]:
    """Let a function whose last argument is settings take these as keywords.

    `part`: of them, those that have this argument of `setting`; the others stay at their defaults.
    """

    def decorate(work):
        own = signature(work)
        *first, _ = own.parameters.values()
        keywords = [
            Parameter(each.name, Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
            for each in fields(settings)
            if part is None or each.metadata[part]
        ]
        shown = Signature([*first, *keywords], return_annotation=own.return_annotation)

        @wraps(work)
        def call(*args, **given):
            given = shown.bind(*args, **given).arguments
            return work(*(given.pop(each.name) for each in first), settings(**given))

        call.__signature__ = shown
        return call

    return decorate
