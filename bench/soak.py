"""Many ids to many clients of every kind of request, each of them checked.

The stand-in for the scheduler puts out ids that follow from the seed of the request and the
position (testbed/scheduler.py), so a client knows what it should get: every id once and in
order, one log-probability for each, and as many as the usage says. After it, nothing may be left
of the requests in the HTTP process.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import re
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import requests

from bench.common import MESSAGES, make_request
from testbed.client import CHAT, COMPLETIONS, TOOL, tool_call
from testbed.release import NUMBER
from testbed.scheduler import EnginelessServer, Script
from testbed.server import (
    CUTS_INCREMENTAL_CHAT,
    CUTS_INCREMENTAL_COMPLETIONS,
    FAILS_ABORTED_STREAMS,
    INCREMENTAL,
)
from testbed.tiny_model import load_tokenizer

FLAGS = ["--tool-call-parser=qwen", "--reasoning-parser=qwen3"]
MODES: dict[str, list[str]] = {"cumulative": FLAGS, "incremental": [*FLAGS, INCREMENTAL]}
# Steps as fast as the stand-in can, where several are read together, and slower ones.
PACES_S = (0.0, 0.004)
CALL = tool_call("Paris")
THOUGHT = "<think>\nParis, then. Let me see.\n</think>\n\nIt rains in Paris."
NUM_TOP_LOGPROBS = 2
# Of a request that is aborted or hung up on, so that it runs when that happens.
LONG = 2000
# For a prompt with n choices, stock keeps n - 1 states for ever.
STOCK_KEEPS_STATES = (0, 5, 10) <= NUMBER < (0, 5, 23)
# How long the server may take to notice that clients are gone.
PATIENCE_S = 30.0


class Kind(NamedTuple):
    """A kind of request.

    Attributes:
        num_choices: How many choices it has.
        text: What they say, if it is not any text.
        end: How it ends: "whole" unless the client hangs up or aborts it.
    """

    path: str
    fields: dict[str, Any]
    num_choices: int = 1
    text: str | None = None
    end: str = "whole"

    @property
    def has_logprobs(self) -> bool:
        return bool(self.fields.get("logprobs"))


CHAT_LOGPROBS = {"logprobs": True, "top_logprobs": NUM_TOP_LOGPROBS}
TOOLS = {"tools": [TOOL]}
KINDS: dict[str, Kind] = {
    "chat": Kind(CHAT, MESSAGES),
    "chat, log-probabilities": Kind(CHAT, {**MESSAGES, **CHAT_LOGPROBS}),
    "chat, n": Kind(CHAT, {**MESSAGES, "n": 3}, 3),
    "chat, n, log-probabilities": Kind(CHAT, {**MESSAGES, **CHAT_LOGPROBS, "n": 2}, 2),
    "chat, tools": Kind(CHAT, {**MESSAGES, **TOOLS}, text=CALL),
    "chat, tools, log-probabilities": Kind(CHAT, {**MESSAGES, **TOOLS, **CHAT_LOGPROBS}, text=CALL),
    "chat, tools, no call": Kind(CHAT, {**MESSAGES, **TOOLS}),
    "chat, reasoning": Kind(CHAT, MESSAGES, text=THOUGHT),
    "chat, reasoning, log-probabilities": Kind(CHAT, {**MESSAGES, **CHAT_LOGPROBS}, text=THOUGHT),
    "chat, not streamed": Kind(CHAT, {**MESSAGES, **CHAT_LOGPROBS, "stream": False, "n": 2}, 2),
    "chat, hung up": Kind(CHAT, MESSAGES, end="hang up"),
    "chat, aborted": Kind(CHAT, {**MESSAGES, **CHAT_LOGPROBS}, end="abort"),
    "completions": Kind(COMPLETIONS, {"prompt": "Paris is"}),
    "completions, log-probabilities": Kind(
        COMPLETIONS, {"prompt": "Paris is", "logprobs": NUM_TOP_LOGPROBS}
    ),
    "completions, prompts": Kind(COMPLETIONS, {"prompt": ["Paris is", "Rome", "Oslo"]}, 3),
    "completions, n": Kind(COMPLETIONS, {"prompt": "Paris is", "n": 2}, 2),
    "completions, not streamed": Kind(
        COMPLETIONS, {"prompt": "Paris is", "logprobs": 1, "stream": False}
    ),
    "completions, hung up": Kind(COMPLETIONS, {"prompt": "Paris is", "logprobs": 1}, end="hang up"),
    "completions, aborted": Kind(COMPLETIONS, {"prompt": "Paris is"}, end="abort"),
}
if FAILS_ABORTED_STREAMS:
    KINDS = {name: kind for name, kind in KINDS.items() if kind.end != "abort"}


class Wrong(Exception):
    """A client did not get what the stand-in put out."""


class Choice:
    """What has come of a choice."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        # A text, a log-probability and the number of alternatives.
        self.logprobs: list[tuple[str, float, int]] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.weight_versions: list[dict[str, Any]] = []

    def add(self, data: dict[str, Any]) -> None:
        ids = data.get("token_ids", [])
        logprobs = read_logprobs(data.get("logprobs"))
        if logprobs and len(logprobs) != len(ids):
            raise Wrong(f"{len(ids)} ids with {len(logprobs)} log-probabilities in a chunk")
        self.ids += ids
        self.logprobs += logprobs
        message = data.get("delta") or data.get("message") or {"content": data.get("text")}
        self.text += (message.get("reasoning_content") or "") + (message.get("content") or "")
        self.finish_reason = data.get("finish_reason") or self.finish_reason
        self.weight_versions = data.get("weight_versions") or self.weight_versions


