"""What all commands share: where things are, their one error, and other programs."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
DIST = ROOT / "dist"
PATCHES = ROOT / "patches"


class ToolError(Exception):
    """Something that the user has to put right. Its message is one line."""

    exit_status = 1


class IndexUnreachable(ToolError):
    """Pip got to no package index."""


def say(line: str) -> None:
    """Print a line of progress."""
    print(f"==> {line}", file=sys.stderr, flush=True)


def require(program: str) -> None:
    """Raise a ToolError unless a program is on PATH."""
    if shutil.which(program) is None:
        raise ToolError(f"{program} is not installed or not on PATH")


def run(command: list[str], cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command and return its standard output.

    Raises:
        ToolError: If it is not installed or fails, with the last line that it printed.
    """
    require(command[0])
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    if result.returncode != 0:
        lines = (result.stderr.strip() or result.stdout.strip()).splitlines()
        last = lines[-1] if lines else f"exit status {result.returncode}"
        raise ToolError(f"{' '.join(command[:3])} failed: {last}")
    return result.stdout


def run_pip(python: str | Path, *args: str) -> None:
    """Run the pip of a Python.

    Raises:
        IndexUnreachable: If it did not get to a package index.
        ToolError: If it failed otherwise.
    """
    command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *args]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return
    lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
    # It ends with what it could not find, whatever the reason.
    for line in lines:
        if broken := re.search(r"connection broken by '\w+\((.+)\)'", line):
            reason = re.sub(r"<[^>]+>: ", "", broken[1]).strip("'\"")
            raise IndexUnreachable(f"pip cannot reach the package index: {reason}")
    if none := re.search(r"requirement (\S+) \(from versions: none\)", result.stderr):
        raise IndexUnreachable(f"pip found no version of {none[1]} at all: can it reach an index?")
    raise ToolError(f"pip {args[0]} failed: {lines[-1]}")


def git_environment(isolated_below: Path | None = None) -> dict[str, str]:
    """Return an environment in which git does the same on every machine.

    Args:
        isolated_below: A folder whose enclosing repositories git must not see. Without
            it, `git apply` in a folder of this project would silently skip every file.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C", "TZ": "UTC"}
    if isolated_below is not None:
        env["GIT_CEILING_DIRECTORIES"] = str(isolated_below.resolve())
    return env


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
