"""Pictures of a report with many arms of long names."""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from hfsparse_eval.report import charts
from hfsparse_eval.report.statistics import change

ARMS = [f"kvpress:ExpectedAttention:0.{i}:agnostic" for i in range(12)]


def pictures(arms):
    seen = change([1.0, 0.0, 1.0], [0.0, 0.0, 1.0])
    shares = {"pair density": 0.3, "KV share": 0.4}
    dots = [charts.Dot(arm, n, 90.0, seen, shares) for arm in arms for n in (4096, 8192)]
    return {
        "scores": charts.scores(dots, list(shares), arms),
        "changes": charts.changes(
            {"vt 4096": {arms[-1]: seen}, "vt 8192": dict.fromkeys(arms, seen)}, arms
        ),
    }


@pytest.mark.parametrize("name", ["scores", "changes"])
@pytest.mark.parametrize("arms", [ARMS, ARMS[:1], ["a", "b", "c"]], ids=["many", "one", "short"])
def test_the_legend_is_whole_and_each_arm_has_a_colour_of_its_own(name, arms):
    figure = pictures(arms)[name]
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
    for axes in figure.axes:
        assert axes.get_window_extent().height > 40
        assert axes.get_window_extent().y0 > box.y1
    keys = {text.get_text(): to_hex(key.get_color()) for text, key in labelled(legend)}
    assert set(arms) <= set(keys)
    assert len({keys[arm] for arm in arms}) == len(arms)


def test_an_arm_has_the_same_colour_in_both_pictures():
    found = [
        {text.get_text(): to_hex(key.get_color()) for text, key in labelled(figure.legends[0])}
        for figure in pictures(ARMS).values()
    ]
    assert all(found[0][arm] == found[1][arm] for arm in ARMS)


def labelled(legend):
    return zip(legend.get_texts(), legend.get_lines(), strict=True)
