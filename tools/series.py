"""The patch series of a release: check it, work on it, export it.

patches/common/ has the patches that add files of ours, one source for all releases, and
patches/<release>/ those that change upstream's files. The series of a release lists both
in order. Patches are never edited by hand. `tree` turns the series into a git repository
with one commit for each patch, `new` commits a change there with the header of a patch,
and `refresh` exports the commits back to patches/, each to the folder where it belongs.
"""

from __future__ import annotations

import argparse
import dataclasses
import filecmp
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tools.common import PATCHES, ROOT, ToolError, git_environment, require, run, say, sha256_of
from tools.releases import Release, extract_source, load_release, release_names

COMMON = "common"
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
#
# Files that it adds are exported to common/, and changes of upstream's files to the folder
# of the release. Where a pull request is prepared goes on a line `Prepared: upstream/...`.

Forwarded: no
Last-Update: {date}
"""


@dataclasses.dataclass(frozen=True)
class Patch:
    """A patch and what its header says.

    Attributes:
        subject: The first line of the message.
        forwarded: Where the patch stands with upstream: "no", "not-needed" or an address.
        prepared: The folder of the pull request that has it, None if there is none.
        changed: Upstream's files that it changes, with the number of lines added and removed.
        added: Files that it adds, with the number of their lines.
    """

    path: Path
    subject: str
    forwarded: str
    prepared: str | None
    changed: dict[str, int]
    added: dict[str, int]

    @property
    def name(self) -> str:
        """The patch as a series lists it, e.g. "common/token-ids.patch"."""
        return name_of(self.path)

    @property
    def files(self) -> list[str]:
        """What the patch touches, as paths in upstream's tree."""
        return [*self.changed, *self.added]

    @property
    def sha256(self) -> str:
        return sha256_of(self.path)


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def slug_of(subject: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", subject.lower()).strip("-")


def read_patch(path: Path) -> Patch:
    """Read a patch.

    Raises:
        ToolError: If its header lacks something or it is no patch.
    """
    header = path.read_text().partition("\ndiff --git ")[0]
    unfolded = re.sub(r"\n[ \t]+", " ", header)
    fields = dict(re.findall(r"^([A-Z][A-Za-z-]+): (.+)$", unfolded, re.MULTILINE))
    for name in ("From", "Subject", "Forwarded", "Signed-off-by"):
        if name not in fields:
            raise ToolError(f"{name_of(path)} has no `{name}:` in its header")
    forwarded = fields["Forwarded"]
    if not re.fullmatch(r"no|not-needed|https?://\S+", forwarded):
        raise ToolError(
            f"{name_of(path)} says `Forwarded: {forwarded}`, which must be `no`, `not-needed` or "
            "the address where it was sent (https://...)"
        )
    changed, added = read_diff(path)
    return Patch(
        path,
        subject=re.sub(r"^\[PATCH[^]]*\] ", "", fields["Subject"]),
        forwarded=forwarded,
        prepared=fields.get("Prepared"),
        changed=changed,
        added=added,
    )


def read_diff(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Return the files that a patch changes and those that it adds, with its lines in each."""
    folder = path.parent.resolve()
    command = ["git", "apply", "--numstat", "--summary", str(path.resolve())]
    try:
        output = run(command, folder, git_environment(isolated_below=folder.parent))
    except ToolError as e:
        raise ToolError(f"{name_of(path)} is no patch: {e}") from None
    created = set(re.findall(r"^ create mode \d+ (.+)$", output, re.MULTILINE))
    changed: dict[str, int] = {}
    added: dict[str, int] = {}
    for plus, minus, file in re.findall(r"^(\d+|-)\t(\d+|-)\t(.+)$", output, re.MULTILINE):
        lines = 0 if "-" in (plus, minus) else int(plus) + int(minus)
        (added if file in created else changed)[file] = lines
    return changed, added


@dataclasses.dataclass(frozen=True)
class Hunk:
    """A hunk of a patch.

    Attributes:
        name: Its number in the file, and its header.
        line: Where it is in the release, counted from 1.
        lines: The lines that have to be there, its context and what it removes.
    """

    name: str
    line: int
    lines: list[str]


def hunks_of(patch: Patch, file: str) -> list[Hunk]:
    """Return the hunks of a file that a patch changes."""
    diff = patch.path.read_text().partition(f"\ndiff --git a/{file} b/{file}\n")[2]
    diff = diff.partition("\ndiff --git ")[0]
    _, *parts = re.split(r"^(@@ -(\d+)\S* \+\S+ @@).*\n", diff, flags=re.MULTILINE)
    return [
        Hunk(
            name=f"#{number}, {header}",
            line=int(line),
            lines=[line[1:] for line in body.splitlines() if line[:1] in (" ", "-")],
        )
        for number, (header, line, body) in enumerate(zip(parts[::3], parts[1::3], parts[2::3]), 1)
    ]


def listed_in(series: Path) -> list[str]:
    """Return the patches that a series lists, as paths relative to patches/."""
    lines = [line.strip() for line in series.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def releases_that_list() -> dict[str, list[str]]:
    """Return each patch that a series lists, with the releases whose series do."""
    releases: dict[str, list[str]] = {}
    for series in sorted(PATCHES.glob("*/series")):
        for name in listed_in(series):
            releases.setdefault(name, []).append(series.parent.name)
    return releases


def read_series(release: Release) -> list[Patch]:
    """Return the patches of a release in order.

    Raises:
        ToolError: If the series and the folders do not list the same patches.
    """
    series = release.patches / "series"
    if not series.exists():
        raise ToolError(f"there is no {series.relative_to(ROOT)}")
    names = listed_in(series)
    for name in names:
        where = f"listed in {series.relative_to(ROOT)}"
        if name.partition("/")[0] not in (COMMON, release.name) or name.count("/") != 1:
            raise ToolError(f"{name}, {where}, is neither in {COMMON}/ nor in {release.name}/")
        if not (PATCHES / name).exists():
            raise ToolError(f"{name} is {where} but is not on disk")
        if names.count(name) > 1:
            raise ToolError(f"{name} is listed twice in {series.relative_to(ROOT)}")
    for path in sorted(release.patches.iterdir()):
        if path != series and name_of(path) not in names:
            raise ToolError(
                f"{name_of(path)} is on disk but is not listed in {series.relative_to(ROOT)}"
            )
    known = releases_that_list()
    for path in sorted((PATCHES / COMMON).glob("*")):
        if name_of(path) not in known:
            raise ToolError(f"{name_of(path)} is on disk but is not listed in any series")
    return [read_patch(PATCHES / name) for name in names]


def sha256_of_series(patches: list[Patch]) -> str:
    """Return the hash of a series: of its patches in order, one behind the other."""
    return hashlib.sha256(b"".join(patch.path.read_bytes() for patch in patches)).hexdigest()


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
        file, line = failed[1], int(failed[2])
        at = [hunk.name for hunk in hunks_of(patch, file) if hunk.line == line]
        where = at[0] if at else f"at line {line}"
        raise ToolError(f"{patch.name} does not apply to {file}: hunk {where}")
    if result.returncode != 0:
        reason = re.search(r"^error: (.+)$", output, re.MULTILINE)
        raise ToolError(f"{patch.name} does not apply: {reason[1] if reason else output}")
    moved = re.search(r"^Hunk #(\d+) succeeded at (\d+) \(offset .+\)", output, re.MULTILINE)
    if moved:
        before = output[: moved.start()]
        checked = re.findall(r"^Checking patch (.+?)(?: => .+)?\.\.\.$", before, re.MULTILINE)
        raise ToolError(
            f"{patch.name} applies to {checked[-1] if checked else 'a file'} only with an "
            f"offset: hunk #{moved[1]}, found at line {moved[2]}"
        )


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


def export(release: Release, tree: Path, target: Path) -> list[str]:
    """Export the commits since `upstream` to patches and a series.

    What a commit adds goes to common/ and what it changes to the folder of the release; a
    commit that does both becomes two patches, the added files first.

    Args:
        target: A folder like patches/.

    Returns:
        The names of the patches in order.

    Raises:
        ToolError: If a commit changes what an earlier one has added, or two would be the
            same file.
    """
    env = committer_environment(tree)

    def git(*args: str) -> str:
        return run(["git", *args], tree, env)

    for folder in (COMMON, release.name):
        (target / folder).mkdir(parents=True)
    names: list[str] = []
    adders: dict[str, str] = {}
    for commit in git("rev-list", "--reverse", "upstream..HEAD").split():
        subject = git("log", "-1", "--format=%s", commit).strip()
        added, changed = files_of(tree, commit)
        for file in changed:
            if file in adders:
                raise ToolError(
                    f'"{subject}" changes {file}, which "{adders[file]}" adds: a file of ours is '
                    "added whole, by one commit"
                )
        if not added and not changed:
            raise ToolError(f'"{subject}" changes no file, or is a merge')
        adders |= dict.fromkeys(added, subject)
        for folder, files in ((COMMON, added), (release.name, changed)):
            if not files:
                continue
            name = f"{folder}/{slug_of(subject)}.patch"
            if name in names:
                raise ToolError(f'two commits would be {name}: give one of "{subject}" another')
            command = [*FORMAT_PATCH, "--stdout", "-1", commit, "--", *files]
            (target / name).write_text(run(command, tree, env))
            names.append(name)
    (target / release.name / "series").write_text("".join(f"{name}\n" for name in names))
    return names


def files_of(tree: Path, commit: str) -> tuple[list[str], list[str]]:
    """Return the files that a commit adds, and those that it changes or removes."""
    command = ["git", "diff-tree", "-r", "-z", "--no-renames", "--no-commit-id", "--name-status"]
    output = run([*command, commit], tree, committer_environment(tree)).split("\0")
    statuses = list(zip(output[::2], output[1::2]))
    added = [file for status, file in statuses if status == "A"]
    return added, [file for status, file in statuses if status != "A"]


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
        exported = scratch / "exported"
        export(release, scratch / "am", exported)
        for name in [f"{release.name}/series", *(patch.name for patch in patches)]:
            path = exported / name
            if not path.exists() or path.read_bytes() != (PATCHES / name).read_bytes():
                raise ToolError(
                    f"{name} is not what an export gives: run `make patch-tree` and "
                    "`make patch-refresh`"
                )
    print(
        f"{release.name}: {len(patches)} patches apply to pristine upstream with no fuzz and no "
        "offset, alike by git apply, git am and quilt, and export to the same files"
    )


def check_quilt(release: Release, tree: Path) -> None:
    require("quilt")
    env = {**os.environ, "QUILT_PATCHES": str(PATCHES), "LC_ALL": "C"}
    env["QUILT_SERIES"] = f"{release.name}/series"
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
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder)
        names = export(release, tree, exported)
        for name in names:
            read_patch(exported / name)
        update_common(release, exported / COMMON)
        shutil.rmtree(release.patches, ignore_errors=True)
        shutil.copytree(exported / release.name, release.patches)
    known = releases_that_list()
    for path in sorted((PATCHES / COMMON).glob("*.patch")):
        if name_of(path) not in known:
            path.unlink()
            print(f"{name_of(path)}: removed, as no series lists it any more")
    shared = sum(name.startswith(f"{COMMON}/") for name in names)
    print(f"{release.patches.relative_to(ROOT)}: {len(names)} patches, {shared} in {COMMON}/")


def update_common(release: Release, exported: Path) -> None:
    """Put what was exported to common/ there, and say which other releases share a change."""
    common = PATCHES / COMMON
    common.mkdir(parents=True, exist_ok=True)
    known = releases_that_list()
    for path in sorted(exported.iterdir()):
        old = common / path.name
        if old.exists() and old.read_bytes() != path.read_bytes():
            others = [name for name in known.get(name_of(path), []) if name != release.name]
            shared = f", for {', '.join(others)} too" if others else ""
            print(f"{name_of(path)}: changed{shared}")
        shutil.copyfile(path, old)


COMMANDS = {
    "check": (check, "prove that the series applies exactly and exports to the same files"),
    "tree": (command_tree, "make a git repository of the patched source to work in"),
    "new": (command_new, "commit the changes in that repository as a new patch"),
    "refresh": (command_refresh, "export the commits of that repository to patches/"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--release", help="of pins.toml, or `all` (default: its default)")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (_, text) in COMMANDS.items():
        subparsers.add_parser(name, help=text, description=text)


def main(args: argparse.Namespace) -> int:
    for name in release_names() if args.release == "all" else [args.release]:
        COMMANDS[args.command][0](load_release(name))
    return 0
