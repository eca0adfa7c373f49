"""Multi-head latent attention on the GPU: kernels over latents, and steps replayed as graphs."""

from __future__ import annotations

import pytest
import torch

import hfsparse
from hfsparse.kernels.triton import append as triton_append
from hfsparse.kernels.triton import choose as triton_choose
from hfsparse.kernels.triton import decode as triton_decode
from hfsparse.lists import PAGE, Band
from hfsparse.lists.lengths import Lengths
from hfsparse.lists.places import Place, Table
from hfsparse.runtime.cache.full import Full
from hfsparse.runtime.cache.group import Group
from hfsparse.selectors.quest import Quest
from tests import latents
from tests.gpu.common import BF16, DEVICE, HALF, SINGLE, compiled, near, unwritten
from tests.gpu.test_decode import ring, some_pages
from tests.helpers import truth
from tests.patcher.families import choosing, full, growing, left_padded, mixed, streaming
from tests.patcher.runs import generate

DIMS = (512, 64)  # of DeepSeek's latents, and of what is rotated beside them
BAND = Band(sink=5, recent=90, rate=6554)


def run(
    kind: str,
    lengths=(700, 130, 9),
    queries: int = 1,
    heads: int = 16,
    dims: tuple[int, int] = DIMS,
    dtype=BF16,
    slots: int = 0,
) -> torch.Tensor:
    """New tokens at the ends of cached rows, against plain attention; what isn't read is NaN."""
    made = torch.Generator(DEVICE).manual_seed(0)
    B, S, (rank, rope) = len(lengths), max(lengths), dims
    q = torch.randn(B, queries, heads, rank + rope, generator=made, device=DEVICE).to(dtype)
    q = q.transpose(1, 2)
    k = torch.randn(B, 1, S, rank + rope, generator=made, device=DEVICE).to(dtype)
    length, key = torch.tensor(lengths, device=DEVICE), torch.arange(S, device=DEVICE)
    query = length[:, None] - queries + torch.arange(queries, device=DEVICE)
    query = query.clamp(min=-1)
    kept, lists = (key <= query[..., None])[:, None], None
    dead = (key >= length[:, None])[:, None]
    if kind == "ring":
        kept = kept & ((key < BAND.sink) | (key >= BAND.start(query)[..., None]))[:, None]
        part = ring(k, k[..., :rank], length, [0], BAND, queries)
        held = part.k.contiguous()
        part = part._replace(k=held, v=held[..., :rank])
    else:
        if kind == "pages":
            lists, listed = some_pages(length, 1, S, made)
            kept, dead = kept & listed[:, :, None], dead | ~listed
        held = k.masked_fill(dead[..., None], torch.nan)
        if slots:
            held = torch.nn.functional.pad(held, (0, 0, 0, slots), value=torch.nan)
        part = Place((0,), held, held[..., :rank], listed=kind == "pages")
    scale = (rank + rope) ** -0.5
    expected = truth(q, k, k[..., :rank], kept.expand(-1, heads, -1, -1), scale)
    unwritten(expected.shape, dtype)
    places = Table().places([part])
    out = triton_decode.decode(q, places, query, lists, length=length, scale=scale)
    assert out.dtype == dtype
    assert near(out, expected)
    return out


KINDS = ("everything", "pages", "ring")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [4, 16, 20, 32, 64, 128])
@pytest.mark.parametrize("queries", [1, 3])
def test_every_number_of_heads(kind, heads, queries):
    run(kind, heads=heads, queries=queries)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [BF16, HALF, SINGLE])
@pytest.mark.parametrize("dims", [(512, 64), (256, 64), (256, 32), (24, 8)])
def test_every_width_and_dtype(kind, dims, dtype):
    run(kind, dims=dims, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [16, 128])
def test_a_long_row_is_shared_by_many_programs(kind, heads):
    run(kind, lengths=(12001,), heads=heads)


@pytest.mark.parametrize("rows", [2, 40, 300])
def test_few_and_many_rows(rows):
    run("pages", lengths=tuple(range(300, 300 + 2 * rows, 2)))


def test_sixteen_new_tokens():
    run("everything", lengths=(5000, 17), queries=16)


def test_room_for_more_changes_no_bit():
    assert torch.equal(run("pages"), run("pages", slots=5000))


def test_a_new_length_compiles_nothing():
    found = []
    for lengths in ((700, 9), (64, 1), (8192, 8191)):
        for kind in KINDS:
            run(kind, lengths=lengths)
        found.append(compiled(triton_decode))
    assert found == [found[0]] * 3


