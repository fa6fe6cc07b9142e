"""`make` and `python -m tools`, as a user meets them: help, and what is said of mistakes."""

from __future__ import annotations

import importlib
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.project import PYTHON, make, tool
from testbed.release import PINS, ROOT, STOCK_WHEEL, UPSTREAM
from tools.__main__ import COMMANDS

pytestmark = pytest.mark.skipif(
    UPSTREAM != PINS["default"], reason="the tools are tested with the default release"
)
NAMES = [name for commands in COMMANDS.values() for name in commands]
# No index is there.
UNREACHABLE = {
    "PIP_CONFIG_FILE": "/dev/null",
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_FIND_LINKS": "",
}


def error_of(result: tuple[int, str, str]) -> str:
    """The one line that says what is wrong, beside progress and what make says of it."""
    status, out, err = result
    lines = [line for line in err.splitlines() if not line.startswith(("==> ", "make"))]
    assert status != 0 and len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def test_make_alone_prints_the_help(project: Path) -> None:
    status, out, err = make(project)
    assert (status, err) == (0, "")
    groups = re.findall(r"^\S.* it$|^Work on .*$", out, re.MULTILINE)
    assert groups == ["Use it", "Test it", "Work on the series", "Measure it"]
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE)) - {"help"}
    shown = set(re.findall(r"^  make (\S+)|`make (\S+)`|(\S+-all)", out, re.MULTILINE))
    assert targets == {name for names in shown for name in names if name}
    # Nothing is built to say so.
    assert not (project / "dist").exists()


def test_the_default_release_is_that_of_the_pins() -> None:
    assert f"\nUPSTREAM ?= {PINS['default']}\n" in (ROOT / "Makefile").read_text()


def test_every_tool_is_a_command(project: Path) -> None:
    status, out, err = tool(project, "--help")
    assert (status, err) == (0, "")
    assert re.findall(r"^  (\S+)  ", out, re.MULTILINE) == NAMES
    modules = [f"tools.{path.stem}" for path in (ROOT / "tools").glob("[a-z]*.py")]
    mains = {name for name in modules if hasattr(importlib.import_module(name), "main")}
    assert mains == {f"tools.{name.replace('-', '_')}" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_bare_python_will_do(name: str) -> None:
    command = [PYTHON, "-S", "-m", "tools", name, "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: python -m tools {name} ")


@pytest.mark.parametrize(
    ("args", "word"),
    [(["nothing"], "'nothing'"), (["install", "--nothing"], "--nothing"), (["apply"], "TREE=")],
    ids=["command", "option", "argument"],
)
def test_a_wrong_command_line(project: Path, args: list[str], word: str) -> None:
    assert word in error_of(tool(project, *args))


def test_a_release_without_its_v(project: Path) -> None:
    status, out, err = make(project, "patch-tree", "UPSTREAM=0.5.9")
    assert status == 0, err
    assert (project / "build" / "v0.5.9" / "tree").is_dir()
    assert "exists" in error_of(tool(project, "series", "--release", "0.5.9", "tree"))
    assert "'v0.5'" in error_of(make(project, "check", "UPSTREAM=0.5"))


def test_a_port_from_nowhere(project: Path) -> None:
    assert "FROM" in error_of(make(project, "port"))
    assert "TO" in error_of(make(project, "port", "FROM=v0.5.9"))


@pytest.mark.parametrize("retries", ["0", "1"])
def test_an_index_that_cannot_be_reached(project: Path, retries: str) -> None:
    """Pip says that it found no version, which is true and no help."""
    (project / "build" / "downloads").unlink()
    said = error_of(make(project, "wheel", **UNREACHABLE, PIP_RETRIES=retries))
    assert "reach" in said and "index" in said and "No matching distribution" not in said
    # Pip says more when it tries again.
    assert ("Connection refused" in said) == (retries != "0")
    command = ["port", "FROM=v0.5.9", "TO=v9.9.9"]
    assert "reach" in error_of(make(project, *command, **UNREACHABLE, PIP_RETRIES=retries))
    assert (project / "pins.toml").read_bytes() == (ROOT / "pins.toml").read_bytes()


def test_a_reader_that_has_enough(project: Path) -> None:
    command = [PYTHON, "-m", "tools", "status"]
    with subprocess.Popen(
        command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_a_full_disk(project: Path) -> None:
    shutil.copy(ROOT / "README.md", project)
    (project / "docs").mkdir()
    (project / "docs" / "compatibility.md").symlink_to("/dev/full")
    assert "No space left on device; `make clean`" in error_of(make(project, "compatibility"))


def test_verify_without_a_model(project: Path) -> None:
    """It says so before it starts anything, and leaves nothing."""
    before = sorted(project.iterdir())
    python = f"PYTHON={sys.executable}"
    assert "no model at /nope" in error_of(make(project, "verify", "MODEL=/nope", python))
    assert "MODEL=" in error_of(make(project, "verify", python))
    assert sorted(project.iterdir()) == before


def test_verify_without_sglang(project: Path) -> None:
    """The test environment stands in, unless a Python is named."""
    before = sorted(project.iterdir())
    said = error_of(make(project, "verify", "MODEL=/nope"))
    assert "no sglang" in said and "PYTHON=" in said
    env = project / "build" / f"env-{UPSTREAM}"
    env.symlink_to(sys.prefix)
    assert "no model at /nope" in error_of(make(project, "verify", "MODEL=/nope"))
    said = error_of(make(project, "verify", "MODEL=/nope", f"PYTHON={PYTHON}"))
    assert f"{PYTHON} has no sglang" in said
    assert sorted(project.iterdir()) == before


@pytest.mark.parametrize("target", ["bench-report", "bench-vllm", "test-vllm"])
def test_the_environment_is_made_first(project: Path, target: str) -> None:
    status, planned, err = make(project, "--dry-run", target)
    assert status == 0, err
    env = f"build/env-{UPSTREAM}"
    made, used = planned.index(" -m tools environment "), planned.index(f"{env}/bin/python -m ")
    assert planned.index("./build.sh ") < made < used
    (project / env).symlink_to(sys.prefix)
    assert "tools environment" not in make(project, "--dry-run", target)[1]


def test_build_sh_runs_from_anywhere(project: Path, tmp_path: Path) -> None:
    (project / "build" / "downloads" / STOCK_WHEEL).stat()
    command = [str(project / "build.sh"), "--release", "v9.9.9"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "'v9.9.9'" in error_of((result.returncode, result.stdout, result.stderr))
