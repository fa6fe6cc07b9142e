"""gpt-oss on /v1/responses, whose prompts go by harmony and round the chat template.

On the real server with a tiny model that speaks harmony, and on the real handlers over a
scripted engine for what such a model would hardly ever say.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import requests

from testbed.agents import (
    RESPONSES,
    STREAMS_RESPONSES,
    Read,
    ask_stream,
    ask_whole,
    check_turns,
    read_stream,
    read_whole,
    without_ids,
)
from testbed.harmony import FOLLOWING, decode, encode, id_of, load_encoding
from testbed.release import NUMBER, UPSTREAM
from testbed.scripted import Plan, Step, serve
from testbed.scripted_agents import Agents, without_random
from testbed.server import HARMONY_FLAGS, INCREMENTAL, KEEP_RESPONSES, Server

WAYS = pytest.mark.parametrize("way", ["items", "previous_response_id"])
NUM_TURNS = 5
NUM_CONVERSATIONS = 4
# Of which many of the replies of the model are cut off.
MAX_TOKENS = 24
# Whether streams show calls.
STREAMS_CALLS = NUMBER >= (0, 5, 23)
# What a reply ends with by itself.
ENDS = ("<|return|>", "<|call|>", "<|end|>")
TOOL = {
    "type": "function",
    "name": "f",
    "description": "Do it.",
    "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
}
THOUGHT = "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
DONE = f"{FINAL}That will do.<|return|>"
SEARCH = '<|channel|>analysis to=browser.search code<|message|>{"query":"x"}<|call|>'
CALL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a":"b"}<|call|>'


def turns_of(text: str) -> str:
    """What comes behind a reply: the next message of the user, and the start of a reply."""
    return f"<|start|>user<|message|>{text}<|end|><|start|>assistant"


@pytest.mark.clause("C1", "C2", "C3", "C6")
@WAYS
@pytest.mark.parametrize("server", ["gpt_oss"], indirect=True)
def test_turns_extend_each_other(server: Server, way: str) -> None:
    """Whole and streamed by turns, with thoughts, several texts a turn, and cut-off replies."""
    models = requests.get(f"{server.url}/v1/models", timeout=30).json()
    name = models["data"][0]["id"]
    num_cut_off = num_other = 0
    for number in range(NUM_CONVERSATIONS):
        said: list[dict[str, Any]] = []
        turns: list[Read] = []
        for turn in range(NUM_TURNS):
            content = f"Turn {turn} of {number}, {way}, 日本語."
            said.append({"role": "user", "content": content})
            body: dict[str, Any] = {"model": name, "max_output_tokens": MAX_TOKENS, "input": said}
            body |= {"return_token_ids": True, "logprobs": True}
            if way == "previous_response_id" and turns:
                # Early releases go on from a response with a text alone.
                body |= {"input": content, "previous_response_id": turns[-1].answer["id"]}
            read = (ask_stream if (turn + number) % 2 else ask_whole)(server, RESPONSES, body)
            take_the_rest(read)
            sampled = [id_of("assistant"), *read.ids]
            assert all(pair in allowed() for pair in itertools.pairwise(sampled)), "C1"
            # Some releases take two off.
            is_cut_off = len(read.ids) in (MAX_TOKENS - 2, MAX_TOKENS)
            assert is_cut_off or read.ids[-1] == id_of("<|return|>"), "C2"
            assert len(read.logprobs) == len(read.ids), "C5"
            num_cut_off += read.ids[-1] not in map(id_of, ENDS)
            num_other += encode(decode(read.ids)) != read.ids
            if turns:
                before = turns[-1].prompt + turns[-1].ids
                end = "" if before[-1] in map(id_of, ENDS) else "<|end|>"
                assert read.prompt == before + encode(end + turns_of(content)), "C6"
            else:
                assert encode(decode(read.prompt)) == read.prompt
                assert decode(read.prompt).endswith(f"<|message|><|end|>{turns_of(content)}")
            turns.append(read)
            said += shown_by(read)
        check_turns(turns)
    assert num_cut_off and num_other


@functools.lru_cache
def allowed() -> set[tuple[int, int]]:
    """The pairs of ids that the model may sample."""
    return {(id_of(token), id_of(other)) for token, all_ in FOLLOWING.items() for other in all_}


def take_the_rest(read: Read) -> None:
    """Take what the last event has alone: headers of which a stream shows nothing."""
    ids, logprobs = read.answer["token_ids"], read.answer.get("token_logprobs", [])
    assert read.ids == ids[: len(read.ids)] and read.logprobs == logprobs[: len(read.logprobs)]
    read.ids, read.logprobs = ids, logprobs


def shown_by(read: Read) -> list[dict[str, Any]]:
    """The items of a response, as an agent takes them up to hand them back."""
    events = [event for _, event in read.sent]
    items = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    # Streams of many releases end with a response that has none.
    return items or list(read.answer["output"])


# The real handlers over a scripted engine.

FLAGS = {"cumulative": (), "incremental": (INCREMENTAL,)}


@pytest.fixture(scope="module", params=FLAGS)
def agents(request: pytest.FixtureRequest) -> Iterator[Agents]:
    """Handlers that keep no turns, and run the browser."""
    load_encoding()
    with serve(*HARMONY_FLAGS, *FLAGS[request.param]) as serving:
        browser = BrowserServer()
        yield Agents(serving, browser)


@pytest.fixture(scope="module")
def keeping() -> Iterator[Agents]:
    """Handlers that keep turns."""
    load_encoding()
    with serve(*HARMONY_FLAGS, *KEEP_RESPONSES, "--keep-turns=50") as serving:
        yield Agents(serving)


def says(text: str, finish: str = "stop") -> Plan:
    """A reply whose ids are not those that harmony would make of it, in steps of some ids."""
    ids: list[int] = []
    # Every other part is what a message says.
    for number, part in enumerate(re.split(r"(?<=<\|message\|>)([^<]+)", text)):
        size = 2 if number % 2 else len(part) + 1
        for start in range(0, len(part), size):
            ids += encode(part[start : start + size])
    assert decode(ids) == text and ids != encode(text)
    steps = [Step(ids[start : start + 3], "") for start in range(0, len(ids), 3)]
    schedule = [(0, 12)] * len(steps)
    return Plan([steps], [{"type": finish, "matched": ids[-1]}], schedule, (0, 0), None)


def body_of(agents: Agents, said: Any, stream: bool, **fields: Any) -> dict[str, Any]:
    body = {"model": agents.serving.handlers.manager.served_model_name, "input": said}
    body |= {"stream": stream, "return_token_ids": True, "logprobs": True}
    return {**body, "max_output_tokens": 90, "instructions": "Be brief.", **fields}


def ask(agents: Agents, said: Any, reply: Plan, stream: bool, **fields: Any) -> Read:
    answer = agents.ask(RESPONSES, body_of(agents, said, stream, **fields), reply)
    read = read_stream(RESPONSES, answer) if stream else read_whole(answer)
    take_the_rest(read)
    return read


HEAD = """\
<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06
Current date: {date}

