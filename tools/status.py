"""Show, for each release, what its series touches and what it shares with the others.

For each patch: the upstream files it changes and in how many lines, how many lines it
adds in files of its own, how many of all these lines the series of another release has
too, and where the patch stands with upstream. Fails if a file that the series add is
not the same in every release.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator

from releases import ToolError, load_release, release_names
from series import Patch, read_series


@dataclasses.dataclass
class Touch:
    """What one patch changes.

    Attributes:
        changed: Upstream files, with the number of lines removed and added.
        added: Files of our own, with the number of lines removed and added.
        lines: Every line removed and added, with its sign.
    """

    changed: dict[str, int]
    added: dict[str, int]
    lines: Counter[str]


def touch_of(patch: Patch, own: set[str]) -> Touch:
    """Read a patch.

    Args:
        own: Files that patches before it have added. Those of this one are put in.
    """
    touch = Touch({}, {}, Counter())
    for file, diff in diffs_of(patch, own):
        hunks = diff.partition("\n@@ ")[2]
        lines = [line for line in hunks.splitlines() if line[:1] in ("+", "-")]
        touch.lines.update(lines)
        (touch.added if file in own else touch.changed)[file] = len(lines)
    return touch


def diffs_of(patch: Patch, own: set[str]) -> Iterator[tuple[str, str]]:
    """Yield each file of a patch with its diff, and put it in `own` if the patch adds it."""
    for diff in re.split(r"^diff --git ", patch.path.read_text(), flags=re.MULTILINE)[1:]:
        name, _, body = diff.partition(" ")
        file = name.removeprefix("a/")
        if "\nnew file mode " in diff.partition("\n@@ ")[0]:
            own.add(file)
        yield file, body


def own_files(patches: list[Patch]) -> dict[str, str]:
    """Return the hash of what the series does to each file that it adds."""
    own: set[str] = set()
    digests: dict[str, str] = {}
    for patch in patches:
        for file, diff in diffs_of(patch, own):
            if file in own:
                digest = hashlib.sha256(digests.get(file, "").encode() + diff.encode())
                digests[file] = digest.hexdigest()
    return digests


def lines_of(patches: list[Patch]) -> Counter[str]:
    """Return every line that a series removes and adds."""
    own: set[str] = set()
    lines: Counter[str] = Counter()
    for patch in patches:
        lines += touch_of(patch, own).lines
    return lines


def status(
    name: str, patches: list[Patch], reference: Counter[str]
) -> list[dict[str, object]]:
    """Return a row for each patch of a release.

    Args:
        reference: The lines of the other series.
    """
    own: set[str] = set()
    rows: list[dict[str, object]] = []
    for patch in patches:
        touch = touch_of(patch, own)
        rows.append(
            {
                "release": name,
                "patch": patch.subject,
                "upstream_files": len(touch.changed),
                "upstream_lines": sum(touch.changed.values()),
                "own_lines": sum(touch.added.values()),
                "shared_lines": (touch.lines & reference).total(),
                "lines": touch.lines.total(),
                "forwarded": patch.forwarded,
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    try:
        names = release_names()
        series = {name: read_series(load_release(name)) for name in names}
        lines = {name: lines_of(series[name]) for name in names}
        rows = []
        for name in names:
            others: Counter[str] = Counter()
            for other in names:
                if other != name:
                    others |= lines[other]
            rows += status(name, series[name], others)
        expected = own_files(series[load_release(None).name])
        different = [
            f"{file} of {name}"
            for name in names
            for file, digest in own_files(series[name]).items()
            if digest != expected.get(file)
        ]
    except ToolError as e:
        print(f"status: {e}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        print(f"{'':16} {'upstream':>14} {'our own':>8} {'shared':>9}  upstream status")
        for name in names:
            print(name)
            for row in (row for row in rows if row["release"] == name):
                touched = f"{row['upstream_lines']} in {row['upstream_files']} files"
                shared = f"{row['shared_lines']}/{row['lines']}"
                print(f"  {touched:>28} {row['own_lines']:>8} {shared:>9}  {row['forwarded']}")
                print(f"    {row['patch']}")
    for file in different:
        print(f"status: {file} is not what the default release has", file=sys.stderr)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
