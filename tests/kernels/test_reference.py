"""The kernels of a CPU against plain float32 attention under the mask that the lists mean."""

import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from hfsparse import kernels
from hfsparse.kernels import cpu, dense, means, reference
from hfsparse.kernels.merge import join
from hfsparse.lists import PAGE, Band, BlockLists, PageLists
from hfsparse.selectors.means import unit_means
from hfsparse.selectors.quest import Quest
from tests.helpers import ROWS, batch, causal, close, truth, with_means
from tests.patterns.matrix import SETTINGS

EXTRAS = {  # what a model adds to plain attention, and shapes that are not square
    "plain": {},
    "softcap": {"softcap": 3.0},
    "sink_logits": {"s_aux": True},
    "window": {"window": 70},
    "wide_values": {"value_dim": 24},
    "all_at_once": {"softcap": 5.0, "s_aux": True, "window": 99, "value_dim": 8},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(length: int, extras: str, **more):
    """A batch, its q heads' kv heads, and the keyword arguments of a kernel."""
    extra = dict(EXTRAS[extras])
    logits = {"softcap": extra.pop("softcap", None), "s_aux": extra.pop("s_aux", None)}
    it = batch(length, **extra, **more)
    H = it.q.shape[1]
    if logits["s_aux"]:
        logits["s_aux"] = torch.linspace(-2, 3, H)
    return it, torch.arange(H) // (H // it.k.shape[1]), {"scale": it.scale, **logits}


# -- prefill -------------------------------------------------------------------------------------


def prefills(it, lists, kv, logits):
    """What each kernel makes of the lists; where several can, of one LSE."""
    sums = torch.empty(it.q.shape[:3])
    yield reference.prefill(it.q, it.k, it.v, lists, kv, **logits, lse=sums)
    if not logits["softcap"] and logits["s_aux"] is None:
        other = torch.empty_like(sums)
        yield cpu.prefill(it.q, it.k, it.v, lists, kv, **logits, lse=other)
        torch.testing.assert_close(other, sums, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("name", SETTINGS)
def test_prefill_matches_plain_attention(name, extras, dtype):
    it, kv, logits = inputs(150, extras, past=45, rows="left_padded", group=3, dtype=dtype)
    lists = SETTINGS[name].lists(it.q, it.k, it.grid, it.scale)
    expected = truth(it.q, it.k, it.v, lists.mask(), **logits)
    for out in prefills(it, lists, kv, logits):
        assert out.dtype == dtype
        assert close(out, expected)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("past", [0, 45])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 127, 128, 129])
def test_prefill_over_mixed_heads_matches_plain_attention(length, group, past, block, rows):
    """Each q head a pattern of its own, one of them full, two q heads reading other kv heads."""
    it, kv, logits = inputs(length, "plain", past=past, rows=rows, group=group, block=block)
    names = [None, *SETTINGS]
    parts = []
    for h in range(len(kv)):
        name = names[h % len(names)]
        q, k = it.q[:, h : h + 1], it.k[:, kv[h] : kv[h] + 1]
        full = BlockLists.of(it.grid, 1)
        parts.append(SETTINGS[name].lists(q, k, it.grid, it.scale) if name else full)
    lists = BlockLists.cat(parts)
    expected = truth(it.q, it.k, it.v, lists.mask(), it.scale)
    for out in prefills(it, lists, kv, logits):
        assert close(out, expected)


def test_prefill_of_1037_tokens_matches_plain_attention_in_any_tile_size(monkeypatch):
    it, kv, logits = inputs(1037, "all_at_once", rows="left_padded", group=1, kv_heads=1)
    picked = ("streaming_growing", "vertical_slash", "block_topk")
    q, kv = it.q, kv.repeat(3)
    lists = BlockLists.cat([SETTINGS[n].lists(q, it.k, it.grid, it.scale) for n in picked])
    q, logits["s_aux"] = q.repeat(1, 3, 1, 1), logits["s_aux"].repeat(3)
    expected = truth(q, it.k.repeat(1, 3, 1, 1), it.v.repeat(1, 3, 1, 1), lists.mask(), **logits)
    for tile in (1, 1 << 15, 1 << 21):  # one block at a time, a few, all
        monkeypatch.setattr(reference, "TILE", tile)
        assert close(reference.prefill(q, it.k, it.v, lists, kv, **logits), expected)


