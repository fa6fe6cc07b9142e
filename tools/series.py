"""The patch series of a release: check it, work on it, export it.

Patches are never edited by hand. `tree` turns the series into a git repository with one
commit for each patch, `new` commits a change there with the header of a patch, and
`refresh` exports the commits back to patches/.
"""

from __future__ import annotations

import argparse
import dataclasses
import filecmp
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from releases import (
    ROOT,
    Release,
    ToolError,
    extract_source,
    git_environment,
    load_release,
    release_names,
    require,
    run,
    say,
    sha256_of,
)

FORMAT_PATCH = [
    "git",
    "-c",
    "diff.algorithm=myers",
    "format-patch",
    "--quiet",
    "--zero-commit",
    "--no-signature",
    "--full-index",
    "--no-numbered",
    "--no-renames",
]
TEMPLATE = """
# <subsystem>: <what the patch does>
#
# <why it is needed, and why this way>

Forwarded: no
Last-Update: {date}
"""


@dataclasses.dataclass(frozen=True)
class Patch:
    """A patch and what its header says.

    Attributes:
        subject: The first line of the message.
        forwarded: Where the patch stands with upstream.
        files: What it touches, as paths in upstream's tree.
    """

    path: Path
    subject: str
    forwarded: str
    files: tuple[str, ...]

    @property
    def sha256(self) -> str:
        return sha256_of(self.path)


def read_patch(path: Path) -> Patch:
    """Read a patch.

    Raises:
        ToolError: If its header lacks something.
    """
    header, _, diff = path.read_text().partition("\ndiff --git ")
    unfolded = re.sub(r"\n[ \t]+", " ", header)
    fields = {}
    for name in ("From", "Subject", "Forwarded", "Signed-off-by"):
        match = re.search(rf"^{name}: (.+)$", unfolded, re.MULTILINE)
        if match is None:
            raise ToolError(f"{path.name} has no `{name}:` in its header")
        fields[name] = match[1]
    return Patch(
        path,
        subject=re.sub(r"^\[PATCH[^]]*\] ", "", fields["Subject"]),
        forwarded=fields["Forwarded"],
        files=tuple(re.findall(r"^(?:diff --git )?a/(\S+) b/", "diff --git " + diff, re.MULTILINE)),
    )


def read_series(release: Release) -> list[Patch]:
    """Return the patches of a release in order.

    Raises:
        ToolError: If the series and the folder do not list the same patches.
    """
    series = release.patches / "series"
    if not series.exists():
        raise ToolError(f"there is no {series.relative_to(ROOT)}")
    lines = [line.strip() for line in series.read_text().splitlines()]
    names = [line for line in lines if line and not line.startswith("#")]
    on_disk = {path.name for path in release.patches.glob("*.patch")}
    for name in names:
        if name not in on_disk:
            raise ToolError(f"{name} is listed in {series.relative_to(ROOT)} but is not on disk")
        if names.count(name) > 1:
            raise ToolError(f"{name} is listed twice in {series.relative_to(ROOT)}")
    for name in sorted(on_disk.difference(names)):
        raise ToolError(f"{name} is on disk but is not listed in {series.relative_to(ROOT)}")
    return [read_patch(release.patches / name) for name in names]


def apply_patch(patch: Patch, tree: Path) -> None:
    """Apply a patch to a tree, with no fuzz and no offset.

    Raises:
        ToolError: If a hunk does not apply exactly where it says.
    """
    require("git")
    result = subprocess.run(
        ["git", "apply", "--verbose", "--whitespace=nowarn", str(patch.path.resolve())],
        cwd=tree,
        env=git_environment(isolated_below=tree.parent),
        capture_output=True,
        text=True,
    )
    output = result.stdout + result.stderr
    failed = re.search(r"^error: patch failed: (.+):(\d+)$", output, re.MULTILINE)
    if failed:
        raise ToolError(
            f"{patch.path.name} does not apply to {failed[1]}: "
            f"hunk {hunk_at(patch, failed[1], failed[2])}"
        )
    if result.returncode != 0:
        reason = re.search(r"^error: (.+)$", output, re.MULTILINE)
        raise ToolError(f"{patch.path.name} does not apply: {reason[1] if reason else output}")
    moved = re.search(r"^Hunk #(\d+) succeeded at (\d+) \(offset .+\)", output, re.MULTILINE)
    if moved:
        before = output[: moved.start()]
        checked = re.findall(r"^Checking patch (.+?)(?: => .+)?\.\.\.$", before, re.MULTILINE)
        raise ToolError(
            f"{patch.path.name} applies to {checked[-1] if checked else 'a file'} only with an "
            f"offset: hunk #{moved[1]}, found at line {moved[2]}"
        )


