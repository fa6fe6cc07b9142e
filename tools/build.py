"""Build the patched wheel of a release.

Pristine source, the series, upstream's own PEP 517 build, and then a wheel written with
fixed order, times and modes, so that the same inputs give the same bytes anywhere. For a
release that has only wheels, with compiled extensions inside, the patched files go into
the stock wheel instead of being built.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

from releases import (
    BUILD,
    DIST,
    Artefact,
    Release,
    ToolError,
    build_requirements,
    extract_source,
    fetch,
    git_environment,
    load_release,
    run,
    say,
    sha256_of,
)
from series import Patch, apply_series, make_repository

# The earliest time that a zip archive can hold.
ZIP_TIME = (1980, 1, 1, 0, 0, 0)
SOURCE_DATE_EPOCH = "315532800"

NOTICE = """\
This is SGLang {version}, a modified version of SGLang {upstream}, {source},
which is licensed under the Apache License, Version 2.0; see LICENSE.

It was modified by applying a series of patches. They are by:

{authors}

and change or add these files:

{files}

`python -m sglang.patches` lists the patches and their hashes.
"""


def build_environment() -> Path:
    """Return the Python of an environment with the pinned build requirements."""
    env = BUILD / "venv-build"
    python = env / "bin" / "python"
    stamp = env / "stamp"
    requirements = build_requirements()
    wanted = "\n".join([sys.version, *requirements])
    if not (stamp.exists() and stamp.read_text() == wanted):
        say(f"installing {', '.join(requirements)}")
        shutil.rmtree(env, ignore_errors=True)
        venv.create(env, with_pip=True, symlinks=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
        run([*command, "--disable-pip-version-check", *requirements])
        stamp.write_text(wanted)
    return python


def build_upstream_wheel(release: Release, tree: Path, target: Path) -> Path:
    """Run upstream's build of a tree and return the wheel."""
    python = build_environment()
    # setuptools-scm lists the files of the package with git.
    make_repository(tree)
    env = git_environment(isolated_below=tree.parent)
    env |= {
        "SETUPTOOLS_SCM_PRETEND_VERSION_FOR_SGLANG": release.local_version,
        "SOURCE_DATE_EPOCH": SOURCE_DATE_EPOCH,
        "PYTHONHASHSEED": "0",
    }
    say("building the wheel")
    command = [str(python), "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--no-index", f"--wheel-dir={target}", "."]
    run(command, cwd=tree / "python", env=env)
    [wheel] = target.glob("*.whl")
    return wheel


def manifest_of(release: Release, patches: list[Patch]) -> dict[str, object]:
    """Return what `python -m sglang.patches --json` prints."""
    return {
        "release": release.name,
        "version": release.local_version,
        "upstream_commit": release.commit,
        "series": [
            {
                "file": patch.name,
                "subject": patch.subject,
                "sha256": patch.sha256,
                "forwarded": patch.forwarded,
            }
            for patch in patches
        ],
        "files": packaged_files(patches),
    }


def packaged_files(patches: list[Patch]) -> list[str]:
    """Return the files of the wheel that the series changes."""
    files = {file for patch in patches for file in patch.files}
    prefix = "python/"
    return sorted(f.removeprefix(prefix) for f in files if f.startswith(prefix + "sglang/"))


def notice_of(release: Release, patches: list[Patch]) -> str:
    """Return the notice of modified files that section 4(b) of the licence asks for."""
    authors = set()
    for patch in patches:
        header = re.sub(r"\n[ \t]+", " ", patch.path.read_text().partition("\n\n")[0])
        authors.update(re.findall(r"^From: (.+)$", header, re.MULTILINE))
    return NOTICE.format(
        version=release.local_version,
        upstream=release.version,
        source=f"commit {release.commit}" if release.commit else "as released on PyPI",
        authors="\n".join(f"  {author}" for author in sorted(authors)),
        files="\n".join(f"  {file}" for file in packaged_files(patches)),
    )