def test_prefill_on_a_cpu_of_1037_tokens_is_the_references_in_any_tile_size(monkeypatch):
    it, _, logits = inputs(1037, "plain", rows="left_padded", group=1, kv_heads=1)
    bands = [BlockLists.of(it.grid, 1, band=Band(*b)) for b in ((0, 64), (5, 300), (70, 9, 9000))]
    picked = ("vertical_slash", "block_topk")
    lists = [SETTINGS[n].lists(it.q, it.k, it.grid, it.scale) for n in picked]
    lists, kv = BlockLists.cat([*bands, *lists]), torch.zeros(5, dtype=torch.int64)
    q = it.q.repeat(1, 5, 1, 1)
    expected = reference.prefill(q, it.k, it.v, lists, kv, **logits)
    for tile in (1, 1 << 15, 1 << 21):
        monkeypatch.setattr(cpu, "TILE", tile)
        assert close(cpu.prefill(q, it.k, it.v, lists, kv, **logits), expected)


def test_columns_without_any_block_are_read_by_every_later_query():
    it, kv, logits = inputs(70, "plain", group=1)
    columns = torch.tensor([0, 5, 31, 32, 69, 1 << 40]).expand(2, 2, -1)
    nothing = torch.zeros(2, 2, it.grid.nq, it.grid.nk, dtype=torch.bool)
    lists = BlockLists.of(it.grid, 2, nothing, columns=columns)
    mask = torch.zeros(70, 70, dtype=torch.bool)
    mask[:, columns[0, 0, :-1]] = True
    mask = mask.tril().expand(2, 2, -1, -1)
    assert torch.equal(lists.mask(), mask)
    assert torch.equal(lists.pairs(), mask.sum((2, 3)))
    for out in prefills(it, lists, kv, logits):
        assert close(out, truth(it.q, it.k, it.v, mask, it.scale))


def test_q_heads_may_read_kv_heads_in_any_order():
    it, _, logits = inputs(70, "plain", group=2)
    kv = torch.tensor([1, 0, 0, 1])
    lists = BlockLists.of(it.grid, 4, band=Band(3, 20))
    for out in prefills(it, lists, kv, logits):
        assert close(out, truth(it.q, it.k[:, kv], it.v[:, kv], lists.mask(), it.scale))


def test_huge_logits_stay_finite():
    it, kv, _ = inputs(100, "plain", group=1)
    lists = BlockLists.of(it.grid, 2)
    for kernel in (reference, cpu):
        out = kernel.prefill(it.q, it.k, it.v, lists, kv, scale=1e4)
        assert close(out, truth(it.q, it.k, it.v, lists.mask(), 1e4))


def test_prefill_passes_gradients():
    it, kv, logits = inputs(70, "all_at_once", group=3, poison=0.0)
    lists = SETTINGS["vertical_slash_few"].lists(it.q, it.k, it.grid, it.scale)
    found = []
    for attention in ("kernel", "truth"):
        q, k, v = (t.clone().requires_grad_() for t in (it.q, it.k, it.v))
        if attention == "kernel":
            out = reference.prefill(q, k, v, lists, kv, **logits)
        else:
            out = truth(q, k, v, lists.mask(), **logits)
        out.sin().sum().backward()
        found.append((q.grad, k.grad, v.grad))
    for ours, theirs in zip(*found, strict=True):
        assert close(ours, theirs)


# -- dense ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("past", [0, 45])
@pytest.mark.parametrize("length", [1, 33, 150])
def test_dense_prefill_matches_plain_attention(length, past, rows, dtype):
    it, _, _ = inputs(length, "wide_values", past=past, rows=rows, dtype=dtype)
    out = dense.prefill(it.q, it.k, it.v, it.grid, scale=it.scale)
    assert close(out, truth(it.q, it.k, it.v, causal(it.grid, 6), it.scale))
    assert not out[-1, :, int(it.grid.q_len[-1]) :].any()


