"""Links between the repository's pages lead somewhere, and what the pages show is what there is."""

from __future__ import annotations

import itertools
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from checkout import ROOT
from snakemake_logger_plugin_atlas import misplaced

PAGES = [
    path
    for pattern in ("*.md", "benchmarks/*.md", "config/*.md", "docs/**/*.md")
    for path in sorted(ROOT.glob(pattern))
]


def _tokens(page: Path) -> list[Token]:
    return MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))


def _links(page: Path) -> list[str]:
    inline = (child for token in _tokens(page) for child in token.children or ())
    targets = (token.attrs.get("href") or token.attrs.get("src") for token in inline)
    return [str(target) for target in targets if target and "://" not in str(target)]


def _anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    tokens = _tokens(page)
    titles = [
        "".join(child.content for child in following.children or ())
        for token, following in itertools.pairwise(tokens)
        if token.type == "heading_open"
    ]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _dead(page: Path) -> list[str]:
    dead = []
    for link in _links(page):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert _dead(page) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A title: here\n[a](page.md) [b](#a-title-here) [c](https://example.org)\n"
        "![d](missing.png) [e](#elsewhere) [f](page.md#nowhere)\n"
    )
    assert _dead(page) == ["missing.png", "#elsewhere", "page.md#nowhere"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_yaml_blocks_are_yaml(page: Path) -> None:
    for token in _tokens(page):
        if token.type == "fence" and token.info == "yaml":
            yaml.safe_load(token.content)


def commands(page: Path) -> list[list[str]]:
    """Lines of a page's blocks of commands that start Snakemake, as words."""
    blocks = (one.content for one in _tokens(page) if one.type == "fence" and one.info == "bash")
    lines = (line for block in blocks for line in block.replace("\\\n", " ").splitlines())
    words = (shlex.split(line, comments=True) for line in lines if "snakemake" in line)
    return [one for one in words if "snakemake" in one]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_target_is_given_for_a_configuration(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command of a page runs as it is written: `mine.yaml` is the reader's."""
    monkeypatch.chdir(ROOT)
    said = [misplaced(words) for words in commands(page)]
    assert [one for one in said if one and "mine.yaml: no such file" not in one] == []


def test_the_map_shows_all_rooms_in_the_order_of_imports() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = page.partition("## Map")[2].split("```")[1].splitlines()
    inside = [line.split() for line in lines if line.startswith("  ")]
    shown = [
        word.rstrip("/,")
        for words in inside
        for word in itertools.takewhile(lambda word: word.endswith(("/", "/,")), words)
    ]
    with (ROOT / "pyproject.toml").open("rb") as file:
        contract = tomllib.load(file)["tool"]["importlinter"]["contracts"][0]
    package = ROOT / "src/sparsity_atlas"
    rooms = [layer for layer in reversed(contract["layers"]) if (package / layer).is_dir()]
    assert shown == rooms
    outside = [line.split("  ")[0] for line in lines if line and not line.startswith(" ")]
    names = [name for line in outside for name in line.split(", ")]
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_what_contributing_says_of_additions_is_there() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| a")]
    named = {path for row in rows for path in re.findall(r"`([\w/.]+)`", row)}
    places = (ROOT, ROOT / "src/sparsity_atlas")
    assert len(rows) >= 9
    assert [one for one in named if not any((place / one).exists() for place in places)] == []


def test_the_criterion_of_contributing_is_the_file_that_it_names() -> None:
    """But for its docstrings of one line."""
    tokens = _tokens(ROOT / "CONTRIBUTING.md")
    shown = [
        token.content for token in tokens if token.type == "fence" and "MeanShare" in token.content
    ]
    file = (ROOT / "docs/criteria/mean_share.py").read_text(encoding="utf-8")
    assert [_code(text) for text in shown] == [_code(file)]


def _code(text: str) -> str:
    return re.sub(r'^ *""".*"""$', "", text, flags=re.MULTILINE).replace("\n", "").strip()