def write_wheel(path: Path, entries: dict[str, bytes]) -> None:
    """Write a wheel whose bytes depend on nothing but its entries.

    Args:
        path: The wheel. It appears at once, when it is complete.
        entries: The files by their name. Any RECORD among them is written anew.
    """
    [record] = [name for name in entries if name.endswith(".dist-info/RECORD")]
    lines = io.StringIO()
    rows = csv.writer(lines, lineterminator="\n")
    for name in sorted(entries):
        if name == record:
            continue
        digest = base64.urlsafe_b64encode(hashlib.sha256(entries[name]).digest())
        rows.writerow([name, f"sha256={digest.decode().rstrip('=')}", len(entries[name])])
    rows.writerow([record, "", ""])
    entries = {**entries, record: lines.getvalue().encode()}

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    # The metadata comes last, as the wheel specification recommends.
    names = sorted(entries, key=lambda name: (".dist-info/" in name, name == record, name))
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name in names:
            info = zipfile.ZipInfo(name, ZIP_TIME)
            info.external_attr = 0o100644 << 16
            info.create_system = 3
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, entries[name])
    unfinished.replace(path)


def read_wheel(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {i.filename: archive.read(i) for i in archive.infolist() if not i.is_dir()}


def patch_stock_wheel(
    release: Release, stock: Artefact, tree: Path, patches: list[Patch]
) -> dict[str, bytes]:
    """Return the files of a stock wheel with those of the series and the version replaced."""
    entries = read_wheel(fetch(release, stock))
    for file in packaged_files(patches):
        path = tree / "python" / file
        if path.exists():
            entries[file] = path.read_bytes()
        else:
            del entries[file]
    old, new = (f"sglang-{v}.dist-info/" for v in (release.version, release.local_version))
    entries = {n.replace(old, new, 1) if n.startswith(old) else n: entries[n] for n in entries}
    for name in (f"{new}METADATA", "sglang/_version.py"):
        if name in entries:
            entries[name] = with_version(entries[name].decode(), release).encode()
    return entries


def with_version(text: str, release: Release) -> str:
    """Return the text of METADATA or _version.py with the version of our build."""
    own = re.escape(release.version)
    text = re.sub(rf"(?m)^(Version: ){own}$", rf"\g<1>{release.local_version}", text, count=1)
    return re.sub(
        r"(?m)^(__version__ = version = ')[^']+(')$", rf"\g<1>{release.local_version}\g<2>", text
    )


def build(release: Release, python: str | None = None, machine: str | None = None) -> Path:
    """Build the wheel of a release for a Python and a machine into dist/ and return it."""
    stock = release.stock_wheel(python, machine)
    wheel = release.built_wheel(python, machine)
    # A wheel of an earlier series must not be taken for that of this one.
    wheel.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        extract_source(release, scratch / "source")
        patches = apply_series(release, scratch / "source")
        if release.sdist is None:
            entries = patch_stock_wheel(release, stock, scratch / "source", patches)
        else:
            built = build_upstream_wheel(release, scratch / "source", scratch / "wheel")
            if built.name != wheel.name:
                raise ToolError(f"the build gave {built.name} instead of {wheel.name}")
            entries = read_wheel(built)
        info = f"sglang-{release.local_version}.dist-info"
        manifest = json.dumps(manifest_of(release, patches), indent=2) + "\n"
        entries["sglang/PATCHES.json"] = manifest.encode()
        entries[f"{info}/licenses/NOTICE"] = notice_of(release, patches).encode()
        write_wheel(wheel, entries)
    return wheel


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--release", help="a release of pins.toml (default: its default)")
    parser.add_argument("--python-version", help="e.g. 3.12 (default: this Python's)")
    parser.add_argument("--machine", help="e.g. aarch64 (default: this machine's)")
    args = parser.parse_args()
    start = time.monotonic()
    try:
        wheel = build(load_release(args.release), args.python_version, args.machine)
    except ToolError as e:
        print(f"build: {e}", file=sys.stderr)
        return 1
    say(f"done in {time.monotonic() - start:.0f} s")
    name = wheel.relative_to(DIST.parent)
    print(f"wheel    {name}\nsha256   {sha256_of(wheel)}")
    print(f"install  pip install --no-deps --force-reinstall {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
