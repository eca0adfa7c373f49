"""Every link leads somewhere, in the repository and in the site that `make docs` builds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, PAGES, README, ROOT, prose, text

LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as MkDocs and code hosts make them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", heading.lower()).strip()
        found[re.sub(r"\s", "-", plain)] = 1
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_and_anchor_of_a_page_is_there(page):
    for target, anchor in LINK.findall(prose(page)):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name} links to {target}, which isn't there"
        assert file.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(file), f"{page.name}: no heading {anchor} in {file.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page):
    tops = "hfsparse|eval|tests|benchmarks|recipes|plans|docs|examples"
    for name in re.findall(rf"`((?:{tops})/[\w./-]*)`", prose(page)):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_the_page_of_the_design_names_every_room():
    page = text(DOCS / "architecture.md")
    for top in ("hfsparse", "eval"):
        for init in (ROOT / top).rglob("__init__.py"):
            room = init.parent.relative_to(ROOT).as_posix()
            assert f"`{room}/`" in page or room == "hfsparse"


def test_the_readme_can_be_read_in_one_go():
    assert len(text(README).splitlines()) <= 110
    assert len(prose(README).split()) <= 900


def test_the_readme_leads_to_every_page():
    linked = {Path(target).name for target, _ in LINK.findall(text(README))}
    rest = {page.name for page in DOCS.glob("*.md")} - linked
    assert rest <= {"index.md"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` does: a broken link or anchor is an error."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    config = ["-f", str(DOCS / "site" / "mkdocs.yml"), "-d", str(folder)]
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", *config]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_every_page_and_the_public_names(site):
    for page in DOCS.glob("*.md"):
        assert (site / page.name).with_suffix(".html").is_file()
    python = text(site / "api.html")
    for name in ("profile", "patch", "unpatch", "explain", "Plan"):
        assert f'id="hfsparse.{name}"' in python


def test_the_site_asks_no_other_host_for_what_it_shows(site):
    fetched = re.compile(r'<(?:script|img)[^>]+src="https?:|<link[^>]+stylesheet[^>]+href="https?:')
    assert not [page for page in site.rglob("*.html") if fetched.search(text(page))]
