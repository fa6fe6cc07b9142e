"""Random engine outputs through the real serving layer.

Only the scheduler and the detokenizer are played by a script, drawn by hypothesis: how
text is cut into steps, how many ids a step has, in which order choices advance and
finish, and how many steps come between two wake-ups of the HTTP side. The tokenizer
manager, the chat and completion handlers, their parsers and the recorder are real.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.handlers import make_handlers
from tests.engine.server import CUTS_INCREMENTAL_COMPLETIONS, INCREMENTAL

PROMPT_IDS = [5, 6, 7]
# Characters that occur once in a text, so that a chunk shows which steps it was made of.
MARK = 0x4E00
WHOLE = re.compile(r"</?think>|</?tool_call>|\[f\(.*?\)]")
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
    },
}


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

    def ids(self, index: int) -> list[int]:
        return [i for step in self.choices[index] for i in step.ids]


@st.composite
def plans(draw: st.DrawFn, with_tags: bool) -> Plan:
    num_choices = draw(st.sampled_from([1, 1, 2, 3]))
    choices: list[list[Step]] = []
    for index in range(num_choices):
        text = draw(texts(with_tags))
        num_cuts = draw(st.integers(0, 11))
        where = list(range(len(text) + 1))
        if draw(st.booleans()):
            # A tag is often one token, and a step of several ids may have a whole call.
            spans = [match.span() for match in WHOLE.finditer(text)]
            where = [i for i in where if not any(start < i < end for start, end in spans)]
        drawn = draw(st.lists(st.sampled_from(where), min_size=num_cuts, max_size=num_cuts))
        cuts = sorted(drawn)
        steps = []
        position = 0
        for start, end in zip([0, *cuts], [*cuts, len(text)]):
            # A later step may bring nothing but text that was held back.
            size = draw(st.integers(0 if steps else 1, 4))
            ids = [10_000 * index + position + k for k in range(size)]
            position += size
            steps.append(Step(ids, text[start:end]))
        choices.append(steps)
    turns = [index for index, steps in enumerate(choices) for _ in steps]
    order = draw(st.permutations(turns))
    waits = draw(
        st.lists(st.integers(0, 12), min_size=len(order), max_size=len(order))
    )
    finish = [
        draw(
            st.sampled_from(
                [
                    {"type": "stop", "matched": 3},
                    {"type": "stop", "matched": "END"},
                    {"type": "length", "length": 9},
                    {"type": "abort", "message": "Aborted", "status_code": None},
                ]
            )
        )
        for _ in choices
    ]
    start = draw(st.integers(0, 6))
    reasoning = start, start + draw(st.integers(0, 12))
    return Plan(choices, finish, list(zip(order, waits)), reasoning)


@st.composite
def texts(draw: st.DrawFn, with_tags: bool) -> str:
    """A text of marks, with reasoning and tool calls, possibly cut short."""
    marks = iter(range(MARK, MARK + 10_000))

    def words() -> str:
        size = draw(st.integers(0, 8 if with_tags else 20))
        return "".join(chr(next(marks)) for _ in range(size))

    text = words()
    if with_tags:
        if draw(st.booleans()):
            text = f"<think>{text}</think>{words()}"
        for _ in range(draw(st.integers(0, 2))):
            # As the parsers have it: qwen, pythonic, and the one of required calls.
            form = draw(
                st.sampled_from(
                    [
                        '<tool_call>\n{"name": "f", "arguments": {"a": "@"}}\n</tool_call>',
                        '[f(a="@")]',
                        '[{"name": "f", "parameters": {"a": "@"}}]',
                    ]
                )
            )
            text += form.replace("@", words())
            text += draw(st.sampled_from(["", "\n", words()]))
        if draw(st.booleans()):
            text = text[: draw(st.integers(0, len(text)))]
    return text


class ScriptedEngine:
    """Plays the scheduler and the detokenizer for a real TokenizerManager."""

    def __init__(self, manager: Any):
        self.manager = manager
        self.plan = Plan([], [], [], (0, 0))
        self.rids: list[str] = []
        self.player: asyncio.Task[None] | None = None
        self.warmups: set[asyncio.Task[None]] = set()
        # Up to 0.5.12 the manager sends to a socket itself.
        manager.send_to_scheduler = self
        manager._dispatch_to_scheduler = self.send_pyobj

    def start(self, plan: Plan) -> None:
        self.plan, self.rids, self.player = plan, [], None

    def send_pyobj(self, obj: Any) -> None:
        for request in getattr(obj, "batch", [obj]):
            if request.sampling_params.max_new_tokens == 0:
                # The request that warms the prefix cache for n > 1.
                step, finish = Step([], ""), {"type": "length"}
                self.warmups.add(asyncio.create_task(self.put_out(request.rid, step, 0, finish)))
                continue
            self.rids.append(request.rid)
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
            prompt_tokens=[len(PROMPT_IDS)],
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
class Serving:
    """The real serving layer over a scripted engine."""

    loop: asyncio.AbstractEventLoop
    manager: Any
    engine: ScriptedEngine
    chat: Any
    completions: Any
    is_incremental: bool

    def ask(self, request: Any, plan: Plan) -> list[dict[str, Any]]:
        """Return the chunks of a stream, or the response as the only chunk."""
        self.engine.start(plan)
        return self.loop.run_until_complete(self._ask(request))

    async def _ask(self, request: Any) -> list[dict[str, Any]]:
        handler = self.chat if hasattr(request, "messages") else self.completions
        response = await handler.handle_request(request, None)
        if not request.stream:
            body = response.body if hasattr(response, "body") else response.model_dump_json()
            return [json.loads(body)]
        body = bytearray()

        async def send(message: Any) -> None:
            body.extend(message.get("body", b""))

        await response.stream_response(send)
        events = body.decode().removesuffix("\n\n").split("\n\n")
        assert events[-1] == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


QWEN = ["--tool-call-parser=qwen", "--reasoning-parser=qwen3", "--enable-cache-report"]
# Its parsers start inside of the reasoning, and put out text and a call at once.
PYTHONIC = ["--tool-call-parser=pythonic", "--reasoning-parser=deepseek-r1"]
FLAGS = {"cumulative": QWEN, "incremental": [*QWEN, INCREMENTAL], "pythonic": PYTHONIC}


@pytest.fixture(scope="module", params=FLAGS)
def serving(request: pytest.FixtureRequest) -> Iterator[Serving]:
    """The serving layer, with outputs that hold all ids or the new ones only."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    handlers = make_handlers(*FLAGS[request.param])
    manager = handlers.manager
    # Texts of the script stand for themselves: an id decodes to its digits.
    manager.detokenize_logprob_tokens = lambda values, ids, _: [
        (value, i, str(i)) for value, i in zip(values, ids)
    ]
    engine = ScriptedEngine(manager)
    is_incremental = request.param == "incremental"
    yield Serving(loop, manager, engine, handlers.chat, handlers.completions, is_incremental)
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def chat_request(plan: Plan, **fields: Any) -> Any:
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    fields.pop("echo", None)
    if "tools" not in fields:
        fields.pop("tool_choice", None)
    return ChatCompletionRequest(
        model="m",
        messages=[{"role": "user", "content": "hi"}],
        n=len(plan.choices),
        **fields,
    )


