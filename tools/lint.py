"""Lint what the patches put into SGLang: the files that they add and the lines that they change.

The series of each release is applied, and ruff, isort, black and codespell check it with
the settings that upstream has for its own code. mypy checks our files on their own, and that
what they take from upstream is there in each release; other types of upstream are not
reliable. Each finding names the patch, and the line in the patched file.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.common import ToolError, git_environment, run, say
from tools.releases import load_release, release_names
from tools.series import make_tree, read_series, releases_that_list

# Upstream pins isort 5, black 24 and ruff 0.11, and has no settings beside these.
RUFF = ["ruff", "check", "--isolated", "--no-cache", "--target-version=py310"]
RUFF += ["--select=F401,F821", "--output-format=json"]
BLACK = ["black", "--quiet", "-"]
ISORT = ["isort", "--profile=black", "--project=sglang", "-"]
CODESPELL = ["codespell_lib"]
MYPY = ["mypy", "--config-file=", "--cache-dir=/dev/null", "--output=json", "--no-error-summary"]
MYPY += ["--check-untyped-defs", "--namespace-packages", "--explicit-package-bases"]
MYPY += ["--python-version=3.10"]
# What mypy reports of names: wrong whatever the types of upstream are.
NAMES = {"attr-defined", "call-arg", "name-defined"}


@dataclasses.dataclass(frozen=True, order=True)
class Finding:
    """Something that a tool found.

    Attributes:
        file: As a path in the folder `python/` of the tree.
        line: The line in the patched file, counted from 1.
    """

    file: str
    line: int
    message: str


def output_of(command: list[str], cwd: Path, stdin: str | None = None) -> str:
    """Run a tool, which fails if it finds something, and return what it prints.

    Raises:
        ToolError: If the tool itself fails.
    """
    command = [sys.executable, "-m", *command]
    result = subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True)
    if result.returncode != 0 and not result.stdout:
        lines = result.stderr.strip().splitlines() or ["it says nothing"]
        raise ToolError(f"{command[2]} failed: {lines[-1]}")
    return result.stdout


def ruff(files: list[str], tree: Path) -> Iterator[Finding]:
    for found in json.loads(output_of([*RUFF, *files], tree)):
        file = str(Path(found["filename"]).relative_to(tree))
        yield Finding(file, found["location"]["row"], f"ruff: {found['code']} {found['message']}")


def formatter(command: list[str], files: list[str], tree: Path) -> Iterator[Finding]:
    """Run a tool that prints a file as it would write it, given it on standard input.

    Each line that it would replace, or would put something before, is a finding.
    """
    for file in files:
        text = (tree / file).read_text()
        old, new = text.splitlines(), output_of(command, tree, text).splitlines()
        matcher = difflib.SequenceMatcher(None, old, new)
        for kind, start, end, new_start, new_end in matcher.get_opcodes():
            wanted = " ".join(line.strip() for line in new[new_start:new_end])
            does = f"would write `{wanted}`" if wanted else "would not have this here"
            for line in range(start, max(end, start + 1)) if kind != "equal" else ():
                yield Finding(file, line + 1, f"{command[0]}: {does}")


def codespell(files: list[str], tree: Path) -> Iterator[Finding]:
    for line in output_of([*CODESPELL, *files], tree).splitlines():
        file, number, message = line.split(":", 2)
        yield Finding(str(Path(file)), int(number), f"codespell:{message}")


def mypy(options: list[str], files: list[str], tree: Path) -> Iterator[tuple[str, Finding]]:
    """Run mypy, and return its findings with their codes."""
    for line in output_of([*MYPY, *options, *files], tree).splitlines():
        found = json.loads(line)
        if found["severity"] == "error":
            message = f"mypy: {found['message']} [{found['code']}]"
            yield found["code"], Finding(found["file"], found["line"], message)


def mypy_alone(files: list[str], tree: Path) -> Iterator[Finding]:
    """Check our files with every type of upstream taken for Any."""
    options = ["--follow-imports=skip", "--ignore-missing-imports"]
    yield from (finding for _, finding in mypy(options, files, tree))


def mypy_names(files: list[str], tree: Path) -> Iterator[Finding]:
    """Check that the modules, attributes and parameters that are used are there."""
    for code, finding in mypy(["--follow-imports=silent"], files, tree):
        missing = code.startswith("import") and re.search(r'"sglang[."]', finding.message)
        if code in NAMES or missing:
            yield finding


def patches_by_line(tree: Path, names: dict[str, str], file: str) -> dict[int, str]:
    """Return the patch that wrote each line of a file, for those that are not upstream's.

    Args:
        names: The patch of each commit of the tree.
    """
    env = git_environment(isolated_below=tree.parent)
    command = ["git", "blame", "--porcelain", "upstream..HEAD", "--", f"python/{file}"]
    blamed = re.findall(r"^([0-9a-f]{40}) \d+ (\d+)", run(command, tree, env), re.MULTILINE)
    return {int(line): names[commit] for commit, line in blamed if commit in names}


def lint(name: str, owned: set[str]) -> list[tuple[str, Finding]]:
    """Lint the series of a release, and return the patches at fault with what was found.

    Args:
        owned: The patches of common/ that are to be checked on their own with this release.
    """
    release = load_release(name)
    series = read_series(release)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "tree"
        make_tree(release, tree)
        env = git_environment(isolated_below=tree.parent)
        commits = run(["git", "rev-list", "--reverse", "upstream..HEAD"], tree, env).split()
        names = {commit: patch.name for commit, patch in zip(commits, series)}
        added = {f.removeprefix("python/"): p.name for p in series for f in p.added}
        changed = {f.removeprefix("python/") for p in series for f in p.changed}
        mine = sorted(file for file, patch in added.items() if patch in owned)
        python = [f for f in [*mine, *sorted(changed)] if f.endswith(".py")]
        lines = {file: patches_by_line(tree, names, file) for file in [*added, *changed]}
        root = tree / "python"
        findings = [*ruff(python, root), *codespell([*mine, *sorted(changed)], root)]
        findings += [*formatter(BLACK, python, root), *formatter(ISORT, python, root)]
        if mine:
            findings += mypy_alone([f for f in mine if f.endswith(".py")], root)
        findings += mypy_names([f for f in [*added, *sorted(changed)] if f.endswith(".py")], root)
    say(f"{name}: {len(series)} patches linted")
    return [(lines[f.file][f.line], f) for f in findings if f.line in lines.get(f.file, {})]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--release", help="of pins.toml (default: all)")


def main(args: argparse.Namespace) -> int:
    names = [load_release(args.release).name] if args.release else release_names()
    # A file of ours is the same in all releases.
    owned: dict[str, set[str]] = {name: set() for name in names}
    for patch, releases in releases_that_list().items():
        first = next((name for name in names if name in releases), None)
        if first is not None:
            owned[first].add(patch)
    found: dict[tuple[str, str, str], list[tuple[int, str]]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, faults in zip(names, pool.map(lint, names, owned.values())):
            for patch, finding in faults:
                key = (patch, finding.file, finding.message)
                found.setdefault(key, []).append((finding.line, name))
    for (patch, file, message), places in sorted(found.items()):
        line, _ = places[0]
        where = ", ".join(dict.fromkeys(name for _, name in places))
        print(f"{patch}: {file}:{line}: {message} ({where})")
    return 1 if found else 0
