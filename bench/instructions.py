"""Instructions of the serving layer for each chunk, counted by callgrind.

Times of equal code differ by some percent on a shared machine, and instructions do not.
The jobs are those of the serving-layer benchmark. Needs valgrind.

    python -m bench.instructions [--tokens 32] [--json FILE]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.common import Row, print_rows, ratios, write_results
from bench.serving_layer import ENDPOINTS, VARIANTS, Worker

# Requests that warm up, and requests whose instructions are counted.
WARMUPS, COUNTED = 2, 4


class CountingWorker(Worker):
    """A worker that runs under callgrind."""

    def __init__(self, package: str, folder: str):
        self.counts = Path(folder) / f"callgrind.{package}"
        # Neither the order of sets nor what is collected when may differ between runs.
        os.environ["PYTHONHASHSEED"] = "0"
        valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no"]
        super().__init__(package, [*valgrind, f"--callgrind-out-file={self.counts}"])

    def control(self, *arguments: str) -> str:
        command = ["callgrind_control", *arguments, str(self.process.pid)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def count(self, **job: object) -> int:
        """Return the instructions of `COUNTED` requests."""
        self.measure(count=WARMUPS, **job)
        self.control("--zero")
        self.control("--instr=on")
        self.measure(count=COUNTED, **job)
        self.control("--instr=off")
        self.control("--dump")
        newest = max(self.counts.parent.glob(f"{self.counts.name}.*"), key=os.path.getmtime)
        totals = [x for x in newest.read_text().splitlines() if x.startswith("totals:")]
        newest.unlink()
        return int(totals[-1].split()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=32, help="default: 32")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    if shutil.which("valgrind") is None:
        parser.error("valgrind is not installed")
    variants = {name: VARIANTS[name] for name in VARIANTS if not VARIANTS[name].encodes}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        packages = sorted({variant.package for variant in variants.values()})
        print("starting under valgrind, which takes minutes", file=sys.stderr)
        workers = {package: CountingWorker(package, folder) for package in packages}
        for endpoint in ENDPOINTS:
            counts = {
                name: workers[variant.package].count(
                    what="answer",
                    fields=variant.fields,
                    encodes=False,
                    num_tokens=args.tokens,
                    stream=True,
                    endpoint=endpoint,
                )
                for name, variant in variants.items()
            }
            found = [
                Row(
                    case=f"{endpoint}, streamed",
                    tokens=args.tokens,
                    variant=name,
                    unit="instructions per chunk",
                    values=[count / COUNTED / args.tokens],
                    ratios=ratios([count], [counts["stock"]]),
                )
                for name, count in counts.items()
            ]
            print_rows(found)
            rows += found
        for worker in workers.values():
            worker.stop()
    if args.json:
        write_results(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