def test_dense_prefill_in_pieces_matches_plain_attention(monkeypatch):
    it, _, _ = inputs(70, "plain", past=45, rows="left_padded")
    monkeypatch.setattr(dense, "MASK", 1000)
    out = dense.prefill(it.q, it.k, it.v, it.grid, scale=it.scale)
    assert close(out, truth(it.q, it.k, it.v, causal(it.grid, 6), it.scale))


def test_dense_prefill_sees_a_past_in_a_grid_as_wide_as_its_queries():
    """Two rows of which the longer is all new: Sq == Sk, and yet the other has a past."""
    it, _, _ = inputs(40, "plain", rows="equal")
    grid = type(it.grid)(torch.tensor([40, 12]), torch.tensor([40, 40]), 40, 40)
    out = dense.prefill(it.q, it.k, it.v, grid, scale=it.scale)
    assert close(out, truth(it.q, it.k, it.v, causal(grid, 6), it.scale))


def test_the_first_kernel_that_can_serve_is_chosen():
    own = {"prefill": "torch flash over lists", "decode": "torch flash, store by store"}
    for name, by_lists in own.items():
        table = getattr(kernels.TABLES, name)
        need = partial(kernels.Need, torch.device("cpu"), torch.float32, 16, 16)
        plain = "torch sdpa" if name == "prefill" else by_lists
        assert kernels.pick(table, need()).name == plain
        assert kernels.pick(table, need(lists=True)).name == by_lists
        refused = [{"logits": True}, {"grad": True}, {"logits": True, "lists": True}]
        for more in [*refused, {"skip": True} if name == "prefill" else {"lse": True}]:
            chosen = kernels.pick(table, need(**{"lists": True} | more)).name
            assert chosen == "reference (PyTorch)"


@pytest.mark.parametrize("trained", ["q", "k", "v", "s_aux"])
def test_whatever_is_trained_asks_for_gradients(trained):
    given = {name: torch.ones(1, 1, 1, 16) for name in ("q", "k", "v")} | {"s_aux": torch.ones(1)}
    assert not kernels.Need.of(**given).grad
    given[trained].requires_grad_()
    assert kernels.Need.of(**given).grad
    with torch.no_grad():
        assert not kernels.Need.of(**given).grad


# -- decode --------------------------------------------------------------------------------------


def step(queries: int, lengths: list[int], extras: str, group: int = 3, dtype=torch.float32):
    """New queries at the ends of rows of these lengths; dead slots hold NaN."""
    it, _, logits = inputs(max(queries, *lengths), extras, group=group, dtype=dtype)
    length = torch.tensor(lengths)
    slot = torch.arange(it.k.shape[2])
    key_pos = torch.where(slot < length[:, None], slot, -1)
    for t in (it.k, it.v):
        t.masked_fill_((key_pos < 0)[:, None, :, None], torch.nan)
    query_pos = (length[:, None] - queries + torch.arange(queries)).clamp(min=-1)
    return it.q[:, :, :queries], it.k, it.v, query_pos, key_pos, logits


def used(key_pos):
    """[B] slots of each row up to the last that holds a key."""
    slot = torch.arange(key_pos.shape[1])
    return torch.where(key_pos < 0, 0, slot + 1).amax(1)


def as_ring(k, v, key_pos, by: int):
    """k, v and positions with the slots of each row turned, as a ring's are that came round."""
    S, live = key_pos.shape[1], used(key_pos)[:, None]
    slot = torch.arange(S)
    turned = torch.where(slot < live, (slot - by) % live, slot)
    k, v = (t.gather(2, turned[:, None, :, None].expand_as(t)) for t in (k, v))
    return k, v, key_pos.gather(1, turned)


