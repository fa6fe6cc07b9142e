"""A copy of the project, so that a test can break it, and its tools run as a user runs them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from testbed.release import ROOT, UPSTREAM

# The tools run in the Python that `make` finds, not in the test environment.
PYTHON = os.path.realpath(sys.executable)
# What the tests may have been run with is not what they run the tools with.
OF_THE_TESTS = ("PYTHONPATH", "UPSTREAM", "MAKEFLAGS", "ARGS", "WORKERS")


def copy_project(target: Path) -> Path:
    """Copy what the tools need; what was downloaded and installed is shared."""
    for name in ("patches", "tools"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "build.sh", "pins.toml"):
        shutil.copy(ROOT / name, target)
    (target / "build").mkdir()
    (target / "build" / "downloads").symlink_to(ROOT / "build" / "downloads")
    return target


def tool(project: Path, name: str, *args: str, path: str | None = None) -> tuple[int, str, str]:
    """Run a command of the tools, and return its exit status and what it printed."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        env["PATH"] = path
    command = [PYTHON, "-m", "tools", name, *args]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=project)
    return result.returncode, result.stdout, result.stderr


def make(project: Path, *args: str, **environment: str) -> tuple[int, str, str]:
    """Run `make`, with the Python of the tools first on PATH, and return as `tool` does."""
    bin = project / "build" / "bin"
    bin.mkdir(exist_ok=True)
    for name in ("python", "python3"):
        if not (bin / name).exists():
            (bin / name).symlink_to(PYTHON)
    kept = {k: v for k, v in os.environ.items() if k not in OF_THE_TESTS}
    env = {**kept, "PATH": f"{bin}:{os.environ['PATH']}", **environment}
    command = ["make", "--no-print-directory", *args]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=project)
    return result.returncode, result.stdout, result.stderr


def build(project: Path) -> bytes:
    status, out, err = tool(project, "build", "--release", UPSTREAM)
    assert status == 0, err
    [wheel] = (project / "dist").glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert f"sha256   {digest}" in out
    assert f"pip install --no-deps --force-reinstall dist/{wheel.name}" in out
    return wheel.read_bytes()


def expect_refusal(project: Path, words: list[str], name: str = "build", **kwargs: str) -> None:
    """One line that says why, a non-zero exit, and no wheel."""
    args = kwargs.pop("args", "").split()
    status, _, err = tool(project, name, *args, **kwargs)
    lines = [line for line in err.splitlines() if not line.startswith("==> ")]
    assert status != 0 and len(lines) == 1, err
    assert all(word in lines[0] for word in words), lines[0]
    assert not list((project / "dist").glob("*.whl"))


def series_patches(project: Path, release: str = UPSTREAM) -> list[Path]:
    names = (project / "patches" / release / "series").read_text().split()
    return [project / "patches" / name for name in names]


def patch_of(project: Path, word: str, release: str = UPSTREAM) -> Path:
    """Return the patch of the release, not of common/, that has `word` in its name."""
    [path] = (project / "patches" / release).glob(f"*{word}*.patch")
    return path


def contents(project: Path) -> dict[str, bytes]:
    """Return every file of patches/."""
    patches = project / "patches"
    files = [path for path in patches.rglob("*") if path.is_file()]
    return {str(path.relative_to(patches)): path.read_bytes() for path in files}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def git(folder: Path, *args: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    command = ["git", *identity, *args]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def say_what_it_is(**environment: str) -> list[str]:
    """Return the version of the SGLang that is imported, and what `sglang.patches` prints.

    In one process, as to import it takes ten seconds.
    """
    code = (
        "import runpy, sglang.version; print(sglang.version.__version__);"
        "runpy.run_module('sglang.patches', run_name='__main__')"
    )
    command = [sys.executable, "-B", "-c", code]
    env = {**os.environ, **environment}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()
