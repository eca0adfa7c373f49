"""The cache layer against plain lists of each row's tokens, through any sequence of calls."""

from contextlib import ExitStack
from copy import deepcopy
from itertools import product
from unittest import mock

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.nn.functional import pad

from hfsparse.errors import CacheError
from hfsparse.evictions.adore import Adore
from hfsparse.evictions.alisa import Alisa
from hfsparse.evictions.h2o import H2O
from hfsparse.evictions.snapkv import SnapKV
from hfsparse.kernels.fetch import fetch
from hfsparse.lists import FULL, PAGE, Band, BlockLists, Grid
from hfsparse.lists.lengths import Lengths
from hfsparse.lists.packed import pack, unpack
from hfsparse.lists.places import EXTREMES
from hfsparse.patterns.streaming import Streaming
from hfsparse.runtime.cache import host
from hfsparse.runtime.cache.evicting import Evicting
from hfsparse.runtime.cache.full import Full
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.cache.host import HostFull, HostPacked
from hfsparse.runtime.cache.layer import CacheLayer
from hfsparse.runtime.cache.packed import PackedFull, PackedRing
from hfsparse.runtime.cache.ring import SLACK, Ring
from hfsparse.runtime.call import enter, leave
from hfsparse.runtime.decode import STEP
from hfsparse.selectors import segment_of, tokens_built
from hfsparse.selectors.centroids import Centroids
from hfsparse.selectors.channels import Channels
from hfsparse.selectors.quest import Quest
from tests.helpers import poison_of, poisoned
from tests.patterns.matrix import weights

HEADS, DIM = 6, 4
LABELS, PAGES = (  # of units of 16 tokens, and of pages
    Channels(0.3, 2, channels=2, unit=unit).bind(0, (1, 5), weights(1, HEADS, DIM))
    for unit in (16, PAGE)
)
CLUSTERS = Centroids(clusters=2, segment=256)
FULLS = (Group((0, 2, 4), FULL, Quest()), Group((1, 5), FULL, LABELS), Group((3,), FULL, CLUSTERS))
SINKS = (  # however long their rows, these can go back to their first three tokens
    Group((0, 5), Band(3, 10)),
    Group((1, 3), FULL, Quest()),
    Group((2,), Streaming(5, 6, 0.25).band),
    Group((4,), FULL),
)
KEPT = (
    Group((0, 4), eviction=SnapKV(20, 6, 3)),
    Group((1,), eviction=H2O(33, 9)),
    Group((2, 3, 5), eviction=SnapKV(9, 8)),
)
MIXED = (Group((0,), Band(3, 10)), *SINKS[1:], Group((5,), Band(0, 40)))
PACKED = (
    Group((0, 4), FULL, Quest(), bits=4),
    Group((1, 5), FULL, LABELS, bits=8),
    Group((2,), Streaming(5, 6, 0.25).band, bits="fp8"),
    Group((3,), Band(3, 10), bits=4),
)
OTHERS = (
    Group((0, 4), FULL, bits="fp8"),
    Group((1, 5), FULL, PAGES, bits=4),
    Group((2,), Streaming(5, 6, 0.25).band, bits=8),
    Group((3,), Band(3, 10), bits="fp8"),
)
HOSTED = (
    Group((0,), FULL, Quest(0.3, 2), hot=0.4),
    Group((1, 5), FULL, LABELS, hot=0.3),
    Group((2,), FULL, Quest(0.3, 2), bits=4, hot=0.3),
    Group((3,), FULL, Quest(0.3, 2, bound=16), bits=8, hot=0.3),
    Group((4,), FULL, Quest(0.3, 2, refresh=3), bits="fp8", hot=0.3),
)
TOGETHER = (  # every kind of store
    Group((0,), eviction=Alisa(30, 7)),
    Group((1,), FULL, Quest(0.3, 2), bits=4, hot=0.4),
    Group((2,), eviction=Adore(25, 5)),
    Group((3,), FULL, Quest(), bits=8),
    Group((4,), Band(3, 10), bits=4),
    Group((5,), Streaming(5, 6, 0.25).band),
)
LAYERS = FULLS, SINKS, MIXED, KEPT, PACKED, OTHERS, HOSTED, HOSTED, TOGETHER
WHOLE, PACKS = (Full, PackedFull, HostFull, HostPacked), (PackedFull, PackedRing, HostPacked)


