"""Where a plan is from: a file, a name of the plans that are shipped, or the Hugging Face hub.

    open_plan("plan.yaml")
    open_plan("duo:llama-3.1-8b-instruct")     # `hfsparse plans` lists the names
    open_plan("hf://ORG/REPO/plan.yaml")       # see `hub` for revisions and pins

Each comes to one file that can be read. `patch` and every command take what this takes.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path, PurePosixPath

from hfsparse.errors import PlanError
from hfsparse.plan import hub
from hfsparse.plan.plan import Plan
from hfsparse.plan.words import show
from hfsparse.reading import local

HERE = Path(__file__).resolve().parents[1]
FOLDER = next(each for each in (HERE / "plans", HERE.parent / "plans") if each.is_dir())
WEB = re.compile(r"(hf|https?):/", re.IGNORECASE)
NAME = re.compile(r"[a-z]{2,20}:.{0,120}", re.ASCII | re.IGNORECASE)  # C:plan.yaml is a file


def shipped() -> dict[str, Path]:
    """The file of each plan that is shipped, by its name, `method:model`."""
    return {file.stem.replace("-", ":", 1): file for file in sorted(FOLDER.glob("*.yaml"))}


def open_plan(source: str | os.PathLike) -> Plan:
    """The plan of a file, a shipped name or an address on the hub; PlanError says why not."""
    kind = _kind(source)
    if kind == "address":
        return hub.fetch(source)
    return Plan.load(_named(source) if kind == "name" else source)


def is_own_file(source: str | os.PathLike) -> bool:
    """Whether it is a file, which its user may write."""
    return _kind(source) == "file"


def name_of(source: str | os.PathLike) -> str:
    """What a report calls a plan: its name, or its file's without `.yaml`."""
    kind = _kind(source)
    if kind == "name":
        return source.lower()
    return PurePosixPath(hub.parse(source).file).stem if kind == "address" else Path(source).stem


def _kind(source: str | os.PathLike) -> str:
    """`address`, `name` or `file`; a file that is there goes before a name."""
    if not isinstance(source, str):
        return "file"
    if not source.strip():
        raise PlanError(
            f"the plan is {show(source)}: give its file, or a name that hfsparse plans lists"
        )
    if hub.is_address(source):
        return "address"
    if WEB.match(source) and not local(source).exists():
        raise PlanError(f"{source} is no file: a plan on the hub is hf://ORG/REPO/plan.yaml")
    return "name" if NAME.fullmatch(source) and not local(source).exists() else "file"


def _named(name: str) -> Path:
    known = shipped()
    if name.lower() in known:
        return known[name.lower()]
    near = difflib.get_close_matches(name.lower(), known, 3, 0.5)
    near = near or [each for each in known if each.startswith(f"{name.partition(':')[0].lower()}:")]
    raise PlanError(
        f"no plan {show(name)} is shipped: {'near it are' if near else 'there are'} "
        f"{', '.join(near or known)} (hfsparse plans lists them; or give a file)"
    )
