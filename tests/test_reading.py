"""Every file of text that users give is read in one way, whoever reads it."""

import json
import re

import pytest
import yaml

from hfsparse import recipe
from hfsparse.cli import application, run
from hfsparse.errors import UsageError
from hfsparse.models import loading
from hfsparse.models.loading import load
from hfsparse.plan import ModelId, Plan, PlanError, headmap
from hfsparse.plan.importers import import_plan
from hfsparse.profiler.parts import Parts
from hfsparse.profiler.prompts.calibration import read_jsonl
from hfsparse_eval.command import check_request
from hfsparse_eval.tasks import documents as qa
from hfsparse_eval.tasks import haystack as text
from hfsparse_eval.tasks import own_questions as custom
from tests import tiny
from tests.eval.test_qa import HOTPOT, SQUAD
from tests.plan.test_importers import DUO, GATES, MINFERENCE, MOA, config

PLAN = Plan.full(ModelId.of(config()))


def imported(form):
    return lambda path: import_plan(form, path, config())[0].hash()


def duo(path):
    """The gates are in the file, `path`; beside it lies config.json."""
    (path.expanduser().parent / "config.json").write_text(json.dumps(DUO))
    return imported("duo")(path.parent)


# Of each reader: the name of its file, a text of several lines, and what reads it.
READERS = {
    "prompt": ("p.txt", "one\ntwo é\n\nthree", run.read_prompt),
    "calibration": ("d.jsonl", '{"text": "é"}\n\n{"prompt": "b", "answer": "c"}\n', read_jsonl),
    "plan": ("plan.yaml", PLAN.dumps() + "# é\n", lambda path: Plan.load(path).hash()),
    "recipe": ("own.yaml", "# é\nmethod: duo\nsamples: 2\n", lambda path: recipe.load(str(path))),
    "minference": ("m.json", json.dumps(MINFERENCE, indent=1), imported("minference")),
    "moa": ("moa.json", json.dumps(MOA, indent=1), imported("moa")),
    "duo": (
        "full_attention_heads.tsv",
        "".join("\t".join(map(str, row)) + "\n" for row in GATES),
        duo,
    ),
    "questions": (
        "qa.jsonl",
        '{"prompt": "a é", "answers": ["b"]}\n{"prompt": "c", "answers": ["d"]}\n',
        lambda path: custom.read(path)[0],
    ),
    "haystack": ("own.txt", "The sea.\nIt is deep é.\n", lambda path: text.read_haystack(path)[0]),
    "book": ("book.txt", "The sea.\nIt is deep é.\n", lambda path: text.read(path)[0]),
    "squad": ("s.json", json.dumps(SQUAD, indent=1), lambda path: qa.squad(str(path))[0]),
    "hotpotqa": ("h.json", json.dumps(HOTPOT, indent=1), lambda path: qa.hotpotqa(str(path))[0]),
}


@pytest.fixture(params=READERS)
def reader(request, tmp_path):
    name, text, read = READERS[request.param]
    return tmp_path / name, text, read


def refusal(call, *given):
    """The one sentence of ours that a call ends in."""
    with pytest.raises((UsageError, PlanError)) as error:
        call(*given)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "marked"])
def test_a_mark_and_ends_of_lines_change_nothing(reader, mark, end):
    path, text, read = reader
    path.write_bytes(text.encode())
    want = read(path)
    path.write_bytes(mark + text.replace("\n", end).encode())
    assert read(path) == want


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "latin-1"])
def test_another_encoding_is_named_with_what_to_do(reader, encoding):
    path, text, read = reader
    path.write_bytes((text + "é" * (encoding == "latin-1")).encode(encoding))
    said = refusal(read, path)
    wanted = {"utf-16": "UTF-16 text", "utf-16-be": "NUL bytes", "utf-32": "UTF-32 text"}
    assert wanted.get(encoding, "not UTF-8 text (byte 0xe9 in line ") in said
    assert "save it as UTF-8" in said
    assert path.name in said


def test_a_folder_an_absent_and_an_empty_file_are_one_sentence_each(reader):
    path, _, read = reader
    assert path.name in refusal(read, path)
    path.write_bytes(b"")
    if path.name != "book.txt":  # whose length `ppl` looks at
        assert path.name in refusal(read, path)
    path.unlink()
    path.mkdir()
    assert path.name in refusal(read, path)


def test_a_tilde_is_the_home_folder_wherever_a_file_is_read(reader, monkeypatch):
    path, text, read = reader
    path.write_bytes(text.encode())
    want = read(path)
    monkeypatch.setenv("HOME", str(path.parent))
    monkeypatch.setenv("USERPROFILE", str(path.parent))
    assert read(type(path)("~", path.name)) == want