def hunk_at(patch: Patch, file: str, line: str) -> str:
    """Return the number and the header of the hunk of `file` that starts at `line`."""
    diff = patch.path.read_text().partition(f"\ndiff --git a/{file} b/{file}\n")[2]
    diff = diff.partition("\ndiff --git ")[0]
    for number, hunk in enumerate(re.findall(r"^@@ -\S+ \+\S+ @@", diff, re.MULTILINE), 1):
        if re.match(rf"@@ -{line}[, ]", hunk):
            return f"#{number}, {hunk}"
    return f"at line {line}"


def apply_series(release: Release, tree: Path) -> list[Patch]:
    """Apply the whole series to a pristine tree and return it."""
    patches = read_series(release)
    for patch in patches:
        apply_patch(patch, tree)
    say(f"applied {len(patches)} patches")
    return patches


def committer_environment(tree: Path) -> dict[str, str]:
    identity = {"NAME": "patch series", "EMAIL": "patches@localhost"}
    env = git_environment(isolated_below=tree.parent)
    for role in ("AUTHOR", "COMMITTER"):
        env |= {f"GIT_{role}_{key}": value for key, value in identity.items()}
    return env


def make_repository(tree: Path) -> None:
    """Turn a tree into a git repository with one commit, tagged `upstream`."""
    env = committer_environment(tree)
    env |= {f"GIT_{role}_DATE": "2000-01-01T00:00:00+0000" for role in ("AUTHOR", "COMMITTER")}
    for command in (
        ["init", "--quiet", "--initial-branch=main"],
        ["add", "--all", "--force"],
        ["commit", "--quiet", "--message=upstream"],
        ["tag", "upstream"],
    ):
        run(["git", *command], cwd=tree, env=env)


def make_tree(release: Release, tree: Path) -> None:
    """Make a repository of pristine upstream with the series committed on top."""
    extract_source(release, tree)
    make_repository(tree)
    env = committer_environment(tree)
    for patch in read_series(release):
        command = ["git", "am", "--quiet", "--committer-date-is-author-date"]
        run([*command, str(patch.path.resolve())], cwd=tree, env=env)


def export(tree: Path, target: Path) -> None:
    """Export the commits since `upstream` to patches and a series."""
    target.mkdir(parents=True, exist_ok=True)
    env = committer_environment(tree)
    run([*FORMAT_PATCH, f"--output-directory={target.resolve()}", "upstream..HEAD"], tree, env)
    names = sorted(path.name for path in target.glob("*.patch"))
    (target / "series").write_text("".join(f"{name}\n" for name in names))


