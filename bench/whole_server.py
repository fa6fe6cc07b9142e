"""What exact ids cost on a whole server: throughput, latencies, bytes on the wire.

Runs `sglang.bench_serving` against a stock and a patched server in alternation, so that
every ratio is between runs that were made side by side. Without --stock and --patched it
starts both itself, on the CPU with a tiny random model.

    python -m bench.whole_server [--clients 1,16,64] [--rounds 3] [--json FILE]
    python -m bench.whole_server --stock URL --patched URL --tokenizer PATH
    python -m bench.whole_server --only URL --tokenizer PATH --backend vllm-chat
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

from bench.common import Row, integers, print_rows, ratios, write_results
from testbed.server import Server
from testbed.tiny_model import tiny_model_path

CLIENTS = "1,16,64"
# A run of few requests measures little but its start.
MIN_REQUESTS = 16
MODES = ["streamed", "whole"]
IDS = {"return_token_ids": True}
LOGPROBS = {"logprobs": True}
# Variant, server, fields of the request.
PAIR: list[tuple[str, str, dict[str, Any]]] = [
    ("stock", "stock", {}),
    ("patched, not asked", "patched", {}),
    ("patched, ids", "patched", IDS),
    ("patched, ids and logprobs", "patched", {**IDS, **LOGPROBS}),
    ("stock, logprobs", "stock", LOGPROBS),
]
ONLY: list[tuple[str, str, dict[str, Any]]] = [
    ("not asked", "only", {}),
    ("ids", "only", IDS),
    ("ids and logprobs", "only", {**IDS, **LOGPROBS}),
    ("logprobs", "only", LOGPROBS),
]
METRICS = {
    "output_throughput": "tokens/s",
    "median_ttft_ms": "time to first token, ms",
    "median_itl_ms": "inter-token latency, ms",
}


@dataclasses.dataclass(frozen=True)
class Load:
    """What bench_serving sends."""

    backend: str
    model: str
    tokenizer: str
    input_tokens: int
    output_tokens: int
    requests_per_client: int


def run_bench_serving(args: list[str], log: Path) -> None:
    """Run `sglang.bench_serving` as a command, with its output in a file."""
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.argv = ["sglang.bench_serving", *args]
    runpy.run_module("sglang.bench_serving", run_name="__main__")


def bench_serving(
    load: Load, url: str, fields: dict[str, Any], clients: int, stream: bool
) -> dict[str, Any]:
    """Return the metrics of one run.

    Raises:
        RuntimeError: If it fails or a request does, with the end of its output.
    """
    # It would otherwise look the model up, and wait where there is no network.
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Each run forks, since to import what it needs takes longer than most runs.
    importlib.import_module("sglang.bench_serving")
    num_requests = max(clients * load.requests_per_client, MIN_REQUESTS)
    args = ["--disable-tqdm", "--backend", load.backend, "--base-url", url]
    args += ["--model", load.model, "--tokenizer", load.tokenizer]
    args += ["--dataset-name", "random-ids", "--random-range-ratio", "1"]
    args += ["--random-input-len", str(load.input_tokens)]
    args += ["--random-output-len", str(load.output_tokens)]
    args += ["--num-prompts", str(num_requests), "--max-concurrency", str(clients)]
    args += ["--extra-request-body", json.dumps({"temperature": 0, **fields})]
    if not stream:
        args.append("--disable-stream")
    with tempfile.TemporaryDirectory() as folder:
        output, log = Path(folder, "metrics.jsonl"), Path(folder, "log")
        args += ["--output-file", str(output)]
        process = multiprocessing.get_context("fork").Process(
            target=run_bench_serving, args=(args, log)
        )
        process.start()
        process.join()
        lines = output.read_text().splitlines() if output.exists() else []
        if process.exitcode != 0 or not lines:
            raise RuntimeError(f"bench_serving failed:\n{log.read_text()[-2000:]}")
        metrics: dict[str, Any] = json.loads(lines[-1])
    if metrics["completed"] != num_requests:
        raise RuntimeError(f"{url} answered {metrics['completed']} of {num_requests} requests")
    return metrics


def bytes_per_token(load: Load, url: str, fields: dict[str, Any], stream: bool) -> float:
    body = {
        "model": load.model,
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 0,
        "ignore_eos": True,
        "max_tokens": load.output_tokens,
        "stream": stream,
        **fields,
    }
    response = requests.post(f"{url}/v1/chat/completions", json=body, timeout=600)
    response.raise_for_status()
    return len(response.content) / load.output_tokens


def measure(
    variants: list[tuple[str, str, dict[str, Any]]],
    urls: dict[str, str],
    load: Load,
    clients: list[int],
    rounds: int,
    modes: list[str],
) -> Iterator[list[Row]]:
    """Measure, and yield the rows of a mode and a number of clients together."""
    for mode in modes:
        stream = mode == "streamed"
        for num_clients in clients:
            keys = list(METRICS) if stream else ["output_throughput"]
            samples: dict[str, dict[str, list[float]]] = {
                key: {name: [] for name, _, _ in variants} for key in keys
            }
            # The first round warms up, but not for one that only tries the script.
            num_warmups = int(rounds > 1)
            for round_ in range(num_warmups + rounds):
                # Another one is first in each round, since the first may find the machine idle.
                first = round_ % len(variants)
                for name, server, fields in variants[first:] + variants[:first]:
                    metrics = bench_serving(load, urls[server], fields, num_clients, stream)
                    if round_ < num_warmups:
                        continue
                    for key, by_variant in samples.items():
                        by_variant[name].append(metrics[key])
            samples["bytes"] = {
                name: [bytes_per_token(load, urls[server], fields, stream)]
                for name, server, fields in variants
            }
            rows = []
            for key, by_variant in samples.items():
                base = by_variant[variants[0][0]]
                found = [
                    Row(
                        case=f"chat, {mode}, {num_clients} clients",
                        tokens=load.output_tokens,
                        variant=name,
                        unit=METRICS.get(key, "bytes per token"),
                        values=values,
                        ratios=ratios(values, base),
                    )
                    for name, values in by_variant.items()
                ]
                print_rows(found)
                rows += found
            yield rows


def keep(measured: Iterator[list[Row]], target: Path | None, **more: str | None) -> None:
    """Write the rows as they come: who stops a long run keeps what it has measured."""
    rows: list[Row] = []
    for found in measured:
        rows += found
        if target:
            write_results(target, rows, **more)


@contextlib.contextmanager
def cpu_servers() -> Iterator[dict[str, str]]:
    with contextlib.ExitStack() as stack:
        servers = {"stock": Server("stock"), "patched": Server("default")}
        for server in servers.values():
            stack.callback(server.stop)
        for server in servers.values():
            server.wait()
        yield {name: server.url for name, server in servers.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--stock", metavar="URL", help="a running stock server")
    parser.add_argument("--patched", metavar="URL", help="a running patched server")
    parser.add_argument("--only", metavar="URL", help="one server: asking against not asking")
    parser.add_argument("--backend", default="sglang-oai-chat", help="as for bench_serving")
    parser.add_argument("--model", default="m", help="the model's name (default: m)")
    parser.add_argument("--tokenizer", help="path of the tokenizer (default: the tiny model's)")
    parser.add_argument("--clients", type=integers, default=CLIENTS, help=f"default: {CLIENTS}")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="default: both")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--input-tokens", type=int, default=32, help="default: 32")
    parser.add_argument("--output-tokens", type=int, default=128, help="default: 128")
    parser.add_argument("--requests-per-client", type=int, default=4, help="default: 4")
    parser.add_argument("--machine", help="what runs the server, for the report")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    if bool(args.stock) != bool(args.patched):
        parser.error("--stock and --patched go together")
    if args.only and args.stock:
        parser.error("--only goes without --stock and --patched")
    load = Load(
        backend=args.backend,
        model=args.model,
        tokenizer=args.tokenizer or str(tiny_model_path()),
        input_tokens=args.input_tokens,
        output_tokens=args.output_tokens,
        requests_per_client=args.requests_per_client,
    )
    with contextlib.ExitStack() as stack:
        if args.only:
            variants, urls = ONLY, {"only": args.only}
        elif args.stock:
            variants, urls = PAIR, {"stock": args.stock, "patched": args.patched}
        else:
            print("starting a stock and a patched server", file=sys.stderr)
            variants, urls = PAIR, stack.enter_context(cpu_servers())
        measured = measure(variants, urls, load, args.clients, args.rounds, args.modes)
        keep(measured, args.json, machine=args.machine)
    return 0


if __name__ == "__main__":
    sys.exit(main())
