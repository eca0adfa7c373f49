"""An installed hfsparse holds every package of the tree."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = {"hfsparse.plans", "hfsparse.recipes"}  # no modules in them


def test_every_package_of_the_tree_is_listed_in_pyproject():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or newer reads TOML")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = [file.parent for top in ("hfsparse", "eval") for file in ROOT.glob(f"{top}/**/*.py")]
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    names = {name.replace("eval", "hfsparse_eval") for name in names} | DATA
    assert sorted(settings["packages"]) == sorted(names)
    elsewhere = {"hfsparse.plans": "plans", "hfsparse.recipes": "recipes"}
    assert settings["package-dir"] == {"hfsparse_eval": "eval", **elsewhere}
    for name, folder in elsewhere.items():
        found = {
            file
            for kind in settings["package-data"][name]
            for file in ROOT.glob(f"{folder}/{kind}")
        }
        assert found == {*(ROOT / folder).iterdir()}


def test_a_built_package_holds_plans_and_recipes_where_they_are_looked_for(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    build = "import setuptools; setuptools.setup()"
    words = ["-q", "build", "--build-base", tmp_path, "egg_info", "--egg-base", tmp_path]
    command = [sys.executable, "-c", build, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder in ("plans", "recipes"):
        built = {file.name for file in (tmp_path / "lib" / "hfsparse" / folder).iterdir()}
        assert built == {file.name for file in (ROOT / folder).iterdir()}
    listed = "from hfsparse.plan.sources import shipped; print(*shipped().values(), sep='\\n')"
    told = subprocess.run(
        [sys.executable, "-c", listed],
        cwd=tmp_path / "lib",
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(told) == len([*ROOT.glob("plans/*.yaml")])
    assert all(Path(file).parent == tmp_path / "lib" / "hfsparse" / "plans" for file in told)


def test_the_package_and_its_metadata_state_the_same_version():
    from importlib.metadata import version

    import hfsparse

    assert hfsparse.__version__ == version("hfsparse")
