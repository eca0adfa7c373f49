"""What is chosen and computed depends on no global state of PyTorch: each against the plain run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from hfsparse.kernels import dense, plain, reference
from hfsparse.lists import PAGE, BlockLists, PageLists
from hfsparse.lists.choice import Choice
from hfsparse.precision import exact
from hfsparse.selectors import DeviceTensor
from tests.helpers import Batch, batch, close
from tests.kernels.interpreter import interpreter
from tests.kernels.stores import one
from tests.patterns.matrix import FUSED, SELECTOR_ROWS, SETTINGS, heads, mixed
from tests.selectors.test_quest import rows
from tests.worlds import coarse_products, default_dtype, deterministic

QUEST = SELECTOR_ROWS["quest"].settings


STATES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "bfloat16_by_default": lambda: default_dtype(torch.bfloat16),
    "float64_by_default": lambda: default_dtype(torch.float64),
    "meta_by_default": lambda: torch.device("meta"),
    "products_in_bfloat16": coarse_products,
    "deterministic": deterministic,
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
}
ROUNDING = {"products_in_bfloat16"}  # what the reference follows, as PyTorch's attention does
every_state = pytest.mark.parametrize("state", STATES)


def under(state: str, name: str, *args, **more):
    """`hfsparse.kernels.<name>` or `tests.<name>` of these arguments, under a state."""
    module, function = name.rsplit(".", 1)
    module = module if module.startswith("tests.") else f"hfsparse.kernels.{module}"
    with STATES.get(state, nullcontext)():
        return getattr(import_module(module), function)(*args, **more)


@pytest.fixture(scope="module")
def run():
    """An interpreted kernel: the plain run, or that under a state."""
    with interpreter() as run:
        yield lambda *args, **more: run("tests.patterns.test_global_state.under", *args, **more)


@pytest.fixture
def same():
    """A check: what `work` answers under a state equals what it answers without."""

    def check(state: str, work, *args) -> None:
        plain = work(*args)
        with STATES[state]():
            found = work(*args)
        for ours, theirs in zip(tensors(found), tensors(plain), strict=True):
            assert ours.dtype == theirs.dtype
            assert ours.device == theirs.device
            assert torch.equal(ours, theirs)

    return check


def tensors(made) -> list[torch.Tensor]:
    if isinstance(made, torch.Tensor):
        return [made]
    if isinstance(made, tuple | list):
        return [t for part in made for t in tensors(part)]
    if isinstance(made, PageLists):
        return [made.count, made.pages]
    if isinstance(made, BlockLists):
        names = "full_count full_index part_count part_index columns covered cut".split()
        held = [getattr(made, name) for name in names]
        return [t for t in (*held, made.pairs(), made.blocks()) if t is not None]
    return []


def drawn(length: int, **shape) -> Callable[[], Batch]:
    """A batch of numbers that are drawn here; its grid, which keeps what it worked out, is new."""
    it = batch(length, past=45, rows="left_padded", **shape)
    return lambda: replace(it, grid=replace(it.grid))


@every_state
@pytest.mark.parametrize("name", SETTINGS)
def test_patterns_choose_the_same(same, state, name):
    def work():
        it = made()
        return SETTINGS[name].lists(it.q, it.k, it.grid, it.scale)

    made = drawn(700, group=2, dim=64)
    same(state, work)


@every_state
@pytest.mark.parametrize("name", QUEST)
def test_selectors_choose_the_same(same, state, name):
    q, k, _, _, length = rows([64 * 21 + 5, 64 * 9, 17, 0], 3)
    pages = k.unflatten(2, (-1, PAGE))
    at = torch.arange(k.shape[2]).view(1, 1, -1, PAGE, 1)
    index = QUEST[name].summarise(pages, at < length.view(-1, 1, 1, 1, 1))
    choice = Choice.none(4, 2, QUEST[name].budget.width(pages.shape[2], 3), q.device)

    def work():
        for kept in choice.tensors():
            kept.zero_()
        read = torch.zeros(2, dtype=torch.int64, device="cpu")
        more = index, length, 0.7, slice(None), PAGE, choice, read
        fresh = plain.select(QUEST[name], q, *more)
        return fresh, *choice.tensors(), read

    same(state, work)


@every_state
@pytest.mark.parametrize("kind", [kind for kind, row in SELECTOR_ROWS.items() if row.table])
def test_selectors_are_bound_to_the_same(same, state, kind):
    setting, table = next(iter(SELECTOR_ROWS[kind].settings.values())), SELECTOR_ROWS[kind].table

    def work():
        held = vars(setting.bind(1, [0, 1], data)).values()
        return [each.tensor for each in held if isinstance(each, DeviceTensor)]

    data = table(2, 2, 8)
    assert len(work()) > 1
    same(state, work)


@every_state
def test_the_reference_computes_the_same(same, state):
    it = drawn(150, poison=0.0)()
    lists, kv = mixed(it), heads(it)
    length = it.grid.k_len
    query_pos = length[:, None] - 2 + torch.arange(2)
    pages = PageLists(torch.arange(4).expand(3, 2, -1), torch.full((3, 2), 2))
    sinks = torch.linspace(-1, 1, it.q.shape[1])

    def work():
        more = {"scale": it.scale, "s_aux": sinks}
        out = reference.prefill(it.q, it.k, it.v, lists, kv, **more)
        few = it.q[:, :, :2], it.k, it.v, query_pos
        listed = reference.decode(*few, None, pages, length=length, **more)
        return out, listed, reference.decode(*few, length=length, **more)

    if state not in ROUNDING:
        return same(state, work)
    plain = work()
    with STATES[state]():
        assert all(close(a, b, torch.bfloat16) for a, b in zip(work(), plain, strict=True))


@every_state
def test_dense_attention_keeps_the_values_dtype(state):
    """Autocast's own rounding is the model's, but kernels of one layer answer alike."""
    made = drawn(70, poison=0.0)
    plain = None
    for context in (nullcontext, STATES[state]):
        with context():
            it = made()
            out = dense.prefill(it.q, it.k, it.v, it.grid, scale=it.scale)
        assert out.dtype == it.v.dtype
        plain = out if plain is None else plain
        assert close(out, plain, torch.bfloat16)


@every_state
def test_the_table_of_places_is_the_same(same, state):
    k = torch.zeros(2, 3, 128, 16)
    same(state, lambda: one(k, k).cells)


@pytest.mark.parametrize("state", ["bfloat16_by_default", "meta_by_default", "autocast"])
def test_kernels_compute_the_same(run, state):
    """Each kernel once: buffers of theirs take no default."""
    it = batch(40, past=30, rows="empty_row", group=1, kv_heads=1, poison=0.0)
    kv = heads(it)
    for name in FUSED:
        args = "triton.estimate.lists", SETTINGS[name], it.q, it.k, it.grid, it.scale
        lists = run("", *args)
        found = run(state, *args)
        assert all(map(torch.equal, tensors(found), tensors(lists)))
        args = "triton.prefill.prefill", it.q, it.k, it.v, lists, kv
        assert torch.equal(run(state, *args, scale=0.25), run("", *args, scale=0.25))
        assert torch.equal(run(state, "triton.count.pairs", lists), lists.pairs())
    q, k, v, index, length = rows([64 * 5 + 5, 64 * 3])
    args = "triton.choose.pages", QUEST["quest"], q, index, length, 0.7
    pages = run("", *args)
    assert all(map(torch.equal, tensors(run(state, *args)), tensors(pages)))
    args = "tests.kernels.stores.decode", q, k, v, length[:, None] - 1, pages
    more = {"length": length, "scale": 0.7}
    assert torch.equal(run(state, *args, **more), run("", *args, **more))
    stored = []
    for one_state in ("", state):
        into = {"into_k": torch.zeros_like(k), "into_v": torch.zeros_like(v)}
        new = {"k": k[:, :, :1], "v": v[:, :, :1], "query_pos": length[:, None] - 1}
        run(one_state, "tests.kernels.stores.append", **new, **into)
        stored.append(into)
    assert all(torch.equal(stored[0][n], stored[1][n]) for n in stored[0])
    assert stored[0]["into_k"].any()


def test_factors_are_wider_where_products_are_told_to_round():
    t = torch.ones(3, dtype=torch.float16)
    assert exact(t).dtype == exact(t.float()).dtype == torch.float32
    with coarse_products():
        assert exact(t).dtype == torch.float64
    assert exact(t).dtype == torch.float32
    told = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(told, "fp32_precision"):
        pytest.skip("this torch tells the precision for all backends at once")
    before, told.fp32_precision = told.fp32_precision, "bf16"
    try:
        assert exact(t).dtype == torch.float64
    finally:
        told.fp32_precision = before
    assert exact(t).dtype == torch.float32
