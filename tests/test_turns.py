"""Turns that extend each other, on chat templates that make it hard.

Conversations of ten turns: text, reasoning, one and two tool calls a turn, multi-byte text,
replies that were cut off, and bytes that are no text. The random model picks the tokens of
what a grammar has it say, so they are rarely the ones that a tokenizer would make of it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from testbed.chat_shapes import SHAPES, Calls
from testbed.client import CHAT, WEATHER_TOOL, control, post, stream
from testbed.scripted import Plan, Serving, Step, serve
from testbed.server import REGEX_HOLDS_BESIDE_REASONING, Server
from testbed.tiny_model import load_tokenizer, tiny_model_path

NUM_TURNS = 10
NUM_CONVERSATIONS = 2
# How many of all 50 conversations are held in a shape.
ALL_CONVERSATIONS = {"qwen3": 14, "llama3": 12, "deepseek": 12, "gpt_oss": 12}
NUM_CLIENTS = 12
WAYS = ("required", "messages", "kept")
PARIS = {"city": "Paris"}
TOKYO = {"city": "東京"}
# Where reasoning is expected, a grammar would not hold until that has ended.
NO_THINKING: dict[str, Any] = {}
if REGEX_HOLDS_BESIDE_REASONING:
    NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}
EVERY_SHAPE = pytest.mark.parametrize("server", [f"turns_{s}" for s in SHAPES], indirect=True)
ONE_SHAPE = pytest.mark.parametrize("server", ["turns_qwen3"], indirect=True)


def shape_of(server: Server) -> str:
    return server.name.removeprefix("turns_")


def says(shape: str, reasoning: str, text: str, calls: Calls) -> dict[str, Any]:
    said = SHAPES[shape].say(reasoning, text, calls)
    tokens = [*SHAPES[shape].special_tokens, *SHAPES[shape].tokens]
    ids = load_tokenizer(shape=shape).convert_tokens_to_ids(tokens)
    parts = re.split(f"({'|'.join(map(re.escape, tokens))})", said)
    # A grammar in the Lark of llguidance: a regex cannot say tokens that are no text.
    grammar = " ".join(
        f"<[{ids[tokens.index(part)]}]>" if part in tokens else json.dumps(part, ensure_ascii=False)
        for part in parts
        if part
    )
    body = {"ebnf": f"start: {grammar}", "max_tokens": 300}
    eos, *others = SHAPES[shape].stop_tokens
    if any(token in parts[:-2] for token in others):
        # Of the tokens that would end the turn, one comes in the middle of it.
        body |= {"ignore_eos": True, "stop": eos, "no_stop_trim": True}
    return body


def replies(shape: str, number: int) -> Iterator[dict[str, Any]]:
    """What the model is made to say in each turn of a conversation."""
    cut_off = says(shape, "", "This is cut off before it ends, 日本語.", []) | {"max_tokens": 13}
    kinds = [
        says(shape, "", f"The quick brown fox {number}.", []),
        says(shape, "hm, 東京?", "Over the lazy dog.", []),
        says(shape, "", "", [PARIS]),
        cut_off,
        says(shape, "Two of them", "", [PARIS, TOKYO]),
        says(shape, "", "naïve café 日本語 🙂", []),
        {"max_tokens": 12, "ignore_eos": True, "seed": number},
        says(shape, "Let me see.", "", [TOKYO]),
        says(shape, "", "  white space around  ", []),
        says(shape, "thinking is cut off here", "never said", []) | {"max_tokens": 15},
    ]
    start = number % len(kinds)
    yield from kinds[start:] + kinds[:start]


class Conversation:
    """A conversation that grows by turns, and what its turns had for ids."""

    def __init__(self, server: Server, number: int, way: str):
        self.server = server
        self.shape = shape_of(server)
        self.way = way
        self.number = number
        # A beginning of its own, since the prefix cache knows the ones before.
        system = f"{way}, conversation {number}: be brief, 日本語."
        self.messages: list[dict[str, Any]] = [
            {"role": "system", "content": system},
            {"role": "user", "content": "What is the weather?"},
        ]
        self.ids: list[int] = []
        self.num_extended = 0
        self.cached: list[int] = []

    def body(self, **fields: Any) -> dict[str, Any]:
        body = {"model": "m", "messages": self.messages, "tools": [WEATHER_TOOL]}
        body |= {**NO_THINKING, **fields}
        if self.way == "required" and self.ids:
            body["required_prefix_token_ids"] = self.ids
        if self.way == "alone":
            body["user"] = f"nobody has a turn of {len(self.messages)} messages"
        return body

    def hold(self) -> Conversation:
        for turn, reply in enumerate(replies(self.shape, self.number)):
            body = self.body(
                return_token_ids=True, temperature=1.0, separate_reasoning=True, **reply
            )
            tokenized = post(self.server, "/tokenize", body)["tokens"]
            answer = self.ask(body, is_streamed=(turn + self.number) % 2 == 1)
            prompt = answer["prompt_token_ids"]
            assert tokenized == prompt
            self.cached.append(answer["cached_tokens"])
            if turn:
                self.check(turn, answer)
            self.ids = prompt + answer["token_ids"]
            self.take(answer)
        return self

    def check(self, turn: int, answer: dict[str, Any]) -> None:
        prompt, prefix = answer["prompt_token_ids"], answer["prefix"]
        is_extended = prompt[: len(self.ids)] == self.ids
        self.num_extended += is_extended
        if self.way == "alone":
            assert prefix["kept_tokens"] == 0 and prefix["reason"]
            return
        assert is_extended and prefix == {"kept_tokens": len(self.ids), "reason": None}
        # The last token of a turn was sampled, and not prefilled.
        assert answer["cached_tokens"] >= len(self.ids) - 1
        # What follows is what the template makes of the messages since.
        tokenizer = load_tokenizer(shape=self.shape)
        body = self.body(user="nobody")
        body.pop("required_prefix_token_ids", None)
        body["messages"] = [without_ids(message) for message in self.messages]
        rendered = post(self.server, "/tokenize", body)["tokens"]
        rest = prompt[len(self.ids) :]
        assert rendered[-len(rest) :] == rest
        start = len(rendered) - len(rest)
        stops = tokenizer.convert_tokens_to_ids([*SHAPES[self.shape].stop_tokens, "<|end|>"])
        if self.ids[-1] in stops:
            assert rendered[start - 1] in stops
        else:
            assert rest[0] in stops
        text, content = tokenizer.decode(rest), self.messages[-1]["content"]
        assert content in text or json.dumps(content, ensure_ascii=False) in text

    def ask(self, body: dict[str, Any], is_streamed: bool) -> dict[str, Any]:
        """Return the message and the ids of an answer, however it comes."""
        if not is_streamed:
            answer = post(self.server, CHAT, body)
            choice, usage = answer["choices"][0], answer["usage"]
            message, token_ids = choice["message"], choice["token_ids"]
            finish = choice["finish_reason"]
        else:
            chunks = stream(self.server, CHAT, body)
            answer, usage = chunks[0], chunks[-1]["usage"]
            assert not any("prefix" in chunk for chunk in chunks[1:])
            message = {"role": "assistant", "content": "", "reasoning_content": ""}
            calls: dict[int, dict[str, Any]] = {}
            token_ids = []
            for chunk in chunks:
                for choice in chunk["choices"]:
                    token_ids += choice.get("token_ids", [])
                    finish = choice["finish_reason"]
                    for key in ("content", "reasoning_content"):
                        message[key] += choice["delta"].get(key) or ""
                    for part in choice["delta"].get("tool_calls") or []:
                        call = calls.setdefault(part["index"], {"function": {"arguments": ""}})
                        call["id"] = part.get("id") or call["id"]
                        name = part["function"].get("name")
                        call["function"]["name"] = name or call["function"]["name"]
                        call["function"]["arguments"] += part["function"].get("arguments") or ""
            if calls:
                message["tool_calls"] = list(calls.values())
        details = usage.get("prompt_tokens_details") or {}
        return {
            "message": message,
            "token_ids": token_ids,
            "finish_reason": finish,
            "prompt_token_ids": answer["prompt_token_ids"],
            "prefix": answer.get("prefix"),
            "cached_tokens": details.get("cached_tokens") or 0,
        }

    def take(self, answer: dict[str, Any]) -> None:
        """Go on from an answer, as an agent does that leaves out what it does not need."""
        message = answer["message"]
        said = {"role": "assistant", "content": message["content"]}
        if message.get("reasoning_content") and self.number % 2:
            said["reasoning_content"] = message["reasoning_content"]
        calls = message.get("tool_calls") or []
        if calls:
            said["tool_calls"] = [{"type": "function", **call} for call in calls]
        if self.way == "messages":
            said |= {key: answer[key] for key in ("prompt_token_ids", "token_ids")}
        self.messages.append(said)
        for call in calls:
            result = json.dumps({"in": call["function"]["arguments"], "sky": "naïve ☁"})
            self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        if not calls:
            asked = f"And message {len(self.messages)}, 東京?"
            self.messages.append({"role": "user", "content": asked})


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in message.items() if k not in ("prompt_token_ids", "token_ids")}


@EVERY_SHAPE
def test_every_turn_extends_the_one_before(
    server: Server, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = shape_of(server)
    # Several threads cannot import transformers at once.
    load_tokenizer(shape=shape)
    all_turns = pytestconfig.getoption("--all-turns")
    numbers = range(ALL_CONVERSATIONS[shape] if all_turns else NUM_CONVERSATIONS)
    num_turns = len(numbers) * (NUM_TURNS - 1)
    for way in (*WAYS, "alone"):
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            conversations = [Conversation(server, number, way) for number in numbers]
            held = list(pool.map(Conversation.hold, conversations))
        num_extended = sum(c.num_extended for c in held)
        cached = [sum(turn) // len(held) for turn in zip(*(c.cached for c in held))]
        with capsys.disabled():
            print(
                f"\n{shape}, {way}: {num_extended} of {num_turns} turns extend the one before; "
                f"tokens cached, by turn: {' '.join(map(str, cached))}",
                end="",
            )
        assert (num_extended == num_turns) == (way != "alone")


class Asked:
    """A conversation of one finished turn and a new question."""

    def __init__(self, server: Server, **fields: Any):
        self.server = server
        self.fields = {"model": "m", "tools": [WEATHER_TOOL], "return_token_ids": True}
        self.fields |= {**NO_THINKING, **fields}
        self.messages = [
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": "What is the weather in Paris?"},
        ]
        called = self.ask(**says("qwen3", "I call it", "", [PARIS]))
        message = called["choices"][0]["message"]
        [call] = message["tool_calls"]
        self.messages += [
            {k: message[k] for k in ("role", "content", "tool_calls")},
            {"role": "tool", "tool_call_id": call["id"], "content": "It is sunny."},
        ]
        answer = self.ask(**says("qwen3", "", "The sun shines.", []))
        self.ids = answer["prompt_token_ids"] + answer["choices"][0]["token_ids"]
        self.messages += [
            {"role": "assistant", "content": "The sun shines."},
            {"role": "user", "content": "And in Rome?"},
        ]

    def ask(self, headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
        response = self.post(headers, **fields)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def post(self, headers: dict[str, str] | None = None, **fields: Any) -> requests.Response:
        body = {**self.fields, "max_tokens": 4, "messages": self.messages, **fields}
        return requests.post(self.server.url + CHAT, json=body, headers=headers, timeout=120)

    def with_message(self, index: int, **fields: Any) -> list[dict[str, Any]]:
        messages = [dict(message) for message in self.messages]
        messages[index] |= fields
        return messages


@pytest.fixture(scope="module")
def asked_of() -> dict[str, Asked]:
    return {}


@pytest.fixture
def asked(server: Server, asked_of: dict[str, Asked]) -> Asked:
    if server.name not in asked_of:
        asked_of[server.name] = Asked(server)
    return asked_of[server.name]


EDITS: dict[str, tuple[int, dict[str, Any]]] = {
    "system": (0, {"content": "You are verbose."}),
    "user": (1, {"content": "What is the weather in Lyon?"}),
    "tool call": (
        2,
        {"tool_calls": [{"type": "function", "function": {"name": "zzz", "arguments": "{}"}}]},
    ),
    "tool": (3, {"content": "It is raining."}),
    "assistant": (4, {"content": "Rainy, alas."}),
}


@ONE_SHAPE
@pytest.mark.parametrize("name", EDITS)
def test_a_prefix_that_says_something_else_is_refused(asked: Asked, name: str) -> None:
    index, fields = EDITS[name]
    messages = asked.with_message(index, **fields)
    named = f"message {index} ({messages[index]['role']}) differs"
    response = asked.post(messages=messages, required_prefix_token_ids=asked.ids)
    assert response.status_code == 400 and named in response.json()["message"]
    body = {**asked.fields, "messages": messages, "required_prefix_token_ids": asked.ids}
    tokenized = control(asked.server, "/tokenize", **body)
    assert tokenized.status_code == 400 and tokenized.json()["message"] in response.text

    messages[4] |= {"prompt_token_ids": asked.ids[:-3], "token_ids": asked.ids[-3:]}
    response = asked.post(messages=messages)
    assert response.status_code == 400 and named in response.json()["message"]
    assert "prompt_token_ids and token_ids of message 4" in response.json()["message"]
    # What is kept is used as far as it goes.
    prefix = asked.ask(messages=[without_ids(message) for message in messages])["prefix"]
    assert 0 < prefix["kept_tokens"] < len(asked.ids) if index > 2 else not prefix["kept_tokens"]
    assert f"message {index} (" in prefix["reason"]


@ONE_SHAPE
def test_a_prefix_that_goes_on_is_refused(asked: Asked) -> None:
    rest = asked.ask(required_prefix_token_ids=asked.ids)["prompt_token_ids"]
    messages = asked.messages[:4] + asked.messages[5:]
    response = asked.post(messages=messages, required_prefix_token_ids=rest)
    assert response.status_code == 400
    assert "go on after message 2 (assistant)" in response.json()["message"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no ids": ({"required_prefix_token_ids": []}, "there are no ids"),
    "an id that is none": (
        {"required_prefix_token_ids": [5, 10**6]},
        "id 1000000 at position 1 is outside of the vocabulary",
    ),
    "text": ({"required_prefix_token_ids": ["5"]}, "required_prefix_token_ids"),
    "a boolean": ({"required_prefix_token_ids": [True]}, "required_prefix_token_ids"),
    "no assistant": (
        {"messages": [{"role": "user", "content": "hi"}], "required_prefix_token_ids": [5]},
        "needs an assistant message",
    ),
    "ids alone": (
        {"messages": [{"role": "assistant", "content": "a", "token_ids": [5]}] * 2},
        "token_ids of message 0 (assistant): prompt_token_ids and token_ids come together",
    ),
    "ids of a tool": (
        {"messages": [{"role": "tool", "content": "a", "token_ids": [5]}] * 2},
        "token_ids of message 0 (tool): only assistant messages have token ids",
    ),
    "last message": (
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "a", "prompt_token_ids": [5], "token_ids": [5]},
            ]
        },
        "Set continue_final_message",
    ),
    "an image": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "http://localhost"}}],
                },
                {"role": "assistant", "content": "a"},
                {"role": "user", "content": "b"},
            ],
            "required_prefix_token_ids": [5],
        },
        "image_url",
    ),
    "a tool that the ids lack": (
        {
            "tools": [
                WEATHER_TOOL,
                {"type": "function", "function": {"name": "another", "parameters": {}}},
            ],
            "required_prefix_token_ids": "ids",
        },
        "the tool 'another' is not in the ids",
    ),
}


@ONE_SHAPE
@pytest.mark.parametrize("name", BAD)
def test_bad_prefix(asked: Asked, name: str) -> None:
    fields, words = BAD[name]
    if fields.get("required_prefix_token_ids") == "ids":
        fields = {**fields, "required_prefix_token_ids": asked.ids}
    response = asked.post(**fields)
    assert 400 <= response.status_code < 500, response.text
    assert words in response.text


@ONE_SHAPE
def test_a_final_message_goes_on_from_its_ids(asked: Asked) -> None:
    messages = asked.with_message(
        4, content="The sun", prompt_token_ids=asked.ids[:-12], token_ids=asked.ids[-12:-8]
    )[:5]
    fields = {"messages": messages, "continue_final_message": True}
    assert asked.ask(**fields)["prompt_token_ids"] == asked.ids[:-8]
    assert post(asked.server, "/tokenize", asked.fields | fields)["tokens"] == asked.ids[:-8]


@ONE_SHAPE
def test_messages_are_tokenized_as_they_are(asked: Asked) -> None:
    """`/tokenize` leaves out what makes the model speak, also behind a message of its own."""
    tokenizer = load_tokenizer(shape=shape_of(asked.server))
    body: dict[str, Any] = {"model": "m", "add_generation_prompt": False}
    body["chat_template_kwargs"] = {"enable_thinking": False}
    messages = [asked.messages[i] for i in (0, 1, 4, 5)]
    for end in (2, 3, 4):
        expected = tokenizer.apply_chat_template(
            messages[:end], return_dict=False, enable_thinking=False
        )
        tokenized = post(asked.server, "/tokenize", {**body, "messages": messages[:end]})
        assert tokenized["tokens"] == expected
    body |= {"messages": messages, "add_generation_prompt": "neither"}
    refused = control(asked.server, "/tokenize", **body)
    assert refused.status_code == 400 and "add_generation_prompt" in refused.text


@ONE_SHAPE
def test_kept_turns_are_their_owners_alone(server: Server) -> None:
    keyed = {"Authorization": "Bearer one"}
    asked = Asked(server, cache_salt="salt")

    def kept(headers: dict[str, str] | None = None, **fields: Any) -> int:
        prefix = asked.ask(headers, **fields)["prefix"]
        assert prefix["reason"] is None or "message 0 (system)" in prefix["reason"]
        num_tokens: int = prefix["kept_tokens"]
        return num_tokens

    assert kept() == len(asked.ids)
    assert kept(keyed) == 0
    for fields in (
        {"cache_salt": "pepper"},
        {"tools": None},
        {"chat_template_kwargs": {"enable_thinking": False, "brief": True}},
        {"user": "another"},
    ):
        assert kept(**fields) == 0
    # Agents strip what they do not need.
    for content in ("The sun shines. ", [{"type": "text", "text": "The sun shines."}]):
        assert kept(messages=asked.with_message(4, content=content)) == len(asked.ids)


@pytest.fixture(scope="module")
def keeping() -> Iterator[Serving]:
    with serve("--keep-turns=3") as serving:
        serving.handlers = serving.handlers.with_parsers(None, "qwen3")
        yield serving


class Talk:
    """Turns by a script of what the engine puts out."""

    def __init__(self, serving: Serving):
        self.serving = serving
        self.numbers = itertools.count(100)

    def turn(
        self, *messages: tuple[str, str, str], replies: tuple[str, ...], stream: bool = False
    ) -> tuple[dict[str, Any], list[int], list[list[int]]]:
        """Return what is said of the prefix, the prompt, and what was sampled of each choice.

        Args:
            messages: Role, content and reasoning of each.
        """
        from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

        keys = ("role", "content", "reasoning_content")
        request = ChatCompletionRequest(
            model="m",
            messages=[dict(zip(keys, message)) for message in messages],
            n=len(replies),
            stream=stream,
            return_token_ids=True,
        )
        # A reply without thoughts would be taken for nothing else.
        texts = [text if "</think>" in text else f"hm</think>{text}" for text in replies]
        choices = [[Step([next(self.numbers), 1], text)] for text in texts]
        schedule = [(choice, 12) for choice in range(len(replies))]
        finish = [{"type": "stop", "matched": None}] * len(replies)
        plan = Plan(choices, finish, schedule, (0, 0), num_prompt_ids=None)
        answer = self.serving.ask(request, plan)[0]
        sampled = [plan.ids(choice) for choice in range(len(replies))]
        return answer["prefix"], answer["prompt_token_ids"], sampled


@pytest.fixture
def talk(keeping: Serving) -> Talk:
    return Talk(keeping)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_each_choice_is_a_turn(talk: Talk, stream: bool) -> None:
    start = ("user", f"two of them, {stream}", "")
    _, prompt, sampled = talk.turn(start, replies=("left", "right"), stream=stream)
    for text, ids in zip(("left", "right"), sampled):
        reply = ("assistant", text, "")
        prefix, longer, _ = talk.turn(start, reply, ("user", "on", ""), replies=("ok",))
        assert prefix == {"kept_tokens": len(prompt + ids), "reason": None}
        assert longer[: len(prompt + ids)] == prompt + ids


def test_reasoning_tells_turns_apart_that_say_the_same(talk: Talk) -> None:
    start = ("user", "think", "")
    _, prompt, sampled = talk.turn(start, replies=("one</think>yes", "two</think>yes"))
    for reasoning, ids in (("one", sampled[0]), ("two", sampled[1]), ("", sampled[1])):
        # What the agent leaves out is the one sampled last.
        reply = ("assistant", "yes", reasoning)
        prefix, longer, _ = talk.turn(start, reply, ("user", reasoning, ""), replies=("ok",))
        assert prefix["reason"] is None and longer[: len(prompt + ids)] == prompt + ids
    reply = ("assistant", "yes", "three")
    prefix, _, _ = talk.turn(start, reply, ("user", "on", ""), replies=("ok",))
    assert prefix["kept_tokens"] == 0 and "its reasoning" in prefix["reason"]


def test_a_reply_to_a_message_of_the_assistant(talk: Talk) -> None:
    start, begun = ("user", "begin", ""), ("assistant", "Well,", "")
    _, prompt, [ids] = talk.turn(start, begun, replies=("yes",))
    reply = ("assistant", "yes", "")
    prefix, longer, _ = talk.turn(start, begun, reply, ("user", "on", ""), replies=("ok",))
    assert prefix == {"kept_tokens": len(prompt + ids), "reason": None}
    assert longer[: len(prompt + ids)] == prompt + ids


def test_a_reply_that_is_handed_back_in_parts(talk: Talk) -> None:
    start = ("user", "say two things", "")
    _, prompt, [ids] = talk.turn(start, replies=("one\n\ntwo",))
    parts = [("assistant", text, "") for text in ("one", "two")]
    prefix, longer, _ = talk.turn(start, *parts, ("user", "on", ""), replies=("ok",))
    assert prefix == {"kept_tokens": len(prompt + ids), "reason": None}
    assert longer[: len(prompt + ids)] == prompt + ids


def test_the_turns_that_are_kept_are_bounded(talk: Talk) -> None:
    from sglang.srt.entrypoints.openai.kept_turns import _kept_turns

    starts = [("user", f"conversation {i}", "") for i in range(5)]
    for start in starts:
        talk.turn(start, replies=("hello",))
    kept = []
    for start in reversed(starts):
        messages = (start, ("assistant", "hello", ""), ("user", "on", ""))
        prefix, _, _ = talk.turn(*messages, replies=("ok",))
        kept.append(prefix["kept_tokens"] > 0)
        assert kept[-1] or "message 0 (user)" in prefix["reason"]
    # Each of these turns is kept as well.
    assert kept == [True, True, False, False, False]
    turns = _kept_turns[talk.serving.handlers.manager]
    assert len(turns._turns) == 3
    assert sum(map(len, turns._by_key.values())) == 3
    assert turns._having.total() == sum(len(turn.digests) for turn in turns._turns.values())


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--keep-turns=-1"], "0 or more"), (["--tokenizer-worker-num=2"], "tokenizer-worker-num 1")],
)
def test_flags_that_cannot_be_kept_are_refused(flags: list[str], words: str) -> None:
    from sglang.srt.server_args import prepare_server_args

    model = f"--model-path={tiny_model_path()}"
    with pytest.raises(ValueError, match=words):
        prepare_server_args([model, "--device=cpu", "--keep-turns=1", *flags]).check_server_args()
