"""What exact ids cost in the serving layer, with no engine in the way.

The handlers of /v1/chat/completions and /v1/completions answer requests from recorded
engine outputs: one id and four characters a step, in the form that the tokenizer manager
hands over. Each variant of the package runs in a process of its own; the processes take
turns, so that every ratio is between runs that were made side by side.

    python -m bench.serving_layer [--tokens 128,1024] [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from bench.common import (
    AGENTCORE_RELEASE,
    BUILD,
    Row,
    agentcore_package,
    integers,
    print_rows,
    ratios,
    stock_package,
    write_results,
)
from testbed.client import TOOL
from testbed.release import UPSTREAM

TOKENS = "128,1024,8192,32768"
CHARS_PER_TOKEN = 4
# The shortest time to measure: small requests are repeated until they fill it.
MIN_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Variant:
    """A package and what is asked of it.

    Attributes:
        package: "stock", "patched" or "agentcore".
        fields: What the request adds.
        encodes: Whether the text is tokenized again, as a proxy would.
    """

    package: str
    fields: dict[str, Any]
    encodes: bool = False


VARIANTS = {
    "stock": Variant("stock", {}),
    "patched, not asked": Variant("patched", {}),
    "patched, ids": Variant("patched", {"return_token_ids": True}),
    "patched, ids and logprobs": Variant("patched", {"return_token_ids": True, "logprobs": 1}),
    "stock, logprobs": Variant("stock", {"logprobs": 1}),
    "stock, tokenized again": Variant("stock", {}, encodes=True),
}
if UPSTREAM == AGENTCORE_RELEASE:
    VARIANTS["string-replacing patch"] = Variant("agentcore", {})


class Endpoint(NamedTuple):
    """A handler, the flags of its server, and what every request says."""

    flags: list[str]
    fields: dict[str, Any]


USAGE = {"include_usage": True, "continuous_usage_stats": True}
ENDPOINTS = {
    "chat": Endpoint([], {}),
    "chat with reasoning": Endpoint(["--reasoning-parser=qwen3"], {}),
    "chat with tools": Endpoint(["--tool-call-parser=qwen25"], {"tools": [TOOL]}),
    "chat with usage": Endpoint([], {"stream_options": USAGE}),
    "completions": Endpoint([], {}),
}
# The endpoints, and whether they stream.
CASES = [
    ("chat", True),
    ("chat", False),
    ("chat with reasoning", True),
    ("chat with tools", True),
    ("chat with usage", True),
    ("completions", True),
    ("completions", False),
]
# The source of the outputs alone, taken off the other figures, and the least that sending
# ids can cost.
SOURCE, FLOOR = "source", "floor"


class Worker:
    """A process that measures variants of one package.

    Args:
        under: A command that runs it, such as a profiler.
    """

    def __init__(self, package: str, under: Sequence[str] = ()):
        paths = {"stock": stock_package, "agentcore": agentcore_package}
        env = dict(os.environ)
        if package in paths:
            env["PYTHONPATH"] = str(paths[package]())
        env["SGLANG_USE_CPU_ENGINE"] = "1"
        BUILD.mkdir(parents=True, exist_ok=True)
        with (BUILD / f"worker-{package}.log").open("w") as log:
            self.process = subprocess.Popen(
                [*under, sys.executable, "-m", "bench.serving_layer", "--worker"],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def measure(self, **job: Any) -> float:
        """Return the CPU time of one request in seconds.

        Args:
            job: What is asked, and `count` where it is to be asked so many times.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError(f"the worker ended with status {self.process.wait()}")

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Replay:
    """Plays recorded outputs for requests of `num_tokens` tokens."""

    def __init__(self, num_tokens: int):
        self.ids = [100 + i % 190 for i in range(num_tokens)]
        self.text = "tool" * num_tokens
        self.num_tokens = num_tokens
        # As the tokenizer manager does for each request that it sends. Stock has none.
        self.track: Callable[..., bool] | None = None
        with contextlib.suppress(ImportError):
            from sglang.srt.managers.token_id_tracking import track_token_ids

            self.track = track_token_ids

    async def __call__(self, obj: Any, raw_request: Any = None) -> AsyncIterator[dict[str, Any]]:
        num_tokens, ids, text = self.num_tokens, self.ids, self.text
        logprobs: list[tuple[float, int, str]] = []
        if self.track is not None:
            state = SimpleNamespace(
                output_ids=ids, output_token_logprobs=logprobs, output_top_logprobs=[]
            )
            self.track(SimpleNamespace(rid="r", input_ids=[1, 2, 3]), state)
        for n in range(1, num_tokens + 1) if obj.stream else [num_tokens]:
            meta_info = {
                "id": "r",
                "finish_reason": {"type": "length", "length": n} if n == num_tokens else None,
                "prompt_tokens": 3,
                "completion_tokens": n,
                "cached_tokens": 0,
                "weight_version": "default",
            }
            if obj.return_logprob:
                logprobs.extend((-1.25, i, "tool") for i in ids[len(logprobs) : n])
                meta_info["output_token_logprobs"] = logprobs
                # The key of later releases.
                meta_info["output_token_logprobs_length"] = n
            yield {
                "text": text[: CHARS_PER_TOKEN * n],
                "output_ids": ids[:n],
                "meta_info": meta_info,
            }


