"""What a step names of pages in host memory is fetched into the slots of a hot set, in PyTorch.

The truth for `triton.fetch`. All but the copy has fixed shapes and waits for nothing; the copy
waits for the device, to know how much is missing.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from hfsparse.lists import PAGE, PageLists
from hfsparse.lists.hot import Hot
from hfsparse.lists.packed import NEWEST


def fetch(
    hot: Hot, lists: PageLists | None, length: Tensor, read: Tensor | None = None
) -> PageLists:
    """The units that a step reads of rows of `length` [B], and where each lies.

    lists: None where all rows are under `hot.below`, and read all. What no slot holds takes the
    slots that were read least recently, lower ones first. read [H, 2] int64: how many units were
    fetched, and read, is added.
    """
    lists = hot.wanted(lists, length)
    units, slots = lists.pages, hot.owner.shape[2]
    used = torch.arange(units.shape[2], device=units.device) < lists.count[..., None]
    page = units // hot.each
    newest = page >= hot.newest(length)[:, None, None]
    held = hot.table.gather(2, units).long()
    missing = used & ~newest & (held < 0)
    now = hot.clock.add_(1)[..., None]
    _put(hot.stamp, held, now, used & ~newest & (held >= 0))
    oldest = hot.stamp.argsort(dim=-1, stable=True)[..., : units.shape[2]]
    nth = torch.arange(oldest.shape[2], device=units.device)
    oldest = oldest.masked_fill(nth >= missing.sum(-1, keepdim=True), slots).sort(-1).values
    taken = oldest.gather(2, (missing.cumsum(-1) - 1).clamp(0, oldest.shape[2] - 1))
    taken = taken.masked_fill(~missing, 0)
    before = hot.owner.gather(2, taken).long()
    _put(hot.table, before, -1, missing & (before >= 0))
    _put(hot.table, units, taken, missing)
    _put(hot.owner, taken, units, missing)
    _put(hot.stamp, taken, now, missing)
    _copy(hot, units, taken, missing)
    if read is not None:
        read += torch.stack([missing.sum((0, 2)), used.sum((0, 2))], 1)
    place = hot.lead + torch.where(missing, taken, held)
    first = page % (NEWEST // PAGE) * hot.each + units % hot.each if hot.lead else 0
    place = torch.where(newest, first, place)
    return replace(lists, lies=place.masked_fill(~used, 0))


def _put(into: Tensor, at: Tensor, value: Tensor | int, here: Tensor) -> None:
    """Write values into `[B, H, N]` at places [B, H, W], where `here` is."""
    wide = pad(into, (0, 1))  # what is not written goes behind the last
    at = torch.where(here, at, into.shape[2])
    value = torch.as_tensor(value, device=into.device).to(into.dtype).expand_as(at)
    into.copy_(wide.scatter_(2, at, value)[..., :-1])


def _copy(hot: Hot, units: Tensor, taken: Tensor, missing: Tensor) -> None:
    """Units that are missing, from the host into the slots that they take."""
    b, h, w = missing.nonzero(as_tuple=True)
    unit, slot = units[b, h, w], taken[b, h, w]
    for held, host in hot.pairs:
        if hot.pages is None:
            held, host = held[:, :, NEWEST:], host
            held, host = (t.unflatten(2, (-1, hot.unit)) for t in (held, host))
        given = host[b.to(host.device), h.to(host.device), unit.to(host.device)]
        held[b, h, slot] = given.to(held.device)