def readable(query_pos, key_pos, heads: int):
    """bool [B, heads, Q, S]: keys held and not after the query."""
    key, query = key_pos[:, None, None], query_pos[:, None, :, None]
    return ((key >= 0) & (key <= query)).expand(-1, heads, -1, -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("extras", ["plain", "softcap", "sink_logits", "wide_values"])
@pytest.mark.parametrize("queries", [1, 3, 16])
def test_decode_over_every_key_matches_plain_attention(queries, extras, dtype):
    q, k, v, query, key, logits = step(queries, [200, 9], extras, dtype=dtype)
    expected = truth(q, k, v, readable(query, key, 6), **logits)
    for held in (key, None):
        out = reference.decode(q, k, v, query, held, length=used(key), **logits)
        assert close(out, expected)
        if extras in ("plain", "wide_values"):
            args = {"length": used(key), "scale": logits["scale"]}
            assert close(dense.decode(q, k, v, query, held, **args), expected)


@pytest.mark.parametrize("queries", [1, 3, 16])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_decode_over_a_ring_matches_plain_attention(group, queries):
    """Slots in a ring's order; the window counts from each query's own start."""
    q, k, v, query, key, logits = step(queries, [190, 64], "plain", group)
    k, v, key = as_ring(k, v, key, 77)
    band = Band(sink=5, recent=40, rate=6554)
    start = band.start(query)
    kept = (key < 5)[:, None, None] | (key[:, None, None] >= start[:, None, :, None])
    expected = truth(q, k, v, readable(query, key, 2 * group) & kept, **logits)
    for kernel in (reference.decode, dense.decode):
        args = {"length": used(key), "scale": logits["scale"], "start": start, "sink": 5}
        assert close(kernel(q, k, v, query, key, **args), expected)


def paged(pages: PageLists, slots: int, group: int) -> torch.Tensor:
    """bool [B, H, 1, S]: slots in a listed page, or unit, of the head's kv head."""
    kept, unit = torch.zeros(*pages.count.shape, slots, dtype=torch.bool), pages.unit
    for b, h in torch.cartesian_prod(*(torch.arange(n) for n in pages.count.shape)).tolist():
        for page in pages.pages[b, h, : pages.count[b, h]].tolist():
            kept[b, h, page * unit : (page + 1) * unit] = True
    return kept.repeat_interleave(group, 1)[:, :, None]


@settings(max_examples=60)
@given(st.data())
def test_decode_over_pages_matches_plain_attention(data):
    """Any ascending pages, other ones in each row and kv head, behind them what was not counted."""
    lengths = data.draw(st.lists(st.integers(1, 400), min_size=2, max_size=2))
    queries = data.draw(st.sampled_from([1, 3, 16]))
    extras = data.draw(st.sampled_from(["plain", "softcap", "sink_logits"]))
    q, k, v, query, key, logits = step(queries, lengths, extras)
    width = -(-k.shape[2] // PAGE)
    pages = torch.full((2, 2, width), width - 1)
    count = torch.zeros(2, 2, dtype=torch.int64)
    for b in range(2):
        for h in range(2):
            chosen = data.draw(st.sets(st.integers(0, width - 1), min_size=1))
            count[b, h] = len(chosen)
            pages[b, h, : len(chosen)] = torch.tensor(sorted(chosen))
    pages = PageLists(pages, count)
    mask = readable(query, key, 6) & paged(pages, k.shape[2], 3)
    for held in (key, None):
        out = reference.decode(q, k, v, query, held, pages, length=used(key), **logits)
        assert close(out, truth(q, k, v, mask, **logits))


def test_decode_in_any_tile_size_gives_the_same(monkeypatch):
    q, k, v, query, key, logits = step(3, [300, 200], "plain")
    expected = truth(q, k, v, readable(query, key, 6), **logits)
    for tile in (1, 1 << 16):
        monkeypatch.setattr(reference, "TILE", tile)
        out = reference.decode(q, k, v, query, key, length=used(key), **logits)
        assert close(out, expected)


@pytest.mark.parametrize("kernel", [reference.decode, dense.decode], ids=["reference", "dense"])
def test_slots_at_or_beyond_the_length_hold_nothing(kernel):
    """Whatever room there is behind the rows' ends, and whatever is in there."""
    q, k, v, query, key, logits = step(2, [130, 70], "plain")
    expected = truth(q, k, v, readable(query, key, 6), **logits)
    k, v = (pad(t, (0, 0, 0, 100), value=torch.nan) for t in (k, v))
    wrong = torch.arange(230).expand(2, -1)  # says that all slots hold keys
    for held in (None, wrong):
        out = kernel(q, k, v, query, held, length=used(key), scale=logits["scale"])
        assert close(out, expected)


def test_a_row_without_keys_decodes_to_zeros():
    q, k, v, query, key, logits = step(2, [50, 1], "plain")
    query[1], key[1] = -1, -1
    for kernel in (reference.decode, dense.decode):
        out = kernel(q, k, v, query, key, length=used(key), scale=logits["scale"])
        assert not out[1].any()
        assert out[0].all()


# -- memory --------------------------------------------------------------------------------------

MEMORY = """
    import sys, torch
    from pathlib import Path
    from hfsparse.kernels import reference
    from hfsparse.lists import Grid
    from hfsparse.patterns import PATTERNS
    from hfsparse.selectors.quest import Quest

    def peak():
        # Of this process alone: ru_maxrss would begin at what pytest itself has used.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def run(S):
        grid, kv, scale = Grid.causal(1, S, 128), torch.arange(9) // 3, 0.125
        q, k, v = (torch.randn(1, h, S, 64) for h in (9, 3, 3))
        before = peak()
        for pattern in sys.argv[1:]:
            if pattern == "naive":
                (q[:, :1] @ k[:, :1].mT).masked_fill(torch.ones(S, S).tril() == 0, -9).softmax(-1)
                continue
            lists = PATTERNS[pattern]().lists(q, k, grid, scale)
            lists.pairs(), lists.blocks()
            reference.prefill(q, k, v, lists, kv, scale=scale)
        length = torch.tensor([S])
        found = k.unflatten(2, (-1, 64))
        index = {"low": found.amin(3), "high": found.amax(3)}
        pages = Quest().pages(q[:, :, -1:], index, length, scale)
        at = length[:, None] - 1
        reference.decode(q[:, :, -1:], k, v, at, None, pages, length=length, scale=scale)
        return peak() - before

    run(256)  # libraries are loaded, threads are up
    print(run(8192))
"""


def extra_mib(*patterns: str) -> float:
    """MiB that prefill by these patterns and one decode step need above 8,192 tokens of q, k, v."""
    code = textwrap.dedent(MEMORY)
    done = subprocess.run(
        [sys.executable, "-c", code, *patterns], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@pytest.mark.slow
def test_8192_tokens_need_less_than_300_mib_above_the_inputs():
    assert extra_mib("streaming", "vertical_slash", "block_topk") < 300


@pytest.mark.slow
def test_one_head_with_all_pairs_in_memory_would_fail_the_memory_test():
    assert extra_mib("naive") > 300


# -- means ---------------------------------------------------------------------------------------


def by_means(q, k, v, kept, seen, size, scale, softcap=None, s_aux=None):
    """Attention `[H, Q, Dv]` and its weight `[H, Q]` of one row in double precision: keys that are
    kept, and the means of units of `size` (0: none) that are seen whole and not read."""
    q, k, v = (t.double() for t in (q, k, v))
    k, v, kept, weight = with_means(k, v, kept, seen, [size] * len(q))
    logits = q @ k.mT * scale
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    logits = (logits + weight).masked_fill(~kept, -torch.inf)
    if s_aux is not None:
        bare = s_aux.double()[:, None, None].expand(-1, q.shape[1], 1)
        logits, v = torch.cat([logits, bare], 2), torch.nn.functional.pad(v, (0, 0, 0, 1))
    return torch.softmax(logits, 2).nan_to_num(0) @ v, torch.logsumexp(logits, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("name", ["block_topk_one", "sparge"])
def test_prompts_and_means_of_what_they_leave_out_match_the_definition(name, extras, dtype):
    it, kv, logits = inputs(230, extras, past=45, rows="empty_row", group=3, dtype=dtype)
    lists = SETTINGS[name].lists(it.q, it.k, it.grid, it.scale)
    lse = torch.empty(it.q.shape[:3])
    out = reference.prefill(it.q, it.k, it.v, lists, kv, **logits, lse=lse)
    assert torch.equal(out, reference.prefill(it.q, it.k, it.v, lists, kv, **logits))
    more = {"scale": it.scale, "softcap": logits["softcap"]}
    got = join(out, lse, slice(None), *means.prefill(it.q, it.k, it.v, lists, kv, **more))
    assert got.dtype == dtype
    one, seen = it.row(0), causal(it.grid, 1)[0, 0]
    given = it.q[0], it.k[0, kv], it.v[0, kv], lists.mask()[0], seen
    apart, weight = by_means(*given, 0, **logits)
    assert close(out[0], apart.to(dtype))
    torch.testing.assert_close(lse[0].double(), weight, rtol=0, atol=1e-4)
    together, _ = by_means(*given, one.grid.block, **logits)
    assert close(got[0], together, dtype)
    assert not close(got[0], apart, dtype), "nothing was left out"
    assert not got[1].any()


def test_means_of_prompts_are_worked_out_in_pieces(monkeypatch):
    it, kv, _ = inputs(230, "plain", past=45, rows="left_padded")
    lists = SETTINGS["block_topk"].lists(it.q, it.k, it.grid, it.scale)
    whole = means.prefill(it.q, it.k, it.v, lists, kv, scale=it.scale)
    monkeypatch.setattr(means, "PAIRS", 1000)
    for a, b in zip(means.prefill(it.q, it.k, it.v, lists, kv, scale=it.scale), whole, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("extras", ["plain", "all_at_once"])
@pytest.mark.parametrize(("unit", "group"), [(8, 1), (16, 3), (64, 4), (64, 8)])
def test_steps_and_means_of_what_they_leave_out_match_the_definition(unit, group, extras, queries):
    """Room beyond each row holds NaN. A row that reads no lists has none."""
    lengths = [64 * 7 + 5, 64 * 4 + 60]
    q, k, v, query_pos, _, logits = step(queries, lengths, extras, group=group)
    length, room = torch.tensor(lengths), -k.shape[2] % PAGE + PAGE
    k, v = (pad(t, (0, 0, 0, room), value=torch.nan) for t in (k, v))
    pages = [t.unflatten(2, (-1, PAGE)) for t in (k, v)]
    real = (torch.arange(k.shape[2]) < length[:, None]).view(2, 1, -1, PAGE, 1)
    index = unit_means(*pages, real, unit)
    both = torch.tensor([True, True])
    for share, full in ((0.2, False), (1.0, True)):
        chosen = Quest(share, 2, unit=unit)
        lists = chosen.pages(q, chosen.summarise(pages[0], real), length, logits["scale"])
        lse = torch.empty(q.shape[:3])
        out = reference.decode(q, k, v, query_pos, None, lists, length=length, **logits, lse=lse)
        more = {"scale": logits["scale"], "softcap": logits["softcap"]}
        got = join(out, lse, slice(None), *means.decode(q, index, lists, query_pos, both, **more))
        if full:
            assert torch.equal(got, out), "what is read whole stays bit for bit"
            break
        part = means.decode(q, index, lists, query_pos, torch.tensor([True, False]), **more)
        assert torch.equal(join(out, lse, slice(None), *part)[0], got[0])
        assert torch.equal(join(out, lse, slice(None), *part)[1], out[1])
        kv = torch.arange(2).repeat_interleave(group)
        for b, n in enumerate(lengths):
            seen = torch.arange(n) <= query_pos[b, :, None]
            kept = torch.zeros(2, 1, n, dtype=torch.bool)
            for h in (0, 1):
                kept[h, 0] = torch.isin(
                    torch.arange(n) // unit, lists.pages[b, h, : lists.count[b, h]]
                )
            given = q[b], k[b, kv, :n], v[b, kv, :n], kept[kv] & seen, seen
            want, _ = by_means(*given, unit, **logits)
            apart, weight = by_means(*given, 0, **logits)
            assert close(got[b], want, torch.float32)
            assert not close(got[b], apart, torch.float32), "nothing was left out"
            torch.testing.assert_close(lse[b].double(), weight, rtol=0, atol=1e-4)
