"""The series on source trees in place, with other patches in them or not, and off again."""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from testbed.project import git, make, say_what_it_is, tool
from testbed.release import LOCAL_VERSION, PINS, ROOT, STOCK_WHEEL, UPSTREAM, WHEEL
from tools import build
from tools.releases import load_release
from tools.series import hunks_of, read_patch, read_series

STOCK = ROOT / "build" / "downloads" / STOCK_WHEEL
read_wheel = functools.cache(build.read_wheel)
# A line of the stand-in for another project's patches.
ANOTHER = "# another patch"


def make_tree(root: Path, layout: str, whole: bool = False) -> Path:
    """An unpacked stock wheel, or a git checkout as upstream's, without _version.py.

    Args:
        whole: With all files, not only those that a series of any release changes.
    """
    package = {n: d for n, d in read_wheel(STOCK).items() if not n.endswith(".so")}
    if not whole:
        patches = [read_patch(path) for path in (ROOT / "patches").rglob("*.patch")]
        kept = {"python/sglang/_version.py", *(f for patch in patches for f in patch.files)}
        package = {n: d for n, d in package.items() if f"python/{n}" in kept}
    if layout == "checkout":
        package = {f"python/{n}": d for n, d in package.items() if n.startswith("sglang/")}
        del package["python/sglang/_version.py"]
    for name, data in package.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    if layout == "checkout":
        git(root, "init", "--quiet")
        # It would remove files in the background while they are listed.
        git(root, "config", "maintenance.auto", "false")
        git(root, "add", "--all", "--force")
        git(root, "commit", "--quiet", "-m", "upstream")
    return root


layouts = pytest.mark.parametrize("layout", ["checkout", "package"])


