"""Make the environment that the tests run in.

It holds the patched wheel, what the CPU engine of SGLang imports, the clients, and
pytest, in build/env. The stock wheel is unpacked beside it, to be put in front of the
patched one with PYTHONPATH. Everything is made once and kept until a pin changes.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import venv
import zipfile
from pathlib import Path

from releases import BUILD, ROOT, Release, ToolError, fetch, load_release, run, say, sha256_of

ENV = BUILD / "env"
REQUIREMENTS = ROOT / "tests" / "requirements.txt"
STANDINS = ROOT / "tests" / "engine" / "standins.py"
# Installed with its dependencies: which ones it has depends on the build that pip finds.
TORCH = "torch==2.13.0"


def pip(*args: str) -> None:
    python = str(ENV / "bin" / "python")
    run([python, "-m", "pip", "--quiet", "--disable-pip-version-check", *args])


def make_environment() -> None:
    """Make build/env unless it is there and up to date."""
    stamp = ENV / "stamp"
    inputs = hashlib.sha256(TORCH.encode() + sys.version.encode() + REQUIREMENTS.read_bytes())
    if not (stamp.exists() and stamp.read_text() == inputs.hexdigest()):
        say("making build/env")
        shutil.rmtree(ENV, ignore_errors=True)
        venv.create(ENV, with_pip=True, symlinks=True)
        say(f"installing {TORCH}")
        pip("install", TORCH)
        say(f"installing {len(REQUIREMENTS.read_text().splitlines())} packages")
        pip("install", "--no-deps", "--requirement", str(REQUIREMENTS))
        stamp.write_text(inputs.hexdigest())
    [site] = (ENV / "lib").glob("python*/site-packages")
    shutil.copy(STANDINS, site / "cpu_engine_standins.py")
    (site / "cpu_engine_standins.pth").write_text("import cpu_engine_standins\n")


def install_wheel(wheel: Path) -> None:
    """Install the patched wheel unless the same bytes are installed."""
    stamp = ENV / "wheel-stamp"
    digest = sha256_of(wheel)
    if stamp.exists() and stamp.read_text() == digest:
        return
    say(f"installing {wheel.name}")
    stamp.unlink(missing_ok=True)
    pip("install", "--no-deps", "--force-reinstall", str(wheel))
    stamp.write_text(digest)


def unpack_stock(release: Release) -> None:
    """Unpack the stock wheel unless it is."""
    target = BUILD / f"stock-{release.name}"
    if target.exists():
        return
    wheel = fetch(release, release.wheel)
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
        wheel = release.built_wheel
        if not wheel.exists():
            raise ToolError(f"there is no {wheel.relative_to(ROOT)}: run `make wheel`")
        make_environment()
        install_wheel(wheel)
        unpack_stock(release)
    except ToolError as e:
        print(f"testenv: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
