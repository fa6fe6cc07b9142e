"""Put the series of a release on a source tree in place, and take it off again.

For an SGLang that is not an installed wheel: a git checkout (python/sglang) or an unpacked
package (sglang), with other patches in it or not. Every hunk is tried on a copy first, and
the context of each has to be there exactly, at any line. Only then the tree is changed.

The package then has PATCHES.json, as in the wheel, and PATCHES.diff with what was changed,
which `unapply` reverses.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tools.build import MANIFEST, manifest_of, with_version
from tools.common import ToolError, git_environment, run
from tools.releases import Release, load_release, release_names, release_of_version
from tools.series import Hunk, Patch, hunks_of, make_repository, read_diff, read_series

DIFF = "PATCHES.diff"
VERSION = "_version.py"
# As setuptools-scm writes it.
VERSION_LINES = """\
__version__ = version = '{version}'
__version_tuple__ = version_tuple = {parts}
"""


@dataclasses.dataclass(frozen=True)
class Tree:
    """A source tree of SGLang.

    Attributes:
        root: What the user named.
        prefix: Where the package is in it: "python/sglang/" or "sglang/".
    """

    root: Path
    prefix: str

    @property
    def package(self) -> Path:
        return self.root / self.prefix

    def path_of(self, file: str) -> Path:
        """Return where a file of upstream's tree, "python/sglang/...", is in this one."""
        return self.package / file.removeprefix("python/sglang/")


def find_tree(root: Path) -> Tree:
    """Return the tree at a path.

    Raises:
        ToolError: If there is none.
    """
    for prefix in ("python/sglang/", "sglang/"):
        if (root / prefix / "srt").is_dir():
            return Tree(root.resolve(), prefix)
    if root.name == "sglang" and (root / "srt").is_dir():
        return Tree(root.resolve().parent, "sglang/")
    raise ToolError(f"{root} has no SGLang: neither python/sglang/srt nor sglang/srt is there")


def stated_version(tree: Tree) -> str | None:
    """Return the version that the tree itself states, None if it states none."""
    version = tree.package / VERSION
    if version.exists():
        found = re.search(r"^__version__ = version = '([^']+)'", version.read_text(), re.MULTILINE)
        # A version that setuptools-scm has guessed is that of no release.
        if found and "dev" not in found[1]:
            return found[1].partition("+")[0]
    return None


def pristine_blobs(release: Release) -> dict[str, str]:
    """Return upstream's files that the series changes, with git's name of what they are before."""
    expected: dict[str, str] = {}
    index = re.compile(r"^diff --git a/(\S+) b/\S+\nindex ([0-9a-f]{40})\.\.", re.MULTILINE)
    for patch in read_series(release):
        for file, blob in index.findall(patch.path.read_text()):
            expected.setdefault(file, blob)
    return expected


def untouched_files(tree: Tree, release: Release) -> int:
    """Return how many of the files that the series changes are as in the release."""
    blobs = pristine_blobs(release).items()
    return sum(blob_of(tree.path_of(file)) == blob for file, blob in blobs)


def blob_of(path: Path) -> str | None:
    """Return the name that git gives the content of a file, None if there is no file."""
    if not path.is_file():
        return None
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def fits(tree: Tree, release: Release) -> bool:
    """Return whether the series applies."""
    try:
        rehearse(tree, release, read_series(release))
    except ToolError:
        return False
    return True


def release_of(tree: Tree, name: str | None) -> Release:
    """Return the release that a tree is of.

    Args:
        name: The release if the user names it.

    Raises:
        ToolError: If the tree does not tell, or is of a release without a series.
    """
    if name:
        return load_release(name)
    releases = [load_release(name) for name in release_names()]
    known = f"there are series for {', '.join(release.name for release in releases)}"
    version = stated_version(tree)
    if version is not None:
        if release := release_of_version(version):
            return release
        raise ToolError(f"{tree.root} is SGLang {version}; {known} (UPSTREAM= names one to try)")
    fitting = [release for release in releases if fits(tree, release)] or releases
    counts = [untouched_files(tree, release) for release in fitting]
    if counts.count(max(counts)) > 1:
        raise ToolError(f"cannot tell the release of {tree.root}: name it with UPSTREAM=; {known}")
    return fitting[counts.index(max(counts))]


def places_of(lines: list[str], text: list[str]) -> list[int]:
    size = len(lines)
    return [i for i in range(len(text) - size + 1) if text[i : i + size] == lines]


def likeness(line: str, other: str) -> float:
    return difflib.SequenceMatcher(None, line, other).ratio()