def window(band: Band, position: int) -> list[int]:
    """Positions read by a query, from the definition."""
    recent = position + 1 - band.recent - position * band.rate // 65536
    return [*range(min(band.sink, position + 1)), *range(max(recent, band.sink), position + 1)]


def needed(ring: Ring, length: int) -> set[int]:
    """Positions that the next query of a row reads beside its own."""
    short = length + 1 < ring.below
    return {*range(length)} if short else {*window(ring.band, length)} - {length}


def front(t, new: list[int]):
    """Padded rows moved to column 0, NaN behind them."""
    out = torch.full_like(t, torch.nan)
    for b, n in enumerate(new):
        out[b, :, :n] = t[b, :, t.shape[2] - n :]
    return out


def packed(t, bits):
    """Whole pages `[2, heads, n, DIM]` of keys and values, packed and unpacked again."""
    k, v = t.unflatten(2, (-1, PAGE))
    ends = [k.amin(2, keepdim=True), k.amax(2, keepdim=True)]
    k = unpack(pack(k, *ends, bits), *ends, bits)
    ends = [v.amin(3, keepdim=True), v.amax(3, keepdim=True)]
    v = unpack(pack(v, *ends, bits), *ends, bits)
    return torch.stack([k, v]).flatten(2, 3)


class CacheMachine(RuleBasedStateMachine):
    """`rows[b]` lists all tokens of row b; `made[token]` is a token's key and value.

    A host without a GPU stands for both memories. Room that holds nothing yet holds NaN.
    """

    def __init__(self):
        super().__init__()
        self.around = ExitStack()
        self.around.enter_context(mock.patch.object(host, "why_not", return_value=None))
        self.around.enter_context(poisoned())

    def teardown(self):
        self.around.close()

    @initialize(
        groups=st.sampled_from(LAYERS),
        below=st.sampled_from([0, 60, 150]),
        reserve=st.sampled_from([0, 200]),
        expected=st.sampled_from([0, 100]),
        pads=st.lists(st.integers(0, 30), min_size=1, max_size=3),
        seed=st.integers(0, 1000),
    )
    def start(self, groups, below, reserve, expected, pads, seed):
        self.layer = CacheLayer("plan", groups, below, reserve, expected)
        self.random = torch.Generator().manual_seed(seed)
        self.made = torch.zeros(0, 2, HEADS, DIM)
        self.starts = [n - min(pads) for n in pads]  # each row's first real column
        self.rows = [[] for _ in pads]
        self.seen = self.furthest = 0  # columns; the most there have been
        self.expected = expected
        # Of each store that evicts, by row: what each head holds, and the row's length when it lost
        # the last.
        self.left = [[([[]] * len(g.heads), 0) for _ in pads] for g in groups if g.eviction]
        # Of each store that packs, by row: keys and values [2, heads, n, DIM] as they came, or were
        # begun anew; and the first page that is held so, too.
        new = torch.zeros(2, HEADS, 0, DIM)
        self.known = [[(new[:, list(g.heads)], 0) for _ in pads] for g in groups if g.bits != 16]

    def stores(self, *kinds):
        """The layer's stores of some kinds, once it has any."""
        return [s for s in self.layer.stores if type(s) in kinds and self.layer.is_initialized]

    def content(self, row, positions, heads):
        """Keys and values `[2, heads, n, DIM]` of some positions of a row."""
        tokens = [self.rows[row][p] for p in positions]
        return self.made[tokens][:, :, list(heads)].permute(1, 2, 0, 3)

    def known_by(self, store):
        return self.known[[s for s in self.layer.stores if s.group.bits != 16].index(store)]

    def read_of(self, store, row, n):
        """Keys and values `[2, heads, n, DIM]` of a row's first n tokens, as a store holds them."""
        if store.group.bits == 16:
            return self.content(row, range(n), store.group.heads)
        known = self.known_by(store)[row][0][:, :, :n]
        whole = n // PAGE * PAGE
        return torch.cat([packed(known[:, :, :whole], store.group.bits), known[:, :, whole:]], 2)

    def lengths(self):
        return [len(row) for row in self.rows]

    # -- what callers do -------------------------------------------------------------------------

    @rule(columns=st.integers(1, STEP))
    def step(self, columns):
        self.append(columns)

    @rule(columns=st.integers(1, 130))
    def chunk(self, columns):
        self.append(columns)

    def append(self, columns):
        """As the attention function does it: row-relative, then into every store."""
        B, past = len(self.rows), self.lengths()
        tokens = torch.arange(B * columns).view(B, columns) + len(self.made)
        shape = (B * columns, 2, HEADS, DIM)
        self.made = torch.cat([self.made, torch.randn(shape, generator=self.random)])
        k, v = self.made[tokens].permute(2, 0, 3, 1, 4)
        starts = [min(start, self.seen + columns) for start in self.starts]
        new = [columns - max(start - self.seen, 0) for start in starts]
        self.seen += columns
        self.furthest = max(self.furthest, self.seen)
        for row, own, n in zip(self.rows, tokens.tolist(), new, strict=True):
            row += own[columns - n :]

        enter("plan")
        assert all(a is b for a, b in zip(self.layer.update(k, v), (k, v), strict=True))
        leave("plan")
        before = self.layer.seen - columns
        lengths = Lengths.of(starts if any(starts) else None, before, columns, B)
        assert (lengths.past, lengths.new) == (past, new)
        self.layer.advance(lengths)
        k, v = (front(t, new) for t in (k, v))
        for store in self.layer.stores:
            heads = list(store.group.heads)
            given = k[:, heads], v[:, heads], lengths
            if isinstance(store, Evicting):
                self.evict(store, *given)
                continue
            if store.joins and any(past):
                self.check_chunk(store, *given)
            store.append(*given)
            if store.group.bits != 16:
                self.know(store, past)
        self.layer.stored = self.layer.seen

        for ring in self.stores(Ring, PackedRing):
            if columns <= STEP:
                self.check_step(ring, past)
            self.check_size(ring)
        for store in self.stores(HostFull, HostPacked):
            self.check_hot(store, min(columns, STEP))
        self.check_summaries(past)

    def know(self, store, past):
        """A store that packs has new tokens, and the newest two pages as they came."""
        known = self.known_by(store)
        for b, (p, row) in enumerate(zip(past, self.rows, strict=True)):
            new = self.content(b, range(p, len(row)), store.group.heads)
            exact = max(known[b][1], len(row) // PAGE - 1)
            known[b] = torch.cat([known[b][0], new], 2), exact

    def evict(self, store, k, v, lengths):
        """A chunk finds what is held, and itself; the newest and as many as may be stay."""
        left, eviction, heads = self.left_in(store), store.group.eviction, list(store.group.heads)
        q = torch.randn(len(k), 2 * len(heads), lengths.columns, DIM, generator=self.random)
        q = front(q.transpose(1, 2).flatten(2).unflatten(2, (-1, DIM)).transpose(1, 2), lengths.new)
        step = lengths.columns <= STEP and lengths.behind
        found = [
            [[*held, *self.rows[b][p:n]] for held in left[b][0]]
            for b, (p, n) in enumerate(zip(lengths.past, lengths.rows, strict=True))
        ]
        if step:
            store.append(k, v, lengths)
            if eviction.adds_up:
                store.observe(q, lengths, scale=1.0)
        else:
            plain = Grid(torch.tensor(lengths.new), torch.tensor(lengths.rows), k.shape[2], 0, 16)
            *read, grid = store.with_chunk(k, v, lengths, plain)
            for b, live in enumerate(grid.key_pos[:, : grid.Sk] >= 0):
                ours = torch.stack([t[b, :, live] for t in read], 2)
                wanted = [self.made[held][:, :, h] for h, held in zip(heads, found[b], strict=True)]
                assert all(map(torch.equal, ours, wanted))
            store.take(k, v, lengths, q, scale=1.0)
        for b, n in enumerate(lengths.rows):
            size = len(found[b][0])
            evicts = n >= store.least and (not step or eviction.adds_up) and size > eviction.size
            least = min(eviction.window, eviction.size) if evicts else size
            now = self.held_by(store, b)
            for held, could in zip(now, found[b], strict=True):
                assert len(held) == (eviction.size if evicts else size)
                assert held == [token for token in could if token in held]
                assert held[-least:] == could[-least:]
            left[b] = now, n if evicts or eviction.adds_up else left[b][1]

    def left_in(self, store):
        return self.left[self.stores(Evicting).index(store)]

    def held_by(self, store, b):
        """The tokens that each head of a row holds, by their keys and by their values."""
        n, found = len(self.rows[b]) - store.dropped[b], []
        for i, head in enumerate(store.group.heads):
            ours = torch.stack([store.k[b, i, :n], store.v[b, i, :n]], 1)
            row = torch.tensor(self.rows[b], dtype=torch.int64)
            same = (ours[:, None] == self.made[row][:, :, head]).all(-1).all(-1)
            assert (same.sum(1) == 1).all()
            found.append(row[same.byte().argmax(1)].tolist() if n else [])
        return found

    def check_chunk(self, store, k, v, lengths):
        """A chunk finds each key of its windows once, in whichever block, and nothing else; itself
        as it came."""
        past, new, total = lengths.past, lengths.new, self.lengths()
        plain = Grid(torch.tensor(new), torch.tensor(total), k.shape[2], max(total), 16)
        *read, grid = store.with_chunk(k, v, lengths, plain)
        whole, grid = grid is None, plain if grid is None else grid
        mask = BlockLists.of(grid, 1, band=store.group.band).mask()[:, 0]
        for b, at in enumerate(grid.key_pos):
            for i in range(new[b]) if not whole else ():
                wanted = window(store.group.band, past[b] + i)
                assert sorted(at[mask[b, i]].tolist()) == wanted
            at = at[: read[0].shape[2]]
            held = at[at >= 0].tolist()
            if whole or total[b] < store.below:
                assert sorted(held) == list(range(total[b]))
            ours = torch.stack([t[b][:, at >= 0] for t in read])
            own = self.content(b, range(past[b], total[b]), store.group.heads)
            own = torch.cat([self.read_of(store, b, past[b]), own], 2)
            assert torch.equal(ours, own[:, :, held])

    def check_step(self, ring, past):
        """A few new tokens are stored, then read what is held: none of their windows has a gap."""
        for p, row, at in zip(past, self.rows, ring.positions(self.lengths()), strict=True):
            for query in range(p, len(row)):
                assert {*window(ring.band, query)} <= {*at.tolist()}

    def check_hot(self, store, queries):
        """What is chosen is found in the hot set, or among the newest pages, as the row has it."""
        q = torch.randn(len(self.rows), len(store.group.heads), queries, DIM, generator=self.random)
        length, hot = torch.tensor(self.lengths()), store.place().hot
        lists = store.group.selector.pages(q, store.indexed(None), length, 1.0)
        found, within = fetch(hot, lists, length), torch.arange(hot.unit)
        for (b, n), h in product(enumerate(self.lengths()), range(q.shape[1])):
            units, lies = (t[b, h, : found.count[b, h], None] for t in (found.pages, found.lies))
            at, lies = (t * hot.unit + within for t in (units, lies))
            at, lies = at[at < n], lies[at < n]
            if hot.packed is None:
                ours = torch.stack([t[b, h, lies] for t in (hot.k, hot.v)])
            else:
                own = hot.packed.of(torch.tensor([b]))
                ours = own.choose(h, at[None], length[b : b + 1], lies[None] // PAGE)
                ours = torch.cat(ours)[:, 0]
            assert torch.equal(ours, self.read_of(store, b, n)[:, h, at])

    def check_size(self, ring):
        """No more room than sink, window and slack, once no row can go back under `below`."""
        if min(self.lengths()) >= ring.below + SLACK or not ring.below:
            most = max(ring.band.span(n) for n in self.lengths()) + SLACK
            paged = ring.band.rate or ring.group.bits != 16
            most = -(-most // PAGE) * PAGE if paged else most
            assert ring.positions(self.lengths()).shape[1] <= ring.sink + most

    def check_summaries(self, past=()):
        """What each page's selector says of its keys; after a crop, the last page's may be of those
        taken back, too.

        past: behind a call, how long rows were before it.
        """
        for store in self.stores(*WHOLE):
            if not store.group.selector:
                continue
            for b, n in enumerate(self.lengths()):
                keys = self.content(b, range(n), store.group.heads)[0]
                if store.group.bits != 16:
                    keys = self.known_by(store)[b][0][0]
                built = tokens_built(segment_of(store.group.selector), past[b]) if past else 0
                if built:  # segment by segment, as of its length before the last call
                    pages = keys[:, :built].unflatten(1, (-1, PAGE))[None]
                    for name, t in store.group.selector.build(pages).items():
                        assert torch.equal(store.index[name][b, :, : built // PAGE], t[0])
                for page, own in enumerate(keys.split(PAGE, 1) if n else ()):
                    if page < built // PAGE or (not past and page < store.built[b] // PAGE):
                        continue
                    held = {name: t[b, :, page] for name, t in store.index.items()}
                    if past or own.shape[1] == PAGE:
                        whole = pad(own, (0, 0, 0, PAGE - own.shape[1]), value=torch.nan)
                        real = (torch.arange(PAGE) < own.shape[1]).view(1, 1, 1, PAGE, 1)
                        said = store.group.selector.summarise(whole[None, :, None], real)
                        assert all(torch.equal(held[name], t[0, :, 0]) for name, t in said.items())
                    # Those of parts, of a page that is begun anew, follow with its next token.
                    if {*held} == EXTREMES and held["low"].ndim == 2:
                        assert (held["low"] <= own.amin(1)).all()
                        assert (held["high"] >= own.amax(1)).all()

    @precondition(lambda self: self.seen)
    @rule(drop=st.integers(1, SLACK))
    def take_back(self, drop):
        self.crop(min(drop, self.seen))

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def go_back(self, data):
        """Just too far, to the first few tokens, or anywhere; and a new turn."""
        far = next((n for n in range(1, self.seen) if not self.can_drop(n)), self.seen)
        first = st.integers(max(self.seen - 5, 1), self.seen)
        drop = data.draw(st.just(far) | first | st.integers(1, self.seen))
        self.crop(drop)
        self.append(data.draw(st.integers(1, 130)))

    def can_drop(self, drop):
        """Whether rings hold what the next query would read then."""
        for ring in self.stores(Ring, PackedRing):
            for b, at in enumerate(ring.positions(self.lengths())):
                left, at = max(len(self.rows[b]) - drop, 0), {*at.tolist()}
                page = self.begins_anew(ring, b, left) if ring.group.bits != 16 else None
                if not needed(ring, left) <= at or not (page is None or page * PAGE in at):
                    return False
        ends = [at for store in self.stores(Evicting) for _, at in self.left_in(store)]
        rows = self.lengths() * len(self.stores(Evicting))
        return not any(0 < n - drop < at for n, at in zip(rows, ends, strict=True))

    def begins_anew(self, store, b, left):
        """The page that a row of so many tokens begins with what it unpacks, if any."""
        page = left // PAGE
        return page if left % PAGE and page < self.known_by(store)[b][1] else None

    def go_back_to(self, store, b, left):
        (known, exact), page = self.known_by(store)[b], self.begins_anew(store, b, left)
        if page is not None:
            tokens = slice(page * PAGE, (page + 1) * PAGE)
            known = known.clone()
            known[:, :, tokens] = packed(known[:, :, tokens], store.group.bits)
        self.known_by(store)[b] = known[:, :, :left], min(exact, left // PAGE)

    def crop(self, drop):
        left = self.seen - drop
        can = self.can_drop(drop)
        assert can or self.furthest - left > SLACK or self.stores(Evicting)
        if not can:
            with pytest.raises(CacheError, match="Start again"):
                self.layer.crop(-drop)
            return
        self.layer.crop(-drop)
        for store in self.stores(*PACKS):
            for b, row in enumerate(self.rows):
                self.go_back_to(store, b, max(len(row) - drop, 0))
        self.rows = [row[: max(len(row) - drop, 0)] for row in self.rows]
        self.forget()
        self.seen, self.expected = left, min(self.expected, left)
        self.starts = [min(start, left) for start in self.starts]

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def pick(self, data):
        """Rows change places, some go, each is doubled, or all go on in a copy of the layer."""
        B = len(self.rows)
        how = data.draw(st.sampled_from(["reorder", "select", "double", "copy"]))
        rows = list(range(B))
        if how == "reorder":
            rows = data.draw(st.lists(st.integers(0, B - 1), min_size=B, max_size=B))
            self.layer.reorder_cache(torch.tensor(rows))
        elif how == "select":
            rows = data.draw(st.sets(st.integers(0, B - 1), min_size=1).map(sorted))
            self.layer.batch_select_indices(torch.tensor(rows))
        elif how == "double" and B <= 2:
            rows = [b for b in rows for _ in (0, 1)]
            self.layer.batch_repeat_interleave(2)
        elif how == "copy":
            old, self.layer = self.layer, deepcopy(self.layer)
            for tensor in (t for s in old.stores for t in (*s.tensors(), *s.outside())):
                tensor.fill_(poison_of(tensor.dtype, torch.nan))
        self.rows = [list(self.rows[b]) for b in rows]
        self.left = [[left[b] for b in rows] for left in self.left]
        self.known = [[known[b] for b in rows] for known in self.known]
        self.starts = [self.starts[b] for b in rows]

    @precondition(lambda self: self.seen > 80)
    @rule()
    def reset(self):
        self.layer.reset()
        for store in self.stores(*PACKS):
            for b in range(len(self.rows)):
                self.go_back_to(store, b, 0)
        self.rows = [[] for _ in self.rows]
        self.forget()
        self.seen = self.furthest = self.expected = 0

    def forget(self):
        """Heads hold no token that their row has lost."""
        for left in self.left:
            for b, row in enumerate(self.rows):
                held = [[token for token in own if token in row] for own in left[b][0]]
                left[b] = held, left[b][1] if row else 0

    # -- what holds at any time ------------------------------------------------------------------

    @invariant()
    def lengths_are_those_of_the_rows(self):
        layer = self.layer
        assert layer.get_seq_length() == layer.seen == layer.stored == self.seen
        assert layer.get_mask_sizes(7) == (self.seen + 7, 0)
        assert layer.expected == self.expected
        assert layer.rows == self.lengths() or not layer.is_initialized

    @invariant()
    def full_stores_hold_every_token(self):
        for store in self.stores(*WHOLE):
            held = torch.stack(store.read(self.lengths()))
            for b, n in enumerate(self.lengths()):
                assert torch.equal(held[:, b, :, :n], self.read_of(store, b, n))

    @invariant()
    def rings_hold_sink_and_newest_tokens_and_what_the_next_query_needs(self):
        for ring in self.stores(Ring, PackedRing):
            places, (k, v) = ring.positions(self.lengths()), ring.read(self.lengths())
            assert places.shape[1] == k.shape[2] == v.shape[2]
            for b, (at, n) in enumerate(zip(places, self.lengths(), strict=True)):
                held, sink = at[at >= 0].tolist(), min(ring.sink, n)
                assert sorted(held) == [*range(sink), *range(n - len(held) + sink, n)]
                assert needed(ring, n) <= {*held}
                ours = torch.stack([k[b], v[b]])[:, :, at >= 0]
                assert torch.equal(ours, self.read_of(ring, b, n)[:, :, held])

    @invariant()
    def evicting_stores_hold_what_they_kept_and_all_later_tokens(self):
        for store in self.stores(Evicting):
            for b, row in enumerate(self.rows):
                if row:
                    assert self.held_by(store, b) == self.left_in(store)[b][0]
                    assert store.gone[b] == store.dropped[b]

    @invariant()
    def page_summaries_bound_their_keys(self):
        self.check_summaries()

    @invariant()
    def bytes_are_those_of_the_storages(self):
        for held, said in (("tensors", self.layer.bytes()), ("outside", self.layer.host_bytes())):
            tensors = [t for store in self.layer.stores for t in getattr(store, held)()]
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
            assert said == sum(s.nbytes() for s in storages.values())


TestCacheEqualsPlainLists = CacheMachine.TestCase
TestCacheEqualsPlainLists.settings = settings(stateful_step_count=25)
