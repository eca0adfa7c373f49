"""Perplexity and divergence against plain definitions on whole logits."""

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import hfsparse
from hfsparse.errors import UsageError
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse_eval.cli import app
from hfsparse_eval.probes import perplexity as ppl
from tests.eval.running import goes_on
from tests.support.models import causal

TEXT = " ".join(f"The {n} seas are {n * 7 % 31} miles deep." for n in range(400))


def streaming(model):
    layer = Layer(("s",) * 4, ("s",) * 2, ("ring",) * 2)
    full = Plan.full(ModelId.of(model))
    return replace(full, patterns={"s": Streaming(sink=8, recent=32)}, layers=(layer,) * 2)


@torch.no_grad()
def test_sums_equal_those_of_whole_logits(model, tokenizer, monkeypatch):
    monkeypatch.setattr(ppl, "ROWS", 100)
    window = ppl.windows(tokenizer, TEXT, 400, 2, stride=150)[1]
    assert window.first == 250
    dense = ppl.hidden(model, window.ids)
    ids = torch.tensor([window.ids])
    p = model(ids).logits[0].log_softmax(-1)
    with hfsparse.patch(model, streaming(model)):
        sparse = ppl.hidden(model, window.ids)
        q = model(ids).logits[0].log_softmax(-1)
    told = ppl.compare(model, window.ids, dense, sparse, window.first)
    assert [(b["from"], b["tokens"]) for b in told] == [(64, 6), (256, 144)]
    for b, low, high in zip(told, (250, 256), (256, 400), strict=True):
        before = slice(low - 1, high - 1)
        loss = torch.nn.functional.nll_loss(q[before], ids[0, low:high], reduction="sum")
        kl = torch.nn.functional.kl_div(q[before], p[before], log_target=True, reduction="sum")
        same = (p[before].argmax(1) == q[before].argmax(1)).sum()
        for name, want in {"loss": loss, "kl": kl, "same": same}.items():
            assert b[name] == pytest.approx(float(want), rel=1e-4)
    assert told[1]["kl"] > 0


def test_windows_slide_and_score_each_token_once(tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    made = ppl.windows(tokenizer, TEXT, 300, 4, stride=100)
    assert [len(window.ids) for window in made] == [300] * 4
    assert {window.ids[0] for window in made} == {tokenizer.bos_token_id}
    scored = [token for window in made for token in window.ids[window.first :]]
    assert scored == ids[: 299 + 3 * 100]
    alone = ppl.windows(tokenizer, TEXT, 300, 2)
    assert [token for window in alone for token in window.ids[1:]] == ids[:598]
    assert [window.first for window in alone] == [1, 1]
    with pytest.raises(UsageError, match="length 2 has no token to foresee"):
        ppl.windows(tokenizer, TEXT, 2, 2)
    with pytest.raises(UsageError, match="the text has 2 tokens"):
        ppl.windows(tokenizer, "abc", 300, 2)


@torch.no_grad()
def test_a_model_that_scales_its_logits_is_read_as_it_scales_them():
    torch.manual_seed(0)
    sizes = dict(num_attention_heads=4, num_key_value_heads=2, logits_scaling=8.0)
    granite, ids = causal("Granite", **sizes).eval(), torch.arange(2, 32)
    found = ppl.log_probabilities(granite, ppl.hidden(granite, ids.tolist()))
    torch.testing.assert_close(found, granite(ids[None]).logits[0].log_softmax(-1))


def test_the_command_reports_by_position_and_goes_on(folder, model, tmp_path):
    Plan.full(ModelId.of(model)).save(tmp_path / "full.yaml")
    streaming(model).save(tmp_path / "stream.yaml")
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["ppl", str(folder), "-o", str(tmp_path / "out"), "--data", str(tmp_path / "text.txt")]
    words += ["--plan", str(tmp_path / "full.yaml"), "--plan", str(tmp_path / "stream.yaml")]
    words += ["--lengths", "200,400", "--samples"]
    lines, report = goes_on(words, tmp_path / "out")
    assert len({(line["id"], line["plan"]) for line in lines}) == len(lines) == 12
    rows = [line.strip("| ").split(" | ") for line in report.splitlines()]
    whole = {(r[0], r[1]): r for r in rows if len(r) == 9 and r[1] in ("200", "400")}
    assert [r[2] for r in whole.values()] == ["2"] * 6
    assert whole["full", "400"][3:7] == [*whole["dense", "400"][3:5], "0.00000", "100.00"]
    assert float(whole["stream", "400"][5]) > 0
    assert float(whole["stream", "400"][7]) < 0.5
    refused = CliRunner().invoke(app, [*words, "2", "--stride", "100"])
    assert "holds results with stride None, this run has 100" in refused.stderr
    absent = CliRunner().invoke(app, ["ppl", str(folder), "--data", "absent.txt"])
    assert absent.stderr.strip() == "error: absent.txt: can't read: No such file or directory"


def test_an_arm_that_fails_is_noted_and_the_next_window_goes_on(
    folder, model, tmp_path, monkeypatch
):
    def failing(model, ids, dense, found, first):
        if found is not dense and not seen:
            seen.append(ids)
            raise torch.OutOfMemoryError("80 GiB")
        return compare(model, ids, dense, found, first)

    compare, seen = ppl.compare, []
    monkeypatch.setattr(ppl, "compare", failing)
    streaming(model).save(tmp_path / "stream.yaml")
    words = ["ppl", str(folder), "-o", str(tmp_path / "out"), "--lengths", "200", "--samples", "2"]
    words += ["--plan", str(tmp_path / "stream.yaml")]
    result = CliRunner().invoke(app, words)
    assert "1 rounds failed, the first at ppl-200-199-0000 under sparse (OutOfMe" in result.stderr
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| stream | 200 | 1 of 2 | OutOfMemoryError: 80 GiB |" in report
    assert "| stream | 200 | 1 | " in report.split("## By position")[0]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert "Missing" not in (tmp_path / "out" / "report.md").read_text()
