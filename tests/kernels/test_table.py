"""The seven tables: what each row says of itself, and that nothing else is taken silently."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hfsparse import kernels
from hfsparse.errors import UsageError
from hfsparse.kernels import Need, reference, table
from hfsparse.lists import FULL, BlockLists
from hfsparse.patterns import PATTERNS
from hfsparse.selectors import SELECTORS
from hfsparse.selectors.quest import Quest
from tests.helpers import batch, close, truth

ON_CPU = {"torch flash over lists", "torch flash, store by store", "PyTorch, by rows"}
NEEDS = {"estimate": PATTERNS["block_topk"](), "select": Quest()}  # who is to choose


def need(name: str, **more) -> Need:
    return Need(torch.device("cpu"), torch.float32, 64, 64, chooser=NEEDS.get(name), **more)


@pytest.mark.parametrize("name", kernels.Tables._fields)
def test_the_last_row_of_a_table_always_can_and_those_before_say_why_not(name):
    *others, last = getattr(kernels.TABLES, name)
    assert last.why_not(need(name, lists=True, logits=True, grad=True, skip=True)) is None
    assert {row.name for row in others} >= {"Triton"}
    for row in others:
        why = row.why_not(need(name, lists=True))
        assert (why is None) == (row.name in ON_CPU), f"{row.name} on a CPU: {why}"


@pytest.mark.parametrize("name", kernels.Tables._fields)
def test_a_table_in_which_none_can_names_each_reason(name):
    triton = tuple(row for row in getattr(kernels.TABLES, name) if row.name == "Triton")
    with pytest.raises(UsageError, match=r"Triton: needs a CUDA device, not cpu.* give one"):
        kernels.pick(triton, need(name, lists=True))


@pytest.mark.parametrize("name", kernels.Tables._fields)
def test_where_triton_runs_it_is_taken(name, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(table, "no_triton", lambda need: None)
    chosen = kernels.pick.__wrapped__(getattr(kernels.TABLES, name), need(name, lists=True))
    assert chosen.name == "Triton"


def test_keys_in_fewer_bits_are_read_store_by_store(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(table, "no_triton", lambda need: None)
    packed = need("decode", lists=True, packed=True)
    pick = kernels.pick.__wrapped__
    assert pick(kernels.DECODE, packed).name == "Triton, store by store"
    assert pick(kernels.APPEND, packed).name == "Triton"
    wide = packed._replace(head_dim=512)
    assert all(pick(t, wide).name != "Triton" for t in (kernels.APPEND, kernels.DECODE))
    latents = pick(kernels.DECODE, packed._replace(latents=True)).name
    assert latents == "reference (PyTorch)"


@pytest.mark.parametrize("latents", [True, False])
def test_triton_serves_steps_over_latents_wider_than_any_head(latents, monkeypatch):
    """DeepSeek's 512 dims and 64 rotated ones, in 227 KiB of shared memory (H100)."""
    pytest.importorskip("triton")
    room = SimpleNamespace(shared_memory_per_block_optin=227 << 10, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: room)
    asked = Need(torch.device("cuda", 99), torch.bfloat16, 576, 512, lists=True, latents=latents)
    why = next(row for row in kernels.DECODE if row.name == "Triton").why_not(asked)
    assert why == (None if latents else "head dim 576, value dim 512: at most 512 is supported")


@pytest.mark.parametrize("row", ["Triton", "reference (PyTorch)"])
def test_a_kernel_of_lists_takes_whole_rows_too(row, monkeypatch):
    """Where softcap or sinks are asked for, or where it alone is in the table."""
    it = batch(70, past=20, rows="left_padded", poison=0.0)
    if row == "Triton":  # what it is given is right
        module = pytest.importorskip("hfsparse.kernels.triton.prefill", exc_type=ImportError)
        monkeypatch.setattr(module, "prefill", reference.prefill)
    kernel = next(each for each in kernels.PREFILL if each.name == row)
    more = {"softcap": 5.0, "s_aux": torch.linspace(-1, 1, it.q.shape[1])}
    found = kernel.run(it.q, it.k, it.v, it.grid, scale=it.scale, **more)
    kept = BlockLists.of(it.grid, it.q.shape[1], band=FULL).mask()
    assert close(found, truth(it.q, it.k, it.v, kept, it.scale, **more))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("quest", "Triton"),
        ("lowrank", "Triton"),
        ("channels", "Triton"),
        ("landmarks", "PyTorch (scores) and Triton"),
        ("centroids", "PyTorch (scores) and Triton"),
        ("lsh", "PyTorch (scores) and Triton"),
    ],
)
def test_no_selector_falls_back_to_pytorch_on_a_gpu(kind, name):
    """What serves bfloat16 heads of 128 at 131,072 tokens; to ask takes Triton, but no GPU."""
    pytest.importorskip("triton")
    asked = {"tokens": 131072, "index_dtype": torch.bfloat16, "chooser": SELECTORS[kind]()}
    on_gpu = Need(torch.device("cuda"), torch.bfloat16, 128, 128, **asked)
    assert kernels.pick(kernels.SELECT, on_gpu).name == name
