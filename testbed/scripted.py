"""A script in the place of the engine, behind the real serving layer.

The scheduler and the detokenizer are played: how text is cut into steps, how many ids a
step has, in which order choices advance and finish, and how often the event loop of the
HTTP side runs in between. The tokenizer manager, the handlers, their parsers and the
recorder are real.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

from testbed.handlers import Handlers, make_handlers
from testbed.server import INCREMENTAL

PROMPT_IDS = [5, 6, 7]
# Characters that occur once in a text, so that a chunk shows which steps it was made of.
MARK = 0x4E00
DONE = "[DONE]"


@dataclasses.dataclass
class Step:
    """What one step of the engine adds to a choice."""

    ids: list[int]
    text: str


@dataclasses.dataclass
class Plan:
    """The output of a whole request."""

    choices: list[list[Step]]
    finish: list[dict[str, Any]]
    # Which choice takes its next step, and how often the event loop runs before that.
    schedule: list[tuple[int, int]]
    # Between how many ids reasoning tokens are counted, as later releases do.
    reasoning: tuple[int, int]
    # A scheduler may lengthen a prompt, by the placeholders of an image for example. With
    # None it leaves it as it is.
    num_prompt_ids: int | None = len(PROMPT_IDS)

    def ids(self, index: int) -> list[int]:
        return [i for step in self.choices[index] for i in step.ids]


class ScriptedEngine:
    """Plays the scheduler and the detokenizer for a real TokenizerManager."""

    def __init__(self, manager: Any):
        self.manager = manager
        self.plan = Plan([], [], [], (0, 0))
        self.rids: list[str] = []
        # What was to be prefilled so far.
        self.prompts: list[list[int]] = []
        self.num_prompt_ids = 0
        self.player: asyncio.Task[None] | None = None
        self.warmups: set[asyncio.Task[None]] = set()
        # Up to 0.5.12 the manager sends to a socket itself.
        manager.send_to_scheduler = self
        manager._dispatch_to_scheduler = self.send_pyobj

    def start(self, plan: Plan) -> None:
        self.plan, self.rids, self.player = plan, [], None

    def send_pyobj(self, obj: Any) -> None:
        for request in getattr(obj, "batch", [obj]):
            if not hasattr(request, "sampling_params"):
                # An abort: the script goes on, as a scheduler does for a while.
                continue
            if request.sampling_params.max_new_tokens == 0:
                # The request that warms the prefix cache for n > 1.
                step, finish = Step([], ""), {"type": "length"}
                self.warmups.add(asyncio.create_task(self.put_out(request.rid, step, 0, finish)))
                continue
            self.rids.append(request.rid)
            self.prompts.append(list(request.input_ids or ()))
            self.num_prompt_ids = self.plan.num_prompt_ids or len(request.input_ids)
            if len(self.rids) == len(self.plan.choices):
                self.player = asyncio.create_task(self.play())

    async def play(self) -> None:
        taken = [0] * len(self.rids)
        num_ids = [0] * len(self.rids)
        # A scheduler answers from another process: by then the manager waits for it.
        await asyncio.sleep(0)
        for index, wait in self.plan.schedule:
            for _ in range(wait):
                await asyncio.sleep(0)
            step = self.plan.choices[index][taken[index]]
            taken[index] += 1
            num_ids[index] += len(step.ids)
            is_last = taken[index] == len(self.plan.choices[index])
            finish = dict(self.plan.finish[index]) if is_last else None
            await self.put_out(self.rids[index], step, num_ids[index], finish)

    async def put_out(
        self, rid: str, step: Step, num_ids: int, finish: dict[str, Any] | None
    ) -> None:
        from sglang.srt.managers.io_struct import BatchStrOutput

        # A dataclass, in later releases a msgspec.Struct.
        names = getattr(BatchStrOutput, "__struct_fields__", None)
        if names is None:
            names = [field.name for field in dataclasses.fields(BatchStrOutput)]
        values: dict[str, Any] = dict.fromkeys(names)
        start, end = self.plan.reasoning
        num_reasoning = max(min(num_ids, end) - start, 0)
        values.update(
            rids=[rid],
            finished_reasons=[finish],
            output_strs=[step.text],
            output_ids=[step.ids],
            prompt_tokens=[self.num_prompt_ids],
            completion_tokens=[num_ids],
            # More of the prompt may be cached after a retraction.
            cached_tokens=[num_reasoning // 4],
            reasoning_tokens=[num_reasoning],
            retraction_counts=[0],
            input_token_logprobs_val=[[]],
            input_token_logprobs_idx=[[]],
            output_token_logprobs_val=[[-float(i) for i in step.ids]],
            output_token_logprobs_idx=[step.ids],
            input_top_logprobs_val=[[]],
            input_top_logprobs_idx=[[]],
            output_top_logprobs_val=[[[-float(i), -float(i) - 0.5] for i in step.ids]],
            output_top_logprobs_idx=[[[i, i + 1] for i in step.ids]],
        )
        values = {name: value for name, value in values.items() if name in names}
        handled = self.manager._handle_batch_output(BatchStrOutput(**values))
        if asyncio.iscoroutine(handled):
            await handled


@dataclasses.dataclass
class Stream:
    """What a client gets: the data of each event, and what ended the stream, if an error did."""

    events: list[Any]
    error: str = ""


@dataclasses.dataclass
class Serving:
    """The real serving layer over a scripted engine."""

    loop: asyncio.AbstractEventLoop
    handlers: Handlers
    engine: ScriptedEngine
    is_incremental: bool

    def ask(self, request: Any, plan: Plan) -> list[dict[str, Any]]:
        """Return the chunks of a stream, or the response as the only chunk."""
        self.engine.start(plan)
        if not request.stream:
            return [self.loop.run_until_complete(self._ask_whole(request))]
        stream = Stream([])
        self.loop.run_until_complete(self._ask_stream(request, stream))
        assert not stream.error, stream.error
        assert stream.events.pop() == DONE
        return stream.events

    def stream(self, request: Any, plan: Plan) -> Stream:
        """Return a stream, also if serving it fails."""
        self.engine.start(plan)
        stream = Stream([])
        try:
            self.loop.run_until_complete(self._ask_stream(request, stream))
        except Exception as error:
            stream.error = f"{type(error).__name__}: {error}"
        if stream.error or stream.events[-2:-1] and "error" in stream.events[-2]:
            self.loop.run_until_complete(self._start_afresh())
        return stream

    async def _ask_whole(self, request: Any) -> Any:
        response = await self._handler(request).handle_request(request, None)
        return json.loads(getattr(response, "body", None) or response.model_dump_json())

    async def _ask_stream(self, request: Any, stream: Stream) -> None:
        response = await self._handler(request).handle_request(request, None)
        if not hasattr(response, "stream_response"):
            stream.error = f"status {response.status_code}: {response.body.decode()}"
            return

        async def send(message: Any) -> None:
            # Each message has whole events, and only data in them.
            for event in message.get("body", b"").decode().split("\n\n"):
                if event:
                    data = event.removeprefix("data: ")
                    stream.events.append(data if data == DONE else json.loads(data))

        await response.stream_response(send)

    async def _start_afresh(self) -> None:
        """Keep what a stream that failed has left from reaching the next one."""
        if self.engine.player is not None:
            self.engine.player.cancel()
            await asyncio.gather(self.engine.player, return_exceptions=True)
        for _ in range(4):
            # Generators that were given up are closed by the loop.
            await asyncio.sleep(0)
        self.handlers.manager.rid_to_state.clear()
        self.engine = ScriptedEngine(self.handlers.manager)

    def _handler(self, request: Any) -> Any:
        return self.handlers.chat if hasattr(request, "messages") else self.handlers.completions


@contextlib.contextmanager
def serve(*flags: str) -> Iterator[Serving]:
    """Make the serving layer of a server with these flags, in an event loop of its own."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    handlers = make_handlers(*flags)
    # Texts of the script stand for themselves: an id decodes to its digits.
    handlers.manager.detokenize_logprob_tokens = lambda values, ids, _: [
        (value, i, str(i)) for value, i in zip(values, ids)
    ]
    engine = ScriptedEngine(handlers.manager)
    yield Serving(loop, handlers, engine, INCREMENTAL in flags)
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def marks_in(choice: dict[str, Any]) -> list[int]:
    """The positions of the marks that a chunk shows, wherever it shows them."""
    text = json.dumps(choice, ensure_ascii=True)
    # Arguments of tool calls are JSON inside of JSON.
    return [int(code, 16) - MARK for code in re.findall(r"\\u(4[ef][0-9a-f]{2})", text)]


