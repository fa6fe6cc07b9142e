"""What the benchmarks share: the packages they compare, and the form of their results."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from testbed.release import ROOT, STOCK

BUILD = ROOT / "build" / "bench"
# The package whose module `PATCHER` patches this release by search and replace.
AGENTCORE_RELEASE = "v0.5.9"
AGENTCORE = (
    "agentcore-rl-toolkit==0.1.3 "
    "--hash=sha256:c0198173f7caa1e1b73349091d56d021834e22e7bac0a6ac32022b8360509967"
)
PATCHER = "agentcore_rl_toolkit/backends/slime/patches/sglang_token_ids.py"

MESSAGES = {"messages": [{"role": "user", "content": "Tell me about Paris."}]}


@dataclasses.dataclass
class Row:
    """One figure of one variant.

    Attributes:
        tokens: Of a response, or 0 if the figure does not depend on it.
        values: One for each round, in `unit`.
        ratios: `values` over those of stock of the same round.
    """

    case: str
    tokens: int
    variant: str
    unit: str
    values: list[float]
    ratios: list[float]


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    return [value / other for value, other in zip(values, base, strict=True)]


def spread(values: Sequence[float]) -> str:
    """The median, and the range in brackets."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def print_rows(rows: Sequence[Row]) -> None:
    if not rows:
        return
    tokens = f", {rows[0].tokens} tokens" if rows[0].tokens else ""
    print(f"\n{rows[0].case}{tokens}")
    print(f"  {'':28} {rows[0].unit:32} ratio to {rows[0].variant}")
    for row in rows:
        print(f"  {row.variant:28} {spread(row.values):32} {spread(row.ratios)}", flush=True)


def environment() -> dict[str, Any]:
    """The machine, the versions and the commit that a result belongs to."""
    import torch
    from sglang.version import __version__

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0].partition(": ")[2] if names else model
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "machine": f"{model}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "sglang": __version__,
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def integers(text: str) -> list[int]:
    """Return the integers of a command-line argument."""
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be integers separated by commas, not {text!r}"
        ) from None


def make_request(port: int, path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


def write_results(path: Path, rows: Sequence[Row], machine: str | None = None, **more: Any) -> None:
    """Write rows as JSON with their environment, of which `more` replaces or adds to a part."""
    if machine:
        more["machine"] = machine
    result = {**environment(), **more, "rows": [dataclasses.asdict(row) for row in rows]}
    path.write_text(json.dumps(result, indent=1) + "\n")


def stock_package() -> Path:
    return STOCK


def agentcore_package() -> Path:
    """Return a folder with a stock SGLang that the string-replacing patch was run on."""
    target = BUILD / "agentcore"
    if target.exists():
        return target
    unfinished = BUILD / "agentcore.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(STOCK, unfinished, ignore=shutil.ignore_patterns("__pycache__"))
    requirements = unfinished / "requirements.txt"
    requirements.write_text(AGENTCORE + "\n")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
    subprocess.run(
        [*pip, "--no-deps", "--require-hashes", "--dest", unfinished, "-r", requirements],
        check=True,
    )
    [wheel] = unfinished.glob("*.whl")
    patcher = unfinished / "patch_sglang.py"
    with zipfile.ZipFile(wheel) as archive:
        patcher.write_bytes(archive.read(PATCHER))
    env = {**os.environ, "PYTHONPATH": str(unfinished), "SGLANG_USE_CPU_ENGINE": "1"}
    subprocess.run([sys.executable, patcher], env=env, check=True, stdout=subprocess.DEVNULL)
    unfinished.rename(target)
    return target
