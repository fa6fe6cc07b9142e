"""The experts of a mixture by token, held against the capture of the engine.

The engine's own are those of /generate: one row for each token that is forwarded.
"""

from __future__ import annotations

import base64
import io
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests

from testbed.client import (
    CHAT,
    COMPLETIONS,
    GENERATE,
    PROMPT,
    aborting,
    body_for,
    control,
    flush_cache,
    post,
    stream,
)
from testbed.server import Server
from testbed.tiny_model import NUM_EXPERTS_PER_TOKEN, NUM_LAYERS

ENDPOINTS = pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS, GENERATE])
SERVERS = pytest.mark.parametrize("server", ["experts", "experts_overlap"], indirect=True)
EXPERTS = pytest.mark.parametrize("server", ["experts"], indirect=True)
STREAMED = pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
NUM_TOKENS = 11


def captured(
    server: Server, prompt: list[int] = PROMPT, num_tokens: int = NUM_TOKENS
) -> tuple[list[int], np.ndarray]:
    """The ids and all rows, as the engine says by /generate."""
    params = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": params, "return_routed_experts": True}
    answer = post(server, "/generate", body)
    rows = np.frombuffer(base64.b64decode(answer["meta_info"]["routed_experts"]), np.int32)
    rows = rows.reshape(-1, NUM_LAYERS, NUM_EXPERTS_PER_TOKEN)
    assert len(rows) == len(prompt) + num_tokens - 1
    assert len(np.unique(rows, axis=0)) > 3, "it would not tell if all were alike"
    return answer["output_ids"], rows


def asking(endpoint: str, n: int = 1, **fields: Any) -> dict[str, Any]:
    """A request by SGLang's name. On GENERATE none is needed, as with vLLM."""
    body = body_for(endpoint, NUM_TOKENS, n)
    if endpoint == GENERATE:
        body["sampling_params"] |= fields
        return body
    return {**body, "return_routed_experts": True, **fields}


def choices_of(
    server: Server, endpoint: str, body: dict[str, Any], streamed: bool
) -> list[dict[str, Any]]:
    """The ids and the experts of each choice. In a stream these are on its last chunk."""
    if not streamed:
        return post(server, endpoint, body)["choices"]
    joined: dict[int, dict[str, Any]] = {}
    for chunk in stream(server, endpoint, body):
        for choice in chunk["choices"]:
            whole = joined.setdefault(choice["index"], {"token_ids": []})
            whole["token_ids"] += choice.get("token_ids", [])
            if choice.get("routed_experts") is not None:
                assert choice["finish_reason"] is not None and "routed_experts" not in whole
                whole["routed_experts"] = choice["routed_experts"]
    return [joined[index] for index in sorted(joined)]


def read_npy(text: str) -> np.ndarray:
    """As a client of vLLM reads it."""
    return np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)


def read_raw(payload: dict[str, Any]) -> np.ndarray:
    """As `verifiers` reads what prime-rl's inference server writes."""
    data = np.frombuffer(base64.b64decode(payload["data"]), np.dtype(payload["dtype"]))
    return data.reshape(payload["shape"])


@SERVERS
@ENDPOINTS
@STREAMED
def test_rows_are_those_of_the_engine(server: Server, endpoint: str, streamed: bool) -> None:
    ids, rows = captured(server)
    [choice] = choices_of(server, endpoint, asking(endpoint), streamed)
    assert choice["token_ids"] == ids
    experts = read_npy(choice["routed_experts"])
    assert experts.dtype == np.uint8
    # One for each token but the last.
    assert np.array_equal(experts, rows)


@SERVERS
@ENDPOINTS
@STREAMED
def test_each_choice_has_its_own(server: Server, endpoint: str, streamed: bool) -> None:
    body = asking(endpoint, 3)
    (body["sampling_params"] if endpoint == GENERATE else body)["temperature"] = 1
    choices = choices_of(server, endpoint, body, streamed)
    assert len(choices) == len({tuple(choice["token_ids"]) for choice in choices}) == 3
    for choice in choices:
        # The engine still has the rows of what is the prompt now.
        _, rows = captured(server, PROMPT + choice["token_ids"][:-1], num_tokens=1)
        assert np.array_equal(read_npy(choice["routed_experts"]), rows)


@EXPERTS
@ENDPOINTS
@STREAMED
@pytest.mark.parametrize("start", [0, 3, len(PROMPT)])
def test_rows_start_in_the_prompt(
    server: Server, endpoint: str, streamed: bool, start: int
) -> None:
    """On chat and completions the start asks by itself, since vLLM needs no other field."""
    ids, rows = captured(server)
    fields = {"routed_experts_prompt_start": start}
    body = asking(endpoint, **fields)
    body.pop("return_routed_experts", None)
    [choice] = choices_of(server, endpoint, body, streamed)
    assert choice["token_ids"] == ids
    assert np.array_equal(read_npy(choice["routed_experts"]), rows[start:])

    raw = asking(endpoint, **fields, routed_experts_format="raw")
    [choice] = choices_of(server, endpoint, raw, streamed)
    payload = choice["routed_experts"]
    assert set(payload) == {"data", "shape", "start", "dtype"}
    assert (payload["start"], payload["dtype"]) == (start, "uint8")
    assert np.array_equal(read_raw(payload), rows[start:])


@EXPERTS
@ENDPOINTS
def test_a_start_behind_the_prompt_is_refused(server: Server, endpoint: str) -> None:
    for start in (len(PROMPT) + 1, -1, "x"):
        body = asking(endpoint, routed_experts_prompt_start=start)
        refused = requests.post(server.url + endpoint, json=body, timeout=60)
        assert refused.status_code == 400, refused.text
        assert "routed_experts" in refused.text


