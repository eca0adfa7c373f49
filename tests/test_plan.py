"""The plan file: round trips, every error with its line, corrupted input, the model's fingerprint."""

import copy
import dataclasses
import os
import random
import re
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hfsparse import plan_yaml
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.streaming import Streaming
from hfsparse.patterns.vertical_slash import VerticalSlash
from hfsparse.plan import Below, Layer, ModelId, Plan, PlanError
from hfsparse.selectors.quest import Quest

TEXT = """\
hfsparse: 1
model: {class: LlamaForCausalLM, layers: 4, q_heads: 4, kv_heads: 2, head_dim: 64, fingerprint: 'sha256:00'}
patterns:
  stream: {kind: streaming, sink: 64, recent: 256}
  grow: {kind: streaming, sink: 64, recent: 128, recent_per_token: 0.1}
  vs: {kind: vertical_slash, columns: 1000, diagonals: 4096}
  quest: {kind: quest, share: 0.06, min_pages: 16}
below: {prefill: 6144, decode: 16384, cache: 4096}
layers:
  0: {prefill: full*4, cache: full*2, decode: full*2}
  1-2: {prefill: stream*2 vs*2, cache: stream full, decode: ring quest}
  3: {prefill: grow vs full*2, cache: full*2, decode: quest full}
expected: {4096: {pair_density: 0.41, recall: 0.97}}
measured: {NVIDIA H100 80GB: {below: {prefill: 6144}}}
made: {version: 0.1.0, method: minference, recipe: null, seed: 0, seconds: 74.1}
"""
LINES = {row.split(":")[0].strip(): n for n, row in enumerate(TEXT.splitlines(), start=1)}
LOADERS = [plan_yaml.PythonLoader]
if hasattr(plan_yaml, "FastLoader"):
    LOADERS.append(plan_yaml.FastLoader)


def swap(old: str, new: str) -> str:
    assert TEXT.count(old) == 1, f"{old!r} stands {TEXT.count(old)} times in the sample"
    return TEXT.replace(old, new)


def problems_of(text: str | bytes) -> list[tuple[int | None, str]]:
    with pytest.raises(PlanError) as caught:
        Plan.loads(text)
    for line, sentence in caught.value.problems:
        assert sentence in str(caught.value)
        assert line is None or f"line {line}: " in str(caught.value)
    return list(caught.value.problems)


@pytest.fixture(params=LOADERS, ids=lambda loader: loader.__name__)
def loader(request, monkeypatch):
    monkeypatch.setattr(plan_yaml, "Loader", request.param)


# --- round trips

names = st.from_regex(r"[A-Za-z][A-Za-z0-9_.-]{0,12}", fullmatch=True).filter(
    lambda name: name not in ("full", "ring")
)
tokens = st.integers(0, 2**31 - 1)
positive = st.integers(1, 2**31 - 1)
shares = st.floats(0, 1, exclude_min=True)
streams = st.builds(Streaming, sink=tokens, recent=positive, recent_per_token=st.floats(0, 1))
other_patterns = st.one_of(
    st.builds(VerticalSlash, columns=positive, diagonals=positive),
    st.builds(BlockTopK, share=shares, min_blocks=positive),
)
quests = st.builds(Quest, share=shares, min_pages=st.integers(2, 2**31 - 1))
numbers = st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(-1e18, 1e18)
traps = st.sampled_from(
    "yes no on off null ~ true 1e5 1.5e-3 .inf .nan 0x1f 010 1_000 1:30 12:30:45 2024-01-01 "
    "2024-01-01T00:00:00Z << = !!int *a &a ? - : # % @ ` {a: [] ' \" | >".split()
    + ["", " ", "\n", "a\n b\n", "a: b", " pad ", "\t", "\x00", "\x85", "\ufeff", "\u2028", "é🙂"]
)
strings = traps | st.text(max_size=20)
data = st.recursive(
    st.none() | st.booleans() | numbers | strings,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(strings | st.integers(-(2**62), 2**62), inner, max_size=3)
    ),
    max_leaves=8,
)
mappings = st.dictionaries(strings | st.integers(-5, 5), data, max_size=4)