def first_difference(hunk: Hunk, text: list[str]) -> tuple[str, str | None]:
    """Say where a file differs first from what a hunk expects, and return a line of it."""
    size, expected_lines = len(hunk.lines), Counter(hunk.lines)
    best = max(
        range(len(text)),
        key=lambda i: (
            (expected_lines & Counter(text[i : i + size])).total(),
            -abs(i + 1 - hunk.line),
        ),
        default=0,
    )
    start = max(0, best - 2)
    window = text[start : best + size + 4]
    blocks = difflib.SequenceMatcher(None, hunk.lines, window, autojunk=False).get_opcodes()
    for number, (tag, a, a_end, b, end) in enumerate(blocks):
        if tag == "equal" or (tag == "insert" and number in (0, len(blocks) - 1)):
            continue
        if tag == "insert":
            return f"line {start + b + 1}, {window[b].strip()!r}, is not expected there", window[b]
        expected = hunk.lines[a].strip()
        if tag == "delete":
            return f"{expected!r} is not there, before line {start + b + 1}", None
        # The window is wider than the hunk at both ends.
        if number == 0:
            b = max(b, end - (a_end - a))
        elif number == len(blocks) - 1:
            end = min(end, b + (a_end - a))
        found = max(range(b, end), key=lambda i: likeness(window[i], hunk.lines[a]))
        line = window[found]
        return f"line {start + found + 1} is {line.strip()!r} instead of {expected!r}", line
    return "its lines are not there", None


def author_of(tree: Tree, file: str, line: str | None) -> str:
    """Return whose change a line of a file is, as far as git knows, to go after the difference."""
    path = tree.path_of(file)
    env = git_environment()
    try:
        if run(["git", "diff", "--name-only", "HEAD", "--", str(path)], tree.root, env):
            uncommitted = ", a change that is not committed"
        else:
            uncommitted = ""
        lines = path.read_text().splitlines()
        if line is None or line not in lines:
            return uncommitted
        number = lines.index(line) + 1
        command = ["git", "blame", "--porcelain", f"-L{number},{number}", "--", str(path)]
        blame = run(command, tree.root, env)
    except ToolError:
        return ""
    commit, subject = blame[:10], re.search(r"^summary (.*)$", blame, re.MULTILINE)
    if set(commit) == {"0"}:
        return uncommitted
    return f", from {commit} ({subject[1]})" if subject else ""


def apply_patch(patch: Patch, scratch: Path, tree: Tree) -> None:
    """Apply a patch to the copy of the files, at any line but with the exact context.

    Raises:
        ToolError: If a hunk does not apply, with what is in its way.
    """
    for file in patch.added:
        if (scratch / file).exists():
            raise ToolError(f"{patch.name} adds {file}, but {tree.root} has one")
    for file in patch.changed:
        if not (scratch / file).exists():
            raise ToolError(f"{patch.name} changes {file}, but {tree.root} has none")
        text = (scratch / file).read_text().splitlines()
        for hunk in hunks_of(patch, file):
            where = f"{patch.name} does not apply to {file}: hunk {hunk.name}"
            places = places_of(hunk.lines, text)
            if not places:
                difference, line = first_difference(hunk, text)
                raise ToolError(f"{where}: {difference}{author_of(tree, file, line)}")
            if len(places) > 1:
                at = " and ".join(str(place + 1) for place in places)
                raise ToolError(f"{where}: its lines are there more than once, at {at}")
    # Without --unidiff-zero a hunk at the top or the end of a file has to stay there, whatever
    # others have put before or behind it.
    command = ["git", "apply", "--whitespace=nowarn", "--unidiff-zero"]
    command.append(str(patch.path.resolve()))
    run(command, scratch, git_environment(isolated_below=scratch.parent))


def copy_files(tree: Tree, files: Iterable[str], scratch: Path) -> None:
    """Copy those of the files that exist, to where upstream's tree has them."""
    for file in files:
        target = scratch / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if tree.path_of(file).is_file():
            shutil.copyfile(tree.path_of(file), target)


