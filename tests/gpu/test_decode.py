"""Triton's decode kernel on the GPU against plain float32 attention: rings, pages, everything."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from hfsparse.kernels.positions import ring_positions
from hfsparse.kernels.triton import decode as triton_decode
from hfsparse.lists import PAGE, Band, PageLists
from hfsparse.lists.places import Place, Table
from tests.gpu.common import BF16, DEVICE, HALF, SINGLE, compiled, near, unwritten
from tests.helpers import truth

KINDS = ("everything", "ring", "pages", "mixed")
BANDS = {"ring": Band(sink=5, recent=90, rate=6554), "other ring": Band(recent=40)}


@dataclass
class Step:
    """New queries at the ends of cached rows; whatever must not be read is NaN."""

    q: Tensor  # [B, Hq, Q, D]
    k: Tensor  # [B, Hkv, S, D] by position
    v: Tensor
    parts: list[Place]  # the same as it is cached
    pages: PageLists | None
    query: Tensor  # [B, Q] positions
    length: Tensor  # [B]
    kept: Tensor  # bool [B, Hq, Q, S]
    scale: float

    def run(self, **logits) -> Tensor:
        return triton_decode.decode(
            *(self.q, Table().places(self.parts), self.query, self.pages),
            length=self.length,
            scale=self.scale,
            **logits,
        )

    def check(self, **logits) -> None:
        expected = truth(self.q, self.k, self.v, self.kept, self.scale, **logits)
        unwritten(expected.shape, self.v.dtype)
        out = self.run(**logits)
        assert out.dtype == self.v.dtype
        assert near(out, expected)


def step(
    kind: str = "everything",
    lengths=(700, 130, 9),
    queries: int = 1,
    group: int = 4,
    dim: int = 128,
    value_dim: int | None = None,
    dtype: torch.dtype = BF16,
    kv_heads: int = 2,
    unit: int = PAGE,
) -> Step:
    made = torch.Generator(DEVICE).manual_seed(0)
    kinds = [kind] * kv_heads
    if kind == "mixed":  # each twice, apart from one another
        kinds = ["everything", "pages", "ring", "other ring"] * 2
    B, S, Hkv = len(lengths), max(lengths), len(kinds)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, device=DEVICE).to(dtype)

    q = random(B, queries, group * Hkv, dim).transpose(1, 2)
    k, v = random(B, Hkv, S, dim), random(B, Hkv, S, value_dim or dim)
    length, key = torch.tensor(lengths, device=DEVICE), torch.arange(S, device=DEVICE)
    query = length[:, None] - queries + torch.arange(queries, device=DEVICE)
    query = query.clamp(min=-1)  # rows of fewer tokens than queries
    kept = (key <= query[..., None])[:, None].repeat(1, Hkv, 1, 1)
    parts, lists = [], None
    for name in dict.fromkeys(kinds):
        heads = [h for h, other in enumerate(kinds) if other == name]
        if name in BANDS:
            parts.append(ring(k, v, length, heads, BANDS[name], queries))
            start, first = BANDS[name].start(query)[..., None], key < BANDS[name].sink
            kept[:, heads] &= (first | (key >= start))[:, None]
            continue
        dead = (key >= length[:, None])[:, None]
        if name == "pages":
            lists, listed = some_pages(length, len(heads), S, made, unit)
            kept[:, heads] &= listed[:, :, None]
            dead = dead | ~listed
        dead = dead[..., None]
        held = (t[:, heads].masked_fill(dead, torch.nan) for t in (k, v))
        parts.append(Place(tuple(heads), *held, listed=name == "pages"))
    kept = kept.repeat_interleave(group, 1)
    return Step(q, k, v, parts, lists, query, length, kept, dim**-0.5)


def ring(k: Tensor, v: Tensor, length: Tensor, heads: list[int], band: Band, queries: int) -> Place:
    """Some heads' rows as a ring holds them that is just large enough."""
    size = band.span(int(length.max())) + queries
    at = ring_positions(length, torch.full_like(length, band.sink), band.sink, size)
    at = at[:, None, :, None]
    held = (t[:, heads] for t in (k, v))
    spots = at.clamp(min=0).expand(-1, len(heads), -1, -1)
    held = [t.gather(2, spots.expand(-1, -1, -1, t.shape[3])) for t in held]
    return Place(tuple(heads), *(t.masked_fill(at < 0, torch.nan) for t in held), band, size)


