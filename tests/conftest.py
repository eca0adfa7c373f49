"""Fixtures for every test."""

import os
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import settings

from tests.turns import turn

# Before torch is imported: its threads and other processes slow each other down many times over.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
for name, folder in {"hfsparse": "hfsparse", "hfsparse_eval": "eval"}.items():
    if spec := find_spec(name):
        found = Path(spec.origin).resolve().parent
        if found != (ROOT / folder).resolve():
            raise pytest.UsageError(
                f"these tests are of {ROOT / folder}, but {name} would be imported from {found}: "
                "install this tree (make venv) and run .venv/bin/python -m pytest of its own"
            )

# The same examples every time, however slow the machine; look for new ones with
# `pytest --hypothesis-profile=explore`.
settings.register_profile("same", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("same")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real model: the folder HFSPARSE_SMOLLM2, or `.cache/smollm2`, built if missing."""
    from hfsparse_eval.smollm2 import build

    ready = os.environ.get("HFSPARSE_SMOLLM2")
    folder = Path(ready) if ready else ROOT / ".cache" / "smollm2"
    build(folder)
    return folder


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Full rows of a cache hold NaN where nothing was stored, not what the memory held before."""
    cache = sys.modules.get("hfsparse.runtime.cache.buffers")
    if cache is not None:
        from tests.helpers import poison_of

        made, nan = cache.new_buffer, float("nan")
        monkeypatch.setattr(
            cache, "new_buffer", lambda t, *shape: made(t, *shape).fill_(poison_of(t.dtype, nan))
        )


FIRST = "tests/test_real_model.py"  # takes minutes, whatever the other worker does meanwhile
# Their tests share nothing that takes long to make: whichever worker is free takes the next. Other
# files go to one worker each, so that their profiles, models and processes are made once.
APART = ("tests/support/", "tests/census/", "tests/patcher/test_soak.py")


# Everything in many settings under the same invariants: `--one-in` asks a part of these, too, of
# each test one setting at least.
SAMPLED = ("tests/selectors/test_patched.py", "tests/selectors/test_selectors.py")
SAMPLED += ("tests/patterns/test_patterns.py", "tests/patcher/test_equivalence.py")
SAMPLED += ("tests/kernels/test_reference.py", "tests/kernels/test_merge.py")
SAMPLED += ("tests/kernels/triton/", "tests/profiler/test_ropes.py", "tests/runtime/test_worlds.py")
SAMPLED += ("tests/runtime/test_graphs.py", "tests/runtime/test_hybrid_graphs.py")
SAMPLED += ("tests/patcher/test_figures.py", "tests/patcher/test_weights.py")
SAMPLED += ("tests/patcher/test_memory.py", "tests/patcher/test_calling.py")
SAMPLED += ("tests/profiler/test_weights_elsewhere.py", "tests/profiler/test_hybrids.py")


def part_of_matrices(names: list[str], parts: int) -> set[str]:
    """Which tests are asked: of each of SAMPLED its settings that fall to this turn."""
    asked, settings = {name for name in names if not name.startswith(SAMPLED)}, defaultdict(list)
    for name in sorted({*names} - asked, key=lambda name: crc32(name.encode())):
        settings[name.partition("[")[0]].append(name)
    for found in settings.values():
        asked.update(found[turn(min(parts, len(found)), "selectors") :: parts])
    return asked


def pytest_collection_modifyitems(config, items):
    asked = part_of_matrices([item.nodeid for item in items], config.getoption("--one-in"))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in asked])
    items[:] = [item for item in items if item.nodeid in asked]
    items.sort(key=lambda item: (not item.nodeid.startswith(FIRST), item.nodeid.startswith(APART)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`--dist loadfile`, but for tests of APART; in the order above."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if nodeid.startswith(APART) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_addoption(parser):
    parser.addoption("--write-support", action="store_true", help="write docs/support.json anew")
    parser.addoption("--write-census", action="store_true", help="write docs/families.md anew")
    parser.addoption(
        "--one-in", type=int, default=1, help="a part of tests/support, and of matrices"
    )
    parser.addoption("--census", metavar="TURN", help="a tenth of the families, 0 to 9, or all")


def pytest_configure(config):
    writers = {"support": write_support, "census": write_census}
    for name, write in writers.items():
        if config.getoption(f"--write-{name}") and not hasattr(config, "workerinput"):
            config.pluginmanager.register(Gathered(name, write))


class Gathered:
    """What tests noted under a name, gathered over all worker processes and written at the end."""

    def __init__(self, name, write):
        self.name, self.write, self.cells = name, write, []

    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            self.cells += [cell for name, cell in report.user_properties if name == self.name]

    def pytest_sessionfinish(self, exitstatus):
        import transformers

        self.write(transformers.__version__, self.cells, exitstatus)


def write_support(version, cells, exitstatus):
    from tests.support.table import write

    if exitstatus == 0:
        write(version, cells)


def write_census(version, cells, exitstatus):
    from tests.census.questions import Answer
    from tests.census.record import write

    changed = write(version, {name: Answer(**said) for name, said in cells})
    found = f"{len(cells)} asked, {len(changed)} changed"
    print(f"\nhfsparse/families.json: {found}", *changed, sep="\n  ")
