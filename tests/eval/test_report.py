"""Numbers worked out by hand from lines written by hand."""

import pytest

from hfsparse_eval import heatmap, report
from hfsparse_eval.results import Settings

SETTINGS = Settings(
    "ruler", "some/model", "sha256:m", "w", "0.1.0", "bfloat16", 7, "auto", None, "CPython 3.x"
)
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


def rows(text, title):
    table = text.split(f"## {title}\n\n")[1].split("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.split("\n")]


def test_scores_differences_and_empty_answers_of_the_pairs():
    text = report.write(LINES, SETTINGS, [SESSION], "sha256:p")
    head, _, vt, overall = rows(text, "Scores")
    assert head[:5] == ["task", "length", "n", "dense", "sparse"]
    # dense (100 + 60 + 80) / 3, sparse (100 + 20 + 80) / 3; changes 0, -40, 0
    assert vt == ["vt", "1024", "3", "80.0", "66.7", "-13.3 [-40.0, +0.0]", "33.3 / 33.3", "1 / 1"]
    assert overall == ["all", "all", *vt[2:]]
    assert "1 samples were run in one arm only" in text


def test_measured_densities_shares_and_times():
    text = report.write(LINES, SETTINGS, [SESSION], "sha256:p")
    _, _, vt, _ = rows(text, "Measured")
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
        "1.00 / 0.60",
        "167 / 193",
        "2.67 / 2.53",
    ]


def test_a_report_without_a_plan_is_of_the_dense_arm():
    text = report.write(LINES, SETTINGS, [SESSION], None)
    _, _, vt, _ = rows(text, "Scores")
    assert vt == ["vt", "1024", "4", "60.0", "–", "–", "25.0", "1"]
    assert rows(text, "Measured")[2][3:] == ["–", "–", "–", "–", "1.00", "175", "2.75"]
    assert "one arm only" not in text


def test_the_head_names_model_plan_machine_versions_and_prose():
    text = report.write(LINES, SETTINGS, [SESSION, {"machine": "b"}], "sha256:p")
    assert text.startswith("# ruler: some/model\n")
    for fact in (
        "some/model (fingerprint sha256:m), bfloat16",
        "- plan: sha256:p",
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
    names = [row[:2] for row in rows(report.write(lines, SETTINGS, [], None), "Scores")[2:]]
    assert names == [["niah_single_1", "8192"], ["vt", "4096"], ["vt", "16384"], ["all", "all"]]


@pytest.mark.parametrize(
    ("dense", "sparse", "expected"),
    [
        ([], [], "–"),
        ([1.0] * 8, [1.0] * 8, "0.0, no difference seen; up to 31 % of samples could differ"),
        ([1.0], [1.0], "0.0, no difference seen; up to 95 % of samples could differ"),
        ([0.2] * 300, [0.2] * 300, "0.0, no difference seen; up to 1 % of samples could differ"),
        ([1.0], [0.5], "-50.0, one sample"),
        ([0.5, 0.5], [1.0, 1.0], "+50.0, all 2 alike"),
    ],
)
def test_differences_that_no_bootstrap_can_take(dense, sparse, expected):
    assert report.difference(dense, sparse) == expected


def test_the_interval_is_the_one_known_for_a_large_sample():
    # 400 changes of 0 and -100 points, a quarter of them -100: normal theory gives -25 +- 4.24
    low, high = report.interval([-100.0, 0.0, 0.0, 0.0] * 100)
    assert low == pytest.approx(-29.24, abs=0.6)
    assert high == pytest.approx(-20.76, abs=0.6)
    assert (low, high) == report.interval([-100.0, 0.0, 0.0, 0.0] * 100)


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
    assert report.effective_length(means) == expected


def test_another_bar_can_be_set():
    assert report.effective_length({1: 50.0, 2: 40.0}, bar=45) == 1


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
    text = report.write(lines, SETTINGS, [], "sha256:p")
    table = rows(text, "Effective length")
    assert table[0] == ["arm", "4096", "8192", "effective length"]
    assert table[2:] == [
        ["dense", "90.0", "85.0", "4096"],
        ["sparse", "65.0", "85.0", "under 4096"],
    ]
    assert "Means of 2 tasks run at every length; RULER's are of all 13" in text


def test_one_length_has_no_effective_length():
    assert "Effective" not in report.write(LINES, SETTINGS, [], None)


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
    figure = heatmap.draw(lines, "sha256:p", "title")
    assert [axes.get_title() for axes in figure.axes] == ["dense", "sparse", "sparse − dense"]
    numbers = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert numbers == [
        ["100", "100", "50", "0"],
        ["100", "25", "50", "0"],
        ["+0", "-75", "+0", "+0"],
    ]
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["512", "1024"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0 %", "100 %"]


def test_the_heat_map_of_a_dense_run_has_one_panel_and_leaves_holes_blank(tmp_path):
    hole = {place: score for place, score in GRID.items() if place != (0.0, 1024)}
    figure = heatmap.draw(grid("dense", hole), None, "title")
    assert [text.get_text() for text in figure.axes[0].texts] == ["100", "50", "0"]
    heatmap.save(grid("dense", hole), None, "title", tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