def some_pages(
    length: Tensor, kv_heads: int, slots: int, made, unit: int = PAGE
) -> tuple[PageLists, Tensor]:
    """Half of each row's units, others in each kv head, and which slots [B, Hkv, S] they hold."""
    width = -(-slots // unit)
    at = torch.arange(width, device=DEVICE)
    total = -(-length // unit)[:, None, None]
    draw = torch.rand(len(length), kv_heads, width, generator=made, device=DEVICE)
    count = -(-total[..., 0] // 2).expand(-1, kv_heads)
    keep = torch.zeros(len(length), kv_heads, width, dtype=torch.bool, device=DEVICE)
    for b in range(len(length)):
        for h in range(kv_heads):
            keep[b, h, draw[b, h, : int(total[b])].argsort()[: int(count[b, h])]] = True
    lists = torch.where(keep, at, width).sort(-1).values.clamp(max=width - 1)
    return PageLists(lists, count, unit), keep.repeat_interleave(unit, 2)[..., :slots]


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256, 512])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("everything", BF16), ("pages", BF16), ("everything", HALF), ("everything", SINGLE)],
    ids=str,
)
def test_every_head_dim_and_dtype(kind, dim, dtype):
    if dim == 512 and dtype == SINGLE:
        pytest.skip("too wide for any GPU")
    step(kind, dim=dim, dtype=dtype).check()


@pytest.mark.parametrize("queries", [1, 2, 5, 16])
@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_every_group_and_number_of_new_tokens(kind, group, queries):
    step(kind, queries=queries, group=group).check()


@pytest.mark.parametrize(("queries", "dtype"), [(1, BF16), (3, HALF)], ids=str)
@pytest.mark.parametrize("unit", [1, 8, 16, 32])
@pytest.mark.parametrize("kind", ["pages", "mixed"])
def test_units_smaller_than_pages(kind, unit, queries, dtype):
    step(kind, unit=unit, queries=queries, dtype=dtype).check()
    step(kind, lengths=(20001, 77), unit=unit, queries=queries, dtype=dtype, kv_heads=8).check()


@pytest.mark.parametrize("kind", ["ring", "pages", "mixed"])
@pytest.mark.parametrize(("softcap", "sinks"), [(5.0, False), (None, True), (5.0, True)])
def test_softcap_and_sink_logits(kind, softcap, sinks):
    it = step(kind, queries=3, dtype=HALF)
    s_aux = torch.linspace(-2, 3, it.q.shape[1], device=DEVICE) if sinks else None
    it.check(softcap=softcap, s_aux=s_aux)


@pytest.mark.parametrize(("dim", "value_dim"), [(128, 64), (64, 128)])
def test_values_of_another_width(dim, value_dim):
    step(dim=dim, value_dim=value_dim).check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_row_is_shared_by_many_programs(kind):
    step(kind, lengths=(40001,), kv_heads=8).check()


@pytest.mark.parametrize("rows", [2, 40])
def test_few_and_many_rows(rows):
    step("pages", lengths=tuple(range(300, 300 + 7 * rows, 7)), kv_heads=8).check()


def test_a_row_without_keys_gives_zeros():
    it = step("mixed", lengths=(50, 0), queries=2)
    unwritten(it.q.shape, BF16)
    out = it.run()
    assert not out[1].any()
    assert out[0].all()


@pytest.mark.parametrize("kind", ["everything", "pages", "mixed"])
def test_room_for_more_changes_no_bit(kind):
    it = step(kind)
    roomy = [part if part.size else more(part, 5000) for part in it.parts]
    assert torch.equal(replace(it, parts=roomy).run(), it.run())


def more(part: Place, slots: int) -> Place:
    k, v = (pad(t, (0, 0, 0, slots), value=torch.nan) for t in (part.k, part.v))
    return part._replace(k=k, v=v)


def test_queries_in_any_layout_give_the_same():
    it = step("pages", queries=3)
    assert torch.equal(replace(it, q=it.q.contiguous()).run(), it.run())


def test_a_new_length_compiles_nothing():
    found = []
    for lengths in ((700, 9), (64, 1), (8192, 8191), (3333, 100)):
        for kind in KINDS:
            step(kind, lengths=lengths).check()
        found.append(compiled(triton_decode))
    assert found == [found[0]] * 4
