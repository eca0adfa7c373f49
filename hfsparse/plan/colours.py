"""How the head map shows a word: hue and mark tell its kind, lightness the share that it keeps.

Lightness is CIE L*, which depends on luminance alone, so it is the same in grey. Words of one kind
differ by STEP. The hues are Okabe and Ito's; where colour-blind eyes, or a grey print, can't tell
two kinds apart, their marks do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hfsparse.lists import Grid
from hfsparse.lists.packed import width_of
from hfsparse.patterns import PATTERNS
from hfsparse.plan.parts import kinds

FULL, RING, KEPT = "full", "ring", "kept"
HUES = {
    FULL: "#808080",
    "streaming": "#56B4E9",
    "vertical_slash": "#E69F00",
    "block_topk": "#009E73",
    "antidiagonal": "#CC79A7",
    "quest": "#D55E00",
    "reuse": "#F0E442",
}
MARKS = {  # matplotlib's; cells of the others are plain
    "vertical_slash": "|",
    "block_topk": "s",
    "antidiagonal": [(-1, -1), (1, 1)],
    "quest": "o",
    "reuse": "^",
}
OTHERS = [("#882255", "x"), ("#999933", "D"), ("#44AA99", "+"), ("#332288", "v"), ("#0072B2", "*")]
OTHERS += [("#CC6677", "<"), ("#117733", "P"), ("#AA4499", "h")]
FULLEST, DARKEST, LIGHTEST = 18, 34, 93  # L* of full; of words that keep nearly all, nearly none
STEP = 7


@dataclass(frozen=True)
class Look:
    """How a word is drawn: sRGB in 0 to 1 and its L*, and a marker in an ink that shows on it."""

    colour: tuple[float, float, float]
    lightness: float
    mark: Any
    ink: str


def looks(shares: dict[str, dict[str, float]]) -> dict[str, Look]:
    """A look for each word, from the share that it keeps, by kind and word."""
    made = {}
    for kind, words in shares.items():
        kept = list(words.values())
        shades = [FULLEST, *_lightnesses(kept[1:])] if kind == FULL else _lightnesses(kept)
        for word, lightness in zip(words, shades, strict=True):
            ink = "black" if lightness > 60 else "white"
            made[word] = Look(_shade(hue_of(kind), lightness), lightness, _mark_of(kind), ink)
    return made


def hue_of(kind: str) -> str:
    """The colour that a kind has in the terminal, and that its shades are made of."""
    return HUES[kind] if kind in HUES else _other(kind)[0]


def _mark_of(kind: str) -> Any:
    return MARKS.get(kind) if kind in HUES else _other(kind)[1]


def _other(kind: str) -> tuple[str, str]:
    """Hue and mark of a kind that has none above."""
    new = [each for each in kinds() if each not in HUES]
    return OTHERS[new.index(kind) % len(OTHERS)]


def share_kept(pattern: Any, length: int) -> float:
    """The share of a prompt's pairs that a pattern keeps of random q and k; a selector's `share`;
    of a full cache the share of its bits, or that a GPU holds.

    It only orders words: what a plan keeps of real prompts is in its `expected`.
    """
    if pattern.kind == FULL:
        return width_of(pattern.bits) / 16 * (pattern.hot if pattern.host else 1)
    if pattern.kind not in PATTERNS:
        return getattr(pattern, "share", 0.0)
    drawn = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, length, 16, generator=drawn) for _ in range(2))
    grid = Grid.causal(1, length, block=128)
    return (pattern.lists(q, k, grid, 0.25).pairs().sum() / grid.pairs().sum()).item()


def _lightnesses(shares: list[float]) -> list[float]:
    """L* of the words of one kind: the more one keeps the darker, no two closer than STEP."""
    most = len(shares) - 1
    step = min(STEP, (LIGHTEST - DARKEST) / max(most, 1))
    darker, found = DARKEST - step, [0.0] * len(shares)
    for place, i in enumerate(sorted(range(len(shares)), key=lambda i: -shares[i])):
        wanted = LIGHTEST - (LIGHTEST - DARKEST) * shares[i] ** 0.5
        room = LIGHTEST - step * (most - place)  # for those that keep less
        darker = found[i] = min(max(wanted, darker + step), room)
    return found


def _shade(hue: str, lightness: float) -> tuple[float, float, float]:
    """A colour of this hue and L*: mixed with white or with black in linear light."""
    base = [int(hue[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    base = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in base]
    have = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), base, strict=True))
    want = ((lightness + 16) / 116) ** 3
    white = max(0.0, (want - have) / (1 - have))
    mixed = [min(want / have, 1) * c + white * (1 - c) for c in base]
    r, g, b = (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in mixed)
    return r, g, b
