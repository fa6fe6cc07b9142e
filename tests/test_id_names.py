"""Ids and what belongs to them, by the other names that clients ask for.

Each is held against what the same greedy request gets by `return_token_ids`. Stock has some
of the names in some releases: the same tests hold there, so others answer as it does.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import requests

from testbed.client import (
    CHAT,
    COMPLETIONS,
    GENERATE,
    Running,
    chat,
    completion,
    control,
    flush_cache,
    generate,
    post,
    says,
    stream,
    text_of,
)
from testbed.server import (
    ABORTED_STREAMS_FAIL,
    CUTS_INCREMENTAL_CHAT,
    FAILS_ABORTED_STREAMS,
    KNOWS_TOKEN_BYTES,
    Server,
)

INPUT, OUTPUT = "return_input_ids_in_sglext", "return_output_ids_in_sglext"
INPUT_HEADER, OUTPUT_HEADER = "x-sglext-return-input-ids", "x-sglext-return-output-ids"
FRAMED = {"x-sglext-ids-framed": "1"}
USAGE = {"stream_options": {"include_usage": True}}
BOTH = {INPUT: True, OUTPUT: True}
IDS = {"ignore_eos": True, "max_tokens": 12}
SERVERS = pytest.mark.parametrize("server", ["default", "id_names"], indirect=True)
DEFAULT = pytest.mark.parametrize("server", ["default"], indirect=True)
FLAGS = pytest.mark.parametrize("server", ["id_names"], indirect=True)
STREAMED = pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
ENDPOINTS = pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])


def named(case: dict[str, Any], endpoint: str = CHAT) -> dict[str, Any]:
    """A request that does not ask by `return_token_ids`."""
    body = (chat if endpoint == CHAT else completion)(case)
    if "return_token_ids" not in case:
        del body["return_token_ids"]
    return body


def ids_of(server: Server, **fields: Any) -> tuple[list[int], list[list[int]]]:
    """The ids that the request has got, by the names of the contract."""
    flush_cache(server.url)
    answer = post(server, CHAT, chat(fields))
    ids = [choice["token_ids"] for choice in answer["choices"]]
    flush_cache(server.url)
    return answer["prompt_token_ids"], ids


def events_of(
    server: Server, body: dict[str, Any], headers: dict[str, str] | None = None
) -> list[str]:
    response = requests.post(
        server.url + CHAT, json={**USAGE, **body, "stream": True}, headers=headers, timeout=120
    )
    assert response.status_code == 200, response.text
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return events[:-2]


def sglext_event(first: str, sglext: dict[str, Any]) -> str:
    """The event as stock writes it, to the byte but for the time.

    Args:
        first: The first event of the stream.
    """
    rid = json.loads(first.removeprefix("data: "))["id"]
    fields = json.dumps(sglext, separators=(",", ":"))
    return (
        f'data: {{"id":"{rid}","object":"chat.completion.chunk","created":0,"model":"tiny",'
        f'"choices":[],"usage":null,"sglext":{fields}}}'
    )


def without_time(event: str) -> str:
    return re.sub(r'"created":\d+', '"created":0', event)


@SERVERS
@pytest.mark.parametrize("n", [1, 2])
def test_sglext_of_a_whole_response(server: Server, n: int) -> None:
    prompt, ids = ids_of(server, **IDS, n=n)
    answer = post(server, CHAT, named({**IDS, **BOTH, "n": n}))
    # Of several choices, stock has an empty list of these.
    answer["sglext"].pop("spec_tokens_details", None)
    assert answer["sglext"] == {"input_ids": prompt, "output_ids": ids}
    assert list(answer)[-1] == "sglext" and list(answer["sglext"]) == ["input_ids", "output_ids"]


@SERVERS
@pytest.mark.parametrize("case", [IDS, {**IDS, "logprobs": True}, says("naïve 日本語 🙂")])
def test_sglext_of_a_stream(server: Server, case: dict[str, Any]) -> None:
    prompt, ids = ids_of(server, **case)
    events = events_of(server, named({**case, **BOTH}))
    expected = sglext_event(events[0], {"input_ids": prompt, "output_ids": ids})
    assert without_time(events[-2]) == expected
    assert json.loads(events[-1].removeprefix("data: "))["usage"]["completion_tokens"] == len(
        ids[0]
    )
    assert not any("sglext" in event for event in events[:-2])


@SERVERS
def test_sglext_of_several_choices(server: Server) -> None:
    prompt, ids = ids_of(server, **IDS, n=3)
    events = events_of(server, named({**IDS, **BOTH, "n": 3}))
    [event] = [event for event in events if '"sglext":' in event]
    chunk = json.loads(event.removeprefix("data: "))
    assert chunk["sglext"] == {"input_ids": prompt, "output_ids": ids}


@SERVERS
def test_sglext_without_usage_is_last(server: Server) -> None:
    _, ids = ids_of(server, **IDS)
    events = events_of(server, named({**IDS, **BOTH, "stream_options": None}))
    assert json.loads(events[-1].removeprefix("data: "))["sglext"]["output_ids"] == ids


@SERVERS
def test_a_framed_stream(server: Server) -> None:
    prompt, ids = ids_of(server, **IDS)
    events = events_of(server, named({**IDS, **BOTH}), FRAMED)
    expected = sglext_event(events[0], {"input_ids": prompt, "output_ids": ids})
    assert without_time(events[-2]) == f"event: sglext_ids\n{expected}"


@pytest.mark.parametrize("framed", [False, True], ids=["plain", "framed"])
@DEFAULT
def test_sglext_keeps_what_else_it_has(server: Server, framed: bool) -> None:
    prompt, ids = ids_of(server, **IDS)
    case = {**IDS, "return_cached_tokens_details": True}
    flush_cache(server.url)
    alone = [json.loads(e.partition("data: ")[2]) for e in events_of(server, named(case))]
    flush_cache(server.url)
    others = [chunk["sglext"] for chunk in alone if "sglext" in chunk]
    events = events_of(server, named({**case, **BOTH}), FRAMED if framed else None)
    events = [event for event in events if '"sglext":' in event]
    chunks = [json.loads(event.partition("data: ")[2])["sglext"] for event in events]
    sglext = {"input_ids": prompt, "output_ids": ids}
    assert chunks == ([*others, sglext] if framed else [{**(others or [{}])[0], **sglext}])
    assert [event.startswith("event: ") for event in events] == [False] * len(others) * framed + [
        framed
    ]


@DEFAULT
@STREAMED
@pytest.mark.parametrize(
    "fields, headers, keys",
    [
        ({INPUT: True}, {}, ["input_ids"]),
        ({OUTPUT: True}, {}, ["output_ids"]),
        ({}, {INPUT_HEADER: "1"}, ["input_ids"]),
        ({}, {OUTPUT_HEADER: "1"}, ["output_ids"]),
        ({}, {INPUT_HEADER: "1", OUTPUT_HEADER: "1"}, ["input_ids", "output_ids"]),
        ({}, {INPUT_HEADER: "true", OUTPUT_HEADER: "0", **FRAMED}, None),
    ],
)
def test_who_asks_for_sglext(
    server: Server,
    streamed: bool,
    fields: dict[str, Any],
    headers: dict[str, str],
    keys: list[str] | None,
) -> None:
    body = named({**IDS, **fields})
    if streamed:
        events = events_of(server, body, headers)
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    else:
        chunks = [requests.post(server.url + CHAT, json=body, headers=headers, timeout=60).json()]
    found = [list(chunk["sglext"]) for chunk in chunks if "sglext" in chunk]
    assert found == ([] if keys is None else [keys])


@FLAGS
@STREAMED
def test_the_server_asks_for_everybody(server: Server, streamed: bool) -> None:
    prompt, ids = ids_of(server, **IDS)
    ask = stream if streamed else lambda *args: [post(*args)]
    chunks = ask(server, CHAT, named({**IDS, INPUT: False}))
    assert [chunk["sglext"] for chunk in chunks if "sglext" in chunk] == [
        {"input_ids": prompt, "output_ids": ids}
    ]
    chunks = ask(server, COMPLETIONS, named(IDS, COMPLETIONS))
    assert not any("sglext" in chunk for chunk in chunks)


@SERVERS
@pytest.mark.skipif(FAILS_ABORTED_STREAMS, reason=ABORTED_STREAMS_FAIL)
def test_sglext_of_an_abort(server: Server) -> None:
    running = Running(server, CHAT, {**BOTH, **USAGE}, max_tokens=500)
    running.wait_for(5)
    assert control(server, "/abort_request", rid=running.chunks[0]["id"]).ok
    [(ids, _)] = running.finish().values()
    [sglext] = [chunk["sglext"] for chunk in running.chunks if "sglext" in chunk]
    assert 5 <= len(ids) < 500 and sglext["output_ids"] == [ids]
    assert running.chunks[-1]["usage"]["completion_tokens"] == len(ids)


@DEFAULT
@STREAMED
@pytest.mark.parametrize("n", [1, 2])
def test_prompt_ids_and_meta_info(server: Server, streamed: bool, n: int) -> None:
    case = {**IDS, "n": n, "logprobs": True, "top_logprobs": 2}
    prompt, ids = ids_of(server, **case)
    asked = {"return_prompt_token_ids": True, "return_meta_info": True}
    if streamed:
        chunks = stream(server, CHAT, named({**case, **asked}))
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
    else:
        choices = post(server, CHAT, named({**case, **asked}))["choices"]
    for index in range(n):
        mine = [choice for choice in choices if choice["index"] == index]
        assert [c["prompt_token_ids"] for c in mine if "prompt_token_ids" in c] == [prompt]
        assert "prompt_token_ids" in mine[0]
        [meta_info] = [choice["meta_info"] for choice in mine if "meta_info" in choice]
        assert "meta_info" in [c for c in mine if c["finish_reason"] is not None][0]
        assert meta_info["prompt_tokens"] == len(prompt)
        assert meta_info["completion_tokens"] == len(ids[index])
        assert meta_info["finish_reason"] == {"type": "length", "length": len(ids[index])}
        assert [token_id for _, token_id, _ in meta_info["output_token_logprobs"]] == ids[index]
        assert [len(top) for top in meta_info["output_top_logprobs"]] == [2] * len(ids[index])


@FLAGS
def test_meta_info_is_whole_where_outputs_are_parts(server: Server) -> None:
    case = {**IDS, "logprobs": True}
    _, [ids] = ids_of(server, **case)
    chunks = stream(server, CHAT, named({**case, "return_meta_info": True}))
    [meta_info] = [c["meta_info"] for chunk in chunks for c in chunk["choices"] if "meta_info" in c]
    assert [token_id for _, token_id, _ in meta_info["output_token_logprobs"]] == ids


@SERVERS
@STREAMED
def test_all_names_at_once_change_nothing_else(server: Server, streamed: bool) -> None:
    """Each keeps out of the way of the others, and of the ids of the contract."""
    case = {**IDS, "logprobs": True, "return_token_ids": True}
    names = {
        **BOTH,
        "return_prompt_token_ids": True,
        "return_meta_info": True,
        "return_weight_versions": True,
    }

    def ask(body: dict[str, Any]) -> dict[str, list[Any]]:
        flush_cache(server.url)
        chunks = stream(server, CHAT, body) if streamed else [post(server, CHAT, body)]
        seen: dict[str, list[Any]] = {}
        for chunk in chunks:
            for key in ("prompt_token_ids", "usage", "sglext"):
                if chunk.get(key) is not None:
                    seen.setdefault(key, []).append(chunk[key])
            for choice in chunk["choices"]:
                for key in ("token_ids", "weight_versions", "finish_reason"):
                    if choice.get(key) is not None:
                        seen.setdefault(key, []).append(choice[key])
                if choice.get("logprobs"):
                    seen.setdefault("logprobs", []).extend(choice["logprobs"]["content"])
                seen.setdefault("text", []).append(text_of(choice))
        seen["text"] = ["".join(seen["text"])]
        seen["token_ids"] = [sum(seen["token_ids"], [])]
        return seen

    alone, together = ask(chat(case)), ask(chat({**case, **names}))
    [sglext] = together.pop("sglext")
    alone.pop("sglext", None)
    if streamed and CUTS_INCREMENTAL_CHAT and server.name == "id_names":
        # What is left of it depends on which steps are merged.
        del together["text"], alone["text"]
    assert together == alone
    assert sglext["output_ids"] == alone["token_ids"]
    assert sglext["input_ids"] == alone["prompt_token_ids"][0]


@pytest.mark.parametrize("server", ["turns_qwen3"], indirect=True)
@STREAMED
def test_a_turn_of_a_conversation_has_them_too(server: Server, streamed: bool) -> None:
    body = chat({**IDS, **BOTH, "return_meta_info": True})
    chunks = stream(server, CHAT, body) if streamed else [post(server, CHAT, body)]
    assert chunks[0]["prefix"]["kept_tokens"] == 0
    [sglext] = [chunk["sglext"] for chunk in chunks if "sglext" in chunk]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    ids = [token_id for choice in choices for token_id in choice.get("token_ids", [])]
    assert sglext == {"input_ids": chunks[0]["prompt_token_ids"], "output_ids": [ids]}
    [meta_info] = [choice["meta_info"] for choice in choices if "meta_info" in choice]
    assert meta_info["completion_tokens"] == len(ids)


@DEFAULT
@STREAMED
@ENDPOINTS
def test_weight_versions_without_ids(server: Server, endpoint: str, streamed: bool) -> None:
    def ask(fields: dict[str, Any]) -> list[dict[str, Any]]:
        body = named({**IDS, "logprobs": True, **fields}, endpoint)
        chunks = stream(server, endpoint, body) if streamed else [post(server, endpoint, body)]
        assert not any("prompt_token_ids" in chunk for chunk in chunks if fields != with_ids)
        return [choice for chunk in chunks for choice in chunk["choices"]]

    with_ids = {"return_token_ids": True}
    expected = [c["weight_versions"] for c in ask(with_ids) if "weight_versions" in c]
    assert len(expected) == 1
    choices = ask({"return_weight_versions": True})
    assert [c["weight_versions"] for c in choices if "weight_versions" in c] == expected
    assert "weight_versions" in [c for c in choices if c["finish_reason"] is not None][-1]
    assert not any("token_ids" in choice for choice in choices)
    assert any(choice["logprobs"] for choice in choices)
    with_ids = {"return_token_ids": True, "return_weight_versions": False}
    choices = ask(with_ids)
    assert any("token_ids" in choice for choice in choices)
    assert not any("weight_versions" in choice for choice in choices)


def token_names(logprobs: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The names of the tokens, and of the most likely ones in their places."""
    if "content" not in logprobs:
        return logprobs["tokens"], [list(top or {}) for top in logprobs["top_logprobs"]]
    content = logprobs["content"]
    tops = [[top["token"] for top in entry["top_logprobs"]] for entry in content]
    return [entry["token"] for entry in content], tops


