"""profile(curves=…): a panel a layer that may be sparse, one of budgets, as measured."""

import numpy as np
import pytest

import hfsparse
from hfsparse.errors import UsageError
from hfsparse.kernels import cpu
from hfsparse.profiler import run as profiling
from hfsparse.profiler.methods import minference
from tests import tiny

SETTINGS = dict(lengths=(512,), samples=1, verify=False, decode_share=0.6)


def test_curves_show_each_layer_and_kind_and_what_budgets_cost(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "GATHERING_PAYS", 0)  # as on a GPU
    drawn, write = [], profiling.write_png
    monkeypatch.setattr(profiling, "write_png", lambda *given: drawn.append(given) or write(*given))
    model, file = tiny.llama(window=1024), tmp_path / "curves.png"
    settings = SETTINGS | {"method": "minference", "curves": file}
    plan = hfsparse.profile(model, tiny.tokenizer(), **settings)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [file]
    ((figure, _),) = drawn
    *layers, budgets = figure.axes
    assert [axis.get_title() for axis in layers] == ["layer 0", "layer 1"]
    candidates = minference.candidates(512)
    kinds = {each.kind for each in candidates.patterns.values()}
    for axis in layers:
        points = {line.get_label(): line.get_xydata() for line in axis.lines}
        assert points.keys() == {*kinds, "ring, a whole kv head"}
        assert sum(map(len, points.values())) == len(candidates.patterns) + len(candidates.rings)
        for density, recall in (each.T for each in points.values()):
            assert (np.diff(density) >= 0).all()
            assert (density > 0).all()
            assert (density < recall).all()  # the kept pairs are not those of least attention
            assert (recall <= 1).all()
    lines = {line.get_label(): line.get_xydata().T for line in budgets.lines}
    for name in ("pair density", "cache share", "decode share"):
        share, loss = lines[name]
        assert share[-1] == 1
        assert loss[-1] == 0
        assert loss[0] > 0
        assert (np.diff(loss) <= 1e-3 * loss[0]).all()
    marks = [line.get_xdata()[0] for line in budgets.lines if line.get_linestyle() == ":"]
    assert marks == [0.4, 0.8, 0.6]
    assert plan.made["method"] == "minference"


def test_a_method_that_measures_no_curves_is_refused(tmp_path):
    with pytest.raises(UsageError, match="moa draws no curves: leave them out, or use balanced"):
        hfsparse.profile(
            tiny.llama(), tiny.tokenizer(), method="moa", curves=tmp_path / "c.png", lengths=(512,)
        )
