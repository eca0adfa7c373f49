"""The README's main job ends in a table of what `hfsparse eval` writes."""

import pytest

from benchmarks import demo
from hfsparse.plan import Plan
from tests.eval.running import goes_on
from tests.patcher.families import streaming


def test_the_demo_reads_the_lines_of_an_eval(folder, model, tmp_path):
    streaming(model).save(tmp_path / "plan.yaml")
    words = ["ruler", str(folder), "-o", str(tmp_path / "out"), "--lengths", "600"]
    words += ["--plan", str(tmp_path / "plan.yaml"), "--tasks", "niah_single_1,niah_single_2"]
    words += ["--max-new-tokens", "2", "--samples"]
    lines, _ = goes_on(words, tmp_path / "out")
    rows = demo.grid(lines, Plan.load(tmp_path / "plan.yaml").hash())
    first, second, whole = demo.summary(rows).splitlines()[2:]
    assert first.startswith("| niah_single_1 | 0/2 | 0/2 | 0.")
    assert second.startswith("| niah_single_2 | 0/2 | 0/2 | 0.")
    assert whole.startswith("| all | 0/4 | 0/4 | 0.")
    with pytest.raises(SystemExit, match="the demo promises pair density"):
        demo.judge(rows[-1])  # half of the heads are full: more than 0.40
