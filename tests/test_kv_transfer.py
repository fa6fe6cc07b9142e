"""One server prefills and another decodes: the ids are those of one that does both."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import pytest

from testbed import client
from testbed.client import CHAT, GENERATE, PROMPT, generate, post
from testbed.pool import ServerPool
from testbed.server import BOOTSTRAP_PORT, ON_GPU

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not ON_GPU, reason="a CPU transfers no KV cache"),
    pytest.mark.skipif(find_spec("nixl") is None, reason="the package nixl is not installed"),
]
ROOMS = itertools.count(1)
LONG_PROMPT = [10 + i * 7 % 240 for i in range(700)]


def transfer_params() -> dict[str, Any]:
    return {
        "bootstrap_host": "127.0.0.1",
        "bootstrap_port": BOOTSTRAP_PORT,
        "bootstrap_room": next(ROOMS),
    }


def ask_both(
    servers: ServerPool, path: str, body: dict[str, Any], streamed: bool
) -> list[dict[str, Any]]:
    """Return what the server that decodes says: the chunks of a stream, or a whole answer."""
    prefill, decode = servers.get("prefill"), servers.get("decode")
    with ThreadPoolExecutor(1) as pool:
        prefilled = pool.submit(post, prefill, path, body)
        said = client.stream(decode, path, body) if streamed else [post(decode, path, body)]
        prefilled.result(60)
    return said


def ids_of(said: list[dict[str, Any]]) -> list[int]:
    return [x for part in said for choice in part["choices"] for x in choice.get("token_ids") or []]


def logprobs_of(said: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [choice.get("logprobs") for part in said for choice in part["choices"]]
    return [entry for logprobs in found if logprobs for entry in logprobs["content"]]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("prompt", [PROMPT, LONG_PROMPT], ids=["short", "long"])
def test_generate(servers: ServerPool, prompt: list[int], streamed: bool) -> None:
    body = {**generate(prompt, logprobs=1, max_tokens=32), "return_token_ids": True}
    expected = post(servers.get("default"), GENERATE, body)["choices"][0]
    params = transfer_params()
    said = ask_both(servers, GENERATE, {**body, "kv_transfer_params": params}, streamed)
    assert ids_of(said) == expected["token_ids"]
    assert len(expected["token_ids"]) == 32
    assert [entry["token_id"] for entry in logprobs_of(said)] == expected["token_ids"]
    assert [entry["logprob"] for entry in logprobs_of(said)] == pytest.approx(
        [entry["logprob"] for entry in expected["logprobs"]["content"]], abs=2e-3
    )
    assert said[0]["prompt_token_ids"] == prompt
    if not streamed:
        assert said[0]["kv_transfer_params"] == params


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_chat(servers: ServerPool, streamed: bool) -> None:
    """By the names of the release."""
    body = {"model": "m", "messages": [{"role": "user", "content": "日本語"}], "temperature": 0}
    body |= {"regex": "one two three", "return_token_ids": True, "logprobs": True}
    expected = post(servers.get("default"), CHAT, body)
    said = ask_both(servers, CHAT, {**body, **transfer_params()}, streamed)
    assert said[0]["prompt_token_ids"] == expected["prompt_token_ids"]
    assert ids_of(said) == ids_of([expected])
    assert len(ids_of(said)) == len(logprobs_of(said)) > 1
