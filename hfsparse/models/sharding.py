"""Tensor parallel: which heads of a model are this process's, and what its ranks tell one another.

    shard = shard_of(model, modules)
    words = shard.own(words)                  # of all heads, those of this rank's

transformers gives rank r of n the r-th n-th of the rows of q, k and v, so of the q heads and of the
kv heads: a kv head has its whole group. Where it gathers what these projections give (OLMo 2 norms
all heads together), every rank has all heads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from hfsparse.errors import PatchError
from hfsparse.models.layers import LayerShape

Result = TypeVar("Result")
APART = ("colwise", "local_colwise")  # styles of projections whose output stays on its rank


@dataclass(frozen=True)
class Shard:
    """The heads of one rank of several; by default all of them."""

    rank: int = 0
    ranks: int = 1

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.ranks}, its own heads" if self.ranks > 1 else ""

    def first(self, heads: int) -> int:
        """Where this rank's begin, of so many of all ranks."""
        return self.rank * (heads // self.ranks)

    def own(self, heads: Sequence) -> Sequence:
        """This rank's part of a sequence that has an item a head."""
        first = self.first(len(heads))
        return heads[first : first + len(heads) // self.ranks]


def group_of(model: Any) -> Any:
    """The process group that shares a model's heads; None: they are all here."""
    mesh, size = getattr(model, "_device_mesh", None), getattr(model, "_tp_size", None)
    if mesh is None or not size or size == 1:
        return None
    return mesh.get_group("tp") if "tp" in (mesh.mesh_dim_names or ()) else mesh.get_group()


def shard_of(model: Any, modules: Iterable[nn.Module], shapes: Sequence[LayerShape]) -> Shard:
    """This rank's heads of the attention `modules`; PatchError where ranks can't share them."""
    if getattr(getattr(model.config, "distributed_config", None), "pp_size", 1) > 1:
        raise _refusal(model, "its layers lie on several ranks (pp_size), and a plan is for all")
    if (group := group_of(model)) is None:
        return Shard()
    shard = Shard(distributed.get_rank(group), distributed.get_world_size(group))
    if not _apart(model, {*modules}):
        return Shard()
    for index, shape in enumerate(shapes):
        if shape.attends and shape.rank:
            raise _refusal(model, "its q heads choose together what is read of latents (MLA)")
        if shape.attends and shape.kv_heads % shard.ranks:
            raise _refusal(
                model,
                f"layer {index} has {shape.kv_heads} kv heads, which {shard.ranks} ranks can't "
                "share, and a plan is for whole heads",
            )
    return shard


def _apart(model: Any, modules: set[nn.Module]) -> bool:
    """Whether each rank computes heads of its own, by the model's plan of tensor parallelism."""
    plan = model.tp_plan or {}
    for name, module in model.named_modules():
        if module in modules:
            inside = re.sub(r"\d+", "*", name) + "."
            if any(rule.startswith(inside) and plan[rule] in APART for rule in plan):
                return True
    return False


def _refusal(model: Any, why: str) -> PatchError:
    return PatchError(
        f"{type(model).__name__} can't be patched where it lies on several ranks: {why}. Give a "
        "number of ranks that divides the kv heads (tp_size), or load the model whole, or by "
        "device_map='auto'"
    )


def gather(group: Any, said: Any) -> list[Any]:
    """What each rank of a group says, in their order. Every one must ask: the others wait."""
    told: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(told, said, group=group)
    return told


def together(group: Any, work: Callable[[], Result]) -> Result:
    """What `work` gives on this rank; where it fails on others alone, a PatchError as on these."""
    if group is None:
        return work()
    try:
        result, error = work(), None
    except Exception as failed:
        result, error = None, failed
    told = gather(group, error and f"{error}")
    wrong = [rank for rank, said in enumerate(told) if said is not None]
    if wrong and (len(wrong) < len(told) or len({*told}) > 1):
        raise PatchError(f"rank {wrong[0]} can't follow the plan: {told[wrong[0]]}") from error
    if error is not None:
        raise error
    return result


def check_same(group: Any, plan: str) -> None:
    """PatchError on every rank unless all follow one plan, which is told by its name."""
    told = [plan] if group is None else gather(group, plan)
    first = {name: told.index(name) for name in told}
    if len(first) > 1:
        found = ", ".join(f"{name} on rank {rank}" for name, rank in first.items())
        raise PatchError(f"ranks follow different plans ({found}): give every rank the same one")


def least(group: Any) -> Callable[[int], int] | None:
    """A function that tells every rank the least of the numbers that they give, and waits for no
    GPU; None without other ranks."""
    if group is None:
        return None
    hosts = group if distributed.get_backend(group) == "gloo" else _hosts_of(group)

    def ask(number: int) -> int:
        given = torch.tensor(int(number))
        distributed.all_reduce(given, distributed.ReduceOp.MIN, hosts)
        return int(given)

    return ask


@cache
def _hosts_of(group: Any) -> Any:
    """A group's ranks, who meet on their hosts."""
    ranks = distributed.get_process_group_ranks(group)
    return distributed.new_group(ranks, backend="gloo", use_local_synchronization=True)
