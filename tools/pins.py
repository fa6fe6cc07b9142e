"""Recompute the hashes of pins.toml from PyPI and compare them.

Downloads every artefact of every release, checks its sha256, and that the wheels of a
release hold the same Python files, of which the series is applied to one. With --find it
prints the pins of a version that is not pinned yet.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import zipfile
from pathlib import Path

from tools.common import ROOT, IndexUnreachable, ToolError, run_pip, say, sha256_of
from tools.releases import (
    Artefact,
    Release,
    fetch,
    is_source,
    load_release,
    release_names,
    version_key,
)

PYTHONS = ("310", "311", "312", "313", "314")
MACHINES = ("x86_64", "aarch64")


def digest_of_sources(wheel: Path) -> str:
    """Return one hash over the package of a wheel without its compiled extensions."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if is_source(name):
                digest.update(name.encode() + b"\0" + archive.read(name) + b"\0")
    return digest.hexdigest()


def check(release: Release) -> None:
    """Check every artefact of a release.

    Raises:
        ToolError: If one has another hash, or other Python files than the first.
    """
    first, *others = [fetch(release, wheel) for wheel in release.wheels]
    for wheel in others:
        if digest_of_sources(wheel) != digest_of_sources(first):
            raise ToolError(f"{wheel.name} has other Python files than {first.name}")
    print(f"{release.name}: {len(release.wheels)} wheels are as pinned")


def find_wheels(version: str) -> list[Artefact]:
    """Return the wheels of a version for every Python and machine, in order.

    Raises:
        ToolError: If there are none.
    """
    found: dict[str, Artefact] = {}
    with tempfile.TemporaryDirectory() as folder:
        for python in PYTHONS:
            for machine in MACHINES:
                options = ["--no-deps", "--only-binary=:all:", "--implementation=cp"]
                options += [f"--python-version={python}", f"--abi=cp{python}"]
                for glibc in ("2_34", "2_28", "2_17"):
                    options += [f"--platform=manylinux_{glibc}_{machine}"]
                options += ["--dest", folder]
                try:
                    run_pip(sys.executable, "download", *options, f"sglang=={version}")
                except IndexUnreachable:
                    raise
                except ToolError:
                    say(f"no wheel for Python {python} on {machine}")
        for path in sorted(Path(folder).glob("*.whl")):
            found[path.name] = Artefact(path.name, sha256_of(path))
    if not found:
        raise ToolError(f"there is no wheel of sglang {version}")
    return list(found.values())


def section(name: str, wheels: list[Artefact]) -> str:
    """Return the section of pins.toml for a release that has only wheels."""
    lines = [f'[releases."{name}"]', f'version = "{name.removeprefix("v")}"', "revision = 1"]
    lines += ["", f'[releases."{name}".wheels]']
    lines += [f'"{wheel.file}" = "{wheel.sha256}"' for wheel in wheels]
    return "\n".join(lines) + "\n"


def add(name: str) -> None:
    """Add a release to pins.toml, in its place by age.

    Raises:
        ToolError: If it has no wheels on PyPI.
    """
    say(f"looking for the wheels of {name}")
    added = section(name, find_wheels(name.removeprefix("v")))
    pins = ROOT / "pins.toml"
    text = pins.read_text()
    later = [other for other in release_names() if version_key(other) > version_key(name)]
    end = text.index(f'[releases."{later[0]}"]') if later else len(text)
    before, after = text[:end].rstrip("\n"), text[end:]
    pins.write_text(f"{before}\n\n{added}" + (f"\n{after}" if after else ""))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--release", help="only this release (default: all)")
    parser.add_argument("--find", metavar="VERSION", help="print the pins of a new version")


def main(args: argparse.Namespace) -> int:
    if args.find:
        print(section(f"v{args.find}", find_wheels(args.find)), end="")
        return 0
    for name in [args.release] if args.release else release_names():
        check(load_release(name))
    return 0
