"""A trainer in a process of its own: joins the servers and broadcasts the weights of a seed.

    python -m testbed.trainer PORT WORLD_SIZE [TIMEOUT]

Prints a line when it is about to wait for the servers. Reads lines "SEED FAULT" and sends for
each. FAULT is a name in `FAULTS`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

import torch
from safetensors.torch import load_file

from testbed.server import ON_GPU
from testbed.tiny_model import tiny_model_path

Weights = Iterator[tuple[str, torch.Tensor]]
BAD_PARAMETER = "model.layers.1.mlp.gate_proj.weight"
# Small, so that weights take several buckets.
BUCKET_BYTES = 100_000


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


def falls_silent(weights: Weights) -> Weights:
    for name, tensor in weights:
        if name == BAD_PARAMETER:
            # Until the process is killed.
            sys.stdin.read()
        yield name, tensor


FAULTS: dict[str, Callable[[Weights], Weights]] = {
    "none": lambda weights: weights,
    "missing": missing,
    "wrong_shape": wrong_shape,
    "unknown": unknown,
    "not_loadable": not_loadable,
    "dies": dies,
    "falls_silent": falls_silent,
}


def main() -> None:
    # Only the series of one release has it, and the tests of all import this file.
    from sglang.srt.weight_sync.broadcast import WeightBroadcaster

    # From here on the timeout counts, and not while this imports.
    print("ready", flush=True)
    port, world_size = int(sys.argv[1]), int(sys.argv[2])
    timeout = float(sys.argv[3]) if len(sys.argv) > 3 else 60.0
    # The servers have the first card.
    device = "cpu" if not ON_GPU else f"cuda:{torch.cuda.device_count() - 1}"
    broadcaster = WeightBroadcaster("127.0.0.1", port, world_size, timeout, device)
    while line := sys.stdin.readline():
        seed, fault = line.split()
        weights = load_file(tiny_model_path(int(seed)) / "model.safetensors")
        broadcaster.send(FAULTS[fault](iter(weights.items())), max_bucket_bytes=BUCKET_BYTES)


if __name__ == "__main__":
    main()
