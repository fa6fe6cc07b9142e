"""Clients of /v1/messages and /v1/responses: what they ask, and how answers are read."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable
from typing import Any

import requests

from testbed.release import NUMBER
from testbed.server import Server
from testbed.tiny_model import tiny_model_path

MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
# What an answer to a request that asks has more than one to a request that does not.
FIELDS = (
    "prompt_token_ids",
    "token_ids",
    "token_logprobs",
    "weight_versions",
    "generations",
    "prefix",
)
# Before, /v1/responses takes no functions, and its streams have nothing between the first
# events and the last.
STREAMS_RESPONSES = NUMBER >= (0, 5, 15)
LAST_EVENTS = ("response.completed", "response.incomplete", "response.failed")
TEXTS = [{"role": "user", "content": "Say something, 日本語."}]
MESSAGES_TOOL = {
    "name": "f",
    "input_schema": {"type": "object", "properties": {"a": {"type": "string"}}},
}
RESPONSES_TOOL = {
    "type": "function",
    "name": "f",
    "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
}


def messages(max_tokens: int = 24, **fields: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": TEXTS, "max_tokens": max_tokens, "temperature": 0}
    return {**body, **fields}


def responses(max_tokens: int = 24, **fields: Any) -> dict[str, Any]:
    # Later releases want the name of the model.
    body = {"model": str(tiny_model_path()), "input": TEXTS, "temperature": 0}
    return {**body, "max_output_tokens": max_tokens, **fields}


BODIES: dict[str, Callable[..., dict[str, Any]]] = {MESSAGES: messages, RESPONSES: responses}


@dataclasses.dataclass
class Read:
    """What an answer says of tokens.

    Attributes:
        answer: The whole answer, or that of the last event of a stream that has one.
        sent: For each event how many ids came with it or before, and the event without them.
    """

    answer: dict[str, Any]
    prompt: list[int]
    ids: list[int]
    logprobs: list[float]
    versions: list[dict[str, Any]] | None
    num_tokens: int
    sent: list[tuple[int, dict[str, Any]]]


def events_of(text: str) -> list[dict[str, Any]]:
    """The data of each event, whose name has to be its type."""
    events = []
    for event in text.strip().split("\n\n"):
        name, data = event.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def num_tokens_of(usage: dict[str, Any]) -> int:
    names = ("output_tokens", "completion_tokens")
    [num_tokens] = [usage[name] for name in names if name in usage]
    return int(num_tokens)


def read_whole(answer: dict[str, Any]) -> Read:
    read = Read(
        answer,
        answer["prompt_token_ids"],
        answer["token_ids"],
        answer.get("token_logprobs", []),
        answer.get("weight_versions"),
        num_tokens_of(answer["usage"]),
        [],
    )
    if answer.get("object") == "response" and not STREAMS_RESPONSES:
        read.num_tokens = len(read.ids)
    return read


def without_ids(value: dict[str, Any]) -> dict[str, Any]:
    """An event or an answer as a request that does not ask gets it."""
    kept = {key: item for key, item in value.items() if key not in FIELDS}
    for key in ("message", "response"):
        if isinstance(kept.get(key), dict):
            kept[key] = without_ids(kept[key])
    return kept


def read_stream(path: str, events: Iterable[dict[str, Any]]) -> Read:
    """Read a stream, and see that each field is on the events that may have it, and once."""
    read = Read({}, [], [], [], None, 0, [])
    may_carry = False
    for event in events:
        kind = event["type"]
        if path == MESSAGES:
            allowed = kind in ("content_block_delta", "message_delta")
            allowed = allowed or event.get("content_block", {}).get("type") == "tool_use"
            prompt = event["message"] if kind == "message_start" else event
            assert "prompt_token_ids" not in prompt or kind == "message_start"
            if kind == "message_delta":
                read.versions = event.get("weight_versions")
                read.num_tokens = num_tokens_of(event["usage"])
        else:
            allowed = kind.endswith(".delta") or kind == "response.output_item.done"
            prompt = event
            if kind in LAST_EVENTS:
                read.answer = event["response"]
                read.versions = read.answer.get("weight_versions")
                read.num_tokens = num_tokens_of(read.answer["usage"] or {"output_tokens": -1})
        if "prompt_token_ids" in prompt:
            assert not read.prompt, "the prompt ids come once"
            read.prompt = prompt["prompt_token_ids"]
        may_carry |= allowed
        assert allowed or not {"token_ids", "token_logprobs"} & set(event), kind
        assert event.get("token_ids", [0]), "an empty key must be left out"
        new = event.get("token_ids", [])
        if "token_logprobs" in event:
            assert len(event["token_logprobs"]) == len(new)
        read.ids += new
        read.logprobs += event.get("token_logprobs", [])
        read.sent.append((len(read.ids), without_ids(event)))
    if path == RESPONSES and not may_carry:
        # A release that streams nothing of a response, or a response of stop tokens alone.
        assert not read.ids
        read.prompt, read.ids = read.answer["prompt_token_ids"], read.answer["token_ids"]
        read.logprobs = read.answer.get("token_logprobs", [])
        if not STREAMS_RESPONSES:
            # They say that no token was sampled.
            read.num_tokens = len(read.ids)
    return read


def ask_whole(server: Server, path: str, body: dict[str, Any], **headers: str) -> Read:
    response = requests.post(server.url + path, json=body, headers=headers, timeout=120)
    assert response.status_code == 200, response.text
    return read_whole(response.json())


def ask_stream(server: Server, path: str, body: dict[str, Any], **headers: str) -> Read:
    body = {**body, "stream": True}
    response = requests.post(server.url + path, json=body, headers=headers, timeout=120)
    assert response.status_code == 200, response.text
    # An event stream says no charset.
    return read_stream(path, events_of(response.content.decode()))


def check_turns(turns: Iterable[Read]) -> None:
    """See that the prompt of each turn goes on from all of the turn before."""
    for number, (turn, following) in enumerate(itertools.pairwise(turns)):
        ids = turn.prompt + turn.ids
        assert following.answer["prefix"] == {"kept_tokens": len(ids), "reason": None}, number
        assert following.prompt[: len(ids)] == ids
