"""Chat requests that bring their prompt as token ids.

Turn k+1 of a rollout is then turn k's prompt, the ids that were sampled, and the ids of the
new messages. Rendering the messages again gives another prompt as soon as the model has
picked tokens that the tokenizer would not.
"""

from __future__ import annotations

from typing import Any

import pytest
import requests

from tests.engine.release import UPSTREAM
from tests.engine.server import Server
from tests.engine.tiny_model import load_tokenizer
from tests.test_end_to_end import (
    CHAT,
    COMPLETIONS,
    WEATHER_TOOL,
    chat,
    check_stream,
    post,
    says,
    stream,
    tool_call,
)

pytestmark = pytest.mark.skipif(
    UPSTREAM != "v0.5.9", reason=f"the series of {UPSTREAM} has no patch for it"
)
TOKENS = "/v1/chat/completions/tokens"
default = pytest.mark.parametrize("server", ["default"], indirect=True)
TURNS = 10


def render(messages: list[dict[str, Any]], **fields: Any) -> list[int]:
    fields = {"add_generation_prompt": True, "return_dict": False, **fields}
    ids: list[int] = load_tokenizer().apply_chat_template(messages, **fields)
    return ids


def with_prompt(path: str, prompt: list[int], **fields: Any) -> dict[str, Any]:
    body = chat({"max_tokens": 12, "ignore_eos": True, **fields})
    return {**body, "tokens" if path == TOKENS else "input_ids": prompt}


@default
@pytest.mark.parametrize("path", [CHAT, TOKENS])
def test_prompt_is_taken_as_given(server: Server, path: str) -> None:
    """It is not what the messages say, and the answer is that of the same ids elsewhere."""
    prompt = load_tokenizer().encode("Something else,") + [7, 7, 9]
    answer = post(server, path, with_prompt(path, prompt))
    assert answer["prompt_token_ids"] == prompt
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    elsewhere = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 12}
    other = post(
        server, COMPLETIONS, {**elsewhere, "ignore_eos": True, "return_token_ids": True}
    )
    assert answer["choices"][0]["token_ids"] == other["choices"][0]["token_ids"]

    chunks = stream(server, path, with_prompt(path, prompt))
    assert chunks[0]["prompt_token_ids"] == prompt
    ids = check_stream(chunks, True, {})[0]
    assert ids == answer["choices"][0]["token_ids"]


@default
def test_rendered_prompt_gives_the_same_answer(server: Server) -> None:
    body = chat({"max_tokens": 12, "ignore_eos": True, "stop": ["zz"], "n": 2})
    prompt = render(body["messages"])
    plain, given = post(server, CHAT, body), post(server, CHAT, {**body, "input_ids": prompt})
    assert plain["prompt_token_ids"] == given["prompt_token_ids"] == prompt
    for one, other in zip(plain["choices"], given["choices"], strict=True):
        assert one == other


@default
def test_tools_are_parsed(server: Server) -> None:
    fields = says(tool_call("Paris"), tools=[WEATHER_TOOL])
    answer = post(server, CHAT, with_prompt(CHAT, [5, 6, 7], **fields, ignore_eos=False))
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"


@default
@pytest.mark.parametrize("path", [CHAT, TOKENS])
@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ([], ["no token ids"]),
        ([5, -1], ["-1", "position 1"]),
        ([5, 6, 1_000_000], ["1000000", "position 2", "300"]),
        ([5] * 5000, ["5000", "4096"]),
        ("text", []),
    ],
    ids=["empty", "negative", "outside of the vocabulary", "too long", "text"],
)
def test_bad_prompts_are_named(server: Server, path: str, prompt: Any, named: list[str]) -> None:
    response = requests.post(server.url + path, json=with_prompt(path, prompt), timeout=60)
    assert response.status_code == 400, response.text
    if prompt == "text":
        named = ["tokens" if path == TOKENS else "input_ids"]
    for part in named:
        assert part in response.text
    assert "Traceback" not in server.log_text()[-2000:]
    assert requests.get(server.url + "/health", timeout=60).ok


@default
def test_turns_extend_each_other(server: Server) -> None:
    """Ten turns with a tool: what a turn prefilled and sampled starts the next one's prompt.

    The same messages without ids do not. Both counts are shown by -s.
    """
    tokenizer = load_tokenizer()
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Weather in Paris?"}]
    prompt = render(messages, tools=[WEATHER_TOOL])
    seen: list[int] = []
    by_ids = by_messages = 0
    for turn in range(TURNS):
        fields = says(f"Turn {turn}: 日本語. " + tool_call("Paris"), tools=[WEATHER_TOOL])
        body = {**chat(fields), "messages": messages}
        answer = post(server, CHAT, {**body, "input_ids": prompt})
        rendered = post(server, CHAT, {**body, "max_tokens": 1})["prompt_token_ids"]
        by_ids += answer["prompt_token_ids"][: len(seen)] == seen
        by_messages += rendered[: len(seen)] == seen

        [choice] = answer["choices"]
        assert choice["finish_reason"] == "tool_calls"
        seen = answer["prompt_token_ids"] + choice["token_ids"]
        result = {"role": "tool", "content": f"{turn} degrees"}
        messages += [{"role": "assistant", **choice["message"]}, result]
        # The template ends a message with a line break, which is not sampled.
        prompt = seen + tokenizer.encode("\n") + render([result])
    print(f"\nprompts of {TURNS} turns that extend the one before: {by_ids} by ids, ", end="")
    print(f"{by_messages} by messages")
    assert by_ids == TURNS
    assert by_messages < TURNS