@pytest.fixture(params=["checkout", "package"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree", request.param)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree", "checkout")


def package_of(tree: Path) -> Path:
    return next(p for p in (tree / "python" / "sglang", tree / "sglang") if p.is_dir())


def snapshot(tree: Path) -> dict[str, tuple[int, bytes]]:
    """Every path with its mode and content, but for git's own."""
    paths = [path for path in tree.rglob("*") if ".git" not in path.relative_to(tree).parts]
    return {
        str(path.relative_to(tree)): (
            path.stat().st_mode,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in paths
    }


def changed_files() -> dict[str, list[list[str]]]:
    """Upstream's files that the series changes, each with the lines that its hunks expect.

    Only of the first patch that changes a file: later hunks expect what it has done.
    """
    found: dict[str, list[list[str]]] = {}
    for patch in read_series(load_release(UPSTREAM)):
        for file in patch.changed:
            found.setdefault(file, [hunk.lines for hunk in hunks_of(patch, file)])
    return found


def place_of(lines: list[str], hunk: list[str]) -> int:
    [place] = [i for i in range(len(lines)) if lines[i : i + len(hunk)] == hunk]
    return place


def patch_by_another(tree: Path) -> None:
    """Change all that the series changes, in the same functions, right before its hunks.

    But for places inside of the context of another patch.
    """
    patches = read_series(load_release(UPSTREAM))
    for file, hunks in changed_files().items():
        contexts = [hunk.lines for patch in patches for hunk in hunks_of(patch, file)]
        expected = {pair for lines in contexts for pair in itertools.pairwise(lines)}
        path = package_of(tree) / file.removeprefix("python/sglang/")
        lines = path.read_text().splitlines()
        for hunk in hunks:
            place = place_of(lines, hunk)
            if tuple(lines[place - 1 : place + 1]) not in expected:
                lines.insert(place, ANOTHER)
        path.write_text("\n".join([*[ANOTHER] * 7, *lines]) + "\n")
    if (tree / ".git").exists():
        git(tree, "commit", "--quiet", "--all", "-m", "rollout: a patch of another project")


def without_another(data: bytes) -> bytes:
    return data.replace(f"{ANOTHER}\n".encode(), b"")


def apply(tree: Path, *args: str) -> str:
    status, out, err = tool(ROOT, "apply", str(tree), *args)
    assert status == 0, err
    return out


def refusal(tree: Path, *args: str) -> str:
    """The one line of a refusal that leaves the tree as it was."""
    before = snapshot(tree)
    status, out, err = tool(ROOT, "apply", str(tree), *args)
    assert status == 1 and not out, out
    [line] = err.splitlines()
    assert snapshot(tree) == before
    return line


@layouts
def test_a_tree_gets_the_files_of_the_wheel(tmp_path: Path, layout: str) -> None:
    tree = make_tree(tmp_path / "tree", layout, whole=True)
    before = snapshot(tree)
    out = apply(tree)
    assert LOCAL_VERSION in out and f"make unapply TREE={tree}" in out
    if UPSTREAM == PINS["default"]:
        shown = out.splitlines()[-2].partition(": ")[2]
        assert f": {shown}\n" in (ROOT / "README.md").read_text(), shown
    wheel, package = read_wheel(ROOT / "dist" / WHEEL), package_of(tree)
    files = [*json.loads(wheel["sglang/PATCHES.json"])["files"], "sglang/PATCHES.json"]
    for file in files:
        assert (package.parent / file).read_bytes() == wheel[file], file
    prefix = str(package.parent.relative_to(tree)) + "/" if package.parent != tree else ""
    written = {f"{prefix}{f}" for f in (*files, "sglang/PATCHES.diff", "sglang/_version.py")}
    after = snapshot(tree)
    different = {name for name, data in after.items() if before.get(name) != data}
    assert {name for name in different if (tree / name).is_file()} == written
    assert not before.keys() - after.keys()

    version, patches, *_ = say_what_it_is(PYTHONPATH=str(package.parent))
    assert version == LOCAL_VERSION
    assert patches.startswith(f"sglang {LOCAL_VERSION}: {UPSTREAM} ")

    apply(tree, "--undo")
    assert snapshot(tree) == before


def test_a_tree_with_other_patches(tree: Path) -> None:
    patch_by_another(tree)
    before = snapshot(tree)
    apply(tree)
    wheel, package = read_wheel(ROOT / "dist" / WHEEL), package_of(tree)
    for file in json.loads(wheel["sglang/PATCHES.json"])["files"]:
        data = (package.parent / file).read_bytes()
        assert without_another(data) == wheel[file], file
        assert (ANOTHER.encode() in data) == (f"python/{file}" in changed_files())
    apply(tree, "--undo")
    assert snapshot(tree) == before


def edit_inside_a_hunk(tree: Path) -> tuple[str, str, int]:
    """Change a line that a hunk expects; return the file, the line, and its number."""
    file, hunks = list(changed_files().items())[-1]
    path = package_of(tree) / file.removeprefix("python/sglang/")
    lines = path.read_text().splitlines()
    offset = next(i for i, line in enumerate(hunks[-1]) if line.strip())
    number = place_of(lines, hunks[-1]) + offset
    line = lines[number].strip()
    lines[number] += "  # edited"
    path.write_text("\n".join(lines) + "\n")
    return file, line, number + 1


@pytest.mark.parametrize("committed", [True, False])
def test_a_conflict(checkout: Path, committed: bool) -> None:
    """It names file, hunk and the other change, and nothing is changed."""
    file, line, number = edit_inside_a_hunk(checkout)
    if committed:
        git(checkout, "commit", "--quiet", "--all", "-m", "rollout: another change")
    said = refusal(checkout, "--release", UPSTREAM)
    count = len(changed_files()[file])
    assert f" does not apply to {file}: hunk #{count}, @@ -" in said
    assert repr(f"{line}  # edited") in said and repr(line) in said
    # The number of the line in the tree, or after those that earlier patches have added.
    found = re.search(r"line (\d+) is ", said)
    assert found and int(found[1]) >= number
    ending = "(rollout: another change)" if committed else ", a change that is not committed"
    assert said.endswith(ending)


def test_the_line_that_undoes_it(tmp_path: Path) -> None:
    """It is run as it is printed, whatever the tree is called."""
    tree = make_tree(tmp_path / "it's a tree", "package")
    before = snapshot(tree)
    status, out, err = make(ROOT, "apply", f"TREE={tree}")
    assert status == 0, err
    [undo] = [line for line in out.splitlines() if line.startswith("undo: ")]
    # A second time it is refused, with the same line.
    assert f"`{undo.removeprefix('undo: ')}`" in refusal(tree)
    subprocess.run(undo.removeprefix("undo: "), shell=True, cwd=ROOT, check=True)
    assert snapshot(tree) == before


def test_a_place_that_is_not_the_only_one(tree: Path) -> None:
    """Nobody can tell where a hunk belongs that would fit in two places."""
    file, hunks = next(iter(changed_files().items()))
    path = package_of(tree) / file.removeprefix("python/sglang/")
    with path.open("a") as opened:
        opened.write("\n".join(["", "'''", *hunks[0], "'''", ""]))
    said = refusal(tree, "--release", UPSTREAM)
    assert f"{file}: hunk #1" in said and "more than once" in said


def test_a_file_that_is_there_already(tree: Path) -> None:
    (package_of(tree) / "patches.py").write_text("")
    said = refusal(tree, "--release", UPSTREAM)
    assert "common/build-list-the-applied-patches.patch adds python/sglang/patches.py" in said


def test_a_series_is_put_on_once(tree: Path) -> None:
    apply(tree)
    assert f"make unapply TREE={tree}" in refusal(tree)


def test_the_package_of_an_installed_wheel(tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO((ROOT / "dist" / WHEEL).read_bytes())) as archive:
        archive.extractall(tmp_path)
    assert "the patched wheel already" in refusal(tmp_path)
    assert "make uninstall" in refusal(tmp_path, "--undo")


def test_nothing_to_take_off(tree: Path) -> None:
    assert "no series to take off" in refusal(tree, "--undo")


def test_what_was_changed_again_is_not_taken_off(tree: Path) -> None:
    package = package_of(tree)
    apply(tree)
    [added] = package.rglob("patches.py")
    added.write_text(added.read_text() + "# edited\n")
    said = refusal(tree, "--undo")
    assert "python/sglang/patches.py" in said and "was changed after" in said


def test_what_others_changed_later_stays(tree: Path) -> None:
    before = snapshot(tree)
    apply(tree)
    file = next(iter(changed_files())).removeprefix("python/sglang/")
    path = package_of(tree) / file
    path.write_text(f"{ANOTHER}\n" * 3 + path.read_text())
    apply(tree, "--undo")
    assert path.read_bytes().count(ANOTHER.encode()) == 3
    path.write_bytes(without_another(path.read_bytes()))
    assert snapshot(tree) == before


def test_a_tree_of_a_release_without_series(tree: Path) -> None:
    version = package_of(tree) / "_version.py"
    version.write_text("__version__ = version = '9.9.9'\n")
    said = refusal(tree)
    assert "SGLang 9.9.9" in said and UPSTREAM in said and "UPSTREAM=" in said
    apply(tree, "--release", UPSTREAM)


def test_a_version_that_was_guessed_says_nothing(tree: Path) -> None:
    """The release is then found by the files that it has."""
    version = package_of(tree) / "_version.py"
    version.write_text("__version__ = version = '9.9.9.dev0+gabcdef'\n")
    before = snapshot(tree)
    assert LOCAL_VERSION in apply(tree)
    assert f"'{LOCAL_VERSION}'" in version.read_text()
    apply(tree, "--undo")
    assert snapshot(tree) == before


@pytest.mark.parametrize("args", [[], ["--undo"]], ids=["apply", "unapply"])
def test_a_folder_without_sglang(tmp_path: Path, args: list[str]) -> None:
    assert "python/sglang/srt" in refusal(tmp_path, *args)


def test_a_linked_file_is_not_changed_elsewhere(tree: Path, tmp_path: Path) -> None:
    """Installers link files to their cache."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for number, file in enumerate(changed_files()):
        os.link(package_of(tree) / file.removeprefix("python/sglang/"), cache / str(number))
    before = snapshot(cache)
    apply(tree)
    assert snapshot(cache) == before


@pytest.mark.parametrize("failing", range(1, 8, 3))
def test_a_disk_that_is_full(checkout: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """A file that cannot be written leaves none written."""
    from tools import apply as tools_apply

    before = snapshot(checkout)
    replace, count = Path.replace, 0

    def fail(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == failing:
            raise OSError(28, "No space left on device", str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(tools_apply.ToolError, match="No space left on device"):
        tools_apply.apply(checkout)
    assert snapshot(checkout) == before
