"""A family keeps what hfsparse/families.json says of it: accepted, right, profiled, refused.

A tenth of all entries is asked in each run, another one as the code changes; `--census 3` names
one, `--census all` asks everything. `make census` does that and writes the record and its page.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import transformers

from hfsparse.writing import write_whole
from tests.census import record
from tests.census.entries import entries
from tests.census.questions import Answer, ask

VERSION = transformers.__version__


def pytest_generate_tests(metafunc):
    if "entry" not in metafunc.fixturenames:
        return
    asked = metafunc.config.getoption("--census")
    turn = record.turn() if asked is None else asked
    chosen = entries() if turn == "all" else record.tenth(int(turn))
    metafunc.parametrize("entry", chosen, ids=[entry.name.replace("/", "-") for entry in chosen])


@pytest.mark.timeout(240)
def test_family(entry, request):
    writes = request.config.getoption("--write-census")
    version, answers = record.load()
    if version != VERSION and not writes:
        pytest.skip(f"hfsparse/families.json is of transformers {version}")
    said = _asked(entry) if writes else ask(entry)
    request.node.user_properties.append(("census", (entry.name, asdict(said))))
    was, now = record.brief(answers.get(entry.name)), record.brief(said)
    assert writes or was == now, (
        f"hfsparse/families.json says {was}, now: {now}. {said.reason or said.profile_reason} "
        f"If that is meant, make census K='{request.node.callspec.id}' writes it anew "
        f"(this run asked turn {request.config.getoption('--census') or record.turn()} of "
        f"{record.TURNS}: pytest tests/census --census TURN asks it again)"
    )


def _asked(entry) -> Answer:
    """The answer, from a census of the same sources that was stopped where there is one."""
    file = record.kept(VERSION, entry)
    if file.exists():
        return Answer(**json.loads(file.read_text()))
    said = ask(entry)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(asdict(said)).encode())
    return said


def test_the_page_shows_the_record_and_the_record_has_every_entry(request):
    if request.config.getoption("--write-census"):
        pytest.skip("written at the end of this run")
    version, answers = record.load()
    if version != VERSION:
        pytest.skip(f"hfsparse/families.json is of transformers {version}")
    assert list(answers) == [entry.name for entry in entries()], "make census writes it anew"
    assert record.PAGE.read_text() == record.render(), "run python -m tests.census.record"


def test_ten_turns_ask_every_entry_once():
    turns = [entry for number in range(record.TURNS) for entry in record.tenth(number)]
    assert sorted(entry.name for entry in turns) == sorted(entry.name for entry in entries())
    assert len({entry.name for entry in entries()}) == len(entries())