Reasoning: low

# Valid channels: analysis, commentary, final. Channel must be included for every message.\
"""
CALLS_GO = "\nCalls to these tools must go to the commentary channel: 'functions'."
INSTRUCTIONS = "<|end|><|start|>developer<|message|># Instructions\n\nBe brief."
TOOLS = """

# Tools

## functions

namespace functions {

// Do it.
type f = (_: {
a?: string,
}) => any;

} // namespace functions"""


@pytest.mark.clause("C1", "C2", "C3", "C5", "C6", "C11")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_what_harmony_encoded_and_the_engine_sampled(agents: Agents, stream: bool) -> None:
    replies = [THOUGHT + FINAL + "It is naïve, 日本語.<|return|>", FINAL + "That will"]
    replies += [THOUGHT + CALL] * STREAMS_RESPONSES
    fields: dict[str, Any] = {"reasoning": {"effort": "low"}}
    head = HEAD.format(date=datetime.date.today()) + INSTRUCTIONS
    if STREAMS_RESPONSES:
        fields["tools"] = [TOOL]
        head = HEAD.format(date=datetime.date.today()) + CALLS_GO + INSTRUCTIONS + TOOLS
    for text in replies:
        plan = says(text, "length" if text.endswith("will") else "stop")
        read = ask(agents, "Hi, 東京.", plan, stream, **fields)
        assert read.ids == plan.ids(0), "C1, C2, C3"
        assert read.logprobs == [-float(i) for i in read.ids], "C5"
        assert read.prompt == agents.serving.engine.prompts[-1], "C6"
        assert read.prompt == encode(f"{head}<|end|>{turns_of('Hi, 東京.')}"), "C6"
        assert "generations" not in read.answer and "prefix" not in read.answer
        unasked = body_of(agents, "Hi, 東京.", stream, **fields) | {"return_token_ids": False}
        plain = agents.ask(RESPONSES, unasked, plan)
        answer = [event for _, event in read.sent] if stream else without_ids(read.answer)
        assert without_random(answer) == without_random(plain), "C11"


