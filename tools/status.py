"""Show, for each release, how much of upstream its series touches.

For each patch: the lines that it changes in upstream's files, those of the files that it
adds, which other releases share it, and where it stands with upstream. Added files are the
same in every release, as one patch in patches/common/ adds each; fails if two add one.
"""

from __future__ import annotations

import argparse
import json
import re

from tools.common import ToolError
from tools.releases import load_release, release_names
from tools.series import Patch, read_series, releases_that_list

# The most lines of upstream's files that a series should change: what serves rollouts, and
# of it what returns token ids.
GOAL = 120
GOAL_TOKEN_IDS_OUT = 40
TOKEN_IDS_OUT = re.compile(r"upstream/\d+-token-ids\b")
# Counted apart from what serves rollouts, by the prefix of a patch.
APART = {
    "sampling": "sampling controls",
    "engine": "an engine in a program",
    "routed-experts": "the capture of routed experts",
}


def upstream_lines(patches: list[Patch]) -> int:
    return sum(sum(patch.changed.values()) for patch in patches)


def lines_apart(patches: list[Patch]) -> dict[str, int]:
    return {
        prefix: upstream_lines([patch for patch in patches if f"/{prefix}-" in patch.name])
        for prefix in APART
    }


def status(name: str, patches: list[Patch], known: dict[str, list[str]]) -> dict[str, object]:
    """Return what there is to say of the series of a release.

    Args:
        known: The releases that list each patch.
    """
    token_ids_out = [p for p in patches if p.prepared and TOKEN_IDS_OUT.match(p.prepared)]
    total = upstream_lines(patches)
    apart = lines_apart(patches)
    return {
        "release": name,
        "upstream_lines": total,
        "upstream_files": len({file for patch in patches for file in patch.changed}),
        "token_ids_out_lines": upstream_lines(token_ids_out),
        "serving_lines": total - sum(apart.values()),
        "apart_lines": apart,
        "own_lines": sum(sum(patch.added.values()) for patch in patches),
        "own_files": [file for patch in patches for file in patch.added],
        "patches": [
            {
                "file": patch.name,
                "subject": patch.subject,
                "upstream_lines": upstream_lines([patch]),
                "upstream_files": list(patch.changed),
                "own_lines": sum(patch.added.values()),
                "own_files": list(patch.added),
                "shared_with": [other for other in known[patch.name] if other != name],
                "forwarded": patch.forwarded,
                "prepared": patch.prepared,
            }
            for patch in patches
        ],
    }


def report(name: str, patches: list[Patch], known: dict[str, list[str]]) -> str:
    """Return the status of a release as text."""
    row = status(name, patches, known)
    own_files = {file for patch in patches for file in patch.added}
    apart = [f"{lines} for {APART[prefix]}" for prefix, lines in lines_apart(patches).items()]
    lines = [
        f"{name}: {row['upstream_lines']} lines in {row['upstream_files']} of upstream's files: "
        f"{row['serving_lines']} for what serves rollouts (goal: {GOAL}), "
        f"{row['token_ids_out_lines']} of them for token ids out (goal: {GOAL_TOKEN_IDS_OUT}), "
        f"{', '.join(apart[:-1])}, and {apart[-1]}; "
        f"{len(own_files)} files added, {row['own_lines']} lines",
        f"{'changed':>9} {'added':>6} {'releases':>9}  upstream status",
    ]
    for patch in patches:
        changed, added = upstream_lines([patch]), sum(patch.added.values())
        where = patch.forwarded + (f", {patch.prepared}" if patch.prepared else "")
        shared = len(known[patch.name])
        lines.append(f"{changed:>9} {added:>6} {shared:>9}  {where:<34}  {patch.name}")
    return "\n".join(lines)


def check_one_source(series: dict[str, list[Patch]]) -> None:
    """Raise a ToolError if two patches add the same file, each for some release."""
    adders: dict[str, str] = {}
    for patches in series.values():
        for patch in patches:
            for file in patch.added:
                other = adders.setdefault(file, patch.name)
                if other != patch.name:
                    raise ToolError(f"{file} is added by both {other} and {patch.name}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    series = {name: read_series(load_release(name)) for name in release_names()}
    known = releases_that_list()
    check_one_source(series)
    if args.json:
        rows = [status(name, patches, known) for name, patches in series.items()]
        print(json.dumps(rows, indent=2))
    else:
        texts = [report(name, patches, known) for name, patches in series.items()]
        print("\n\n".join(texts))
    return 0
