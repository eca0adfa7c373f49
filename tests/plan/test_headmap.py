"""The head map shows every layer and word, in 80 columns, and its picture is whole or absent."""

from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
import pytest

from hfsparse.evictions import EVICTIONS
from hfsparse.patterns import PATTERNS
from hfsparse.plan import Below, Layer, ModelId, Plan, headmap, picture
from hfsparse.plan.kept import Full
from hfsparse.selectors import SELECTORS

NAMED = {
    "stream": PATTERNS["streaming"](),
    "grow": PATTERNS["streaming"](recent=128, recent_per_token=0.1),
    "vs": PATTERNS["vertical_slash"](),
    "blocks": PATTERNS["block_topk"](),
    "quest": SELECTORS["quest"](),
}
CHOOSING = {"young": SELECTORS["quest"](refresh=8, top_p=0.9), "again": SELECTORS["reuse"]()}


def plan_of(layers, q_heads, kv_heads, **more):
    """Every word somewhere: the first kv head streams, the others take turns."""
    model = ModelId("LlamaForCausalLM", layers, q_heads, kv_heads, 64, "sha256:0123456789abcdef")
    group = q_heads // kv_heads
    turns = ["full", "vs", "blocks"]
    rows = []
    for layer in range(layers):
        stream = ("stream", "grow")[layer % 2]
        rest = [turns[(layer + head) % 3] for head in range(q_heads - group)]
        rows.append(
            Layer(
                (stream,) * group + tuple(rest),
                (stream,) + ("full",) * (kv_heads - 1),
                ("ring",) + (("full", "quest")[layer % 2],) * (kv_heads - 1),
            )
        )
    plan = Plan(model, NAMED, tuple(rows), **more)
    plan.validate()
    return plan


def test_layers_without_attention_are_marked_and_counted_nowhere(tmp_path):
    plan = plan_of(3, 6, 3)
    full = Plan.full(plan.model).layers[0]
    plan = replace(plan, layers=(full, *plan.layers[1:]), made={"no_attention": [0, 99, "x"]})
    told = headmap.text(plan).plain
    assert "\n    0  .. .. ..  ...    ...\n    1  GG VB #V  G##    oQQ\n" in told
    assert "# full        17%    67%     33%  every key\n" in told
    assert ". -             -      -       -  no attention in these layers" in told
    assert "no attention" not in headmap.text(replace(plan, made={})).plain
    headmap.png(plan, tmp_path / "heads.png")


def test_a_choice_that_is_read_again_is_said():
    plan = plan_of(2, 6, 3)
    layers = tuple(
        replace(layer, decode=("ring", word, word))
        for layer, word in zip(plan.layers, CHOOSING, strict=True)
    )
    plan = replace(plan, patterns={**NAMED, **CHOOSING}, layers=layers)
    plan.validate()
    told = headmap.text(plan).plain
    assert "quest: share 0.06, min_pages 16, refresh 8, top_p 0.9\n" in told
    assert "reuse: pages chosen by the last layer before that chooses\n" in told


def test_a_cache_that_evicts_has_a_mark_of_its_own(tmp_path):
    plan = plan_of(2, 4, 2)
    evicts = replace(plan.layers[1], cache=("stream", "snap"), decode=("ring", "kept"))
    evicts = replace(evicts, prefill=("stream", "stream", "vs", "full"))
    plan = replace(plan, patterns={**NAMED, "snap": EVICTIONS["snapkv"]()})
    plan = replace(plan, layers=(plan.layers[0], evicts))
    plan.validate()
    told = headmap.text(plan).plain
    assert "    1  SS V#    SN     o+\n" in told
    assert "N snap          -    25%       -  snapkv: size 1024, window 64, pool 7\n" in told
    assert "+ kept          -      -     25%  the keys its cache kept" in told
    headmap.png(plan, tmp_path / "heads.png")


def test_a_full_cache_in_fewer_bits_is_a_word_of_its_own(tmp_path):
    plan, packed = plan_of(2, 4, 2), {"full8": Full(8), "full4": Full(4)}
    row = replace(plan.layers[1], prefill=("full",) * 4, decode=("full", "full"))
    plan = replace(plan, patterns={**NAMED, **packed})
    plan = replace(plan, layers=(plan.layers[0], replace(row, cache=("full8", "full4"))))
    plan.validate()
    assert "U full4         -    25%       -  full: bits 4\n" in headmap.text(plan).plain
    headmap.png(plan, tmp_path / "heads.png")


@dataclass(frozen=True)
class Named:
    """A kind that a plan may name, with a parameter that is no number."""

    file: str = "channels.safetensors"
    share: float = 0.25
    bound: object = field(default=None, compare=False, repr=False)  # no parameter
    kind = "named"


def test_a_parameter_that_is_text_is_shown(tmp_path, monkeypatch):
    monkeypatch.setitem(SELECTORS, "named", Named)
    plan = plan_of(2, 4, 2)
    row = replace(plan.layers[1], decode=("ring", "own"))
    plan = replace(plan, patterns={**NAMED, "own": Named()}, layers=(plan.layers[0], row))
    assert "named: file channels.safetensors, share 0.25\n" in headmap.text(plan).plain
    headmap.png(plan, tmp_path / "heads.png")


