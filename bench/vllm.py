"""What asking for ids costs on vLLM: one server on the CPU, asking against not asking.

The client and the model are those of the whole-server benchmark, so the ratios can be
compared. Needs an environment of its own in build/env-vllm (3.5 GB), and makes it.

    python -m bench.vllm [--clients 1,16,64] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.common import integers
from bench.whole_server import CLIENTS, MODES, ONLY, Load, keep, measure
from testbed.tiny_model import tiny_model_path
from testbed.vllm import VLLM, vllm_server
from tools.environment import TORCH


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clients", type=integers, default=CLIENTS, help=f"default: {CLIENTS}")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    load = Load("vllm-chat", "m", str(tiny_model_path()), 32, 128, 4)
    with vllm_server() as url:
        measured = measure(ONLY, {"only": url}, load, args.clients, args.rounds, MODES)
        versions = {"vllm": VLLM.partition("==")[2], "torch": TORCH.partition("==")[2]}
        keep(measured, args.json, **versions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
