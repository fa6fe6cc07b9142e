"""Releases of SGLang and their sources, as pinned in pins.toml."""

from __future__ import annotations

import dataclasses
import platform
import re
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

from tools.common import (
    BUILD,
    DIST,
    PATCHES,
    ROOT,
    ToolError,
    git_environment,
    run,
    run_pip,
    say,
    sha256_of,
)


@dataclasses.dataclass(frozen=True)
class Artefact:
    """A file on PyPI."""

    file: str
    sha256: str

    @property
    def tags(self) -> tuple[str, str, str]:
        """The Python, ABI and platform tags of a wheel."""
        python, abi, platform_ = self.file.removesuffix(".whl").split("-")[-3:]
        return python, abi, platform_


@dataclasses.dataclass(frozen=True)
class Release:
    """A release of upstream and our revision of its patches.

    Attributes:
        name: The tag, e.g. "v0.5.9".
        version: The version on PyPI, e.g. "0.5.9".
        revision: The number of our build, counted from 1.
        commit: The commit of the tag, None if it is not known.
        wheels: The stock wheels: one for all, or one for each Python and machine.
    """

    name: str
    version: str
    revision: int
    commit: str | None
    wheels: tuple[Artefact, ...]

    @property
    def local_version(self) -> str:
        return f"{self.version}+tokenids.{self.revision}"

    @property
    def patches(self) -> Path:
        return PATCHES / self.name

    @property
    def build(self) -> Path:
        return BUILD / self.name

    def stock_wheel(self, python: str | None = None, machine: str | None = None) -> Artefact:
        """Return the stock wheel for a Python and a machine.

        Args:
            python: E.g. "3.11"; None for the one that runs this.
            machine: E.g. "x86_64"; None for this one.

        Raises:
            ToolError: If there is none.
        """
        python = python or f"{sys.version_info.major}.{sys.version_info.minor}"
        machine = machine or platform.machine()
        for wheel in self.wheels:
            tag, _, platform_ = wheel.tags
            if platform_ == "any" or (
                tag == f"cp{python.replace('.', '')}" and platform_.endswith(f"_{machine}")
            ):
                return wheel
        known = [f"{tag[2]}.{tag[3:]} on {p.split('_', 3)[3]}" for tag, _, p in self.tags]
        raise ToolError(
            f"{self.name} has no stock wheel for Python {python} on {machine}; "
            f"there are wheels for {', '.join(known)}"
        )

    @property
    def tags(self) -> list[tuple[str, str, str]]:
        return [wheel.tags for wheel in self.wheels]

    def built_wheel(self, python: str | None = None, machine: str | None = None) -> Path:
        """Return where the patched wheel for a Python and a machine is built."""
        stock = self.stock_wheel(python, machine)
        return DIST / stock.file.replace(f"-{self.version}-", f"-{self.local_version}-", 1)


def read_pins(root: Path = ROOT) -> dict[str, object]:
    with (root / "pins.toml").open("rb") as file:
        return tomllib.load(file)


def load_release(name: str | None) -> Release:
    """Return a pinned release, the default one for None.

    Args:
        name: Its tag, with or without the v.

    Raises:
        ToolError: If there is no such release.
    """
    pins = read_pins()
    releases = pins["releases"]
    assert isinstance(releases, dict)
    name = name or str(pins["default"])
    if f"v{name}" in releases:
        name = f"v{name}"
    if name not in releases:
        raise ToolError(f"unknown release {name!r}; known: {', '.join(releases)}")
    fields = dict(releases[name])
    wheels = tuple(Artefact(file, sha256) for file, sha256 in fields.pop("wheels").items())
    commit = fields.pop("commit", None)
    return Release(name=name, commit=commit, wheels=wheels, **fields)


def version_key(name: str) -> list[int]:
    """Return what sorts releases by age: the numbers in the name, e.g. of "v0.5.12.post1"."""
    return [int(number) for number in re.findall(r"\d+", name)]


