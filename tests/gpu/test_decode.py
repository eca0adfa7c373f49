"""Triton's decode kernel on the GPU against plain float32 attention: rings, pages, everything."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from hfsparse.kernels import triton_decode
from hfsparse.lists import PAGE, Band, PageLists
from tests.gpu.common import BF16, DEVICE, HALF, SINGLE, compiled, near, unwritten
from tests.helpers import truth

KINDS = ("everything", "positions", "ring", "pages")


@dataclass
class Step:
    """New queries at the ends of cached rows; whatever must not be read is NaN."""

    q: Tensor  # [B, Hq, Q, D]
    k: Tensor  # [B, Hkv, S, D]
    v: Tensor
    query: Tensor  # [B, Q] positions
    key: Tensor | None  # [B, S] positions; None: a slot's own
    length: Tensor  # [B]
    kept: Tensor  # bool [B, Hq, Q, S]
    more: dict  # arguments of the kernel

    def run(self, **logits) -> Tensor:
        return triton_decode.decode(
            *(self.q, self.k, self.v, self.query, self.key),
            length=self.length,
            **self.more,
            **logits,
        )

    def check(self, **logits) -> None:
        scale = self.more["scale"]
        expected = truth(self.q, self.k, self.v, self.kept, scale, **logits)
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
) -> Step:
    made = torch.Generator(DEVICE).manual_seed(0)
    B, S, H = len(lengths), max(lengths), group * kv_heads

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, device=DEVICE).to(dtype)

    q = random(B, queries, H, dim).transpose(1, 2)
    k, v = random(B, kv_heads, S, dim), random(B, kv_heads, S, value_dim or dim)
    length = torch.tensor(lengths, device=DEVICE)
    slot = torch.arange(S, device=DEVICE)
    query = length[:, None] - queries + torch.arange(queries, device=DEVICE)
    query = query.clamp(min=-1)  # rows of fewer tokens than queries
    key = torch.where(slot < length[:, None], slot, -1)
    if kind == "ring":  # the rows' slots turned by a third
        turn = (slot - length[:, None] // 3) % length[:, None].clamp(min=1)
        key = torch.where(key < 0, -1, turn)
    kept = ((key >= 0)[:, None] & (key[:, None] <= query[..., None]))[:, None]
    kept = kept.expand(B, H, queries, S)
    more = {"scale": dim**-0.5}
    if kind == "ring":
        band = Band(sink=5, recent=90, rate=6554)
        start = band.start(query)
        kept = kept & ((key[:, None] < 5) | (key[:, None] >= start[..., None]))[:, None]
        more |= {"start": start, "sink": band.sink}
    if kind == "pages":
        more["pages"], listed = some_pages(length, kv_heads, S, made)
        kept = kept & listed.repeat_interleave(group, 1)[:, :, None]
    dead = (key < 0)[:, None]
    if kind == "pages":
        dead = dead | ~listed
    k, v = (t.masked_fill(dead[..., None], torch.nan) for t in (k, v))
    held = key if kind in ("positions", "ring") else None
    return Step(q, k, v, query, held, length, kept, more)


def some_pages(length: Tensor, kv_heads: int, slots: int, made) -> tuple[PageLists, Tensor]:
    """Half of each row's pages, others in each kv head, and which slots [B, Hkv, S] they hold."""
    width = -(-slots // PAGE)
    page = torch.arange(width, device=DEVICE)
    total = -(-length // PAGE)[:, None, None]
    draw = torch.rand(len(length), kv_heads, width, generator=made, device=DEVICE)
    count = -(-total[..., 0] // 2).expand(-1, kv_heads)
    keep = torch.zeros(len(length), kv_heads, width, dtype=torch.bool, device=DEVICE)
    for b in range(len(length)):
        for h in range(kv_heads):
            keep[b, h, draw[b, h, : int(total[b])].argsort()[: int(count[b, h])]] = True
    lists = torch.where(keep, page, width).sort(-1).values.clamp(max=width - 1)
    return PageLists(lists, count), keep.repeat_interleave(PAGE, 2)[..., :slots]


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("everything", BF16), ("pages", BF16), ("everything", HALF), ("everything", SINGLE)],
    ids=str,
)
def test_every_head_dim_and_dtype(kind, dim, dtype):
    step(kind, dim=dim, dtype=dtype).check()


@pytest.mark.parametrize("queries", [1, 2, 5, 16])
@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_every_group_and_number_of_new_tokens(kind, group, queries):
    step(kind, queries=queries, group=group).check()


@pytest.mark.parametrize("kind", ["ring", "pages"])
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
    it = step(lengths=(50, 0), queries=2)
    unwritten(it.q.shape, BF16)
    out = it.run()
    assert not out[1].any()
    assert out[0].all()


@pytest.mark.parametrize("kind", KINDS)
def test_room_for_more_changes_no_bit(kind):
    it = step(kind)
    out = it.run()
    k, v = (pad(t, (0, 0, 0, 5000), value=torch.nan) for t in (it.k, it.v))
    key = None if it.key is None else pad(it.key, (0, 5000), value=-1)
    assert torch.equal(replace(it, k=k, v=v, key=key).run(), out)


def test_heads_inside_tokens_give_the_same():
    it = step("pages", queries=3)
    k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (it.k, it.v))
    assert torch.equal(replace(it, k=k, v=v).run(), it.run())


def test_a_new_length_compiles_nothing():
    found = []
    for lengths in ((700, 9), (64, 1), (8192, 8191), (3333, 100)):
        for kind in KINDS:
            step(kind, lengths=lengths).check()
        found.append(compiled(triton_decode))
    assert found == [found[0]] * 4
