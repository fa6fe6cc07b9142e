"""C8: whoever does not ask for ids cannot tell the patched server from the stock one.

The same greedy requests go to a stock and to a patched server. Ids, times and latencies
are masked. Where a stream is cut into chunks moves with timing, in stock too, so a stream
is compared by the kinds of its chunks and by the joined values of each kind.
"""

from __future__ import annotations

import itertools
import json
import operator
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from testbed.client import TOOL, flush_cache, tool_call
from testbed.comparison import TRIES, ask, join_stream
from testbed.pool import ServerPool
from testbed.tiny_model import tiny_model_path

Request = tuple[str, dict[str, Any]]
ASKING = {"return_token_ids": True}
CALL = tool_call("Paris")
GREEDY = {"temperature": 0, "num_predict": 8}
MESSAGES = [{"role": "user", "content": "Say something, 日本語."}]

# Each of these is sent whole and streamed.
CHAT: list[dict[str, Any]] = [
    {},
    {"ignore_eos": True},
    {"n": 2},
    {"regex": "naïve 日本語 🙂"},
    {"regex": "one STOP two", "stop": "STOP"},
    {"regex": "one STOP two", "stop": ["STOP"], "no_stop_trim": True},
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 2, "regex": "日本語 text"},
    {"regex": re.escape(CALL), "tools": [TOOL], "max_tokens": 200},
    {"regex": "Hm\\. " + re.escape(CALL), "tools": [TOOL], "max_tokens": 200, "logprobs": True},
    {"regex": re.escape(CALL), "tools": [TOOL], "tool_choice": "none", "max_tokens": 200},
    {"skip_special_tokens": False},
    {"seed": 3, "min_tokens": 4},
    {"return_token_ids": False},
    {"response_format": {"type": "nonsense"}},
    {"temperature": "hot"},
    {"messages": []},
    {"max_tokens": -1},
    {"tool_choice": "required"},
    {"return_hidden_states": True},
]
COMPLETIONS: list[dict[str, Any]] = [
    {},
    {"n": 2, "ignore_eos": True},
    {"prompt": ["Once", "日本語"]},
    {"prompt": [70, 71, 72]},
    {"prompt": [[70, 71], [72]]},
    {"echo": True},
    {"logprobs": 2},
    {"echo": True, "logprobs": 1},
    {"regex": "one STOP two", "stop": "STOP"},
    {"return_token_ids": False},
    {"prompt": ""},
    {"max_tokens": 0},
]
GENERATE: list[dict[str, Any]] = [
    {"text": "Once upon a time"},
    {"input_ids": [70, 71, 72], "return_logprob": True},
    {"text": ["a", "日本語"], "return_logprob": True, "top_logprobs_num": 2},
    {"text": "a", "return_token_ids": True, "token_id_recorder": "x"},
    {"input_ids": []},
]
ANTHROPIC: list[dict[str, Any]] = [
    {},
    {"messages": []},
    {"system": "Be brief.", "stop_sequences": ["x"], "top_k": 5},
    {"tools": [{"name": "f", "input_schema": {"type": "object"}}]},
    {"logprobs": True, "return_token_ids": False},
    {"max_tokens": 0},
    {"messages": "none"},
]
RESPONSES: list[dict[str, Any]] = [
    {},
    {"input": MESSAGES, "instructions": "Be brief.", "store": False},
    {"tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}]},
    {"logprobs": True, "return_token_ids": False},
    {"previous_response_id": "resp_none"},
    {"input": 3},
]
OLLAMA: list[dict[str, Any]] = [
    {"model": "m", "messages": MESSAGES, "options": GREEDY},
    {"model": "m", "messages": "none"},
]
# Sent once, as they are.
ONCE: list[Request] = [
    ("/v1/embeddings", {"model": "m", "input": "a"}),
    ("/v1/embeddings", {"model": "m"}),
    ("/v1/score", {"query": "a"}),
    ("/v1/tokenize", {"model": "m", "prompt": "日本語"}),
    ("/v1/detokenize", {"model": "m", "tokens": [70, 71]}),
    ("/api/generate", {"model": "m", "prompt": "a", "stream": False, "options": GREEDY}),
    ("/v1/messages/count_tokens", {"model": "m", "messages": MESSAGES}),
    ("/v1/nowhere", {}),
]


def requests_of(path: str) -> list[dict[str, Any]]:
    chat = {"model": "m", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    completion = {"model": "m", "prompt": "Once upon", "temperature": 0, "max_tokens": 12}
    params = {"sampling_params": {"temperature": 0, "max_new_tokens": 8}}
    message = {"model": "m", "messages": MESSAGES, "temperature": 0, "max_tokens": 8}
    # Later releases want the name of the model.
    model = str(tiny_model_path())
    response = {"model": model, "input": "a", "temperature": 0, "max_output_tokens": 8}
    variants: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
        "/v1/chat/completions": (chat, CHAT),
        "/v1/completions": (completion, COMPLETIONS),
        "/generate": (params, GENERATE),
        "/v1/messages": (message, ANTHROPIC),
        "/v1/responses": (response, RESPONSES),
        "/api/chat": ({}, OLLAMA),
    }
    base, cases = variants[path]
    usage = {"stream_options": {"include_usage": True}} if path.startswith("/v1/c") else {}
    whole = [{**base, **case, "stream": False} for case in cases]
    return whole + [{**base, **case, "stream": True, **usage} for case in cases]


ASKING_ENDPOINTS = ["/v1/chat/completions", "/v1/completions"]
OTHERS = [("/generate", b) for b in requests_of("/generate")]
OTHERS += [("/v1/messages", b) for b in requests_of("/v1/messages")]
OTHERS += [("/v1/responses", b) for b in requests_of("/v1/responses")]
OTHERS += [("/api/chat", b) for b in requests_of("/api/chat")]
OTHERS += ONCE
ALL = [(path, body) for path in ASKING_ENDPOINTS for body in requests_of(path)] + OTHERS


def answers(url: str, requests_: list[Request]) -> list[Any]:
    """Send requests to a server that has none cached."""
    flush_cache(url)
    return [ask(url, path, body) for path, body in requests_]


def differences(
    one: str,
    other: str,
    requests_: list[Request],
    tries: int = TRIES,
    asking: bool = False,
    agree: Callable[[Any, Any], bool] = operator.eq,
) -> list[tuple[Any, ...]]:
    """Send requests to two servers and return those that are answered differently.

    On a busy machine a server may merge two steps, and then skip a kind of chunk or have
    log-probabilities that it otherwise drops. So each is asked several times, and it is
    enough if one has given an answer that agrees with one that the other has given.

    Args:
        asking: Whether the requests to the other server ask for ids.
    """
    requests_of_other = [(p, {**b, **(ASKING if asking else {})}) for p, b in requests_]
    found = []
    with ThreadPoolExecutor(2) as pool:
        both = pool.map(answers, (one, other), (requests_, requests_of_other))
        for request, request_of_other, a, b in zip(requests_, requests_of_other, *both):
            seen = [a], [b]
            while not any(agree(*pair) for pair in itertools.product(*seen)):
                if len(seen[0]) == tries:
                    found.append((*request, a, b))
                    break
                seen[0].extend(answers(one, [request]))
                seen[1].extend(answers(other, [request_of_other]))
    return found


def assert_no_differences(*args: Any, **kwargs: Any) -> None:
    found = differences(*args, **kwargs)
    assert not found, "\n\n".join("\n".join(map(str, difference)) for difference in found)


def test_there_are_enough_requests() -> None:
    assert len(ALL) >= 60


@pytest.mark.clause("C8")
@pytest.mark.parametrize("server", ["default"])
def test_not_asking_is_stock(servers: ServerPool, server: str) -> None:
    stock, patched = servers.get("stock"), servers.get(server)
    assert_no_differences(stock.url, patched.url, ALL)


@pytest.mark.clause("C8", "C9")
@pytest.mark.parametrize("server", ["default_on"])
def test_other_endpoints_are_stock_with_the_default_on(servers: ServerPool, server: str) -> None:
    stock, patched = servers.get("stock"), servers.get(server)
    asked_not_to = [
        (path, {**body, "return_token_ids": False})
        for path in ASKING_ENDPOINTS
        for body in requests_of(path)
    ]
    assert_no_differences(stock.url, patched.url, OTHERS + asked_not_to)


@pytest.mark.parametrize("server", ["default_on"])
def test_asking_is_not_stock(servers: ServerPool, server: str) -> None:
    """The comparison sees ids where there are some, in every answer that can have them."""
    stock, patched = servers.get("stock"), servers.get(server)
    for path in ASKING_ENDPOINTS:
        bodies = [
            body
            for body in requests_of(path)
            if "return_token_ids" not in body and not (body.get("echo") and "logprobs" in body)
        ]
        answered = [b for b in bodies if has_choices(ask(stock.url, path, b))]
        asking = [(path, body) for body in answered]
        found = differences(stock.url, patched.url, asking, tries=1)
        assert len(found) == len(answered)


@pytest.mark.parametrize("server", ["default"])
def test_asking_adds_to_what_stock_answers(servers: ServerPool, server: str) -> None:
    stock, patched = servers.get("stock"), servers.get(server)
    requests_ = [
        (path, body)
        for path in ASKING_ENDPOINTS
        for body in requests_of(path)
        if not (body.get("echo") and "logprobs" in body)
    ]
    answered = [r for r in requests_ if has_choices(ask(stock.url, *r))]
    assert len(answered) >= 40
    assert_no_differences(stock.url, patched.url, answered, asking=True, agree=adds_to)
    # Later releases answer some of these with ids under names of their own.
    whole = [(path, {**body, **ASKING}) for path, body in answered if not body["stream"]]
    assert_no_differences(stock.url, patched.url, whole, agree=adds_to)


def adds_to(of_stock: Any, of_patched: Any) -> bool:
    return not lacking(content(of_patched), content(of_stock))


def content(answer: tuple[int, dict[str, str], Any]) -> Any:
    """What an answer says, whatever its kinds of chunk."""
    body = answer[2]
    if isinstance(body, str):
        return json.loads(body)
    return {repr(index): entry.get("values") for index, entry in body}


def lacking(value: Any, other: Any, path: str = "") -> list[str]:
    """The paths at which a value has not what another has there."""
    if isinstance(value, dict) and isinstance(other, dict):
        found = [lacking(value.get(key), item, f"{path}.{key}") for key, item in other.items()]
        return sum(found, [])
    if isinstance(value, list) and isinstance(other, list):
        if len(value) == len(other):
            return sum((lacking(a, b, f"{path}[]") for a, b in zip(value, other)), [])
        if "logprobs" in path:
            # Streams of stock leave out those of tokens that have no text yet.
            rest = iter(value)
            return [f"{path}: no {item!r}" for item in other if item not in rest]
    return [] if value == other else [f"{path}: {value!r}, not {other!r}"]


def has_choices(answer: tuple[int, dict[str, str], Any]) -> bool:
    # A stream reports its errors with status 200.
    return answer[0] == 200 and ".error.message" not in repr(answer[2])


def test_a_null_key_is_a_difference() -> None:
    chunk = '{"choices":[{"index":0,"delta":{"content":"a"}}]}'
    other = '{"choices":[{"index":0,"delta":{"content":"a"},"token_ids":null}]}'
    assert join_stream(f"data: {chunk}\n\n") != join_stream(f"data: {other}\n\n")