def content_of(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def put(path: Path, content: bytes | None) -> None:
    """Give a file another content, None to remove it, at once and with the mode that it has."""
    path = path.resolve()
    if content is None:
        path.unlink(missing_ok=True)
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()
        for folder in (path.parent / "__pycache__", *path.parents):
            try:
                folder.rmdir()
            except OSError:
                if folder.name != "__pycache__":
                    break
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Not into the file itself, which may be linked to a cache of packages.
        unfinished.write_bytes(content)
        if path.exists():
            shutil.copymode(path, unfinished)
            if os.geteuid() == 0:
                os.chown(unfinished, path.stat().st_uid, path.stat().st_gid)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def put_all(contents: dict[Path, bytes | None]) -> None:
    """Give files other contents, all of them or none.

    Raises:
        ToolError: If one cannot be written.
    """
    before = {path: content_of(path) for path in contents}
    done: list[Path] = []
    try:
        for path, content in contents.items():
            done.append(path)
            if before[path] != content:
                put(path, content)
    except BaseException as e:
        for path in reversed(done):
            with contextlib.suppress(OSError):
                if content_of(path) != before[path]:
                    put(path, before[path])
        if isinstance(e, OSError):
            raise ToolError(f"cannot write {e.filename}: {e.strerror}; nothing is changed") from e
        raise


def check_python(scratch: Path, files: Iterable[str]) -> None:
    """Raise a ToolError if one of the files is no Python."""
    for file in files:
        if file.endswith(".py") and (scratch / file).exists():
            try:
                ast.parse((scratch / file).read_bytes())
            except SyntaxError as e:
                raise ToolError(f"{file} would be no Python any more, at line {e.lineno}") from e


def set_version(path: Path, release: Release) -> None:
    text = path.read_text() if path.exists() else ""
    changed = with_version(text, release)
    if changed == text:
        numbers = tuple(int(part) for part in re.findall(r"\d+", release.version)[:3])
        changed = VERSION_LINES.format(version=release.local_version, parts=numbers)
    path.write_text(changed)


def rehearse(tree: Tree, release: Release, patches: list[Patch]) -> dict[Path, bytes | None]:
    """Apply a series to a copy of what it changes.

    Returns:
        What the files of the tree are then, and a diff that leads back.

    Raises:
        ToolError: If it does not apply.
    """
    version = f"python/sglang/{VERSION}"
    files = dict.fromkeys([*(file for patch in patches for file in patch.files), version])
    outside = [file for file in files if not file.startswith("python/sglang/")]
    if outside:
        raise ToolError(f"the series changes {outside[0]}, which is not in the package")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "scratch"
        copy_files(tree, files, scratch)
        make_repository(scratch)
        for patch in patches:
            apply_patch(patch, scratch, tree)
        check_python(scratch, files)
        set_version(scratch / version, release)
        env = git_environment(isolated_below=scratch.parent)
        run(["git", "add", "--all", "--force"], scratch, env)
        diff = ["git", "diff", "--cached", "--full-index", "--binary", "--no-renames", "HEAD"]
        contents = {tree.path_of(file): content_of(scratch / file) for file in files}
        return {**contents, tree.package / DIFF: run(diff, scratch, env).encode()}


def apply(root: Path, name: str | None = None) -> tuple[Release, int]:
    """Put a series on a tree.

    Returns:
        The release, and the number of files that were changed or added.

    Raises:
        ToolError: If it cannot be; then nothing is changed.
    """
    tree = find_tree(root)
    if (tree.package / DIFF).exists():
        raise ToolError(
            f"{tree.root} has a series already: run "
            f"`make unapply TREE={shlex.quote(str(root))}` first"
        )
    if (tree.package / MANIFEST).exists():
        raise ToolError(f"{tree.root} is the patched wheel already: it has {MANIFEST}")
    release = release_of(tree, name)
    patches = read_series(release)
    contents = rehearse(tree, release, patches)
    put_all({**contents, tree.package / MANIFEST: manifest_of(release, patches)})
    return release, len(contents) - 1


def put_on(root: Path, name: str | None = None) -> None:
    """Put a series on a tree, and say so and how to undo it."""
    release, count = apply(root, name)
    print(f"{root}: sglang {release.local_version}, {count} files changed or added")
    print(f"undo: make unapply TREE={shlex.quote(str(root))}")


def unapply(root: Path) -> int:
    """Take a series off a tree, and leave what others have changed beside it.

    Returns:
        The number of files that are as they were.

    Raises:
        ToolError: If what the series has changed was changed again; then nothing is changed.
    """
    tree = find_tree(root)
    diff, manifest = tree.package / DIFF, tree.package / MANIFEST
    if not diff.exists():
        if manifest.exists():
            raise ToolError(f"{tree.root} is an installed wheel: run `make uninstall PYTHON=`")
        raise ToolError(f"{tree.root} has no series to take off: there is no {diff}")
    changed, added = read_diff(diff)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "scratch"
        copy_files(tree, [*changed, *added], scratch)
        result = subprocess.run(
            ["git", "apply", "--reverse", "--whitespace=nowarn", str(diff)],
            cwd=scratch,
            env=git_environment(isolated_below=scratch.parent),
            capture_output=True,
            text=True,
        )
        if result.returncode != 0:
            failed = re.search(r"^error: (?:patch failed: )?([^:]+)(:\d+)?", result.stderr)
            where = failed[1] + (failed[2] or "") if failed else result.stderr.strip()
            raise ToolError(f"{where} was changed after the series was put on: undo that first")
        contents = {tree.path_of(f): content_of(scratch / f) for f in (*changed, *added)}
    put_all({**contents, manifest: None, diff: None})
    return len(contents)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "tree", type=Path, nargs="?", help="a git checkout of SGLang or an unpacked package"
    )
    parser.add_argument("--release", help="its release (default: found out from the tree)")
    parser.add_argument("--undo", action="store_true", help="take the series off")


def main(args: argparse.Namespace) -> int:
    if args.tree is None:
        raise ToolError("name the source tree: TREE=path")
    if args.undo:
        print(f"{args.tree}: {unapply(args.tree)} files are as they were")
    else:
        put_on(args.tree, args.release)
    return 0
