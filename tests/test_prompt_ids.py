"""Chat requests that bring their prompt as token ids.

Turn k+1 of a rollout is then turn k's prompt, the ids that were sampled, and the ids of the
new messages. Rendering the messages again gives another prompt as soon as the model has
picked tokens that the tokenizer would not.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import requests

from testbed.checks import check_stream
from testbed.client import CHAT, COMPLETIONS, WEATHER_TOOL, chat, post, says, stream, tool_call
from testbed.pool import ServerPool
from testbed.release import SERIES, UPSTREAM
from testbed.server import STOCK_TAKES_INPUT_IDS, Server
from testbed.tiny_model import load_tokenizer

pytestmark = pytest.mark.skipif(
    "/openai-add-inference-v1-generate-" not in SERIES,
    reason=f"the series of {UPSTREAM} has no patch for it",
)
TOKENS = "/v1/chat/completions/tokens"
default = pytest.mark.parametrize("server", ["default"], indirect=True)
# Where the field is ours.
OWN_PATHS = [TOKENS] if STOCK_TAKES_INPUT_IDS else [CHAT, TOKENS]
MEDIA = ["image_url", "video_url", "audio_url"]
TURNS = 10


def render(messages: list[dict[str, Any]], **fields: Any) -> list[int]:
    fields = {"add_generation_prompt": True, "return_dict": False, **fields}
    ids: list[int] = load_tokenizer().apply_chat_template(messages, **fields)
    return ids


def field_of(path: str) -> str:
    return "tokens" if path == TOKENS else "input_ids"


def with_prompt(path: str, prompt: list[int], **fields: Any) -> dict[str, Any]:
    body = chat({"max_tokens": 12, "ignore_eos": True, **fields})
    return {**body, field_of(path): prompt}


def with_media(path: str, kind: str) -> dict[str, Any]:
    media = {"type": kind, kind: {"url": "http://127.0.0.1:1/a"}}
    parts = [{"type": "text", "text": "What is this?"}, media]
    user, system = {"role": "user", "content": parts}, {"role": "system", "content": "Be brief."}
    return {**with_prompt(path, [5, 6]), "messages": [system, user]}


@default
@pytest.mark.parametrize("path", [CHAT, TOKENS])
def test_prompt_is_taken_as_given(server: Server, path: str) -> None:
    """It is not what the messages say, and the answer is that of the same ids elsewhere."""
    prompt = load_tokenizer().encode("Something else,") + [7, 7, 9]
    answer = post(server, path, with_prompt(path, prompt))
    assert answer["prompt_token_ids"] == prompt
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    elsewhere = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 12}
    other = post(server, COMPLETIONS, {**elsewhere, "ignore_eos": True, "return_token_ids": True})
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
        ("text", ["valid list"]),
    ],
    ids=["empty", "negative", "outside of the vocabulary", "too long", "text"],
)
def test_bad_prompts_are_named(server: Server, path: str, prompt: Any, named: list[str]) -> None:
    check_refused(server, path, prompt, named)


@default
@pytest.mark.parametrize("path", OWN_PATHS)
@pytest.mark.parametrize(
    ("prompt", "position"), [([5, True], 1), ([5, 6, "7"], 2), ([3.0], 0)], ids=str
)
def test_ids_are_integers(server: Server, path: str, prompt: Any, position: int) -> None:
    check_refused(server, path, prompt, ["valid integer", f"{field_of(path)}', {position}"])


def check_refused(server: Server, path: str, prompt: Any, named: list[str]) -> None:
    response = requests.post(server.url + path, json=with_prompt(path, prompt), timeout=60)
    assert response.status_code == 400, response.text
    for part in named:
        assert part in response.text
    assert "Traceback" not in server.log_text()[-2000:]
    assert requests.get(server.url + "/health", timeout=60).ok


@default
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", [CHAT, TOKENS])
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"top_logprobs": 1_000_000}, ["top_logprobs is 1000000", "0 to 300"]),
        ({"top_logprobs": -1}, ["top_logprobs is -1", "0 to 300"]),
        ({"n": 1_000_000}, ["n is 1000000", "1 to 4096"]),
        ({"n": 0}, ["n is 0", "1 to 4096"]),
    ],
    ids=["logprobs over", "logprobs below", "choices over", "choices below"],
)
def test_what_the_engine_does_not_survive_is_named(
    server: Server, path: str, fields: dict[str, Any], named: list[str], streamed: bool
) -> None:
    body = with_prompt(path, [5, 6], logprobs=True, stream=streamed, **fields)
    response = requests.post(server.url + path, json=body, timeout=60)
    assert response.status_code == 400, response.text
    assert all(part in response.text for part in named), response.text
    assert post(server, path, with_prompt(path, [5, 6]))["choices"]


@pytest.mark.parametrize(
    ("n", "num_logprobs", "max_running_requests", "named"),
    [
        (1, 0, None, None),
        (4096, 300, None, None),
        (4097, None, None, "n is 4097, but has to be from 1 to 4096."),
        # They wait for each other.
        (4096, None, 1, None),
        (5000, None, 5000, None),
        (5001, None, 5000, "n is 5001, but has to be from 1 to 5000."),
        (0, None, None, "n is 0, "),
        (1, 301, None, "logprobs is 301, but has to be from 0 to 300, "),
        (1, -1, None, "logprobs is -1, "),
    ],
)
def test_bounds_of_counts(
    n: int, num_logprobs: int | None, max_running_requests: int | None, named: str | None
) -> None:
    from sglang.srt.entrypoints.openai.prompt_ids import check_counts

    manager: Any = SimpleNamespace(
        server_args=SimpleNamespace(max_running_requests=max_running_requests),
        model_config=SimpleNamespace(vocab_size=300),
    )
    error = check_counts(n, num_logprobs, "logprobs", manager)
    assert (error is None) if named is None else (named in (error or ""))


@default
@pytest.mark.parametrize("path", OWN_PATHS)
@pytest.mark.parametrize("kind", MEDIA)
def test_media_is_refused(server: Server, path: str, kind: str) -> None:
    """A processor would decode the ids and tokenize the text again."""
    body = with_media(path, kind)
    response = requests.post(server.url + path, json=body, timeout=60)
    assert response.status_code == 400, response.text
    assert kind in response.text and "only with text" in response.text
    # Parts of text are fine.
    body["messages"][1]["content"].pop()
    assert post(server, path, body)["prompt_token_ids"] == [5, 6]


@pytest.mark.skipif(not STOCK_TAKES_INPUT_IDS, reason="the field is ours")
@default
@pytest.mark.parametrize(
    "body",
    [
        with_prompt(CHAT, [5, True, "7", 3.0]),  # type: ignore[list-item]
        *(with_media(CHAT, kind) for kind in MEDIA),
    ],
    ids=["not integers", *MEDIA],
)
def test_what_stock_reads_stays(server: Server, servers: ServerPool, body: dict[str, Any]) -> None:
    plain = {**body, "return_token_ids": False}
    ours, stock = (
        requests.post(each.url + CHAT, json=plain, timeout=60)
        for each in (server, servers.get("stock"))
    )
    assert ours.status_code == stock.status_code
    if not stock.ok:
        # A model of text alone gets no media in later releases.
        assert ours.json() == stock.json()
        return
    expected = stock.json()["choices"]
    assert ours.json()["choices"] == expected
    asking = post(server, CHAT, body)
    assert asking["choices"][0]["message"] == expected[0]["message"]
    assert asking["prompt_token_ids"] == [int(i) for i in body["input_ids"]]


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
