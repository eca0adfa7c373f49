"""The cache layer: rings, growth, page summaries, owners, bytes."""

import re
from itertools import pairwise

import pytest
import torch
from transformers.cache_utils import DynamicLayer

import hfsparse
from hfsparse.errors import CacheError
from hfsparse.lists import FULL, PAGE, Band, BlockLists, Grid
from hfsparse.lists.lengths import Lengths
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse.runtime.cache.full import Full
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.cache.layer import CacheLayer
from hfsparse.runtime.cache.ring import SLACK, Ring
from hfsparse.runtime.call import enter, leave
from hfsparse.runtime.decode import STEP
from hfsparse.selectors.quest import Quest
from tests.tiny import llama

GROUPS = (
    Group((0,), Band(3, 10)),
    Group((1, 3), FULL, Quest()),
    Group((2,), Streaming(5, 6, 0.25).band),
    Group((4,), FULL),
)
HEADS, DIM = 5, 3


def layer(below: int = 0, reserve: int = 0, groups=GROUPS) -> CacheLayer:
    return CacheLayer("plan", groups, below, reserve)


def append(to: CacheLayer, k, v, starts=None, check: bool = True) -> None:
    """As the attention function does it, columns in: row-relative, then into every store."""
    enter("plan")
    to.update(k, v)
    leave("plan")
    columns = k.shape[2]
    lengths = Lengths.of(starts, to.seen - columns, columns, len(k))
    to.advance(lengths)
    k, v = (row_relative(t, lengths.new) for t in (k, v))
    for store in to.stores:
        heads = store.group.heads
        if check and isinstance(store, Ring) and lengths.behind:
            check_chunk(store, k[:, heads], v[:, heads], lengths)
        store.append(k[:, heads], v[:, heads], lengths)
        if check and isinstance(store, Ring) and max(lengths.new) <= STEP:
            check_step(store, lengths)


def row_relative(t, new: list[int]):
    """Padded rows moved to column 0, NaN behind them."""
    out = torch.full_like(t, torch.nan)
    for b, n in enumerate(new):
        out[b, :, :n] = t[b, :, t.shape[2] - n :]
    return out


def window(band: Band, position: int) -> set[int]:
    """Positions read by a query, from the definition."""
    span = band.recent + position * band.rate // 65536
    return {p for p in range(position + 1) if p < band.sink or p > position - span}


def check_step(ring: Ring, lengths: Lengths) -> None:
    """A few new tokens are stored, then read what is held: none of their windows has a gap."""
    past, total = lengths.past, lengths.rows
    for p, n, at in zip(past, total, ring.positions(total).tolist(), strict=True):
        for query in range(p, n):
            assert window(ring.band, query) <= set(at)
        if n < ring.below:
            assert set(range(n)) <= set(at)


def check_chunk(ring: Ring, k, v, lengths: Lengths) -> None:
    """A chunk finds each key of its window once, in whichever block, and nothing else."""
    past, new, total = lengths.past, lengths.new, lengths.rows
    plain = Grid(torch.tensor(new), torch.tensor(total), k.shape[2], k.shape[2], 16)
    held, _, grid = ring.with_chunk(k, v, lengths, plain)
    mask = BlockLists.of(grid, 1, band=ring.band).mask()
    for b, (p, n) in enumerate(zip(past, new, strict=True)):
        at = grid.key_pos[b]
        for i in range(n):
            read = at[mask[b, 0, i]].tolist()
            assert sorted(read) == sorted(window(ring.band, p + i))
        fresh = at >= p
        assert torch.equal(held[b, :, fresh], k[b][:, at[fresh] - p])
        if total[b] < ring.below:
            assert sorted(at[at >= 0].tolist()) == list(range(total[b]))


def filled(tokens: int, by: int = 0, below: int = 0, groups=GROUPS, pads=None) -> CacheLayer:
    """A cache that has seen so many columns, all at once or `by` at a time; keys are positions."""
    it = layer(below, groups=groups)
    heads = sum(len(group.heads) for group in groups)
    for at in range(0, tokens, by or tokens):
        n = min(by or tokens, tokens - at)
        k = torch.arange(at, at + n)[None, None, :, None].float().expand(1, heads, n, DIM)
        append(it, k, k, pads and [min(p, at + n) for p in pads])
    return it


# -- rings and `below` ---------------------------------------------------------------------------


