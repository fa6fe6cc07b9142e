"""Exact token ids on /v1/messages and /v1/responses, which agents speak."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import openai
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testbed.agents import (
    BODIES,
    FIELDS,
    LAST_EVENTS,
    MESSAGES,
    MESSAGES_TOOL,
    RESPONSES,
    RESPONSES_TOOL,
    STREAMS_RESPONSES,
    TEXTS,
    Read,
    ask_stream,
    ask_whole,
    check_turns,
    events_of,
    messages,
    num_tokens_of,
    read_stream,
    read_whole,
    without_ids,
)
from testbed.chained_model import sampled_ids
from testbed.client import CHAT, post
from testbed.plans import plans
from testbed.release import NUMBER, UPSTREAM
from testbed.scripted import (
    PROMPT_IDS,
    Plan,
    Step,
    marks_in,
    num_ids_behind,
    serve,
)
from testbed.scripted_agents import Agents, without_random
from testbed.server import (
    ABORTED_STREAMS_FAIL,
    FAILS_ABORTED_STREAMS,
    INCREMENTAL,
    KEEPS_RESPONSES,
    MODES,
    STOCK_TRACKS_VERSIONS,
    STREAMING_MODES,
    Server,
)
from testbed.tiny_model import load_tokenizer

PATHS = [MESSAGES, RESPONSES]
ASKING = {"return_token_ids": True, "logprobs": True}
endpoints = pytest.mark.parametrize("path", PATHS)
default = pytest.mark.parametrize("server", ["default"], indirect=True)
STREAMING = [*STREAMING_MODES, "reasoning"]
NUM_CLIENTS = 8
NUM_EXAMPLES = 60
# How much of a stream there is before it is aborted.
NUM_LINES = 40


def shown_by(value: Any) -> str:
    """All the text that an answer or an event shows."""
    if isinstance(value, dict):
        keys = ("text", "thinking", "delta", "content", "output", "content_block")
        return "".join(shown_by(value[key]) for key in keys if key in value)
    if isinstance(value, list):
        return "".join(map(shown_by, value))
    return value if isinstance(value, str) else ""


def check(path: str, read: Read, is_streamed: bool) -> None:
    """What can be seen in one answer of a real server."""
    assert len(read.ids) == read.num_tokens, "C2"
    assert len(read.logprobs) == len(read.ids), "C5"
    assert all(value <= 0 for value in read.logprobs)
    decoded = load_tokenizer(qwen=True).decode(read.ids)
    events = [event for _, event in read.sent if "delta" in event["type"]]
    text = shown_by(events if is_streamed else read.answer)
    if "\ufffd" not in text + decoded:
        # Without special tokens.
        assert not text or text.strip() in decoded, "C1"
    if is_streamed and path == RESPONSES:
        assert read.answer["token_ids"] == read.ids
        assert read.answer["token_logprobs"] == read.logprobs
        assert read.answer["prompt_token_ids"] == read.prompt


@pytest.mark.clause("C1", "C2", "C3", "C5", "C6", "C7")
@endpoints
@pytest.mark.parametrize("server", STREAMING, indirect=True)
def test_whole_and_streamed(server: Server, path: str) -> None:
    make = BODIES[path]
    key = "messages" if path == MESSAGES else "input"
    for content in ("Say something, 日本語.", "b", "The quick", "naïve café?"):
        said = [{"role": "user", "content": content}]
        body = make(**ASKING, **{key: said}, model=model_of(server))
        whole, streamed = ask_whole(server, path, body), ask_stream(server, path, body)
        check(path, whole, False)
        check(path, streamed, True)
        assert len(streamed.logprobs) == len(whole.logprobs)
        assert whole.prompt == streamed.prompt
        if server.name != "retract":
            # What is computed again may come out otherwise.
            assert whole.ids == streamed.ids
        chat = {"model": "m", "messages": said, "max_tokens": 1, "return_token_ids": True}
        assert post(server, CHAT, chat)["prompt_token_ids"] == whole.prompt
        if server.name != "workers2" or STOCK_TRACKS_VERSIONS:
            spans = [{"version": "default", "start": 0, "end": len(whole.ids)}]
            assert whole.versions == streamed.versions == spans


@pytest.mark.clause("C1", "C2", "C3", "C7")
@endpoints
@pytest.mark.parametrize("server", STREAMING, indirect=True)
def test_under_load(server: Server, path: str) -> None:
    body = BODIES[path](80, **ASKING, model=model_of(server)) | {"temperature": 1.0}
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        for read in pool.map(lambda _: ask_stream(server, path, body), range(NUM_CLIENTS)):
            check(path, read, True)


def model_of(server: Server) -> str:
    models = requests.get(f"{server.url}/v1/models", timeout=30).json()
    return str(models["data"][0]["id"])


@pytest.mark.clause("C7")
@pytest.mark.skipif(FAILS_ABORTED_STREAMS, reason=ABORTED_STREAMS_FAIL)
@pytest.mark.parametrize("path", PATHS if STREAMS_RESPONSES else [MESSAGES])
@default
def test_an_abort(server: Server, path: str) -> None:
    body = BODIES[path](200, **ASKING, stream=True) | {"temperature": 1.0}
    with server.slowed_down():
        response = requests.post(server.url + path, json=body, timeout=120, stream=True)
        lines = response.iter_lines(chunk_size=1)
        text = list(itertools.islice(lines, NUM_LINES))
        abort = {"rid": "", "abort_all": True}
        assert requests.post(f"{server.url}/abort_request", json=abort, timeout=30).ok
    text += lines
    events = events_of(b"\n".join(text).decode())
    assert events[-1]["type"] in ("message_stop", *LAST_EVENTS)
    read = read_stream(path, events)
    assert 0 < len(read.ids) < 200
    # A response that has failed does not tell its usage.
    assert read.num_tokens in (len(read.ids), -1)
    assert len(read.logprobs) == len(read.ids)
    if path == RESPONSES:
        assert read.answer["token_ids"] == read.ids


@pytest.mark.clause("C9")
@endpoints
@default
def test_asking(server: Server, path: str) -> None:
    header = "X-Return-Token-Ids"
    url, body = server.url + path, BODIES[path]()

    def has_ids(body: dict[str, Any], **headers: str) -> bool:
        response = requests.post(url, json=body, headers=headers, timeout=60)
        assert response.status_code == 200, response.text
        present = [key for key in FIELDS if key in response.json()]
        assert len(present) in (0, 3)
        return bool(present)

    assert not has_ids(body)
    assert has_ids(body | {"return_token_ids": True})
    assert has_ids(body, **{header: "1"})
    assert not has_ids(body, **{header: "0"})
    assert not has_ids(body | {"return_token_ids": False}, **{header: "1"})
    assert has_ids(body | {"return_token_ids": True}, **{header: "0"})
    assert not has_ids(body | {"logprobs": True})
    assert not ask_whole(server, path, body, **{header: "1"}).logprobs


@pytest.mark.clause("C9")
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@default
def test_the_header_on_chat_and_completions(server: Server, path: str) -> None:
    body: dict[str, Any] = {"model": "m", "max_tokens": 4, "prompt": "a", "messages": TEXTS}
    body.pop("prompt" if path == CHAT else "messages")

    def has_ids(value: str, **fields: Any) -> bool:
        headers = {"X-Return-Token-Ids": value}
        response = requests.post(server.url + path, json=body | fields, headers=headers, timeout=60)
        assert response.status_code == 200, response.text
        return "token_ids" in response.json()["choices"][0]

    assert has_ids("1") and not has_ids("0")
    assert not has_ids("1", return_token_ids=False)
    bad = requests.post(
        server.url + path, json=body, headers={"X-Return-Token-Ids": "maybe"}, timeout=60
    )
    assert bad.status_code == 400 and "X-Return-Token-Ids" in bad.text


@pytest.mark.clause("C9")
@pytest.mark.parametrize("server", ["default_agents"], indirect=True)
def test_endpoints_that_the_server_names(server: Server) -> None:
    def has_ids(path: str, body: dict[str, Any]) -> bool:
        return "token_ids" in json.dumps(post(server, path, body))

    for path in PATHS:
        assert has_ids(path, BODIES[path]())
        assert not has_ids(path, BODIES[path](return_token_ids=False))
        assert ask_stream(server, path, BODIES[path](logprobs=True)).logprobs
        # A default never makes a request fail that stock serves.
        assert has_ids(path, BODIES[path](logprobs="yes"))
    if KEEPS_RESPONSES:
        assert not has_ids(RESPONSES, BODIES[RESPONSES](background=True))
    assert has_ids("/v1/completions", {"model": "m", "prompt": "a", "max_tokens": 4})
    assert not has_ids(CHAT, {"model": "m", "messages": TEXTS, "max_tokens": 4})


@pytest.mark.clause("C9")
def test_names_that_are_no_endpoint() -> None:
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", "nowhere"]
    result = subprocess.run(
        [*command, "--return-token-ids-endpoints=chat,chats"], capture_output=True, text=True
    )
    assert result.returncode != 0
    [line] = [line for line in result.stderr.splitlines() if "'chats'" in line]
    assert "--return-token-ids-endpoints" in line
    assert "chat, completions, messages, responses" in line
    assert "Traceback" not in result.stderr


@pytest.mark.clause("C10")
@endpoints
@default
def test_bad_input(server: Server, path: str) -> None:
    cases = [
        ({"return_token_ids": "yes"}, "return_token_ids"),
        ({"return_token_ids": 1}, "return_token_ids"),
        ({"return_token_ids": True, "logprobs": 3}, "logprobs"),
    ]
    if path == RESPONSES:
        cases.append(({"return_token_ids": True, "background": True}, "background"))
    for stream in (False, True):
        for fields, name in cases:
            body = BODIES[path](**fields, stream=stream)
            response = requests.post(server.url + path, json=body, timeout=60)
            assert response.status_code == 400, response.text
            error = response.json()["error"]
            assert name in error["message"] and error["type"] == "invalid_request_error"
    headers = {"X-Return-Token-Ids": "maybe"}
    response = requests.post(server.url + path, json=BODIES[path](), headers=headers, timeout=60)
    assert response.status_code == 400 and "X-Return-Token-Ids" in response.text
    ask_whole(server, path, BODIES[path](return_token_ids=True))


@pytest.mark.clause("C1", "C2")
@default
def test_anthropic_sdk(server: Server) -> None:
    client = anthropic.Anthropic(
        base_url=server.url, api_key="none", default_headers={"X-Return-Token-Ids": "1"}
    )
    said: Any = {"model": "m", "max_tokens": 24, "messages": TEXTS}
    said["extra_body"] = {"temperature": 0}
    message = client.messages.create(**said)
    extra = message.model_extra or {}
    assert len(extra["token_ids"]) == message.usage.output_tokens
    ids: list[int] = []
    with client.messages.stream(**said) as stream:
        for event in stream:
            # The SDK sends events of its own beside those of the server.
            if event.type in ("content_block_delta", "message_delta"):
                ids += (event.model_extra or {}).get("token_ids", [])
            elif event.type == "message_start":
                prompt = (event.message.model_extra or {})["prompt_token_ids"]
        [shown] = stream.get_final_message().content
    assert shown.text == message.content[0].text
    assert ids == extra["token_ids"] and prompt == extra["prompt_token_ids"]


@pytest.mark.clause("C1", "C2")
@default
def test_openai_sdk(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    body = BODIES[RESPONSES]()
    asked: Any = {**body, "extra_body": {"return_token_ids": True}}
    response = client.responses.create(**asked)
    extra = response.model_extra or {}
    assert extra["token_ids"] and extra["prompt_token_ids"]
    with client.responses.create(**asked, stream=True) as stream:
        events = list(stream)
    last = events[-1].response.model_extra
    assert last["token_ids"] == extra["token_ids"]
    ids = [i for e in events for i in (e.model_extra or {}).get("token_ids", [])]
    if any(event.type == "response.output_item.done" for event in events):
        assert ids == last["token_ids"]


# The SDK sends events of its own beside those of the server.
CARRYING = ("content_block_start", "content_block_delta", "message_delta")


class AnthropicTalk:
    """Turns with the SDK of Anthropic."""

    thought, text, call = "thinking", "text", "tool_use"

    def __init__(self, server: Server, salt: object):
        headers = {"X-Return-Token-Ids": "1"}
        self.client = anthropic.Anthropic(
            base_url=server.url, api_key="none", default_headers=headers
        )
        self.messages: list[Any] = [{"role": "user", "content": f"Look at it, {salt}."}]

    def turn(self, is_streamed: bool) -> tuple[list[str], Read]:
        """Return the kinds of what there is in the reply, and what is said of tokens."""
        tool = {"name": "bash", "input_schema": {"type": "object", "properties": {}}}
        said: Any = {"model": "m", "max_tokens": 64, "tools": [tool], "messages": self.messages}
        ids: list[int] = []
        if is_streamed:
            with self.client.messages.stream(**said) as stream:
                for event in stream:
                    if event.type == "message_start":
                        extra = event.message.model_extra or {}
                    elif event.type in CARRYING:
                        ids += (event.model_extra or {}).get("token_ids", [])
                message = stream.get_final_message()
        else:
            message = self.client.messages.create(**said)
            extra = message.model_extra or {}
            ids = extra["token_ids"]
        self.messages.append({"role": "assistant", "content": message.content})
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": "naïve ☁"}
            for block in message.content
            if block.type == "tool_use"
        ]
        self.messages.append({"role": "user", "content": results or "On."})
        kinds = [block.type for block in message.content]
        num_tokens = message.usage.output_tokens
        return kinds, Read(extra, extra["prompt_token_ids"], ids, [], None, num_tokens, [])


class OpenAITalk:
    """Turns with the SDK of OpenAI."""

    thought, text, call = "reasoning", "message", "function_call"

    def __init__(self, server: Server, salt: object):
        headers = {"X-Return-Token-Ids": "1"}
        self.client = openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", default_headers=headers
        )
        self.model = model_of(server)
        self.input: list[Any] = [{"role": "user", "content": f"Look at it, {salt}."}]

    def turn(self, is_streamed: bool) -> tuple[list[str], Read]:
        """Return the kinds of what there is in the reply, and what is said of tokens."""
        tool: Any = {"type": "function", "name": "bash", "parameters": {"type": "object"}}
        said: Any = {"model": self.model, "tools": [tool], "input": self.input}
        ids: list[int] = []
        if is_streamed:
            with self.client.responses.create(**said, stream=True) as stream:
                for event in stream:
                    ids += (event.model_extra or {}).get("token_ids", [])
            response = event.response
            extra = response.model_extra or {}
            assert ids == extra["token_ids"]
        else:
            response = self.client.responses.create(**said)
            extra = response.model_extra or {}
        self.input += response.output
        self.input += [
            {"type": "function_call_output", "call_id": item.call_id, "output": "naïve ☁"}
            for item in response.output
            if item.type == "function_call"
        ]
        kinds = [item.type for item in response.output]
        num_tokens = num_tokens_of(response.usage.model_dump(exclude_none=True))
        read = Read(extra, extra["prompt_token_ids"], extra["token_ids"], [], None, num_tokens, [])
        return kinds, read


@pytest.mark.clause("C1", "C2", "C3")
@pytest.mark.parametrize(
    "talk",
    [
        AnthropicTalk,
        pytest.param(
            OpenAITalk,
            marks=pytest.mark.skipif(
                not STREAMS_RESPONSES,
                reason=f"/v1/responses of stock {UPSTREAM} takes no functions",
            ),
        ),
    ],
)
@pytest.mark.parametrize("streamed", [(0, 3), (1, 2)], ids=["outer", "inner"])
@pytest.mark.parametrize("server", ["agent_bash"], indirect=True)
def test_thoughts_and_calls_by_an_sdk(server: Server, streamed: tuple[int, ...], talk: Any) -> None:
    """What the SDK has parsed is handed back, and the turns extend each other."""
    talking = talk(server, streamed)
    kinds, turns = zip(*(talking.turn(number in streamed) for number in range(4)))
    for turn, ids in zip(turns, sampled_ids(MODES[server.name].replies)):
        assert turn.ids == ids and turn.num_tokens == len(ids)
    assert kinds[1] == [talk.call] and kinds[3][-1] == talk.text
    assert kinds[0][-1] == kinds[2][-1] == talk.call and talk.text in kinds[2]
    # Early releases drop thoughts.
    assert not STREAMS_RESPONSES or kinds[0][0] == talk.thought
    check_turns(turns)


# The real handlers over a scripted engine.


FLAGS = {
    "cumulative": ["--tool-call-parser=qwen", "--reasoning-parser=qwen3"],
    "incremental": ["--tool-call-parser=qwen", "--reasoning-parser=qwen3", INCREMENTAL],
    "pythonic": ["--tool-call-parser=pythonic", "--reasoning-parser=deepseek-r1"],
}


@pytest.fixture(scope="module", params=FLAGS)
def agents(request: pytest.FixtureRequest) -> Iterator[Agents]:
    with serve(*FLAGS[request.param]) as serving:
        yield Agents(serving)


@st.composite
def single_plans(draw: st.DrawFn) -> Plan:
    """The output of a request for one choice."""
    plan = draw(plans(with_tags=True))
    schedule = [entry for entry in plan.schedule if entry[0] == 0]
    for step in plan.choices[0]:
        # In no order.
        step.ids = [7919 * i % 10007 for i in step.ids]
    return Plan(plan.choices[:1], plan.finish[:1], schedule, plan.reasoning)


@pytest.mark.clause("C1", "C2", "C3", "C4", "C5", "C6", "C11")
@endpoints
@settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(plan=single_plans(), stream=st.booleans(), with_tools=st.booleans())
def test_any_output(agents: Agents, path: str, plan: Plan, stream: bool, with_tools: bool) -> None:
    """Thoughts, text and calls, whole and broken, in steps of any size."""
    tool = MESSAGES_TOOL if path == MESSAGES else RESPONSES_TOOL
    with_tools = with_tools and (path == MESSAGES or STREAMS_RESPONSES)
    body = BODIES[path](200, stream=stream, **({"tools": [tool]} if with_tools else {}))
    plain = agents.ask(path, body, plan)
    answer = agents.ask(path, body | ASKING, plan)
    ids = plan.ids(0)
    if isinstance(plain, dict):
        assert without_random(without_ids(answer)) == without_random(plain), "C11"
        if "usage" not in plain:
            return
        read = read_whole(answer)
    else:
        read = read_stream(path, answer)
        assert without_random([event for _, event in read.sent]) == without_random(plain), "C11"
        if any(event["type"] in ("error", "response.failed") for event in plain):
            return
        for num_sent, event in read.sent:
            if "delta" in event["type"] or "content_block" in event:
                for mark in marks_in(event.get("delta") or event.get("content_block") or {}):
                    assert num_sent >= num_ids_behind(plan, 0, mark), "C4"
        if path == RESPONSES:
            assert read.answer["token_ids"] == ids
            assert read.answer["token_logprobs"] == [-float(i) for i in ids]
            assert len(read.answer["prompt_token_ids"]) == len(PROMPT_IDS)
            if not any(e["type"].endswith(("delta", "item.done")) for _, e in read.sent):
                return
    assert read.ids == ids, "C1, C2, C3"
    assert read.logprobs == [-float(i) for i in ids], "C5"
    assert len(read.prompt) == len(PROMPT_IDS), "C6"


@pytest.mark.clause("C4")
@pytest.mark.parametrize("agents", ["cumulative"], indirect=True)
def test_the_start_of_a_call_has_the_ids_of_its_name(agents: Agents) -> None:
    texts = ['<tool_call>\n{"name": "f", "arguments": {', '"a": "b"', "}}\n</tool_call>"]
    steps = [Step([10 * i + 3, 10 * i + 2], text) for i, text in enumerate(texts)]
    schedule = [(0, 12)] * len(steps)
    plan = Plan([steps], [{"type": "stop", "matched": 3}], schedule, (0, 0))
    body = messages(200, stream=True, tools=[MESSAGES_TOOL], **ASKING)
    read = read_stream(MESSAGES, agents.ask(MESSAGES, body, plan))
    starts = [n for n, event in read.sent if event["type"] == "content_block_start"]
    # Streams of early releases lose this call.
    assert starts == ([2] if STREAMS_RESPONSES else []) and read.ids == plan.ids(0)


class ToolContext:
    """A conversation in which the server runs a tool of its own, once."""

    def __init__(self, agents: Agents, plan: Plan):
        self.agents = agents
        self.plan = plan
        self.num_calls = 0

    def append_output(self, output: Any) -> None:
        pass

    def need_builtin_tool_call(self) -> bool:
        return self.num_calls == 0

    async def call_tool(self) -> list[Any]:
        self.num_calls += 1
        self.agents.serving.engine.start(self.plan)
        return []

    def render_for_completion(self) -> list[int]:
        return [9, 8, 7, 6]


@pytest.mark.clause("C1", "C2", "C5", "C6")
@pytest.mark.skipif(
    (0, 5, 10) <= NUMBER < (0, 5, 12),
    reason=f"stock {UPSTREAM} asks for a token too many after a tool, and refuses that itself",
)
def test_generations_of_a_server_that_runs_tools(agents: Agents) -> None:
    from sglang.srt.entrypoints.agent_token_ids import _Asked, _ResponsesAnswer
    from sglang.srt.managers.io_struct import GenerateReqInput

    def plan(ids: list[int], num_prompt_ids: int) -> Plan:
        finish = [{"type": "stop", "matched": 3}]
        return Plan([[Step(ids, "a")]], finish, [(0, 0)], (0, 0), num_prompt_ids)

    answer = _ResponsesAnswer(_Asked(by_itself=True, with_logprobs=True))
    handler = answer.watch(agents.responses, None, None, keeps_turns=False)
    params = {"max_new_tokens": 8}
    request = GenerateReqInput(input_ids=PROMPT_IDS, sampling_params=params, rid="r", stream=True)

    async def generate() -> None:
        context = ToolContext(agents, plan([30, 31], 4))
        async for _ in handler._generate_with_builtin_tools("r", [], request, params, context):
            pass

    agents.serving.engine.start(plan([10, 11, 12], 3))
    agents.serving.loop.run_until_complete(generate())
    fields = answer.all_fields()
    for entry in fields["generations"]:
        entry.pop("weight_versions", None)
    first = {"token_ids": [10, 11, 12], "token_logprobs": [-10.0, -11.0, -12.0]}
    second = {"token_ids": [30, 31], "token_logprobs": [-30.0, -31.0]}
    assert fields == {
        "prompt_token_ids": PROMPT_IDS,
        "token_ids": [10, 11, 12, 30, 31],
        "token_logprobs": [-10.0, -11.0, -12.0, -30.0, -31.0],
        "generations": [
            {"prompt_token_ids": PROMPT_IDS, **first},
            {"prompt_token_ids": [9, 8, 7, 6], **second},
        ],
    }


SAID = ["What is the weather?", "And in 東京?", "Thanks."]


@pytest.mark.skipif(
    not STREAMS_RESPONSES, reason="stock drops thoughts, and with them a turn that has no more"
)
@pytest.mark.parametrize("server", ["turns_qwen3"], indirect=True)
def test_turns_of_messages_extend_each_other(server: Server) -> None:
    said: list[dict[str, Any]] = []
    turns = []
    for content in SAID:
        said.append({"role": "user", "content": content})
        body = messages(**ASKING, messages=said, system="messages") | {"temperature": 1.0}
        turns.append(ask_whole(server, MESSAGES, body))
        said.append({"role": "assistant", "content": turns[-1].answer["content"]})
    check_turns(turns)


ITEMS = pytest.param(
    "items",
    marks=pytest.mark.skipif(
        not STREAMS_RESPONSES, reason=f"stock {UPSTREAM} cannot read the items of a response"
    ),
)


@pytest.mark.parametrize("way", [ITEMS, "previous_response_id"])
@pytest.mark.parametrize("server", ["turns_qwen3"], indirect=True)
def test_turns_of_responses_extend_each_other(server: Server, way: str) -> None:
    said: list[dict[str, Any]] = []
    turns: list[Read] = []
    for number, content in enumerate(SAID):
        said.append({"role": "user", "content": content})
        fields: dict[str, Any] = {"input": said, "model": model_of(server), "instructions": way}
        if way == "previous_response_id" and turns:
            fields |= {"input": said[-1:], "previous_response_id": turns[-1].answer["id"]}
        body = BODIES[RESPONSES](**ASKING, **fields) | {"temperature": 1.0}
        ask = ask_stream if number % 2 else ask_whole
        turns.append(ask(server, RESPONSES, body))
        said += turns[-1].answer["output"]
    check_turns(turns)


@pytest.mark.skipif(
    not STREAMS_RESPONSES, reason=f"/v1/responses of stock {UPSTREAM} takes no functions"
)
@pytest.mark.parametrize("way", ["items", "previous_response_id"])
@pytest.mark.parametrize("server", ["agent_bash"], indirect=True)
def test_calls_of_responses_extend_each_other(server: Server, way: str) -> None:
    """With thoughts and a call, with a call alone, with text and a call."""
    tool = {"type": "function", "name": "bash", "parameters": {"type": "object"}}
    new: list[dict[str, Any]] = [{"role": "user", "content": f"Look at it, {way}."}]
    said: list[dict[str, Any]] = []
    turns: list[Read] = []
    kinds = []
    for number in range(4):
        said += new
        fields: dict[str, Any] = {"input": said, "tools": [tool], "model": model_of(server)}
        if way == "previous_response_id" and turns:
            fields |= {"input": new, "previous_response_id": turns[-1].answer["id"]}
        body = BODIES[RESPONSES](**ASKING, **fields, instructions="Be brief.")
        # A lagging server streams several tokens at once, of which stock's parsers lose some.
        with server.lagging():
            turns.append((ask_stream if number % 2 else ask_whole)(server, RESPONSES, body))
        output = turns[-1].answer["output"]
        said += output
        kinds.append([item["type"] for item in output])
        new = [
            {"type": "function_call_output", "call_id": item["call_id"], "output": "naïve ☁"}
            for item in output
            if item["type"] == "function_call"
        ]
    assert "reasoning" in kinds[0] and kinds[1] == ["function_call"]
    assert kinds[2][-2:] == ["message", "function_call"] and kinds[3][-1] == "message"
    check_turns(turns)


@pytest.mark.clause("C6")
@pytest.mark.skipif(
    not STREAMS_RESPONSES, reason=f"stock {UPSTREAM} answers no response for a multimodal model"
)
def test_turns_of_responses_of_a_multimodal_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prompts go on as text, which would be tokenized again."""
    with serve("--keep-turns=3") as serving:
        agents = Agents(serving)
        monkeypatch.setattr(serving.handlers.manager.model_config, "is_multimodal", True)
        said: list[dict[str, Any]] = []
        turns: list[Read] = []
        for ids in ([101, 45, 200, 1], [46, 102, 1]):
            said.append({"role": "user", "content": "Go on."})
            finish = [{"type": "stop", "matched": 1}]
            plan = Plan([[Step(ids, "ok")]], finish, [(0, 0)], (0, 0), num_prompt_ids=None)
            turns.append(
                read_whole(agents.ask(RESPONSES, BODIES[RESPONSES](**ASKING, input=[*said]), plan))
            )
            said.append({"role": "assistant", "content": "ok"})
        check_turns(turns)


