"""Random conversations, each held twice: by a patched model and by the dense oracle.

Caches keep all bits or fewer, on the device or in host memory, for which a host without a GPU does,
or what evictions leave. Room that holds nothing yet holds NaN.

A third of the seeds are held in a run, another one as the code changes. A failure prints its seed
and every step. To replay one, from the repository's root:
`python -c "from tests.patcher.test_soak import hold; hold(17)"`.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache

import hfsparse
from hfsparse.errors import CacheError
from hfsparse.lists import PAGE
from hfsparse.models.layers import layer_shapes
from hfsparse.plan import Below
from hfsparse.plan.kept import Full
from hfsparse.runtime.cache import host
from hfsparse.runtime.cache.ring import SLACK
from tests.helpers import poisoned
from tests.patcher import oracle as oracles
from tests.patcher.families import fresh, left_padded, plan_of, tiny, tokens
from tests.patcher.oracle import oracle
from tests.patcher.runs import CLOSE, close, continue_with, forward, generate, same_generation
from tests.turns import turn

SEEDS, BATCH, STEPS, ROWS = 210, 30, 4, 4
EVICTING = "snap", "h2o", "alisa", "adore"
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "mistral-window", "gemma3")
VERSION = Version(transformers.__version__)
CHUNKS, LATER_CHUNKS = Version("5.17"), Version("5.24")  # before, unpatched models fail too

patched = cache(fresh)  # a second model of each family for patches: `tiny` ones are the oracle's
pytestmark = pytest.mark.slow


def random_plan(rng, model):
    Hq, Hkv = model.config.num_attention_heads, model.config.num_key_value_heads
    rate = rng.choice([0, 0.125, 0.25, 0.5, 1])
    stream = dict(sink=rng.randint(0, 9), recent=rng.randint(1, 60))
    grow = dict(sink=rng.randint(0, 3), recent=rng.randint(1, 9), recent_per_token=rate)
    patterns = dict(
        stream=("streaming", stream),
        grow=("streaming", grow),
        vs=("vertical_slash", dict(columns=rng.randint(1, 50), diagonals=rng.randint(1, 120))),
        blocks=("block_topk", dict(share=rng.uniform(0.05, 0.6), min_blocks=rng.randint(1, 3))),
        quest=("quest", dict(share=rng.uniform(0.05, 0.6), min_pages=2)),
        snap=("snapkv", dict(size=rng.randint(10, 80), window=rng.randint(1, 9), pool=3)),
    )
    for kind in EVICTING[1:]:
        patterns[kind] = kind, dict(size=rng.randint(10, 80), window=rng.randint(1, 9))
    evicts = EVICTING if rng.random() < 0.5 else ["full"]

    def layer(index, windowed):
        prefill, kept, decode = [], [], []
        for _ in range(Hkv):
            any_word = rng.choice(["full", rng.choice(evicts), "stream", "grow"])
            word = "full" if windowed else any_word
            ring = word in ("stream", "grow")
            free = ["full", "stream", "grow", *([] if windowed else ["vs", "blocks"])]
            prefill += [word if ring else rng.choice(free) for _ in range(Hq // Hkv)]
            kept.append(word)
            fits = "full" if windowed else rng.choice(["full", "quest"])
            decode.append("ring" if ring else "kept" if word in EVICTING else fits)
        return prefill, kept, decode

    below = [rng.choice([0, 0, rng.randint(1, 250)]) for _ in range(3)]
    plan = plan_of(model, layer, below, **patterns)
    later = any("kept" in layer.decode for layer in plan.layers[1:])
    packs = layer_shapes(model)[0].window is None and not later and rng.random() < 0.4
    plan = pack(plan, rng.choice([8, 4, "fp8"])) if packs else plan
    hosts = rng.random() < (0.8 if packs else 0.4)
    return in_host_memory(plan, rng.uniform(0.6, 1)) if hosts else plan


def pack(plan, bits):
    """Layer 0 keeps so many bits, but of what evicts; by the oracle's rounding keys of later ones
    could take another step, and evictions choose others."""
    first, patterns = plan.layers[0], {"packed": Full(bits)}
    for name in ("stream", "grow"):
        patterns[f"{name}_packed"] = replace(plan.patterns[name], bits=bits)
    named = {"full": "packed", **{word: word for word in EVICTING}}
    words = [named.get(word, f"{word}_packed") for word in first.cache]
    layers = replace(first, cache=tuple(words)), *plan.layers[1:]
    return replace(plan, patterns={**plan.patterns, **patterns}, layers=layers)


def in_host_memory(plan, hot):
    """Full caches of which steps choose lie in host memory, in the bits that they have."""
    patterns, layers = {**plan.patterns}, []
    for own in plan.layers:
        words = []
        for word, read in zip(own.cache, own.decode, strict=True):
            if read == "quest":
                bits = 16 if word == "full" else plan.patterns[word].bits
                word = f"{word}_hosted"
                patterns[word] = Full(bits, host=True, hot=hot)
            words.append(word)
        layers.append(replace(own, cache=tuple(words)))
    return replace(plan, patterns=patterns, layers=tuple(layers))


def for_parts(plan, lengths):
    """The plan with thresholds that say of each part of a prompt what they say of the whole.

    None where they say different things of rows of these lengths.
    """
    below = plan.below
    short = [{n < limit for n in lengths} for limit in (below.prefill, below.cache)]
    if max(map(len, short)) > 1:
        return None
    prefill, kept = (9999 if True in sides else 0 for sides in short)
    return replace(plan, below=Below(prefill, below.decode, kept))


@dataclass
class State:
    """Where a conversation stands."""

    ids: torch.Tensor
    mask: torch.Tensor
    ours: Any = None  # the patched model's cache
    dense: Any = field(default_factory=DynamicCache)  # the oracle's
    held: int = 0  # columns in both
    furthest: int = 0  # the most there have been
    left: dict = field(default_factory=dict)  # what evictions left the oracle, as it has it

    def pick(self, rows):
        self.ids, self.mask, old = self.ids[rows], self.mask[rows], self.left
        heads = {(layer, head) for layer, _, head in old}
        self.left = {
            (layer, b, head): old[layer, row, head]
            for layer, head in heads
            for b, row in enumerate(torch.as_tensor(rows).tolist())
            if (layer, row, head) in old
        }


class Conversation:
    """Steps taken by a patched model and by the oracle, compared after each."""

    def __init__(self, rng, family, done, log):
        self.rng, self.family, self.done, self.log = rng, family, done, log
        self.dense, self.patched = tiny(family), patched(family)
        self.at = None

    def __enter__(self):
        self.patch()
        return self

    def __exit__(self, *error):
        self.handle.undo()

    def say(self, what, *details):
        self.done[what] += 1
        self.log.append(" ".join(map(str, (self.family, what, *details))))

    def patch(self):
        self.plan = random_plan(self.rng, self.patched)
        words = {word for layer in self.plan.layers for word in layer.cache} - {"full"}
        kept = [self.plan.patterns[word] for word in words]
        self.done["fewer bits"] += any(getattr(each, "bits", 16) != 16 for each in kept)
        hosted = [each for each in kept if getattr(each, "host", False)]
        self.done["host memory"] += bool(hosted)
        self.done["fewer bits there"] += any(each.bits != 16 for each in hosted)
        self.done["evictions"] += len(words & {*EVICTING})
        self.handle = hfsparse.patch(self.patched, self.plan)
        self.say("patch", self.plan.dumps())

    def step(self):
        if self.at is None:
            return self.prompt()
        acts = (self.crop, self.repeat, self.select, self.reorder, self.branch, self.patch_anew)
        return self.rng.choice([*acts, self.crop, self.turn])()

    def prompt(self):
        rng = self.rng
        length = rng.choice([rng.randint(1, 40), rng.randint(41, 160), rng.randint(161, 260)])
        pads = [0, *(rng.randint(0, length - 1) for _ in range(rng.randint(0, 2)))]
        self.say("prompt", length, pads)
        self.begin(*left_padded(length, pads, seed=rng.randrange(1000)))

    def begin(self, ids, mask):
        """A new conversation with this prompt."""
        self.at = State(ids, mask)
        self.turn(new=0)

    def turn(self, new=None):
        """`new` more tokens, by one of the ways in."""
        rng, at = self.rng, self.at
        if new is None:
            new = rng.choice([1, rng.randint(2, 16), rng.randint(17, 60)])
        ids = torch.cat([at.ids, tokens(len(at.ids), new, seed=rng.randrange(1000))], 1)
        mask = continue_with(at.ids, at.mask, new)
        rng.choice([self.forward, self.generate, self.chunks])(ids, mask)

    @property
    def most(self) -> float:
        """How far logits may be apart: what is rounded to bits may be rounded the other way."""
        packs = any(getattr(pattern, "bits", 16) != 16 for pattern in self.plan.patterns.values())
        return 1e-2 if packs else CLOSE

    def forward(self, ids, mask):
        held = self.at.held
        given = None if mask.all() and self.rng.random() < 0.5 else mask
        self.say("forward", ids.shape[1] - held, "tokens")
        got, want = self.both(lambda m, past: forward(m, ids[:, held:], given, past))
        close(got.logits, want.logits, mask[:, held:], self.most)
        self.go_on(ids, mask, ids.shape[1], got, want)

    def generate(self, ids, mask):
        more = dict(new=self.rng.randint(1, 4), do_sample=self.rng.random() < 0.5)
        self.say("sample" if more["do_sample"] else "greedy", ids.shape[1] - self.at.held, more)
        self.generated(ids, mask, self.plan, more)

    def chunks(self, ids, mask):
        """The prompt alone: of a later call the oracle couldn't tell whether it is a chunk."""
        plan = for_parts(self.plan, mask.sum(1).tolist())
        since = LATER_CHUNKS if self.at.held else CHUNKS
        if plan is None or since > VERSION:
            return self.forward(ids, mask)
        new = ids.shape[1] - self.at.held
        more = dict(new=1, prefill_chunk_size=max(self.rng.randint(1, 70), new // 3))
        self.say("chunks", new, more)
        with mock.patch.object(oracles, "DECODE", 0):
            return self.generated(ids, mask, plan, more)

    def generated(self, ids, mask, plan, more):
        got, want = self.both(lambda m, past: generate(m, ids, mask, past, **more), plan)
        same_generation(got, want, self.most)
        longer = continue_with(ids, mask, got.sequences.shape[1] - ids.shape[1])
        self.go_on(got.sequences, longer, longer.shape[1] - 1, got, want)

    def both(self, run, plan=None):
        """What run(model, its cache) gives: our answer and the oracle's."""
        more = {"left": self.at.left, "least": self.plan.below.cache}
        with oracle(self.dense, plan or self.plan, **more) as truth:
            want = run(self.dense, self.at.dense)
        for kept, everything in ((truth.pairs, truth.causal), (truth.reads, truth.total)):
            self.done["keys read"] += sum(kept.values())
            self.done["keys seen"] += sum(everything.values())
        return run(self.patched, self.at.ours), want

    def go_on(self, ids, mask, held, got, want):
        assert got.past_key_values.get_seq_length() == held
        furthest, caches = max(held, self.at.furthest), (got.past_key_values, want.past_key_values)
        self.at = State(ids, mask, *caches, held, furthest, self.at.left)

    def crop(self):
        at, rng = self.at, self.rng
        few = rng.randint(1, rng.choice([SLACK // 2, SLACK, 120]))
        drop = min(rng.choice([few, few, few, few, at.held - rng.randint(1, 5)]), at.held - 1)
        if "packed" in self.plan.patterns:  # what was packed alone comes back otherwise
            drop = min(drop, PAGE - (at.furthest - at.held))
        if drop < 1:
            return self.turn()
        try:
            at.ours.crop(-drop)
        except CacheError:
            self.say("refused crop", drop)
            assert at.furthest - (at.held - drop) > SLACK or at.left
            return self.after_refused_crop()
        self.say("crop", drop)
        at.dense.crop(-drop)
        at.held -= drop
        at.ids, at.mask = at.ids[:, : at.held], at.mask[:, : at.held]
        return self.turn()

    def after_refused_crop(self):
        """The cache is whole and right, or refused as well."""
        at = self.at
        try:
            self.turn()
        except ValueError as error:
            if not re.search("this cache is broken|attention_mask covers", str(error)):
                raise
            self.say("broken")
            self.begin(at.ids, at.mask)

    def repeat(self):
        at = self.at
        if len(at.ids) * 2 > ROWS:
            return self.turn()
        self.say("repeat")
        for held in (at.ours, at.dense):
            held.batch_repeat_interleave(2)
        at.pick(torch.arange(len(at.ids)).repeat_interleave(2))
        self.turn()

    def select(self):
        rows = range(len(self.at.ids))
        self.pick("select", sorted(self.rng.sample(rows, self.rng.randint(1, len(rows)))))

    def reorder(self):
        rows = range(len(self.at.ids))
        self.pick("reorder", self.rng.choices(rows, k=len(rows)))

    def pick(self, what, rows):
        self.say(what, rows)
        for held in (self.at.ours, self.at.dense):
            method = held.batch_select_indices if what == "select" else held.reorder_cache
            method(torch.tensor(rows))
        self.at.pick(rows)
        self.turn()

    def branch(self):
        """A turn on the original and one on a copy, and back to the first."""
        self.say("branch")
        ends = []
        for at in self.rng.sample([self.at, deepcopy(self.at)], 2):
            self.at = at
            self.turn()
            ends.append(self.at)
        self.at = ends[0]
        self.turn()

    def patch_anew(self):
        """After undo, and under the next patch, the old cache is refused."""
        self.say("undo")
        at = self.at
        self.handle.undo()
        if self.rng.random() < 0.5:
            self.refused()
        self.patch()
        self.refused()
        self.begin(at.ids, at.mask)

    def refused(self):
        at = self.at
        ids, mask = tokens(len(at.ids), 1), continue_with(at.ids, at.mask[:, : at.held], 1)
        with pytest.raises(CacheError, match=r"filled under an hfsparse patch.*no longer"):
            forward(self.patched, ids, mask, deepcopy(at.ours))


def hold(seed):
    """One conversation, or two of two models under two plans, by turns; how often it did what."""
    rng, done, log = random.Random(seed), Counter(), []
    try:
        with ExitStack() as patches:
            patches.enter_context(poisoned())
            patches.enter_context(mock.patch.object(host, "why_not", return_value=None))
            talks = [
                patches.enter_context(Conversation(rng, family, done, log))
                for family in rng.sample(FAMILIES, rng.choice([1, 1, 2]))
            ]
            for _ in range(STEPS):
                rng.choice(talks).step()
    except BaseException:
        print(f"seed {seed}", *log, sep="\n")
        raise
    return done


@pytest.mark.parametrize("first", range(BATCH * turn(3, "patcher"), SEEDS, 3 * BATCH))
def test_random_conversations_equal_the_oracle(first):
    """And they do everything there is, most of them with keys really dropped."""
    held = [hold(seed) for seed in range(first, first + BATCH)]
    assert sum(done["keys read"] < 0.9 * done["keys seen"] for done in held) > 0.6 * BATCH
    total = sum(held, Counter())
    wanted = {"prompt", "forward", "greedy", "sample", "branch", "undo", "crop", "refused crop"}
    wanted |= {"repeat", "select", "reorder", "evictions"}
    wanted |= {"fewer bits", "host memory", "fewer bits there"}
    wanted |= {"chunks"} if VERSION >= CHUNKS else set()
    assert wanted <= {*total}, total
