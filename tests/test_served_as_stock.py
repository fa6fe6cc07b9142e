"""What cannot have ids, and what fails, is answered as stock answers it.

The engine is played by a script behind the real serving layer of a server that returns
ids by default.
"""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator, Iterator
from http import HTTPStatus
from typing import Any

import pytest

from testbed.scripted import PROMPT_IDS, Plan, Serving, Step, Stream, serve, without_ids
from testbed.server import INCREMENTAL

STOP = {"type": "stop", "matched": None}
FAILED = {
    "type": "abort",
    "message": "The scheduler gave up.",
    "status_code": HTTPStatus.SERVICE_UNAVAILABLE,
    "err_type": "ServiceUnavailable",
}


@pytest.fixture(scope="module", params=[[], [INCREMENTAL]], ids=["cumulative", "incremental"])
def serving(request: pytest.FixtureRequest) -> Iterator[Serving]:
    with serve("--return-token-ids", *request.param) as serving:
        yield serving


def plan(*texts: str, finish: dict[str, Any] = STOP, num_prompt_ids: int = 3) -> Plan:
    steps = [Step([2 * i, 2 * i + 1], text) for i, text in enumerate(texts)]
    # Each step is an output of its own.
    schedule = [(0, 12)] * len(steps)
    return Plan([steps], [finish], schedule, (0, 0), num_prompt_ids)


def make(endpoint: str, fields: dict[str, Any]) -> Any:
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest

    if endpoint == "completions":
        if fields.pop("top_logprobs", None):
            fields["logprobs"] = 2
        return CompletionRequest(model="m", prompt=PROMPT_IDS, **fields)
    messages = [{"role": "user", "content": "hi"}]
    return ChatCompletionRequest(model="m", messages=messages, **fields)


def answer(serving: Serving, request: Any, script: Plan) -> Any:
    """What the client gets, without what differs from request to request."""
    if not request.stream:
        return without_ids(serving.ask(request, script)[0])
    return masked(serving.stream(request, script))


def masked(stream: Stream) -> Any:
    events = [without_ids(x) if isinstance(x, dict) else x for x in stream.events]
    return events, stream.error


@pytest.mark.clause("C9", "C11")
@pytest.mark.parametrize("logprobs", [False, True], ids=["plain", "logprobs"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_lengthened_prompt(serving: Serving, endpoint: str, stream: bool, logprobs: bool) -> None:
    """Its ids are not known: by default it is served as stock, and refused if it asks."""
    fields: dict[str, Any] = {"stream": stream}
    if logprobs:
        fields |= {"logprobs": True, "top_logprobs": 2}
    script = plan("one", " two", " three", num_prompt_ids=20)
    unasked = answer(serving, make(endpoint, {**fields}), script)
    assert unasked == answer(serving, make(endpoint, {**fields, "return_token_ids": False}), script)
    assert "one" in json.dumps(unasked) and ("token_logprobs" in repr(unasked)) == (
        logprobs and endpoint == "completions"
    )

    asking = make(endpoint, {**fields, "return_token_ids": True})
    if stream:
        text = repr(masked(serving.stream(asking, script)))
    else:
        text = repr(serving.ask(asking, script))
    assert "return_token_ids is not supported" in text and "to 20 tokens" in text


@pytest.mark.clause("C10", "C11")
@pytest.mark.parametrize("texts", [("one", ""), ("one", "", ""), ("one", " two")], ids=repr)
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_what_the_scheduler_gives_up(
    serving: Serving, endpoint: str, texts: tuple[str, ...]
) -> None:
    check_same_errors(serving, endpoint, plan(*texts, finish=FAILED))


@pytest.mark.clause("C10", "C11")
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_an_error_in_mid_stream(
    serving: Serving, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is reported once, though there are ids that no chunk has brought."""
    manager = serving.handlers.manager
    generate = manager.generate_request

    async def fail(*args: Any) -> AsyncIterator[Any]:
        async for output in generate(*args):
            yield output
            if output["meta_info"]["completion_tokens"] >= 6:
                raise ValueError("Request is disconnected from the client side.")

    monkeypatch.setattr(manager, "generate_request", fail)
    errors = check_same_errors(serving, endpoint, plan("one", " two", "", " never"))
    assert len(errors) == 1


def check_same_errors(serving: Serving, endpoint: str, script: Plan) -> list[Any]:
    asked = {"stream": True, "return_token_ids": True}
    answer = masked(serving.stream(make(endpoint, {**asked}), script))
    of_stock = masked(serving.stream(make(endpoint, {**asked, "return_token_ids": False}), script))
    assert answer == of_stock
    return [event for event in answer[0] if "error" in event]


@pytest.mark.clause("C12")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_nothing_is_left_to_the_garbage_collector(
    serving: Serving, endpoint: str, stream: bool
) -> None:
    """A full collection of a server's heap takes up to seconds in which nothing is served."""
    from sglang.srt.entrypoints.openai.token_ids import TokenIdRecorder

    request = make(endpoint, {"stream": stream, "return_token_ids": True})

    def recorders() -> set[int]:
        return {id(x) for x in gc.get_objects() if isinstance(x, TokenIdRecorder)}

    gc.collect()
    gc.disable()
    before = recorders()
    try:
        assert "token_ids" in repr(serving.ask(request, plan("one", " two", " three")))
        # Generators that were given up are closed by the loop.
        serving.loop.run_until_complete(asyncio.sleep(0.01))
        left = recorders() - before
    finally:
        gc.enable()
    assert not left