@pytest.mark.parametrize("server", ["default", "reasoning"], indirect=True)
@STREAMED
@ENDPOINTS
@pytest.mark.parametrize("with_ids", [False, True], ids=["alone", "with ids"])
def test_tokens_as_token_ids(server: Server, endpoint: str, streamed: bool, with_ids: bool) -> None:
    case = {**IDS, "logprobs": True, "top_logprobs": 2}
    body = named(case, endpoint)
    expected = post(server, endpoint, {**body, "return_token_ids": True})["choices"][0]
    body |= {"return_tokens_as_token_ids": True}
    if with_ids:
        body["return_token_ids"] = True
    chunks = stream(server, endpoint, body) if streamed else [post(server, endpoint, body)]
    names: list[str] = []
    tops: list[list[str]] = []
    data: list[int] = []
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        assert with_ids or "token_ids" not in choice
        if choice["logprobs"]:
            more, more_tops = token_names(choice["logprobs"])
            names += more
            tops += more_tops
            data += [b for e in choice["logprobs"].get("content", []) for b in e["bytes"]]
    ids = expected["token_ids"]
    assert names == [f"token_id:{token_id}" for token_id in ids]
    assert all(re.fullmatch(r"token_id:\d+", name) for top in tops for name in top)
    assert all(len(top) == 2 and name in top for name, top in zip(names, tops, strict=True))
    if endpoint == CHAT:
        assert data == [b for e in expected["logprobs"]["content"] for b in e["bytes"]]
        if KNOWS_TOKEN_BYTES and server.name == "default":
            assert bytes(data).decode(errors="ignore")


