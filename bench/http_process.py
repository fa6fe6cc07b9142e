"""What exact ids cost in the whole HTTP process, with no engine in the way.

Real HTTP server, tokenizer manager and detokenizer in processes of their own, fed by a stand-in
for the scheduler that puts out one token a step for each request (testbed/scheduler.py).
Clients in processes of their own stream. Stock and patched are measured in alternation.

    python -m bench.http_process [--clients 64,256,1024] [--rates 4000,0] [--rounds 5] [--json FILE]

A rate is in tokens per second of all clients together. With 0, a step waits until the clients
have read nearly all of the step before: as fast as the server can with a chunk for each token.
With --soak nothing is measured, but every id is checked that the stand-in puts out. UPSTREAM in
the environment is the release, as for `make`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import mmap
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.common import (
    MESSAGES,
    Row,
    integers,
    make_request,
    ratios,
    stock_package,
    write_results,
)
from bench.report import groups, table
from bench.soak import MODES, Wrong, soak
from testbed.client import TOOL
from testbed.scheduler import LOCKSTEP, MAX_CLIENT_PROCESSES, PROGRESS_BYTES, EnginelessServer
from testbed.server import Server

IDS = {"return_token_ids": True}
LOGPROBS = {"logprobs": 1}
STOCK, STOCK_LOGPROBS = "stock", "stock, logprobs"
# Variant, server, fields of the request. Stock comes twice, to see what is noise.
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    (STOCK, "stock", {}),
    ("stock again", "stock", {}),
    ("patched, not asked", "patched", {}),
    ("patched, ids", "patched", IDS),
    (STOCK_LOGPROBS, "stock", LOGPROBS),
    ("patched, ids and logprobs", "patched", {**IDS, **LOGPROBS}),
]
# Path, fields of the request, flags of the servers. No call is in the text, and no thought.
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "chat": ("/v1/chat/completions", MESSAGES, []),
    "completions": ("/v1/completions", {"prompt": "Paris is"}, []),
    "tools": (
        "/v1/chat/completions",
        {**MESSAGES, "tools": [TOOL]},
        ["--tool-call-parser=qwen", "--reasoning-parser=qwen3"],
    ),
}
UNITS = {
    "cpu": "CPU µs per token",
    "speed": "tokens/s",
    "median": "median first token, ms",
    "slowest": "slowest first token, ms",
    "chunks": "chunks per token",
}


class Streams(NamedTuple):
    """What a process of clients has seen.

    Attributes:
        first: Seconds from each request to its first chunk.
        chunks: How many chunks came.
        end: When the last one did, by the monotonic clock.
    """

    first: list[float]
    chunks: int
    end: float


class Client(asyncio.Protocol):
    """Sends one request and counts the chunks of its stream."""

    def __init__(self, request: bytes, counter: memoryview):
        self.request = request
        self.counter = counter
        self.first = 0.0
        self.chunks = 0
        self.tail = b""
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.start = time.monotonic()
        transport.write(self.request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        count = data.count(b"\n\n")
        if count and not self.first:
            self.first = time.monotonic() - self.start
        self.chunks += count
        self.counter[0] += count
        self.tail = (self.tail + data)[-40:]

    def connection_lost(self, exc: Exception | None) -> None:
        if b"data: [DONE]" in self.tail:
            self.done.set_result(None)
        else:
            error = RuntimeError(f"A stream ended early, {exc or 'and with'}: {self.tail!r}")
            self.done.set_exception(error)


def run_clients(
    port: int, request: bytes, clients: int, requests: int, progress: str, index: int, pipe: Any
) -> None:
    """Run clients that send so many requests each, one after the other."""

    async def run_one(counter: memoryview) -> list[Client]:
        loop = asyncio.get_running_loop()
        done = []
        for _ in range(requests):
            _, client = await loop.create_connection(
                lambda: Client(request, counter), "127.0.0.1", port
            )
            await client.done
            done.append(client)
        return done

    async def run_all() -> Streams:
        with open(progress, "r+b") as file:
            counter = memoryview(mmap.mmap(file.fileno(), PROGRESS_BYTES)).cast("q")
        counter = counter[index : index + 1]
        found = await asyncio.gather(*(run_one(counter) for _ in range(clients)))
        own = [client for each in found for client in each]
        first = [client.first for client in own]
        return Streams(first, sum(client.chunks for client in own), time.monotonic())

    try:
        import uvloop

        pipe.send(uvloop.run(run_all()))
    except Exception as exc:
        pipe.send(exc)


class Load(NamedTuple):
    """What the clients send."""

    clients: int
    processes: int
    requests: int
    tokens: int
    rate: int


def run_load(
    server: Server, progress: Path, path: str, body: dict[str, Any], load: Load
) -> dict[str, float]:
    """Return the figures of one run, by the keys of `UNITS`."""
    request = make_request(server.port, path, body)
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    cpu, start = server.cpu_seconds(), time.monotonic()
    for index in range(load.processes):
        ours, theirs = context.Pipe(duplex=False)
        share = load.clients // load.processes + (index < load.clients % load.processes)
        args = (server.port, request, share, load.requests, str(progress), index, theirs)
        processes.append(context.Process(target=run_clients, args=args))
        processes[-1].start()
        pipes.append(ours)
    found = [pipe.recv() for pipe in pipes]
    cpu = server.cpu_seconds() - cpu
    for process in processes:
        process.join()
    for streams in found:
        if isinstance(streams, Exception):
            raise streams
    num_tokens = load.clients * load.requests * load.tokens
    first = [seconds * 1e3 for streams in found for seconds in streams.first]
    return {
        "cpu": cpu * 1e6 / num_tokens,
        "speed": num_tokens / (max(streams.end for streams in found) - start),
        "median": statistics.median(first),
        "slowest": max(first),
        "chunks": sum(streams.chunks for streams in found) / num_tokens,
    }


def make_rows(case: str, tokens: int, samples: dict[str, dict[str, list[float]]]) -> list[Row]:
    """Rows of the variants with log-probabilities after those without, with their own base."""
    rows = []
    for base, has_logprobs in ((STOCK, False), (STOCK_LOGPROBS, True)):
        names = [name for name in samples if ("logprobs" in name) == has_logprobs]
        if base not in samples:
            continue
        for key, unit in UNITS.items():
            for name in names:
                values, stock = samples[name][key], samples[base][key]
                suffix = ", log-probabilities" if has_logprobs else ""
                rows.append(Row(case + suffix, tokens, name, unit, values, ratios(values, stock)))
    return rows


def measure(
    variants: list[tuple[str, str, dict[str, Any]]],
    packages: dict[str, Path | None],
    case: str,
    loads: list[Load],
    rounds: int,
) -> Iterator[list[Row]]:
    """Measure a case, and yield the rows of each load."""
    path, fields, flags = CASES[case]
    with contextlib.ExitStack() as stack:
        progress = Path(stack.enter_context(tempfile.TemporaryDirectory()), "progress")
        progress.write_bytes(bytes(PROGRESS_BYTES))
        servers = {}
        for name, package in packages.items():
            servers[name] = EnginelessServer(name, *flags, package=package, progress=progress)
            stack.callback(servers[name].stop)
        for server in servers.values():
            server.wait()
        for load in loads:
            how = f"{load.rate} tokens/s" if load.rate else "as fast as it can"
            title = f"{case}, {load.clients} clients, {how}"
            samples: dict[str, dict[str, list[float]]] = {
                name: {key: [] for key in UNITS} for name, _, _ in variants
            }
            # The first round warms up, but not for one that only tries the script.
            num_warmups = int(rounds > 1 and load is loads[0])
            for round_ in range(num_warmups + rounds):
                # Another one is first in each round, since the first may find the machine idle.
                first = round_ % len(variants)
                for name, server_name, more in variants[first:] + variants[:first]:
                    body = {
                        "model": "m",
                        "stream": True,
                        "ignore_eos": True,
                        "max_tokens": load.tokens,
                        **fields,
                        **more,
                    }
                    server = servers[server_name]
                    server.slow_down(load.clients / load.rate if load.rate else LOCKSTEP)
                    found = run_load(server, progress, path, body, load)
                    if round_ < num_warmups:
                        continue
                    for key, value in found.items():
                        samples[name][key].append(value)
                print(
                    f"{title}: round {round_ + 1 - num_warmups} of {rounds}",
                    file=sys.stderr,
                    flush=True,
                )
            rows = make_rows(title, load.tokens, samples)
            for own in groups(rows).values():
                print("\n".join(["", own[0].case, "", *table(own)]), flush=True)
            yield rows


def named_package(text: str) -> tuple[str, Path]:
    """Return the name and the folder of a command-line argument."""
    name, _, folder = text.partition("=")
    if not name or not Path(folder, "sglang").is_dir():
        raise argparse.ArgumentTypeError(
            f"must be NAME=FOLDER, of a folder that has the package sglang, not {text!r}"
        )
    return name, Path(folder).resolve()


def run_soak(num_ids: int, clients: int, processes: int, tokens: int) -> int:
    """Soak servers of every mode, and say what came. Return the exit status."""
    for mode in MODES:
        try:
            by_kind, reasons = soak(mode, num_ids, clients, processes, tokens)
        except Wrong as exc:
            print(f"{mode}: {exc}", file=sys.stderr)
            return 1
        print(f"\n{mode}: {by_kind.total()} ids, each received once and in order")
        for name, count in by_kind.items():
            print(f"  {name:40} {count:9} ids")
        for name, count in sorted(reasons.items()):
            print(f"  {name:40} {count:9} choices", flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        epilog="UPSTREAM in the environment is the release.",
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["chat"], help="default: chat")
    parser.add_argument("--clients", type=integers, default="64,256", help="default: 64,256")
    parser.add_argument("--processes", type=int, default=2, help="of clients (default: 2)")
    parser.add_argument(
        "--rates",
        type=integers,
        default="4000,0",
        help="tokens/s, 0: as fast as it can (default: 4000,0)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--tokens", type=int, default=256, help="of a request (default: 256)")
    parser.add_argument(
        "--total", type=int, default=16384, help="tokens of a run, about (default: 16384)"
    )
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", help="some of them, with those they are ratios to"
    )
    parser.add_argument(
        "--package",
        type=named_package,
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="another patched package to measure; `patched` in place of the installed one",
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument(
        "--soak",
        type=int,
        metavar="N",
        help="measure nothing: stream N ids to the first number of --clients, check each",
    )
    args = parser.parse_args()
    for name in ("clients", "processes", "rounds", "tokens", "total"):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"argument --{name}: must be at least 1, not {value}")
    if args.processes > MAX_CLIENT_PROCESSES:
        parser.error(f"argument --processes: must be at most {MAX_CLIENT_PROCESSES}")
    if args.soak is not None:
        return run_soak(args.soak, args.clients[0], args.processes, args.tokens)
    variants = list(VARIANTS)
    packages: dict[str, Path | None] = {"stock": stock_package(), "patched": None}
    for name, folder in args.package:
        packages[name] = folder
        if name != "patched":
            variants.append((f"{name}, ids", name, IDS))
            variants.append((f"{name}, ids and logprobs", name, {**IDS, **LOGPROBS}))
    names = [name for name, _, _ in variants]
    if args.variants is not None:
        for name in args.variants:
            if name not in names:
                parser.error(f"argument --variants: must be of {names}, not {name!r}")
        variants = [variant for variant in variants if variant[0] in args.variants]
    loads = [
        Load(
            clients,
            args.processes,
            max(1, args.total // (clients * args.tokens)),
            args.tokens,
            rate,
        )
        for clients in args.clients
        for rate in args.rates
    ]
    rows: list[Row] = []
    for case in args.cases:
        for found in measure(variants, packages, case, loads, args.rounds):
            rows += found
            if args.json:
                write_results(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
