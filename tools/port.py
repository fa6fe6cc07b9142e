"""Start the series of a new release from that of another.

Pins the new release if it is not pinned, and makes build/<release>/tree: a git repository
of the new source in which the patches of the other release are picked one by one, as
three-way merges. Those that add files of ours always apply. Where another conflicts, git
stops with markers in the files that clash: resolve them, `git cherry-pick --continue`,
and `make patch-refresh UPSTREAM=<release>`.
"""

from __future__ import annotations

import argparse
import re
import subprocess

from tools import pins
from tools.common import ROOT, ToolError, run
from tools.releases import Release, extract_source, load_release, release_names
from tools.series import committer_environment, start_tree, tree_of


def port(source: Release, target: Release) -> int:
    """Make the tree of `target` and pick the patches of `source`.

    Returns:
        How many patches are left to pick, the one that conflicts included.
    """
    tree = tree_of(target)
    unfinished = start_tree(tree, source)
    env = committer_environment(unfinished)

    def git(*args: str) -> str:
        return run(["git", *args], cwd=unfinished, env=env)

    patches = git("rev-list", "--reverse", "upstream..HEAD").split()
    git("checkout", "--quiet", "--orphan", "port")
    git("rm", "--quiet", "-r", "--force", ".")
    extract_source(target, unfinished / "source.part")
    (unfinished / "source.part" / "python").rename(unfinished / "python")
    (unfinished / "source.part").rmdir()
    git("add", "--all", "--force")
    date = "--date=2000-01-01T00:00:00+0000"
    git("commit", "--quiet", "--message=upstream", date)
    git("tag", "--force", "upstream")
    git("branch", "--quiet", "--force", "--move", "main")
    unfinished.rename(tree)
    picked = subprocess.run(
        ["git", "-c", "merge.conflictStyle=diff3", "cherry-pick", *patches],
        cwd=tree,
        env=env,
        capture_output=True,
        text=True,
    )
    if picked.returncode == 0:
        return 0
    done = int(run(["git", "rev-list", "--count", "upstream..HEAD"], cwd=tree, env=env))
    return len(patches) - done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="source", metavar="RELEASE")
    parser.add_argument("--to", dest="target", metavar="RELEASE")


def main(args: argparse.Namespace) -> int:
    names = ", ".join(release_names())
    if args.source is None:
        raise ToolError(f"FROM (--from) names the release to port from: {names}")
    if args.target is None or not re.fullmatch(r"v\d+\.\d+\.\d+(\.post\d+)?", args.target):
        raise ToolError(
            f"TO (--to) names the release to port to by its tag, as in v0.5.24 or "
            f"v0.5.24.post1, not {args.target or 'nothing'}; pinned are {names}"
        )
    source = load_release(args.source)
    if args.target not in release_names():
        pins.add(args.target)
    target = load_release(args.target)
    left = port(source, target)
    tree = tree_of(target)
    name = tree.relative_to(ROOT)
    if not left:
        print(f"{name}: every patch applies; run `make patch-refresh UPSTREAM={target.name}`")
        return 0
    status = run(["git", "status", "--short"], cwd=tree, env=committer_environment(tree))
    clashes = [line[3:] for line in status.splitlines() if line[:2] in ("UU", "AA", "DU", "UD")]
    print(f"{name}: {left} patches left; the first of them conflicts in")
    print("".join(f"  {path}\n" for path in clashes), end="")
    print(
        "Resolve the conflicts there, `git add` the files, `git cherry-pick --continue`, and in "
        f"the end `make patch-refresh UPSTREAM={target.name}`"
    )
    return 0
