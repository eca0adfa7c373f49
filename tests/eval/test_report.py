"""Numbers worked out by hand from lines written by hand."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from hfsparse_eval.report import heatmap, render, tables
from hfsparse_eval.report import page as report
from hfsparse_eval.run.results import Results, Settings

SETTINGS = Settings(
    "ruler", "some/model", "sha256:m", "w", "0.1.0", "bfloat16", 7, "auto", None, "CPython 3.x"
)
ARM = {"arm": "sparse", "plan": "sha256:p", "title": "mine"}
SESSION = {"machine": "a GPU, Linux x86_64", "python": "3.11", "torch": "2.9"}


def line(i, arm, score, output="x", **more):
    measured = dict.fromkeys(("pair_density", "block_density", "decode_share", "cache_share"))
    return {
        "id": f"vt-1024-{i:04d}",
        "task": "vt",
        "length": 1024,
        "depth": 50.0,
        "arm": arm,
        "plan": None if arm == "dense" else "sha256:p",
        "model": "sha256:m",
        "score": score,
        "output": output,
        "prompt_tokens": 990,
        "new_tokens": 11,
        "transformers": "5.0",
        "seconds": 3.0,
        "first_token_seconds": 1.0,
        **measured,
        **more,
    }


def sparse(i, score, **more):
    shares = {"pair_density": 0.5, "block_density": 0.6, "decode_share": 0.25, "cache_share": 0.75}
    return line(i, "sparse", score, **{**shares, **more})


LINES = [
    line(0, "dense", 1.0, seconds=2.0),
    line(1, "dense", 0.6),
    line(2, "dense", 0.8, output=" \n"),
    line(9, "dense", 0.0),  # its sparse arm is still to come
    sparse(0, 1.0, seconds=1.6, first_token_seconds=0.6),
    sparse(1, 0.2, pair_density=0.2, decode_share=0.35, first_token_seconds=0.6, output=""),
    sparse(2, 0.8, first_token_seconds=0.6, decode_share=None),  # no decode step: no share
    {**sparse(2, 0.0), "plan": "sha256:another"},
]


def write(*given):
    return render.markdown(report.parts(*given))


def rows(text, title):
    below = text.split(f"## {title}\n\n")[1].split("\n\n")
    table = next(part for part in below if part[0] == "|").strip()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.split("\n")]


def test_scores_differences_and_empty_answers_of_the_pairs():
    text = write(LINES, SETTINGS, [SESSION], [ARM])
    head, _, vt, overall = rows(text, "Scores: mine")
    assert head[:5] == ["task", "length", "n", "dense", "arm's"]
    # dense (100 + 60 + 80) / 3, sparse (100 + 20 + 80) / 3; changes 0, -40, 0; no whole one lost
    # Student's interval of three: 13.33 is the standard error, too, and 4.303 times that is 57.4
    shown = ["80.0", "66.7", "-13.3 [-70.7, +44.0]", "1.000", "33.3 / 33.3", "33.3 / 33.3"]
    assert vt == ["vt", "1024", "3", *shown]
    assert overall == ["all", "all", *vt[2:]]


def test_what_one_arm_lacks_is_listed_with_why():
    failed = {key: line(9, "sparse", 0)[key] for key in ("id", "task", "length", "arm", "model")}
    failed |= {"plan": "sha256:p", "transformers": "5.0", "failed": "OutOfMemoryError: 80 GiB"}
    rest = [{**x, "length": 2048, "id": x["id"] + "b"} for x in LINES if x["arm"] == "sparse"][:1]
    text = write([*LINES, failed, *rest], SETTINGS, [SESSION], [ARM])
    assert rows(text, "Missing")[2:] == [
        ["dense", "2048", "1 of 1", "not run"],
        ["mine", "1024", "1 of 4", "OutOfMemoryError: 80 GiB"],
    ]
    assert rows(text, "Scores: mine")[2][:3] == ["vt", "1024", "3"]


def test_pairs_are_of_one_version_of_transformers():
    other = [{**x, "transformers": "4.57"} for x in LINES if x["arm"] == "sparse"]
    dense = [x for x in LINES if x["arm"] == "dense"]
    assert report.cells(dense + other, ARM) == []
    again = [{**dense[1], "transformers": "4.57", "score": 0.9}]
    (cell,) = report.cells(dense + other + again, ARM)
    assert cell.scores == ([0.9], [0.2])


def test_measured_densities_shares_and_times():
    text = write(LINES, SETTINGS, [SESSION], [ARM])
    _, _, vt, _ = rows(text, "Measured: mine")
    # pair density (0.5 + 0.2 + 0.5) / 3; decode share (0.25 + 0.35) / 2; first token 1.0 and 0.6
    # next token: dense (1 + 2 + 2) s / 30, sparse (1 + 2.4 + 2.4) s / 30
    # whole: dense (2 + 3 + 3) / 3, sparse (1.6 + 3 + 3) / 3
    assert vt == [
        "vt",
        "1024",
        "990",
        "0.400",
        "0.600",
        "0.750",
        "0.300",
        "1 / 1",
        "1.00 / 0.60",
        "167 / 193",
        "2.67 / 2.53",
    ]


def test_what_a_batch_held_is_told_of_one_sample_and_its_times_beside_its_size():
    dense = [line(i, "dense", 1.0, batch=4) for i in range(3)]
    sizes = [{}, {"batch": 4, "kv_bytes": None}, {"batch": 2, "kv_bytes": 6 * 2**20}]
    own = [sparse(i, 1.0, **{"kv_bytes": 2 * 2**20, **more}) for i, more in enumerate(sizes)]
    text = write([*dense, *own], SETTINGS, [SESSION], [ARM])
    _, _, whole = rows(text, "Verdicts")
    assert whole[-1] == "2.5"  # (2 + 6 / 2) / 2 MiB
    _, _, vt, _ = rows(text, "Measured: mine")
    assert vt[7] == "4 / 1–4"


def test_tasks_that_the_dense_model_cannot_do_are_set_apart_and_not_summed():
    hard = [
        make(i, arm, score, task="cwe", id=f"cwe-{i}")
        for arm, make in (("dense", line), ("sparse", lambda i, _, s, **more: sparse(i, s, **more)))
        for i, score in enumerate([0.69, 0.7] if arm == "dense" else [0.0, 0.0])
    ]
    text = write(LINES + hard, SETTINGS, [], [ARM])
    tables = text.split("## Scores: mine")[1].split("## ")[0].split("Set apart")
    assert "| vt | " in tables[0]
    assert "| all | all | 3 | 80.0 | 66.7 | " in tables[0]
    assert "| cwe | 1024 | 2 | 69.5 | 0.0 | " in tables[1]
    assert "| cwe | 1024 | 990 " in text.split("## Measured: mine")[1]
    nothing = write(hard, SETTINGS, [], [ARM])
    assert "- mine: nothing to judge" in nothing


def test_the_users_own_questions_all_count():
    lines = at_lengths("dense", {("custom", 128): [0.0, 1.0, 0.0], ("custom", 256): [1.0]})
    lines += at_lengths("sparse", {("custom", 128): [0.0, 0.0, 0.0], ("custom", 256): [1.0]})
    text = write(lines, SETTINGS, [], [ARM])
    assert "| all | all | 4 | 50.0 | 25.0 | " in text
    assert "Set apart" not in text


def test_the_verdict_names_a_length_that_breaks_the_promise_alone():
    """Nothing is lost in 80 samples of the short length, half of 20 in the long one."""
    dense = {("vt", 4096): [1.0] * 80, ("vt", 8192): [1.0] * 20}
    worse = dense | {("vt", 8192): [1.0, 0.0] * 10}
    lines = at_lengths("dense", dense) + at_lengths("sparse", worse)
    text = write(lines, SETTINGS, [], [ARM | {"promise": {"limit": 0.2}}])
    told = next(line for line in text.splitlines() if line.startswith("- mine: "))
    assert told.startswith("- mine: drop 10.0 ± ")
    assert told.endswith(": within the promised 20.0; beyond it at 8192 tokens alone")


def test_the_verdict_says_where_a_promise_was_of_other_tasks():
    def told(kind: str, arm: dict) -> bool:
        text = write(LINES, replace(SETTINGS, kind=kind), [], [arm])
        return "; it was promised for retrieval" in text

    promised = ARM | {"promise": {"limit": 0.2}}
    kinds = {kind: told(kind, promised) for kind in ("ruler", "needle", "custom")}
    assert kinds == {"ruler": False, "needle": False, "custom": True}
    assert not told("custom", ARM)


def test_a_report_without_an_arm_is_of_the_dense_one():
    strong = [line(i, "dense", score) for i, score in enumerate([1.0, 0.5])]
    text = write(strong, SETTINGS, [SESSION])
    _, _, vt, _ = rows(text, "Scores: dense")
    assert vt == ["vt", "1024", "2", "75.0", "–", "–", "–", "50.0", "0.0"]
    assert rows(text, "Measured: dense")[2][3:] == [*4 * ["–"], "1", "1.00", "200", "3.00"]
    assert "Missing" not in text
    assert "Verdicts" not in text


def test_the_head_names_model_plan_machine_versions_and_prose():
    text = write(LINES, SETTINGS, [SESSION, {"machine": "b"}], [ARM])
    assert text.startswith("# ruler: some/model\n")
    for fact in (
        "some/model (fingerprint sha256:m), bfloat16",
        "- arms beside dense: mine sha256:p",
        "seed 7",
        "- machine: a GPU, Linux x86_64; python 3.11, torch 2.9",
        "- machine: b",
        "CPython 3.x (not RULER's essays",
        "as RULER: 128, vt 30, cwe 120, fwe 50, qa 32",
        "- questions: qa_1 not run; qa_2 not run; qa_*_invented: invented facts (not SQuAD or",
    ):
        assert fact in text


def test_rows_are_by_task_then_length_as_numbers():
    lines = [
        line(0, "dense", 1.0, task=task, length=length, id=f"{task}-{length}")
        for task, length in (("vt", 16384), ("vt", 4096), ("niah_single_1", 8192))
    ]
    names = [row[:2] for row in rows(write(lines, SETTINGS, []), "Scores: dense")[2:]]
    assert names == [["niah_single_1", "8192"], ["vt", "4096"], ["vt", "16384"], ["all", "all"]]


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ({}, None),
        ({4096: 85.59}, None),
        ({4096: 85.6}, 4096),
        ({4096: 95.0, 8192: 90.0, 16384: 80.0}, 8192),
        ({16384: 86.0, 4096: 80.0, 8192: 90.0}, 16384),  # the longest, whatever lies before
    ],
)
def test_the_effective_length_is_the_longest_that_reaches_rulers_bar(means, expected):
    assert tables.effective_length(means) == expected


def at_lengths(arm, scores):
    make = line if arm == "dense" else lambda i, arm, score, **more: sparse(i, score, **more)
    return [
        make(i, arm, score, task=task, length=length, id=f"{task}-{length}-{i}")
        for (task, length), both in scores.items()
        for i, score in enumerate(both)
    ]


def test_effective_lengths_are_of_tasks_run_at_every_length_and_weigh_tasks_alike():
    dense = {
        ("vt", 4096): [1.0, 1.0],
        ("cwe", 4096): [0.8],
        ("vt", 8192): [0.9],
        ("cwe", 8192): [0.8],
        ("fwe", 4096): [0.0],  # not run at 8192: left out
    }
    lines = at_lengths("dense", dense) + at_lengths("sparse", dense | {("vt", 4096): [0.4, 0.6]})
    text = write(lines, SETTINGS, [], [ARM])
    table = rows(text, "Effective length")
    assert table[0] == ["arm", "4096", "8192", "effective length"]
    assert table[2:] == [
        ["dense", "90.0", "85.0", "4096"],
        ["mine", "65.0", "85.0", "under 4096"],
    ]
    assert "Means of 2 tasks run at every length; RULER's are of all 13" in text


def test_tasks_that_are_not_rulers_have_no_effective_length():
    own = {("towers", 4096): [1.0], ("towers", 8192): [1.0]}
    assert "Effective" not in write(at_lengths("dense", own), SETTINGS, [])
    beside = own | {("vt", 4096): [0.5], ("vt", 8192): [0.5]}
    text = write(at_lengths("dense", beside), SETTINGS, [])
    assert rows(text, "Effective length")[2:] == [["dense", "50.0", "50.0", "under 4096"]]
    assert "Means of 1 tasks" in text
    qa = {("qa_1", 4096): [1.0], ("qa_1", 8192): [1.0]}  # SQuAD's, which is given by a file
    assert "Means of 1 tasks" in write(at_lengths("dense", qa), SETTINGS, [])


def test_one_length_has_no_effective_length():
    assert "Effective" not in write(LINES, SETTINGS, [])


def grid(arm, scores):
    make = line if arm == "dense" else lambda i, arm, score, **more: sparse(i, score, **more)
    return [
        make(0, arm, score, id=f"n-{length}-{depth}", length=length, depth=depth)
        for (depth, length), score in scores.items()
    ]


GRID = {(0.0, 512): 1.0, (100.0, 512): 0.5, (0.0, 1024): 1.0, (100.0, 1024): 0.0}
SPARSE = {**GRID, (0.0, 1024): 0.25}


def test_the_heat_map_has_three_panels_with_a_number_in_each_cell():
    lines = grid("dense", GRID) + grid("sparse", SPARSE)
    figure = heatmap.draw(lines, ARM, "title")
    assert [axes.get_title() for axes in figure.axes] == ["dense", "mine", "mine − dense"]
    numbers = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert numbers == [
        ["100", "100", "50", "0"],
        ["100", "25", "50", "0"],
        ["+0", "-75", "+0", "+0"],
    ]
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["512", "1024"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0 %", "100 %"]


def test_the_heat_map_of_a_dense_run_has_one_panel_and_leaves_holes_blank():
    hole = {place: score for place, score in GRID.items() if place != (0.0, 1024)}
    figure = heatmap.draw(grid("dense", hole), None, "title")
    assert [text.get_text() for text in figure.axes[0].texts] == ["100", "50", "0"]


def test_the_heat_map_is_of_one_task_and_of_arms_that_have_pairs(tmp_path):
    other = {**ARM, "plan": "sha256:q", "title": "other"}
    results = Results(tmp_path, SETTINGS, SESSION, [other, ARM])
    for one in grid("dense", GRID) + grid("sparse", SPARSE) + [line(0, "dense", 1.0, task="cwe")]:
        results.append(one)
    assert [path.name for path in heatmap.save(results, "vt")] == ["heatmap.png"]
    assert heatmap.draw(results.lines, other, "") is None


def test_a_plan_that_changed_between_runs_is_an_arm_of_its_own_name(tmp_path):
    first = {**ARM, "plan": "sha256:aaaaaaaa"}
    Results(tmp_path, SETTINGS, SESSION, [first])
    again = Results(tmp_path, SETTINGS, SESSION, [{**ARM, "plan": "sha256:bbbbbbbb"}])
    assert [arm["title"] for arm in again.arms] == ["mine aaaaaa", "mine bbbbbb"]
    same = Results(tmp_path, SETTINGS, SESSION, [first])
    assert [arm["title"] for arm in same.arms] == ["mine bbbbbb", "mine"]


def test_scores_are_named_by_what_they_are():
    for kind, told in (("decode", "words wanted"), ("turns", "mean of the turns"), ("ruler", "qa")):
        lines = [{**line(0, "dense", 1.0), "turns": []}]
        text = write(lines, Settings(kind, *list(vars(SETTINGS).values())[1:]), [])
        note = next(row for row in text.splitlines() if row.startswith("Scores"))
        assert told in note
        assert ("RULER" in note) == (kind == "ruler")


def test_the_page_needs_no_other_file_and_shows_what_the_tables_do(tmp_path):
    broken = {**LINES[4], "failed": "ValueError: <b>&</b>", "id": "vt-1024-0007"}
    results = Results(tmp_path, SETTINGS, SESSION, [ARM])
    for one in [*LINES, broken]:
        results.append(one)
    markdown, page = report.save(results)
    html = page.read_text("utf-8")
    assert markdown.read_text("utf-8").count("| vt | 1024 | ") == 2
    assert html.count("<svg") == 2
    assert "&lt;b&gt;&amp;&lt;/b&gt;" in html
    assert not re.search(r"(src|href)=\"(?!data:|#)|<script|url\((?!#)", html)
    body = html[html.index("<body>") : html.index("</body>") + 7]
    tree = ElementTree.fromstring(body)  # every element is closed
    titles = [e.text for e in tree.iter() if e.tag in ("h1", "h2")]
    assert titles[1:] == ["Verdicts", "Scores: mine", "Measured: mine", "Missing"]
    assert {child.name for child in tmp_path.iterdir()} == {
        "run.json",
        "results.jsonl",
        "report.md",
        "report.html",
    }
