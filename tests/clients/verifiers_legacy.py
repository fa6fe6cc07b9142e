"""Turns with a tool by the clients of `verifiers` 0.3.1, the newest that reads ids of chat.

    python verifiers_legacy.py URL TOKENIZER CALL [tokens]

With `tokens`, the prompt of a turn is the ids of the one before and those of what follows, which
it has rendered by `/tokenize`. All answers are the tool call with the token ids CALL but the last,
which is cut short. Prints the tokens of each turn.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from verifiers.legacy.clients.openai_chat_completions_client import OpenAIChatCompletionsClient
from verifiers.legacy.clients.openai_chat_completions_token_client import (
    OpenAIChatCompletionsTokenClient,
)
from verifiers.legacy.types import ClientConfig, Tool, ToolMessage, UserMessage

TURNS = 3
TOOL = Tool(
    name="get_weather",
    description="The weather.",
    parameters={"type": "object", "properties": {"city": {"type": "string"}}},
)


async def main() -> None:
    url, _, call, *by_tokens = sys.argv[1:]
    # In this order, since a token that was sampled loses the bias.
    bias = {token_id: 100 - i for i, token_id in enumerate(call.split(","))}
    forced = {"logit_bias": bias, "presence_penalty": 2, "frequency_penalty": 2}
    kind = OpenAIChatCompletionsTokenClient if by_tokens else OpenAIChatCompletionsClient
    client = kind(ClientConfig(api_base_url=f"{url}/v1"))
    state: Any = {"model": "m", "trajectory": []}
    messages: list[Any] = [UserMessage(content="Weather?")]
    turns = []
    for number in range(TURNS):
        cut_short: dict[str, Any] = {"max_tokens": 8, "extra_body": {"min_tokens": 8}}
        params = {**forced, "max_tokens": 20} if number < TURNS - 1 else cut_short
        # As its environments ask.
        extra_body = {"return_token_ids": True, **params.pop("extra_body", {})}
        sampling = {"temperature": 0, "logprobs": True, "extra_body": extra_body, **params}
        response = await client.get_response(messages, "m", sampling, [TOOL], state=state)
        tokens = response.message.tokens and response.message.tokens.model_dump()
        state["trajectory"].append(
            {
                "prompt": list(messages),
                "completion": [response.message],
                "tokens": tokens,
                "response": response,
            }
        )
        turns.append(
            {
                "tokens": tokens,
                "finish_reason": response.message.finish_reason,
                "is_truncated": response.message.is_truncated,
                "tool_calls": len(response.message.tool_calls or []),
            }
        )
        messages.append(response.message)
        for made in response.message.tool_calls or []:
            messages.append(ToolMessage(tool_call_id=made.id, content=f"{20 + number} degrees"))
    await client.close()
    print(json.dumps({"turns": turns}))


asyncio.run(main())
