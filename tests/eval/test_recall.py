"""The mass on the needle against eager attention, and what is kept of it against the oracle."""

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from hfsparse.evictions.snapkv import SnapKV
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import Below, Layer, ModelId, Plan
from hfsparse.selectors.quest import Quest
from hfsparse.selectors.reuse import Reuse
from hfsparse_eval.cli import app
from hfsparse_eval.probes import recall
from hfsparse_eval.run.prompter import Prompter
from hfsparse_eval.run.samples import Case, Maker
from hfsparse_eval.tasks import TASKS
from tests.eval.running import goes_on
from tests.patcher import oracle

PATTERNS = {
    "s": Streaming(sink=8, recent=32, recent_per_token=0.1),
    "b": BlockTopK(share=0.2, min_blocks=2),
    "q": Quest(share=0.2, min_pages=2),
    "r": Reuse(),
}


def plan_of(model, **changes):
    layers = (
        Layer(("s", "s", "b", "full"), ("s", "full"), ("ring", "q")),
        Layer(("full", "b", "b", "s"), ("full", "full"), ("full", "r")),
    )
    full = Plan.full(ModelId.of(model))
    return replace(full, patterns=PATTERNS, layers=layers, **changes)


@pytest.mark.parametrize("below", [0, 500])
def test_what_is_kept_is_what_the_oracle_lets_heads_read(below, model):
    limits = Below(prefill=below, decode=below, cache=below)
    plan = plan_of(model, below=limits)
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 420, 16), torch.randn(1, 2, 420, 16)
    first = 400
    rows, eye = torch.arange(first, 420), recall.Kept(plan, first)
    key = torch.arange(420)
    for layer in range(2):
        kept = eye.mask(layer, q, k, rows, 0.25) & (key <= rows[:, None])
        for head in range(4):
            own, seen = q[0, 2 * (head // 2) : 2 * (head // 2) + 2], k[0, head // 2]
            prompt = oracle._prompt(
                plan, layer, head, head // 2, q[0, head, : first + 1], seen[: first + 1], 0.25, None
            )[-1]
            assert torch.equal(kept[head, 0, : first + 1], prompt)
            asked = (
                replace(plan, layers=(plan.layers[0],) * 2)
                if (layer, head // 2) == (1, 1)
                else plan
            )
            truth = oracle.Truth(asked, (), keeps=range(2))
            for i, row in enumerate(rows[1:].tolist(), 1):
                want = oracle._decode(
                    truth, layer, head // 2, own[:, row : row + 1], seen[: row + 1], 0.25
                )
                assert torch.equal(kept[head, i, : row + 1], want[0]), (layer, head, row)
    assert bool((~kept).any())


@torch.no_grad()
def test_mass_is_that_of_eager_attention_and_a_full_plan_keeps_it(model, tokenizer):
    maker = Maker(TASKS["niah_single_2"], 600, Prompter(tokenizer))
    sample = maker.sample(Case("niah_single_2", 600, None, 0))
    full = Plan.full(ModelId.of(model))
    told, lossy = recall.look(model, tokenizer, sample, [full, plan_of(model)])
    right = tokenizer(f" {sample.answers[0]}", add_special_tokens=False).input_ids
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    out = model(torch.tensor([[*sample.ids, *right]]), output_attentions=True).attentions
    model.set_attn_implementation(before)
    (low, high), start = sample.gold[0], len(sample.ids) - 1
    rows = slice(start, start + len(right))
    mass = [layer[0, :, rows, low:high].sum(2).mean(1) for layer in out]
    assert told["mass"] == pytest.approx(float(sum(m.sum() for m in mass)), rel=1e-4)
    assert told["kept"] == told["mass"] == lossy["mass"]
    assert told["lost"] == []
    assert lossy["kept"] < lossy["mass"]
    assert {(x["layer"], x["head"]) for x in lossy["lost"]} <= {
        (0, 0),
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 1),
        (1, 2),
        (1, 3),
    }
    named = next(x for x in lossy["lost"] if (x["layer"], x["head"]) == (0, 1))
    assert named["mass"] == pytest.approx(float(mass[0][1]), abs=1e-4)
    assert named["words"] == "prefill s, cache s, decode ring"


def test_the_command_names_the_heads_and_goes_on(folder, model, tmp_path):
    plan_of(model).save(tmp_path / "plan.yaml")
    words = ["recall", str(folder), "-o", str(tmp_path / "out"), "--lengths", "600"]
    words += ["--plan", str(tmp_path / "plan.yaml"), "--tasks", "niah_single_2", "--samples"]
    lines, report = goes_on(words, tmp_path / "out")
    assert [line["arm"] for line in lines] == ["dense", "sparse"] * 2
    assert "## Lost by heads: plan, all samples" in report
    assert "| prefill s, cache s, decode ring |" in report
    refused = CliRunner().invoke(app, [*words, "2", "--tasks", "cwe"])
    assert refused.stderr.startswith("error: unknown task cwe: did you mean ")
    evicting = Layer(("full",) * 4, ("e",) * 2, ("kept",) * 2)
    evicting = replace(plan_of(model), patterns={"e": SnapKV()}, layers=(evicting,) * 2)
    evicting.save(tmp_path / "plan.yaml")
    refused = CliRunner().invoke(app, [*words, "2"])
    assert refused.stderr.startswith("error: plan has kv heads that evict keys: recall can't ")