def release_names() -> list[str]:
    """Return the pinned releases, oldest first."""
    releases = read_pins()["releases"]
    assert isinstance(releases, dict)
    return list(releases)


def release_of_version(version: str) -> Release | None:
    """Return the pinned release of a version on PyPI, None if there is none."""
    releases = map(load_release, release_names())
    return next((release for release in releases if release.version == version), None)


def check_sha256(path: Path, artefact: Artefact) -> None:
    actual = sha256_of(path)
    if actual != artefact.sha256:
        raise ToolError(f"{artefact.file} has sha256 {actual}, but pins.toml has {artefact.sha256}")


def fetch(release: Release, artefact: Artefact) -> Path:
    """Return an artefact of the release, downloaded with pip unless it already is.

    Raises:
        ToolError: If it cannot be had or has another hash.
    """
    path = BUILD / "downloads" / artefact.file
    if not path.exists():
        say(f"downloading {artefact.file}")
        kind = ["--only-binary=:all:"]
        python, abi, platform_ = artefact.tags
        if platform_ != "any":
            kind += [f"--python-version={python.removeprefix('cp')}", "--implementation=cp"]
            kind += [f"--abi={abi}", f"--platform={platform_}"]
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            requirement = f"sglang=={release.version}"
            run_pip(sys.executable, "download", "--no-deps", *kind, "--dest", folder, requirement)
            downloaded = Path(folder) / artefact.file
            if not downloaded.exists():
                raise ToolError(f"pip downloaded no {artefact.file} for {requirement}")
            check_sha256(downloaded, artefact)
            downloaded.rename(path)
    check_sha256(path, artefact)
    return path


def submodule_path() -> Path:
    upstream = read_pins()["upstream"]
    assert isinstance(upstream, dict)
    return ROOT / str(upstream["submodule"])


def has_submodule(release: Release) -> bool:
    """Return whether the submodule holds the source of the release.

    It is pinned to the default release. Another one's commit may be checked out there.

    Raises:
        ToolError: If it is not at the commit of the default release, or has changes.
    """
    path = submodule_path()
    if not (path / ".git").exists():
        return False
    env = git_environment()
    head = run(["git", "rev-parse", "HEAD"], cwd=path, env=env).strip()
    if head != release.commit:
        if release.name != read_pins()["default"]:
            return False
        raise ToolError(
            f"the submodule {path.relative_to(ROOT)} is at {head}, but {release.name} is "
            f"{release.commit}: run `git submodule update` or `git submodule deinit` it"
        )
    if run(["git", "status", "--porcelain", "--ignored"], cwd=path, env=env):
        raise ToolError(
            f"the submodule {path.relative_to(ROOT)} has changes: it must stay pristine "
            "(`make patch-tree` makes a tree to work in)"
        )
    return True


def extract_source(release: Release, target: Path) -> None:
    """Put upstream's pristine `python/sglang/` into `target`, which must be new.

    It comes from the submodule if that holds the release, and from its stock wheel if not.
    """
    target.mkdir(parents=True)
    if has_submodule(release):
        extract_submodule(release, target)
    else:
        extract_package(release, target)


def extract_submodule(release: Release, target: Path) -> None:
    assert release.commit is not None
    say(f"source: the submodule at {release.commit[:12]}")
    archive = target / "source.tar"
    command = ["git", "archive", "--format=tar", f"--output={archive}", release.commit]
    run([*command, "python/sglang"], cwd=submodule_path(), env=git_environment())
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    archive.unlink()


def extract_package(release: Release, target: Path) -> None:
    # Which of them does not matter: the Python files are the same in all.
    try:
        stock = release.stock_wheel()
    except ToolError:
        stock = release.wheels[0]
    path = fetch(release, stock)
    say(f"source: {stock.file}")
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if is_source(name)]
        archive.extractall(target / "python", names)


def is_source(name: str) -> bool:
    """Return whether a file of a wheel is upstream's source, or could be."""
    return name.startswith("sglang/") and not name.endswith((".so", "/"))
