"""Say what holds for which release, from stored results of the tests.

`make test-full` stores what it saw of a release in docs/compatibility/. This turns that into
docs/compatibility.md and the table of capabilities in README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from tools.common import ROOT, ToolError
from tools.releases import load_release, release_names
from tools.series import read_series, sha256_of_series

RESULTS = ROOT / "docs" / "compatibility"
PAGE = ROOT / "docs" / "compatibility.md"
README = ROOT / "README.md"
START, END = "<!-- made by `make compatibility` -->\n", "<!-- end -->\n"
TOKEN_IDS_OUT = "token ids out"
# What a release can have, and where it is tested. Token ids out are what every other test with
# a clause of the contract is about.
CAPABILITIES: dict[str, tuple[str, tuple[str, ...]]] = {
    TOKEN_IDS_OUT: (
        "Ids of chat and completions, whole and streamed, with log-probabilities one to one, "
        "by request and by server default",
        (),
    ),
    "prompt as token ids": (
        "`input_ids` on chat, `/v1/chat/completions/tokens`",
        ("test_prompt_ids",),
    ),
    "turns": (
        "`required_prefix_token_ids`, ids on assistant messages, `--keep-turns`: prompts that "
        "extend each other",
        ("test_turns",),
    ),
    "other names": (
        "Other names: `sglext`, `return_prompt_token_ids`, `return_meta_info`, "
        "`return_weight_versions`, `return_tokens_as_token_ids`",
        ("test_id_names",),
    ),
    "agents": (
        "`/v1/messages` and `/v1/responses`, whole and streamed",
        ("test_agents", "test_gpt_oss", "test_headless_agents"),
    ),
    "generate": ("`/inference/v1/generate`", ("test_tokens_in_out", "test_rollout_clients")),
    "weight versions": ("`weight_versions` by token, in streams too", ("test_weight_versions",)),
    "routed experts": (
        "`routed_experts` of a mixture by token, whole and streamed",
        ("test_routed_experts",),
    ),
    "trainer routes": (
        "`--enable-trainer-routes`: pause, resume, weights from a folder or a broadcast, "
        "as a whole or not at all",
        ("test_trainer_routes", "test_all_or_nothing"),
    ),
    "logit processors": (
        "`custom_logit_processor` by name: masks, temperatures by token, the server's own",
        ("test_logit_processors",),
    ),
    "engine": (
        "`sgl.Engine` in any thread and event loop, which ends without the program that holds it",
        ("test_engine",),
    ),
    "provenance": (
        "`/get_server_info` and `python -m sglang.patches` say the release, the series and its "
        "hash",
        ("test_wheel",),
    ),
}


def capability_of(module: str, has_clause: bool) -> str | None:
    """Return the capability that a test proves.

    Args:
        module: The name of its module, e.g. "test_prompt_ids".
        has_clause: Whether it proves a clause of the contract.
    """
    for name, (_, modules) in CAPABILITIES.items():
        if module in modules:
            return name
    return TOKEN_IDS_OUT if has_clause else None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the tests of a capability came to.

    Attributes:
        skipped: The number of tests that were skipped for each reason.
    """

    passed: int
    failed: int
    skipped: dict[str, int]

    def __str__(self) -> str:
        failed = f"**{self.failed} failed** / " if self.failed else ""
        return f"{failed}{self.passed} / {sum(self.skipped.values())}"


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run of the tests saw of a release.

    Attributes:
        series: The hash of the series that was tested.
        device: "CPU" or "GPU".
        date: E.g. "2026-01-31".
        tests: "all", those of `make test` ("main"), or "some" on a GPU.
    """

    release: str
    series: str
    device: str
    date: str
    capabilities: dict[str, Outcome]
    tests: str = "all"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def series_of(release: str) -> str:
    """Return the hash of the series of a release."""
    return sha256_of_series(read_series(load_release(release)))


def path_of(release: str, device: str) -> Path:
    return RESULTS / f"{release}-{device.lower()}.json"


def read_results() -> list[Result]:
    """Return the stored results, newest release first.

    Raises:
        ToolError: If one of them cannot be read.
    """
    results: list[Result] = []
    for name in reversed(release_names()):
        for path in sorted(RESULTS.glob(f"{name}-[a-z]*.json")):
            try:
                fields: dict[str, Any] = json.loads(path.read_text())
                outcomes = {k: Outcome(**v) for k, v in fields.pop("capabilities").items()}
                results.append(Result(**fields, capabilities=outcomes))
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise ToolError(f"{path.relative_to(ROOT)} holds no result: {e}") from None
    return results


def table(rows: list[list[str]]) -> str:
    head, *body = [f"| {' | '.join(row)} |\n" for row in rows]
    return head + "|" + "---|" * len(rows[0]) + "\n" + "".join(body)


def page(results: list[Result]) -> str:
    """Return docs/compatibility.md."""
    lines = [
        "# Compatibility\n\n",
        "What the tests of each release saw: how many passed / were skipped. The series is the\n",
        "start of the hash that `python -m sglang.patches` prints. `make test-full` stores the\n",
        "results of all tests, `make test WORKERS=0 ARGS=--store-results` of the main ones,\n",
        "and `make compatibility` makes this page of them. On a GPU some run, and what they saw\n",
        "stays here when the series changes: its hash says which one it was.\n\n",
    ]
    rows = [["release", "series", "on", "tests", "date", *CAPABILITIES]]
    for result in results:
        outcomes = [str(result.capabilities.get(name, "–")) for name in CAPABILITIES]
        series = f"`{result.series[:12]}`"
        facts = [result.release, series, result.device, result.tests, result.date]
        rows.append([*facts, *outcomes])
    lines.append(table(rows))
    for result in results:
        reasons: dict[str, int] = {}
        for outcome in result.capabilities.values():
            for reason, count in outcome.skipped.items():
                reasons[reason] = reasons.get(reason, 0) + count
        if reasons:
            lines.append(f"\nSkipped for {result.release} on a {result.device}:\n\n")
            lines += [f"- {count}: {reason}\n" for reason, count in sorted(reasons.items())]
    return "".join(lines)


def readme_table(results: list[Result]) -> str:
    """Return the table of README.md: a tick for what passed."""
    names = list(reversed(release_names()))
    rows = [["capability", *names]]
    for name, (text, _) in CAPABILITIES.items():
        held = {
            result.release
            for result in results
            if result.device == "CPU" and (outcome := result.capabilities.get(name))
            if outcome.passed and not outcome.failed
        }
        rows.append([text, *("✓" if release in held else "" for release in names)])
    return table(rows)


def pages(results: list[Result]) -> dict[Path, str]:
    """Return the files that are made of the results, with what they should be.

    Raises:
        ToolError: If README.md has no place for the table.
    """
    before, start, rest = README.read_text().partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ToolError(f"README.md has no {START.strip()} ... {END.strip()}")
    return {
        PAGE: page(results),
        README: before + start + readme_table(results) + end + after,
    }


def old_results(results: list[Result]) -> list[str]:
    """Return a line for each result of a series that has changed since.

    Those of GPUs, which are not always at hand, may be older.
    """
    return [
        f"{result.release} was tested on a {result.device} with the series {result.series[:12]}, "
        f"which has changed: run `make test-full UPSTREAM={result.release}`"
        for result in results
        if result.device == "CPU" and result.series != series_of(result.release)
    ]


def old_pages(results: list[Result]) -> list[str]:
    """Return a line for each file that is not what the results make of it."""
    return [
        f"{path.relative_to(ROOT)} is not made of docs/compatibility/: run `make compatibility`"
        for path, text in pages(results).items()
        if not path.exists() or path.read_text() != text
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="fail if anything is out of date")


def main(args: argparse.Namespace) -> int:
    results = read_results()
    if not args.check:
        for path, text in pages(results).items():
            path.write_text(text)
        return 0
    lines = [*old_results(results), *old_pages(results)]
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return 1 if lines else 0
