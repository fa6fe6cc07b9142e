"""The handlers of /v1/messages and /v1/responses over a scripted engine."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from testbed.agents import MESSAGES, events_of
from testbed.scripted import Plan, Serving


def http_request(body: dict[str, Any], **headers: str) -> Any:
    from starlette.requests import Request

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": raw}
    return Request(scope, receive)


@dataclasses.dataclass
class Agents:
    """The handlers of both endpoints over a scripted engine.

    Attributes:
        tool_server: What runs tools of responses, if the server does.
    """

    serving: Serving
    tool_server: Any = None

    def __post_init__(self) -> None:
        from sglang.srt.entrypoints.agent_token_ids import add_agent_token_ids
        from sglang.srt.entrypoints.anthropic.serving import AnthropicServing
        from sglang.srt.entrypoints.openai.serving_responses import OpenAIServingResponses
        from starlette.datastructures import State

        handlers = self.serving.handlers
        self.responses = OpenAIServingResponses(
            handlers.manager, handlers.templates, tool_server=self.tool_server
        )
        self.state = State()
        self.state.anthropic_serving = AnthropicServing(handlers.chat)
        self.state.openai_serving_responses = self.responses
        add_agent_token_ids(self.state, handlers.manager.server_args)

    def ask(self, path: str, body: dict[str, Any], plan: Plan) -> Any:
        """Return the answer, or the events of a stream."""
        self.serving.engine.start(plan)
        return self.serving.loop.run_until_complete(self._ask(path, body))

    async def _ask(self, path: str, body: dict[str, Any]) -> Any:
        from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesRequest
        from sglang.srt.entrypoints.openai.protocol import ResponsesRequest

        raw = http_request(body)
        if path == MESSAGES:
            asked = AnthropicMessagesRequest(**body)
            result = await self.state.anthropic_serving.handle_messages(asked, raw)
        else:
            asked = ResponsesRequest(**body)
            result = await self.state.openai_serving_responses.create_responses(asked, raw)
        chunks = getattr(result, "body_iterator", result)
        if hasattr(chunks, "__aiter__"):
            return events_of("".join([chunk async for chunk in chunks]))
        if isinstance(result, dict):
            return result
        return json.loads(getattr(result, "body", None) or result.model_dump_json())


def without_random(value: Any) -> Any:
    """An answer or events without what is drawn at random for each."""
    if isinstance(value, list):
        return [without_random(item) for item in value]
    if isinstance(value, dict):
        random = ("id", "call_id", "item_id", "created_at", "completed_at")
        return {k: "drawn" if k in random else without_random(v) for k, v in value.items()}
    return value
