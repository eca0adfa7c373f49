"""Claim: on each card the Triton kernels take no more shared memory than it has, and spill little.

    python -m benchmarks.cards [--cards 80,86,89,90,100,120] [--only decode] [--processes 2]

Compiles what the package would launch on a card, without one: nothing runs. Bfloat16; a table of
registers, bytes that a thread spills and KiB of shared memory, worst lines first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import torch
import triton
from triton.runtime import JITFunction

from hfsparse.kernels import triton as kernels
from hfsparse.kernels.codes import CODES, Quantised
from hfsparse.lists import FULL, PAGE, BlockLists, Grid, PageLists, places
from hfsparse.lists.lengths import Lengths
from hfsparse.patterns import PATTERNS
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.cache.packed import PackedFull
from hfsparse.selectors.quest import Quest
from tests.kernels.launches import Compiled, used_by

CARDS = {  # by compute capability: some cards, KiB of shared memory that a program may take
    80: ("A100", 163),
    86: ("A10, RTX 3090", 99),
    89: ("L40S, RTX 4090", 99),
    90: ("H100, H200", 227),
    100: ("B200", 227),
    120: ("RTX 5090", 99),
}
RUN = (90,)  # what the tests of `tests/gpu` were run on
DIMS = (64, 96, 128, 256)
Shape = tuple[str, Callable[[], object]]


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


def prompts() -> Iterator[Shape]:
    prefill, count = _module("prefill"), _module("count")
    for D in DIMS:
        q, k, grid = bf16(1, 8, 512, D), bf16(1, 2, 512, D), Grid.causal(1, 512, 128)
        keep = torch.ones(1, 8, 4, 4, dtype=torch.bool)
        columns = torch.arange(9).expand(1, 8, -1)
        kv = torch.arange(8) // 4
        for name, held, skip in (
            ("blocks", None, None),
            ("columns", columns, None),
            ("columns, skip", columns, 3.0),
        ):
            lists = BlockLists.of(grid, 8, keep, columns=held)
            yield (
                f"head dim {D}, {name}",
                lambda a=(q, k, k, lists, kv), s=skip: prefill.prefill(*a, scale=1.0, skip=s),
            )
    yield "", lambda: count.pairs(lists)


def choices_of_blocks() -> Iterator[Shape]:
    estimate = _module("estimate")
    for pattern in estimate.FUSED:
        for D in (64, 128, 256):
            q, k, grid = bf16(1, 8, 4096, D), bf16(1, 2, 4096, D), Grid.causal(1, 4096, 128)
            given = PATTERNS[pattern.kind](), q, k, grid, 1.0
            yield f"{pattern.kind}, head dim {D}", lambda a=given: estimate.lists(*a)


def steps() -> Iterator[Shape]:
    """Of one new token, and of eight."""
    decode, append = _module("decode"), _module("append")
    length = torch.tensor([2000])
    for D, group, Q in [(D, g, 1) for D in DIMS for g in (1, 4, 8)] + [(D, 8, 8) for D in DIMS]:
        q, k = bf16(1, 2 * group, Q, D), bf16(1, 2, 2048, D)
        pages = PageLists(torch.zeros(1, 2, 8).long(), torch.full((1, 2), 8), 16)
        place = places.Place((0, 1), k, k.clone(), listed=True)
        given = q, places.Table().places([place]), length[:, None] - Q + torch.arange(Q), pages
        name = f"head dim {D}, {group} q heads a kv head, {Q} new"
        yield name, lambda a=given: decode.decode(*a, length=length, scale=1.0)
        new = bf16(1, 2, Q, D)
        yield f"head dim {D}", lambda a=(new, new, *given[1:3]): append.append(*a)
    for heads in (16, 128):
        q, k = bf16(1, heads, 1, 576), bf16(1, 1, 2048, 576)
        place = places.Place((0,), k, k[..., :512])
        given = q, places.Table().places([place]), length[:, None] - 1
        name = f"latents of 576, {heads} q heads"
        yield name, lambda a=given: decode.decode(*a, length=length, scale=1.0)


def packed_steps() -> Iterator[Shape]:
    store, pack = _module("decode_store"), _module("pack")
    length = torch.tensor([600])
    for D in (64, 128, 256):
        for bits in (8, 4, "fp8"):
            held, k = PackedFull(Group((0, 1), FULL, bits=bits), 0), bf16(1, 2, 600, D)
            held.create(k, k)
            held.append(k, k, Lengths([0], [600], 600))
            place, name = held.place(), f"head dim {D}, {bits} bits"
            for unit in (16, PAGE):
                pages = PageLists(torch.zeros(1, 2, 2).long(), torch.ones(1, 2).long(), unit)
                given = bf16(1, 8, 1, D), place, length[:, None] - 1, pages
                yield (
                    f"{name}, units of {unit}",
                    lambda a=given: store.decode(*a, length=length, scale=1.0),
                )
            yield name, lambda a=place: pack.pack(a, length[:, None] - 1)


def choices_of_pages() -> Iterator[Shape]:
    choose = _module("choose")
    for D in (64, 128, 256, 576):
        for pages in (32, 600):
            ends = bf16(1, 2, pages, PAGE // 16, D)
            index = {"low": ends, "high": ends}
            given = Quest(0.06, 3, unit=16), bf16(1, 8, 1, D), index, torch.tensor([pages * PAGE])
            yield f"quest, {pages} pages, head dim {D}", lambda a=given: choose.pages(*a, 1.0)


def weights() -> Iterator[Shape]:
    """Matrices of fused steps and of quantised models; fp8 begins with sm_89."""
    products = _module("products")
    plain = [bf16(64, 4096), bf16(16, 4096)]
    for rows in (1, 8, 16, 32):
        given = bf16(rows, 4096), plain, [None, None]
        yield f"bf16, {rows} rows", lambda a=given: products.products(*a)
        for dtype, group in product(CODES, (4096, 128)):
            scale = bf16(64, 4096 // group)
            matrix = Quantised(torch.zeros(64, 4096, dtype=dtype), scale)
            given = bf16(rows, 4096), [matrix], [None]
            yield (
                f"{dtype}, {rows} rows, a scale for {group} columns",
                lambda a=given: products.products_of_codes(*a),
            )
        tiles = torch.zeros(64, 512, dtype=torch.int32), bf16(32, 64, 2)
        given = bf16(rows, 4096), [Quantised(*tiles)], [None]
        yield f"4 bits, {rows} rows", lambda a=given: products.products_of_codes(*a)


def _module(name: str) -> ModuleType:
    return import_module(f"{kernels.__name__}.{name}")


def compile_for(card: int, part: Callable[[], Iterator[Shape]]) -> tuple[list, list]:
    """Of a card, the compiled kernels of a part (kernel, shape, registers, spilled bytes, KiB), and
    what could not be compiled."""
    room, made, rows, failed, seen = CARDS[card][1] << 10, [], [], [], set()
    names = [file.stem for file in Path(kernels.__path__[0]).glob("*.py") if file.stem[0] != "_"]
    chain = {"CHAINED": card >= 90} | ({"launch_pdl": True} if card >= 90 else {})
    for module in map(_module, names):
        for kept in (x for x in vars(module).values() if hasattr(x, "cache_clear")):
            kept.cache_clear()  # of the card before
        for name, value in {
            "shared_memory": room,
            "is_nvidia": True,
            "has_tensor_memory": card == 100,
            "chained": chain,
        }.items():
            if hasattr(module, name):
                setattr(module, name, lambda device, value=value: value)
    JITFunction.__getitem__ = lambda kernel, grid: Compiled(kernel, made, card)
    for shape, launch in part():
        try:
            launch()
        except Exception as error:  # what isn't computed may be refused behind a launch
            if not made:
                failed.append((part.__name__, shape, f"{type(error).__name__}: {error}"[:200]))
        for kernel in made:
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                shared = kernel.metadata.shared / 1024
                rows.append((kernel.metadata.name, shape, *used_by(kernel), shared))
        made.clear()
    return rows, failed


PARTS = (prompts, choices_of_blocks, steps, packed_steps, choices_of_pages, weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cards", default=",".join(map(str, CARDS)))
    parser.add_argument(
        "--only", help="parts, by name", default=",".join(p.__name__ for p in PARTS)
    )
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    cards = [int(card) for card in args.cards.split(",")]
    table: dict[tuple[str, str], dict[int, tuple]] = {}
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        jobs = [
            (card, pool.submit(compile_for, card, part))
            for part in PARTS
            if part.__name__ in args.only.split(",")
            for card in cards
        ]
        for card, job in jobs:
            rows, failed = job.result()
            for kernel, shape, *used in rows:
                table.setdefault((kernel, shape), {})[card] = used
            for what in failed:
                print(f"sm_{card}: not compiled: {what}")
    print(written(table, cards))


def written(table: dict[tuple[str, str], dict[int, tuple]], cards: list[int]) -> str:
    """Markdown of what each kernel takes by card: those over a limit, then those that spill."""
    over = {
        key: any(shared > CARDS[card][1] for card, (_, _, shared) in used.items())
        for key, used in table.items()
    }
    spills = {key: max(spill for _, spill, _ in used.values()) for key, used in table.items()}
    bad = [key for key in table if over[key] or spills[key]]
    bad.sort(key=lambda key: (over[key], spills[key]), reverse=True)
    fine = [key for key in table if key not in bad]
    fine.sort(key=lambda key: -max(shared for *_, shared in table[key].values()))
    lines = [f"Triton {triton.__version__}, bfloat16. {len(table)} forms of kernels.", ""]
    lines += ["| | cards | KiB of shared memory | |", "| --- | --- | --- | --- |"]
    for card in cards:
        name, room = CARDS[card]
        lines.append(f"| sm_{card} | {name} | {room} | {'run' if card in RUN else 'compiled'} |")
    for title, keys in (("Over a limit, or spilling", bad), ("All others", fine)):
        lines += ["", f"## {title}", ""]
        lines.append("| kernel | shape | " + " | ".join(f"sm_{card}" for card in cards) + " |")
        lines.append("| --- | --- |" + " --- |" * len(cards))
        for kernel, shape in keys:
            cells = [_cell(table[kernel, shape].get(card)) for card in cards]
            lines.append(f"| `{kernel}` | {shape} | " + " | ".join(cells) + " |")
        if not keys:
            lines[-2:] = ["None."]
    return "\n".join(lines)


def _cell(used: tuple | None) -> str:
    """Registers, spilled bytes where there are any, KiB of shared memory."""
    if used is None:
        return ""  # as another line's
    registers, spilled, shared = used
    return f"{registers}, {f'{spilled} B spilled, ' if spilled else ''}{shared:.0f} KiB"


if __name__ == "__main__":
    main()
