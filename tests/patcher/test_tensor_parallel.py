"""Ranks that share a model's heads give what one process gives, under plans of whole heads."""

from __future__ import annotations

import pytest
import torch

from tests.patcher.ranks import run
from tests.patcher.shared_work import MODELS, PLANS, WAYS, answer, ask_all, load, save_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("ranks")
    save_models(made)
    return made


@pytest.fixture(scope="module")
def whole(folder):
    return {name: answer(load(folder / name)) for name in MODELS}


@pytest.fixture(scope="module")
def two(folder):
    return run(2, ask_all, folder)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_answer_as_one_process(whole, two, model, plan, way):
    if (plan, way) not in whole[model]:
        pytest.skip("an eviction reads no chunks")
    ids, logits = whole[model][plan, way]
    for rank in two:
        found, theirs = rank[model][plan, way]
        assert found.tolist() == ids.tolist()
        torch.testing.assert_close(theirs, logits, rtol=1e-4, atol=1e-5)