def test_a_small_plan_reads_as_written_here():
    numbers = {2048: {"pair_density": 0.4, "recall": 0.97}, 512: {"pair_density": 1.0}}
    plan = plan_of(
        3, 6, 3, below=Below(prefill=512), expected=numbers, made={"method": "minference"}
    )
    plan.made["verified"] = {"told": "1.5 % of 64 answers lost"}
    first, identity, method, *rest = headmap.text(plan).plain.splitlines()
    assert first == "LlamaForCausalLM  3 layers, 6 q heads and 3 kv heads of 64"
    marks = plan.hash()[:19], plan.model.fingerprint
    assert identity == "plan hash {}, model fingerprint {}".format(*marks)
    assert method == "method minference"
    assert (
        "\n".join(rest)
        == """
layer  prefill   cache  decode
    0  SS #V B#  S##    o##
    1  GG VB #V  G##    oQQ
    2  SS B# VB  S##    o##

            prefill  cache  decode
  # full        22%    67%     44%  every key
  S stream      22%    22%       -  streaming: sink 64, recent 256
  G grow        11%    11%       -  streaming: sink 64, recent 128, recent_per_token 0.1
  V vs          22%      -       -  vertical_slash: columns 1000, diagonals 4096
  B blocks      22%      -       -  block_topk: share 0.1, min_blocks 16
  Q quest         -      -     22%  quest: share 0.06, min_pages 16
  o ring          -      -     33%  the keys its ring cache holds

full below: prefill 512 tokens

expected at  pair_density  recall
        512         1.000       -
       2048         0.400   0.970

verified: 1.5 % of 64 answers lost"""
    )


