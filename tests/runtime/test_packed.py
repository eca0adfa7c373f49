"""Packed pages: what comes back of numbers, and steps over them against plain attention."""

from types import SimpleNamespace

import pytest
import torch

from hfsparse import kernels
from hfsparse.lists import PAGE, Band, HeadIndex
from hfsparse.lists.lengths import Lengths
from hfsparse.lists.packed import pack, unpack
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.cache.layer import CacheLayer
from hfsparse.runtime.counts import Counts
from hfsparse.runtime.decode import Step, decode
from hfsparse.runtime.layer_plan import Logits
from hfsparse.selectors.quest import Quest
from tests.helpers import close, truth


def stepped(t, bits, over):
    ends = t.amin(over, keepdim=True), t.amax(over, keepdim=True)
    return unpack(pack(t, *ends, bits), *ends, bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("over", [1, 2], ids=["keys", "values"])
def test_a_number_comes_back_within_half_a_step_and_ends_as_they_were(bits, dtype, over):
    """Of keys in 4 bits steps are 31 or 7: more of the channel that reaches farther, of a pair."""
    t = (torch.randn(3, PAGE, 8, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    t[0, :, 1] = 7  # all alike
    low, high = t.amin(over, keepdim=True), t.amax(over, keepdim=True)
    code = pack(t, low, high, bits)
    assert code.dtype == torch.uint8
    assert code.shape == (3, PAGE, 8 * bits // 8)
    found, span = stepped(t, bits, over), (high - low).double()
    steps = torch.full_like(span, 2**bits - 1)
    if (bits, over) == (4, 1):
        reach = high.float() - low.float()
        steps = torch.where(reach > reach[..., [6, 7, 4, 5, 2, 3, 0, 1]], 31.0, 7.0)
        assert steps.sum() == 3 * 4 * (31 + 7)
    rounding = t.double().abs() * torch.finfo(dtype).eps
    assert ((found.double() - t.double()).abs() <= span / steps / 2 * 1.001 + rounding).all()
    ends = (t == low) | (t == high)
    assert close(found[ends], t[ends])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_number_of_fp8_comes_back_within_a_sixteenth_of_itself(dtype):
    """Or, far under the farther end, which is as it was, within 2^-10 of a 448th of that."""
    t = (torch.randn(3, PAGE, 6, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    t[0, :, 1], t[1, :, 2], t[2, :, 3] = 0, -7, t[2, :, 3] * 1e-3
    t[2, 5, 3] = 50
    found, most = stepped(t, "fp8", 1), t.abs().amax(1, keepdim=True)
    near = (t.double() / 16).abs().maximum(most.double() / 448 / 1024)
    assert ((found.double() - t.double()).abs() <= near * 1.01).all()
    ends = t.abs() == most
    assert close(found[ends], t[ends])


def test_a_channel_that_stands_out_costs_the_others_nothing_by_page_and_much_by_token():
    """q · k of the same function, whose channel 3 is 30 times as large in k and as small in q."""
    drawn = torch.Generator().manual_seed(0)
    q, k = (torch.randn(PAGE, 16, generator=drawn) for _ in "qk")
    times = torch.ones(16)
    times[3] = 30
    lost = {}
    for name, by in (("plain", torch.ones(16)), ("outlier", times)):
        for over in (0, 1):
            found = (q / by) @ stepped(k * by, 4, over).mT
            lost[name, over] = ((found - q @ k.mT).norm() / (q @ k.mT).norm()).item()
    assert lost["outlier", 0] == pytest.approx(lost["plain", 0], rel=1e-3)
    assert lost["outlier", 1] > 4 * lost["outlier", 0]


GROUPS = (
    Group((0, 3), selector=Quest(0.3, 2, unit=16, bound=16), bits=4),
    Group((1,), Band(70, 40, 6554), bits=8),
    Group((2,), bits="fp8"),
    Group((4,), selector=Quest(0.2, 2), bits=4),
    Group((5,), Band(4, 9)),
)


def kept_by(store, q, step, scale) -> torch.Tensor:
    """bool [B, Hq, Q, N]: what a step's queries read of a store's slots."""
    rows = step.lengths.rows
    full = store.group.selector or store.capacity
    at = torch.arange(store.capacity)[None] if full else store.positions(rows)
    at = torch.where(at < step.length[:, None], at, -1)[:, None, None]
    query = step.query_pos[:, None, :, None]
    kept = (at >= 0) & (at <= query)
    if not full:
        start = store.band.start(step.query_pos)[:, None, :, None]
        kept &= (
            (at < store.band.sink) | (at >= start) | (step.length < store.below).view(-1, 1, 1, 1)
        )
    kept = kept.expand(-1, q.shape[1], -1, -1)
    if store.group.selector is None:
        return kept
    lists = store.group.selector.pages(q, store.indexed(None), step.length, scale)
    read = torch.zeros(*lists.pages.shape[:2], store.capacity // lists.unit + 1)
    used = torch.arange(lists.pages.shape[2]) < lists.count[..., None]
    read.scatter_(2, torch.where(used, lists.pages, read.shape[2] - 1), 1)
    read = read[..., :-1].repeat_interleave(lists.unit, 2).bool()
    return kept & read.repeat_interleave(q.shape[1] // read.shape[1], 1)[:, :, None]


@pytest.mark.parametrize(
    ("ratio", "dims", "dtype", "past", "below", "softcap", "sinks"),
    [
        (3, (16, 16), torch.float32, [300, 63, 129], 0, None, False),
        (1, (8, 12), torch.bfloat16, [64, 200], 150, 5.0, True),
        (4, (16, 8), torch.float16, [190], 0, None, True),
        (8, (8, 8), torch.float32, [127, 1], 0, 5.0, False),
    ],
    ids=["gqa3", "below", "gqa4-sinks", "gqa8-softcap"],
)
def test_steps_over_packed_stores_are_plain_attention_over_what_these_hold(
    ratio, dims, dtype, past, below, softcap, sinks
):
    drawn, heads = torch.Generator().manual_seed(0), 6

    def random(n, tokens, dim):
        return torch.randn(len(past), n, tokens, dim, generator=drawn).to(dtype)

    layer = CacheLayer("plan", GROUPS, below)
    k, v = (random(heads, max(past), dim) for dim in dims)
    for b, n in enumerate(past):
        k[b, :, n:], v[b, :, n:] = torch.nan, torch.nan
    layer.lazy_initialization(k, v)
    for store in layer.stores:
        at = list(store.group.heads)
        store.append(k[:, at], v[:, at], Lengths([0] * len(past), past, max(past)))
    own = SimpleNamespace(
        **dict(groups=GROUPS, counts=Counts(heads * ratio), shared=False, producer=None),
        **dict(last_reader=None, at=HeadIndex(), extends=lambda tokens: None, kv_heads=heads),
    )
    bare = torch.linspace(-2, 3, heads * ratio) if sinks else None
    logits = Logits(dims[0] ** -0.5, softcap, bare)
    for new in ([1] * len(past), [9, 4, 2][: len(past)], [1] * len(past)):
        lengths = Lengths(past, new, max(new))
        q, k, v = (
            random(n, max(new), d)
            for n, d in ((heads * ratio, dims[0]), *zip((heads,) * 2, dims, strict=True))
        )
        at = torch.tensor(past)[:, None] + torch.arange(max(new))
        at = torch.where(at < torch.tensor(lengths.rows)[:, None], at, -1)
        step = Step(lengths, torch.tensor(lengths.rows), at, lengths.longest)
        found = decode(kernels.TABLES, own, layer, q, k, v, step, logits)
        for store in layer.stores:
            mine = [h * ratio + i for h in store.group.heads for i in range(ratio)]
            kept = kept_by(store, q[:, mine], step, logits.scale)
            more = {"softcap": softcap, "s_aux": bare if bare is None else bare[mine]}
            wanted = truth(q[:, mine], *store.read(lengths.rows), kept, logits.scale, **more)
            live = (at >= 0)[:, None, :, None].expand_as(wanted)
            assert close(found[:, mine][live], wanted[live], dtype), store.group
        past = lengths.rows


@pytest.mark.parametrize("left", [70, 127, 130])
def test_steps_that_tell_the_host_nothing_are_taken_back_as_others_are(left):
    """Replayed ones do: a page that is held packed alone since is begun anew all the same."""
    drawn, read = torch.Generator().manual_seed(0), []
    k, v = (torch.randn(1, 2, 260, 8, generator=drawn) for _ in "kv")
    for told in (True, False):
        layer = CacheLayer("plan", (Group((0,), bits=8), Group((1,), Band(4, 150), bits=4)))
        layer.lazy_initialization(k, v)
        for past, n in ((0, 100), *((p, p + 1) for p in range(100, 200)), (left, 260)):
            if past == left:
                layer.take_back(200 - left)
            for store in layer.stores:
                at = list(store.group.heads)
                before = store.snapshot()
                store.append(k[:, at, past:n], v[:, at, past:n], Lengths([past], [n - past], n))
                if not told and n == past + 1:
                    store.restore(before)
            layer.rows, layer.seen, layer.stored = [n], n, n
        read.append([t[..., :260, :] for store in layer.stores for t in store.read([260])])
    assert all(map(torch.equal, *read))
