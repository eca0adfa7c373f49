"""An installed hfsparse holds every package of the tree."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_every_package_of_the_tree_is_listed_in_pyproject():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or newer reads TOML")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = [file.parent for top in ("hfsparse", "eval") for file in ROOT.glob(f"{top}/**/*.py")]
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    names = {name.replace("eval", "hfsparse_eval") for name in names} | {"hfsparse.recipes"}
    assert sorted(settings["packages"]) == sorted(names)
    assert settings["package-dir"] == {"hfsparse_eval": "eval", "hfsparse.recipes": "recipes"}
    assert settings["package-data"]["hfsparse.recipes"] == ["*.yaml"]


def test_the_package_and_its_metadata_state_the_same_version():
    from importlib.metadata import version

    import hfsparse

    assert hfsparse.__version__ == version("hfsparse")
