"""Streaming attention by FlexAttention against plain attention, and the blocks it reads."""

import pytest
import torch

from hfsparse.kernels import flex
from hfsparse.lists import Band
from tests.helpers import batch, causal, close, truth


@pytest.mark.parametrize("band", [Band(130, 200), Band(0, 60)], ids=["sink", "no_sink"])
def test_streaming_reads_the_band_in_the_blocks_that_hold_it(band):
    length = 700
    it = batch(length)
    query, key = torch.arange(length)[:, None], torch.arange(length)
    kept = (key <= query) & ((key < band.sink) | (query - key < band.recent))
    mask = causal(it.grid, 6) & kept
    out = flex.streaming(it.q, it.k, it.v, band, scale=it.scale)
    assert close(out, truth(it.q, it.k, it.v, mask, it.scale))
    made, n = flex.block_mask(band, length, it.q.device), -(-length // flex.BLOCK)
    edge = n * flex.BLOCK - length
    tiles = torch.nn.functional.pad(kept, (0, edge, 0, edge)).unflatten(1, (n, -1))
    tiles = tiles.unflatten(0, (n, -1)).sum((1, 3))
    held = torch.zeros(2, n, n, dtype=torch.bool)
    counts = made.kv_num_blocks, made.full_kv_num_blocks
    for kind, index in enumerate((made.kv_indices, made.full_kv_indices)):
        for i, count in enumerate(counts[kind][0, 0]):
            held[kind, i, index[0, 0, i, :count].long()] = True
    assert torch.equal(held[0] | held[1], tiles > 0)
    assert not (held[0] & held[1]).any()
    assert (tiles[held[1]] == flex.BLOCK**2).all()
