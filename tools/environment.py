"""Make the environment that the tests of a release run in, or the one of the linters.

`tests` makes build/env-<release>: the patched wheel, what the CPU engine of SGLang imports,
the clients, and pytest. The stock wheel is unpacked beside it, to be put in front of the
patched one with PYTHONPATH. `lint` makes build/lint, with pre-commit. Everything is made once
and kept until a pin changes.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

from tools.common import BUILD, ROOT, ToolError, run_pip, say, sha256_of
from tools.releases import Release, fetch, load_release

TESTS = ROOT / "tests"
STANDINS = ROOT / "testbed" / "standins.py"
# The one that comes with Python 3.11 takes twice as long.
PIP = "pip==26.3"
# Installed with its dependencies: which ones it has depends on the build that pip finds.
TORCH = "torch==2.13.0"
PRE_COMMIT = "pre-commit==4.5.0"


def python_of(env: Path) -> Path:
    return env / "bin" / "python"


def make_environment(
    env: Path, packages: Sequence[str], requirements: str = "", remove: Sequence[str] = ()
) -> None:
    """Make a virtual environment unless it is there and up to date.

    Args:
        packages: Installed one after the other, with what they depend on.
        requirements: As in a requirements.txt, installed without what they depend on.
        remove: Packages to remove in the end.

    Raises:
        ToolError: If a package cannot be had.
    """
    stamp = env / "stamp"
    text = "\n".join(
        [*packages, *(f"without {name}" for name in remove), sys.version, requirements]
    )
    inputs = hashlib.sha256(text.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == inputs:
        return
    say(f"making {env.relative_to(ROOT)}")
    shutil.rmtree(env, ignore_errors=True)
    try:
        venv.create(env, with_pip=True, symlinks=True)
    except subprocess.CalledProcessError as e:
        lines = e.output.decode().strip().splitlines() or [f"exit status {e.returncode}"]
        raise ToolError(f"no pip in {env.relative_to(ROOT)}: {lines[-1]}") from e
    for package in packages:
        say(f"installing {package}")
        run_pip(python_of(env), "install", "--no-compile", package)
    if requirements:
        say(f"installing {len(requirements.splitlines())} packages")
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write(requirements)
            file.flush()
            # Clients ask for the Python that what they depend on asks for.
            options = ["--no-compile", "--no-deps", "--ignore-requires-python"]
            options += ["--requirement", file.name]
            run_pip(python_of(env), "install", *options)
    if remove:
        run_pip(python_of(env), "uninstall", "--yes", *remove)
    stamp.write_text(inputs)


def put_standins(env: Path, then: str = "") -> None:
    """Have every Python of an environment begin with the stand-ins of the CPU engine.

    Args:
        then: A statement that follows their import.
    """
    [site] = (env / "lib").glob("python*/site-packages")
    shutil.copy(STANDINS, site / "cpu_engine_standins.py")
    line = "; ".join(["import cpu_engine_standins", *filter(None, [then])])
    (site / "cpu_engine_standins.pth").write_text(f"{line}\n")


def requirements_of(release: Release) -> str:
    """Return the pins of a release: the common ones, and its own in their place."""
    pins: dict[str, str] = {}
    for path in (TESTS / "requirements.txt", TESTS / f"requirements-{release.name}.txt"):
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            if line and not line.startswith("#"):
                name = line.partition("==")[0]
                pins[re.sub("[-_.]+", "-", name).lower()] = line
    return "".join(f"{line}\n" for line in pins.values())


def install_wheel(env: Path, wheel: Path) -> None:
    """Install the patched wheel unless the same bytes are installed."""
    stamp = env / "wheel-stamp"
    digest = sha256_of(wheel)
    if stamp.exists() and stamp.read_text() == digest:
        return
    say(f"installing {wheel.name}")
    stamp.unlink(missing_ok=True)
    options = ["--no-compile", "--no-deps", "--force-reinstall"]
    run_pip(python_of(env), "install", *options, str(wheel))
    stamp.write_text(digest)


def unpack_stock(release: Release) -> None:
    """Unpack the stock wheel unless it is."""
    target = BUILD / f"stock-{release.name}"
    if target.exists():
        return
    wheel = fetch(release, release.stock_wheel())
    say(f"unpacking {wheel.name}")
    unfinished = target.with_name(f"{target.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unfinished)
    unfinished.rename(target)


def make_test_environment(release: Release) -> None:
    """Make the environment of the tests of a release.

    Raises:
        ToolError: If the wheel is not built.
    """
    wheel = release.built_wheel()
    if not wheel.exists():
        raise ToolError(f"there is no {wheel.relative_to(ROOT)}: run `make wheel`")
    env = BUILD / f"env-{release.name}"
    make_environment(env, [PIP, TORCH], requirements_of(release))
    put_standins(env)
    install_wheel(env, wheel)
    unpack_stock(release)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["tests", "lint"])
    parser.add_argument("--release", help="a release of pins.toml (default: its default)")


def main(args: argparse.Namespace) -> int:
    if args.what == "tests":
        make_test_environment(load_release(args.release))
    else:
        make_environment(BUILD / "lint", [PRE_COMMIT])
    return 0
