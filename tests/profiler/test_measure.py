"""Measurements against the same numbers computed plainly, row by row."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hfsparse.attention import Logits
from hfsparse.lists import PAGE, Grid
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.streaming import Streaming
from hfsparse.profiler import measure
from hfsparse.selectors.quest import Quest

L, HQ, HKV, D, HIDDEN = 300, 6, 2, 16, 40


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, L, D) for h in (HQ, HKV, HKV))
    module = torch.nn.Module()
    module.o_proj = torch.nn.Linear(HQ * D, HIDDEN, bias=True)
    return SimpleNamespace(module=module.requires_grad_(False), q=2 * q, k=k, v=v)


CANDIDATES = measure.Candidates(
    {"stream": Streaming(4, 20), "blocks": BlockTopK(0.3, 2)},
    {"ring": Streaming(4, 20), "all": Streaming(0, L)},
    {"quest": Quest(0.4, 2), "every": Quest(1.0, 2)},
)


def attention(layer, keep, head, row, logits):
    """One row of one head in plain words: (mass by key, output under `keep`, exact output)."""
    k, v = layer.k[0, head // 3, : row + 1], layer.v[0, head // 3, : row + 1]
    scores = k @ layer.q[0, head, row] * logits.scale
    if logits.softcap:
        scores = logits.softcap * torch.tanh(scores / logits.softcap)
    weight = scores.exp()
    total = weight.sum() + (logits.s_aux[head].exp() if logits.s_aux is not None else 0)
    mass = weight / total
    some = mass * keep[: row + 1]
    return some.sum(), some @ v / some.sum().clamp(min=1e-9), mass @ v


def projected(layer, outputs):
    """o_proj without its bias, on `{head: output}`."""
    whole = torch.zeros(HQ * D)
    for head, out in outputs.items():
        whole[head * D : (head + 1) * D] = out
    return layer.module.o_proj.weight @ whole


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_recall_and_error_equal_the_plain_ones(layer, softcap):
    logits = Logits(0.25, softcap, None)
    found = measure.layer(layer.module, layer.q, layer.k, layer.v, logits, CANDIDATES)
    rows = measure.rows_of(L).tolist()
    pattern = CANDIDATES.patterns["blocks"]
    mask = pattern.lists(layer.q, layer.k, Grid.causal(1, L, 32), 0.25).mask()[0]
    recall, error = np.zeros((len(rows), HQ)), np.zeros((len(rows), HQ))
    for i, row in enumerate(rows):
        parts = [attention(layer, mask[h, row], h, row, logits) for h in range(HQ)]
        norm = projected(layer, {h: exact for h, (_, _, exact) in enumerate(parts)}).norm()
        for h, (kept, some, exact) in enumerate(parts):
            recall[i, h] = kept
            error[i, h] = projected(layer, {h: exact - some}).norm() / norm
    np.testing.assert_allclose(found["pattern_recall"][1], recall.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found["pattern_error"][1], error.mean(0), rtol=1e-4)
    pairs = mask.sum((1, 2)) / (L * (L + 1) / 2)
    np.testing.assert_allclose(found["pattern_pairs"][1], pairs, rtol=1e-5)


def test_a_ring_is_judged_by_its_whole_group_on_the_newest_rows(layer):
    logits = Logits(0.25, None, None)
    found = measure.layer(layer.module, layer.q, layer.k, layer.v, logits, CANDIDATES)
    errors = np.zeros((measure.LAST, HKV))
    for i, row in enumerate(range(L - measure.LAST, L)):
        at = torch.arange(L)
        keep = (at <= row) & ((at < 4) | (row - at < 20))
        parts = [attention(layer, keep, h, row, logits) for h in range(HQ)]
        norm = projected(layer, {h: exact for h, (_, _, exact) in enumerate(parts)}).norm()
        for g in range(HKV):
            delta = {h: parts[h][2] - parts[h][1] for h in range(3 * g, 3 * g + 3)}
            errors[i, g] = projected(layer, delta).norm() / norm
    np.testing.assert_allclose(found["ring_error"][0], errors.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found["ring_error"][1], 0, atol=1e-5)
    np.testing.assert_allclose(found["ring_pairs"][1], 1)


def test_pages_are_those_that_a_decode_step_reads(layer):
    logits = Logits(0.25, None, None)
    found = measure.layer(layer.module, layer.q, layer.k, layer.v, logits, CANDIDATES)
    np.testing.assert_allclose(found["page_error"][1], 0, atol=1e-5)
    np.testing.assert_allclose(found["page_recall"][1], 1, rtol=1e-5)
    low, high, shares = [], [], []
    for start in range(0, L, PAGE):
        page = layer.k[0, :, start : start + PAGE]
        low.append(page.amin(1))
        high.append(page.amax(1))
    low, high = (torch.stack(t, 1)[None] for t in (low, high))
    for row in range(L - measure.LAST, L):
        length = torch.tensor([row + 1])
        lists = CANDIDATES.selectors["quest"].pages(
            layer.q[:, :, row : row + 1], low, high, length, 0.25
        )
        read = [
            sum(min(PAGE, row + 1 - PAGE * int(p)) for p in pages[:n])
            for pages, n in zip(lists.pages[0], lists.count[0], strict=True)
        ]
        shares.append(np.array(read) / (row + 1))
    np.testing.assert_allclose(found["page_share"][0], np.mean(shares, 0), rtol=1e-5)
    assert found["page_recall"][0].max() < 0.99


def test_packed_output_weights_are_asked_for_through_the_module(layer):
    class Packed(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear
            self.weight = torch.zeros(3, dtype=torch.uint8)

        def forward(self, x):
            return self.linear(x)

    packed = torch.nn.Module()
    packed.o_proj = Packed(layer.module.o_proj)
    logits = Logits(0.25, None, None)
    args = (layer.q, layer.k, layer.v, logits, CANDIDATES)
    plain, asked = measure.layer(layer.module, *args), measure.layer(packed, *args)
    for name, values in plain.items():
        np.testing.assert_allclose(asked[name], values, rtol=1e-3, atol=1e-6)
