"""Trials against plain forward passes; heads given back against a model of which heads matter."""

from __future__ import annotations

import json
import random
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import hfsparse
from hfsparse.errors import UsageError
from hfsparse.evictions.snapkv import SnapKV
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse.plan.kept import Full
from hfsparse.profiler.job import Found, Job
from hfsparse.profiler.methods import one_pass
from hfsparse.profiler.parts import Parts
from hfsparse.profiler.progress import silent
from hfsparse.profiler.prompts.calibration import Prompt
from hfsparse.profiler.settings import Settings
from hfsparse.profiler.solve.allocation import Budget
from hfsparse.profiler.verify import answers, give_back, key_tokens, trials
from hfsparse.profiler.verify import refine as verification
from hfsparse.selectors.quest import Quest
from hfsparse.selectors.reuse import Reuse
from tests import tiny
from tests.profiler.test_capture import lively

LAYERS, KV = 4, 2


@pytest.fixture(scope="module")
def model():
    return tiny.llama(window=1024, num_hidden_layers=LAYERS)


# ---- trials


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
def test_a_value_is_said_when_greedy_decoding_says_it(patched):
    model = lively()
    seen = torch.randint(2, 400, (1, 200), generator=torch.Generator().manual_seed(0))
    first = model.generate(seen, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    more = torch.cat([first, seen[:, 20:50]], 1)
    second = model.generate(more, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    text, value = seen[0].tolist(), first[0, 200:].tolist()
    given, wrong = more[0, 205:].tolist(), second[0, -5:].tolist()
    wrong[-1] = 5 if wrong[-1] != 5 else 6
    trial = trials.Trial("by hand", text, [([], value), (given, wrong)])
    with hfsparse.patch(model) if patched else torch.no_grad():
        found = trials.run_trial(model, trial)
    assert found["said"].tolist() == [True, False]
    ids = torch.tensor([text + value + given + wrong])
    with torch.no_grad():
        scores = model(ids).logits[0].log_softmax(-1)
    picked = scores[:-1].gather(1, ids[0, 1:, None])[:, 0]
    assert found["loss"].tolist() == pytest.approx(
        [-float(picked[199:204].mean()), -float(picked[-5:].mean())], rel=1e-4
    )


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_a_trial_is_a_conversation_about_facts_in_its_text(chat):
    tokenizer = tiny.tokenizer(chat)
    made = [trials.make_trial(tokenizer, 900, i, 7) for i in range(12)]
    assert made[:4] == [trials.make_trial(tokenizer, 900, i, 7) for i in range(4)]
    assert len({trial.task for trial in made}) == 12
    for trial in made:
        assert len(trial.text) + sum(len(g) + len(v) for g, v in trial.turns) == 900
        known = trial.task.endswith("-known")
        assert bool(trial.turns[0][0]) != known
        text = tokenizer.decode(trial.text)
        assert ("?" in text[-150:]) == known
        for given, value in trial.turns:
            assert tokenizer.decode(value).strip() in text
            assert not given or "?" in tokenizer.decode(given)
    if chat:
        assert "<user>" in tokenizer.decode(made[0].turns[1][0])


def test_a_length_that_holds_no_trial_is_refused():
    with pytest.raises(UsageError, match="trials of 100 tokens are too short"):
        trials.make_trial(tiny.tokenizer(), 100, 0, 0)


# ---- what is lost


def test_values_of_one_trial_are_no_new_evidence():
    rng = np.random.default_rng(0)
    changes = [rng.integers(-1, 2, 4) for _ in range(12)]
    once, often = (
        answers.estimate_loss(changes),
        answers.estimate_loss([np.repeat(c, 10) for c in changes]),
    )
    assert (once.mean, once.low, once.high) == pytest.approx((often.mean, often.low, often.high))
    assert once.low < once.mean < once.high
    assert (once.values, often.values) == (48, 480)


def test_no_difference_in_n_trials_still_leaves_some_that_could_differ():
    alike = answers.estimate_loss([np.zeros(8, int)] * 20)
    assert (alike.mean, alike.low) == (0, -alike.high)
    assert 0.04 < (1 - alike.high) ** 20 < 0.05  # so many lost are missed once in twenty


@pytest.mark.parametrize(
    ("changes", "beyond", "told"),
    [
        ([[0, 0]] * 400, False, "within 1 %"),
        ([[1, 0], [0, 0]] * 20, True, "more than 1 %"),
        ([[1, 0]] + [[0, 0]] * 23, False, "more than 1 % is not shown, nor ruled out"),
        ([[1, 0]] * 2 + [[0, 0]] * 22, False, "more than 1 % is not shown, nor ruled out"),
        ([[1, 1]] * 2 + [[0, 0]] * 22, True, "more than 1 % is not shown, nor ruled out"),
        ([[1, 1, 1]], True, "more than 1 % is not shown, nor ruled out"),
        ([[1, 0]] * 3 + [[0, 0]] * 21, True, "more than 1 % is not shown, nor ruled out"),
        ([[1, 0]] * 6 + [[-1, 0]] * 3 + [[0, 0]] * 15, False, "more than 1 % is not shown"),
        ([[1] * 4] + [[0] * 4] * 23, False, "more than 1 % is not shown, nor ruled out"),
        ([[1, 0]] * 2 + [[0, 0]] * 98, False, "more than 1 % is not shown, nor ruled out"),
    ],
)
def test_what_trials_say_of_a_limit(changes, beyond, told):
    found = answers.estimate_loss([np.array(c) for c in changes])
    assert found.exceeds(0.01) == beyond
    assert answers.compare_to_limit(found.low, found.high, 0.01, "1 %").startswith(told)


def test_values_that_turn_by_a_hair_give_no_head_back(model, monkeypatch):
    """A ring turns every value: by chance in one plan, clearly in the other."""
    given = {}
    for by in (answers.MARGIN / 2, answers.MARGIN * 2):

        def run(model, trial, by=by):
            ring = model.get_decoder()._hfsparse.plan.layers[0].cache[0] != "full"
            return {"said": np.array([not ring] * 4), "loss": np.full(4, by * ring)}

        monkeypatch.setattr(trials, "run_trial", run)
        this = job(model)
        made = refine(this, rings(model), 0.0, 2).made["verified"]
        given[by] = made["given_back"], made["drop"], made["clearly"]
    assert given == {
        answers.MARGIN / 2: ([], 1.0, 0.0),
        answers.MARGIN * 2: (["layer 0 kv head 0"], 0.0, 0.0),
    }


# ---- heads given back


def rings(model) -> Plan:
    this = ModelId.of(model)
    layer = Layer(("r",) * this.q_heads, ("r",) * KV, ("ring",) * KV)
    return Plan(this, {"r": Streaming(4, 16)}, (layer,) * LAYERS, made={"method": "by hand"})


def job(model, parts=None) -> Job:
    prompts = {512: [], 1024: []}
    return Job(model, tiny.tokenizer(), prompts, Budget(1, 1, 1), parts or Parts(None, ""), silent)


def refine(this: Job, plan: Plan, drop: float, samples: int, nats: float = 0.1, **known) -> Plan:
    settings = Settings(drop=drop, verify_samples=samples, nats=nats)
    return verification.refine(replace(this, settings=settings), Found(plan, **known))


def believe(monkeypatch, vital: set[give_back.Unit], able: float = 1.0) -> list[str]:
    """Trials fail where one of the vital heads is a ring; answers the log of runs."""
    log = []

    def run(model, trial):
        log.append(trial.task)
        layers = model.get_decoder()._hfsparse.plan.layers
        missed = sum(layers[at].cache[g] != "full" for at, g in vital)
        said = not missed and len(trial.task) % 100 < 100 * able
        return {"said": np.array([said] * 4), "loss": np.full(4, float(missed))}

    monkeypatch.setattr(trials, "run_trial", run)
    return log


@pytest.mark.parametrize("seed", range(3))
def test_the_heads_that_break_a_plan_are_given_back_and_no_others(model, monkeypatch, seed):
    every = [(at, g) for at in range(LAYERS) for g in range(KV)]
    vital = set(random.Random(seed).sample(every, seed + 1))
    believe(monkeypatch, vital)
    this = job(model)
    plan = refine(this, rings(model), 0.01, 2)
    kept = {(at, g) for at, g in every if plan.layers[at].cache[g] == "full"}
    assert kept == vital
    plan.validate()
    verified = plan.made["verified"]
    assert verified["drop"] == 0
    assert verified["values"] == 2 * 2 * 4
    assert len(verified["given_back"]) == len(vital)
    assert plan.made["method"] == "by hand"


def test_heads_that_the_method_suspects_are_looked_at_first(model, monkeypatch):
    runs = {}
    for at, units in (("first", {(3, 0), (3, 1)}), ("last", {(0, 0), (0, 1)})):
        log, suspects = believe(monkeypatch, {(3, 0), (3, 1)}), np.zeros((LAYERS, KV))
        for unit in units:
            suspects[unit] = 1.0
        plan = refine(job(model), rings(model), 0.0, 2, suspects=suspects)
        assert plan.made["verified"]["given_back"] == ["layer 3 kv head 0", "layer 3 kv head 1"]
        runs[at] = len(log)
    assert runs["first"] < runs["last"]


def test_trials_that_lost_nothing_are_not_asked_until_the_proof(model, monkeypatch):
    """Two of twelve tasks lose: the search runs those, and all others three times in all.

    Twice more run those that tell what is lost in the end.
    """
    lose, log = ("numbers-prose", "numbers-code"), []

    def run(model, trial):
        log.append(trial.task)
        ring = model.get_decoder()._hfsparse.plan.layers[2].cache[1] != "full"
        missed = [ring and trial.task in lose] * 4
        return {"said": ~np.array(missed), "loss": np.array(missed, float)}

    monkeypatch.setattr(trials, "run_trial", run)
    this = job(model)
    plan = refine(this, rings(model), 0.0, 12)
    assert plan.made["verified"]["given_back"] == ["layer 2 kv head 1"]
    counts = {task: log.count(task) for task in log}
    others = {n for task, n in counts.items() if task not in lose}
    assert others == {5 * 2}  # dense, plan, proof; two that chose nothing, dense and plan
    assert counts["numbers-prose"] > 5 * 2


def test_no_more_is_won_back_than_is_lost_too_much(model, monkeypatch):
    """One head breaks six tasks, another two values: these may stay lost."""

    def run(model, trial):
        layers = model.get_decoder()._hfsparse.plan.layers
        many, few = layers[1].cache[0] != "full", layers[3].cache[1] != "full"
        missed = np.zeros(4)
        missed[:2] = many and not trial.task.endswith("known")
        missed[2] = few and trial.task == "numbers-prose"
        return {"said": missed == 0, "loss": missed}

    monkeypatch.setattr(trials, "run_trial", run)
    this = job(model)
    made = refine(this, rings(model), 0.0, 12).made["verified"]
    assert made["given_back"] == ["layer 1 kv head 0"]
    assert made["drop"] == made["clearly"] == round(2 / 96, 4)
    assert "clearly lost (by more than 0.1 nats a token), which may be chance" in made["told"]


@pytest.mark.parametrize("many", [True, False], ids=["a little each", "one head"])
def test_budgets_are_widened_where_that_uses_less_than_the_heads_given_back(
    model, monkeypatch, many
):
    """More than three small rings of eight heads break the trials, and wide rings don't; or one
    small ring does."""
    use, log = {"full": 1.0, "small": 0.2, "wide": 0.4, "wider": 0.9}, []

    def plan_of(word, recent):
        this = ModelId.of(model)
        layer = Layer((word,) * this.q_heads, (word,) * KV, ("ring",) * KV)
        layers = (layer,) * LAYERS
        return Plan(this, {word: Streaming(4, recent)}, layers, expected=expect(layers))

    def expect(layers):
        mean = float(np.mean([use.get(word, 0.1) for layer in layers for word in layer.cache]))
        longest = {"pair_density": mean, "cache_share": mean, "decode_share": mean / 2}
        return {512: dict.fromkeys(longest, 0.5), 1024: longest}

    def choose(budget):
        """None, then a plan that loses as much, one that doesn't, and one that uses too much."""
        steps = {0.4: None, 0.5: ("small", 20), 0.7: ("wide", 128), 1.0: ("wider", 256)}
        words = next(words for most, words in steps.items() if budget.cache <= most)
        return words and plan_of(*words)

    def run(model, trial):
        layers = model.get_decoder()._hfsparse.plan.layers
        words = [word for layer in layers for word in layer.cache]
        log.append(words[5])
        short = [word in ("r", "small") for word in words]
        missed = max(0, sum(short) - 3) if many else short[5]
        return {"said": np.array([not missed] * 4), "loss": np.full(4, float(missed))}

    monkeypatch.setattr(trials, "run_trial", run)
    this = replace(job(model), budget=Budget(1, 0.3, 0.1))
    plan = refine(this, rings(model), 0.01, 2, choose=choose, expect=expect)
    plan.validate()
    verified = plan.made["verified"]
    assert verified["drop"] == 0
    assert plan.made["method"] == "by hand"
    assert plan.expected == expect(plan.layers)
    assert "wider" not in log
    if many:
        assert {word for layer in plan.layers for word in layer.cache} == {"wide"}
        assert verified["given_back"] == []
        assert verified["budgets"] == {"cache": 0.5625, "decode": 0.4375}
        assert (
            log.count("small") < log.count("wide") == 4 * 2
        )  # a search, all trials, those that tell
    else:
        assert verified["given_back"] == ["layer 2 kv head 1"]
        assert "budgets" not in verified


def test_who_reads_pages_that_a_head_given_back_chose_reads_all(model):
    this = replace(ModelId.of(model), layers=5)
    full, words = ("full",) * this.q_heads, {"q": Quest(0.5), "again": Reuse(), "e": SnapKV()}
    rows = [("q", "q"), ("full", "kept"), ("again", "full"), ("q", "full"), ("again", "full")]
    caches = [("full", "e" if "kept" in row else "full") for row in rows]
    layers = tuple(Layer(full, cache, row) for cache, row in zip(caches, rows, strict=True))
    plan = give_back.make_full(Plan(this, words, layers), [(0, 0)])
    plan.validate()
    assert [layer.decode for layer in plan.layers] == [
        ("full", "q"),
        ("full", "kept"),
        ("full", "full"),
        ("q", "full"),
        ("again", "full"),
    ]


@pytest.mark.parametrize("whole", [False, True], ids=["bits", "ring"])
def test_bits_are_given_back_first_and_no_more_where_that_is_enough(model, monkeypatch, whole):
    """One head loses by its bits, or as a ring; another is in fewer bits and loses nothing."""
    this, lost = ModelId.of(model), (2, 1)
    few = {(0, 0): "r-int4", (2, 1): "r-int4", (3, 1): "full-int8"}
    layers = [
        Layer(("r",) * this.q_heads, tuple(few.get((at, g), "r") for g in range(KV)), decode)
        for at, decode in enumerate([("ring",) * KV] * (LAYERS - 1) + [("ring", "full")])
    ]
    words = {"r": Streaming(4, 16), "r-int4": Streaming(4, 16, bits=4), "full-int8": Full(8)}
    plan = Plan(this, words, tuple(layers))
    plan.validate()

    def run(model, trial):
        now = model.get_decoder()._hfsparse.plan
        word = now.layers[lost[0]].cache[lost[1]]
        missed = word != "full" if whole else now.patterns.get(word, words["r"]).bits != 16
        return {"said": np.array([not missed] * 4), "loss": np.full(4, float(missed))}

    monkeypatch.setattr(trials, "run_trial", run)
    found = refine(job(model), plan, 0.0, 2)
    found.validate()
    given = "layer 2 kv head 1" if whole else "layer 2 kv head 1, in 16 bits"
    assert found.made["verified"]["given_back"] == [given]
    assert found.layers[2].cache == ("r", "full" if whole else "r")
    assert found.layers[0] == plan.layers[0]
    assert found.layers[3] == plan.layers[3]


def test_a_plan_that_keeps_within_the_drop_stays_as_it_is(model, monkeypatch):
    believe(monkeypatch, set())
    this = job(model)
    plan = refine(this, rings(model), 0.0, 2)
    assert plan.hash() == rings(model).hash()
    assert plan.made["verified"]["given_back"] == []


def test_trials_are_of_what_the_dense_model_can_do_once_that_is_known(model, monkeypatch):
    """It can do two of twelve tasks, and so many trials a length are of these."""
    can, log = ("multihop-code", "numbers-prose-known"), []

    def run(model, trial):
        log.append(trial)
        return {"said": np.array([trial.task in can] * 4), "loss": np.zeros(4)}

    monkeypatch.setattr(trials, "run_trial", run)
    this = job(model)
    made = refine(this, rings(model), 0.0, 8).made["verified"]
    assert made["trials"] == 2 * 8
    assert made["values"] == 2 * 8 * 4
    assert {task for task, found in made["tasks"].items() if "drop" in found} == set(can)
    assert len(made["tasks"]) == 12
    texts = {tuple(trial.text) for trial in log}
    assert len(texts) == 2 * (12 + 8 - 2 + 8)  # two of the first round count; 8 more tell
    assert [trials.name_task(i) for i in (0, 5, 6, 11, 12)] == [
        "numbers-prose",
        "multihop-code",
        "numbers-prose-known",
        "multihop-code-known",
        "numbers-prose",
    ]


def test_a_plan_is_told_by_trials_that_chose_nothing(model, monkeypatch):
    """Two heads are vital in the trials that choose, a third one in all others: it stays a ring."""
    log, this = [], job(model)
    first = {tuple(t.text) for t in answers.draw_trials(this, range(12)).values()}

    def run(model, trial):
        layers = model.get_decoder()._hfsparse.plan.layers
        chose = tuple(trial.text) in first
        vital = [(0, 1), (2, 0)] if chose else [(3, 1)]
        lost = any(layers[at].cache[g] != "full" for at, g in vital)
        log.append((chose, [layer.cache for layer in layers]))
        return {"said": np.array([not lost] * 4), "loss": np.full(4, float(lost))}

    monkeypatch.setattr(trials, "run_trial", run)
    plan = refine(this, rings(model), 0.01, 12)
    made = plan.made["verified"]
    assert made["given_back"] == ["layer 0 kv head 1", "layer 2 kv head 0"]
    assert (made["drop"], made["kept"], made["trials"]) == (1.0, False, 2 * 12)
    assert "loses more than its limits, which was asked after all was chosen" in made["told"]
    fresh = [words for chose, words in log if not chose]
    assert len(fresh) == 2 * 2 * 12  # each once: dense, and the plan that was final
    assert [words for words in fresh if words != [("full",) * KV] * LAYERS] == [
        [layer.cache for layer in plan.layers]
    ] * (2 * 12)


def test_a_model_that_answers_no_question_is_asked_to_complete(model, monkeypatch):
    can = ("needle-noise", "copy-prose-known")

    def run(model, trial):
        layers = model.get_decoder()._hfsparse.plan.layers
        said = trial.task in can and layers[1].cache[1] == "full"
        return {"said": np.array([said] * 2), "loss": np.full(2, float(not said))}

    monkeypatch.setattr(trials, "run_trial", run)
    plan = refine(job(model), rings(model), 0.01, 4)
    made = plan.made["verified"]
    assert made["given_back"] == ["layer 1 kv head 1"]
    assert {task for task, found in made["tasks"].items() if "drop" in found} == set(can)
    assert len(made["tasks"]) == 12 + 8
    assert (made["drop"], made["kept"], made["limit"]) == (0.0, True, 0.01)


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_a_completion_begins_once_more_what_its_text_has_said(chat):
    tokenizer = tiny.tokenizer(chat)
    for i in range(8):
        trial = trials.make_trial(tokenizer, 700, i, 7, trials.COMPLETIONS)
        assert len(trial.text) + sum(len(g) + len(v) for g, v in trial.turns) == 700
        text = tokenizer.decode(trial.text)
        assert "?" not in text[-60:]
        assert "<user>" not in text
        for given, value in trial.turns:
            begun = tokenizer.decode(given) or text[-60:]
            assert begun.rpartition("\n\n")[2] + tokenizer.decode(value) in text
    needle = trials.make_trial(tokenizer, 700, 1, 7, trials.COMPLETIONS)
    assert (needle.task, len(needle.turns)) == ("needle-noise", 1)


# ---- key tokens of held-out texts


def far(monkeypatch, vital: set[give_back.Unit], nats: float = 3.0) -> list[tuple]:
    """No question can be answered; ten tokens a text cost so much more for each vital ring."""
    believe(monkeypatch, set(), able=0.0)
    log = []

    def losses(model, prompt):
        layers = model.get_decoder()._hfsparse.plan.layers
        log.append((prompt.name, [layer.cache for layer in layers]))
        loss = np.zeros(prompt.ids.shape[1] - 1)
        loss[10:20] = nats * sum(layers[at].cache[g] != "full" for at, g in vital)
        return {"loss": loss}

    monkeypatch.setattr(key_tokens, "measure_losses", losses)
    return log


def texts(model) -> Job:
    this, names = job(model), [f"prose-{i}" for i in range(2 * key_tokens.TEXTS)]
    make = torch.Generator().manual_seed(0)
    held = {
        n: [Prompt(name, torch.randint(2, 400, (1, n), generator=make), None) for name in names]
        for n in this.prompts
    }
    return replace(this, held=held)


def test_heads_that_key_tokens_need_are_given_back_where_no_task_can_be_done(model, monkeypatch):
    log = far(monkeypatch, {(0, 1), (2, 0)})
    plan = refine(texts(model), rings(model), 0.01, 2)
    plan.validate()
    made = plan.made["verified"]
    assert made["given_back"] == ["layer 0 kv head 1", "layer 2 kv head 0"]
    assert made["told"].startswith(
        "the dense model can do none of the tasks that were asked; 0.000"
    )
    assert (made["kept"], "limit" in made, plan.unproved) == (True, False, None)
    found = made["key_tokens"]
    assert (found["limit"], found["texts"], found["tokens"]) == (0.1, 8, 80)
    assert (found["nats"], found["interval"], found["worth"]) == (0.0, [0.0, 0.0], 6.0)
    told = {name for name, words in log if words == [layer.cache for layer in plan.layers]}
    assert told == {f"prose-{i}" for i in range(2 * key_tokens.TEXTS)}
    tried = [name for name, words in log if words == [("r",) * KV] * LAYERS]
    assert not {f"prose-{i}" for i in range(key_tokens.TEXTS, 8)} & set(tried)


def test_key_tokens_and_answers_are_both_kept(model, monkeypatch):
    """A head that answers need, and another that key tokens need."""
    far(monkeypatch, {(3, 0)})
    believe(monkeypatch, {(1, 1)})
    made = refine(texts(model), rings(model), 0.01, 2).made["verified"]
    assert made["given_back"] == ["layer 1 kv head 1", "layer 3 kv head 0"]
    assert made["kept"]
    assert "answers lost" in made["told"]
    assert "nats lost" in made["told"]


def test_key_tokens_that_lose_little_give_nothing_back(model, monkeypatch):
    far(monkeypatch, {(at, g) for at in range(LAYERS) for g in range(KV)})
    assert len(refine(texts(model), rings(model), 0.01, 2, 23.0).made["verified"]["told"])
    assert refine(texts(model), rings(model), 0.01, 2, 25.0).made["verified"]["given_back"] == []


@pytest.mark.parametrize("left", ["no texts", "no key tokens"])
def test_where_nothing_can_be_told_it_says_none_and_why(model, monkeypatch, left):
    far(monkeypatch, {(0, 0)}, nats=1.0)
    plan = refine(job(model) if left == "no texts" else texts(model), rings(model), 0.0, 2)
    assert plan.hash() == rings(model).hash()
    made = plan.made["verified"]
    assert made["told"] == (
        "none: the dense model can do none of the tasks that were asked, and no two texts have "
        "tokens that need the far context"
    )
    assert not {"limit", "kept", "drop"} & made.keys()
    again = Plan.loads(plan.dumps())
    assert again.unproved == plan.unproved == made["told"].removeprefix("none: ")
    again.below = type(again.below)()
    with pytest.warns(UserWarning, match="was verified by nothing .the dense model can do"):
        handle = hfsparse.patch(model, again)
    with handle, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")  # said once, not at each call
        model(torch.zeros(1, 8, dtype=torch.long))


def test_patch_says_nothing_of_plans_that_were_verified_or_never_asked_to_be(model, recwarn):
    for made in ({}, {"verified": {"told": "0.0 % of 64 answers lost"}}, {"verified": "by hand"}):
        plan = rings(model)
        plan.made = made
        hfsparse.patch(model, plan).undo()
    assert not [each for each in recwarn if "verified" in str(each.message)]
    plan.made = {"verified": {"told": "nothing: the dense model can do none of these tasks"}}
    with pytest.warns(UserWarning, match="verified by nothing"):  # a plan of 0.1
        hfsparse.patch(model, plan).undo()


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
def test_losses_of_a_text_are_those_of_one_forward_pass(patched):
    model = lively()
    ids = torch.randint(2, 400, (1, 403), generator=torch.Generator().manual_seed(0))
    with hfsparse.patch(model) if patched else torch.no_grad():
        found = key_tokens.measure_losses(model, Prompt("x", ids, None))["loss"]
    with torch.no_grad():
        scores = model(ids).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(scores, ids[0, 1:], reduction="none")
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-4)


def named(count: int) -> list[Prompt]:
    return [Prompt(f"data-{i}", torch.tensor([[i]]), None) for i in range(count)]


@pytest.mark.parametrize(
    ("there", "kept", "held"), [(14, 6, 8), (9, 6, 3), (8, 6, 2), (6, 5, 1), (3, 3, 0)]
)
def test_texts_are_held_out_of_calibration(there, kept, held):
    some, out = key_tokens.hold_out({512: named(there)}, 6)
    assert (len(some[512]), len(out[512])) == (kept, held)
    assert not {p.name for p in some[512]} & {p.name for p in out[512]}


def test_your_texts_that_prove_a_plan_have_not_calibrated_it(model, monkeypatch, tmp_path):
    file, seen = tmp_path / "own.jsonl", {}
    rows = [json.dumps({"text": f"{i} and so on, " * 200}) for i in range(8)]
    file.write_text("\n".join(rows))

    def watch(module, name, at):
        function = getattr(module, name)

        def run(*args):
            seen.setdefault(name, set()).add(args[at].name)
            return function(*args)

        monkeypatch.setattr(module, name, run)

    watch(one_pass, "measure_prompt", 1)
    watch(key_tokens, "measure_losses", 1)
    believe(monkeypatch, set())
    hfsparse.profile(
        model, tiny.tokenizer(), lengths=(512,), samples=2, data=file, verify_samples=1
    )
    yours = {name for name in seen["measure_losses"] if name.startswith("data-")}
    assert len(seen["measure_prompt"]) == 2
    assert len(yours) == 6
    assert not yours & seen["measure_prompt"]


def test_a_text_held_out_at_one_length_is_held_out_at_all():
    every = named(14)
    found = {512: every, 1024: every[:3] + every[9:12] + every[4:6]}
    some, out = key_tokens.hold_out(found, 6)
    kept = {p.name for each in some.values() for p in each}
    held = {p.name for each in out.values() for p in each}
    assert kept
    assert held
    assert not kept & held
    full = key_tokens.fill_up(tiny.tokenizer(), {700: named(3)}, 0)[700]
    assert [p.name for p in full[:2]] == ["data-0", "retrieval-prose-0"]
    assert [p.name for p in full[4:7]] == ["data-1", "data-2", "retrieval-code-4"]
    assert len(full) == 2 * key_tokens.TEXTS


def shortness(monkeypatch) -> list[str]:
    """Trials fail where rings are short, a little for each; answers the log of runs."""
    log = []

    def run(model, trial):
        log.append(trial.task)
        plan = model.get_decoder()._hfsparse.plan
        words = [word for layer in plan.layers for word in layer.cache if word != "full"]
        missed = max(0.0, sum(max(0, 96 - plan.patterns[w].band.span(512)) for w in words) / 32 - 2)
        return {"said": np.array([not missed] * 4), "loss": np.full(4, missed)}

    monkeypatch.setattr(trials, "run_trial", run)
    return log


@pytest.mark.parametrize("changed", ["given_back", "budgets"])
def test_a_profile_killed_anywhere_goes_on_and_ends_in_the_same_plan(
    model, monkeypatch, tmp_path, changed
):
    vital = {(1, 0), (3, 1)}
    log = believe(monkeypatch, vital) if changed == "given_back" else shortness(monkeypatch)
    settings = dict(
        lengths=(512,), samples=2, cache_share=0.4, decode_share=0.6, seed=3, verify_samples=2
    )
    whole = hfsparse.profile(model, tiny.tokenizer(), **settings)
    assert whole.made["verified"][changed]
    needed, rng, left = len(log), random.Random(0), [0]
    log.clear()

    def mortal(function):
        def run(*args):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return function(*args)

        return run

    monkeypatch.setattr(trials, "run_trial", mortal(trials.run_trial))
    monkeypatch.setattr(one_pass, "measure_prompt", mortal(one_pass.measure_prompt))
    for _ in range(100):
        left[0] = rng.randrange(1, 9)
        try:
            plan = hfsparse.profile(model, tiny.tokenizer(), out=tmp_path / "p.yaml", **settings)
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "p.yaml").exists()
    assert plan.hash() == whole.hash() == Plan.load(tmp_path / "p.yaml").hash()
    assert len(log) <= needed  # nothing twice
    assert [each.name for each in tmp_path.iterdir()] == ["p.yaml"]
