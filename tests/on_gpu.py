"""Run on two GPUs of one host what a CPU cannot show, each step with a limit and a log.

    python -m tests.on_gpu [--output FOLDER] [--machine TEXT] [STEP ...]

Run it with the Python of an environment that has the patched wheel, for the release UPSTREAM.
The result of the contract goes to docs/compatibility/, those of benchmarks to bench/results/,
and logs to FOLDER. Exit status: 0 if all steps ended with 0, else 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from testbed.release import ROOT, UPSTREAM
from tools.verify import kill_group

RESULTS = ROOT / "bench" / "results"
# CUDA graphs and the overlap scheduler; increments; ranks and replicas; speculation by what was
# said and by another model; an adapter.
MODES = ("overlap", "stream_output", "tp2", "dp2", "ngram", "standalone", "trainer_lora")
TRAINER_TESTS = (
    "bad_weights",
    "that_is_gone",
    "never_comes",
    "test_a_folder",
    "resume_during",
    "gives_memory_back",
    "what_is_sent",
)
RANKS_TESTS = ("to_two_servers", "all_ranks", "size_of_the_world")
# To stop the servers of a step that is interrupted.
GRACE_S = 20.0


@dataclasses.dataclass(frozen=True)
class Step:
    """A part of the list.

    Attributes:
        module: What is run, with its arguments.
        limit: In seconds, after which it is interrupted.
    """

    about: str
    module: str
    args: tuple[str, ...]
    limit: float


def pytest_of(tests: tuple[str, ...], expression: str) -> tuple[str, ...]:
    return (*tests, "-k", expression, "--durations=10", "--tb=short")


STEPS = {
    "contract": Step(
        f"the contract on servers of the modes {', '.join(MODES)}; stores the result",
        "pytest",
        pytest_of(
            ("tests/test_end_to_end.py", "tests/test_trainer_routes.py", "--store-results"),
            f"({' or '.join(MODES)}) and not interval",
        ),
        540,
    ),
    "trainer": Step(
        "weights over NCCL, as a whole or not at all, a trainer that is gone, and sleep",
        "pytest",
        pytest_of(
            ("tests/test_trainer_routes.py", "tests/test_all_or_nothing.py"),
            " or ".join(TRAINER_TESTS),
        ),
        540,
    ),
    "ranks": Step(
        "weights over NCCL to servers on both cards, and to both ranks of one",
        "pytest",
        pytest_of(("tests/test_trainer_routes.py",), " or ".join(RANKS_TESTS)),
        540,
    ),
    "soak": Step(
        "10^6 streamed ids, hang-ups and aborts among them, while weights change ten times; and "
        "fewer of servers on both cards",
        "pytest",
        pytest_of(("tests/test_trainer_routes.py",), "lose_no_id"),
        540,
    ),
    "transfer": Step(
        "a prefill on one card and the rest on the other, over nixl",
        "pytest",
        ("tests/test_kv_transfer.py", "--durations=10", "--tb=short"),
        240,
    ),
    "experts": Step(
        "the routed experts of a mixture against the capture of the engine",
        "pytest",
        ("tests/test_routed_experts.py", "--durations=10", "--tb=short"),
        300,
    ),
    "engine": Step(
        "engines in programs: memory that tags free, tensors and handles of the card, an adapter",
        "pytest",
        pytest_of(("tests/test_engine.py",), "not actor"),
        540,
    ),
    "broadcast": Step(
        "weights in buckets of several sizes against a bare broadcast, and the silence",
        "bench.weight_broadcast",
        (
            "--rounds=10",
            "--buckets=128,256,512,1024",
            f"--json={RESULTS}/weight_broadcast-{UPSTREAM}.json",
        ),
        400,
    ),
    "processors": Step(
        "a step of sampling with 1 to 128 different masks",
        "bench.logit_processors",
        ("--device=cuda", f"--json={RESULTS}/logit_processors-gpu-{UPSTREAM}.json"),
        120,
    ),
    "server": Step(
        "stock and patched on the same card, 1, 64 and 256 clients, each card in its turn",
        "bench.gpu",
        (f"--json={RESULTS}/gpu-{UPSTREAM}.json",),
        900,
    ),
}


def run(step: Step, log: Path, machine: str | None) -> str:
    """Run a step and say how it ended: `passed`, `failed (STATUS)` or `stopped`."""
    args = list(step.args)
    if machine and step.module.startswith("bench."):
        args += ["--machine", machine]
    # NCCL fails where the ranks of a group do not agree, and servers have it so.
    env = {**os.environ, "TEST_DEVICE": "cuda", "NCCL_CUMEM_ENABLE": "0", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", step.module, *args],
            cwd=ROOT,
            env=env,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(step.limit)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as e:
            # As Ctrl-C does, so that it stops its servers.
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                kill_group(process)
            if isinstance(e, KeyboardInterrupt):
                raise
            return "stopped"
    return f"failed ({status})" if status else "passed"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help="some of them (default: all)")
    parser.add_argument("--list", action="store_true", help="list the steps and exit")
    parser.add_argument("--machine", help="what runs it, for the report of the benchmarks")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build" / "gpu", help="of logs (default: build/gpu)"
    )
    args = parser.parse_args()
    unknown = [name for name in args.steps if name not in STEPS]
    if unknown:
        parser.error(f"unknown step {unknown[0]!r}; known: {', '.join(STEPS)}")
    names = args.steps or list(STEPS)
    if args.list:
        for name in names:
            print(f"{name:10} {STEPS[name].limit:4.0f} s  {STEPS[name].about}")
        return 0
    # A shell that runs this in the background has it ignored, which every step would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    args.output.mkdir(parents=True, exist_ok=True)
    has_failed = False
    for name in names:
        start = time.monotonic()
        outcome = run(STEPS[name], args.output / f"{name}.log", args.machine)
        has_failed |= outcome != "passed"
        print(f"{name:10} {outcome:12} {time.monotonic() - start:5.0f} s", flush=True)
    return 1 if has_failed else 0


if __name__ == "__main__":
    sys.exit(main())