@DEFAULT
@ENDPOINTS
def test_tokens_as_token_ids_without_logprobs(server: Server, endpoint: str) -> None:
    choice = post(server, endpoint, named({**IDS, "return_tokens_as_token_ids": True}, endpoint))
    [choice] = choice["choices"]
    assert not choice.get("logprobs") and "token_ids" not in choice


@DEFAULT
def test_generate_takes_the_names_of_vllm(server: Server) -> None:
    names = {"return_weight_versions": True, "return_tokens_as_token_ids": True}
    [choice] = post(server, GENERATE, {**generate(logprobs=1), **names})["choices"]
    assert choice["weight_versions"]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == [
        f"token_id:{token_id}" for token_id in choice["token_ids"]
    ]


@DEFAULT
@ENDPOINTS
@pytest.mark.parametrize("name", ["return_weight_versions", "return_tokens_as_token_ids"])
def test_what_is_no_boolean_is_refused(server: Server, endpoint: str, name: str) -> None:
    response = control(server, endpoint, **named({**IDS, name: "yes"}, endpoint))
    assert response.status_code in (400, 422) and name in response.text


@DEFAULT
def test_tokens_as_token_ids_of_an_echo_are_refused(server: Server) -> None:
    case = {**IDS, "echo": True, "logprobs": True, "return_tokens_as_token_ids": True}
    response = control(server, COMPLETIONS, **named(case, COMPLETIONS))
    assert response.status_code == 400 and "return_tokens_as_token_ids" in response.text
