"""The wheel of the release under test: what is in it, and that it is the same everywhere."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import pytest
import requests

from testbed.project import build, expect_refusal, say_what_it_is, series_patches
from testbed.release import LOCAL_VERSION, ROOT, STOCK_WHEEL, UPSTREAM, VERSION, WHEEL
from testbed.server import Server


def test_builds_are_the_same_bytes_in_two_folders(project: Path) -> None:
    assert build(project) == (ROOT / "dist" / WHEEL).read_bytes()
    assert build(project) == (ROOT / "dist" / WHEEL).read_bytes()


def test_only_the_series_differs_from_the_stock_wheel() -> None:
    def read(path: Path, version: str) -> dict[str, bytes]:
        with zipfile.ZipFile(path) as archive:
            info = f"sglang-{version}.dist-info/"
            names = [name for name in archive.namelist() if not name.endswith("/")]
            return {name.replace(info, "info/"): archive.read(name) for name in names}

    stock = read(ROOT / "build" / "downloads" / STOCK_WHEEL, VERSION)
    ours = read(ROOT / "dist" / WHEEL, LOCAL_VERSION)
    manifest = json.loads(ours["sglang/PATCHES.json"])
    different = {n for n in stock.keys() | ours.keys() if stock.get(n) != ours.get(n)}
    assert different == {
        *manifest["files"],
        "sglang/_version.py",
        "info/METADATA",
        "info/RECORD",
        "sglang/PATCHES.json",
        "info/licenses/NOTICE",
    }
    assert ours["info/METADATA"] == stock["info/METADATA"].replace(
        f"\nVersion: {VERSION}\n".encode(), f"\nVersion: {LOCAL_VERSION}\n".encode()
    )
    notice = ours["info/licenses/NOTICE"].decode()
    assert all(file in notice for file in manifest["files"])


def test_record_is_right() -> None:
    with zipfile.ZipFile(ROOT / "dist" / WHEEL) as archive:
        names = archive.namelist()
        record = next(n for n in names if n.endswith(".dist-info/RECORD"))
        rows = list(csv.reader(archive.read(record).decode().splitlines()))
        assert sorted(row[0] for row in rows) == sorted(names)
        for name, digest, size in rows:
            if name != record:
                data = archive.read(name)
                encoded = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
                assert (digest, int(size)) == (f"sha256={encoded.decode().rstrip('=')}", len(data))


def sha256_of_series() -> str:
    """As anyone can compute it."""
    command = f"cd patches && cat $(cat {UPSTREAM}/series) | sha256sum"
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    return result.stdout.split()[0]


def test_the_installed_wheel_says_what_it_is() -> None:
    version, patches, *listing = say_what_it_is()
    assert version == LOCAL_VERSION
    assert patches.endswith(f"patches, series {sha256_of_series()[:12]}")
    for patch in series_patches(ROOT):
        [line] = [line for line in listing if f"  {patch.parent.name}/{patch.name}  " in line]
        assert hashlib.sha256(patch.read_bytes()).hexdigest()[:16] in line


@pytest.mark.parametrize("server", ["default"], indirect=True)
def test_the_server_says_what_it_is(server: Server) -> None:
    info = requests.get(f"{server.url}/get_server_info", timeout=30).json()
    assert info["version"] == LOCAL_VERSION
    assert info["patches"] == {
        "release": UPSTREAM,
        "series": [f"{patch.parent.name}/{patch.name}" for patch in series_patches(ROOT)],
        "series_sha256": sha256_of_series(),
    }


def test_compiled_extensions_are_untouched() -> None:
    """Where there are any, they are there, and what was not patched is as in stock."""
    with (
        zipfile.ZipFile(ROOT / "build" / "downloads" / STOCK_WHEEL) as stock,
        zipfile.ZipFile(ROOT / "dist" / WHEEL) as ours,
    ):
        extensions = [name for name in stock.namelist() if name.endswith(".so")]
        assert bool(extensions) == ("py3-none-any" not in WHEEL)
        assert all(stock.read(name) == ours.read(name) for name in extensions)


def test_a_python_without_a_stock_wheel(project: Path) -> None:
    if "py3-none-any" in WHEEL:
        pytest.skip(f"the wheel of {UPSTREAM} is for every Python")
    args = f"--release {UPSTREAM} --python-version 3.9"
    expect_refusal(project, [UPSTREAM, "3.9", "3.11 on x86_64", "3.13 on aarch64"], args=args)


def test_a_wheel_with_another_hash(project: Path) -> None:
    pins = project / "pins.toml"
    digest = hashlib.sha256((ROOT / "build" / "downloads" / STOCK_WHEEL).read_bytes()).hexdigest()
    text = pins.read_text()
    assert digest in text
    pins.write_text(text.replace(digest, "0" * 64))
    args = f"--release {UPSTREAM}"
    expect_refusal(project, [STOCK_WHEEL, digest, "0" * 64], args=args)
