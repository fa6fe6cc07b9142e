"""The pull requests apply to upstream's tree, alone and in order, and their tests can fail."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from testbed import parser_answers
from testbed.release import UPSTREAM
from tools import check_pull_requests, pull_requests
from tools.common import ToolError
from tools.pull_requests import git
from tools.releases import load_release
from tools.series import make_tree, read_series

pytestmark = pytest.mark.skipif(
    UPSTREAM != pull_requests.BASE, reason=f"pull requests are for {pull_requests.BASE}"
)
NAMES = [folder.name for folder in pull_requests.folders()]
PYTHON = Path(sys.executable)
# Of what our series has none: it keeps what stock sends.
OURS = ["2-token-ids", "3-token-ids-default"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("upstream")
    pull_requests.write_pull_requests(load_release(pull_requests.BASE), target)
    return target


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Upstream's tree, in which each pull request that was checked has a branch."""
    tree = tmp_path_factory.mktemp("tree") / "sglang"
    check_pull_requests.make_pristine(load_release(pull_requests.BASE), tree)
    return tree


# In the order of the series: one that needs another finds its branch.
@pytest.mark.parametrize("name", NAMES)
def test_applies_and_its_tests_notice(name: str, written: Path, tree: Path) -> None:
    folder = pull_requests.PULL_REQUESTS / name
    check_pull_requests.check_alone(folder, written, tree, PYTHON)
    messages = git(tree, "log", "--format=%B", f"upstream..{name}")
    assert "Signed-off-by:" in messages
    assert not re.search(r"^(?:Forwarded|Prepared|Last-Update):", messages, re.MULTILINE)
    assert (written / f"{name}.md").read_text().startswith("# [")


def test_all_apply_in_order(written: Path, tree: Path) -> None:
    check_pull_requests.check_in_order(written, tree, PYTHON)


def test_the_table_of_parsers_is_what_is_measured() -> None:
    assert parser_answers.table() == parser_answers.TARGET.read_text()


def test_the_stack_ends_where_the_series_does(written: Path, tree: Path, tmp_path: Path) -> None:
    """What is proposed is what is proved, with the fix that the wheel does not need below."""
    release = load_release(pull_requests.BASE)
    series = read_series(release)
    proposed = [
        (path, f"upstream/{name}")
        for name in OURS
        for path in pull_requests.patches_of(pull_requests.PULL_REQUESTS / name)
    ]
    assert proposed == [(patch.path, patch.prepared) for patch in series if patch.prepared]
    # They come first, so what others change on top of them does not matter.
    assert proposed == [(patch.path, patch.prepared) for patch in series[: len(proposed)]]
    make_tree(release, tmp_path / "series")
    git(tmp_path / "series", "checkout", "--quiet", f"HEAD~{len(series) - len(proposed)}")
    stack = tmp_path / "stack"
    git(tree, "worktree", "add", "--quiet", "--detach", str(stack), "upstream")
    for name in ("streamed-logprobs", *OURS):
        git(stack, "am", "--quiet", str(written / f"{name}.mbox"))
    [fix] = (pull_requests.PULL_REQUESTS / "streamed-logprobs").glob("*.patch")
    git(stack, "apply", "--reverse", str(fix))
    files = {file for patch in series if patch.prepared for file in patch.files}
    assert len(files) >= 9
    for file in files:
        assert (stack / file).read_bytes() == (tmp_path / "series" / file).read_bytes(), file


TEST = """
import unittest

class Test(unittest.TestCase):
    def test(self):
        import sglang.version
        self.assertEqual(getattr(sglang.version, "fixed", 0), {expected})

unittest.main()
"""
MAIL = """From: A <a@b>
Subject: [PATCH] version: fix it
Date: Sat, 21 Nov 2026 10:55:21 +0000

---
diff --git a/python/sglang/new.py b/python/sglang/new.py
new file mode 100644
--- /dev/null
+++ b/python/sglang/new.py
@@ -0,0 +1 @@
+{line}
"""


@pytest.mark.parametrize(
    ("expected", "line", "message"),
    [
        (0, "fixed = 1", "test_it.py does not fail without the change"),
        (1, "fixed = 1", "test_it.py fails:"),
        (1, "import  os", "Would reformat"),
        (1, "import os", "F401"),
        (1, "# teh", "teh ==> the"),
    ],
)
def test_what_does_not_hold_is_said(
    expected: int, line: str, message: str, tree: Path, tmp_path: Path
) -> None:
    """A test that passes without the change or fails with it, and what upstream's hooks find."""
    folder = tmp_path / "change"
    test = folder / "files" / "test" / "registered" / "test_it.py"
    test.parent.mkdir(parents=True)
    test.write_text(TEST.format(expected=expected))
    (tmp_path / "change.mbox").write_text(MAIL.format(line=line))
    with pytest.raises(ToolError, match=re.escape(message)):
        check_pull_requests.check_alone(folder, tmp_path, tree, PYTHON)
