"""Servers that are started once, and a summary by clause of the contract."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.pool import ServerPool
from testbed.project import copy_project
from testbed.server import MODES, Server


@pytest.fixture(scope="session")
def servers(request: pytest.FixtureRequest) -> Iterator[ServerPool]:
    """Servers by the name of their mode."""
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")

    def report(line: str) -> None:
        with capture.global_and_fixture_disabled():
            terminal.ensure_newline()
            terminal.write_line(line)

    modes = [mode_of(item) for item in request.session.items if not is_skipped(item)]
    pool = ServerPool(report, [mode for mode in dict.fromkeys(modes) if mode])
    yield pool
    pool.stop()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return copy_project(tmp_path / "project")


@pytest.fixture
def server(request: pytest.FixtureRequest, servers: ServerPool) -> Server:
    """The server of the mode that the test is parametrized with."""
    return servers.get(request.param)


def mode_of(item: pytest.Item) -> str | None:
    """The mode that a test is parametrized with."""
    callspec = getattr(item, "callspec", None)
    mode = callspec.params.get("server") if callspec else None
    return mode if mode in MODES else None


def is_skipped(item: pytest.Item) -> bool:
    return any(mark.args[0] for mark in item.iter_markers("skipif"))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz", "test_parser_fuzz.py")
    group.addoption("--fuzz-seed", type=int, default=0, help="draw other streams (default: 0)")
    group.addoption(
        "--fuzz-seconds", type=float, help="how long to draw (default: a fixed number of streams)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "clause(*names): the clauses of the contract it proves")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the tests of one server together."""
    order = list(MODES)

    def position(item: pytest.Item) -> int:
        mode = mode_of(item)
        return order.index(mode) if mode else -1

    items.sort(key=position)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for outcome, counter in (("passed", passed), ("failed", failed), ("error", failed)):
        for report in terminalreporter.stats.get(outcome, []):
            counter.update(dict(getattr(report, "user_properties", [])).get("clauses", []))
    clauses = sorted(passed | failed, key=lambda name: int(name[1:]))
    if not clauses:
        return
    terminalreporter.section("the contract, by clause")
    for name in clauses:
        line = f"{name:4} {passed[name]:4} tests passed"
        terminalreporter.write_line(line + (f", {failed[name]} FAILED" if failed[name] else ""))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    clauses = [name for mark in item.iter_markers("clause") for name in mark.args]
    item.user_properties.append(("clauses", clauses))
