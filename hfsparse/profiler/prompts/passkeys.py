"""Texts with passkeys hidden in them, and their answers (DuoAttention, arXiv 2410.10819).

    keys = hide(tokenizer, text, Random(0)); model(keys.ids)

Each passkey is a sequence of words drawn at random. What is copied from where is known by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from torch import Tensor

from hfsparse.errors import UsageError
from hfsparse.profiler.prompts.calibration import encode, frame, to_ids

WORDS = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar "
    "papa quebec romeo sierra tango uniform victor whiskey xray yankee zulu"
).split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
LONG = 32  # words of a passkey, in texts long enough: one for each 32 tokens of text
PER_KEY = 512  # tokens of text for each passkey, up to ten passkeys
DEPTHS = 20  # places between a tenth and nine tenths of the text, of which each passkey takes one

TASK = "Read the text below. Passkeys to a vault are hidden in it.\n\n"
QUESTION = "\n\nWhat are the passkeys to the vault, in order?"


@dataclass(frozen=True)
class Passkeys:
    """A text with its question and answers: `ids` is `[1, L]`."""

    ids: Tensor
    rows: list[int]  # that predict the passkeys' tokens in the answers
    sources: list[int]  # where in the text is the token that each row predicts


def hide(tokenizer, text: list[int], rng: Random) -> Passkeys:
    """As many tokens as `text` has, which loses its start; UsageError if it is too short."""
    count, words = min(10, max(1, len(text) // PER_KEY)), min(LONG, max(1, len(text) // LONG))
    most = len(text) // (6 * count)  # tokens of a passkey: some tokenizers spell words out
    keys = [" " + " ".join(rng.choices(WORDS, k=words)) for _ in range(count)]
    keys = [encode(tokenizer, key)[:most] for key in keys]
    hidden, asked = (
        [encode(tokenizer, line.format(name)) for name in ORDINALS[:count]]
        for line in ("\n\nRemember this: the {} passkey to the vault is", "The {} passkey is")
    )
    end, (head, tail) = encode(tokenizer, "\n\n"), frame(tokenizer, TASK, QUESTION)
    extra = sum(map(len, (*hidden, *asked))) + 2 * sum(map(len, keys)) + 2 * count * len(end)
    room = len(text) - len(head) - len(tail) - extra
    if room < len(text) // 4:
        raise UsageError(
            f"a text of {len(text)} tokens is too short to hide passkeys in: they, their question "
            f"and the answers take {len(text) - room}; give longer --lengths"
        )
    body, tokens, done, sources = text[-room:], [*head], 0, []
    depths = sorted(rng.sample(range(DEPTHS), count))
    for depth, said, key in zip(depths, hidden, keys, strict=True):
        place = int(room * (0.1 + 0.8 * depth / (DEPTHS - 1)))
        tokens += [*body[done:place], *said]
        sources += range(len(tokens), len(tokens) + len(key))
        tokens += [*key, *end]
        done = place
    tokens += [*body[done:], *tail]
    rows = []
    for said, key in zip(asked, keys, strict=True):
        tokens += said
        rows += range(len(tokens) - 1, len(tokens) - 1 + len(key))
        tokens += [*key, *end]
    return Passkeys(to_ids(tokens), rows, sources)
