"""What README.md and docs/ say can be followed: links, targets, options, tests, versions."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from testbed.release import PINS, ROOT, STOCK, UPSTREAM
from tools.compatibility import END, START
from tools.releases import load_release, release_names

pytestmark = pytest.mark.skipif(
    UPSTREAM != PINS["default"], reason="the documents are tested with the default release"
)
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
MAX_WORDS = 25
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def code_of(text: str) -> list[str]:
    """The commands: indented lines, and what is between backticks."""
    return [*re.findall(r"^ {4}(.*)$", text, re.MULTILINE), *re.findall(r"`([^`\n]+)`", text)]


def prose_of(text: str) -> str:
    """What is said in sentences: without headings, tables, pictures, code and comments."""
    lines = [
        "" if line.startswith(("#", "|", "!", "<!--", "    ")) else line
        for line in text.splitlines()
    ]
    return re.sub(r"\]\([^)]*\)", "]", "\n".join(lines))


@pages
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pages
def test_targets_of_make_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    for code in code_of(page.read_text()):
        for names in re.findall(r"(?:^|&& )make ((?:[a-z][a-z-]* ?)+)", code.split("#")[0]):
            assert set(names.split()) <= targets, code


@pages
def test_options_exist(page: Path) -> None:
    folders = ["patches", "tools", "tests", "bench", "testbed", "upstream"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files = [path for path in files if path.suffix in (".py", ".patch")]
    files.append(STOCK / "sglang" / "srt" / "server_args.py")
    known = "\n".join(path.read_text() for path in files)
    # Those of other programs, and of v0.5.23.
    others = {
        "--continue",
        "--exit-immediately",
        "--force-reinstall",
        "--worker",
        "--enable-response-store",
    }
    for code in code_of(page.read_text()):
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code.split("#")[0]):
            # Stock makes flags of fields.
            name = f"{option}|\\b{option[2:].replace('-', '_')}"
            assert option in others or re.search(rf"({name})(?![\w-])", known), option


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    prose = prose_of(text)
    for sentence in re.split(r"(?<=[.:?!])\s+|\n\n+", prose):
        assert len(sentence.split()) <= MAX_WORDS, sentence
    _, start, rest = text.partition(START)
    assert start and END in rest
    # A screen and a half.
    assert len(text.splitlines()) <= 120


def test_versions_are_those_of_the_pins() -> None:
    release = load_release(None)
    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"[\w.]+\+tokenids\.\d+", text)) == {release.local_version}


def test_the_changelog_begins_with_the_revision_of_every_release() -> None:
    first = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1]
    [number] = re.findall(r"\+tokenids\.(\d+)", first.splitlines()[0])
    for name in release_names():
        assert load_release(name).revision == int(number), name
        assert re.search(rf"\b{re.escape(name)}(?!\.?\w)", first), name


def clauses_of_tests() -> dict[str, set[str]]:
    """The clauses that each test names, by `file::test`."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "tests").glob("test_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                marks = [
                    call
                    for call in node.decorator_list
                    if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("mark.clause")
                ]
                names = {ast.literal_eval(arg) for call in marks for arg in call.args}
                found[f"{path.name}::{node.name}"] = names
    return found


def test_every_clause_names_tests_that_prove_it() -> None:
    tests = clauses_of_tests()
    sections = (ROOT / "docs" / "contract.md").read_text().split("\n### ")[1:]
    named_tests = re.compile(r"`(test_\w+\.py::\w+)`")
    clauses = {section.split()[0]: named_tests.findall(section) for section in sections}
    assert list(clauses) == [f"C{number}" for number in range(1, 13)]
    for clause, named in clauses.items():
        assert named and all(clause in tests[test] for test in named), clause


@pages
def test_tests_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(r"`(test_\w+\.py::\w+)`", page.read_text()))
    assert named <= set(clauses_of_tests())