@EXPERTS
def test_renderers_reads_prime_rls_form(server: Server) -> None:
    """It takes the data out of the text before it parses it."""
    from renderers.client import parse_generate_response

    _, rows = captured(server)
    body = asking(GENERATE, routed_experts_format="raw")
    answer = control(server, GENERATE, **body)
    assert b'"routed_experts":{"data":"' in answer.content
    [choice] = parse_generate_response(answer.content)["choices"]
    assert isinstance(choice["routed_experts"]["data"], memoryview)
    assert np.array_equal(read_raw(choice["routed_experts"]), rows)


@EXPERTS
@STREAMED
def test_who_does_not_ask_gets_none(server: Server, streamed: bool) -> None:
    for endpoint in (CHAT, COMPLETIONS):
        [with_ids] = choices_of(server, endpoint, body_for(endpoint, NUM_TOKENS), streamed)
        assert with_ids["token_ids"] and "routed_experts" not in with_ids
        for fields in ({"routed_experts_prompt_start": 0}, {"return_routed_experts": True}):
            body = {**body_for(endpoint, NUM_TOKENS), "return_token_ids": False, **fields}
            [without_ids] = choices_of(server, endpoint, body, streamed)
            assert not without_ids.get("token_ids") and "routed_experts" not in without_ids
    body = {**asking(GENERATE), "return_routed_experts": False}
    [choice] = choices_of(server, GENERATE, body, streamed)
    assert choice["token_ids"] and choice.get("routed_experts") is None


@EXPERTS
@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
def test_the_rest_is_as_without(server: Server, endpoint: str) -> None:
    """What SGLang has by `return_routed_experts` stays where it is."""

    def ask(**fields: Any) -> dict[str, Any]:
        flush_cache(server.url)
        answer = post(server, endpoint, {**body_for(endpoint, NUM_TOKENS), **fields})
        # Of the request and not of what it asks for.
        return {**answer, "id": "", "created": 0, "metadata": None}

    asked = ask(return_routed_experts=True)
    [choice] = asked["choices"]
    assert read_npy(choice.pop("routed_experts")).tobytes() == bytes(
        np.frombuffer(base64.b64decode(asked["sglext"]["routed_experts"]), np.int32).astype("u1")
    )
    del asked["sglext"]
    plain = ask()
    plain.pop("sglext", None)
    assert asked == plain


@pytest.mark.parametrize("server", ["default"], indirect=True)
@ENDPOINTS
def test_a_server_that_captures_none_has_none(server: Server, endpoint: str) -> None:
    for fields in ({}, {"routed_experts_prompt_start": 2}):
        [choice] = post(server, endpoint, asking(endpoint, **fields))["choices"]
        assert choice["token_ids"] and choice.get("routed_experts") is None


@EXPERTS
def test_requests_that_ask_run_beside_those_that_do_not(server: Server) -> None:
    """Each has its own rows."""
    prompts = [[5 + (i * 7 + k) % 200 for k in range(5 + i)] for i in range(8)]
    expected = [captured(server, prompt) for prompt in prompts]
    found: dict[int, dict[str, Any]] = {}

    def ask(index: int) -> None:
        body = body_for(COMPLETIONS, NUM_TOKENS)
        # They come in together, with some that do not ask before, between and behind.
        body |= {"prompt": prompts[index], "return_routed_experts": index % 3 == 1}
        [found[index]] = post(server, COMPLETIONS, body)["choices"]

    with server.slowed_down():
        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, (ids, rows) in enumerate(expected):
        assert found[index]["token_ids"] == ids
        if index % 3 == 1:
            assert np.array_equal(read_npy(found[index]["routed_experts"]), rows)
        else:
            assert "routed_experts" not in found[index]


@EXPERTS
def test_an_aborted_request_has_those_of_its_tokens(server: Server) -> None:
    request_id = f"experts-{time.time_ns()}"
    body = {**asking(GENERATE), "request_id": request_id}
    body["sampling_params"]["max_tokens"] = 2000
    with aborting(server, request_id, every_s=0.5):
        [choice] = choices_of(server, GENERATE, body, streamed=True)
    num_tokens = len(PROMPT) + len(choice["token_ids"])
    assert len(PROMPT) < num_tokens < 2000
    assert len(read_npy(choice["routed_experts"])) == num_tokens - 1


def test_the_type_is_that_of_the_model() -> None:
    """256 experts fit a byte. The ids of a response do not decide."""
    from sglang.srt.entrypoints.openai.routed_experts import RoutedExperts

    rows = np.arange(24, dtype=np.int32).reshape(6, 2, 2)
    meta = {"prompt_tokens": 5, "routed_experts": base64.b64encode(rows.tobytes()).decode()}
    choice: Any = SimpleNamespace(meta_info=meta, num_ready=2)
    for name, number, dtype in (
        ("num_experts", 256, "uint8"),
        ("n_routed_experts", 257, "uint16"),
        ("num_local_experts", 512, "uint16"),
        ("unheard_of", 8, "uint16"),
    ):
        sizes = {"num_hidden_layers": 2, "num_experts_per_tok": 2, name: number}
        config: Any = SimpleNamespace(hf_text_config=SimpleNamespace(**sizes))
        payload = RoutedExperts(config, 0, "raw").dump(choice)
        assert isinstance(payload, dict) and payload["dtype"] == dtype
        assert np.array_equal(read_raw(payload), rows)