SHAPES = [
    (30, 9, 3),
    (32, 32, 8),
    (32, 32, 32),
    (80, 64, 8),
    (24, 64, 64),
    (2, 128, 128),
    (1, 1, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "layers{}-q{}-kv{}".format(*shape))
def test_the_map_shows_every_head_of_every_layer_in_80_columns(shape):
    plan = plan_of(*shape)
    text = headmap.text(plan).plain
    marks = dict(full="#", stream="S", grow="G", vs="V", blocks="B", quest="Q", ring="o")
    table = text[: text.index(headmap.legend(plan).plain)].partition("\n\n")[2].splitlines()
    assert max(map(len, table)) <= 80
    labels = [int(line.split()[0]) for line in table if line[:7].strip().isdigit()]
    times = len(labels) // len(plan.layers)  # one, two or three tables, as the heads need
    assert labels == list(range(len(plan.layers))) * times

    shown = "".join(line[7:] for line in table if line.strip() and not line.startswith("layer"))
    words = [
        word
        for layer in plan.layers
        for part in (layer.prefill, layer.cache, layer.decode)
        for word in part
    ]
    assert sorted(shown.replace(" ", "")) == sorted(marks[word] for word in words)


def test_what_the_verification_changed_is_said():
    plan = plan_of(3, 6, 3)
    plan.made["verified"] = {
        "told": "0.0 % of 64 answers lost",
        "given_back": ["layer 0 kv head 1", "layer 2 kv head 2"],
        "budgets": {"pairs": 0.625, "cache": 0.5},
    }
    assert headmap.text(plan).plain.splitlines()[-3:] == [
        "verified: 0.0 % of 64 answers lost",
        "for that, kv heads given back: 2",
        "for that, budgets widened to: pairs 0.625, cache 0.5",
    ]
    plan.made["verified"] |= {"given_back": 2, "budgets": "none"}
    assert headmap.text(plan).plain.endswith("verified: 0.0 % of 64 answers lost")


def test_the_legend_names_unused_patterns_and_every_parameter():
    full = Plan.full(ModelId("LlamaForCausalLM", 2, 4, 2, 64, "sha256:0123456789abcdef"))
    full.patterns = NAMED
    legend = headmap.legend(full).plain
    rows = [line.split(maxsplit=5) for line in legend.splitlines()[1:]]
    assert rows[0] == ["#", "full", "100%", "100%", "100%", "every key"]
    grow = "streaming: sink 64, recent 128, recent_per_token 0.1"
    assert ["G", "grow", "-", "-", "-", grow] in rows
    assert len(rows) == len(NAMED) + 1
    assert "ring" not in legend


def test_a_sink_of_none_is_shown_and_a_rare_pattern_is_not_called_absent():
    plan = plan_of(60, 4, 1)
    plan.patterns = {**NAMED, "stream": PATTERNS["streaming"](sink=0)}
    plan.layers = (plan.layers[0],) + (Plan.full(plan.model).layers[0],) * 300
    assert "<1%" in headmap.legend(plan).plain
    assert "streaming: sink 0, recent 256" in headmap.legend(plan).plain


def test_names_that_share_letters_get_different_marks():
    names = ["s", "ss", "sss", "stream", "o", "full2", "s1", "O"]
    plan = Plan.full(ModelId("LlamaForCausalLM", 1, 8, 8, 64, "sha256:0123456789abcdef"))
    plan.patterns = {name: PATTERNS["vertical_slash"]() for name in names}
    kv = ("full",) * 8
    plan.layers = (Layer(tuple(names), kv, kv),)
    legend = headmap.legend(plan).plain.splitlines()[1:]
    marks = [line.split()[0] for line in legend]
    assert len(set(marks)) == len(names) + 1
    row = next(x for x in headmap.text(plan).plain.splitlines() if x.startswith("    0"))
    assert row.split()[1] == "".join(marks[1:])


def test_colour_marks_the_same_heads_as_the_letters():
    text = headmap.text(plan_of(2, 4, 2))
    row = text.plain.index("    0  ") + 7
    styles = {text.plain[span.start]: span.style for span in text.spans if row <= span.start}
    assert styles["S"] != styles["V"] != styles["#"]


# What is left of linear red, green and blue (Machado et al. 2009, complete loss).
EYES = {
    "grey": [[0.2126, 0.7152, 0.0722]] * 3,
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


def lab(colour, eye=None):
    """CIELAB of an sRGB colour, as an eye sees it."""
    rgb = np.array(colour)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    if eye is not None:
        linear = (np.array(EYES[eye]) @ linear).clip(0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.array(to_xyz) @ linear / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def every_kind(count):
    """A plan with `count` words of each kind that has parameters, from few keys to many."""
    parts = [(i + 1) / count for i in range(count)]
    named = {
        "streaming": lambda part: {"recent": int(2000 * part)},
        "vertical_slash": lambda part: {"columns": int(1500 * part), "diagonals": 100},
        "block_topk": lambda part: {"share": part, "min_blocks": 1},
        "antidiagonal": lambda part: {"max_share": part},
        "quest": lambda part: {"share": part},
    }
    known = {**PATTERNS, **SELECTORS}
    words = {f"{k}{i}": known[k](**of(p)) for k, of in named.items() for i, p in enumerate(parts)}
    return replace(plan_of(2, 4, 2), patterns={**words, "reuse": known["reuse"]()})


@pytest.mark.parametrize("eye", EYES)
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_no_two_entries_of_the_legend_look_alike_to_any_eye(count, eye):
    """Alike: the same mark, and closer than 6 of CIELAB's units (2 are just seen)."""
    for one, other in combinations(picture.looks_of(every_kind(count)).values(), 2):
        far = np.linalg.norm(lab(one.colour, eye) - lab(other.colour, eye))
        assert far >= 6 or one.mark != other.mark


def test_kinds_have_hues_and_marks_of_their_own():
    """All but full and streaming, which are grey and blue and have no mark, by the mark alone."""
    looks = picture.looks_of(every_kind(3))
    kinds = [looks[f"{kind}1"] for kind in ("streaming", "vertical_slash", "block_topk", "quest")]
    kinds += [looks["antidiagonal1"], looks["reuse"], looks["full"]]
    for one, other in combinations(kinds, 2):
        hues = lab(one.colour)[1:], lab(other.colour)[1:]
        assert np.linalg.norm(hues[0] - hues[1]) > 15
    marks = [str(look.mark) for look in kinds]
    assert len({*marks}) == len(kinds) - 1


def test_the_more_a_word_keeps_the_darker_it_is_in_colour_and_in_grey():
    looks = picture.looks_of(every_kind(6))
    for kind in ("streaming", "vertical_slash", "block_topk", "antidiagonal", "quest"):
        shades = [lab(looks[f"{kind}{i}"].colour, "grey")[0] for i in range(6)]
        assert (np.diff(shades) < -6).all()
        assert shades[-1] > lab(looks["full"].colour)[0] + 10
    assert all(abs(lab(x.colour)[0] - x.lightness) < 0.5 for x in looks.values())


def test_an_ink_shows_on_every_shade():
    for look in picture.looks_of(every_kind(8)).values():
        ink = {"black": 0, "white": 100}[look.ink]
        assert abs(look.lightness - ink) > 35


def test_a_kind_that_nobody_gave_a_look_has_one(monkeypatch):
    monkeypatch.setitem(SELECTORS, "named", Named)
    plan = replace(plan_of(2, 4, 2), patterns={**NAMED, "own": Named(), "own2": Named(share=0.9)})
    looks = picture.looks_of(plan)
    assert looks["own2"].lightness < looks["own"].lightness
    assert str(looks["own"].mark) not in {str(looks[word].mark) for word in NAMED}


def test_the_picture_is_a_png_with_three_panels(tmp_path):
    from PIL import Image

    small, large = tmp_path / "small.png", tmp_path / "large.png"
    headmap.png(plan_of(2, 4, 2), small)
    headmap.png(plan_of(32, 32, 8), large)
    for file in (small, large):
        with Image.open(file) as picture:
            assert picture.format == "PNG"
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 6
    assert Image.open(large).size > Image.open(small).size
    assert sorted(tmp_path.iterdir()) == [large, small]


def test_a_failed_picture_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "heads.png"
    file.write_text("old")
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        headmap.png(plan_of(2, 4, 2), file)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
