"""The verifier: it passes on the patched server, and can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.release import NUMBER, ROOT
from testbed.server import BASE_ENV, BASE_FLAGS, START_TIMEOUT_S, Server
from testbed.tiny_model import tiny_model_path


def verify(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools", "verify", *args]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        cwd=ROOT,
        env={**os.environ, **BASE_ENV},
    )


@pytest.mark.parametrize(
    "server",
    [
        "default",
        pytest.param("stream_output", marks=pytest.mark.full),
        pytest.param("reasoning", marks=pytest.mark.full),
    ],
    indirect=True,
)
def test_passes_on_a_patched_server(server: Server, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = verify("--url", server.url, "--json", str(report))
    assert result.returncode == 0, result.stdout + result.stderr
    checks = json.loads(report.read_text())
    assert checks["FAIL"] == 0 and checks["PASS"] >= 10
    assert result.stdout.count("PASS") == checks["PASS"] + 1


@pytest.mark.parametrize("server", ["stock"], indirect=True)
def test_fails_on_a_stock_server(server: Server, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = verify("--url", server.url, "--json", str(report))
    assert result.returncode == 1, result.stdout + result.stderr
    verdicts = {c["check"]: c["verdict"] for c in json.loads(report.read_text())["checks"]}
    passing = {"false means none"}
    if NUMBER >= (0, 5, 23):
        # Its completions have the ids already, and it reads the field.
        passing |= {"completions", "prompt ids come back", "stop string", "bad input"}
    assert {verdicts.pop(check) for check in passing} == {"PASS"}
    assert set(verdicts.values()) == {"FAIL"}


@pytest.mark.full
@pytest.mark.parametrize("server", ["default"])
def test_starts_a_server_itself(server: str) -> None:
    flags = ["--disable-overlap-schedule", *BASE_FLAGS]
    result = verify("--model", str(tiny_model_path()), "--max-tokens", "16", "--", *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 FAIL" in result.stdout


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--url", "http://127.0.0.1:9", "--model", "nowhere"],
        ["--url", "http://127.0.0.1:9"],
        ["--url", "http://127.0.0.1:9", "--", "--tp=2"],
    ],
    ids=["nothing given", "no tokenizer", "no server", "flags for a running server"],
)
def test_trouble_is_not_a_verdict(args: list[str]) -> None:
    result = verify(*args)
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "PASS" not in result.stdout and "FAIL" not in result.stdout