def check(release: Release) -> None:
    """Prove that the series applies exactly, by every tool, and survives a round trip."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        extract_source(release, scratch / "applied")
        shutil.copytree(scratch / "applied", scratch / "quilt")
        patches = apply_series(release, scratch / "applied")
        check_quilt(release, scratch / "quilt")
        check_same_tree(scratch / "applied", scratch / "quilt", "quilt")

        make_tree(release, scratch / "am")
        check_same_tree(scratch / "applied", scratch / "am", "git am")
        export(scratch / "am", scratch / "exported")
        for path in [release.patches / "series", *(patch.path for patch in patches)]:
            exported = scratch / "exported" / path.name
            if not exported.exists() or exported.read_bytes() != path.read_bytes():
                raise ToolError(
                    f"{path.name} is not what an export gives: run `make patch-tree` and "
                    "`make patch-refresh`"
                )
    print(
        f"{release.name}: {len(patches)} patches apply to pristine upstream with no fuzz and no "
        "offset, alike by git apply, git am and quilt, and export to the same files"
    )


def check_quilt(release: Release, tree: Path) -> None:
    require("quilt")
    env = {**os.environ, "QUILT_PATCHES": str(release.patches.resolve()), "LC_ALL": "C"}
    output = run(["quilt", "--quiltrc=-", "push", "-a", "--fuzz=0"], cwd=tree, env=env)
    if "offset" in output:
        raise ToolError(f"quilt applies the series of {release.name} only with an offset")


def check_same_tree(expected: Path, actual: Path, tool: str) -> None:
    def files(tree: Path) -> set[str]:
        found = (p.relative_to(tree) for p in tree.rglob("*") if p.is_file())
        return {str(p) for p in found if p.parts[0] not in (".git", ".pc")}

    names = files(expected)
    _, mismatch, errors = filecmp.cmpfiles(expected, actual, sorted(names), shallow=False)
    different = sorted({*mismatch, *errors} | (names ^ files(actual)))
    if different:
        raise ToolError(f"{tool} gives another {different[0]}")


def tree_of(release: Release) -> Path:
    return release.build / "tree"


def existing_tree(release: Release) -> Path:
    tree = tree_of(release)
    if not tree.exists():
        raise ToolError(f"there is no {tree.relative_to(ROOT)}: run `make patch-tree`")
    return tree


def start_tree(tree: Path, release: Release) -> Path:
    """Make the repository of a release next to `tree`, to be renamed to it when it is done.

    Raises:
        ToolError: If `tree` exists.
    """
    if tree.exists():
        raise ToolError(f"{tree.relative_to(ROOT)} exists: remove it to start again")
    unfinished = tree.with_name("tree.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    make_tree(release, unfinished)
    return unfinished


def command_tree(release: Release) -> None:
    tree = tree_of(release)
    start_tree(tree, release).rename(tree)
    print(f"{tree.relative_to(ROOT)}: edit and commit there, then run `make patch-refresh`")


def command_new(release: Release) -> None:
    import datetime

    tree = existing_tree(release)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as template:
        template.write(TEMPLATE.format(date=datetime.date.today()))
        template.flush()
        subprocess.run(["git", "add", "--all"], cwd=tree, check=True)
        command = ["git", "commit", "--signoff", f"--template={template.name}"]
        if subprocess.run(command, cwd=tree).returncode != 0:
            raise ToolError("git made no commit")


def command_refresh(release: Release) -> None:
    tree = existing_tree(release)
    if run(["git", "status", "--porcelain"], cwd=tree, env=committer_environment(tree)):
        raise ToolError(f"{tree.relative_to(ROOT)} has changes that are not committed")
    with tempfile.TemporaryDirectory(dir=release.patches.parent) as folder:
        exported = Path(folder) / release.name
        export(tree, exported)
        count = len([read_patch(path) for path in exported.glob("*.patch")])
        shutil.rmtree(release.patches)
        exported.rename(release.patches)
    print(f"{release.patches.relative_to(ROOT)}: {count} patches")


COMMANDS = {
    "check": (check, "prove that the series applies exactly and exports to the same files"),
    "tree": (command_tree, "make a git repository of the patched source to work in"),
    "new": (command_new, "commit the changes in that repository as a new patch"),
    "refresh": (command_refresh, "export the commits of that repository to patches/"),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--release", help="of pins.toml, or `all` (default: its default)")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (_, text) in COMMANDS.items():
        subparsers.add_parser(name, help=text, description=text)
    args = parser.parse_args()
    try:
        for name in release_names() if args.release == "all" else [args.release]:
            COMMANDS[args.command][0](load_release(name))
    except ToolError as e:
        print(f"series: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
