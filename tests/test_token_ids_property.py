"""Random engine outputs through the real serving layer.

Only the scheduler and the detokenizer are played by a script, drawn by hypothesis: how
text is cut into steps, how many ids a step has, in which order choices advance and
finish, and how many steps come between two wake-ups of the HTTP side. The tokenizer
manager, the chat and completion handlers, their parsers and the recorder are real.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testbed.dialects import TOOL
from testbed.plans import plans
from testbed.scripted import (
    PROMPT_IDS,
    Plan,
    Serving,
    logprobs_of,
    marks_in,
    num_ids_behind,
    serve,
    without_ids,
)
from testbed.server import CUTS_INCREMENTAL_COMPLETIONS, INCREMENTAL

QWEN = ["--tool-call-parser=qwen", "--reasoning-parser=qwen3", "--enable-cache-report"]
# Its parsers start inside of the reasoning, and put out text and a call at once.
PYTHONIC = ["--tool-call-parser=pythonic", "--reasoning-parser=deepseek-r1"]
FLAGS = {"cumulative": QWEN, "incremental": [*QWEN, INCREMENTAL], "pythonic": PYTHONIC}


@pytest.fixture(scope="module", params=FLAGS)
def serving(request: pytest.FixtureRequest) -> Iterator[Serving]:
    """The serving layer, with outputs that hold all ids or the new ones only."""
    with serve(*FLAGS[request.param]) as serving:
        yield serving


def chat_request(plan: Plan, **fields: Any) -> Any:
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    fields.pop("echo", None)
    if "tools" not in fields:
        fields.pop("tool_choice", None)
    return ChatCompletionRequest(
        model="m",
        messages=[{"role": "user", "content": "hi"}],
        n=len(plan.choices),
        **fields,
    )


def completion_request(plan: Plan, **fields: Any) -> Any:
    from sglang.srt.entrypoints.openai.protocol import CompletionRequest

    fields.pop("tools", None)
    fields.pop("tool_choice", None)
    fields.pop("separate_reasoning", None)
    if fields.get("logprobs"):
        # Refused together.
        fields.pop("echo", None)
    if fields.pop("top_logprobs", None) is not None:
        fields["logprobs"] = 2
    else:
        fields.pop("logprobs", None)
    return CompletionRequest(model="m", prompt=PROMPT_IDS, n=len(plan.choices), **fields)


def check_stream(
    plan: Plan, chunks: list[dict[str, Any]], is_chat: bool, with_logprobs: bool
) -> None:
    sent: dict[int, list[int]] = {i: [] for i in range(len(plan.choices))}
    started: set[int] = set()
    for position, chunk in enumerate(chunks):
        assert ("prompt_token_ids" in chunk) == (is_chat and position == 0)
        for choice in chunk["choices"]:
            index = choice["index"]
            if not is_chat:
                assert ("prompt_token_ids" in choice) == (index not in started)
            started.add(index)
            ids = choice.get("token_ids", [])
            assert "token_ids" not in choice or ids, "C2: an empty list was sent"
            sent[index] += ids

            if with_logprobs:
                expected = [(-float(i), [-float(i), -float(i) - 0.5]) for i in ids]
                assert logprobs_of(choice) == expected, "C5"
            else:
                assert choice["logprobs"] is None

            for mark in marks_in(choice):
                assert len(sent[index]) >= num_ids_behind(plan, index, mark), "C4"
    for index, ids in sent.items():
        assert ids == plan.ids(index), "C2, C3"


fields = st.fixed_dictionaries(
    {},
    optional={
        "tools": st.just([TOOL]),
        "tool_choice": st.just("required"),
        "logprobs": st.just(True),
        "separate_reasoning": st.just(False),
        "echo": st.just(True),
        "stream_options": st.just({"include_usage": True, "continuous_usage_stats": True}),
    },
)


@pytest.mark.clause("C2", "C3", "C4", "C5", "C7")
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@settings(
    max_examples=600,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_streamed_ids_are_whole_once_in_time_and_aligned(
    serving: Serving, endpoint: str, data: st.DataObject
) -> None:
    is_chat = endpoint == "chat"
    plan = data.draw(plans(with_tags=is_chat))
    asked = data.draw(fields)
    if asked.get("logprobs"):
        asked["top_logprobs"] = 2
    make = chat_request if is_chat else completion_request

    chunks = serving.ask(make(plan, stream=True, return_token_ids=True, **asked), plan)
    check_stream(plan, chunks, is_chat, bool(asked.get("logprobs")))

    whole = serving.ask(make(plan, return_token_ids=True, **asked), plan)[0]
    for index, choice in enumerate(whole["choices"]):
        assert choice["token_ids"] == plan.ids(index), "C2"
        if asked.get("logprobs"):
            assert [value for value, _ in logprobs_of(choice)] == [
                -float(i) for i in plan.ids(index)
            ], "C5"
    assert whole["usage"]["completion_tokens"] == sum(
        len(plan.ids(i)) for i in range(len(plan.choices))
    )

    # No chunk that stock would not send: the same script without ids gives the same.
    # With several choices, the order in which asyncio wakes them up is not repeatable.
    if len(plan.choices) > 1:
        return
    if CUTS_INCREMENTAL_COMPLETIONS and serving.is_incremental and not is_chat:
        return
    for key in ("logprobs", "top_logprobs"):
        asked.pop(key, None)
    plain = serving.ask(make(plan, stream=True, **asked), plan)
    asking = serving.ask(make(plan, stream=True, return_token_ids=True, **asked), plan)
    assert [without_ids(chunk) for chunk in asking] == [without_ids(c) for c in plain]
