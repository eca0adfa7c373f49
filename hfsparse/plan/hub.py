"""Plans on the Hugging Face hub, through huggingface_hub: its cache, its offline mode, its tokens.

    plan = fetch("hf://ORG/REPO/plan.yaml")                # the newest
    plan = fetch("hf://ORG/REPO@REVISION/plan.yaml")       # of a branch, a tag or a commit
    plan = fetch("hf://ORG/REPO/plan.yaml#sha256:9f86…")   # refused where its hash is another
    push("folder", "ORG/REPO")

Tables beside a plan are fetched with it, of the same commit.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from hfsparse import reading
from hfsparse.errors import PlanError, UsageError, first_line
from hfsparse.plan.parts import MAX_BYTES
from hfsparse.plan.plan import Plan

SCHEME = "hf://"
REPO = r"\w[\w.-]*/\w[\w.-]*"
# The hash as `Plan.hash` gives it, or at least as much of it as `hfsparse show` prints.
ADDRESS = re.compile(
    rf"{SCHEME}(?P<repo>{REPO})(?:@(?P<revision>[^/@#]+))?/(?P<file>[^@#]+)"
    r"(?:#(?P<pin>sha256:[0-9a-f]{12,64}))?",
    re.ASCII,
)


@dataclass(frozen=True)
class Address:
    """A plan file in a repository of models."""

    repo: str  # ORG/REPO
    file: str  # its path there
    revision: str | None = None
    pin: str | None = None  # how the plan's hash begins


def is_address(source: str) -> bool:
    return source.startswith(SCHEME)


def parse(source: str) -> Address:
    """The parts of an address; PlanError where it has not its form."""
    found = ADDRESS.fullmatch(source)
    if found is None or {"", ".", ".."} & {*found["file"].split("/")}:
        raise PlanError(
            f"{source} is no plan on the hub: give hf://ORG/REPO/plan.yaml, perhaps with @REVISION "
            "behind REPO (a / in it as %2F), and #sha256:… (12 digits or more) at the end"
        )
    revision = found["revision"] and unquote(found["revision"])
    return Address(found["repo"], found["file"], revision, found["pin"])


def fetch(source: str) -> Plan:
    """The plan of an address; PlanError says why it can't be had, or that its hash is another."""
    asked = parse(source)
    path = _download(source, asked.repo, asked.file, asked.revision)
    beside = PurePosixPath(asked.file).parent
    commit = path.parents[len(beside.parts)].name  # the cache has a folder a commit
    for table in _tables(path):
        _download(source, asked.repo, str(beside / table), commit)
    plan = Plan.load(path)
    if asked.pin and not plan.hash().startswith(asked.pin):
        raise PlanError(
            f"{source}: the plan there has the hash {plan.hash()}: it is another than the one that "
            "was asked for. Give the @REVISION that has it, or look at what changed: hfsparse diff"
        )
    return plan


def _tables(path: Path) -> list[str]:
    """The files beside a plan that it names; none where it can't be read, which `load` will say."""
    try:
        named = Plan.loads(reading.content(path, MAX_BYTES + 1))
    except PlanError:
        return []
    return [table.file for table in named.data.values()]


def _download(source: str, repo: str, file: str, revision: str | None) -> Path:
    """A file's place in huggingface_hub's cache."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file, revision=revision, library_name="hfsparse"))
    except Exception as problem:  # the hub's, requests' or httpx's, and the disk's
        why = _why(problem, repo, file, revision)
        raise PlanError(f"can't get {source} from the hub: {why}") from problem


def _why(problem: Exception, repo: str, file: str, revision: str | None) -> str:
    """Why the hub gave nothing, in words."""
    from huggingface_hub import errors as hub

    sentences = {  # the first that fits: a gated repository is one that isn't found, too
        hub.GatedRepoError: f"{repo} is gated: accept its terms on its page, then give a token, by "
        "hf auth login or HF_TOKEN",
        hub.RepositoryNotFoundError: f"there is no repository {repo}, or it is private: check its "
        "name, or give a token, by hf auth login or HF_TOKEN",
        hub.RevisionNotFoundError: f"{repo} has no revision {revision}: give a branch, a tag or a "
        "whole commit",
        hub.LocalEntryNotFoundError: f"the hub can't be reached, and {file} is not in the cache "
        "here: connect (and unset HF_HUB_OFFLINE), or copy the plan and give its file",
        hub.EntryNotFoundError: f"{repo} has no file {file}: look at its page",
    }
    return next(
        (said for kind, said in sentences.items() if isinstance(problem, kind)),
        first_line(problem),
    )


def push(
    folder: str | os.PathLike, repo: str, private: bool = False, branch: str | None = None
) -> str:
    """Upload a folder to a repository of models, which is made where there is none; its commit.

    private: of a repository that is made. branch: is made, too; None: the main one.
    """
    check_repo(repo)
    from huggingface_hub import HfApi

    api = HfApi(library_name="hfsparse")
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if branch is not None:
            api.create_branch(repo, branch=branch, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, revision=branch, commit_message="A sparsity plan"
        )
    except Exception as problem:  # the hub's, requests' or httpx's, and the disk's
        raise UsageError(
            f"can't push to {repo}: {first_line(problem)}. Give a token that may write there, by "
            "hf auth login or HF_TOKEN, or see what would be pushed: --dry-run FOLDER"
        ) from problem
    return done.oid


def check_repo(repo: str) -> None:
    """UsageError unless it is the name of a repository."""
    if not re.fullmatch(REPO, repo, re.ASCII):
        raise UsageError(f"the repository is {repo}: give ORG/REPO")