def completion_request(plan: Plan, **fields: Any) -> Any:
    from sglang.srt.entrypoints.openai.protocol import CompletionRequest

    fields.pop("tools", None)
    fields.pop("tool_choice", None)
    fields.pop("separate_reasoning", None)
    if fields.get("logprobs"):
        # Refused together.
        fields.pop("echo", None)
    if fields.pop("top_logprobs", None) is not None:
        fields["logprobs"] = 2
    else:
        fields.pop("logprobs", None)
    return CompletionRequest(
        model="m", prompt=PROMPT_IDS, n=len(plan.choices), **fields
    )


def marks_in(choice: dict[str, Any]) -> list[int]:
    """The positions of the marks that a chunk shows, wherever it shows them."""
    text = json.dumps(choice, ensure_ascii=True)
    # Arguments of tool calls are JSON inside of JSON.
    return [int(code, 16) - MARK for code in re.findall(r"\\u(4[ef][0-9a-f]{2})", text)]


def logprobs_of(choice: dict[str, Any]) -> list[tuple[float, list[float]]]:
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
        for value, top in zip(
            logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
        )
    ]


def without_ids(chunk: dict[str, Any]) -> dict[str, Any]:
    chunk = json.loads(json.dumps(chunk))
    chunk.pop("prompt_token_ids", None)
    for key in ("id", "created"):
        chunk.pop(key)
    for choice in chunk["choices"]:
        choice.pop("prompt_token_ids", None)
        choice.pop("token_ids", None)
        choice.pop("weight_versions", None)
        for call in (choice.get("delta") or {}).get("tool_calls") or []:
            call.pop("id")
    return chunk