def test_a_ring_drops_nothing_until_its_row_passes_below_and_then_trims_once():
    it = layer(below=200, groups=(Group((0,), Band(3, 10)),))
    (ring,) = it.stores
    sizes = []
    for n in range(1, 400):
        key = torch.full((1, 1, 1, DIM), float(n))
        append(it, key, key)
        at = ring.positions(it.rows)[0]
        if n < 200:
            assert sorted(at[at >= 0].tolist()) == list(range(n))
        sizes.append(ring.size)
    shrunk = [n for n, (a, b) in enumerate(pairwise(sizes)) if b < a]
    assert len(shrunk) == 1
    assert 200 <= shrunk[0] <= 200 + SLACK + 1
    assert sizes[-1] == 10 + SLACK


@pytest.mark.parametrize("below", [0, 200])
def test_as_many_tokens_as_the_slack_can_be_taken_back_anywhere(below):
    for tokens in (50, 199, 200, 201, 230, 240, 500):
        it = filled(tokens, below=below)
        it.crop(-SLACK)
        assert it.rows == [tokens - SLACK]
        append(it, *torch.zeros(2, 1, HEADS, 2, DIM))


def test_a_crop_past_the_slack_raises_and_changes_nothing():
    it = filled(300)
    before = [t.clone() for store in it.stores for t in store.tensors()]
    with pytest.raises(CacheError, match=r"cannot go back to 200 tokens.*32 tokens.*Start again"):
        it.crop(-100)
    assert (it.seen, it.rows) == (300, [300])
    after = [t for store in it.stores for t in store.tensors()]
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True)
    )
    append(it, *torch.zeros(2, 1, HEADS, 1, DIM))


def test_a_chunk_after_a_crop_into_the_sink_sees_all_of_itself():
    it = filled(300)
    it.crop(-298)
    append(it, *torch.randn(2, 1, HEADS, 60, DIM))  # checks the chunk's keys itself


@pytest.mark.parametrize("length", [-3, 47, 0, 50, 60, -50, -70])
def test_crop_means_what_it_means_to_transformers_own_layer(length):
    """0 was "nothing stays" at first, and is "nothing goes"; what is refused there is here."""
    it, stock = filled(50), DynamicLayer()
    stock.update(*(torch.zeros(1, HEADS, 50, DIM) for _ in "kv"))
    try:
        stock.crop(length)
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            it.crop(length)
    else:
        it.crop(length)
    assert it.get_seq_length() == stock.keys.shape[2]
    assert it.rows == [stock.keys.shape[2]]


def test_a_crop_before_the_first_token_is_nothing():
    it = layer()
    it.crop(-3)
    assert it.get_seq_length() == 0


def test_more_can_be_taken_back_once_more_is_to_be_kept():
    it = filled(300)
    it.keep(80)
    with pytest.raises(CacheError, match="cannot go back to 220 tokens"):
        it.crop(-80)  # they went before it was said
    append(it, *torch.zeros(2, 1, HEADS, 80, DIM))
    it.crop(-80)
    assert it.rows == [300]


# -- growth --------------------------------------------------------------------------------------


def test_single_tokens_are_stored_without_copying_the_row():
    """4,096 single appends: a buffer moves a logarithmic number of times, seldom near the end."""
    it, moves = layer(), {}
    key = torch.zeros(1, HEADS, 1, DIM)
    for n in range(1, 4097):
        append(it, key, key, check=False)
        for i, store in enumerate(it.stores):
            for j, t in enumerate(store.tensors()):
                places = moves.setdefault((i, j), [])
                if not places or places[-1][1] != t.data_ptr():
                    places.append((n, t.data_ptr()))
    for (i, _), places in moves.items():
        late = [n for n, _ in places if n > 2048]
        ring = it.stores[i]
        assert len(places) <= 48
        assert len(late) <= 14 if isinstance(ring, Full) or ring.band.rate else not late
    for store in it.stores:
        if isinstance(store, Full):
            assert store.k.shape[2] <= 4096 * 17 // 16 + PAGE


def test_room_for_the_whole_generation_is_reserved_at_once():
    it = layer(reserve=1000)
    append(it, *torch.zeros(2, 1, HEADS, 100, DIM))
    places = [t.data_ptr() for t in it.stores[3].tensors()]
    for _ in range(900):
        append(it, *torch.zeros(2, 1, HEADS, 1, DIM), check=False)
    assert it.stores[3].k.shape[2] == 1024
    assert [t.data_ptr() for t in it.stores[3].tensors()] == places