class BrowserServer:
    """What runs a browser for the server."""

    def __init__(self) -> None:
        # What happens when it is called.
        self.call: Any = None

    def has_tool(self, name: str) -> bool:
        return name == "browser"

    def get_tool_description(self, name: str) -> Any:
        from openai_harmony import ToolNamespaceConfig

        return ToolNamespaceConfig.browser()

    @contextlib.asynccontextmanager
    async def get_tool_session(self, name: str) -> Any:
        from openai_harmony import Author, Message, Role, TextContent
        from sglang.srt.entrypoints.tool import Tool

        server = self

        class Browser(Tool):
            async def get_result(self, context: Any) -> Any:
                server.call()
                author = Author(role=Role.TOOL, name=context.messages[-1].recipient)
                content = [TextContent(text="Found.")]
                return [Message(author=author, content=content, recipient="assistant")]

        yield Browser()


@pytest.mark.clause("C1", "C2", "C5", "C6")
@pytest.mark.skipif(
    (0, 5, 10) <= NUMBER < (0, 5, 12),
    reason=f"stock {UPSTREAM} asks for a token too many after a tool, and refuses that itself",
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_generations_of_a_server_that_runs_tools(agents: Agents, stream: bool) -> None:
    """What stock's parsers of whole responses take for the reply after a tool begins with the
    header that the prompt has. Those of streams leave out as many tokens of it as there were
    before."""
    header = "" if stream else "<|start|>assistant"
    plans = [
        says(
            THOUGHT + '<|channel|>analysis to=browser.search code<|message|>{"query":"x"}<|call|>'
        ),
        says(header + DONE),
    ]
    agents.tool_server.call = lambda: agents.serving.engine.start(plans[1])
    tools = [{"type": "web_search_preview"}]
    read = ask(agents, "Search.", plans[0], stream, tools=tools)
    prompts = agents.serving.engine.prompts[-2:]
    assert decode(prompts[0]).endswith(turns_of("Search."))
    assert decode(prompts[1]).endswith(
        '{"query":"x"}<|call|><|start|>browser.search to=assistant<|message|>Found.<|end|>'
        "<|start|>assistant"
    )
    generations = read.answer["generations"]
    assert [g["prompt_token_ids"] for g in generations] == prompts, "C6"
    assert [g["token_ids"] for g in generations] == [plan.ids(0) for plan in plans], "C1, C2"
    for generation in generations:
        assert generation["token_logprobs"] == [-float(i) for i in generation["token_ids"]]
    assert read.prompt == prompts[0] and read.ids == plans[0].ids(0) + plans[1].ids(0)


class Said(NamedTuple):
    """A reply of the model, and whether it is cut off."""

    text: str
    is_cut_off: bool = False


REPLIES = [
    Said(THOUGHT + FINAL + "It is naïve, 日本語.<|return|>"),
    Said(THOUGHT + CALL),
    Said(FINAL + "That will", is_cut_off=True),
    Said(THOUGHT + THOUGHT + FINAL + " That will do. <|return|>"),
    Said(THOUGHT.removesuffix("<|start|>assistant"), is_cut_off=True),
    Said(CALL),
    Said(DONE),
]


@pytest.mark.clause("C6")
@WAYS
@pytest.mark.parametrize("streamed", [(), (0, 1, 2, 3, 4, 5, 6), (1, 3, 4), (0, 2, 5)], ids=str)
def test_any_turn_extends_the_one_before(
    keeping: Agents, way: str, streamed: tuple[int, ...]
) -> None:
    said: list[dict[str, Any]] = []
    new: list[dict[str, Any]] = [{"role": "user", "content": f"Go, {way}, {streamed}."}]
    turns: list[Read] = []
    expected: list[int] = []
    for number, reply in enumerate(REPLIES):
        stream = number in streamed
        if "to=functions" in reply.text:
            # Before, requests take no functions, or streams do not show calls of them.
            if not STREAMS_RESPONSES or (stream and not STREAMS_CALLS):
                continue
        said += new
        fields: dict[str, Any] = {"tools": [TOOL]} if STREAMS_RESPONSES else {}
        given: Any = said
        if way == "previous_response_id" and turns:
            fields["previous_response_id"] = turns[-1].answer["id"]
            # Early releases go on from a response with a text alone.
            given = new if STREAMS_RESPONSES else new[0]["content"]
        plan = says(reply.text, "length" if reply.is_cut_off else "stop")
        turns.append(ask(keeping, given, plan, stream, **fields))
        assert turns[-1].ids == plan.ids(0)
        said += shown_by(turns[-1])
        new = [
            {"type": "function_call_output", "call_id": item["call_id"], "output": "naïve ☁"}
            for item in shown_by(turns[-1])
            if item["type"] == "function_call"
        ]
        behind = "<|start|>functions.f<|message|>naïve ☁<|end|><|start|>assistant"
        if not new:
            new = [{"role": "user", "content": f"On, {number}."}]
            behind = turns_of(f"On, {number}.")
        if not reply.text.endswith(ENDS):
            behind = f"<|end|>{behind}"
        if len(turns) > 1:
            assert turns[-1].prompt == turns[-2].prompt + turns[-2].ids + expected
        expected = encode(behind)
    check_turns(turns)


def other_tools() -> dict[str, Any]:
    return {"tools": [{**TOOL, "name": "g"}]} if STREAMS_RESPONSES else {"user": "somebody"}


@pytest.mark.clause("C6")
@WAYS
@pytest.mark.parametrize(
    "fields",
    [{"reasoning": {"effort": "high"}}, {"instructions": "Be verbose."}, other_tools()],
    ids=["effort", "instructions", "tools"],
)
def test_another_head_is_another_conversation(
    keeping: Agents, way: str, fields: dict[str, Any]
) -> None:
    said = [{"role": "user", "content": f"Go, {way}, {fields}."}]
    turn = ask(keeping, said, says(DONE), False)
    said += [*turn.answer["output"], {"role": "user", "content": "On."}]
    given: Any = said
    if way == "previous_response_id":
        given = "On."
        fields = {**fields, "previous_response_id": turn.answer["id"]}
        if KEEPS_THE_HEAD and "user" not in fields:
            # Stock goes on from a response with the head that it had.
            following = ask(keeping, given, says(DONE), False, **fields)
            check_turns([turn, following])
            return
    following = ask(keeping, given, says(DONE), False, **fields)
    prefix = following.answer["prefix"]
    assert prefix["kept_tokens"] == 0
    name = turn.answer["id"] if way == "previous_response_id" else "message 0 (user)"
    assert name in prefix["reason"] and "tools" in prefix["reason"]


# Whether a request that goes on from a response cannot have another head.
KEEPS_THE_HEAD = NUMBER < (0, 5, 23)


@pytest.mark.clause("C6")
def test_a_conversation_goes_on_after_midnight(
    keeping: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.entrypoints import harmony_utils

    said = [{"role": "user", "content": "Is it late?"}]
    turns = [ask(keeping, said, says(DONE), False)]
    said += [*turns[0].answer["output"], {"role": "user", "content": "And now?"}]

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Clock:
            return cls(2030, 1, 1)

    class Module:
        datetime = Clock

    monkeypatch.setattr(harmony_utils, "datetime", Module)
    turns.append(ask(keeping, said, says(DONE), False))
    check_turns(turns)
    # A new conversation has the new date.
    fresh = ask(keeping, "Another day?", says(DONE), False)
    assert "2030-01-01" in decode(fresh.prompt)


@pytest.mark.clause("C6")
def test_the_last_turns_are_kept() -> None:
    load_encoding()
    with serve(*HARMONY_FLAGS, *KEEP_RESPONSES, "--keep-turns=1") as serving:
        agents = Agents(serving)
        turns = [ask(agents, text, says(DONE), False) for text in ("One.", "Two.")]
        for turn, is_kept in zip(reversed(turns), (True, False), strict=True):
            name = turn.answer["id"]
            plan = says(DONE)
            following = ask(agents, "On.", plan, False, previous_response_id=name)
            prefix = following.answer["prefix"]
            assert bool(prefix["kept_tokens"]) == is_kept
            assert is_kept or name in prefix["reason"]
