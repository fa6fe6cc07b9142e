"""The list of what runs on GPUs: each step selects what it says, and ends within its limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from testbed.release import PINS, ROOT, UPSTREAM
from tests.on_gpu import MODES, RANKS_TESTS, STEPS, TRAINER_TESTS, Step, run

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        UPSTREAM != PINS["default"], reason="the tools are tested with the default release"
    ),
]
SELECTED = {
    "contract": MODES,
    "trainer": TRAINER_TESTS,
    "ranks": RANKS_TESTS,
    "soak": ("lose_no_id",),
    "transfer": ("test_kv_transfer",),
    "experts": ("test_routed_experts",),
    "engine": ("test_engine",),
}


@pytest.mark.parametrize("name", [name for name, step in STEPS.items() if step.module == "pytest"])
def test_a_step_selects_its_tests(name: str) -> None:
    # Nothing is to be stored of tests that do not run.
    args = [arg for arg in STEPS[name].args if arg != "--store-results"]
    args += ["--collect-only", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *args],
        cwd=ROOT,
        env={**os.environ, "TEST_DEVICE": "cuda"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = [line for line in result.stdout.splitlines() if "::" in line]
    assert all(any(part in line for line in found) for part in SELECTED[name]), found
    assert all(any(part in line for part in SELECTED[name]) for line in found), found


@pytest.mark.parametrize("name", [name for name, step in STEPS.items() if step.module != "pytest"])
def test_a_benchmark_takes_its_arguments(name: str) -> None:
    """As far as it goes without a GPU: it stops at the next one."""
    command = [sys.executable, "-m", STEPS[name].module, *STEPS[name].args, "--nothing"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "unrecognized arguments: --nothing" in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("module", "args", "limit", "outcome"),
    [
        ("timeit", ("-n1", "pass"), 60.0, "passed"),
        ("no_such_module", (), 60.0, "failed (1)"),
        ("timeit", ("-s", "import time", "time.sleep(60)"), 5.0, "stopped"),
    ],
)
def test_how_a_step_ends_is_said(
    tmp_path: Path, module: str, args: tuple[str, ...], limit: float, outcome: str
) -> None:
    log = tmp_path / "log"
    assert run(Step("", module, args, limit), log, None) == outcome
    # What is stopped is interrupted first.
    assert ("KeyboardInterrupt" in log.read_text()) == (outcome == "stopped")


def test_who_interrupts_the_list_interrupts_the_step(tmp_path: Path) -> None:
    """Also where a shell runs it in the background, and so has it ignore that."""
    step = "Step('', 'http.server', ('--bind=127.0.0.1', '0'), 60.0)"
    code = f"import sys; from tests.on_gpu import *; STEPS['wait'] = {step}; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, f"--output={tmp_path}", "wait"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    log = tmp_path / "wait.log"
    deadline = time.monotonic() + 30
    while not (log.exists() and "Serving" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=30)[1]
    assert "interrupt received" in log.read_text()


def test_an_unknown_step_is_named() -> None:
    command = [sys.executable, "-m", "tests.on_gpu", "soap"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert "'soap'" in last and "soak" in last
