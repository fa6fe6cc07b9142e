"""What is said of releases is of their series as it is, and `make test` covers all of it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from testbed.project import edit, patch_of, series_patches, tool
from testbed.release import ROOT, UPSTREAM
from tests.conftest import COLLECTED, is_skipped, proved_by
from tools.compatibility import CAPABILITIES, Outcome, Result, old_pages, old_results, read_results


def test_results_are_of_the_series_as_it_is(request: pytest.FixtureRequest) -> None:
    if request.config.option.store_results:
        pytest.skip("this run stores the results")
    results = read_results()
    assert old_results([result for result in results if result.release == UPSTREAM]) == []
    assert old_pages(results) == []


def test_make_test_covers_every_clause_and_capability(request: pytest.FixtureRequest) -> None:
    items = [item for item in request.config.stash[COLLECTED] if not is_skipped(item)]
    short = [item for item in items if not item.get_closest_marker("full")]

    def proved(items: list[pytest.Item]) -> set[str | None]:
        names = [[*clauses, capability] for clauses, capability in map(proved_by, items)]
        return set().union(*names)

    assert proved(short) == proved(items)


@pytest.fixture
def tested(project: Path) -> Path:
    """A project with the results of a run."""
    shutil.copy(ROOT / "README.md", project)
    patches = b"".join(patch.read_bytes() for patch in series_patches(project))
    series = hashlib.sha256(patches).hexdigest()
    outcomes = {name: Outcome(7, 0, {"no GPU": 2}) for name in CAPABILITIES}
    outcomes["generate"] = Outcome(6, 1, {})
    result = Result(UPSTREAM, series, "CPU", "2026-01-31", outcomes)
    folder = project / "docs" / "compatibility"
    folder.mkdir(parents=True)
    (folder / f"{UPSTREAM}-cpu.json").write_text(result.to_json())
    assert tool(project, "compatibility") == (0, "", "")
    assert tool(project, "compatibility", "--check") == (0, "", "")
    return project


def test_a_tick_is_what_passed(tested: Path) -> None:
    page = (tested / "docs" / "compatibility.md").read_text()
    [row] = [line for line in page.splitlines() if line.startswith(f"| {UPSTREAM} |")]
    assert "| CPU | all | 2026-01-31 |" in row and "**1 failed** / 6 / 0" in row
    assert row.count("| 7 / 2 ") == len(CAPABILITIES) - 1
    readme = (tested / "README.md").read_text()
    for name, (text, _) in CAPABILITIES.items():
        [row] = [line for line in readme.splitlines() if line.startswith(f"| {text} |")]
        assert row.count("✓") == (name != "generate")


def test_a_changed_patch_makes_a_result_old(tested: Path) -> None:
    with series_patches(tested)[0].open("a") as patch:
        patch.write("# changed\n")
    status, _, err = tool(tested, "compatibility", "--check")
    assert status == 1 and len(err.splitlines()) == 1
    assert f"make test-full UPSTREAM={UPSTREAM}" in err


def test_what_a_gpu_saw_may_be_older(tested: Path) -> None:
    [cpu] = (tested / "docs" / "compatibility").iterdir()
    cpu.write_text(cpu.read_text().replace('"CPU"', '"GPU"'))
    cpu.rename(cpu.with_name(f"{UPSTREAM}-gpu.json"))
    with series_patches(tested)[0].open("a") as patch:
        patch.write("# changed\n")
    assert tool(tested, "compatibility") == (0, "", "")
    assert tool(tested, "compatibility", "--check") == (0, "", "")
    assert "✓" not in (tested / "README.md").read_text()


def test_an_edited_page_is_noticed(tested: Path) -> None:
    edit(tested / "README.md", "✓", "")
    status, _, err = tool(tested, "compatibility", "--check")
    assert status == 1 and "README.md" in err and "make compatibility" in err


def test_a_patch_of_another_release_changes_nothing(tested: Path) -> None:
    other = next(p for p in (tested / "patches").glob("v*") if p.name != UPSTREAM)
    with patch_of(tested, "server-args-add", other.name).open("a") as patch:
        patch.write("# changed\n")
    assert tool(tested, "compatibility", "--check") == (0, "", "")
