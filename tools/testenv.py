"""Make the environment that the tests of a release run in.

It holds the patched wheel, what the CPU engine of SGLang imports, the clients, and
pytest, in build/env-<release>. The stock wheel is unpacked beside it, to be put in front
of the patched one with PYTHONPATH. Everything is made once and kept until a pin changes.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

from releases import BUILD, ROOT, Release, ToolError, fetch, load_release, run, say, sha256_of

TESTS = ROOT / "tests"
STANDINS = ROOT / "testbed" / "standins.py"
# The one that comes with Python 3.11 takes twice as long.
PIP = "pip==26.3"
# Installed with its dependencies: which ones it has depends on the build that pip finds.
TORCH = "torch==2.13.0"


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


def pip(env: Path, *args: str) -> None:
    python = str(env / "bin" / "python")
    run([python, "-m", "pip", "--quiet", "--disable-pip-version-check", *args])


def make_environment(release: Release, env: Path) -> None:
    """Make the environment unless it is there and up to date."""
    stamp = env / "stamp"
    requirements = requirements_of(release)
    inputs = hashlib.sha256(f"{PIP}\n{TORCH}\n{sys.version}\n{requirements}".encode()).hexdigest()
    if not (stamp.exists() and stamp.read_text() == inputs):
        say(f"making {env.relative_to(ROOT)}")
        shutil.rmtree(env, ignore_errors=True)
        venv.create(env, with_pip=True, symlinks=True)
        pip(env, "install", PIP)
        say(f"installing {TORCH}")
        pip(env, "install", "--no-compile", TORCH)
        say(f"installing {len(requirements.splitlines())} packages")
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write(requirements)
            file.flush()
            pip(env, "install", "--no-compile", "--no-deps", "--requirement", file.name)
        stamp.write_text(inputs)
    [site] = (env / "lib").glob("python*/site-packages")
    shutil.copy(STANDINS, site / "cpu_engine_standins.py")
    (site / "cpu_engine_standins.pth").write_text("import cpu_engine_standins\n")


def install_wheel(env: Path, wheel: Path) -> None:
    """Install the patched wheel unless the same bytes are installed."""
    stamp = env / "wheel-stamp"
    digest = sha256_of(wheel)
    if stamp.exists() and stamp.read_text() == digest:
        return
    say(f"installing {wheel.name}")
    stamp.unlink(missing_ok=True)
    pip(env, "install", "--no-compile", "--no-deps", "--force-reinstall", str(wheel))
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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--release", help="a release of pins.toml (default: its default)")
    args = parser.parse_args()
    try:
        release = load_release(args.release)
        wheel = release.built_wheel()
        if not wheel.exists():
            raise ToolError(f"there is no {wheel.relative_to(ROOT)}: run `make wheel`")
        env = BUILD / f"env-{release.name}"
        make_environment(release, env)
        install_wheel(env, wheel)
        unpack_stock(release)
    except ToolError as e:
        print(f"testenv: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