def test_a_tilde_is_the_home_folder_wherever_a_file_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    PLAN.save("~/plan.yaml")
    headmap.png(PLAN, "~/plan.png")
    Parts("~/new.yaml", "{}")
    check_request("needle", "model", type(tmp_path)("~/out"))
    application.check_writable(type(tmp_path)("~/other.yaml"))
    for name in ("plan.yaml", "plan.png", "new.yaml.parts", "out"):
        assert (tmp_path / name).exists()
    assert not (tmp_path / "~").exists()


def test_a_tilde_is_the_home_folder_of_a_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    tiny.save(tmp_path / "llama")
    assert load("~/llama", "cpu")[0].config.num_hidden_layers == 2
    assert loading.load_config("~/llama").num_hidden_layers == 2


# ---- JSON, a line or a file


def calibration(path):
    return [row["text"] for _, row in read_jsonl(path)]


def questions(path):
    return [item.draft.context for item in custom.read(path)[0]]


ROWS = {calibration: lambda text: {"text": text}, questions: lambda text: {"prompt": text} | RIGHT}
RIGHT = {"answers": ["a"]}


@pytest.fixture(params=ROWS)
def lines(request, tmp_path):
    """Writes texts as JSONL, and reads them again."""

    def there_and_back(*texts, ascii=False):
        rows = [json.dumps(ROWS[request.param](each), ensure_ascii=ascii) for each in texts]
        (tmp_path / "own.jsonl").write_bytes("\n".join(rows).encode())
        return request.param(tmp_path / "own.jsonl")

    return there_and_back


@pytest.mark.parametrize("mark", [*"\u2028\u2029\u0085\x1c\x0b\x0c"], ids=ascii)
def test_only_newlines_end_a_line(lines, mark):
    texts = [f"one{mark}two", "three"]
    assert lines(*texts) == texts


def test_half_a_character_is_named_and_a_whole_one_is_read(lines):
    assert lines("a 🎈", "\\ud83d", ascii=True) == ["a 🎈", "\\ud83d"]
    said = refusal(lambda: lines("a", "b \ud83d", ascii=True))
    assert r"half a character, \ud83d: give both halves, or neither" in said
    assert re.search(r"own\.jsonl, line 2(:| is) JSON with half", said)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"text": "a", "text": "b"}', "JSON with the key 'text' given twice: keep one"),
        ("[" * 100_000, "JSON nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}", "digits"),
    ],
)
def test_odd_json_is_one_sentence_with_its_line(tmp_path, line, told):
    (tmp_path / "own.jsonl").write_text('\n{"text": "a"}\n' + line)
    said = refusal(read_jsonl, tmp_path / "own.jsonl")
    assert "own.jsonl, line 3 is " in said
    assert told in said
    assert told in refusal(imported("moa"), tmp_path / "own.jsonl") or "line 3" in said


def test_keys_that_are_not_read_are_named(tmp_path):
    path = tmp_path / "own.jsonl"

    def said(read, row):
        path.write_text(json.dumps(row))
        return refusal(read, path)

    known = 'give "text", or "prompt" and perhaps "answer"'
    told = said(read_jsonl, {"text": "a", "promt": "b"})
    assert told == f"{path}, line 1: 'promt' would not be read beside text: {known}"
    assert "'text' would not be read" in said(read_jsonl, {"prompt": "a", "text": "b"})
    assert "'answer' would not be read" in said(read_jsonl, {"text": "a", "answer": "b"})
    assert "not with 'messages'" in said(read_jsonl, {"messages": [{"role": "tool"}]})
    row = {"prompt": "a", "answers": ["b"]}
    assert "prompt, turns, not 'role'" in said(custom.read, {**row, "role": "tool"})
    turns = [row, {**row, "role": "tool"}]
    assert "answers, prompt, not 'role'" in said(custom.read, {**row, "turns": turns})


def test_settings_of_duo_that_are_not_read_are_a_note(tmp_path):
    (tmp_path / "full_attention_heads.tsv").write_text("0.1\t0.9\n0.5\t0.4\n")
    (tmp_path / "config.json").write_text(json.dumps({**DUO, "deploy_sinksize": 4}))
    notes = import_plan("duo", tmp_path, config())[1]
    assert "keys of the file that are not read: 'lr', 'deploy_sinksize'" in notes


# ---- plans that went through other hands


def test_a_plan_that_went_through_json_is_the_same():
    plan = Plan.loads(PLAN.dumps() + "skip: 4.0\nexpected: {2048: {pair_density: 0.00001}}\n")
    for indent in (None, 2):
        told = json.dumps(yaml.safe_load(plan.dumps()), indent=indent)
        assert Plan.loads(told) == plan
    twice = PLAN.dumps() + 'expected: {2048: {}, "2048": {}}\n'
    assert "expected.2048 is given twice" in refusal(Plan.loads, twice)
    assert "expected has '2k'" in refusal(Plan.loads, PLAN.dumps() + 'expected: {"2k": {}}\n')
