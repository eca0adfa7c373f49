"""Global states that a library meets, and a slice of each part of ours to run under them.

    want, got = asked(device)(name), run(world, name, device)
    compare(got, want, off)         # off: what the world does to arithmetic

A slice is prepared outside of the world and works in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from threading import Barrier, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import hfsparse
from hfsparse import kernels
from hfsparse.patterns import PATTERNS
from hfsparse.selectors.quest import Quest
from tests import tiny
from tests.helpers import batch
from tests.patcher import families
from tests.patcher.oracle import CACHE

# -- worlds: name, and how far results may be off --------------------------------------------------


@contextmanager
def setting(read: Callable[[], Any], write: Callable[[Any], None], value: Any) -> Iterator[None]:
    """What PyTorch keeps for the whole process, set to a value for a while."""
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


default_dtype = partial(setting, torch.get_default_dtype, torch.set_default_dtype)
deterministic = partial(
    setting,
    torch.are_deterministic_algorithms_enabled,
    torch.use_deterministic_algorithms,
    True,
)
coarse_products = partial(  # of float32 factors: in bfloat16 where the CPU can, on a GPU in TF32
    setting,
    torch.get_float32_matmul_precision,
    torch.set_float32_matmul_precision,
    "medium",
)
two_processors = partial(setting, torch.get_num_threads, torch.set_num_threads, 2)


@contextmanager
def grad_and_inference() -> Iterator[None]:
    """As code that forgot where it was: inference mode, left for gradients again."""
    with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad():
        yield


def autocast(device: torch.device):
    return torch.autocast(device.type, torch.bfloat16)


EXACT, SUMS, HALF = 0.0, 1e-5, 0.1
WORLDS: dict[str, tuple[Callable[[torch.device], Any], float]] = {
    "bfloat16_by_default": (lambda device: default_dtype(torch.bfloat16), EXACT),
    "meta_by_default": (lambda device: torch.device("meta"), EXACT),
    "gradients": (lambda device: torch.enable_grad(), SUMS),
    "gradients_inside_inference": (lambda device: grad_and_inference(), SUMS),
    "inference": (lambda device: torch.inference_mode(), EXACT),
    "deterministic": (lambda device: deterministic(), SUMS),
    "coarse_products": (lambda device: coarse_products(), HALF),
    "two_processors": (lambda device: two_processors(), SUMS),
    "autocast": (autocast, HALF),
}


# -- slices ----------------------------------------------------------------------------------------


def prepare_model(device: torch.device) -> tuple:
    model = families.fresh("llama").to(device)
    ids, mask = (t.to(device) for t in families.left_padded(260))
    more = families.tokens(3, 40, seed=1).to(device)
    return model, ids, mask, more


def run_model(made: tuple) -> list:
    """A padded prompt, a chunk and single tokens behind it, and what they counted."""
    model, ids, mask, more = made
    with hfsparse.patch(model, families.mixed(model)) as handle:
        found = talk(model, ids, mask, more)
        handle.reset_stats()
        found += talk(model, ids, mask, more)
        for layer in handle.stats().layers:
            found += [layer.pair_density, layer.block_density, layer.decode_share, layer.cut]
    return found


def talk(model, ids: Tensor, mask: Tensor, more: Tensor) -> list[Tensor]:
    cache, found, steps = DynamicCache(), [], (ids, more, *more[:, :5].split(1, 1))
    for at, new in enumerate(steps):
        mask = mask if at == 0 else torch.cat([mask, mask.new_ones(new.shape)], 1)
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        call = {"attention_mask": mask, "position_ids": places, CACHE: cache}
        found.append(model(new, **call).logits.detach()[:, -1])
    return found


def prepare_batch(device: torch.device) -> tuple:
    it = batch(300, rows="left_padded", past=0, dim=16)
    q, k, v = (t.nan_to_num(0).to(device) for t in (it.q, it.k, it.v))
    grid = replace(it.grid, q_len=it.grid.q_len.to(device), k_len=it.grid.k_len.to(device))
    return q, k, v, grid, it.scale


def patterns() -> list:
    return [
        PATTERNS["streaming"](sink=2, recent=20),
        PATTERNS["vertical_slash"](columns=31, diagonals=101),
        PATTERNS["block_topk"](share=0.3, min_blocks=2),
        PATTERNS["antidiagonal"](),
    ]


def choose(pattern, q: Tensor, k: Tensor, grid, scale: float):
    need = kernels.Need.of(q, k, k, block=grid.block, chooser=pattern)
    return kernels.pick(kernels.ESTIMATE, need).run(pattern, q, k, grid, scale)


def run_patterns(made: tuple) -> list:
    q, k, _, grid, scale = made
    found = []
    for pattern in patterns():
        lists = choose(pattern, q, k, grid, scale)
        count = kernels.pick(kernels.COUNT, kernels.Need.of(q, k, k)).run
        found += [lists.mask(), lists.blocks(), lists.pairs(), count(lists)]
    return found


def run_kernels(made: tuple) -> list:
    q, k, v, grid, scale = made
    found, kv = [], torch.arange(q.shape[1], device=q.device) // (q.shape[1] // k.shape[1])
    for pattern in patterns()[:2]:
        lists = choose(pattern, q, k, grid, scale)
        need = kernels.Need.of(q, k, v, lists=True, block=grid.block)
        found.append(kernels.pick(kernels.PREFILL, need).run(q, k, v, lists, kv, scale=scale))
    need = kernels.Need.of(q, k, v, block=grid.block, plain=False)
    found.append(kernels.pick(kernels.PREFILL, need).run(q, k, v, grid, scale=scale))
    return found


def run_selectors(made: tuple) -> list:
    q, k, _, grid, scale = made
    k = torch.nn.functional.pad(k, (0, 0, 0, -k.shape[2] % 64)).unflatten(2, (-1, 64))
    index, length = {"low": k.amin(3), "high": k.amax(3)}, grid.k_len
    found = []
    for quest in (Quest(0.3, 2), Quest(0.9, 2, top_p=0.6)):
        need = kernels.Need.of(q, q, q, chooser=quest, tokens=q.shape[2])
        select = kernels.pick(kernels.SELECT, need).run
        lists = select(quest, q[:, :, -1:], index, length, scale)
        used = torch.arange(lists.pages.shape[2], device=q.device) < lists.count[..., None]
        found += [lists.count, lists.pages.masked_fill(~used, -1)]
    return found


def prepare_profile(device: torch.device) -> tuple:
    return tiny.llama(window=1024).to(device), tiny.tokenizer()


def profiles(**more) -> Callable[[tuple], list]:
    settings = dict(lengths=(512,), samples=1, verify=False)
    shares = dict.fromkeys(("prefill_density", "cache_share", "decode_share"), 0.9)

    def run(made: tuple) -> list:
        plan = hfsparse.profile(*made, **{**settings, **shares, **more})
        for name, most in shares.items():
            assert plan.expected[512][name.replace("prefill", "pair")] <= most + 1e-3
        return [" ".join(layer.prefill + layer.cache + layer.decode) for layer in plan.layers]

    return run


SLICES: dict[str, tuple[Callable[[torch.device], tuple], Callable[[tuple], list]]] = {
    "model": (prepare_model, run_model),
    "patterns": (prepare_batch, run_patterns),
    "kernels": (prepare_batch, run_kernels),
    "selectors": (prepare_batch, run_selectors),
    "profile_streaming": (prepare_profile, profiles(method="streaming-llm")),
    "profile_balanced": (prepare_profile, profiles()),
    "profile_duo": (prepare_profile, profiles(method="duo", proxy="copy")),
}


CHOICES = ("patterns", "selectors")  # they choose the same however coarse other products are


def compare(got: list, want: list, off: float) -> None:
    """‖a − b‖ / ‖b‖ of tensors and lists of numbers within `off`.

    Words are the same, but where arithmetic is so coarse that other heads may be chosen.
    """
    assert len(got) == len(want)
    for at, (a, b) in enumerate(zip(got, want, strict=True)):
        if isinstance(b, str):
            assert a == b or off >= HALF, at
            continue
        if not isinstance(b, Tensor):
            a, b = (torch.tensor(x, dtype=torch.float64, device="cpu") for x in (a, b))
        a, b = a.double().nan_to_num(-1), b.double().nan_to_num(-1)
        apart = float((a - b).norm() / b.norm().clamp(min=1e-30))
        assert apart <= off, f"{at}: {apart:.1e} off"


def asked(device: torch.device) -> Callable[[str], list]:
    """What each slice gives in no world in particular."""

    @cache
    def ask(name: str) -> list:
        prepare, work = SLICES[name]
        with torch.no_grad():
            return work(prepare(device))

    return ask


def run(world: str, name: str, device: torch.device) -> list:
    """What a slice gives in a world."""
    prepare, work = SLICES[name]
    made = prepare(device)
    with torch.no_grad(), WORLDS[world][0](device):
        return work(made)


def at_once(*work: Callable[[], Any]) -> list:
    """What each answers when all run in threads of their own, begun together."""
    begin, found = Barrier(len(work)), [None] * len(work)

    def answer(i: int) -> None:
        begin.wait()
        with torch.no_grad():
            found[i] = work[i]()

    threads = [Thread(target=answer, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
