"""The build, the series tools and the installer, run as a user runs them.

Each test works on a copy of the project, so that it can be broken.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from testbed.project import (
    PYTHON,
    build,
    contents,
    copy_project,
    edit,
    expect_refusal,
    git,
    patch_of,
    series_patches,
    tool,
)
from testbed.release import LOCAL_VERSION, PINS, ROOT, STOCK_WHEEL, UPSTREAM, VERSION, WHEEL
from tools.releases import read_pins

# The test environment of the default release has what they need.
default_only = pytest.mark.skipif(
    UPSTREAM != PINS["default"], reason="the tools are tested with the default release"
)


def make_submodule(project: Path) -> Path:
    """A local repository with the source in the stock wheel, in place of the submodule.

    The git host cannot be reached from everywhere the tests run. What this shows is that
    the route gives the same wheel when the trees hold the same files. Upstream's tree has
    files that its wheel leaves out, and not those that the build of the wheel makes.
    """
    submodule = project / "third_party" / "sglang"
    with zipfile.ZipFile(ROOT / "build" / "downloads" / STOCK_WHEEL) as wheel:
        names = [n for n in wheel.namelist() if n.startswith("sglang/") and not n.endswith(".so")]
        wheel.extractall(submodule / "python", names)
    (submodule / "python" / "sglang" / "_version.py").unlink()
    for name in ("LICENSE", "python/pyproject.toml", "python/sglang/left_out.txt"):
        (submodule / name).write_text("")
    git(submodule, "init", "--quiet")
    git(submodule, "add", "--all", "--force")
    commit_submodule(project, UPSTREAM)
    return submodule


def commit_submodule(project: Path, message: str) -> None:
    """Commit what is staged in the submodule, and pin the default release to it."""
    submodule = project / "third_party" / "sglang"
    git(submodule, "commit", "--quiet", "-m", message)
    commit = read_pins(project)["releases"][UPSTREAM]["commit"]
    edit(project / "pins.toml", commit, git(submodule, "rev-parse", "HEAD").strip())


@default_only
def test_submodule_gives_the_same_wheel_as_the_stock_wheel(project: Path, tmp_path: Path) -> None:
    make_submodule(project)
    status, _, err = tool(project, "build")
    assert status == 0 and "source: the submodule" in err and "differs" not in err, err
    other = copy_project(tmp_path / "other")
    shutil.copy(project / "pins.toml", other)
    assert (project / "dist" / WHEEL).read_bytes() == build(other)


@default_only
def test_the_build_says_where_the_submodule_differs(project: Path) -> None:
    """The wheel has the file of the submodule."""
    submodule = make_submodule(project)
    name = "sglang/bench_serving.py"
    with (submodule / "python" / name).open("a") as file:
        file.write("# edited\n")
    git(submodule, "add", "--all")
    commit_submodule(project, "edit")
    status, _, err = tool(project, "build")
    assert status == 0, err
    assert [line for line in err.splitlines() if "differs" in line] == [
        f"==> {name} differs from that of {STOCK_WHEEL}"
    ]
    with zipfile.ZipFile(project / "dist" / WHEEL) as wheel:
        assert wheel.read(name) == (submodule / "python" / name).read_bytes()


@default_only
def test_submodule_of_another_release(project: Path) -> None:
    make_submodule(project)
    status, _, err = tool(project, "build", "--release", "v0.5.9")
    assert status == 0 and "source: sglang-0.5.9-py3-none-any.whl" in err, err


@default_only
def test_unknown_release(project: Path) -> None:
    expect_refusal(project, ["'v9.9.9'", *PINS["releases"]], args="--release v9.9.9")


@default_only
def test_tests_of_an_unknown_release() -> None:
    command = [PYTHON, "-c", "import testbed.release"]
    env = {**os.environ, "UPSTREAM": "v9.9.9"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode != 0 and result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in ("UPSTREAM", "'v9.9.9'", *PINS["releases"]))


@default_only
def test_dirty_submodule(project: Path) -> None:
    submodule = make_submodule(project)
    (submodule / "python" / "stray.py").write_text("")
    expect_refusal(project, ["third_party/sglang", "changes"])


@default_only
def test_submodule_at_another_commit(project: Path) -> None:
    submodule = make_submodule(project)
    git(submodule, "commit", "--quiet", "--allow-empty", "-m", "another")
    expect_refusal(project, ["third_party/sglang", "is at"])


@default_only
@pytest.mark.parametrize("folder", ["common", UPSTREAM])
def test_patch_not_listed(project: Path, folder: str) -> None:
    extra = project / "patches" / folder / "extra.patch"
    shutil.copy(series_patches(project)[0], extra)
    expect_refusal(project, [f"{folder}/extra.patch", "not listed"])


@default_only
def test_patch_of_another_release(project: Path) -> None:
    name = f"v0.5.23/{patch_of(project, 'tokenizer-manager', 'v0.5.23').name}"
    series = project / "patches" / UPSTREAM / "series"
    series.write_text(series.read_text() + f"{name}\n")
    expect_refusal(project, [name, f"neither in common/ nor in {UPSTREAM}/"])


@default_only
def test_patch_not_on_disk(project: Path) -> None:
    for patch in series_patches(project)[:2]:
        content = patch.read_bytes()
        patch.unlink()
        expect_refusal(project, [f"{patch.parent.name}/{patch.name}", "not on disk"])
        patch.write_bytes(content)


@default_only
def test_patch_without_upstream_status(project: Path) -> None:
    patch = series_patches(project)[0]
    edit(patch, "\nForwarded: ", "\nStatus: ")
    expect_refusal(project, [patch.name, "Forwarded:"])


@default_only
def test_patch_with_more_than_an_upstream_status(project: Path) -> None:
    patch = series_patches(project)[0]
    edit(patch, "\nForwarded: no\n", "\nForwarded: no, to be proposed\n")
    expect_refusal(project, [patch.name, "`Forwarded: no, to be proposed`", "`not-needed`"])


@default_only
def test_patch_that_is_cut_short(project: Path) -> None:
    patch = series_patches(project)[0]
    patch.write_text("".join(patch.read_text().splitlines(keepends=True)[:-3]))
    expect_refusal(project, [patch.name, "is no patch"])


@default_only
def test_patch_that_does_not_apply(project: Path) -> None:
    patch = patch_of(project, "openai-return-token-ids")
    first = re.search(r"\n@@ .+\n .*", patch.read_text())
    assert first is not None
    edit(patch, first[0], f"{first[0]}, another")
    file = "python/sglang/srt/entrypoints/openai/protocol.py"
    expect_refusal(project, [f"{UPSTREAM}/{patch.name}", file, "hunk #1", "@@"])


@default_only
def test_patch_that_applies_with_an_offset(project: Path) -> None:
    patch = patch_of(project, "openai-return-token-ids")
    hunk = re.search(r"\n@@ -(\d+),6 \+(\d+),7 @@", patch.read_text())
    assert hunk is not None
    old, new = (int(start) - 4 for start in hunk.groups())
    edit(patch, hunk[0], f"\n@@ -{old},6 +{new},7 @@")
    expect_refusal(project, [patch.name, "protocol.py", "offset", "hunk #1"])


def path_with(folder: Path, *programs: str) -> str:
    folder.mkdir()
    for program in programs:
        found = shutil.which(program)
        assert found is not None
        (folder / program).symlink_to(found)
    return str(folder)


@default_only
def test_no_git(project: Path, tmp_path: Path) -> None:
    expect_refusal(project, ["git", "not installed"], path=path_with(tmp_path / "bin", "sh"))


@default_only
def test_no_quilt(project: Path, tmp_path: Path) -> None:
    path = path_with(tmp_path / "bin", "git", "sh")
    expect_refusal(project, ["quilt", "not installed"], name="series", args="check", path=path)


@pytest.fixture
def tree(project: Path) -> Path:
    """The repository of the series, in the project."""
    assert tool(project, "series", "tree")[0] == 0
    return project / "build" / UPSTREAM / "tree"


def commit(tree: Path, subject: str, *files: str, forwarded: str = "no") -> None:
    """Add a line to each file and commit them."""
    for file in files:
        with (tree / file).open("a") as opened:
            opened.write("# edited\n")
    git(tree, "add", "--all")
    message = f"{subject}\n\nForwarded: {forwarded}\nSigned-off-by: t"
    git(tree, "commit", "--quiet", "-m", message)


VERSION_FILE = "python/sglang/version.py"
OWN_FILE = "python/sglang/srt/entrypoints/openai/token_ids.py"
NEW_FILE = "python/sglang/new.py"


@default_only
def test_an_edit_becomes_a_patch(project: Path, tree: Path) -> None:
    """What a commit adds is for all releases, what it changes for this one."""
    before = contents(project)
    series = f"{UPSTREAM}/series"
    subject = "Version: 2.0 -- an edit, longer than a file name of `git format-patch` can ever be"
    (tree / VERSION_FILE).write_text("# edited\n")
    status, _, err = tool(project, "series", "refresh")
    assert status == 1 and "not committed" in err
    commit(tree, subject, VERSION_FILE, NEW_FILE)
    assert tool(project, "series", "refresh")[0] == 0
    after = contents(project)
    slug = "version-2-0-an-edit-longer-than-a-file-name-of-git-format-patch-can-ever-be.patch"
    listed = after.pop(series)
    assert listed == before[series] + f"common/{slug}\n{UPSTREAM}/{slug}\n".encode()
    added, changed = after.pop(f"common/{slug}"), after.pop(f"{UPSTREAM}/{slug}")
    assert b"new.py" in added and b"version.py" not in added
    assert b"version.py" in changed and b"new.py" not in changed
    assert added.partition(b"\n---\n")[0] == changed.partition(b"\n---\n")[0]
    assert {**after, series: before[series]} == before

    if shutil.which("quilt"):
        status, _, err = tool(project, "series", "check")
        assert status == 0, err

    # A patch that no series lists any more goes.
    git(tree, "reset", "--quiet", "--hard", "HEAD^")
    status, out, err = tool(project, "series", "refresh")
    assert status == 0 and f"common/{slug}: removed" in out, err
    assert contents(project) == before


@default_only
def test_what_cannot_be_exported(project: Path, tree: Path) -> None:
    """One line says why, and patches/ stays as it is."""
    before = contents(project)

    def refused(*words: str) -> None:
        expect_refusal(project, list(words), name="series", args="refresh")
        git(tree, "reset", "--quiet", "--hard", "HEAD^")
        assert contents(project) == before

    commit(tree, "token_ids: again", OWN_FILE)
    adding = "token_ids: add exact token ids to responses, whole and streamed"
    refused('"token_ids: again"', OWN_FILE, f'"{adding}"')
    commit(tree, "Token IDs -- add exact token ids to responses: whole and streamed", NEW_FILE)
    refused("two commits", "common/token-ids-add-exact-token-ids-to-responses-whole-and-streamed")
    commit(tree, "version: edit", VERSION_FILE, forwarded="yes")
    refused("version-edit.patch", "`Forwarded: yes`")
    git(tree, "commit", "--quiet", "--allow-empty", "-m", "nothing")
    refused('"nothing" changes no file')


@default_only
@pytest.mark.full
def test_a_module_changes_for_all_releases(project: Path, tree: Path) -> None:
    """The one that is refreshed and the others apply it from the same file."""
    before = contents(project)
    with (tree / OWN_FILE).open("a") as opened:
        opened.write("# edited\n")
    adding = git(tree, "log", "--format=%H", "--diff-filter=A", "--", OWN_FILE).strip()
    git(tree, "commit", "--quiet", "-a", f"--fixup={adding}")
    git(tree, "-c", "sequence.editor=true", "rebase", "--quiet", "-i", "--autosquash", "upstream")
    status, out, err = tool(project, "series", "refresh")
    assert status == 0, err
    name = "common/token-ids-add-exact-token-ids-to-responses-whole-and-streamed.patch"
    [line] = [line for line in out.splitlines() if line.startswith("common/")]
    others = [release for release in PINS["releases"] if release != UPSTREAM]
    assert line.startswith(f"{name}: changed") and all(other in line for other in others)
    assert UPSTREAM not in line
    after = contents(project)
    assert after[name] != before[name]
    assert {**after, name: before[name]} == before

    other = others[-1]
    assert tool(project, "series", "--release", other, "tree")[0] == 0
    assert (project / "build" / other / "tree" / OWN_FILE).read_text().endswith("# edited\n")
    status, out, err = tool(project, "series", "--release", other, "refresh")
    assert status == 0 and "changed" not in out, err
    assert contents(project) == after


def fake_environment(path: Path, version: str | None) -> Path:
    """A folder and a Python that finds a small package named sglang in it."""
    site = path / "site"
    site.mkdir(parents=True)
    if version is not None:
        info = site / f"sglang-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")
        digest = base64.urlsafe_b64encode(hashlib.sha256(b"x = 1\n").digest()).decode().rstrip("=")
        (info / "RECORD").write_text(f"sglang.py,sha256={digest},6\n")
        (site / "sglang.py").write_text("x = 1\n")
    python = path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{site}" exec "{PYTHON}" -S "$@"\n')
    python.chmod(0o755)
    return python


@default_only
@pytest.mark.parametrize(
    ("version", "changed", "words"),
    [
        (None, False, ["no sglang"]),
        ("0.5.8", False, ["0.5.8", VERSION]),
        (VERSION, True, ["local changes", "sglang.py"]),
    ],
    ids=["none there", "another release", "local changes"],
)
def test_install_refuses(
    project: Path, tmp_path: Path, version: str | None, changed: bool, words: list[str]
) -> None:
    python = fake_environment(tmp_path / "env", version)
    if changed:
        (tmp_path / "env" / "site" / "sglang.py").write_text("x = 2\n")
    (project / "dist").mkdir()
    shutil.copy(ROOT / "dist" / WHEEL, project / "dist")
    status, _, err = tool(project, "install", "--python", str(python))
    assert status == 1
    assert err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


@default_only
def test_install_replaces_stock(project: Path, tmp_path: Path) -> None:
    subprocess.run([PYTHON, "-m", "venv", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / "bin" / "python"
    stock = ROOT / "build" / "downloads" / STOCK_WHEEL
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(stock)], check=True)
    (project / "dist").mkdir()
    shutil.copy(ROOT / "dist" / WHEEL, project / "dist")
    status, out, err = tool(project, "install", "--python", str(python))
    assert status == 0, out + err
    assert f"undo: make uninstall PYTHON={python}" in out
    assert version_in(python) == LOCAL_VERSION
    status, out, err = tool(project, "install", "--undo", "--python", str(python))
    assert status == 0, out + err
    assert version_in(python) == VERSION
    status, _, err = tool(project, "install", "--undo", "--python", str(python))
    assert status == 1 and f"is {VERSION}, not patched" in err


def version_in(python: Path) -> str:
    code = "import importlib.metadata as m; print(m.version('sglang'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def editable_environment(path: Path, tree: Path) -> Path:
    """An environment without pip, with SGLang as `pip install -e TREE/python` leaves it."""
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", str(path)], check=True)
    [site] = (path / "lib").glob("python*/site-packages")
    info = site / f"sglang-{VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {VERSION}\n")
    url = {"url": (tree / "python").as_uri(), "dir_info": {"editable": True}}
    (info / "direct_url.json").write_text(json.dumps(url))
    (site / "__editable__.sglang.pth").write_text(f"{tree / 'python'}\n")
    files = ["METADATA", "direct_url.json", "RECORD"]
    record = [f"sglang-{VERSION}.dist-info/{file},," for file in files]
    (info / "RECORD").write_text("\n".join([*record, "__editable__.sglang.pth,,"]) + "\n")
    return path / "bin" / "python"


@pytest.fixture
def editable(project: Path, tmp_path: Path) -> tuple[Path, Path]:
    """An environment with an editable install, and its tree."""
    tree = tmp_path / "sglang tree"
    (tree / "python").mkdir(parents=True)
    with zipfile.ZipFile(ROOT / "build" / "downloads" / STOCK_WHEEL) as archive:
        names = [name for name in archive.namelist() if name.startswith("sglang/")]
        archive.extractall(tree / "python", names)
    (project / "dist").mkdir()
    shutil.copy(ROOT / "dist" / WHEEL, project / "dist")
    return editable_environment(tmp_path / "env", tree), tree


@default_only
def test_install_names_the_way_for_an_editable_install(
    project: Path, editable: tuple[Path, Path]
) -> None:
    python, tree = editable
    status, _, err = tool(project, "install", "--python", str(python))
    assert status == 1 and err.count("\n") == 1
    assert f"`make apply TREE='{tree}'`" in err
    assert f"`make install PYTHON={python} ARGS=--replace`" in err
    status, out, err = tool(project, "install", "--python", str(python), "--in-place")
    assert status == 0, err
    assert f"undo: make unapply TREE='{tree}'" in out
    assert (tree / "python" / "sglang" / "PATCHES.json").exists()
    status, _, err = tool(project, "install", "--undo", "--python", str(python))
    assert status == 1 and f"`make unapply TREE='{tree}'`" in err


@default_only
def test_the_wheel_replaces_only_a_clean_tree(
    project: Path, tmp_path: Path, editable: tuple[Path, Path]
) -> None:
    """And by uv, where there is no pip."""
    python, tree = editable
    command = ["--python", str(python), "--replace"]
    for file in ("srt/managers/tokenizer_manager.py", "srt/managers/template_manager.py"):
        path = tree / "python" / "sglang" / file
        content = path.read_bytes()
        path.write_bytes(content + b"# a patch of another project\n")
        status, _, err = tool(project, "install", *command)
        assert status == 1 and f"{path} is not as in {UPSTREAM}" in err
        path.write_bytes(content)
    bin = path_with(tmp_path / "bin", "sh", "git")
    status, _, err = tool(project, "install", *command, path=bin)
    assert status == 1 and "no pip, and uv is not on PATH" in err
    called = tmp_path / "called"
    uv = Path(bin) / "uv"
    uv.write_text(f'#!/bin/sh\necho "$@" > "{called}"\n')
    uv.chmod(0o755)
    status, out, err = tool(project, "install", *command, path=bin)
    assert status == 0, err
    assert f"--python {python} " in called.read_text() and WHEEL in called.read_text()
    assert f"undo: {python} -m pip install --no-deps -e '{tree / 'python'}'" in out


@default_only
def test_status_of_every_release(project: Path) -> None:
    status, out, _ = tool(project, "status", "--json")
    assert status == 0
    rows = json.loads(out)
    assert [row["release"] for row in rows] == list(PINS["releases"])
    for row in rows:
        patches = row["patches"]
        series = project / "patches" / row["release"] / "series"
        assert [patch["file"] for patch in patches] == series.read_text().split()
        assert row["upstream_lines"] == sum(patch["upstream_lines"] for patch in patches)
        assert 0 < row["token_ids_out_lines"] <= 40
        assert row["token_ids_out_lines"] < row["serving_lines"] <= 120
        apart = row["apart_lines"]
        assert apart.keys() == {"sampling", "engine", "routed-experts"}
        assert row["serving_lines"] + sum(apart.values()) == row["upstream_lines"]
        assert OWN_FILE in row["own_files"]
        for patch in patches:
            common = patch["file"].startswith("common/")
            assert common == (not patch["upstream_lines"]) == bool(patch["own_files"])
            assert not patch["shared_with"] or common
        others = [name for name in PINS["releases"] if name != row["release"]]
        [own] = [patch for patch in patches if OWN_FILE in patch["own_files"]]
        assert own["shared_with"] == sorted(others) and own["prepared"] == "upstream/2-token-ids"
    for row in rows:
        # By another count: of the signs in the text of the patches.
        texts = [(project / "patches" / patch["file"]).read_text() for patch in row["patches"]]
        hunks = [t[t.index("\ndiff --git ") :] for t in texts if "\nnew file mode" not in t]
        lines = [line for hunk in hunks for line in hunk.splitlines()]
        signed = [line for line in lines if re.match(r"[+-](?!\+\+ b/|-- a/)", line)]
        assert len(signed) == row["upstream_lines"]
    status, out, _ = tool(project, "status")
    assert status == 0
    for row in rows:
        assert f"{row['release']}: {row['upstream_lines']} lines in " in out


@default_only
def test_status_sees_a_module_with_two_sources(project: Path) -> None:
    [patch] = (project / "patches" / "common").glob("token-ids-*.patch")
    shutil.copy(patch, patch.with_name("other.patch"))
    edit(project / "patches" / "v0.5.23" / "series", f"common/{patch.name}", "common/other.patch")
    status, _, err = tool(project, "status")
    assert status == 1
    assert OWN_FILE in err and f"common/{patch.name} and common/other.patch" in err


@default_only
@pytest.mark.full
def test_a_port_stops_at_the_first_conflict(project: Path) -> None:
    """A release that is not pinned is, in its place among the others."""
    pins = project / "pins.toml"
    pinned = pins.read_text()
    [section] = re.findall(r'(?s)\[releases\."v0.5.10.post1"\]\n.*?\n\n.*?\n\n', pinned)
    edit(pins, section, "")
    command = ["--from", UPSTREAM, "--to", "v0.5.10.post1"]
    status, out, err = tool(project, "port", *command)
    assert status == 0, err
    # Its builds are counted anew.
    again = re.sub("revision = .*", "revision = 1", section)
    assert pins.read_text() == pinned.replace(section, again)
    tree = project / "build" / "v0.5.10.post1" / "tree"
    clashes = [line.strip() for line in out.splitlines() if line.startswith("  ")]
    assert "python/sglang/srt/managers/tokenizer_manager.py" in clashes
    assert all("<<<<<<< " in (tree / file).read_text() for file in clashes)
    assert "make patch-refresh UPSTREAM=v0.5.10.post1" in out
    # Nothing that is there is overwritten.
    status, _, err = tool(project, "port", *command)
    assert status == 1 and "exists" in err


@default_only
@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--to v0.5.24", ["FROM", *PINS["releases"]]),
        (f"--from {UPSTREAM}", ["TO", "not nothing", *PINS["releases"]]),
        (f"--from {UPSTREAM} --to 0.5.24", ["TO", "not 0.5.24", "v0.5.24"]),
        ("--from v9.9.9 --to v0.5.24", ["'v9.9.9'", *PINS["releases"]]),
    ],
    ids=["from nothing", "to nothing", "to a version", "from an unknown release"],
)
def test_a_port_that_is_not_told_what_to_port(project: Path, args: str, words: list[str]) -> None:
    expect_refusal(project, words, name="port", args=args)
    assert (project / "pins.toml").read_bytes() == (ROOT / "pins.toml").read_bytes()


@default_only
@pytest.mark.full
def test_a_port_to_itself_has_no_conflict(project: Path) -> None:
    status, out, err = tool(project, "port", "--from", UPSTREAM, "--to", UPSTREAM)
    assert status == 0, err
    assert "every patch applies" in out
    before = contents(project)
    assert tool(project, "series", "refresh")[0] == 0
    assert before == contents(project)
