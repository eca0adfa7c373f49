"""Links of docs/ to other files of the repository work in the site, too: the site gets those files.

A page of docs/ lies at the top of the site; a file outside docs/ keeps its path in the repository.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
BESIDE = (
    *("benchmarks/results/**/*", "benchmarks/*.py", "recipes/*.yaml", "examples/*.py"),
    *("plans/*.yaml", "plans/README.md"),
    *("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"),
)
LINK = re.compile(r"(\[[^\]]*\])\((?!\w+:|#|/)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """Add what docs/ may link to and is not in it."""
    for file in sorted({file for beside in BESIDE for file in ROOT.glob(beside)}):
        if file.is_file():
            uri, kind = file.relative_to(ROOT).as_posix(), InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, uri, abs_src_path=str(file), inclusion=kind))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn the repository's relative links into the site's; a site has no folder to link to."""
    here, there = Path(page.file.abs_src_path).parent, Path(page.file.src_uri).parent

    def moved(link: re.Match) -> str:
        words, target, anchor = link[1], Path(os.path.normpath(here / link[2])), link[3] or ""
        if target.is_dir():
            return words[1:-1]
        if target == ROOT / "README.md":
            target = DOCS / "index.md"
        base = DOCS if target.is_relative_to(DOCS) else ROOT
        uri = os.path.relpath(os.path.relpath(target, base), there)
        return f"{words}({Path(uri).as_posix()}{anchor})"

    return LINK.sub(moved, markdown)
