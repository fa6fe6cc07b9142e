"""Put the patched wheel over the SGLang of an environment, or with --undo the stock one back.

Refuses if the SGLang there is of another release, or is not what its wheel contained. An
editable install has its patches in a source tree: `make apply` goes there, and so does
--in-place. With --replace the wheel takes its place, if the tree is as in the release.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.parse import unquote, urlparse

from tools.apply import DIFF, VERSION, blob_of, find_tree, pristine_blobs, put_on
from tools.build import MANIFEST
from tools.common import ROOT, ToolError, run, say
from tools.releases import Release, fetch, load_release, release_of_version

# Runs in the other environment: says which SGLang is there and what was changed in it.
INSPECT = """
import base64, hashlib, importlib.metadata as metadata, importlib.util as util
import json, os, platform, sys
try:
    found = metadata.distribution("sglang")
except metadata.PackageNotFoundError:
    sys.exit(print("null"))
def is_changed(file):
    if file.hash is None or file.hash.mode != "sha256":
        return False
    try:
        digest = hashlib.sha256(file.locate().read_bytes()).digest()
    except OSError:
        return True
    return base64.urlsafe_b64encode(digest).decode().rstrip("=") != file.hash.value
url = json.loads(found.read_text("direct_url.json") or "{}")
site = str(found.locate_file(""))
print(json.dumps({
    "version": found.version,
    "python": "%d.%d" % sys.version_info[:2],
    "machine": platform.machine(),
    "editable": url["url"] if url.get("dir_info", {}).get("editable") else None,
    "changed": [str(file) for file in found.files or [] if is_changed(file)],
    "site": site,
    "writable": os.access(site, os.W_OK),
    "has_pip": util.find_spec("pip") is not None,
}))
"""


@dataclasses.dataclass(frozen=True)
class Installed:
    """The SGLang of an environment.

    Attributes:
        python: The Python as the user named it.
        version: E.g. "0.5.9" or "0.5.9+tokenids.1".
        python_version: E.g. "3.11".
        machine: E.g. "x86_64".
        editable: The folder of an editable install, None for a wheel.
        changed: The files of the wheel that are not as they were installed.
        site: The folder that it is installed in.
        has_pip: Whether the environment has pip.
    """

    python: str
    version: str
    python_version: str
    machine: str
    editable: Path | None
    changed: list[str]
    site: Path
    has_pip: bool

    @property
    def tree(self) -> Path:
        """The source tree of an editable install: a checkout, whose python/ is installed."""
        assert self.editable is not None
        return self.editable.parent if self.editable.name == "python" else self.editable


def inspect(python: str) -> Installed:
    """Look at the SGLang of an environment.

    Raises:
        ToolError: If there is none, or it cannot be replaced by this user.
    """
    found = json.loads(run([python, "-c", INSPECT]))
    if found is None:
        raise ToolError(
            f"there is no sglang for {python} to replace: name an environment with PYTHON="
        )
    if not found["writable"]:
        raise ToolError(
            f"{found['site']}, where the sglang of {python} is, is not writable: "
            "run this as its owner, or as root"
        )
    url = found["editable"]
    return Installed(
        python=python,
        version=found["version"],
        python_version=found["python"],
        machine=found["machine"],
        editable=Path(unquote(urlparse(url).path)) if url else None,
        changed=found["changed"],
        site=Path(found["site"]),
        has_pip=found["has_pip"],
    )


def check_replaceable(installed: Installed) -> None:
    """Raise a ToolError if the files of a wheel have been changed."""
    if (installed.site / "sglang" / DIFF).exists():
        raise ToolError(
            f"the series is on the sglang of {installed.python} in place: "
            f"run `make unapply TREE={installed.site}` first"
        )
    if installed.changed:
        raise ToolError(
            f"the sglang of {installed.python} has local changes, in {len(installed.changed)} "
            f"files: {installed.changed[0]}"
        )


def check_tree(installed: Installed, release: Release, wheel: Path) -> None:
    """Raise a ToolError if an editable tree has anything that the release does not have."""
    tree = find_tree(installed.tree)
    if (tree.root / ".git").exists():
        status = run(["git", "-c", f"safe.directory={tree.root}", "status", "--short"], tree.root)
        if status:
            raise ToolError(f"{tree.root} is not clean: {status.splitlines()[0].strip()}")
    with zipfile.ZipFile(wheel) as archive:
        ours = json.loads(archive.read(f"sglang/{MANIFEST}"))["files"]
        pristine = pristine_blobs(release)
        for name in archive.namelist():
            is_python = name.startswith("sglang/") and name.endswith(".py")
            if not is_python or name.endswith(f"/{VERSION}"):
                continue
            path = tree.path_of(f"python/{name}")
            if name not in ours:
                same = path.is_file() and path.read_bytes() == archive.read(name)
            else:
                same = blob_of(path) == pristine.get(f"python/{name}")
            if not same:
                raise ToolError(f"{path} is not as in {release.name}: the wheel would lose that")


def wheel_for(installed: Installed, release: Release, replace: bool) -> Path:
    """Return the built wheel that may replace what is there.

    Raises:
        ToolError: If there is none or it may not.
    """
    if installed.editable is not None and not replace:
        tree = shlex.quote(str(installed.tree))
        raise ToolError(
            f"the sglang of {installed.python} is an editable install: run "
            f"`make apply TREE={tree}` to patch that tree, or `make install "
            f"PYTHON={installed.python} ARGS=--replace` to "
            "put the wheel in its place"
        )
    if installed.editable is None:
        if installed.version.partition("+")[0] != release.version:
            raise ToolError(
                f"the sglang of {installed.python} is {installed.version}, but the wheel is for "
                f"{release.version}"
            )
        check_replaceable(installed)
    wheel = release.built_wheel(installed.python_version, installed.machine)
    if not wheel.exists():
        raise ToolError(f"there is no {wheel.relative_to(ROOT)}: run `make wheel`")
    if installed.editable is not None:
        check_tree(installed, release, wheel)
    return wheel


def stock_wheel_for(installed: Installed) -> Path:
    """Return the stock wheel of the patched one that is installed.

    Raises:
        ToolError: If what is installed is not the patched wheel.
    """
    if installed.editable is not None:
        tree = shlex.quote(str(installed.tree))
        raise ToolError(
            f"the sglang of {installed.python} is an editable install: run "
            f"`make unapply TREE={tree}` to take the series off that tree"
        )
    version, _, local = installed.version.partition("+")
    if not local.startswith("tokenids."):
        raise ToolError(f"the sglang of {installed.python} is {installed.version}, not patched")
    check_replaceable(installed)
    release = release_of_version(version)
    if release is None:
        raise ToolError(f"pins.toml has no release {version}")
    return fetch(release, release.stock_wheel(installed.python_version, installed.machine))


def put_wheel(installed: Installed, wheel: Path) -> None:
    """Install a wheel with pip, or with uv where there is no pip.

    Raises:
        ToolError: If there is neither, or it fails.
    """
    if installed.has_pip:
        command = [installed.python, "-m", "pip", "install", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--no-index", "--force-reinstall"]
    elif uv := shutil.which("uv"):
        command = [uv, "pip", "install", "--quiet", "--no-deps", "--no-index", "--reinstall"]
        command += ["--python", installed.python]
    else:
        raise ToolError(f"{installed.python} has no pip, and uv is not on PATH")
    # An image's own Python, where SGLang is already, is to have it again, as root or not.
    env = {**os.environ, "PIP_BREAK_SYSTEM_PACKAGES": "1", "UV_BREAK_SYSTEM_PACKAGES": "1"}
    env |= {"PIP_ROOT_USER_ACTION": "ignore", "PIP_USER": "0"}
    say(f"installing {wheel.name}")
    if subprocess.run([*command, str(wheel)], env=env, stdout=sys.stderr).returncode != 0:
        raise ToolError(f"{'pip' if installed.has_pip else 'uv'} did not install {wheel.name}")


def install(python: str, release: Release, replace: bool) -> None:
    installed = inspect(python)
    put_wheel(installed, wheel_for(installed, release, replace))
    print(f"{python}: sglang {release.local_version} in place of {installed.version}")
    if installed.editable is not None:
        print(f"undo: {python} -m pip install --no-deps -e {shlex.quote(str(installed.editable))}")
    else:
        print(f"undo: make uninstall PYTHON={python}")


def uninstall(python: str) -> None:
    installed = inspect(python)
    put_wheel(installed, stock_wheel_for(installed))
    print(f"{python}: sglang {installed.version.partition('+')[0]}, the stock wheel")


def install_in_place(python: str, release: Release) -> None:
    """Put the series on the tree of an editable install, or the wheel over another."""
    installed = inspect(python)
    if installed.editable is None:
        return install(python, release, replace=False)
    put_on(installed.tree, release.name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--release", help="a release of pins.toml (default: its default)")
    parser.add_argument("--python", default="python", help="the environment's Python")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--replace", action="store_true", help="also an editable install")
    what.add_argument(
        "--in-place", action="store_true", help="patch the tree of an editable install"
    )
    what.add_argument("--undo", action="store_true", help="put the stock wheel back")


def main(args: argparse.Namespace) -> int:
    if args.undo:
        uninstall(args.python)
    elif args.in_place:
        install_in_place(args.python, load_release(args.release))
    else:
        install(args.python, load_release(args.release), args.replace)
    return 0
