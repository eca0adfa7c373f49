"""Running a model patched and as the oracle, and comparing the two."""

from __future__ import annotations

import torch

import hfsparse
from tests.patcher.oracle import CACHE, oracle, whole_cache

CLOSE = 1e-5  # float32 logits, largest absolute difference on real tokens


def close(
    got: torch.Tensor, want: torch.Tensor, mask: torch.Tensor | None = None, most: float = CLOSE
) -> None:
    """Logits `[B, S, V]` agree on real tokens."""
    assert got.shape == want.shape
    real = slice(None) if mask is None else mask.bool()
    assert torch.isfinite(got[real]).all()
    apart = (got - want)[real].abs().max().item()
    assert apart <= most, f"logits differ by {apart:.2e}"


def far(got: torch.Tensor, want: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """Logits differ visibly: something was really dropped."""
    real = slice(None) if mask is None else mask.bool()
    assert (got - want)[real].abs().max() > 0.05


@torch.no_grad()
def forward(model, ids, mask=None, cache=None, **more):
    """One call; positions as `generate` numbers them, from each row's first real token."""
    if mask is not None:
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        more = {"attention_mask": mask, "position_ids": places, **more}
    if cache is not None:
        more[CACHE] = cache
    return model(ids, **more)


def generate(model, ids, mask=None, cache=None, new=12, seed=0, **more):
    """Generation that returns its logits and cache; sampled runs of one seed draw alike."""
    torch.manual_seed(seed)
    mask = torch.ones_like(ids) if mask is None else mask
    if cache is not None:
        more[CACHE] = cache
    wanted = dict(return_dict_in_generate=True, output_logits=True, max_new_tokens=new)
    return model.generate(ids, attention_mask=mask, **{**wanted, "do_sample": False, **more})


def same_generation(got, want, most: float = CLOSE) -> None:
    """The same tokens, and the logits of every step agree."""
    assert got.sequences.tolist() == want.sequences.tolist()
    close(torch.stack(got.logits, 1), torch.stack(want.logits, 1), most=most)


def both(model, plan, run):
    """(patched result, oracle's result, stats): `run(model, cache arguments)` under each."""
    with oracle(model, plan):
        want = run(model, whole_cache(model))
    with hfsparse.patch(model, plan) as handle:
        got = run(model, {})
        stats = handle.stats()
    return got, want, stats


def continue_with(ids, mask, new):
    """The mask of a conversation that goes on by `new` tokens a row."""
    return torch.cat([mask, mask.new_ones(len(ids), new)], 1)
