"""The benchmarks run and their report builds. Nothing is said about time."""

from __future__ import annotations

import html
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench import report, serving_layer, weight_broadcast, whole_server
from bench.common import AGENTCORE_RELEASE
from testbed.pool import ServerPool
from testbed.release import ROOT, UPSTREAM

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        UPSTREAM != AGENTCORE_RELEASE,
        reason="the alternatives it measures are for v0.5.9",
    ),
]

SHORT = {
    "serving_layer": ["--tokens", "8,16", "--rounds", "1"],
    "whole_server": ["--clients=2", "--rounds=1", "--output-tokens=8", "--modes=streamed"],
    "weight_broadcast": ["--transport-only", "--rounds=1", "--mib=8", "--buckets=4"],
    "logit_processors": ["--requests=4", "--vocabulary=2048", "--masks=1,4", "--rounds=1"],
    "memory": ["--streams=2", "--tokens=16", "--requests=10", "--variants=ids"],
}


def run(module: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"bench.{module}", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, servers: ServerPool) -> Path:
    folder = tmp_path_factory.mktemp("results")
    urls = [f"--stock={servers.get('stock').url}", f"--patched={servers.get('default').url}"]

    def measure(module: str) -> None:
        more = urls if module == "whole_server" else []
        result = run(module, *SHORT[module], *more, "--json", str(folder / f"{module}.json"))
        assert result.returncode == 0, result.stdout + result.stderr

    with ThreadPoolExecutor(len(SHORT)) as pool:
        list(pool.map(measure, SHORT))
    return folder


@pytest.mark.parametrize("server", ["default"])
def test_every_variant_is_measured(results: Path, server: str) -> None:
    rows = json.loads((results / "serving_layer.json").read_text())["rows"]
    expected = {*serving_layer.VARIANTS, serving_layer.FLOOR}
    for endpoint, stream in serving_layer.CASES:
        case = f"{endpoint}, {'streamed' if stream else 'whole'}"
        for tokens in (8, 16):
            found = [r for r in rows if r["case"] == case and r["tokens"] == tokens]
            assert {row["variant"] for row in found} == expected
            assert all(len(row["values"]) == len(row["ratios"]) == 1 for row in found)

    rows = json.loads((results / "whole_server.json").read_text())["rows"]
    assert {row["variant"] for row in rows} == {name for name, _, _ in whole_server.PAIR}
    assert all(value > 0 for row in rows for value in row["values"])

    rows = json.loads((results / "weight_broadcast.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == [weight_broadcast.BARE, weight_broadcast.ANNOUNCED]

    rows = json.loads((results / "logit_processors.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["no mask", "1 mask", "4 masks"]


@pytest.mark.parametrize("server", ["default"])
def test_the_report_builds(results: Path, tmp_path: Path, server: str) -> None:
    result = run("report", "--results", str(results), "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "report.md").read_text()
    for name in serving_layer.VARIANTS:
        assert f"| {name} |" in page
    pictures = list(tmp_path.glob("serving_layer-*.png"))
    assert len(pictures) == len(serving_layer.CASES)
    assert all(picture.name in page for picture in pictures)
    bars = (tmp_path / report.CHART).read_text()
    assert all(f">{html.escape(label)}<" in bars for label in report.BARS.values())
    assert bars.count("<rect") == len(report.BARS) and bars.count("×") == len(report.BARS)


@pytest.mark.parametrize(
    ("module", "args", "words"),
    [
        ("serving_layer", ["--tokens", "many"], ["--tokens", "'many'"]),
        ("whole_server", ["--stock", "http://localhost:1"], ["--stock", "--patched"]),
        ("whole_server", ["--clients", "x"], ["--clients", "'x'"]),
        ("weight_broadcast", ["--buckets", "x"], ["--buckets", "'x'"]),
        ("weight_broadcast", ["--models", "1b,9b"], ["--models", "'9b'", "1b, 7b"]),
        ("logit_processors", ["--masks=1,200"], ["--masks", "1 to 128"]),
        ("http_process", ["--rates", "fast"], ["--rates", "'fast'"]),
        ("http_process", ["--variants", "stok"], ["--variants", "'stok'", "'stock'"]),
        ("http_process", ["--package", "x=/nonexistent"], ["--package", "NAME=FOLDER"]),
        ("report", ["--results", "/nonexistent"], ["no results", "make bench"]),
    ],
)
def test_bad_usage_is_refused(module: str, args: list[str], words: list[str]) -> None:
    result = run(module, *args)
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert all(word in last for word in words)
