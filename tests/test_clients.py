"""Clients as they are on PyPI, in front of a real server."""

from __future__ import annotations

import sys
import time
from typing import Any

import openai
import pytest
import requests

from testbed.server import Server, running
from tools.verify import reserve_port

REQUEST: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Say something, 日本語."}],
    "temperature": 0,
    "max_tokens": 24,
}


def ids_of(server: Server) -> tuple[list[int], list[int]]:
    """The prompt and completion ids of REQUEST, from the server itself."""
    body = {**REQUEST, "return_token_ids": True}
    answer = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    return answer["prompt_token_ids"], answer["choices"][0]["token_ids"]


@pytest.mark.clause("C1", "C2")
@pytest.mark.parametrize("server", ["default"], indirect=True)
def test_openai_sdk(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    extra = {"return_token_ids": True}
    prompt, ids = ids_of(server)

    answer = client.chat.completions.create(**REQUEST, extra_body=extra)
    assert answer.model_extra and answer.model_extra["prompt_token_ids"] == prompt
    assert answer.choices[0].model_extra and answer.choices[0].model_extra["token_ids"] == ids

    chunks = list(client.chat.completions.create(**REQUEST, extra_body=extra, stream=True))
    assert chunks[0].model_extra and chunks[0].model_extra["prompt_token_ids"] == prompt
    streamed = [i for c in chunks for i in (c.choices[0].model_extra or {}).get("token_ids", [])]
    assert streamed == ids


@pytest.mark.clause("C1", "C2", "C5")
@pytest.mark.parametrize("server", ["default", "stream_output"], indirect=True)
def test_rllm_model_gateway(server: Server) -> None:
    """What the gateway stores, whole and streamed, is what the server has sampled."""
    port = reserve_port()
    gateway = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "rllm_model_gateway", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--worker", f"{server.url}/v1", "--store", "memory"]
    prompt, ids = ids_of(server)
    with running("gateway", gateway, command):
        for stream in (False, True):
            session = f"s{int(stream)}"
            url = f"{gateway}/sessions/{session}/v1/chat/completions"
            answer = requests.post(url, json={**REQUEST, "stream": stream}, timeout=60)
            assert answer.ok, answer.text
            deadline = time.monotonic() + 20
            traces: list[dict[str, Any]] = []
            while not traces and time.monotonic() < deadline:
                time.sleep(0.2)
                traces = requests.get(f"{gateway}/sessions/{session}/traces", timeout=10).json()
            [trace] = traces
            assert trace["prompt_token_ids"] == prompt
            assert trace["completion_token_ids"] == ids
            assert len(trace["logprobs"]) == len(ids)
