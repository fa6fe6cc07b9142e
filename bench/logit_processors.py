"""What masks of the vocabulary cost a step: none, and 1 to 128 different ones in a batch.

Every request of the batch has an `action_mask`. A step here is what a sampler does anyway with
logits of [requests, vocabulary], the softmax at their temperatures, and the masks before it.
The first step with masks, which puts them on the device, is left out.

    python -m bench.logit_processors [--requests 128] [--vocabulary 151936]
        [--masks 1,8,32,128] [--rounds 7] [--device cpu] [--machine NAME] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench.common import Row, integers, print_rows, ratios, write_results

NO_MASK = "no mask"
# Of a mask, as the actions of an environment.
NUM_IDS = 1000


def batch_of(num_requests: int, num_masks: int) -> Any:
    from sglang.srt.sampling.logit_processor_batch import LogitProcessorBatch
    from sglang.srt.sampling.logit_processors import split_logit_processors

    chains = []
    for number in range(num_masks):
        mask = {
            "name": "action_mask",
            "params": {"token_ids": list(range(number, number + NUM_IDS))},
        }
        chains.append(split_logit_processors(json.dumps([mask]))[0])
    requests = [
        SimpleNamespace(
            logit_processors=chains[index % num_masks], origin_input_ids=[0], output_ids=[]
        )
        for index in range(num_requests)
    ]
    return LogitProcessorBatch.from_reqs(requests)


class Step:
    """A step of sampling, with the masks of a batch or with none.

    Args:
        batch: The processors of the requests, or None.
        logits: Of shape [requests, vocabulary]. They stay as they are.
    """

    def __init__(self, batch: Any, logits: torch.Tensor):
        self.batch = batch
        self.logits = logits
        size = len(logits)
        self.info = SimpleNamespace(temperatures=torch.ones(size, 1, device=logits.device))
        self.positions = torch.zeros(size, dtype=torch.int64, device=logits.device)

    def run(self) -> float:
        """Return how many milliseconds it took."""
        logits = self.logits.clone()
        self._synchronize()
        start = time.perf_counter()
        if self.batch is not None:
            output = SimpleNamespace(next_token_logits=logits)
            self.batch.apply(output, self.info, self.positions)
        logits.div_(self.info.temperatures)
        torch.softmax(logits, dim=-1)
        self._synchronize()
        return (time.perf_counter() - start) * 1e3

    def _synchronize(self) -> None:
        if self.logits.is_cuda:
            torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=128, help="in the batch (default: 128)")
    parser.add_argument("--vocabulary", type=int, default=151936, help="default: 151936")
    parser.add_argument(
        "--masks", type=integers, default=[1, 8, 32, 128], help="default: 1,8,32,128"
    )
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (default: cpu)")
    parser.add_argument("--machine", help="what runs it, for the report")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    if any(not 1 <= number <= args.requests for number in args.masks):
        parser.error(f"argument --masks: must be 1 to {args.requests}, the number of --requests")
    if args.vocabulary < args.requests + NUM_IDS:
        parser.error(f"argument --vocabulary: must be {args.requests + NUM_IDS} or more")

    # As the tests run the engine.
    torch.set_num_threads(1)
    logits = torch.randn(args.requests, args.vocabulary, device=args.device)
    steps = {NO_MASK: Step(None, logits)}
    for number in args.masks:
        steps["1 mask" if number == 1 else f"{number} masks"] = Step(
            batch_of(args.requests, number), logits
        )
    for step in steps.values():
        step.run()
    values: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            values[name].append(step.run())
    rows = [
        Row(
            case=f"a step of {args.requests} requests, {args.vocabulary} ids, {args.device}",
            tokens=0,
            variant=name,
            unit="ms",
            values=found,
            ratios=ratios(found, values[NO_MASK]),
        )
        for name, found in values.items()
    ]
    print_rows(rows)
    if args.json:
        write_results(args.json, rows, args.machine)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
