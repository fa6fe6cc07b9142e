"""Requests to a server under test, and how their answers are read."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import requests

from testbed.server import Server

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
GENERATE = "/inference/v1/generate"
PROMPT = [70, 71, 72, 73]
NUM_TOKENS = 300
FLUSH_TIMEOUT_S = 30.0
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
# With cities that a grammar can be made of.
WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "東京"]}},
            "required": ["city"],
        },
    },
}


def tool_call(city: str) -> str:
    arguments = json.dumps({"city": city}, ensure_ascii=False)
    return f'<tool_call>\n{{"name": "get_weather", "arguments": {arguments}}}\n</tool_call>'


def json_call(city: str) -> str:
    """What a model says where the server has it answer with calls alone."""
    call = {"name": "get_weather", "parameters": {"city": city}}
    return json.dumps([call], ensure_ascii=False)


def says(text: str, **fields: Any) -> dict[str, Any]:
    """A request whose answer is exactly `text`."""
    return {"regex": re.escape(text), "max_tokens": 200, **fields}


def chat(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Say something, 日本語."}],
        "temperature": 0,
        "return_token_ids": True,
        **case,
    }


def completion(case: dict[str, Any]) -> dict[str, Any]:
    case = dict(case)
    if case.pop("logprobs", None):
        case["logprobs"] = case.pop("top_logprobs", 0)
    return {
        "model": "tiny",
        "prompt": "Once upon a time, 日本語",
        "temperature": 0,
        "return_token_ids": True,
        **case,
    }


def generate(prompt: list[int] = PROMPT, **sampling_params: Any) -> dict[str, Any]:
    params = {"temperature": 0, "max_tokens": 16, "ignore_eos": True, **sampling_params}
    return {"model": "m", "token_ids": prompt, "sampling_params": params}


def body_for(endpoint: str, max_tokens: int, n: int = 1) -> dict[str, Any]:
    """A request for the same ids on any of the endpoints."""
    if endpoint == GENERATE:
        return generate(PROMPT, max_tokens=max_tokens, n=n)
    params = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "n": n}
    if endpoint == COMPLETIONS:
        return {"model": "m", "prompt": PROMPT, "return_token_ids": True, **params}
    messages = [{"role": "user", "content": "hi"}]
    fields = {"messages": messages, "input_ids": PROMPT, "return_token_ids": True}
    return {"model": "m", **fields, **params}


def post(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = requests.post(server.url + path, json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def stream(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    body = {"stream_options": {"include_usage": True}, **body, "stream": True}
    with requests.post(server.url + path, json=body, timeout=120, stream=True) as response:
        assert response.status_code == 200, response.text
        events = [line for line in response.iter_lines() if line]
    assert events.pop() == b"data: [DONE]"
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events]
    assert not [chunk for chunk in chunks if "error" in chunk]
    return chunks


def control(server: Server, path: str, **body: Any) -> requests.Response:
    return requests.post(server.url + path, json=body, timeout=120)


@contextlib.contextmanager
def aborting(server: Server, request_id: str, every_s: float) -> Iterator[None]:
    """Slow a server down, and abort a request of it again and again until it is answered."""
    done = threading.Event()

    def abort() -> None:
        while not done.wait(every_s):
            control(server, "/abort_request", rid=request_id)

    thread = threading.Thread(target=abort)
    thread.start()
    try:
        with server.slowed_down():
            yield
    finally:
        done.set()
        thread.join()


def flush_cache(url: str) -> None:
    """Forget the requests before: a cached prefix changes the last digits of a result."""
    deadline = time.monotonic() + FLUSH_TIMEOUT_S
    while not requests.post(f"{url}/flush_cache", timeout=30).ok:
        assert time.monotonic() < deadline, f"{url} is not idle"
        time.sleep(0.01)


def prompts_of(answer: dict[str, Any]) -> list[list[int]]:
    """The prompt ids of a whole response, one list for each choice."""
    if "prompt_token_ids" in answer:
        return [answer["prompt_token_ids"]] * len(answer["choices"])
    return [choice["prompt_token_ids"] for choice in answer["choices"]]


def text_of(choice: dict[str, Any]) -> str:
    """All the text that a choice of a response or of a chunk shows."""
    message = choice.get("message") or choice.get("delta") or {}
    calls = message.get("tool_calls") or []
    return "".join(
        [
            choice.get("text") or "",
            message.get("reasoning_content") or "",
            message.get("content") or "",
            *(call["function"].get("arguments") or "" for call in calls),
        ]
    )


def fresh(server: Server, prompt: list[int], num_tokens: int, **fields: Any) -> list[int]:
    """What the weights of now make of a prompt that is not cached.

    Args:
        fields: Others of the request.
    """
    # Refused while a request is on its way out of the scheduler, a moment after its answer.
    flush_cache(server.url)
    body = {**body_for(COMPLETIONS, num_tokens), "prompt": prompt, **fields}
    [choice] = post(server, COMPLETIONS, body)["choices"]
    ids: list[int] = choice["token_ids"]
    return ids


class Running:
    """A streamed request that can be waited for while it runs, slowly until it is to finish.

    Args:
        more: Fields of the request beside those of `body_for`.
    """

    def __init__(
        self, server: Server, endpoint: str, more: dict[str, Any] | None = None, **fields: Any
    ):
        self.server = server
        self.url = server.url + endpoint
        self.body = {**body_for(endpoint, **fields), **(more or {}), "stream": True}
        self.chunks: list[dict[str, Any]] = []
        self.num_tokens = 0
        self.grown = threading.Condition()
        self.thread = threading.Thread(target=self.read)
        server.slow_down()
        self.thread.start()

    def read(self) -> None:
        with requests.post(self.url, json=self.body, timeout=300, stream=True) as response:
            for line in response.iter_lines():
                if line and line != b"data: [DONE]":
                    with self.grown:
                        self.chunks.append(json.loads(line.removeprefix(b"data: ")))
                        choices = self.chunks[-1]["choices"]
                        self.num_tokens += sum(len(c.get("token_ids", [])) for c in choices)
                        self.grown.notify_all()

    def wait_for(self, num_tokens: int) -> None:
        with self.grown:
            assert self.grown.wait_for(lambda: self.num_tokens >= num_tokens, 60)

    def finish(self) -> dict[int, tuple[list[int], list[dict[str, Any]]]]:
        """The ids of each choice, and the versions that its last chunk alone has."""
        self.server.slow_down(0)
        self.thread.join()
        ids: dict[int, list[int]] = {}
        versions: dict[int, list[dict[str, Any]]] = {}
        for chunk in self.chunks:
            for choice in chunk["choices"]:
                index = choice["index"]
                ids.setdefault(index, []).extend(choice.get("token_ids", []))
                if choice.get("weight_versions") is not None:
                    assert choice["finish_reason"] is not None and index not in versions
                    versions[index] = choice["weight_versions"]
        return {index: (ids[index], versions.get(index, [])) for index in ids}