def read_logprobs(data: dict[str, Any] | None) -> list[tuple[str, float, int]]:
    """Read the log-probabilities of either endpoint."""
    if not data:
        return []
    if "content" in data:
        return [(x["token"], x["logprob"], len(x["top_logprobs"])) for x in data["content"]]
    top = data.get("top_logprobs") or []
    return [
        (token, value, len(others or ()))
        for token, value, others in itertools.zip_longest(
            data["tokens"], data["token_logprobs"], top
        )
    ]


async def read_response(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yield the events of a stream, or the body of a response that is none."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    if " 200 " not in head.partition("\r\n")[0]:
        raise Wrong(f"{head.partition(chr(13))[0]}: {(await reader.read()).decode()}")
    if "chunked" not in head.lower():
        yield await reader.read()
        return
    buffer = b""
    while size := int(await reader.readline(), 16):
        buffer += (await reader.readexactly(size + 2))[:-2]
        *events, buffer = buffer.split(b"\n\n")
        for event in events:
            yield event.removeprefix(b"data: ")
    if buffer:
        raise Wrong(f"The stream ended with {buffer!r}")


class Clients:
    """The clients of one process.

    Attributes:
        num_ids: How many ids came, by kind of request.
        reasons: How the requests ended.
        num_kept: How many states stock keeps for ever of these requests.
        num_by_version: How many ids the weights of each version made.
    """

    def __init__(self, port: int, first_seed: int, incremental: bool = False):
        self.port = port
        self.incremental = incremental
        self.script = Script()
        self.texts = load_tokenizer().batch_decode([[i] for i in range(len(load_tokenizer()))])
        self.seeds = itertools.count(first_seed)
        self.num_ids: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.num_kept = 0
        self.num_by_version: Counter[str] = Counter()

    async def run(self, clients: int, num_ids: int, tokens: int) -> None:
        async def run_one(offset: int) -> None:
            names = list(KINDS)
            # Each kind at least once, by one client or the other.
            for i in itertools.count(offset):
                if i >= offset + -(-len(names) // clients) and self.num_ids.total() >= num_ids:
                    return
                await self.ask(names[i % len(names)], tokens)

        await asyncio.gather(*(run_one(i) for i in range(clients)))

    async def ask(self, name: str, tokens: int) -> None:
        """Send a request of a kind and check what comes.

        Raises:
            Wrong: If it is not what the stand-in puts out.
        """
        kind = KINDS[name]
        seed = next(self.seeds)
        try:
            choices, usage = await self.receive(kind, seed, tokens)
            self.check(kind, seed, choices, usage)
        except (Wrong, AssertionError, KeyError, OSError, asyncio.IncompleteReadError) as exc:
            raise Wrong(f"{name}, seed {seed}: {type(exc).__name__}: {exc}") from exc
        self.num_kept += STOCK_KEEPS_STATES * (kind.fields.get("n", 1) - 1)
        for choice in choices.values():
            self.num_ids[name] += len(choice.ids)
            self.reasons[f"{kind.end}: {choice.finish_reason}"] += 1

    async def receive(
        self, kind: Kind, seed: int, tokens: int
    ) -> tuple[dict[int, Choice], dict[str, int] | None]:
        """Return the choices by index, and the usage if the client did not hang up."""
        max_tokens = tokens if kind.text is None else len(kind.text) + 1
        body = {
            "model": "m",
            "stream": True,
            "seed": seed,
            "max_tokens": max_tokens if kind.end == "whole" else LONG,
            "return_token_ids": True,
            **kind.fields,
        }
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        if kind.text is not None:
            body["regex"] = re.escape(kind.text)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)
        writer.write(make_request(self.port, kind.path, body))
        choices: dict[int, Choice] = {}
        usage = None
        interrupt_at = seed % 50
        try:
            async for event in read_response(reader):
                if event == b"[DONE]":
                    break
                data = json.loads(event)
                if "error" in data:
                    raise Wrong(f"{data}")
                usage = data.get("usage") or usage
                for item in data["choices"]:
                    choices.setdefault(item["index"], Choice()).add(item)
                if kind.end != "whole" and choices and len(choices[0].ids) > interrupt_at:
                    if kind.end == "hang up":
                        return choices, None
                    await self.abort(data["id"])
                    interrupt_at = LONG
        finally:
            writer.close()
        if usage is None:
            raise Wrong("The stream ended without usage")
        return choices, usage

    async def abort(self, rid: str) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(make_request(self.port, "/abort_request", {"rid": rid}))
        await reader.read()
        writer.close()

    def check(
        self, kind: Kind, seed: int, choices: dict[int, Choice], usage: dict[str, int] | None
    ) -> None:
        if sorted(choices) != list(range(kind.num_choices)):
            raise Wrong(f"choices {sorted(choices)} instead of {kind.num_choices}")
        self.check_ids(kind, seed, choices)
        if usage is not None:
            received = sum(len(choice.ids) for choice in choices.values())
            if received != usage["completion_tokens"]:
                raise Wrong(f"{received} ids instead of {usage['completion_tokens']}")

    def check_ids(self, kind: Kind, seed: int, choices: dict[int, Choice]) -> None:
        # Which choice is which is up to the order in which they reach the stand-in.
        planned = [
            self.script.plan(seed, LONG, kind.text, choice) for choice in range(kind.num_choices)
        ]
        for index, choice in sorted(choices.items()):
            fits = [ids for ids in planned if ids[: len(choice.ids)] == choice.ids]
            if not fits:
                self.explain(index, choice, planned[0])
            planned.remove(fits[0])
            self.check_choice(kind, choice)

    def explain(self, index: int, choice: Choice, planned: list[int]) -> None:
        for position, pair in enumerate(zip(choice.ids, planned, strict=False)):
            if pair[0] != pair[1]:
                raise Wrong(f"choice {index}, id {position} is {pair[0]} instead of {pair[1]}")
        raise Wrong(f"choice {index} has {len(choice.ids)} ids instead of {len(planned)}")

    def check_choice(self, kind: Kind, choice: Choice) -> None:
        texts = [self.texts[i] for i in choice.ids]
        if kind.has_logprobs:
            count = kind.fields.get("top_logprobs", kind.fields["logprobs"])
            wanted = [(text, Script.logprob(i), count) for i, text in enumerate(texts)]
            if choice.logprobs != wanted:
                pairs = itertools.zip_longest(choice.logprobs, wanted)
                wrong = next(pair for pair in pairs if pair[0] != pair[1])
                raise Wrong(f"log-probability {wrong[0]} instead of {wrong[1]}")
        cuts = CUTS_INCREMENTAL_CHAT if kind.path == CHAT else CUTS_INCREMENTAL_COMPLETIONS
        # Parsers strip what they return.
        text = "".join(texts).strip()
        is_cut = self.incremental and cuts
        if kind.text is None and not is_cut and choice.text.strip() != text:
            raise Wrong(f"the text {choice.text!r} instead of {text!r}")


class EngineClients(Clients):
    """The clients of a real engine: how many its ids are is known, and what has to fit to them."""

    def check_ids(self, kind: Kind, seed: int, choices: dict[int, Choice]) -> None:
        for choice in choices.values():
            texts = [self.texts[i] for i in choice.ids]
            # A part of a character is shown in the way of the release.
            shown = [text for text, _, _ in choice.logprobs]
            pairs = itertools.zip_longest(shown, texts)
            if kind.has_logprobs and any(a != b for a, b in pairs if b is None or "�" not in b):
                raise Wrong(f"log-probabilities of {shown} instead of {texts}")
            end = 0
            for span in choice.weight_versions:
                if span["start"] != end:
                    raise Wrong(f"a gap in {choice.weight_versions}")
                end = span["end"]
                self.num_by_version[span["version"]] += end - span["start"]
            if kind.end != "hang up" and end != len(choice.ids):
                raise Wrong(f"{choice.weight_versions} of {len(choice.ids)} ids")


def run_clients(own: Clients, clients: int, num_ids: int, tokens: int, pipe: Any) -> None:
    try:
        asyncio.run(own.run(clients, num_ids, tokens))
        pipe.send((own.num_ids, own.reasons, own.num_by_version, own.num_kept))
    except Exception as exc:
        pipe.send(exc)


def start_clients(
    each: Sequence[Clients], clients: int, num_ids: int, tokens: int
) -> list[Connection]:
    """Divide clients and ids among processes.

    Returns:
        Where each process sends its `num_ids`, `reasons`, `num_by_version` and `num_kept` at its
        end, or an exception.
    """
    context = multiprocessing.get_context("fork")
    pipes = []
    for index, own in enumerate(each):
        ours, theirs = context.Pipe(duplex=False)
        share = clients // len(each) + (index < clients % len(each))
        args = (own, share, num_ids // len(each), tokens, theirs)
        context.Process(target=run_clients, args=args, daemon=True).start()
        theirs.close()
        pipes.append(ours)
    return pipes


def soak(
    mode: str, num_ids: int, clients: int, processes: int, tokens: int
) -> tuple[Counter[str], Counter[str]]:
    """Stream so many ids from a server of a mode, and check that nothing is left of it.

    Returns:
        How many ids came by kind of request, and how the requests ended.

    Raises:
        Wrong: If a client did not get what it should, or something is left.
    """
    total: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    num_kept = 0
    with EnginelessServer(f"soak {mode}", *MODES[mode]) as server:
        for phase, pace in enumerate(PACES_S):
            server.slow_down(pace)
            each = [
                Clients(server.port, (phase * processes + i) * 1_000_000, mode == "incremental")
                for i in range(processes)
            ]
            share = num_ids // len(PACES_S)
            for pipe in start_clients(each, clients, share, tokens):
                found = pipe.recv()
                if isinstance(found, Exception):
                    raise found
                total += found[0]
                reasons += found[1]
                num_kept += found[3]
            print(
                f"{mode}: {total.total()} of {num_ids} ids, a step in {pace} s",
                file=sys.stderr,
                flush=True,
            )
        check_nothing_is_left(server, num_kept)
    return total, reasons


def check_nothing_is_left(server: EnginelessServer, num_kept: int) -> None:
    """Raise unless requests are gone from the stand-in and from the HTTP process.

    Args:
        num_kept: How many states of requests stock keeps.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        left = server.left()
        is_idle = requests.post(f"{server.url}/flush_cache", timeout=60).ok
        if is_idle and left["states"] <= num_kept and not left["recorders"]:
            return
        if time.monotonic() > deadline:
            raise Wrong(f"After all requests have ended, there are left: {left}")
        time.sleep(0.2)
