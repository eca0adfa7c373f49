"""Pages in host memory, fetched into a hot set: against PyTorch, and compiled for a GPU."""

import pytest
import torch

from hfsparse.kernels import fetch as reference
from hfsparse.kernels import reference as attention
from hfsparse.kernels.per_store import by_store
from hfsparse.kernels.positions import NewTokens
from hfsparse.lists import PAGE, HeadIndex, PageLists
from hfsparse.lists.hot import Hot
from hfsparse.lists.lengths import Lengths
from hfsparse.lists.packed import NEWEST, Packed, width_of
from hfsparse.lists.places import Place, Places
from hfsparse.runtime.cache import host
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.cache.host import HostPacked
from hfsparse.runtime.cache.packed import PackedFull
from hfsparse.selectors.quest import Quest
from tests.kernels.interpreter import interpreter
from tests.kernels.launches import compiled


def hot_of(B, H, pages, slots, unit, below, dims=(8, 6), dtype=torch.float32):
    """An empty hot set beside random pages."""
    drawn = torch.Generator().manual_seed(0)
    host = (torch.randn(B, H, pages * PAGE, d, generator=drawn).to(dtype) for d in dims)
    held = (torch.full((B, H, NEWEST + slots * unit, d), torch.nan).to(dtype) for d in dims)
    table = torch.full((B, H, pages * PAGE // unit), -1).int()
    owner, stamp = torch.full((B, H, slots), -1).int(), torch.zeros(B, H, slots).int()
    return Hot(unit, below, *held, *host, table, owner, stamp, torch.zeros(B, H).int())


def packed_of(B, H, pages, slots, bits, dims=(8, 6), dtype=torch.float32):
    """As `hot_of`, of random pages in fewer bits."""
    made = hot_of(B, H, pages, slots, PAGE, 0, dims, dtype)
    drawn, both = torch.Generator().manual_seed(0), []
    newest = (torch.randn(B, H, NEWEST, d, generator=drawn).to(dtype) for d in dims)
    newest = [*newest]
    for n in (slots, pages):
        codes = (
            torch.randint(256, (B, H, n, PAGE, d * width_of(bits) // 8), generator=drawn)
            for d in dims
        )
        ends = ((dims[0],), (dims[0],), (PAGE,), (PAGE,))
        ends = (torch.randn(B, H, n, *size, generator=drawn).to(dtype) for size in ends)
        both.append(Packed(bits, *(t.to(torch.uint8) for t in codes), *ends, *newest))
    (k, v, *_), (host_k, host_v, *_) = (each.pages for each in both)
    more = {"k": k, "v": v, "host_k": host_k, "host_v": host_v}
    return made._replace(**more, packed=both[0], pages=both[1])


def some_lists(drawn, B, H, length, width, unit) -> PageLists:
    """Ascending units of rows, others in each head; those beyond the count name any."""
    pages, count = torch.zeros(B, H, width).long(), torch.zeros(B, H).long()
    for b, n in enumerate(length.tolist()):
        for h in range(H):
            total = -(-n // unit)
            count[b, h] = min(total, int(torch.randint(1, width + 1, (), generator=drawn)))
            chosen = torch.randperm(total, generator=drawn)[: count[b, h]].sort().values
            pages[b, h, : len(chosen)] = chosen
    return PageLists(pages, count, unit)


@pytest.mark.parametrize(
    ("unit", "below", "slots", "width", "bits"),
    [(64, 0, 4, 4, 16), (16, 200, 16, 9, 16), (1, 0, 150, 40, 16), (64, 0, 4, 4, 4)],
    ids=["pages", "units-below", "tokens", "packed"],
)
def test_the_kernel_fetches_what_pytorch_does(unit, below, slots, width, bits):
    B, H, pages = 3, 2, 7

    def make():
        if bits == 16:
            return hot_of(B, H, pages, slots, unit, below)
        return packed_of(B, H, pages, slots, bits)

    drawn = torch.Generator().manual_seed(1)
    with interpreter(triton__fetch__COPIES=2) as run:  # of more misses
        found, wanted = make(), make()
        reads = [torch.zeros(H, 2).long() for _ in "fw"]
        for step in range(5):
            length = torch.tensor([pages * PAGE - 5 + step, 130 + step, 0])
            lists = some_lists(drawn, B, H, length, width, unit)
            if below:
                short = (length < below)[:, None]
                lists = PageLists(lists.pages, lists.count.masked_fill(short, 0), unit)
            more = {"lists": lists, "length": length}
            ours = run("triton.fetch.fetch", hot=found, read=reads[0], **more)
            truth = reference.fetch(wanted, read=reads[1], **more)
            for name in ("pages", "count", "lies"):
                assert torch.equal(getattr(ours, name), getattr(truth, name)), name
            for a, b in zip(found.tensors(), wanted.tensors(), strict=True):
                assert torch.equal(a.nan_to_num(9), b.nan_to_num(9))
            assert torch.equal(*reads)
    assert 0 < reads[0][0, 0] < reads[0][0, 1]


def test_what_was_read_least_recently_makes_room_and_every_list_finds_its_keys():
    B, H, pages, slots = 2, 2, 12, 3
    hot, drawn = hot_of(B, H, pages, slots, 64, 0), torch.Generator().manual_seed(2)
    length = torch.tensor([pages * PAGE, 9 * PAGE + 1])
    when = torch.zeros(B, H, pages).int()  # each page was read last
    for step in range(1, 13):
        lists = some_lists(drawn, B, H, length, slots, 64)
        found = reference.fetch(hot, lists, length)
        for b, h in ((b, h) for b in range(B) for h in range(H)):
            newest = (int(length[b]) - 1) // PAGE - 1
            n = int(lists.count[b, h])
            for page, lies in zip(lists.pages[b, h, :n], found.lies[b, h, :n], strict=True):
                if page >= newest:
                    assert lies == page % 2
                    continue
                when[b, h, page] = step
                at, lies = (slice(p * PAGE, (p + 1) * PAGE) for p in (page, lies))
                assert torch.equal(hot.k[b, h, lies], hot.host_k[b, h, at])
                assert torch.equal(hot.v[b, h, lies], hot.host_v[b, h, at])
            held = [p for p in hot.owner[b, h].tolist() if p >= 0]
            assert (hot.table[b, h] >= 0).nonzero()[:, 0].tolist() == sorted(held)
            gone = [p for p in range(pages) if p not in held]
            assert when[b, h, gone].max() <= when[b, h, held].min()
    assert when.amin(2).max() < when.amax(2).min() == 12  # some went, and were fetched again


@pytest.mark.parametrize("bits", [8, 4, "fp8"])
def test_packed_pages_are_read_out_of_their_slots_as_where_they_all_lie(monkeypatch, bits):
    """Two rows, one that ends a page; the newest page is named, too."""
    monkeypatch.setattr(host, "why_not", lambda device: None)
    drawn, rows = torch.Generator().manual_seed(0), [450, 384]
    k, q = (torch.randn(2, h, n, 16, generator=drawn) for h, n in ((2, 450), (6, 1)))
    selector = Quest(0.4, 2)
    kept = PackedFull(Group((0, 1), selector=selector, bits=bits), 0)
    hosted = HostPacked(Group((0, 1), selector=selector, bits=bits, hot=0.5), 0)
    for store in (kept, hosted):
        store.create(k, k)
        store.append(k, k, Lengths([0, 0], rows, 450))
    length, whole = torch.tensor(rows), kept.place()
    new = NewTokens(Lengths([449, 383], [1, 1], 1), length, length[:, None] - 1, 450)
    with interpreter() as run:
        for _ in range(3):
            lists = some_lists(drawn, 2, 2, length, 4, PAGE)
            lists.pages[0, 0, lists.count[0, 0] - 1] = 7
            place = hosted.place()
            found = reference.fetch(place.hot, lists, length)
            part = Place(
                (0, 1), *place.packed[-2:], listed=True, packed=place.packed, hot=place.hot
            )
            more = {"length": length, "scale": 0.3}
            ours = run("triton.decode_store.decode", q, part, new.query_pos, found, **more)
            places = Places([whole], torch.zeros(2, 1), 1, HeadIndex())
            truth = by_store(attention.decode)(q, places, new, [lists], scale=0.3)
            assert (ours - truth).abs().max() < 1e-5
            places = places._replace(parts=[place])
            again = by_store(attention.decode)(q, places, new, [found], scale=0.3)
            assert torch.equal(again, truth)


@pytest.mark.parametrize(
    ("unit", "slots", "width", "bits"),
    [(64, 246, 143, 16), (16, 7872, 3950, 16), (64, 246, 143, 4)],
)
def test_all_of_a_step_compiles_for_an_h100(monkeypatch, unit, slots, width, bits):
    """A hot set of 0.12 of 131,072 tokens, and of a million in parts of pages."""
    pytest.importorskip("triton")
    from hfsparse.kernels.triton import decode_store, fetch, write_out

    kernels = (fetch, "_claim"), (fetch, "_copy"), (write_out, "_write_out")
    made = [compiled(monkeypatch, *each) for each in (*kernels, (decode_store, "_decode_store"))]
    monkeypatch.setattr(decode_store, "merge_shares", lambda *shares: None)
    dims, packed = ((128, 128), torch.bfloat16), bits != 16
    hot = packed_of(1, 2, 4, 2, bits, *dims) if packed else hot_of(1, 2, 4, 2, unit, 0, *dims)
    slot, length = torch.zeros(1, 2, slots).int(), torch.tensor([200])
    hot, q = hot._replace(owner=slot, stamp=slot), torch.zeros(1, 8, 1, 128).bfloat16()
    lists = PageLists(torch.zeros(1, 2, width).long(), torch.ones(1, 2).long(), unit)
    lists = fetch.fetch(hot, lists, length, torch.zeros(2, 2).long())
    if not packed:
        write_out.write_out(hot, q[:, :2], q[:, :2], torch.arange(2), length[:, None] - 1)
    own = hot.packed[-2:] if packed else (hot.k, hot.v)
    part = Place((0, 1), *own, size=NEWEST, listed=True, hot=hot, packed=hot.packed)
    decode_store.decode(q, part, length[:, None] - 1, lists, length=length, scale=1.0)
    (claim,), *_, (decode,) = made
    assert "bar.sync" in claim.asm["ptx"]
    assert claim.metadata.shared <= 48 << 10
    assert 0 < decode.metadata.shared <= 227 << 10
