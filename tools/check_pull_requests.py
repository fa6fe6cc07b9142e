"""Prove the pull requests to upstream on its pristine tree: `pull-requests --check`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.common import BUILD, ToolError, say
from tools.environment import make_environment
from tools.pull_requests import base_of, folders, git, tests_of
from tools.releases import Release, extract_source
from tools.series import make_repository

# The hooks for Python of upstream's pre-commit at v0.5.23, which no wheel has. Ruff is in the
# place of black and isort there since its pull request 37210.
PACKAGES = ["ruff==0.15.1", "codespell==2.4.1"]
RUFF = ["ruff", "check", "--isolated", "--no-cache", "--quiet", "--output-format=concise"]
HOOKS = [
    [*RUFF, "--target-version=py310", "--select=F401,F821"],
    [*RUFF, "--select=I", "--config=lint.isort.known-first-party=['sglang']"],
    ["ruff", "format", "--isolated", "--no-cache", "--check"],
    ["codespell"],
]
# Of pytest, for tests that are in no package.
IN_ONE_PROCESS = ["-q", "-c", os.devnull, "--rootdir=.", "-p", "no:cacheprovider"]
IN_ONE_PROCESS += ["--import-mode=importlib"]
# Tests that ran, or that import a module which the change adds: with it, they pass.
FAILS = re.compile(r"^Ran |^ModuleNotFoundError: No module named 'sglang\.", re.MULTILINE)


def make_pristine(release: Release, tree: Path) -> None:
    """Make a repository of upstream with the pages that pull requests change.

    Pages are not in the wheel: of each there are the lines that a change is next to.
    """
    extract_source(release, tree)
    for diff in (folder / "docs.diff" for folder in folders()):
        lines = diff.read_text().splitlines() if diff.exists() else []
        context = [line[1:] for line in lines if line.startswith(" ")]
        for page in [tree / line[len("--- a/") :] for line in lines if line.startswith("--- ")]:
            if not page.exists():
                page.parent.mkdir(parents=True)
                page.write_text("\n".join(["Another line."] * 9 + context) + "\n")
    make_repository(tree)


def run_python(args: list[str], tree: Path, python: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a tree, with the SGLang there."""
    env = {**os.environ, "PYTHONPATH": str(tree / "python"), "SGLANG_USE_CPU_ENGINE": "1"}
    return subprocess.run([python, *args], env=env, cwd=tree, capture_output=True, text=True)


def run_tests(test: Path, tree: Path, python: Path) -> subprocess.CompletedProcess[str]:
    """Run a file of unit tests as upstream does. Its path is relative to the tree."""
    return run_python([str(test)], tree, python)


def findings(hook: list[str], file: str, tree: Path) -> list[str]:
    """Return what a hook says of a file, without numbers of lines."""
    program = [str(BUILD / "lint-upstream" / "bin" / hook[0]), *hook[1:], file]
    result = subprocess.run(program, cwd=tree, capture_output=True, text=True)
    lines = result.stdout.splitlines() if result.returncode else []
    return [re.sub(r":\d+(?=:)", "", line) for line in lines]


def lint(before: Path, after: Path, files: list[str]) -> list[str]:
    """Return what the hooks find in the changed files and did not find before."""
    make_environment(BUILD / "lint-upstream", PACKAGES)
    found = []
    for file in (name for name in files if name.endswith(".py")):
        for hook in HOOKS:
            old = findings(hook, file, before) if (before / file).exists() else []
            found += [line for line in findings(hook, file, after) if line not in old]
    return found


def make_worktree(tree: Path, name: str, base: str) -> Path:
    """Check out a branch beside a repository, where it may have been checked out before.

    What Python has compiled there stays: importing SGLang takes twice as long without.
    """
    path = tree.with_name(name)
    if not path.exists():
        git(tree, "worktree", "add", "--quiet", "--no-checkout", "--detach", str(path))
    git(path, "checkout", "--quiet", "--force", "--detach", base)
    git(path, "clean", "--quiet", "--force", "-d", "--exclude=__pycache__")
    return path


def check_alone(folder: Path, written: Path, tree: Path, python: Path) -> None:
    """Apply a pull request to what it is for, and run its tests without and with it.

    Args:
        written: The folder of the mboxes.
        tree: A repository of upstream, in which the ones before have a branch each.
        python: Of an environment with all that SGLang imports.

    Raises:
        ToolError: If it does not apply, if a file of tests passes without it or fails with it,
            or if one of upstream's hooks finds something.
    """
    base = base_of(folder)
    before, after = (make_worktree(tree, name, base) for name in ("before", "after"))
    git(after, "checkout", "--quiet", "-B", folder.name)
    try:
        git(after, "am", "--quiet", str(written / f"{folder.name}.mbox"))
    except ToolError:
        git(after, "am", "--abort")
        raise
    files = git(after, "diff", "--name-only", base).splitlines()
    if found := lint(before, after, files):
        raise ToolError(f"{folder.name}: upstream's hooks find {'; '.join(found[:3])}")
    shutil.copytree(folder / "files", before, dirs_exist_ok=True)
    for test in tests_of(folder):
        with ThreadPoolExecutor(2) as pool:
            without, result = pool.map(run_tests, [test] * 2, [before, after], [python] * 2)
        if not without.returncode or not FAILS.search(without.stderr):
            raise ToolError(f"{folder.name}: {test.name} does not fail without the change")
        if result.returncode:
            raise ToolError(f"{folder.name}: {test.name} fails:\n{result.stderr}")


def check_in_order(written: Path, tree: Path, python: Path) -> None:
    """Apply all to each other in order, and run all of their tests at the end.

    Raises:
        ToolError: If one does not apply, or a file of tests fails.
    """
    for folder in folders():
        git(tree, "am", "--quiet", str(written / f"{folder.name}.mbox"))
    tests = [test for folder in folders() for test in tests_of(folder)]
    # In one process, which imports SGLang once.
    result = run_python(["-m", "pytest", *IN_ONE_PROCESS, *map(str, tests)], tree, python)
    if result.returncode:
        raise ToolError(f"all in order: tests fail:\n{result.stdout}")


def check(release: Release, written: Path, python: Path, names: Collection[str] = ()) -> None:
    """Prove each pull request alone, and then all in order.

    Args:
        names: Only those, without the order.

    Raises:
        ToolError: If one does not hold.
    """
    if not python.exists():
        raise ToolError(f"there is no {python}: run `make environment UPSTREAM={release.name}`")
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        make_pristine(release, tree)
        for folder in folders():
            if not names or folder.name in names:
                check_alone(folder, written, tree, python)
                say(f"{folder.name}: applies, and its tests fail without it and pass with it")
            else:
                git(tree, "checkout", "--quiet", "-B", folder.name, base_of(folder))
                git(tree, "am", "--quiet", str(written / f"{folder.name}.mbox"))
        if not names:
            git(tree, "checkout", "--quiet", "main")
            check_in_order(written, tree, python)
            say("all of them apply in order, and all tests pass")
