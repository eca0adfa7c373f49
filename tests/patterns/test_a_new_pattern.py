"""A pattern that nothing but its own file knows runs, and everything says what it is."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import hfsparse
from hfsparse.kernels import ESTIMATE, Need, pick
from hfsparse.lists import BlockLists
from hfsparse.patterns import PATTERNS, register
from hfsparse.plan import Plan, PlanError, headmap
from hfsparse.plan.template import template
from hfsparse.registry import require
from tests.helpers import batch
from tests.kernels.interpreter import interpreter
from tests.patcher.families import fresh, left_padded, plan_of
from tests.patcher.runs import both, close, forward


@dataclass(frozen=True)
class Every:
    """One key block of `step`, and the query's own."""

    step: int = 3

    def __post_init__(self):
        require(self.step >= 1, f"step is {self.step}: give 1 or more")

    def lists(self, q, k, grid, scale):
        seen, _ = grid.reach()
        newest = (grid.first + grid.live - 1)[:, None]
        keep = seen & (newest >= grid.q_first[..., None])
        keep |= seen & (torch.arange(grid.nk, device=q.device) % self.step == 0)
        return BlockLists.of(grid, q.shape[1], keep[:, None].expand(-1, q.shape[1], -1, -1))


@pytest.fixture
def every():
    register("every")(Every)
    yield
    del PATTERNS["every"]


def test_it_runs_in_a_plan_as_its_lists_say(every):
    model = fresh("llama")

    def words(index, windowed):
        return ["e", "full", "full", "e"], ["full"] * 2, ["full"] * 2

    plan = plan_of(model, words, e=("every", {"step": 2}))
    ids, mask = left_padded(260)
    got, want, stats = both(model, plan, lambda m, c: forward(m, ids, mask, **c).logits)
    close(got, want, mask)
    assert stats.pair_density < 1
    with hfsparse.patch(model, plan):
        assert "e (every), prompt: blocks chosen by PyTorch" in hfsparse.explain(model)


def test_a_plan_file_the_head_map_and_a_new_plan_know_it(every, tmp_path):
    model = fresh("llama")
    text = template(model.config)
    assert "  # every: {kind: every, step: 3}\n" in text
    plan = Plan.loads(text.replace("  # every:", "  every:"))
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml").patterns == {"every": Every()}
    assert "every: step 3" in headmap.text(plan).plain
    headmap.png(plan, tmp_path / "heads.png")
    with pytest.raises(PlanError, match="step is 0: give 1 or more"):
        Plan.loads(plan.dumps().replace("step: 3", "step: 0"))


def chosen():
    """Blocks as ESTIMATE and as the pattern chooses them, where Triton is interpreted."""
    it = batch(200, past=45, rows="left_padded")
    args = it.q, it.k, it.grid, it.scale
    pattern = register("every")(Every)()
    kernel = pick(ESTIMATE, Need.of(it.q, it.k, it.k, block=it.grid.block, chooser=pattern))
    assert kernel.name == "PyTorch"
    return kernel.run(pattern, *args).mask(), pattern.lists(*args).mask()


def test_where_triton_chooses_for_others_pytorch_chooses_for_it():
    with interpreter() as run:
        found, expected = run("tests.patterns.test_a_new_pattern.chosen")
    assert expected.any()
    assert torch.equal(found, expected)
