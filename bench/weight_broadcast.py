"""How fast weights reach a server by broadcast, and for how long it is silent.

Two processes broadcast random weights over the group of `WeightBroadcaster`: as they are, and
announced in buckets. Then a trainer updates a server of each of `--models` while clients stream,
and what counts is the longest time in which none of them gets a token. Over NCCL with
TEST_DEVICE=cuda, from the last card to the first, and over gloo on a CPU.

    python -m bench.weight_broadcast [--rounds 5] [--clients 64] [--models 1b,7b] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import math
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import requests
import torch
import torch.distributed as dist

from bench.common import Row, integers, make_request, print_rows, ratios, write_results
from bench.report import groups
from testbed.client import COMPLETIONS, body_for, control
from testbed.server import BASE_FLAGS, ON_GPU, Server
from testbed.tiny_model import MODELS, tiny_model_path
from tools.verify import reserve_port

MIB = 1024 * 1024
# Layers, their sizes, and heads of queries and of keys. The vocabulary is a small one.
SHAPES = {
    "tiny": (4, 256, 512, 4, 4),
    "1b": (24, 2048, 5504, 16, 16),
    "7b": (32, 4096, 14336, 32, 8),
}
DEFAULT_SHAPE = "1b" if ON_GPU else "tiny"
TRANSPORT_MIB = 4096 if ON_GPU else 64
BUCKETS_MIB = "512,1024" if ON_GPU else "16"
TENSOR_MIB = 32 if ON_GPU else 4
TOKENS = 400
STREAM_INTERVAL = 8
PAUSE_S = 0.5
# How long a server may take to get memory for the copies that it makes beforehand.
JOIN_S = 20.0 if ON_GPU else 0.5
TIMEOUT_S = 120.0
FIRST, LAST = ("cuda:0", f"cuda:{torch.cuda.device_count() - 1}") if ON_GPU else ("cpu", "cpu")
BARE, ANNOUNCED = "broadcast as it is", "WeightBroadcaster"
KEPT, CLEARED = "cache kept", "cache cleared"


def wait_for_device() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def run_end(
    rank: int, port: int, total: int, buckets: list[int], rounds: int, pipe: Connection
) -> None:
    """Be the trainer (rank 0) or the server of the transport, and send seconds by variant."""
    from sglang.srt.weight_sync.broadcast import WeightBroadcaster, join, receive_weights

    device = FIRST if rank else LAST
    if ON_GPU:
        torch.cuda.set_device(device)
    if rank:
        group = join("127.0.0.1", port, rank, 2, TIMEOUT_S, device)
    else:
        broadcaster = WeightBroadcaster("127.0.0.1", port, 1, TIMEOUT_S, device)
        group = broadcaster._group
    size = TENSOR_MIB * MIB
    weights = {
        str(i): torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
        for i in range(total // size)
    }

    def bare(bucket: int) -> None:
        each = [torch.empty(bucket, dtype=torch.uint8, device=device) for _ in range(2)]
        works = [
            dist.broadcast(each[i % 2], 0, group=group, async_op=True)
            for i in range(total // bucket)
        ]
        for work in works:
            work.wait()

    def announced(bucket: int) -> None:
        if rank:
            received = list(receive_weights(group, device))
            assert len(received) == len(weights)
        else:
            broadcaster.send(weights.items(), max_bucket_bytes=bucket)

    for bucket in buckets:
        for name, call in ((BARE, bare), (ANNOUNCED, announced)):
            seconds = []
            # The first round connects the two.
            for _ in range(1 + rounds):
                dist.broadcast(torch.zeros(1, device=device), 0, group=group)
                dist.barrier(group)
                wait_for_device()
                start = time.monotonic()
                call(bucket)
                wait_for_device()
                seconds.append(time.monotonic() - start)
            pipe.send((name, bucket, seconds[1:]))
    pipe.send(None)


def measure_transport(total: int, buckets: list[int], rounds: int) -> list[Row]:
    context = multiprocessing.get_context("spawn")
    port = reserve_port()
    ends = []
    for rank in range(2):
        ours, theirs = context.Pipe()
        args = (rank, port, total, buckets, rounds, theirs)
        process = context.Process(target=run_end, args=args, daemon=True)
        process.start()
        theirs.close()
        ends.append((process, ours))
    rows = []
    # What counts is when weights are there.
    base: list[float] = []
    while (found := ends[1][1].recv()) is not None:
        name, bucket, seconds = found
        rates = [total / 1e9 / each for each in seconds]
        base = rates if name == BARE else base
        case = f"{total // MIB} MiB in buckets of {bucket // MIB} MiB"
        rows.append(Row(case, 0, name, "GB/s", rates, ratios(rates, base)))
    for process, _ in ends:
        process.join()
    return rows


def random_model(shape: str, seed: int) -> Path:
    """Return the folder of a random model of one of `SHAPES`."""
    path = MODELS / f"large-{shape}-seed-{seed}"
    if path.exists():
        return path
    from sglang.srt.model_loader.utils import set_default_torch_dtype
    from transformers import LlamaConfig, LlamaForCausalLM

    unfinished = path.with_name(f"{path.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(tiny_model_path(without_weights=True), unfinished)
    tiny = json.loads((unfinished / "config.json").read_text())
    torch.manual_seed(seed)
    names = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id")
    layers, hidden, intermediate, heads, key_value_heads = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        dtype=torch.bfloat16,
        **{name: tiny[name] for name in names},
    )
    with torch.device(LAST), set_default_torch_dtype(torch.bfloat16):
        model = LlamaForCausalLM(config)
    model.save_pretrained(unfinished, max_shard_size="100GB")
    del model
    torch.cuda.empty_cache()
    unfinished.rename(path)
    return path


class RandomServer(Server):
    def __init__(self, shape: str) -> None:
        path = str(random_model(shape, 0))
        command = ["sglang.launch_server", "--model-path", path, *BASE_FLAGS]
        # What reads the streams keeps up with chunks of several tokens.
        command += ["--enable-trainer-routes", f"--stream-interval={STREAM_INTERVAL}"]
        if ON_GPU:
            # The KV cache takes what there is, as it does by default.
            command += ["--mem-fraction-static=0.85", "--max-total-tokens=100000000"]
        self._start(shape, shape, command, {"TEST_FORK": "0"})


def run_trainer(port: int, shape: str, pipe: Connection) -> None:
    """Broadcast the weights of each seed that comes."""
    from safetensors.torch import load_file
    from sglang.srt.weight_sync.broadcast import WeightBroadcaster

    paths = [random_model(shape, seed) / "model.safetensors" for seed in range(2)]
    weights = [load_file(path, LAST) for path in paths]
    pipe.send(sum(tensor.nbytes for tensor in weights[0].values()))
    broadcaster = WeightBroadcaster("127.0.0.1", port, 1, TIMEOUT_S, LAST)
    while (seed := pipe.recv()) is not None:
        broadcaster.send(weights[seed].items())


class Clients:
    """Streams without end, in a thread.

    Attributes:
        longest: For how long none of them got a token, in seconds.
    """

    def __init__(self, port: int, clients: int):
        # They do not all end at once, nor get their chunks at once.
        bodies = [{**body_for(COMPLETIONS, TOKENS + i), "stream": True} for i in range(clients)]
        self.requests = [make_request(port, COMPLETIONS, body) for body in bodies]
        self.port = port
        self.last = time.monotonic()
        self.longest = 0.0
        self.num_chunks = 0
        self.stops = False
        self.thread = threading.Thread(target=lambda: asyncio.run(self.run()))

    async def run(self) -> None:
        async def one(request: bytes) -> None:
            while not self.stops:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.write(request)
                while data := await reader.read(1 << 16):
                    self.see(data.count(b"token_ids"))
                writer.close()

        await asyncio.gather(*map(one, self.requests))

    def see(self, chunks: int) -> None:
        if chunks:
            now = time.monotonic()
            self.longest = max(self.longest, now - self.last)
            self.last = now
            self.num_chunks += chunks

    def watch(self, action: Callable[[], None]) -> tuple[float, float]:
        """Return how long an action took, and the longest time without a token meanwhile.

        One that had begun before counts as a whole, and so does one that lasts longer.
        """
        self.longest = 0.0
        start = time.monotonic()
        action()
        seconds = time.monotonic() - start
        before = self.num_chunks
        while self.num_chunks == before:
            time.sleep(0.0002)
        return seconds, self.longest

    def __enter__(self) -> Clients:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stops = True
        self.thread.join()


@contextlib.contextmanager
def joined_trainer(server: Server, shape: str) -> Iterator[tuple[Connection, int]]:
    """Start a trainer and have a server join it. Yields where to send seeds, and bytes."""
    context = multiprocessing.get_context("spawn")
    port = reserve_port()
    ours, theirs = context.Pipe()
    process = context.Process(target=run_trainer, args=(port, shape, theirs), daemon=True)
    process.start()
    try:
        num_bytes = ours.recv()
        where = {"host": "127.0.0.1", "port": port, "timeout": TIMEOUT_S}
        ranks = {"server_rank": 0, "num_inference_server": 1}
        control(server, "/init_broadcaster", **where, **ranks).raise_for_status()
        yield ours, num_bytes
    finally:
        process.kill()
        process.join()


def measure_updates(shape: str, clients: int, rounds: int, rates: list[float]) -> list[Row]:
    """Update a server of a model of one of `SHAPES` again and again.

    Args:
        rates: Of a bare broadcast in GB/s, one for each round.
    """
    silent: dict[str, list[float]] = {KEPT: [], CLEARED: []}
    whole: dict[str, list[float]] = {KEPT: [], CLEARED: []}
    first: list[float] = []
    without: list[float] = []
    with RandomServer(shape) as server, joined_trainer(server, shape) as (seeds, num_bytes):

        def update(seed: int, name: str) -> None:
            seeds.send(seed)
            fields = {"skip_prefix_cache_reset": name == KEPT}
            answer = requests.post(f"{server.url}/update_weights", json=fields, timeout=TIMEOUT_S)
            answer.raise_for_status()

        with Clients(server.port, clients) as streams:
            # The first update connects the two.
            for round_ in range(1 + rounds):
                for name in silent:
                    time.sleep(PAUSE_S)
                    seconds, longest = streams.watch(
                        functools.partial(update, (round_ + 1) % 2, name)
                    )
                    time.sleep(PAUSE_S)
                    _, longest_without = streams.watch(functools.partial(time.sleep, seconds))
                    if round_:
                        whole[name].append(seconds)
                        silent[name].append(longest)
                        if name == KEPT:
                            without.append(longest_without)
                    elif name == KEPT:
                        first.append(longest)
                if not round_:
                    time.sleep(JOIN_S)
    base = [num_bytes / 1e9 / rate for rate in rates]
    found = {
        "broadcast alone": base,
        "silent, no update": without,
        "silent, first update": first,
        **{f"silent, {name}": values for name, values in silent.items()},
        **{f"answered, {name}": values for name, values in whole.items()},
    }
    case = f"update of {math.ceil(num_bytes / MIB)} MiB while {clients} clients stream"
    return [
        Row(case, 0, name, "seconds", values, ratios(values, base[: len(values)]))
        for name, values in found.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--clients", type=int, default=64, help="default: 64")
    parser.add_argument("--mib", type=int, default=TRANSPORT_MIB, help=f"default: {TRANSPORT_MIB}")
    parser.add_argument(
        "--buckets", type=integers, default=BUCKETS_MIB, help=f"in MiB (default: {BUCKETS_MIB})"
    )
    parser.add_argument(
        "--models",
        type=lambda value: value.split(","),
        default=[DEFAULT_SHAPE],
        help=f"some of {', '.join(SHAPES)} (default: {DEFAULT_SHAPE})",
    )
    parser.add_argument("--transport-only", action="store_true", help="start no server")
    parser.add_argument("--machine", help="what runs it, for the report")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    if unknown := [x for x in args.models if x not in SHAPES]:
        parser.error(f"--models has {unknown[0]!r}, and takes some of {', '.join(SHAPES)}")
    # As servers have it: NCCL fails where the ranks of a group do not agree.
    os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
    rows: list[Row] = []

    def keep(found: list[Row]) -> None:
        for own in groups(found).values():
            print_rows(own)
        rows.extend(found)
        if args.json:
            write_results(args.json, rows, args.machine)

    keep(measure_transport(args.mib * MIB, [x * MIB for x in args.buckets], args.rounds))
    for shape in [] if args.transport_only else args.models:
        keep(measure_updates(shape, args.clients, args.rounds, rows[0].values))
    return 0


if __name__ == "__main__":
    sys.exit(main())