def logprobs_of(choice: dict[str, Any]) -> list[tuple[float, list[float]]]:
    """The log-probabilities of a choice or chunk, each with those of its alternatives."""
    logprobs = choice.get("logprobs")
    if not logprobs:
        return []
    if "content" in logprobs:
        return [
            (entry["logprob"], [top["logprob"] for top in entry["top_logprobs"]])
            for entry in logprobs["content"]
        ]
    return [
        (value, list(top.values()))
        for value, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    ]


def num_ids_behind(plan: Plan, index: int, mark: int) -> int:
    """How many ids had been put out when the engine put out a mark."""
    num_ids = 0
    for step in plan.choices[index]:
        num_ids += len(step.ids)
        if chr(MARK + mark) in step.text:
            return num_ids
    raise AssertionError(f"mark {mark} was never put out")


def without_ids(chunk: dict[str, Any]) -> dict[str, Any]:
    """A chunk without its ids, and without what differs from request to request."""
    chunk = json.loads(json.dumps(chunk))
    chunk.pop("prompt_token_ids", None)
    for key in ("id", "created"):
        chunk.pop(key, None)
    for choice in chunk.get("choices", ()):
        choice.pop("prompt_token_ids", None)
        choice.pop("token_ids", None)
        choice.pop("weight_versions", None)
        for call in (choice.get("delta") or {}).get("tool_calls") or []:
            # Drawn at random by most parsers, and only on the first chunk of a call.
            call["id"] = call.get("id") is not None
    return chunk