def serve_jobs() -> None:
    """Measure what comes in as JSON lines."""
    import orjson
    from fastapi.responses import JSONResponse
    from fastapi.routing import serialize_response
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
    from starlette.responses import Response

    from testbed.handlers import make_handlers
    from testbed.tiny_model import load_tokenizer

    # One core for all variants: another may have a busier neighbour.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    made = {
        name: make_handlers("--context-length=4096", *endpoint.flags)
        for name, endpoint in ENDPOINTS.items()
    }
    tokenizer = load_tokenizer()

    def build(endpoint: str, stream: bool, fields: dict[str, Any]) -> Any:
        fields = {**ENDPOINTS[endpoint].fields, **fields}
        if endpoint == "completions":
            return CompletionRequest(model="m", prompt=[5, 6, 7], stream=stream, **fields)
        fields = {**fields, "logprobs": bool(fields.get("logprobs"))}
        messages = [{"role": "user", "content": "hi"}]
        return ChatCompletionRequest(model="m", messages=messages, stream=stream, **fields)

    async def send(message: Any) -> None:
        pass

    async def answer(endpoint: str, stream: bool, fields: dict[str, Any]) -> None:
        handlers = made[endpoint]
        handler = handlers.completions if endpoint == "completions" else handlers.chat
        response = await handler.handle_request(build(endpoint, stream, fields), None)
        if stream:
            await response.stream_response(send)
        elif not isinstance(response, Response):
            # What FastAPI does with a response that is a model.
            JSONResponse(await serialize_response(response_content=response))

    async def drain(replay: Replay, stream: bool) -> None:
        async for _ in replay(SimpleNamespace(stream=stream, return_logprob=False)):
            pass

    async def write_ids(replay: Replay, stream: bool) -> None:
        if stream:
            for i in range(replay.num_tokens):
                orjson.dumps(replay.ids[i : i + 1])
        else:
            orjson.dumps(replay.ids)

    async def once(job: dict[str, Any], replay: Replay) -> None:
        if job["what"] == SOURCE:
            await drain(replay, job["stream"])
        elif job["what"] == FLOOR:
            await write_ids(replay, job["stream"])
        else:
            await answer(job["endpoint"], job["stream"], job["fields"])
            if job["encodes"]:
                tokenizer.encode(replay.text)

    async def repeat(job: dict[str, Any], replay: Replay) -> float:
        count = 0
        start = time.process_time()
        while True:
            await once(job, replay)
            # The loop closes the generators that are left over. Without a turn they pile up,
            # with all that they hold.
            await asyncio.sleep(0)
            count += 1
            spent = time.process_time() - start
            if count >= job["count"] if "count" in job else spent >= MIN_SECONDS:
                return spent / count

    replays: dict[int, Replay] = {}
    for line in sys.stdin:
        job = json.loads(line)
        replay = replays.setdefault(job["num_tokens"], Replay(job["num_tokens"]))
        made[job["endpoint"]].manager.generate_request = replay
        print(f"seconds {loop.run_until_complete(repeat(job, replay))!r}", flush=True)


def measure(tokens: list[int], rounds: int) -> list[Row]:
    packages = sorted({variant.package for variant in VARIANTS.values()})
    workers = {package: Worker(package) for package in packages}
    rows = []
    for endpoint, stream in CASES:
        for num_tokens in tokens:
            samples: dict[str, list[float]] = {}
            job = {"num_tokens": num_tokens, "stream": stream, "endpoint": endpoint}
            # The first round warms up, but not for one that only tries the script.
            num_warmups = int(rounds > 1)
            for round_ in range(num_warmups + rounds):
                taken = {}
                for name, variant in VARIANTS.items():
                    taken[name] = workers[variant.package].measure(
                        what="answer", fields=variant.fields, encodes=variant.encodes, **job
                    )
                for name in (FLOOR, SOURCE):
                    taken[name] = workers["stock"].measure(what=name, **job)
                if round_ >= num_warmups:
                    for name, seconds in taken.items():
                        samples.setdefault(name, []).append(seconds)
            # The least: too much would make every variant look better than it is.
            source = min(samples.pop(SOURCE))
            for name in VARIANTS:
                samples[name] = [seconds - source for seconds in samples[name]]
            mode = "streamed" if stream else "whole"
            units = num_tokens if stream else 1
            for name, seconds in samples.items():
                rows.append(
                    Row(
                        case=f"{endpoint}, {mode}",
                        tokens=num_tokens,
                        variant=name,
                        unit="CPU µs per chunk" if stream else "CPU µs per response",
                        values=[1e6 * value / units for value in seconds],
                        ratios=ratios(seconds, samples["stock"]),
                    )
                )
            print_rows([row for row in rows if row.tokens == num_tokens][-len(samples) :])
    for worker in workers.values():
        worker.stop()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--tokens", type=integers, default=TOKENS, help=f"output tokens (default: {TOKENS})"
    )
    parser.add_argument("--rounds", type=int, default=7, help="measurements (default: 7)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve_jobs()
        return 0
    rows = measure(args.tokens, args.rounds)
    if args.json:
        write_results(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
