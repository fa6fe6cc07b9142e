"""The patches as pull requests to upstream: one mbox each, and its text.

upstream/series lists the folders of upstream/ in the order in which they are sent. Each is a
pull request on the pristine release, or on the one that it needs:

    pull-request.md   its title and text, in upstream's form
    series            its patches, which are beside it or in patches/
    needs             the pull request that has to be merged before, if one has to
    files/            tests in upstream's layout, which no wheel has
    tests.diff        what it changes in the tests of an earlier one
    docs.diff         what it changes in upstream's documentation, which no wheel has

Tests and documentation make the last commit of the mbox. `--check` applies each alone and all in
order, runs their tests without and with the change, and lints what changes as upstream does.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from pathlib import Path

from tools.common import BUILD, PATCHES, ROOT, ToolError, run, say
from tools.environment import python_of
from tools.releases import Release, extract_source, load_release
from tools.series import FORMAT_PATCH, committer_environment, make_repository

# The newest release, the base of pull requests.
BASE = "v0.5.23"
PULL_REQUESTS = ROOT / "upstream"
HEADINGS = [
    "## Motivation",
    "## Modifications",
    "## Accuracy Tests",
    "## Speed Tests and Profiling",
    "## Checklist",
]
# What a series says of a patch, and upstream has no use for.
OWN_TRAILERS = re.compile(r"^(?:Forwarded|Prepared|Last-Update): .*\n", re.MULTILINE)


def folders() -> list[Path]:
    """Return the pull requests in the order in which they are sent.

    Raises:
        ToolError: If the series and the folders are not the same.
    """
    names = (PULL_REQUESTS / "series").read_text().split()
    found = {path.parent.name for path in PULL_REQUESTS.glob("*/pull-request.md")}
    if found != set(names):
        raise ToolError(f"upstream/series and its folders differ in {found ^ set(names)}")
    return [PULL_REQUESTS / name for name in names]


def base_of(folder: Path) -> str:
    """Return the branch that a pull request is for: that of another, or `upstream`."""
    needs = folder / "needs"
    return needs.read_text().strip() if needs.exists() else "upstream"


def read_text(folder: Path) -> tuple[str, str]:
    """Return the title and the text of a pull request.

    Raises:
        ToolError: If it does not have upstream's form.
    """
    text = (folder / "pull-request.md").read_text()
    title = re.match(r"# (.+)\n", text)
    headings = re.findall(r"^## .+$", text, re.MULTILINE)
    if title is None or headings != HEADINGS:
        raise ToolError(
            f"{folder.name}/pull-request.md needs a title (`# ...`) and the headings "
            + ", ".join(HEADINGS)
        )
    return title[1], text


def patches_of(folder: Path) -> list[Path]:
    """Return the patches of a pull request in order.

    Raises:
        ToolError: If one does not exist.
    """
    found = []
    for name in (folder / "series").read_text().split():
        candidates = [folder / name, PATCHES / name]
        path = next((path for path in candidates if path.exists()), None)
        if path is None:
            raise ToolError(f"{folder.name}/series lists {name}, which does not exist")
        found.append(path)
    return found


def tests_of(folder: Path) -> list[Path]:
    """Return the files of tests of a pull request, as paths in upstream's tree.

    Raises:
        ToolError: If it has none.
    """
    files = folder / "files"
    found = sorted(path.relative_to(files) for path in files.glob("test/registered/**/test_*.py"))
    if not found:
        raise ToolError(f"{folder.name}/files has no tests")
    return found


def git(tree: Path, *arguments: str) -> str:
    return run(["git", *arguments], tree, committer_environment(tree))


def commit_patch(patch: Path, tree: Path) -> None:
    mail = tree.with_name("patch.mbox")
    mail.write_text(OWN_TRAILERS.sub("", patch.read_text()))
    git(tree, "am", "--quiet", "--committer-date-is-author-date", str(mail))


def commit_files(folder: Path, title: str, tree: Path) -> None:
    """Commit the tests of a pull request with author and date of its last patch."""
    shutil.copytree(folder / "files", tree, dirs_exist_ok=True)
    env = committer_environment(tree)
    if (folder / "tests.diff").exists():
        run(["git", "apply", str(folder / "tests.diff")], tree, env)
    author, date = run(["git", "log", "-1", "--format=%an <%ae>%n%aI"], tree, env).splitlines()
    env |= {"GIT_COMMITTER_DATE": date}
    subject = re.sub(r"^\[.+?\] ", "", title)
    has_docs = (folder / "docs.diff").exists()
    what = "tests and documentation" if has_docs else "tests"
    message = f"{subject}: {what}\n\nSigned-off-by: {author}\n"
    run(["git", "add", "--all", "--force"], tree, env)
    command = ["git", "commit", "--quiet", f"--author={author}", f"--date={date}"]
    run([*command, f"--message={message}"], tree, env)


def write_mbox(folder: Path, start: str, tree: Path, target: Path) -> None:
    env = committer_environment(tree)
    mbox = run([*FORMAT_PATCH, "--stdout", "--no-stat", "--patch", f"{start}..HEAD"], tree, env)
    docs = folder / "docs.diff"
    if docs.exists():
        # The tree has no page for it to be committed to.
        before, first, after = mbox.rpartition("\nFrom 0000")
        head, diff, rest = after.partition("\ndiff --git ")
        mbox = before + first + head + "\n" + docs.read_text().rstrip("\n") + diff + rest
    target.write_text(mbox)


def write_pull_requests(release: Release, target: Path) -> None:
    """Write NAME.mbox and NAME.md for each pull request to `target`."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        extract_source(release, tree)
        make_repository(tree)
        for folder in folders():
            title, text = read_text(folder)
            start = git(tree, "rev-parse", base_of(folder)).strip()
            git(tree, "checkout", "--quiet", "-b", folder.name, start)
            for patch in patches_of(folder):
                commit_patch(patch, tree)
            commit_files(folder, title, tree)
            write_mbox(folder, start, tree, target / f"{folder.name}.mbox")
            (target / f"{folder.name}.md").write_text(text)
            count = git(tree, "rev-list", "--count", f"{start}..HEAD").strip()
            say(f"{folder.name}: {title} ({count} commits)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default=ROOT / "dist" / "upstream", help="default: dist/upstream"
    )
    parser.add_argument("--check", action="store_true", help="prove what was written")
    parser.add_argument(
        "--python",
        type=Path,
        default=python_of(BUILD / f"env-{BASE}"),
        help="for --check: has all that SGLang imports (default: of the tests' environment)",
    )
    parser.add_argument("names", nargs="*", help="for --check: only these, without the whole order")


def main(args: argparse.Namespace) -> int:
    release = load_release(BASE)
    write_pull_requests(release, args.output)
    if args.check:
        from tools.check_pull_requests import check

        check(release, args.output, args.python, args.names)
    print(f"{args.output}: apply them in order with `git am`")
    return 0
