"""The tests run this tree: with another one installed, they refuse to begin."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_package_of_another_tree_ends_the_run_and_is_named(tmp_path):
    """`eval/` is the one that an installed tree takes from all others: its name is mapped."""
    other = tmp_path / "hfsparse_eval"
    other.mkdir()
    (other / "__init__.py").touch()
    result = collect(ROOT, PYTHONPATH=str(tmp_path))
    assert result.returncode == 4, result.stdout + result.stderr
    assert f"hfsparse_eval would be imported from {other.resolve()}: install" in result.stderr


def test_a_copy_of_the_tests_refuses_the_installed_packages(tmp_path):
    (tmp_path / "tests").mkdir()
    for name in "conftest.py", "turns.py":
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests" / "test_one.py").write_text("def test_one(): pass\n")
    result = collect(tmp_path)
    assert result.returncode == 4, result.stdout + result.stderr
    assert f"these tests are of {tmp_path / 'hfsparse'}" in result.stderr


def collect(tree: Path, **environment: str) -> subprocess.CompletedProcess:
    """A run of pytest that collects a tree's tests of imports, or all that it has."""
    which = "tests/test_layers.py" if tree == ROOT else "tests"
    words = [sys.executable, "-m", "pytest", "-q", "--collect-only", which]
    more = {**os.environ, **environment}
    return subprocess.run(words, cwd=tree, env=more, capture_output=True, text=True)
