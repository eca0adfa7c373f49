"""Plans of other projects: what each head becomes, what a plan can't carry, what is refused."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import Llama4TextConfig, LlamaConfig, MistralConfig
from typer.testing import CliRunner

from hfsparse.cli import app
from hfsparse.errors import UsageError
from hfsparse.kernels.reference import prefill as attend
from hfsparse.lists import Grid
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.streaming import Streaming
from hfsparse.patterns.vertical_slash import VerticalSlash
from hfsparse.plan import Layer, ModelId, Plan, PlanError, PlanMismatch
from hfsparse.plan.importers import READERS, duo, import_plan, moa
from hfsparse.plan.importers.form import FORMS, describe_heads
from tests import tiny
from tests.patcher.oracle import oracle
from tests.patcher.runs import both, close, far, forward, generate, same_generation
from tests.support.models import exists
from tests.support.models import tiny as supported

VS, STREAM, BLOCKS = "vertical_and_slash", "stream_llm", "block_sparse"
MINFERENCE = [  # layers x 4 q heads
    {
        "0": [VS, 40, 120, 0.9],
        "1": [VS, 10, 20, 0.9],
        "2": [STREAM, 4, 60, 0.7],
        "3": [VS, 40, 120],
    },
    {"0": [BLOCKS, 1000, 6096, 1], "1": [BLOCKS, 1, 1, 1], "2": [VS, 40, 50, 1], "3": [VS, 30, 50]},
]
GATES = [[0.9, -0.001], [0.2, 1.0]]  # layers x 2 kv heads
DUO = {"sink_size": 128, "recent_size": 256, "deploy_sink_size": None, "lr": 0.02}
MOA = {  # layers x 4 q heads
    "alphas": [[0.0, 0.0, 192.0, 160.0], [-1024.0, 100.0, 0.0, -64.0]],
    "betas": [[0.125, 0.125, 0.0, 0.25], [1.0, 0.0, 1, 0.5]],
}


MODELOPT = {  # a checkpoint's config.json
    "model_type": "llama",
    "sparse_attention_config": {
        "config_groups": {
            "group_0": {
                "algorithm": "skip_softmax",
                "targets": ["LlamaAttention"],
                "threshold_scale_factor": {
                    "formula": "a * exp(b * target_sparsity)",
                    "prefill": {"a": 7.93, "b": 8.61},
                    "decode": {"a": 0.12, "b": 9.85},
                },
                "target_sparsity": {"prefill": 0.4, "decode": 0.5},
            }
        },
        "producer": {"name": "modelopt", "version": "0.47.0"},
    },
}
HEADS = [form for form in FORMS if form != "modelopt"]  # forms that speak of heads


def config(**shape):
    base = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    return LlamaConfig(architectures=["LlamaForCausalLM"], **{**base, "hidden_size": 64, **shape})


def write(folder, form, data=None, settings=DUO):
    """A small file, or folder, of the published form."""
    if form != "duo":
        file = folder / f"{form}.json"
        file.write_text(
            json.dumps(
                {"minference": MINFERENCE, "moa": MOA, "modelopt": MODELOPT}[form]
                if data is None
                else data
            )
        )
        return file
    place = folder / "gates"
    place.mkdir()
    rows = ["\t".join(f"{gate:.18e}" for gate in row) for row in (GATES if data is None else data)]
    (place / "full_attention_heads.tsv").write_text("\n".join(rows) + "\n")
    (place / "config.json").write_text(json.dumps(settings))
    return place


def read(folder, form, data=None, given=None, share=None, **settings):
    file = write(folder, form, data, {**DUO, **settings})
    length = 32_768 if form == "modelopt" else None
    return import_plan(form, file, given or config(), share, length)


def note(notes, words):
    """The one note that says `words`."""
    (found,) = [each for each in notes if words in each]
    return found


# ---- minference


def test_minference_is_a_pattern_a_q_head_and_a_full_cache(tmp_path):
    plan, notes = read(tmp_path, "minference")
    full = ("full", "full")
    assert plan.layers == (
        Layer(("vs40x120", "vs30x50", "stream4-60", "vs40x120"), full, full),
        Layer(("blocks50", "blocks50", "vs40x50", "vs30x50"), full, full),
    )
    assert plan.patterns == {
        "vs40x120": VerticalSlash(40, 120),
        "vs30x50": VerticalSlash(30, 50),
        "stream4-60": Streaming(4, 60),
        "blocks50": BlockTopK(0.0001, 50),
        "vs40x50": VerticalSlash(40, 50),
    }
    assert plan.made["method"] == "minference"
    assert plan.made["imported"] == "minference.json"
    assert len(notes) == 4
    assert note(notes, "block_sparse").endswith(": layer 1 heads 0-1")
    assert note(notes, "raised to").endswith(": layer 0 head 1")


def test_minference_block_sparse_reads_its_6400_tokens_at_any_published_length(tmp_path):
    pattern = read(tmp_path, "minference")[0].patterns["blocks50"]
    for blocks in (1 << 20) // 128, 50:
        assert pattern.share * blocks < pattern.min_blocks
    assert pattern.min_blocks * 128 == 100 * 64


# ---- duo


def test_duo_streams_the_lower_half_of_the_gates_and_keeps_rings(tmp_path):
    plan, notes = read(tmp_path, "duo")
    s = "stream64-256"
    assert plan.layers == (
        Layer(("full", "full", s, s), ("full", s), ("full", "ring")),
        Layer((s, s, "full", "full"), (s, "full"), ("ring", "full")),
    )
    assert plan.patterns == {s: Streaming(64, 256)}
    assert plan.made["share"] == 0.5
    assert note(notes, "trained with") == (
        "trained with sink 128 and recent 256, imported with sink 64 and recent 256, as deployed"
    )


def test_duo_takes_the_sizes_of_a_deployment_that_the_file_states(tmp_path):
    plan, _ = read(tmp_path, "duo", deploy_sink_size=16, deploy_recent_size=32)
    assert plan.patterns == {"stream16-32": Streaming(16, 32)}


@pytest.mark.parametrize("share", [0, 0.1, 0.25, 0.5, 0.74, 0.9, 1])
@pytest.mark.parametrize("shape", [(1, 3), (4, 8), (32, 8)])
def test_duo_cuts_where_the_authors_quantile_does(shape, share):
    import numpy as np

    gates = np.random.default_rng(0).permutation(np.prod(shape)).reshape(shape) / np.prod(shape)
    streams, tied = duo.cut(gates.tolist(), share)
    kept = {0: -1.0, 1: 2.0}.get(share, np.quantile(gates, share))
    assert streams == (gates < kept).tolist()
    assert tied == {}


def test_duo_parts_equal_gates_in_order_and_says_so(tmp_path):
    plan, notes = read(tmp_path, "duo", [[1.0, 1.2], [0.1, 1.0]])  # 1.2 is clipped to 1
    assert [layer.cache.count("full") for layer in plan.layers] == [1, 1]
    assert plan.layers[0].cache == ("stream64-256", "full")
    assert note(notes, "equal gates").endswith(": layer 0 heads 0-1; layer 1 head 1")


def test_duo_share_sets_how_many_heads_stream(tmp_path):
    file = write(tmp_path, "duo")
    for share, full in ((0.0, 4), (0.25, 3), (0.5, 2), (0.75, 1), (1.0, 0)):
        plan, _ = import_plan("duo", file, config(), share)
        assert sum(layer.cache.count("full") for layer in plan.layers) == full
        assert plan.made["share"] == share


# ---- moa


def test_moa_is_a_span_with_a_rate_and_rings_that_hold_their_group(tmp_path):
    plan, notes = read(tmp_path, "moa")
    slow, wide, fast, most = (
        "stream64-128-0.125",
        "stream64-192",
        "stream64-160-0.25",
        "stream64-192-0.25",
    )
    assert plan.layers == (
        Layer((slow, slow, wide, fast), (slow, most), ("ring", "ring")),
        Layer(("full", "stream64-128", "full", "stream64-128-0.5"), ("full",) * 2, ("full",) * 2),
    )
    assert plan.patterns[fast] == Streaming(64, 160, 0.25)
    assert plan.patterns[most] == Streaming(64, 192, 0.25)
    assert len(notes) == 5
    assert note(notes, "longest span").endswith(": layer 0 head 1")
    assert note(notes, "keep every key").endswith(": layer 1 heads 0-1")
    assert note(notes, "as beta is 1").endswith(": layer 1 head 0")  # head 2 is dense there, too
    assert note(notes, "tokens longer").endswith(": layer 0 heads 0-1; layer 1 head 3")


@pytest.mark.parametrize("alpha", [-4096.0, -0.5, 0.0, 99.5, 1024.0])
@pytest.mark.parametrize("beta", [0.0, 0.125, 0.3, 0.875, 1.0])
def test_moa_spans_are_never_shorter_than_the_rule_nor_longer_than_the_note_says(alpha, beta):
    pattern = moa.elastic(alpha, beta)
    for position in (0, 1, 127, 1000, 8191, 131_071):
        rule = max(128, alpha + beta * position)
        if pattern is None:
            assert beta == 1
            continue
        span = pattern.band.span(position)
        assert span > rule - 2  # the rate is held in 1/65536: two tokens in 131,072
        assert span <= rule + max(0, 128 - alpha) + 2


def test_moa_says_which_keys_it_did_not_read(tmp_path):
    _, notes = read(tmp_path, "moa", {**MOA, "permute": True})
    assert note(notes, "not read:").endswith("not read: 'permute'")


# ---- modelopt


def modelopt(group=None, **block):
    """A file of one group, and what stands beside the groups."""
    group = {"algorithm": "skip_softmax", **(group or {})}
    return {"sparse_attention_config": {"config_groups": {"group_0": group}, **block}}


def test_modelopt_is_a_full_plan_with_a_skip(tmp_path):
    plan, notes = read(tmp_path, "modelopt")
    threshold = 7.93 * math.exp(8.61 * 0.4) / 32_768  # as its documentation has it
    assert math.exp(-plan.skip) == pytest.approx(threshold, rel=1e-5)
    assert plan == replace(Plan.full(ModelId.of(config())), skip=plan.skip, made=plan.made)
    assert plan.made | {"version": "x"} == {
        "version": "x",
        "method": "modelopt",
        "imported": "modelopt.json",
        "length": 32_768,
    }
    assert len(notes) == 4
    assert note(notes, "steps skip tiles, too").startswith("a step reads every key")
    assert note(notes, "at 32768 tokens").startswith(f"skip {plan.skip:.6g} is its threshold")


@pytest.mark.parametrize(
    ("data", "threshold"),
    [
        (  # as versions before 0.45 wrote it
            {
                "config_groups": {"group_0": {"sparse_algo": "softmax_skip"}},
                "threshold_scale_factor": {"prefill": {"a": 2.0, "b": 3.0}},
                "target_sparse_ratio": {"prefill": 0.7, "decode": 0.1},
            },
            2 * math.exp(3 * 0.7) / 4096,
        ),
        (
            {
                "config_groups": {"group_0": {"sparse_algo": "softmax_skip"}},
                "threshold_scale_factor": 437.7,
                "target_sparsity": 0.3,
            },
            437.7 / 4096,
        ),
        (
            modelopt(
                {
                    "threshold_scale_factor": {
                        "formula": "exp(log_a + b * target_sparsity)",
                        "coefficients": {"log_a": -1.5, "b": 9.0},
                    },
                    "target_sparsity": 0.6,
                }
            ),
            math.exp(-1.5 + 9 * 0.6) / 4096,
        ),
        (  # no target: ModelOpt takes 0.5
            modelopt({"threshold_scale_factor": {"prefill": {"a": 2, "b": 3}}}),
            2 * math.exp(3 * 0.5) / 4096,
        ),
    ],
    ids=["older", "a number", "logarithm", "no target"],
)
def test_modelopt_thresholds_of_every_form_are_those_of_its_formula(tmp_path, data, threshold):
    plan, notes = import_plan("modelopt", write(tmp_path, "modelopt", data), config(), length=4096)
    assert math.exp(-plan.skip) == pytest.approx(threshold, rel=1e-5)
    untold = "target" not in json.dumps(data)
    assert untold == any("0.5 is taken, as ModelOpt does" in each for each in notes)


def test_a_fixed_threshold_of_modelopt_is_that_of_every_length(tmp_path):
    file = write(tmp_path, "modelopt", modelopt({"threshold": 1e-3}))
    plan, notes = import_plan("modelopt", file, config())
    assert plan.skip == pytest.approx(-math.log(1e-3), abs=1e-6)
    assert len(notes) == 2
    with pytest.raises(UsageError, match="has one threshold for every length: leave --length out"):
        import_plan("modelopt", file, config(), length=4096)


def test_a_tile_is_skipped_by_the_imported_threshold_and_by_no_smaller_one(tmp_path):
    """One row of 128 queries reads its diagonal first, then one tile that lies 2 nats lower."""
    q, v = torch.zeros(1, 1, 256, 16), torch.randn(1, 1, 256, 16)
    q[..., 0] = 1.0
    k = torch.zeros_like(q)
    k[:, :, :128, 0] = -2.0
    lists = Streaming(0, 256).lists(q, k, Grid.causal(1, 256, 128), 1.0)
    dense = attend(q, k, v, lists, torch.zeros(1, dtype=torch.long), scale=1.0)
    for threshold, skipped in ((math.exp(-2.01), False), (math.exp(-1.99), True)):
        file = write(tmp_path, "modelopt", modelopt({"threshold": threshold}))
        skip = import_plan("modelopt", file, config())[0].skip
        got = attend(q, k, v, lists, torch.zeros(1, dtype=torch.long), scale=1.0, skip=skip)
        assert torch.equal(got[:, :, :128], dense[:, :, :128])
        assert torch.equal(got, dense) != skipped
        if skipped:
            last = v[0, 0, 128:].mean(0)
            torch.testing.assert_close(got[0, 0, 255], last, atol=1e-5, rtol=1e-5)


def test_what_a_plan_cannot_take_from_modelopt_is_told(tmp_path):
    data = modelopt({"threshold": 0.01, "initial_disabled_steps": 3})
    sparse = {"algorithm": "sparse_softmax", "sparsity_n": 2}
    data["sparse_attention_config"]["config_groups"]["group_1"] = sparse
    _, notes = import_plan("modelopt", write(tmp_path, "modelopt", data), config())
    assert note(notes, "other algorithms").endswith(": 'sparse_softmax'")
    assert note(notes, "not read:").endswith("not read: 'initial_disabled_steps'")


# ---- every form


def test_every_form_is_described_and_read():
    assert READERS.keys() == FORMS.keys()


@pytest.mark.parametrize("form", FORMS)
def test_an_imported_plan_survives_its_file(tmp_path, form):
    plan, _ = read(tmp_path, form)
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml") == plan


@pytest.mark.parametrize("form", HEADS)
def test_a_patched_model_equals_the_oracle_under_an_imported_plan(tmp_path, form):
    model = tiny.llama()
    model.requires_grad_(False)
    for parameter in model.parameters():  # sharp attention: what is dropped shows
        parameter.mul_(4 if parameter.dim() == 2 else 1)
    plan, _ = read(tmp_path, form, given=model)
    ids = torch.randint(2, 400, (1, 440), generator=torch.Generator().manual_seed(0))
    dense = forward(model, ids).logits
    got, want, stats = both(model, plan, lambda m, cache: forward(m, ids, **cache).logits)
    close(got / got.std(), want / got.std())
    far(got, dense)
    with oracle(model, plan) as truth:
        forward(model, ids)
    pairs = sum(truth.pairs.values()) / sum(truth.causal.values())
    assert stats.pair_density == pytest.approx(pairs, abs=1e-6)
    if form == "duo":  # half of the heads read all, half a sink of 64 and the last 256
        kept = sum(min(p + 1, 64 + 256) for p in range(440)) / sum(range(441))
        assert pairs == pytest.approx((1 + kept) / 2, abs=1e-6)


@pytest.mark.parametrize("form", ["duo", "moa"])
def test_generation_from_rings_equals_the_oracle(tmp_path, form):
    model = tiny.llama()
    plan, _ = read(tmp_path, form, given=model)
    ids = torch.randint(2, 400, (1, 400), generator=torch.Generator().manual_seed(1))
    got, want, _ = both(model, plan, lambda m, cache: generate(m, ids, new=6, **cache))
    same_generation(got, want)


@pytest.mark.parametrize("form", ["duo", "moa"])
def test_layers_with_their_own_window_stream_and_have_no_ring(tmp_path, form):
    given = MistralConfig(**{**config().to_dict(), "sliding_window": 4096, "model_type": "mistral"})
    plan, notes = read(tmp_path, form, given=given)
    assert all({*layer.cache, *layer.decode} == {"full"} for layer in plan.layers)
    assert any(word.startswith("stream") for word in plan.layers[0].prefill)
    assert "layer 0 head" in note(notes, "own window")


@pytest.mark.parametrize("form", ["minference", "duo", "moa"])
def test_layers_with_chunks_of_their_own_stay_full(tmp_path, form):
    sizes = {**config().to_dict(), "attention_chunk_size": 4096, "model_type": "llama4_text"}
    kinds = ["chunked_attention"] + ["full_attention"] * (sizes["num_hidden_layers"] - 1)
    plan, notes = read(tmp_path, form, given=Llama4TextConfig(**{**sizes, "layer_types": kinds}))
    first, *others = plan.layers
    assert {*first.prefill, *first.cache, *first.decode} == {"full"}
    assert any({*layer.prefill} != {"full"} for layer in others)
    assert "layer 0 head" in note(notes, "layers in chunks")


def test_places_group_equal_layers_and_neighbouring_heads():
    where = {0: [0, 1, 2, 5], 1: [0, 1, 2, 5], 3: [0, 1, 2, 5], 4: [7]}
    assert describe_heads(where) == "layers 0-1, 3 heads 0-2, 5; layer 4 head 7"


# ---- what is refused


def test_an_unknown_form_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(
        UsageError, match="unknown form 'quest': give one of minference, duo, moa, modelopt"
    ):
        import_plan("quest", tmp_path, config())
    with pytest.raises(UsageError, match=r"did you mean minference\?"):
        import_plan("minferense", tmp_path, config())


@pytest.mark.parametrize("form", HEADS)
@pytest.mark.parametrize(
    "shape",
    [
        dict(num_hidden_layers=3),
        dict(num_attention_heads=8, num_key_value_heads=4),
    ],
    ids=["layers", "heads"],
)
def test_a_plan_of_another_shape_is_refused(tmp_path, form, shape):
    unit = "2 kv heads" if form == "duo" else "4 q heads"
    with pytest.raises(PlanMismatch, match=f"has 2 layers of {unit}; LlamaForCausalLM has"):
        read(tmp_path, form, given=config(**shape))


@pytest.mark.parametrize("form", HEADS)
def test_without_a_config_the_error_says_what_is_needed_and_what_the_file_has(tmp_path, form):
    with pytest.raises(UsageError, match=r"has 2 layers of . \w+ heads, .*give --model-config"):
        import_plan(form, write(tmp_path, form))


def test_without_a_config_a_file_that_says_nothing_of_heads_needs_one_too(tmp_path):
    file = write(tmp_path, "modelopt")
    with pytest.raises(
        UsageError, match=r"has a skip, and says no more of its model; .*give --model-config"
    ):
        import_plan("modelopt", file, length=4096)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("other", FORMS)
def test_the_file_of_another_form_is_refused_by_what_was_found(tmp_path, form, other):
    file = write(tmp_path, other)
    if form == other:
        return
    with pytest.raises(PlanError) as refused:
        import_plan(form, file, config())  # a length is asked for where a file has its form
    message = str(refused.value)
    assert message.startswith(f"{file}")
    assert f"no {form} plan: " in message
    assert all(text in message for text in FORMS.values())
    assert "\n" not in message


@pytest.mark.parametrize(
    ("form", "data", "found"),
    [
        ("minference", [], "an empty list"),
        ("minference", {"alphas": []}, "a mapping with the keys 'alphas'"),
        ("minference", [[1, 2]], "layer 0 is a list of 2"),
        ("minference", [{"0": [VS, 1, 1], "2": [VS, 1, 1]}], "layer 0 is a mapping with the keys"),
        ("minference", [{"0": [VS, 1]}], "layer 0 head 0 is a list of 2"),
        ("minference", [{"0": [VS, 1, -1]}], "layer 0 head 0 is a list of 3"),
        ("minference", [{"0": [VS, 1, 1.5]}], "layer 0 head 0 is a list of 3"),
        ("minference", [{"0": ["flexible", 1, 1]}], "has the type 'flexible', known are vertical"),
        ("minference", [{"0": [STREAM, 4, 0]}], "layer 0 head 0: recent is 0: give 1 or more"),
        (
            "minference",
            [{"0": [VS, 1, 1]}, {"0": [VS, 1, 1], "1": [VS, 1, 1]}],
            "it has layers of 1 and 2 heads",
        ),
        ("duo", [[0.5, 0.5], [0.5]], "it has layers of 1 and 2 heads"),
        ("duo", [], "it is an empty list"),
        ("duo", [[float("nan")]], "a gate is no finite number"),
        ("moa", {"alphas": [[1]]}, "a mapping with the keys 'alphas'"),
        ("moa", {"alphas": [[1]], "betas": [[1, 1]]}, "alphas and betas differ in shape"),
        ("moa", {"alphas": [[1]], "betas": 3}, "betas is 3, not layers x heads"),
        ("moa", {"alphas": [[1]], "betas": [["x"]]}, "betas has 'x', not a number"),
        ("moa", {"alphas": [[True]], "betas": [[1]]}, "alphas has True, not a number"),
        ("moa", {"alphas": [[float("nan")]], "betas": [[1]]}, "alphas has nan, not a number"),
        ("moa", {"alphas": [[1]], "betas": [[1.5]]}, "layer 0 has a beta of 1.5, not 0 to 1"),
        ("modelopt", {"sparse_attention_config": 3}, "it is 3"),
        (
            "modelopt",
            {"sparse_attention_config": {"config_groups": [1]}},
            "config_groups is a list",
        ),
        ("modelopt", {"sparse_attention_config": {"sparse_num_index_heads": 4}}, "without skip_so"),
        ("modelopt", modelopt({"algorithm": "sparse_softmax"}), "without skip_softmax"),
        ("modelopt", modelopt(), "it states no threshold for prompts"),
        ("modelopt", modelopt({"threshold": 0.0}), "threshold is 0.0, not a number above 0"),
        ("modelopt", modelopt({"threshold": 0.1, "ignore": ["*.0.*"]}), "ignore leaves layers de"),
        (
            "modelopt",
            modelopt({"threshold_scale_factor": {"decode": {"a": 1, "b": 1}}}),
            "it states no threshold for prompts",
        ),
        (
            "modelopt",
            modelopt({"threshold_scale_factor": {"prefill": {"a": -1, "b": 1}}}),
            "a is -1, not a number above 0",
        ),
        (
            "modelopt",
            modelopt({"threshold_scale_factor": {"prefill": {"a": 1}}}),
            "b is None, not a number",
        ),
        (
            "modelopt",
            modelopt({"threshold_scale_factor": {"formula": "a + b", "prefill": {"a": 1, "b": 1}}}),
            "its formula is 'a + b', known are a * exp(b * target_sparsity)",
        ),
    ],
)
def test_a_broken_file_is_refused_by_what_is_wrong(tmp_path, form, data, found):
    with pytest.raises(PlanError, match=f"no {form} plan: ") as refused:
        read(tmp_path, form, data)
    assert found in str(refused.value)


@pytest.mark.parametrize("text", [b"{", b"\xff", b"[" * 100_000], ids=["cut", "bytes", "deep"])
@pytest.mark.parametrize("form", ["minference", "moa", "modelopt"])
def test_what_is_no_json_is_refused(tmp_path, form, text):
    (tmp_path / "file.json").write_bytes(text)
    with pytest.raises(PlanError, match=f"no {form} plan: "):
        import_plan(form, tmp_path / "file.json", config())


def test_a_duo_folder_needs_both_its_files(tmp_path):
    place = write(tmp_path, "duo", [])
    (place / "full_attention_heads.tsv").write_text("0.5\tx\n")
    with pytest.raises(PlanError, match="could not convert string to float: 'x'"):
        import_plan("duo", place, config())
    for name in ("full_attention_heads.tsv", "config.json"):
        (place / name).unlink()
        with pytest.raises(PlanError, match=f"{name}: no duo plan: No such file"):
            import_plan("duo", place, config())
    with pytest.raises(PlanError, match="there is no such folder"):
        import_plan("duo", tmp_path / "absent", config())


@pytest.mark.parametrize("wrong", [{"sink_size": None}, {"deploy_recent_size": -1}])
def test_sizes_of_duo_that_are_no_tokens_are_refused(tmp_path, wrong):
    with pytest.raises(PlanError, match=next(iter(wrong))):
        read(tmp_path, "duo", **wrong)


def test_share_is_refused_out_of_range_and_for_other_forms(tmp_path):
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match=r"share is .*: give 0 to 1"):
            import_plan("duo", tmp_path, config(), share)
    with pytest.raises(UsageError, match="share belongs to the form duo: leave it out for moa"):
        import_plan("moa", tmp_path, config(), 0.5)


def test_length_is_needed_by_modelopt_and_refused_for_others(tmp_path):
    with pytest.raises(UsageError, match="length belongs to the form modelopt: leave it out for"):
        import_plan("moa", tmp_path, config(), length=4096)
    file = write(tmp_path, "modelopt")
    with pytest.raises(UsageError, match="falls with a prompt's length, and skip is one number"):
        import_plan("modelopt", file, config())
    with pytest.raises(UsageError, match="length is 0: give 1 token or more"):
        import_plan("modelopt", file, config(), length=0)
    with pytest.raises(UsageError, match=r"its threshold at 100 tokens is 2.4\d+, and one of 1 or"):
        import_plan("modelopt", file, config(), length=100)


def test_what_no_plan_can_say_is_refused_by_its_name(tmp_path):
    with pytest.raises(
        UsageError, match=r"a plan can't say what lukv does: .* dropped by expected attention"
    ):
        import_plan("lukv", tmp_path / "curve.npy", config())


# ---- the command


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_writes_the_plan_and_prints_the_notes(tmp_path):
    config().save_pretrained(tmp_path / "model")
    file, out = write(tmp_path, "duo"), tmp_path / "a plan.yaml"
    words = ["import", "duo", file, "--share", 0.75, "--model-config", tmp_path / "model"]
    result = run(*words, "-o", out)
    assert result.exit_code == 0, result.output
    plan, notes = import_plan("duo", file, config(), 0.75)
    assert Plan.load(out) == plan
    *said, last = result.stdout.splitlines()
    assert said == [f"note: {note}" for note in notes]
    assert last == f"wrote {out}. Look at it: hfsparse show '{out}'"
    assert run("check", out, tmp_path / "model").exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["moa", "moa.json"], "give --model-config"),
        (["nonsense", "moa.json"], "unknown form 'nonsense'"),
        (["minference", "moa.json"], "it is a mapping with the keys 'alphas', 'betas'"),
        (["moa", "absent.json"], "No such file"),
        (["moa", "moa.json", "--model-config", "absent/a/b"], "no such model folder: absent/a/b"),
        (["moa", "moa.json", "--share", "0.5"], "share belongs to the form duo"),
    ],
)
def test_the_command_refuses_in_one_line_and_leaves_the_old_plan(
    tmp_path, monkeypatch, words, message
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "moa")
    (tmp_path / "plan.yaml").write_text("as it was")
    result = run("import", *words, "-o", "plan.yaml")
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert sorted(file.name for file in tmp_path.iterdir()) == ["moa.json", "plan.yaml"]
    assert (tmp_path / "plan.yaml").read_text() == "as it was"


def test_layers_that_a_plan_has_no_words_for_stay_full_and_it_is_told(tmp_path):
    """Gemma 4's first layer has other heads here than those that may be sparse."""
    if not exists("gemma4"):
        pytest.skip("not in this version")
    model, file = supported("gemma4"), tmp_path / "searched.json"
    row = {str(head): ["stream_llm", 64, 256, 1.0] for head in range(4)}
    file.write_text(json.dumps([row] * 3))
    plan, notes = import_plan("minference", file, model.config)
    assert plan.layers[0] == Plan.full(plan.model).layers[0]
    assert {*plan.layers[1].prefill} == {"stream64-256"}
    assert note(notes, "stay full").endswith("layer 0 heads 0-3")


def test_layers_that_share_keys_have_no_ring_and_it_is_told(tmp_path):
    """Layer 4 reads the keys of layer 2 here, layer 3 those of layer 0."""
    if not exists("gemma4_shared"):
        pytest.skip("not in this version")
    model, folder = supported("gemma4_shared"), tmp_path / "gates"
    folder.mkdir()
    (folder / "full_attention_heads.tsv").write_text("0\t1\n" * 5)
    (folder / "config.json").write_text(json.dumps({"sink_size": 4, "recent_size": 16}))
    plan, notes = import_plan("duo", folder, model.config)
    rings = [index for index, layer in enumerate(plan.layers) if {*layer.cache} != {"full"}]
    assert rings == [1]
    assert "layers 2, 4 head 0" in note(notes, "share these kv heads' keys").replace("; layer", ",")
