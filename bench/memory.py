"""What exact ids cost in memory: the resident set of the HTTP process.

Two questions, on the CPU with a model of one random layer: how much more it needs for many
long streams when they ask for ids, and whether anything is kept after a request has ended.
All variants are measured at the same time, each on a server of its own.

    python -m bench.memory [--streams 64] [--tokens 8192] [--requests 1000] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import requests

from bench.common import Row, print_rows, ratios, write_results
from testbed.server import Server

VARIANTS: dict[str, dict[str, Any]] = {
    "not asked": {},
    "ids": {"return_token_ids": True},
    "ids and logprobs": {"return_token_ids": True, "logprobs": True},
    "logprobs": {"logprobs": True},
}
MIB = 2**20


class PeakMemory:
    """The highest resident set of a process while the context is open, in MiB."""

    def __init__(self, process: psutil.Process):
        self.process = process
        self.start = self.peak = process.memory_info().rss
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.sample)

    def sample(self) -> None:
        while not self.done.wait(0.05):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __enter__(self) -> PeakMemory:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    @property
    def growth(self) -> float:
        return (self.peak - self.start) / MIB


def ask(url: str, tokens: int, fields: dict[str, Any], stream: bool = True) -> None:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        # The model has random weights, and would say the same token for ever.
        "temperature": 1,
        "ignore_eos": True,
        "max_tokens": tokens,
        "stream": stream,
        **fields,
    }
    with requests.post(
        f"{url}/v1/chat/completions", json=body, stream=stream, timeout=3600
    ) as response:
        response.raise_for_status()
        for _ in response.iter_content(1 << 16):
            pass


def measure(name: str, args: argparse.Namespace) -> tuple[float, list[float]]:
    """Measure a variant on a server of its own.

    Memory that was freed is not always given back, so no server is used for two.

    Returns:
        The peak growth while streams run, and what is resident after the first tenth and
        after the last of the requests that follow, in MiB.
    """
    fields = VARIANTS[name]
    with Server("long") as server, ThreadPoolExecutor(args.streams) as pool:
        process = psutil.Process(server.process.pid)
        ask(server.url, 16, fields)
        start = time.monotonic()
        with PeakMemory(process) as memory:
            tasks = [pool.submit(ask, server.url, args.tokens, fields) for _ in range(args.streams)]
            for task in tasks:
                task.result()
        took = time.monotonic() - start
        print(f"{name}: {memory.growth:.0f} MiB, {took:.0f} s", file=sys.stderr)
        resident = []
        for i in range(args.requests):
            ask(server.url, 32, fields, stream=bool(i % 2))
            if i + 1 in (max(args.requests // 10, 1), args.requests):
                resident.append(process.memory_info().rss / MIB)
        return memory.growth, resident


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--streams", type=int, default=64, help="at once (default: 64)")
    parser.add_argument("--tokens", type=int, default=8192, help="of each (default: 8192)")
    parser.add_argument("--requests", type=int, default=1000, help="one by one (default: 1000)")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=["not asked", "ids"],
        help="default: not asked, and ids",
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()

    with ThreadPoolExecutor(len(args.variants)) as pool:
        found = pool.map(lambda name: measure(name, args), args.variants)
        growths, residents = zip(*found)
    rows = [
        Row(
            case=f"{args.streams} streams at once",
            tokens=args.tokens,
            variant=name,
            unit="peak growth, MiB",
            values=[growth],
            ratios=ratios([growth], [max(growths[0], 1.0)]),
        )
        for name, growth in zip(args.variants, growths)
    ]
    flat = [
        Row(
            case=f"{args.requests} requests, one by one",
            tokens=32,
            variant=name,
            unit=f"resident after the {which}, MiB",
            values=[resident[tenth]],
            ratios=ratios([resident[tenth]], [residents[0][tenth]]),
        )
        for which, tenth in (("first tenth", 0), ("last", -1))
        for name, resident in zip(args.variants, residents)
    ]
    print_rows(rows)
    print_rows(flat[: len(rows)])
    print_rows(flat[len(rows) :])
    if args.json:
        write_results(args.json, [*rows, *flat])
    return 0


if __name__ == "__main__":
    sys.exit(main())
