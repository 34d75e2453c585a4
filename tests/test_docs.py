"""What the pages point at is there: files, headings, results, and the flags of commands."""

from __future__ import annotations

import re
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

import vllm_toptheta
from vllm_toptheta.cli.main import app

ROOT = Path(vllm_toptheta.__file__).parents[1]
TRACKED = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
FILES = [ROOT / name for name in TRACKED.split("\0") if name]
PAGES = [file for file in FILES if file.suffix == ".md"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"#{1,6} (.+)")


def prose(page: Path) -> list[str]:
    """The lines of a page that are no code."""
    lines, fenced = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            lines.append(line)
    return lines


def links(page: Path) -> list[str]:
    # what stands between backticks is code, not a link
    return LINK.findall(re.sub(r"`[^`\n]*`", "", "\n".join(prose(page))))


@cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    found: dict[str, int] = {}
    for line in prose(page):
        if heading := HEADING.fullmatch(line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1].strip().lower())
            slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            found[slug] = found.get(slug, -1) + 1
    return {slug if number == 0 else f"{slug}-{number}" for slug, most in found.items() for number in range(most + 1)}


def broken(page: Path) -> list[str]:
    wrong = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        is_there = target in (page, *FILES) or (target.is_dir() and any(file.is_relative_to(target) for file in FILES))
        if not is_there or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_tracked_files_and_their_headings(page: Path) -> None:
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b` c: d\n\n## Two\n\n## Two\n\n[ok](#a-b-c-d) [ok](#two-1) [no](#two-2) [no](none.md) `[code](none.md)`\n"
        "```\n# no heading\n[code](none.md)\n```\n    [code](none.md)\n[no](#no-heading) [far](https://example.org/x)\n"
    )
    assert broken(page) == ["#two-2", "none.md", "#no-heading"]


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs/README.md"
    listed = {(index.parent / link.partition("#")[0]).resolve() for link in links(index)}
    assert {page for page in PAGES if page.parent == index.parent} - {index} <= listed


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=lambda page: page.name)
def test_results_are_there(page: Path) -> None:
    for name in re.findall(r"`(?:docs/)?(results/[^`\s]+)`", "\n".join(prose(page))):
        assert list((ROOT / "docs").glob(name)), name


def test_results_name_no_folder_of_a_machine() -> None:
    results = list((ROOT / "docs/results").glob("*.json*"))
    assert results
    assert [file.name for file in results if re.search(r'"/\w+/', file.read_text(encoding="utf-8"))] == []


def test_what_the_sources_say_of_a_page_names_one() -> None:
    named = {
        name
        for file in FILES
        if file.suffix in {".py", ".yaml", ".json", ".cpu", ".gpu"} and ROOT / "docs/results" not in file.parents
        for name in re.findall(r"\bdocs/[\w-]+\.md\b", file.read_text(encoding="utf-8"))
    }
    assert named
    assert {name for name in named if not (ROOT / name).is_file()} == set()


def test_the_files_that_contributors_are_sent_to_are_there() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = contributing.partition("## Where do I change")[2].partition("\n## ")[0]
    names = {name for name in re.findall(r"`([\w./]+)`", table) if "/" in name or name.endswith((".py", ".toml"))}
    assert len(names) > 20
    # a name without a folder is beside the one before it
    known = {file.name for file in FILES}
    places = (ROOT, ROOT / "vllm_toptheta")
    assert {
        name
        for name in names
        if not any((place / name).exists() for place in places) and not ("/" not in name and name in known)
    } == set()


def test_figures_of_the_first_screen_are_in_the_pages() -> None:
    first_screen = README.partition("## ")[0].partition("<details>")[0]
    figures = set(re.findall(r"\d+\.\d+", first_screen.partition("**What it gives.**")[2]))
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.parent.name == "docs")
    assert len(figures) > 15
    assert {figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", pages)} == set()


def test_the_readme_begins_with_make_serve_and_make_test() -> None:
    """Tools that look for a command take the first ones."""
    lines = re.findall(r"^ +(make [a-z-]+)", README, re.M)
    assert lines[:2] == ["make serve", "make test"]


def commands(page: Path) -> list[list[str]]:
    """The words of the commands `toptheta ...` that a page shows, as a shell would read them."""
    code, fenced = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            code.append(line.strip())
    lines = "\n".join(code).replace("\\\n", " ").splitlines()
    # what stands in brackets may be left out; a variable, or another program before, says nothing of our flags
    found = [re.sub(r"[\[\]|]", " ", line.partition(" # ")[0]) for line in lines]
    found = [line[line.index("toptheta ") :] for line in found if re.match(r"([A-Z_0-9]+=\S+ )*toptheta ", line)]
    return [shlex.split(line.partition(" -- ")[0]) for line in found if line.count("'") % 2 == 0]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "lab.md"], ids=lambda page: page.name)
def test_commands_and_their_flags_exist(page: Path) -> None:
    """The lab's log keeps commands as they were."""
    for words in commands(page):
        command: Any = typer.main.get_command(app)
        rest = words[1:]
        while hasattr(command, "commands"):
            assert rest[0] in command.commands, words
            command = command.commands[rest.pop(0)]
        if command.name == "serve":  # flags of vLLM are passed on
            continue
        known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in rest if re.fullmatch("--[a-z-]+", word)} <= known, words


def test_commands_are_found() -> None:
    found = [" ".join(words[:3]) for page in PAGES for words in commands(page)]
    assert {"toptheta eval decode", "toptheta bench serving", "toptheta serve MODEL"} <= set(found)
    assert len(found) > 40
