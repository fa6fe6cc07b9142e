"""Servers that are started once, and a summary by clause of the contract."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests.engine.server import MODES, Server

# The stock server and the one under test.
MAX_SERVERS = 2


class ServerPool:
    """Starts servers when they are first asked for, and stops the oldest beyond a limit."""

    def __init__(self, report: Callable[[str], None]):
        self.report = report
        self.servers: dict[str, Server] = {}

    def get(self, name: str) -> Server:
        if name not in self.servers:
            while len(self.servers) >= MAX_SERVERS:
                self.servers.pop(next(iter(self.servers))).stop()
            self.report(f"waiting for the {name} server to be healthy")
            self.servers[name] = Server(name)
        self.servers[name] = self.servers.pop(name)
        return self.servers[name]

    def stop(self) -> None:
        for server in self.servers.values():
            server.stop()


@pytest.fixture(scope="session")
def servers(request: pytest.FixtureRequest) -> Iterator[ServerPool]:
    """Servers by the name of their mode."""
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")

    def report(line: str) -> None:
        with capture.global_and_fixture_disabled():
            terminal.ensure_newline()
            terminal.write_line(line)

    pool = ServerPool(report)
    yield pool
    pool.stop()


@pytest.fixture
def server(request: pytest.FixtureRequest, servers: ServerPool) -> Server:
    """The server of the mode that the test is parametrized with."""
    return servers.get(request.param)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "clause(*names): the clauses of the contract it proves")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the tests of one server together."""
    order = list(MODES)

    def position(item: pytest.Item) -> int:
        callspec = getattr(item, "callspec", None)
        mode = callspec.params.get("server") if callspec else None
        return order.index(mode) if mode in order else -1

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
