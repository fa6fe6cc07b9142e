"""A rollout of turns with a tool through `verifiers` 0.4.0, as its trainers run it.

    python verifiers_train.py URL TOKENIZER CALL

An agent with the OpenAI SDK talks to the interception server, whose train client renders
the prompts and calls /inference/v1/generate. All answers are the tool call with the
token ids CALL but the last, which is cut short. Prints the trace.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from typing import Any

import openai
from renderers.configs import Qwen3RendererConfig
from verifiers.v1.clients.client import ModelContext
from verifiers.v1.configs.client import TrainClientConfig
from verifiers.v1.interception.server import InterceptionServer
from verifiers.v1.session import RolloutSession
from verifiers.v1.trace import AgentInfo, Trace, TraceTask
from verifiers.v1.types import SamplingConfig

TURNS = 4
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


async def run_agent(session: RolloutSession, base_url: str, secret: str, forced: Any) -> None:
    async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key=secret) as client:
        messages: list[Any] = [{"role": "user", "content": "Weather?"}]
        for number in range(TURNS):
            cut_short = {"max_tokens": 8, "min_tokens": 8}
            params = {**forced, "max_tokens": 20} if number < TURNS - 1 else cut_short
            sampling = SamplingConfig(temperature=0, **params)
            session.ctx = dataclasses.replace(session.ctx, sampling=sampling)
            answer = await client.chat.completions.create(
                model="m", messages=messages, tools=[TOOL]
            )
            message = answer.choices[0].message
            messages.append(message.model_dump(exclude_none=True))
            for call in message.tool_calls or []:
                result = {"tool_call_id": call.id, "content": f"{20 + number} degrees"}
                messages.append({"role": "tool", **result})


async def main() -> None:
    url, tokenizer, call = sys.argv[1:]
    # In this order, since a token that was sampled loses the bias.
    bias = {token_id: 100 - i for i, token_id in enumerate(call.split(","))}
    forced = {"logit_bias": bias, "presence_penalty": 2, "frequency_penalty": 2}
    config = TrainClientConfig(
        base_url=f"{url}/v1",
        renderer=Qwen3RendererConfig(enable_thinking=False),
        renderer_model_name=tokenizer,
    )
    trace: Any = Trace[Any, Any, Any](
        task=TraceTask[Any](type="Weather", data=None), agent=AgentInfo[Any](config=None)
    )
    session = RolloutSession(ModelContext("m", config, SamplingConfig()), trace)
    async with InterceptionServer() as server, server.acquire(session) as slot:
        base_url, secret, _ = slot
        await run_agent(session, base_url, secret, forced)
    [branch] = trace.branches
    print(
        json.dumps(
            {
                "ids": branch.token_ids,
                "is_sampled": branch.sampled_mask,
                "logprobs": branch.logprobs,
                "finish_reasons": [call.finish_reason for call in trace.calls],
                "roles": [node.message.role for node in trace.nodes],
                "tool_calls": sum(len(m.tool_calls or []) for m in trace.assistant_messages),
                "is_truncated": trace.is_truncated,
            }
        )
    )


asyncio.run(main())
