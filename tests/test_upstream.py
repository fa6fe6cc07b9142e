"""The pull requests apply to upstream's tree one after the other, and their tests can fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from testbed.release import UPSTREAM
from tools import pull_requests
from tools.common import run
from tools.releases import extract_source, load_release
from tools.series import committer_environment, make_repository, make_tree, read_series

pytestmark = pytest.mark.skipif(
    UPSTREAM != pull_requests.BASE, reason=f"pull requests are for {pull_requests.BASE}"
)
NAMES = [folder.name for folder in pull_requests.folders()]


def git(tree: Path, *arguments: str) -> str:
    return run(["git", *arguments], tree, committer_environment(tree))


def run_unit_tests(test: Path, tree: Path) -> subprocess.CompletedProcess[str]:
    """Run a file of tests, whose path is relative to the tree."""
    env = {**os.environ, "PYTHONPATH": str(tree / "python"), "SGLANG_USE_CPU_ENGINE": "1"}
    return subprocess.run(
        [sys.executable, str(tree / test)], env=env, cwd=tree, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("upstream")
    pull_requests.write_pull_requests(load_release(pull_requests.BASE), target)
    return target


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Upstream's tree, with the lines of the documentation that the patches are next to."""
    tree = tmp_path_factory.mktemp("tree") / "sglang"
    extract_source(load_release(pull_requests.BASE), tree)
    first = pull_requests.PULL_REQUESTS / "2-token-ids" / "docs.diff"
    lines = first.read_text().splitlines()
    [page] = [line.removeprefix("--- a/") for line in lines if line.startswith("--- ")]
    (tree / page).parent.mkdir(parents=True)
    context = [line[1:] for line in lines if line.startswith(" ")]
    (tree / page).write_text("\n".join(["Another line."] * 9 + context) + "\n")
    make_repository(tree)
    return tree


# In the order of the stack: each is applied to what the one before it left.
@pytest.mark.parametrize("name", NAMES)
def test_applies_and_its_tests_notice(name: str, written: Path, tree: Path, tmp_path: Path) -> None:
    before = tmp_path / "before"
    git(tree, "worktree", "add", "--quiet", "--detach", str(before))
    files = pull_requests.PULL_REQUESTS / name / "files"
    shutil.copytree(files, before, dirs_exist_ok=True)
    git(tree, "am", "--quiet", str(written / f"{name}.mbox"))
    tests = [path.relative_to(files) for path in files.glob("test/registered/**/test_*.py")]
    assert tests
    for test in tests:
        with ThreadPoolExecutor(2) as pool:
            without, result = pool.map(partial(run_unit_tests, test), (before, tree))
        assert "Ran " in without.stderr and without.returncode, without.stdout + without.stderr
        assert result.returncode == 0, result.stdout + result.stderr
    git(tree, "clean", "--quiet", "--force", "-d", "-x")

    messages = git(tree, "log", "--format=%B", "upstream..HEAD")
    assert "Signed-off-by:" in messages
    assert not re.search(r"^(?:Forwarded|Prepared|Last-Update):", messages, re.MULTILINE)
    assert (written / f"{name}.md").read_text().startswith("# [")


def test_the_stack_ends_where_the_series_does(tree: Path, tmp_path: Path) -> None:
    """What is proposed is what is proved, with the fix that the wheel does not need on top."""
    release = load_release(pull_requests.BASE)
    series = read_series(release)
    proposed = [
        (path, f"upstream/{folder.name}")
        for folder in pull_requests.folders()[1:]
        for path in pull_requests.patches_of(folder)
    ]
    assert proposed == [(patch.path, patch.prepared) for patch in series if patch.prepared]
    # They come first, so what others change on top of them does not matter.
    assert proposed == [(patch.path, patch.prepared) for patch in series[: len(proposed)]]
    make_tree(release, tmp_path / "series")
    git(tmp_path / "series", "checkout", "--quiet", f"HEAD~{len(series) - len(proposed)}")
    [fix] = (pull_requests.PULL_REQUESTS / "1-logprobs").glob("*.patch")
    git(tree, "apply", "--reverse", str(fix))
    files = {file for patch in series if patch.prepared for file in patch.files}
    assert len(files) >= 9
    for file in files:
        assert (tree / file).read_bytes() == (tmp_path / "series" / file).read_bytes(), file
