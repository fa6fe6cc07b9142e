"""Build the patched wheel of a release.

The stock wheel, with upstream's source and the series in place of its Python files, written
in a fixed order with fixed times and modes, so that the same inputs give the same bytes
anywhere. The source is the submodule if that is checked out, and else what the wheel has.
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
import tempfile
import time
import zipfile
from pathlib import Path

from tools.common import DIST, say, sha256_of
from tools.releases import Release, extract_source, fetch, is_source, load_release
from tools.series import Patch, apply_series, sha256_of_series

# In the package, what `python -m sglang.patches` prints.
MANIFEST = "PATCHES.json"
# The earliest time that a zip archive can hold.
ZIP_TIME = (1980, 1, 1, 0, 0, 0)

NOTICE = """\
This is SGLang {version}, a modified version of SGLang {upstream}, {source},
which is licensed under the Apache License, Version 2.0; see LICENSE.

It was modified by applying a series of patches. They are by:

{authors}

and change or add these files:

{files}

`python -m sglang.patches` lists the patches and their hashes.
"""


def manifest_of(release: Release, patches: list[Patch]) -> bytes:
    """Return the content of the manifest."""
    manifest = {
        "release": release.name,
        "version": release.local_version,
        "upstream_commit": release.commit,
        "series_sha256": sha256_of_series(patches),
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
    return (json.dumps(manifest, indent=2) + "\n").encode()


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


def replace_source(entries: dict[str, bytes], tree: Path, patches: list[Patch]) -> None:
    """Put the patched tree in place of the source in a wheel.

    What the wheel alone has stays (compiled extensions, generated files), and what the tree
    alone has is upstream's to leave out, unless it is of the series.
    """
    for name in filter(is_source, list(entries)):
        path = tree / "python" / name
        if path.exists():
            entries[name] = path.read_bytes()
    for name in packaged_files(patches):
        path = tree / "python" / name
        if path.exists():
            entries[name] = path.read_bytes()
        else:
            del entries[name]


def differing_files(entries: dict[str, bytes], tree: Path) -> list[str]:
    """Return the source files that both a wheel and a tree have and that differ."""
    return [
        name
        for name in filter(is_source, sorted(entries))
        if (tree / "python" / name).exists()
        and (tree / "python" / name).read_bytes() != entries[name]
    ]


def with_local_version(entries: dict[str, bytes], release: Release) -> dict[str, bytes]:
    """Return the files of a wheel with the version of our build, and the names that have it."""
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
    text = re.sub(
        r"(?m)^(__version__ = version = ')[^']+(')$", rf"\g<1>{release.local_version}\g<2>", text
    )
    local = release.local_version.partition("+")[2]
    return re.sub(
        r"(?m)^(__version_tuple__ = version_tuple = \(.+)\)$", rf"\g<1>, '{local}')", text
    )


def build(release: Release, python: str | None, machine: str | None) -> tuple[Path, list[Patch]]:
    """Build the wheel of a release for a Python and a machine into dist/.

    Returns:
        The wheel, and the series that it has.
    """
    stock = release.stock_wheel(python, machine)
    wheel = release.built_wheel(python, machine)
    # A wheel of an earlier series must not be taken for that of this one.
    wheel.unlink(missing_ok=True)
    entries = read_wheel(fetch(release, stock))
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "source"
        extract_source(release, tree)
        for name in differing_files(entries, tree):
            say(f"{name} differs from that of {stock.file}")
        patches = apply_series(release, tree)
        replace_source(entries, tree, patches)
    entries = with_local_version(entries, release)
    info = f"sglang-{release.local_version}.dist-info"
    entries[f"sglang/{MANIFEST}"] = manifest_of(release, patches)
    entries[f"{info}/licenses/NOTICE"] = notice_of(release, patches).encode()
    write_wheel(wheel, entries)
    return wheel, patches


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--release", help="a release of pins.toml (default: its default)")
    parser.add_argument("--python-version", help="e.g. 3.12 (default: this Python's)")
    parser.add_argument("--machine", help="e.g. aarch64 (default: this machine's)")


def main(args: argparse.Namespace) -> int:
    start = time.monotonic()
    wheel, patches = build(load_release(args.release), args.python_version, args.machine)
    say(f"done in {time.monotonic() - start:.0f} s")
    name = wheel.relative_to(DIST.parent)
    print(
        f"wheel    {name}\nsha256   {sha256_of(wheel)}\nseries   {sha256_of_series(patches)[:12]}"
    )
    print(f"install  pip install --no-deps --force-reinstall {name}")
    return 0