@pytest.mark.parametrize("dtype", [BF16, SINGLE])
def test_a_store_is_filled_and_chosen_from_as_in_pytorch(dtype):
    made, past, (rank, rope) = torch.Generator(DEVICE).manual_seed(0), [610, 1300, 5], DIMS
    quest = Quest(0.2, 3)
    store = Full(Group((0,), selector=quest, rank=rank), 1400)

    def tokens(n: int) -> torch.Tensor:
        return torch.randn(3, 1, n, rank + rope, generator=made, device=DEVICE).to(dtype)

    k = tokens(max(past))
    store.create(k, k[..., :rank])
    store.append(k, k[..., :rank], Lengths([0] * 3, past, max(past)))
    for new in ([1, 1, 1], [3, 0, 2], [16, 5, 16]):
        k, lengths = tokens(max(new)), Lengths(past, new, max(new))
        held, low, high = (t.clone() for t in store.tensors())
        store.append(k, k[..., :rank], lengths)
        at = torch.tensor(past, device=DEVICE)[:, None] + torch.arange(max(new), device=DEVICE)
        rows = torch.tensor(lengths.rows, device=DEVICE)
        at = torch.where(at < rows[:, None], at, -1)
        into = Table().places([Place((0,), held, held[..., :rank], low=low, high=high)])
        triton_append.append(k, k[..., :rank], into, at)
        for b, n in enumerate(lengths.rows):
            assert torch.equal(held[b, :, :n], store.k[b, :, :n])
            for ours, name in ((low, "low"), (high, "high")):
                pages = -(-n // PAGE)
                assert torch.equal(ours[b, :, :pages], store.index[name][b, :, :pages])
        q = torch.randn(3, 16, 1, rank + rope, generator=made, device=DEVICE).to(dtype)
        found = triton_choose.pages(quest, q, store.index, rows, 0.02)
        wanted = quest.pages(q, store.index, rows, 0.02)
        assert torch.equal(found.count, wanted.count)
        for b in range(3):
            n = int(found.count[b, 0])
            assert found.pages[b, 0, :n].tolist() == wanted.pages[b, 0, :n].tolist()
        past = lengths.rows


def said(model, plan, ids, mask, replay: bool, **more):
    with hfsparse.patch(model, plan(model)):
        graphs = model.get_decoder()._hfsparse.graphs
        if not replay:
            graphs.never = "this test wants it eager"
        out = generate(model, ids, mask, **more)
        if replay:
            assert graphs.why is None
        return out.sequences.tolist(), torch.stack(out.logits, 1)


@pytest.mark.skipif(not latents.exists("deepseek_v3"), reason="expanded keys are cached")
@pytest.mark.parametrize("pads", [(0,), (0, 7, 13)])
@pytest.mark.parametrize("plan", [full, streaming, growing, mixed, choosing])
@pytest.mark.parametrize("dtype", [SINGLE, BF16])
def test_a_replay_is_the_eager_step_bit_for_bit(plan, pads, dtype):
    # Its experts, chosen by PyTorch in a loop, would have the host wait: all layers are dense.
    model = latents.fresh("deepseek_v3", first_k_dense_replace=3).to(DEVICE, dtype)
    ids, mask = (t.to(DEVICE) for t in left_padded(250, pads))
    want = said(model, plan, ids, mask, replay=False, new=30)
    got = said(model, plan, ids, mask, replay=True, new=30)
    assert got[0] == want[0]
    assert torch.equal(got[1], want[1])


@pytest.mark.skipif(not latents.exists("deepseek_v3"), reason="expanded keys are cached")
@pytest.mark.parametrize("plan", [full, streaming, mixed])
def test_the_gpu_says_what_the_cpu_says(plan, monkeypatch):
    monkeypatch.setattr("hfsparse.runtime.layout.default_block", lambda tokens, device: 128)
    model, (ids, mask) = latents.fresh("deepseek_v3"), left_padded(250, (0, 7))
    with hfsparse.patch(model, plan(model)):
        want = generate(model, ids, mask)
    model = model.to(DEVICE)
    with hfsparse.patch(model, plan(model)):
        got = generate(model, ids.to(DEVICE), mask.to(DEVICE))
    assert got.sequences.tolist() == want.sequences.tolist()
    assert near(torch.stack(got.logits, 1).cpu(), torch.stack(want.logits, 1))