@pytest.mark.clause("C6")
def test_a_turn_whose_arguments_the_parser_lost() -> None:
    """A call that comes whole in the last output, of which stock's streams have the name alone."""
    call = '<tool_call>\n{"name": "f", "arguments": {"a": "b"}}\n</tool_call>'
    said: list[dict[str, Any]] = [{"role": "user", "content": "Call."}]

    def plan(text: str) -> Plan:
        finish = [{"type": "stop", "matched": 1}]
        steps = [Step([101, 45, 200, 1], text)]
        return Plan([steps], finish, [(0, 0)], (0, 0), num_prompt_ids=None)

    with serve("--keep-turns=3", "--tool-call-parser=qwen") as serving:
        agents = Agents(serving)
        fields = {"tools": [MESSAGES_TOOL], **ASKING}
        body = messages(200, stream=True, messages=said, **fields)
        turn = read_stream(MESSAGES, agents.ask(MESSAGES, body, plan(call)))
        events = [event for _, event in turn.sent]
        blocks = [event["content_block"] for event in events if "content_block" in event]
        deltas = [event["delta"] for event in events if "delta" in event]
        arguments = "".join(delta.get("partial_json", "") for delta in deltas)
        for block in blocks:
            block["input"] = json.loads(arguments or "{}")
        said.append({"role": "assistant", "content": blocks})
        results = [{"type": "tool_result", "tool_use_id": block["id"]} for block in blocks]
        said.append({"role": "user", "content": results or "On."})
        body = messages(200, messages=said, **fields)
        check_turns([turn, read_whole(agents.ask(MESSAGES, body, plan("ok")))])