# -- page summaries ------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [1, 5, 36, 64, 100, 163])
def test_page_summaries_forget_what_was_taken_back(crop):
    """200 tokens, some of them loud and taken back: the next token's page knows nothing of them."""
    it = layer(groups=(Group((0, 1), FULL, Quest()),))
    keys = torch.randn(1, 2, 200, DIM)
    keys[:, :, -crop:] *= 100
    append(it, keys, keys)
    it.crop(-crop)
    append(it, *torch.zeros(2, 1, 2, 1, DIM))
    (store,) = it.stores
    left = torch.cat([keys[:, :, : 200 - crop], torch.zeros(1, 2, 1, DIM)], 2)
    for page, keys in enumerate(left.split(PAGE, 2)):
        assert torch.equal(store.index["low"][:, :, page], keys.amin(2))
        assert torch.equal(store.index["high"][:, :, page], keys.amax(2))


# -- who may use a cache -------------------------------------------------------------------------


def test_a_cache_of_another_patch_is_refused():
    it = filled(5)
    for owner in ("no plan", "another plan"):
        if owner == "another plan":
            enter(owner)
        with pytest.raises(CacheError, match="start again from the prompt"):
            it.update(*torch.zeros(2, 1, HEADS, 1, DIM))
    leave("another plan")
    assert it.seen == 5


def test_another_batch_size_is_refused():
    it = filled(5)
    enter("plan")
    with pytest.raises(CacheError, match="holds 1 rows and the input has 2"):
        it.update(*torch.zeros(2, 2, HEADS, 1, DIM))
    leave("plan")
    assert it.seen == 5


def test_a_mask_that_forgets_the_padding_is_refused():
    it = filled(20, pads=[7])
    assert it.rows == [13]
    with pytest.raises(CacheError, match="pass the mask of the whole conversation"):
        append(it, *torch.zeros(2, 1, HEADS, 1, DIM))


# -- bytes ---------------------------------------------------------------------------------------


def held_bytes(layers) -> int:
    """Bytes of the storages behind all tensors."""
    tensors = [t for it in layers for store in it.stores for t in store.tensors()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


HALF = (Group((0,), Band(64, 256)), Group((1,), FULL, Quest()))


@pytest.mark.parametrize(
    ("first", "reserve", "share"),
    [(4096, 0, 0.58), (3000, 4096, 0.58), (3000, 0, 0.58)],
    ids=["one_prompt", "generation_of_known_length", "growing_by_a_sixteenth"],
)
def test_half_the_heads_streaming_hold_little_more_than_half(first, reserve, share):
    """4,096 tokens, at once or single ones behind a prompt; page summaries are counted."""
    it = layer(reserve=reserve, groups=HALF)
    append(it, *torch.zeros(2, 1, 2, first, DIM))
    for _ in range(4096 - first):
        append(it, *torch.zeros(2, 1, 2, 1, DIM), check=False)
    assert it.dense_bytes() == 4096 * 2 * 2 * DIM * 4
    assert it.bytes() == held_bytes([it])
    assert 0.5 < it.bytes() / it.dense_bytes() <= share


def test_stats_of_a_patched_model_agree_with_its_tensors():
    model = llama(window=8192)
    words = Layer(("stream", "stream", "full", "full"), ("stream", "full"), ("ring", "quest"))
    patterns = {"stream": Streaming(64, 256), "quest": Quest()}
    plan = Plan(ModelId.of(model), patterns, (words, words))
    ids = torch.arange(4096)[None] % 400
    with hfsparse.patch(model, plan) as handle, torch.no_grad():
        cache = model(ids, logits_to_keep=1).past_key_values
        stats = handle.stats()
        assert stats.kv_bytes == held_bytes(cache.layers)
        assert stats.kv_bytes_dense == 2 * 4096 * 2 * 2 * 16 * 4
        assert 0.5 < stats.cache_share <= 0.58
        ring, full = stats.layers[1].kv_bytes
        assert ring < 0.1 * full


def test_a_cache_reordered_in_inference_mode_goes_on_outside_of_it():
    cache = layer()
    append(cache, torch.randn(2, HEADS, 20, DIM), torch.randn(2, HEADS, 20, DIM))
    with torch.inference_mode():
        cache.reorder_cache(torch.tensor([1, 0]))
    append(cache, torch.randn(2, HEADS, 1, DIM), torch.randn(2, HEADS, 1, DIM))
    assert not any(t.is_inference() for store in cache.stores for t in store.tensors())