@st.composite
def plans(draw) -> Plan:
    """Any valid plan: streaming kv heads only over groups whose q heads stay within the ring."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    count = draw(st.integers(1, 6))
    patterns = draw(st.dictionaries(names, streams | other_patterns | quests, max_size=5))
    prefill = ["full", *(name for name, p in patterns.items() if not isinstance(p, Quest))]
    caches = ["full", *(name for name, p in patterns.items() if isinstance(p, Streaming))]
    decodes = ["full", *(name for name, p in patterns.items() if isinstance(p, Quest))]

    def head() -> tuple[list[str], str, str]:
        cache = draw(st.sampled_from(caches))
        if cache == "full":
            words = draw(st.lists(st.sampled_from(prefill), min_size=group, max_size=group))
            return words, cache, draw(st.sampled_from(decodes))
        return [cache] * group, cache, "ring"

    def layer() -> Layer:
        heads = [head() for _ in range(kv_heads)]
        words = tuple(word for head_words, _, _ in heads for word in head_words)
        return Layer(words, tuple(h[1] for h in heads), tuple(h[2] for h in heads))

    few = [layer() for _ in range(draw(st.integers(1, 2)))]
    layers = tuple(draw(st.lists(st.sampled_from(few), min_size=count, max_size=count)))
    shape = {"layers": count, "q_heads": kv_heads * group, "kv_heads": kv_heads}
    figures = st.dictionaries(strings, numbers, max_size=3)
    return Plan(
        model=ModelId(draw(strings.filter(bool)), **shape, head_dim=64, fingerprint="sha256:00"),
        patterns=patterns,
        layers=layers,
        below=draw(st.builds(Below, tokens, tokens, tokens)),
        expected=draw(st.dictionaries(st.integers(1, 2**62), figures, max_size=3)),
        measured=draw(mappings),
        made=draw(mappings),
    )


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(plan=plans())
def test_any_valid_plan_survives_save_and_load(plan, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "plan.yaml"
    plan.save(path)
    back = Plan.load(path)
    assert back == plan
    assert repr(back.made) == repr(plan.made)  # 1, 1.0 and True are equal but not the same
    assert back.dumps() == plan.dumps()
    assert back.hash() == plan.hash()


def test_both_loaders_give_the_same_plan(loader):
    assert Plan.loads(TEXT).dumps() == TEXT


def test_sample_is_written_as_it_was_read():
    assert Plan.loads(TEXT).dumps() == TEXT


def test_layers_are_one_line_each_and_equal_ones_a_range():
    model = ModelId("M", 40, 32, 8, 128, "sha256:00")
    text = Plan.full(model).dumps()
    assert "layers:\n  0-39: {prefill: full*32, cache: full*8, decode: full*8}\n" in text
    assert len(text.splitlines()) == 4


def test_long_rows_stay_on_one_line():
    words = tuple(f"pattern-{i}" for i in range(200))
    plan = Plan(
        ModelId("M", 1, 200, 1, 64, "sha256:00"),
        {word: VerticalSlash() for word in words},
        (Layer(words, ("full",), ("full",)),),
    )
    assert Plan.loads(plan.dumps()) == plan
    assert len(plan.dumps().splitlines()) == 1 + 1 + 1 + 200 + 1 + 1


def test_equal_values_met_twice_are_written_out_not_aliased():
    shared = {"a": [1]}
    plan = dataclasses.replace(Plan.loads(TEXT), made={"x": shared, "y": shared})
    assert Plan.loads(plan.dumps()).made == {"x": {"a": [1]}, "y": {"a": [1]}}


def test_full_plan_is_valid_and_empty_sections_are_left_out():
    plan = Plan.full(ModelId("M", 2, 4, 2, 64, "sha256:00"))
    assert Plan.loads(plan.dumps()) == plan
    assert [row.split(":")[0] for row in plan.dumps().splitlines() if row[0] != " "] == [
        "hfsparse",
        "model",
        "layers",
    ]


# --- errors: each with its line

ERRORS = {
    "unknown key": ("cache: 4096", "cahce: 4096", "below", "did you mean cache?"),
    "unknown section": ("made:", "maed:", "made", "unknown key maed: did you mean made?"),
    "duplicate key": ("sink: 64, recent: 256", "sink: 64, sink: 6, recent: 256", "stream", "twice"),
    "duplicate section": ("measured:", "below: {}\nmeasured:", "measured", "below is given twice"),
    "missing key": (", head_dim: 64", "", "model", "model.head_dim is missing"),
    "alias": ("seed: 0", "seed: *x", "made", "*x"),
    "anchor": ("seed: 0", "seed: &x 0", "made", "&x"),
    "tag": ("seed: 0", "seed: !!python/object:os.system 0", "made", "python/object"),
    "tagged mapping": ("{version: 0.1.0", "!thing {version: 0.1.0", "made", "!thing"),
    "key that is no text": ("seed: 0", "null: 0", "made", "None"),
    "key that is a list": ("seed: 0", "[1]: 0", "made", "give text"),
    "number as a name": ("  vs: {", "  123: {", "vs", "pattern name 123"),
    "boolean as a name": ("  vs: {", "  yes: {", "vs", "True"),
    "full as a name": ("  vs: {", "  full: {", "vs", "not full or ring"),
    "star in a name": ("  vs: {", "  a*b: {", "vs", "pattern name 'a*b'"),
    "unknown kind": ("kind: quest", "kind: qeust", "quest", "did you mean quest?"),
    "missing kind": ("kind: quest, ", "", "quest", "patterns.quest.kind is missing"),
    "kind of another type": ("kind: quest", "kind: [1]", "quest", "unknown kind a list"),
    "pattern that is no mapping": ("{kind: quest, share: 0.06, min_pages: 16}", "5", "quest", "is 5"),
    "bool for a whole number": ("columns: 1000", "columns: true", "vs", "columns is True"),
    "float for a whole number": ("columns: 1000", "columns: 10.5", "vs", "columns is 10.5"),
    "text for a number": ("share: 0.06", "share: 6%", "quest", "share is '6%'"),
    "bool for a number": ("share: 0.06", "share: true", "quest", "share is True"),
    "NaN": ("share: 0.06", "share: .nan", "quest", "share is nan"),
    "infinity": ("share: 0.06", "share: -.inf", "quest", "share is -inf"),
    "octal": ("columns: 1000", "columns: 0100", "vs", "columns is '0100'"),
    "huge number": ("columns: 1000", "columns: " + "9" * 50, "vs", "past 64 bits"),
    "endless number": ("columns: 1000", "columns: " + "9" * 90_000, "vs", "whole number"),
    "number out of range": ("share: 0.06", "share: 1.5", "quest", "share is 1.5"),
    "growing too fast": ("per_token: 0.1", "per_token: 1.5", "grow", "recent_per_token is 1.5"),
    "negative": ("decode: 16384", "decode: -1", "below", "below.decode is -1"),
    "q heads not a multiple": ("kv_heads: 2", "kv_heads: 3", "model", "4 q heads over 3 kv heads"),
    "too many layers": ("layers: 4", "layers: 5000", "model", "from 1 to 1024"),
    "no layers": ("layers: 4", "layers: 0", "model", "model.layers is 0"),
    "class that is no text": ("class: LlamaForCausalLM", "class: 5", "model", "model.class is 5"),
    "unknown word": ("grow vs full*2", "grow vss full*2", "3", "did you mean vs?"),
    "wrong count of q heads": ("full*4", "full*5", "0", "prefill has 5 words: give 4"),
    "wrong count of kv heads": ("quest full}", "quest}", "3", "decode has 1 words: give 2"),
    "huge repeat": ("full*4", "full*999999999", "0", "full*999999999"),
    "repeats past any model": ("full*4", "full*1000 full*1000", "0", "more than 1024"),
    "zero repeat": ("full*4", "full*0 full*4", "0", "full*0"),
    "words as a list": ("full*4", "[full, full]", "0", "is a list"),
    "selector for prefill": ("grow vs full*2", "grow quest full*2", "3", "can't be quest, a quest"),
    "ring for prefill": ("grow vs full*2", "grow ring full*2", "3", "prefill can't be ring"),
    "pattern for the cache": ("cache: stream full", "cache: vs full", "1-2", "can't be vs"),
    "pattern for decode": ("quest full}", "vs full}", "3", "decode can't be vs"),
    "ring without a streaming cache": ("quest full}", "ring full}", "3", "decode is ring where"),
    "streaming cache without a ring": ("ring quest}", "full quest}", "1-2", "decode is ring where"),
    "head that reads past the ring": ("stream*2 vs*2", "stream vs*3", "1-2", "q heads 1 (vs)"),
    "full head over a ring": ("stream*2 vs*2", "full*4", "1-2", "q heads 0 (full), 1 (full)"),
    "growing head over a ring": ("stream*2 vs*2", "grow*4", "1-2", "0 (grow), 1 (grow)"),
    "layer given twice": ("  3: {", "  2-3: {", "3", "layer 2 is given twice"),
    "layer past the model": ("  3: {", "  3-4: {", "3", "layers go from 0 to 3"),
    "layer that is no number": ("  3: {", "  last: {", "3", "layer 'last'"),
    "range backwards": ("  1-2: {", "  2-1: {", "1-2", "layer '2-1'"),
    "endless range": ("  3: {", "  3-999999999: {", "3", "give a number or a range"),
    "layer left out": ("  3: {prefill: grow vs full*2, cache: full*2, decode: quest full}\n", "", "layers", "layers 3 are missing"),
    "part of a layer left out": (", decode: quest full", "", "3", "layers.3.decode is missing"),
    "expected without a length": ("{4096:", "{long:", "expected", "expected has 'long'"),
    "expected text": ("recall: 0.97", "recall: good", "expected", "recall is 'good'"),
    "made infinite": ("seconds: 74.1", "seconds: .inf", "made", "made.seconds is inf"),
    "made too big": ("seed: 0", "seed: 99999999999999999999", "made", "past 64 bits"),
    "measured that is no mapping": ("{NVIDIA H100 80GB: {below: {prefill: 6144}}}", "5", "measured", "is 5"),
    "version 0": ("hfsparse: 1", "hfsparse: 0", "hfsparse", "hfsparse is 0"),
    "version true": ("hfsparse: 1", "hfsparse: true", "hfsparse", "hfsparse is True"),
    "no version": ("hfsparse: 1\n", "\n", "model", "hfsparse is missing"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error_names_its_line(case, loader):
    old, new, place, says = ERRORS[case]
    found = [line for line, sentence in problems_of(swap(old, new)) if says in sentence]
    assert found == [LINES[place]]


def test_only_one_problem_is_reported_for_one_mistake(loader):
    two_mistakes = {
        "number as a name",  # and the name it had is gone
        "boolean as a name",
        "full as a name",
        "star in a name",
        "layer that is no number",  # and a layer is missing
        "range backwards",
        "endless range",
    }
    for case in set(ERRORS) - two_mistakes:
        old, new, _, _ = ERRORS[case]
        assert len(problems_of(swap(old, new))) == 1, case


def test_all_problems_are_reported_at_once(loader):
    text = swap("layers: 4, q_heads: 4", "layers: 4, q_heads: four, heads: 4")
    for old, new in [
        ("recent: 256", "recent: 0, sink: 5"),
        ("share: 0.06, min_pages: 16", "share: 2, min_pages: 1"),
        ("cache: 4096", "cache: -4"),
        ("prefill: full*4", "prefill: fool*4"),
        ("decode: quest full}", "decode: quest}"),
        ("recall: 0.97", "recall: .nan"),
        ("seed: 0", "seed: &a 0, seed: *a"),
    ]:
        text = text.replace(old, new)
    lines = [line for line, _ in problems_of(text)]
    assert lines == [2, 2, 4, 4, 7, 7, 8, 10, 12, 13, 15, 15, 15]


def test_equal_layers_on_two_lines_are_two_problems(loader):
    text = swap("  1-2: {", "  1: {").replace("ring quest}", "full quest}")
    row = text.splitlines(keepends=True)[10]
    assert [line for line, _ in problems_of(text.replace(row, row + row.replace("1:", "2:")))] == [11, 12]


def test_a_plan_with_countless_problems_stops_at_a_hundred(loader):
    start = time.monotonic()
    keys = ", ".join(f"k{i}: {i}" for i in range(50_000))
    assert len(problems_of(swap("cache: 4096", keys))) == 100
    assert time.monotonic() - start < 60


def test_newer_version_is_refused_by_name(loader):
    found = problems_of(swap("hfsparse: 1", "hfsparse: 2") + "future: {a: 1}\n")
    assert len(found) == 1 and found[0][0] == 1
    expected = r"plan version 2: needs a newer hfsparse than .+; this one reads version 1"
    assert re.fullmatch(expected, found[0][1])


HOSTILE = {
    "empty": "",
    "blank": " \n\n# nothing\n",
    "a list": "- 1\n",
    "a word": "plan",
    "null": "null",
    "an alias alone": "*a",
    "itself": "&a {hfsparse: *a}",
    "two documents": TEXT + "---\n" + TEXT,
    "binary": bytes(range(256)),
    "zeros": b"\x00" * 1000,
    "bad UTF-8": TEXT.encode() + b"\xff\xfe",
    "UTF-16": TEXT.encode("utf-16"),
    "lone surrogate": TEXT.replace("minference", "\ud800"),
    "escaped surrogate": TEXT.replace("minference", '"\\ud800"'),
    "character past Unicode": TEXT.replace("minference", '"\\U00110000"'),
    "character far past Unicode": TEXT.replace("minference", '"\\Uffffffff"'),
    "huge directive": "%YAML " + "9" * 5000 + ".1\n---\n{}",
    "unclosed": "{hfsparse: 1",
    "tab": "hfsparse:\n\t- 1",
    "deep lists": "[" * 100_000,
    "deep mappings": "{a: " * 100_000,
    "deep blocks": "- " * 100_000,
    "deep but well-formed": "made: " + "[" * 900 + "]" * 900,
    "longer than any plan": "# " + "x" * (1 << 20),
    "sixties": "hfsparse: 1" + ":59" * 100_000,
    "hexadecimal": "hfsparse: 0x" + "f" * 100_000,
    "laughs": "a: &a [x, x]\n" + "\n".join(f"b{i}: &b{i} [*a, *a, *a]" for i in range(60)),
    "merge": TEXT.replace("seed: 0", "<<: {seed: 0}").replace("layers:\n", "layers:\n  <<: {}\n"),
    "set": "!!set {a, b}",
    "bool that is none": TEXT.replace("seed: 0", "seed: !!bool maybe").replace("hfsparse: 1", "x: 1"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_text_is_one_clear_error(case, loader):
    start = time.monotonic()
    assert problems_of(HOSTILE[case])
    assert time.monotonic() - start < 20


def test_odd_words_in_made_are_kept_as_text(loader):
    text = swap("seed: 0", "day: 2024-01-01, at: 12:30:45, code: 010, big: 1e5, <<: x")
    made = Plan.loads(text).made
    assert made["day"], made["at"] == ("2024-01-01", "12:30:45")
    assert (made["code"], made["big"], made["<<"]) == ("010", "1e5", "x")
    assert Plan.loads(Plan.loads(text).dumps()).made == made


# --- corruption: a valid plan or PlanError, never another exception


def settle(text: str | bytes) -> bool:
    """Whether the text is a plan; if so it must be one that can be written and read again."""
    try:
        plan = Plan.loads(text)
    except PlanError:
        return False
    assert Plan.loads(plan.dumps()) == plan
    return True


def corrupt_bytes(rng: random.Random) -> bytes:
    data = bytearray(TEXT.encode())
    for _ in range(rng.randint(1, 4)):
        at, other = rng.randrange(len(data)), rng.randrange(len(data))
        match rng.randrange(8):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : at + rng.randint(1, 9)]
            case 2:
                data[at:at] = rng.randbytes(rng.randint(1, 4))
            case 3:
                data[at:at] = rng.choice("{}[],:*&!|>'\"%@`#?-.0 \n\t").encode()
            case 4:
                data[at], data[other] = data[other], data[at]
            case 5 if rng.random() < 0.2:
                del data[at:]
            case 6:
                rows = bytes(data).splitlines(keepends=True)
                rows.insert(rng.randrange(len(rows) + 1), rng.choice(rows))
                data = bytearray(b"".join(rows))
            case _:
                data[at : at + 8] = data[other : other + 8]
        if not data:
            break
    return bytes(data)


JUNK = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, 1.5, -0.0, 1e300, float("nan"),
    float("inf"), "", "full", "ring", "stream", "full*4", "full*999999999", "*", "1e5", "yes", "\x00",
    "é\n", [], [1], [[]], {}, {1: 2}, {"kind": "streaming"}, {"kind": "quest", "share": 1},
    {None: 1}, {True: 1}, {1.5: 1}, (1, 2), {1, 2}, b"bytes",
]  # fmt: skip


def corrupt_tree(rng: random.Random) -> str:
    tree = yaml.safe_load(TEXT)
    for _ in range(rng.randint(1, 3)):
        places = list(spots(tree))
        if not places:
            break
        parent, key = rng.choice(places)
        match rng.randrange(5):
            case 0:
                del parent[key]
            case 1:
                parent[key] = copy.deepcopy(rng.choice(JUNK))
            case 2:
                other, there = rng.choice(places)
                parent[key] = copy.deepcopy(other[there])
            case 3 if isinstance(parent, dict):
                value = parent.pop(key)
                new = rng.choice([key, str(key), f"{key}-9", *(j for j in JUNK if j.__hash__)])
                parent[new] = value
            case _:
                parent[key] = rng.choice([str, repr, lambda x: [x], lambda x: {key: x}])(parent[key])
    return yaml.safe_dump(tree, default_flow_style=rng.choice([None, True, False]), width=rng.choice([20, 9999]))


def spots(node):
    """Every (container, key) of a tree."""
    if isinstance(node, dict | list):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            yield node, key
            yield from spots(node[key])


@pytest.mark.parametrize("corrupt", [corrupt_bytes, corrupt_tree], ids=["bytes", "structure"])
def test_5000_corruptions_give_a_plan_or_a_plan_error(corrupt):
    rng = random.Random(0)
    valid = sum(settle(corrupt(rng)) for _ in range(5000))
    assert 50 < valid < 4950  # both ends are met, or the corruption is too weak or too strong


@pytest.mark.parametrize("corrupt", [corrupt_bytes, corrupt_tree], ids=["bytes", "structure"])
@pytest.mark.skipif(len(LOADERS) < 2, reason="PyYAML was built without libyaml")
def test_both_loaders_judge_corruptions_alike(corrupt, monkeypatch):
    rng = random.Random(1)
    texts = [corrupt(rng) for _ in range(500)]
    verdicts = []
    for each in LOADERS:
        monkeypatch.setattr(plan_yaml, "Loader", each)
        verdicts.append([settle(text) for text in texts])
    assert verdicts[0] == verdicts[1]