def check_stream(
    plan: Plan, chunks: list[dict[str, Any]], is_chat: bool, with_logprobs: bool
) -> None:
    sent: dict[int, list[int]] = {i: [] for i in range(len(plan.choices))}
    started: set[int] = set()
    for position, chunk in enumerate(chunks):
        assert ("prompt_token_ids" in chunk) == (is_chat and position == 0)
        for choice in chunk["choices"]:
            index = choice["index"]
            if not is_chat:
                assert ("prompt_token_ids" in choice) == (index not in started)
            started.add(index)
            ids = choice.get("token_ids", [])
            assert "token_ids" not in choice or ids, "C2: an empty list was sent"
            sent[index] += ids

            if with_logprobs:
                expected = [(-float(i), [-float(i), -float(i) - 0.5]) for i in ids]
                assert logprobs_of(choice) == expected, "C5"
            else:
                assert choice["logprobs"] is None

            for mark in marks_in(choice):
                assert len(sent[index]) >= num_ids_behind(plan, index, mark), "C4"
    for index, ids in sent.items():
        assert ids == plan.ids(index), "C2, C3"


def num_ids_behind(plan: Plan, index: int, mark: int) -> int:
    """How many ids had been put out when the engine put out a mark."""
    num_ids = 0
    for step in plan.choices[index]:
        num_ids += len(step.ids)
        if chr(MARK + mark) in step.text:
            return num_ids
    raise AssertionError(f"mark {mark} was never put out")


fields = st.fixed_dictionaries(
    {},
    optional={
        "tools": st.just([TOOL]),
        "tool_choice": st.just("required"),
        "logprobs": st.just(True),
        "separate_reasoning": st.just(False),
        "echo": st.just(True),
        "stream_options": st.just({"include_usage": True, "continuous_usage_stats": True}),
    },
)


@pytest.mark.clause("C2", "C3", "C4", "C5", "C7")
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@settings(
    max_examples=600,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_streamed_ids_are_whole_once_in_time_and_aligned(
    serving: Serving, endpoint: str, data: st.DataObject
) -> None:
    is_chat = endpoint == "chat"
    plan = data.draw(plans(with_tags=is_chat))
    asked = data.draw(fields)
    if asked.get("logprobs"):
        asked["top_logprobs"] = 2
    make = chat_request if is_chat else completion_request

    chunks = serving.ask(make(plan, stream=True, return_token_ids=True, **asked), plan)
    check_stream(plan, chunks, is_chat, bool(asked.get("logprobs")))

    whole = serving.ask(make(plan, return_token_ids=True, **asked), plan)[0]
    for index, choice in enumerate(whole["choices"]):
        assert choice["token_ids"] == plan.ids(index), "C2"
        if asked.get("logprobs"):
            assert [value for value, _ in logprobs_of(choice)] == [
                -float(i) for i in plan.ids(index)
            ], "C5"
    assert whole["usage"]["completion_tokens"] == sum(
        len(plan.ids(i)) for i in range(len(plan.choices))
    )

    # No chunk that stock would not send: the same script without ids gives the same.
    # With several choices, the order in which asyncio wakes them up is not repeatable.
    if len(plan.choices) > 1:
        return
    if CUTS_INCREMENTAL_COMPLETIONS and serving.is_incremental and not is_chat:
        return
    for key in ("logprobs", "top_logprobs"):
        asked.pop(key, None)
    plain = serving.ask(make(plan, stream=True, **asked), plan)
    asking = serving.ask(make(plan, stream=True, return_token_ids=True, **asked), plan)
    assert [without_ids(chunk) for chunk in asking] == [without_ids(c) for c in plain]
