"""Clients and routers as they are on PyPI, in front of a real server."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import requests

from testbed.release import ROOT
from testbed.server import START_TIMEOUT_S, Server
from testbed.tiny_model import tiny_model_path
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


@contextlib.contextmanager
def process(name: str, command: list[str], ready_url: str) -> Iterator[None]:
    """Run a program until its URL answers, and end it afterwards."""
    log_path = ROOT / "build" / "logs" / f"{name}.log"
    with log_path.open("w") as log:
        running = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(requests.RequestException):
                if requests.get(ready_url, timeout=5).ok:
                    break
            assert running.poll() is None and time.monotonic() < deadline, log_path.read_text()
            time.sleep(0.3)
        yield
    finally:
        running.kill()
        running.wait()


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
    with process("gateway", command, f"{gateway}/health"):
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


@pytest.mark.full
@pytest.mark.clause("C9")
@pytest.mark.parametrize("server", ["default", "default_on"], indirect=True)
def test_sglang_router(server: Server) -> None:
    """Behind the router, the server's default is the only way to ask."""
    port = reserve_port()
    router = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--worker-urls", server.url]
    command += ["--prometheus-port", str(reserve_port())]
    prompt, ids = ids_of(server)
    with process("router", command, f"{router}/health"):
        url = f"{router}/v1/chat/completions"
        # The router knows the model by the path that the server was started with.
        body = {**REQUEST, "model": str(tiny_model_path())}
        deadline = time.monotonic() + 30
        while True:
            response = requests.post(url, json={**body, "return_token_ids": True}, timeout=60)
            # It is healthy before it has found its worker.
            if response.ok or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        assert response.ok, response.text
        answer = response.json()
        client = openai.OpenAI(base_url=f"{router}/v1", api_key="none")
        chunks = list(client.chat.completions.create(**body, stream=True))
    streamed = [i for c in chunks for i in (c.choices[0].model_extra or {}).get("token_ids", [])]
    if server.name == "default":
        assert "prompt_token_ids" not in answer and "token_ids" not in answer["choices"][0]
        assert streamed == []
        return
    assert answer["prompt_token_ids"] == prompt
    assert answer["choices"][0]["token_ids"] == ids
    assert chunks[0].model_extra and chunks[0].model_extra["prompt_token_ids"] == prompt
    assert streamed == ids
