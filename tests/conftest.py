"""Servers that are started once, and what was proved: by clause of the contract, by capability."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.pool import ServerPool
from testbed.project import copy_project
from testbed.release import ROOT, UPSTREAM
from testbed.server import MODES, ON_GPU, SHORT_MODES, Server
from tools.compatibility import (
    CAPABILITIES,
    Outcome,
    Result,
    capability_of,
    path_of,
    series_of,
)

# What `make test` runs.
SHORT = "not full"
# Modes by the one that some tests ask for beside them: these stay in one process, or there would
# be two servers of a mode, with one log.
TOGETHER = {"stock": "default", "default_on": "default", "weights": "trainer"}
COLLECTED = pytest.StashKey[list[pytest.Item]]()
LEFT = pytest.StashKey[list[str]]()
SERIES = pytest.StashKey[str]()


# At the start, so that servers start while tests run that need none.
@pytest.fixture(scope="session", autouse=True)
def servers(request: pytest.FixtureRequest) -> Iterator[ServerPool]:
    """Servers by the name of their mode."""
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    is_one_of_several = hasattr(request.config, "workerinput")

    def report(line: str) -> None:
        # One of several processes has none that anybody sees.
        if not is_one_of_several:
            with capture.global_and_fixture_disabled():
                terminal.ensure_newline()
                terminal.write_line(line)

    asked_for = (mode_of(item) for item in request.session.items if not is_skipped(item))
    modes = [mode for mode in dict.fromkeys(asked_for) if mode]
    if not is_one_of_several:
        pool = ServerPool(report, [modes], modes[:2])
    else:
        # One of several processes is given a group of tests at a time.
        grouped = all("@" in item.nodeid for item in request.session.items)
        assert grouped or not request.config.option.loadgroup, "pytest-xdist groups no tests"
        groups = dict.fromkeys(map(group_of, modes))
        pool = ServerPool(report, [[m for m in modes if group_of(m) == g] for g in groups])
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


def group_of(mode: str) -> str:
    """What the tests of a mode have in common with those that ask for the same servers."""
    return TOGETHER.get(mode, mode)


def proved_by(item: pytest.Item) -> tuple[list[str], str | None]:
    """The clauses and the capability that a test proves."""
    clauses = [name for mark in item.iter_markers("clause") for name in mark.args]
    return clauses, capability_of(item.path.stem, bool(clauses))


def is_skipped(item: pytest.Item) -> bool:
    return any(mark.args[0] for mark in item.iter_markers("skipif"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--store-results",
        action="store_true",
        help="keep the result by capability in docs/compatibility/, on a CPU only if all tests run",
    )
    group = parser.getgroup("fuzz", "test_parser_fuzz.py")
    group.addoption("--fuzz-seed", type=int, default=0, help="draw other streams (default: 0)")
    group.addoption(
        "--fuzz-seconds", type=float, help="how long to draw (default: a fixed number of streams)"
    )
    parser.addoption(
        "--all-turns", action="store_true", help="test_turns.py: hold all 50 conversations"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--store-results") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--store-results keeps what one process saw: run it with -n 0")
    config.addinivalue_line("markers", "clause(*names): the clauses of the contract it proves")
    config.addinivalue_line("markers", "full: left to `make test-full`")
    # Patches may change while tests run.
    config.stash[SERIES] = series_of(UPSTREAM)


# Before the tests are selected.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Bring the tests of one server together, and leave most servers to the full run."""
    config.stash[COLLECTED] = list(items)
    for item in items:
        mode = mode_of(item)
        if mode not in (None, *SHORT_MODES):
            item.add_marker("full")
        if config.pluginmanager.has_plugin("xdist"):
            group = group_of(mode) if mode else item.path.stem
            item.add_marker(pytest.mark.xdist_group(group))
    order = list(MODES)

    def position(item: pytest.Item) -> int:
        mode = mode_of(item)
        return order.index(mode) if mode else -1

    items.sort(key=position)
    config.stash[LEFT] = describe_left(items)


def describe_left(items: list[pytest.Item]) -> list[str]:
    """What `make test` leaves out, in lines of which the first is a title, or in none."""
    left = [item for item in items if item.get_closest_marker("full")]
    modes = dict.fromkeys(map(mode_of, left))
    whole = [mode for mode in modes if mode not in (None, *SHORT_MODES)]
    others = dict.fromkeys(item.path.stem for item in left if mode_of(item) not in whole)
    if not left:
        return []
    return [
        f"left to make test-full: {len(left)} tests",
        f"all with the servers {', '.join(map(str, whole))}",
        f"some in {', '.join(others)}",
    ]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left"] = session.config.stash[LEFT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take what a process knows that has collected the tests."""
    node.config.stash[LEFT] = getattr(node, "workeroutput", {}).get("left", [])


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    outcomes = count_outcomes(terminalreporter)
    clauses = [name for name in outcomes if name not in CAPABILITIES]
    if clauses:
        terminalreporter.section("the contract, by clause")
    for name in sorted(clauses, key=lambda name: int(name[1:])):
        outcome = outcomes[name]
        line = f"{name:4} {outcome.passed:4} tests passed"
        terminalreporter.write_line(line + (f", {outcome.failed} FAILED" if outcome.failed else ""))
    if config.option.markexpr == SHORT and config.stash.get(LEFT, []):
        title, *lines = config.stash[LEFT]
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
    if config.option.store_results:
        ran = {item.path for item in config.stash[COLLECTED]}
        is_short = config.option.markexpr == SHORT and not config.option.keyword
        is_whole = ran.issuperset((ROOT / "tests").glob("test_*.py"))
        is_whole = is_whole and (is_short or not terminalreporter.stats.get("deselected"))
        if exitstatus not in (0, 1) or not (is_whole or ON_GPU):
            terminalreporter.write_line("no results stored: not all tests ran")
            return
        date = datetime.date.today().isoformat()
        capabilities = {name: outcomes[name] for name in CAPABILITIES if name in outcomes}
        device = "GPU" if ON_GPU else "CPU"
        tests = "some" if ON_GPU else "main" if is_short else "all"
        result = Result(UPSTREAM, config.stash[SERIES], device, date, capabilities, tests)
        path = path_of(UPSTREAM, device)
        path.parent.mkdir(exist_ok=True)
        path.write_text(result.to_json())
        terminalreporter.write_line(f"results stored in {path.relative_to(ROOT)}")


def count_outcomes(terminalreporter: pytest.TerminalReporter) -> dict[str, Outcome]:
    """Return what the tests came to, by clause and by capability."""
    counts: dict[str, Counter[str]] = {}
    reasons: dict[str, Counter[str]] = {}
    for kind in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(kind, []):
            for name in dict(getattr(report, "user_properties", [])).get("proves", []):
                counts.setdefault(name, Counter())[kind] += 1
                if kind == "skipped":
                    reason = report.longrepr[2].removeprefix("Skipped: ")
                    reasons.setdefault(name, Counter())[reason] += 1
    return {
        name: Outcome(
            count["passed"], count["failed"] + count["error"], dict(reasons.get(name, {}))
        )
        for name, count in counts.items()
    }


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    clauses, capability = proved_by(item)
    item.user_properties.append(("proves", [*clauses, *([capability] if capability else [])]))
