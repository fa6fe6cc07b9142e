"""A trainer in a process of its own: joins servers and broadcasts the weights of a seed."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
from safetensors.torch import load_file

from testbed.forks import processes
from testbed.server import BASE_ENV, ON_GPU
from testbed.tiny_model import tiny_model_path
from tools.verify import reserve_port

Weights = Iterator[tuple[str, torch.Tensor]]
BAD_PARAMETER = "model.layers.1.mlp.gate_proj.weight"
# Small, so that weights take several buckets.
BUCKET_BYTES = 100_000
# After it, what was sent has come.
SENT_WITHIN_S = 1.0


def missing(weights: Weights) -> Weights:
    return ((name, tensor) for name, tensor in weights if name != BAD_PARAMETER)


def wrong_shape(weights: Weights) -> Weights:
    for name, tensor in weights:
        yield name, tensor[:-1] if name == BAD_PARAMETER else tensor


def unknown(weights: Weights) -> Weights:
    for name, tensor in weights:
        yield name.replace("gate_proj", "side_proj") if name == BAD_PARAMETER else name, tensor


def not_loadable(weights: Weights) -> Weights:
    """Nothing is known to be wrong before it is loaded."""
    for name, tensor in weights:
        if name == BAD_PARAMETER:
            tensor = torch.zeros(tensor.shape, dtype=torch.uint8).view(torch.bits8)
        yield name, tensor


def dies(weights: Weights) -> Weights:
    for name, tensor in weights:
        if name == BAD_PARAMETER:
            os._exit(1)
        yield name, tensor


def dies_between(weights: Weights) -> Weights:
    """An announcement is the last that comes, and the bucket before it is still waited for."""
    from sglang.srt.weight_sync.broadcast import _Outgoing

    flatten = _Outgoing.flatten

    def flatten_or_die(bucket: Any) -> Any:
        if any(name == BAD_PARAMETER for name, _ in bucket._named_tensors):
            time.sleep(SENT_WITHIN_S)
            os._exit(1)
        return flatten(bucket)

    _Outgoing.flatten = flatten_or_die
    return weights


def falls_silent(weights: Weights) -> Weights:
    for name, tensor in weights:
        if name == BAD_PARAMETER:
            # Until the process is killed.
            time.sleep(600)
        yield name, tensor


FAULTS: dict[str, Callable[[Weights], Weights]] = {
    "none": lambda weights: weights,
    "missing": missing,
    "wrong_shape": wrong_shape,
    "unknown": unknown,
    "not_loadable": not_loadable,
    "dies": dies,
    "dies_between": dies_between,
    "falls_silent": falls_silent,
}


class Trainer:
    """The process that broadcasts, ready to wait for the servers.

    Args:
        world_size: Of the servers, all their ranks.
        timeout: Of what it does together with them, in seconds.

    Attributes:
        port: Where the servers meet it.
    """

    def __init__(self, world_size: int, timeout: float = 60.0):
        self.port = reserve_port()
        # A process cannot use a GPU that the one it was forked from has looked for.
        context = multiprocessing.get_context("spawn") if ON_GPU else processes(BASE_ENV)
        self.orders, orders = context.Pipe()
        self.process = context.Process(
            target=broadcast, args=(self.port, world_size, timeout, orders), daemon=True
        )
        self.process.start()
        orders.close()
        # From here on the timeout counts, and not while this imports.
        assert self.orders.recv() == "ready"

    def send(self, seed: int, fault: str = "none") -> None:
        """Have it broadcast the weights of a seed, with one of `FAULTS`."""
        self.orders.send((seed, fault))

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def broadcast(port: int, world_size: int, timeout: float, orders: Connection) -> None:
    from sglang.srt.weight_sync.broadcast import WeightBroadcaster

    orders.send("ready")
    device = "cpu"
    if ON_GPU:
        # The first server has the first card. NCCL takes two ranks on one card only for those
        # of two hosts.
        num_cards = torch.cuda.device_count()
        device = f"cuda:{num_cards - 1}"
        if world_size >= num_cards:
            os.environ["NCCL_HOSTID"] = "trainer"
    broadcaster = WeightBroadcaster("127.0.0.1", port, world_size, timeout, device)
    while True:
        seed, fault = orders.recv()
        weights = load_file(tiny_model_path(seed) / "model.safetensors")
        broadcaster.send(FAULTS[fault](iter(weights.items())), max_bucket_bytes=BUCKET_BYTES)
