"""A rollout of turns with a tool through the gateway of `agentcore-rl-toolkit` 0.2.0.

    python agentcore_gateway.py URL TOKENIZER CALL

An agent with the OpenAI SDK talks to the gateway, which renders the prompts and samples
from /inference/v1/generate with VllmHttpBackend. Every answer counts as a call of the
tool, since the backend passes nothing on that would make a random model sample CALL.
Prints the training rows.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from typing import Any

import openai
from agentcore_rl_toolkit.rollout_gateway import (
    HfTemplateRenderer,
    RolloutGateway,
    ThreadedGatewayServer,
)
from agentcore_rl_toolkit.rollout_gateway.sampling_backends.vllm_http import VllmHttpBackend
from transformers import AutoTokenizer

TURNS = 3
TOOL: Any = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}


def parse_call(text: str, tools: Any) -> tuple[str, list[dict[str, Any]], bool]:
    return "", [{"name": "get_weather", "input": {"city": text}}], False


def run_agent(base_url: str) -> list[str]:
    client = openai.OpenAI(base_url=base_url, api_key="session")
    messages: list[Any] = [{"role": "user", "content": "Weather?"}]
    finish_reasons = []
    for number in range(TURNS):
        answer = client.chat.completions.create(
            model="m", messages=messages, tools=[TOOL], temperature=0, max_tokens=8
        )
        finish_reasons.append(answer.choices[0].finish_reason)
        message = answer.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls or []:
            result = {"tool_call_id": call.id, "content": f"{20 + number} degrees"}
            messages.append({"role": "tool", **result})
    return finish_reasons


def main() -> None:
    url, tokenizer, _ = sys.argv[1:]
    tokens = AutoTokenizer.from_pretrained(tokenizer)
    gateway = RolloutGateway(
        backend=VllmHttpBackend(url),
        renderer=HfTemplateRenderer(tokens, tool_parser=parse_call),
        adapters=["openai"],
        history_mode="linear",
    )
    server = ThreadedGatewayServer(gateway, host="127.0.0.1")
    server.start()
    gateway.create_session("session")
    finish_reasons = run_agent(server.base_url)
    rows = asyncio.run(gateway.finish_session("session"))
    server.shutdown()
    rows = [dataclasses.asdict(dataclasses.replace(row, status=None)) for row in rows]
    print(json.dumps({"finish_reasons": finish_reasons, "rows": rows}))


main()
