"""Two GPUs that share a model's heads say what one says; they record their steps together."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.common import near
from tests.patcher.ranks import run
from tests.patcher.shared_work import answer_replayed, ask_on_gpus, load, saved_models

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

folder = saved_models


@pytest.fixture(scope="module")
def one(folder):
    return answer_replayed(load(folder / "llama").to("cuda:0"))


@pytest.fixture(scope="module")
def two(folder):
    return run(2, ask_on_gpus, folder, backend="nccl")


@pytest.mark.parametrize("replay", [False, True], ids=["eager", "replayed"])
@pytest.mark.parametrize("plan", ["full", "uneven", "late"])
def test_two_ranks_say_what_one_card_says(one, two, plan, replay):
    tokens, logits, _ = one[plan, replay]
    for rank in two:
        got, theirs, graph = rank[plan, replay]
        assert graph.startswith("yes") == replay, graph
        assert got.tolist() == tokens.tolist()
        assert near(theirs, logits)


@pytest.mark.parametrize("plan", ["full", "uneven", "late"])
def test_replayed_steps_of_ranks_are_their_eager_ones_bit_for_bit(two, plan):
    for rank in two:
        assert torch.equal(rank[plan, True][1], rank[plan, False][1])
