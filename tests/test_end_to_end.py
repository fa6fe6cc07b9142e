"""The contract over HTTP: every clause, in every server mode that the CPU engine has.

`regex` forces what the random model says; the model still picks the tokens, so they are
rarely the canonical ones. What the engine itself sampled is read from `/generate`, which
no patch touches.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from testbed.checks import check_both, check_stream
from testbed.client import (
    CHAT,
    COMPLETIONS,
    WEATHER_TOOL,
    aborting,
    chat,
    completion,
    flush_cache,
    json_call,
    post,
    prompts_of,
    says,
    stream,
    text_of,
    tool_call,
)
from testbed.comparison import TRIES, ask
from testbed.release import NUMBER, UPSTREAM
from testbed.server import (
    ABORTED_STREAMS_FAIL,
    CUTS_INCREMENTAL_CHAT,
    CUTS_INCREMENTAL_COMPLETIONS,
    FAILS_ABORTED_STREAMS,
    GPU_MODES,
    IS_NATIVE,
    ON_GPU,
    STREAMING_MODES,
    THINK_IS_A_TOKEN,
    Server,
)
from testbed.tiny_model import CALL_WITH_TAGS, EOS, load_tokenizer

MODES = [*STREAMING_MODES, *GPU_MODES]


CASES: dict[str, dict[str, Any]] = {
    "free text": {"max_tokens": 24, "ignore_eos": True},
    "text to the end-of-sequence token": says("The quick brown fox."),
    "multi-byte": says("naïve 日本語 🙂🙃 ok"),
    "one token": {"max_tokens": 1, "ignore_eos": True},
    "stop string": says("one two STOP three", stop=["STOP"]),
    "stop string kept": says("one two STOP three", stop=["STOP"], no_stop_trim=True),
    "special tokens kept": says("hello", skip_special_tokens=False),
    "n=3": {"n": 3, "max_tokens": 9, "ignore_eos": True},
    "n=3, text": says("日本語 text", n=3),
    "log-probabilities": says("naïve 日本語 🙂", logprobs=True, top_logprobs=3),
    "log-probabilities only": {"max_tokens": 9, "ignore_eos": True, "logprobs": True},
}


def chooses_tool(tool_choice: Any) -> dict[str, Any]:
    """A request whose answer has to be a tool call, in the form of the endpoint's own."""
    if NUMBER < (0, 5, 15):
        call = json_call("Paris") if NUMBER < (0, 5, 12) else tool_call("Paris")
        return says(call, tool_choice=tool_choice)
    # Later releases write the call in their own way, or refuse a second grammar.
    return {"tool_choice": tool_choice, "max_tokens": 400}


TOOL_CASES: dict[str, dict[str, Any]] = {
    "tool call alone": says(tool_call("Paris")),
    "text and tool call": says("Let me see. " + tool_call("東京")),
    "two tool calls": says(tool_call("Paris") + "\n" + tool_call("東京")),
    "text after tool call": says(tool_call("Paris") + " done"),
    "tool call cut short": says(tool_call("Paris"), max_tokens=20),
    "no tool call": says("No need."),
    "tools not to be used": says(tool_call("Paris"), tool_choice="none"),
    "tool call required": chooses_tool("required"),
    "tool named": chooses_tool({"type": "function", "function": {"name": "get_weather"}}),
    "tool call with log-probabilities": says(
        "Let me see. " + tool_call("Paris"), logprobs=True, top_logprobs=2
    ),
}


def thinks(text: str, **fields: Any) -> dict[str, Any]:
    """A request whose answer is exactly `text`, for a server with a reasoning parser.

    Where reasoning is expected, the grammar does not hold until it has ended.
    """
    return says(text, chat_template_kwargs={"enable_thinking": False}, **fields)


def samples(*tokens: str, **fields: Any) -> dict[str, Any]:
    """A request whose answer is these few tokens, of a model whose tags are tokens."""
    ids = [load_tokenizer(qwen=True).convert_tokens_to_ids(t) for t in (*tokens, EOS)]
    # In this order, since a token that was sampled loses the bias.
    bias = {str(token_id): 100 - i for i, token_id in enumerate(ids)}
    penalties = {"presence_penalty": 2, "frequency_penalty": 2}
    return {"logit_bias": bias, "max_tokens": 20, **penalties, **fields}


def samples_ascii(num_tokens: int, **fields: Any) -> dict[str, Any]:
    """A request whose answer is that many random tokens, all of them ASCII.

    Of bytes that are no UTF-8, the detokenizer may send a character twice.
    """
    tokenizer = load_tokenizer()
    not_ascii = [i for i in range(len(tokenizer)) if not tokenizer.decode([i]).isascii()]
    bias = dict.fromkeys(map(str, not_ascii), -100)
    limits = {"max_tokens": num_tokens, "ignore_eos": True}
    return {"temperature": 1.0, "logit_bias": bias, **limits, **fields}


REASONING_CASES: dict[str, dict[str, Any]] = {
    "reasoning and answer": thinks("<think>日本 hm</think>yes"),
    "reasoning cut short": thinks("<think>" + "hm " * 20 + "</think>yes", max_tokens=20),
    "reasoning, tool call and log-probabilities": thinks(
        "<think>hm</think>" + tool_call("Paris"),
        tools=[WEATHER_TOOL],
        logprobs=True,
        top_logprobs=2,
    ),
    "reasoning at once": thinks("<think>hm</think>yes", stream_reasoning=False),
    "reasoning not separated": thinks("<think>hm</think>yes", separate_reasoning=False),
    "reasoning in free text": {"max_tokens": 60, "ignore_eos": True},
    "reasoning and answer, by bias": samples("name", "</think>", "The"),
    "reasoning and tool call, by bias": samples(
        "name",
        "</think>",
        CALL_WITH_TAGS,
        tools=[WEATHER_TOOL],
        logprobs=True,
        top_logprobs=2,
    ),
}


def unasked(make: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Make the same requests without the field."""

    def make_unasked(case: dict[str, Any]) -> dict[str, Any]:
        body = make(case)
        del body["return_token_ids"]
        return body

    return make_unasked


def sampled(server: Server, body: dict[str, Any], prompt_ids: list[int]) -> list[int]:
    """What the engine samples for a prompt, by the endpoint that is not patched."""
    renamed = {"max_tokens": "max_new_tokens"}
    known = ("regex", "max_tokens", "ignore_eos", "stop", "no_stop_trim", "temperature")
    params = {renamed.get(key, key): body[key] for key in known if key in body}
    answer = post(server, "/generate", {"input_ids": prompt_ids, "sampling_params": params})
    return answer["output_ids"]


@pytest.mark.clause("C1", "C2", "C3", "C4", "C5", "C6", "C7")
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS], ids=["chat", "completions"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("server", MODES, indirect=True)
def test_text(server: Server, name: str, path: str) -> None:
    case = CASES[name]
    make = chat if path == CHAT else completion
    whole, _ = check_both(server, path, make, case)
    body = make(case)
    for choice, prompt in zip(whole["choices"], prompts_of(whole), strict=True):
        assert choice["token_ids"] == sampled(server, body, prompt), "C1"
        if "stop" not in case and case.get("skip_special_tokens", True):
            decoded = load_tokenizer().decode(choice["token_ids"], skip_special_tokens=True)
            assert (text_of(choice) or "") == decoded


@pytest.mark.clause("C1", "C2", "C3", "C4", "C5", "C7")
@pytest.mark.parametrize("name", TOOL_CASES)
@pytest.mark.parametrize("server", MODES, indirect=True)
def test_tools(server: Server, name: str) -> None:
    if NUMBER >= (0, 5, 15) and name in ("tool call required", "tool named"):
        pytest.skip(f"{UPSTREAM} needs <tool_call> to be a special token of the tiny model")
    if CUTS_INCREMENTAL_CHAT and server.name.startswith("stream_output"):
        pytest.skip(f"stock {UPSTREAM} cuts the text of calls off in incremental chat")
    case = {"tools": [WEATHER_TOOL], **TOOL_CASES[name]}
    whole, chunks = check_both(server, CHAT, chat, case)
    choice = whole["choices"][0]
    if "regex" in case:
        decoded = load_tokenizer().decode(choice["token_ids"], skip_special_tokens=True)
        said = re.sub(r"\\(.)", r"\1", case["regex"], flags=re.DOTALL)
        assert decoded == said[: len(decoded)]
        assert (decoded == said) == (name != "tool call cut short")
    called = [c for chunk in chunks for c in chunk["choices"] if c["delta"].get("tool_calls")]
    expects_call = name not in ("no tool call", "tools not to be used", "tool call cut short")
    assert bool(called) >= expects_call
    assert bool(choice["message"].get("tool_calls")) == expects_call


@pytest.mark.clause("C2", "C3", "C4", "C5", "C7")
@pytest.mark.parametrize("name", REASONING_CASES)
@pytest.mark.parametrize("server", ["reasoning", "reasoning_interval"], indirect=True)
def test_reasoning(server: Server, name: str) -> None:
    case = REASONING_CASES[name]
    if THINK_IS_A_TOKEN and "regex" in case:
        pytest.skip(f"{UPSTREAM} needs </think> to be a token, which a regex cannot say")
    if not THINK_IS_A_TOKEN and "logit_bias" in case:
        pytest.skip(f"{UPSTREAM} needs no </think> among the tokens, and says it by regex")
    whole, _ = check_both(server, CHAT, chat, case)
    choice = whole["choices"][0]
    message = choice["message"]
    assert bool(message.get("reasoning_content")) == case.get("separate_reasoning", True)
    if "regex" in case and "cut short" not in name:
        decoded = load_tokenizer().decode(choice["token_ids"], skip_special_tokens=True)
        assert decoded == re.sub(r"\\(.)", r"\1", case["regex"], flags=re.DOTALL)
        assert bool(message.get("tool_calls")) == ("tools" in case)
        assert ("yes" in (message["content"] or "")) == ("tools" not in case)
    if "logit_bias" in case:
        assert message["reasoning_content"] == "name"
        assert bool(message.get("tool_calls")) == ("tools" in case)
        assert (message["content"] == "The") == ("tools" not in case)


@pytest.mark.clause("C3", "C4", "C5")
@pytest.mark.parametrize("server", ["many_calls_a_step"], indirect=True)
def test_text_and_tool_call_in_one_step(server: Server) -> None:
    """Of the several chunks that one step yields, one carries the ids."""
    call = (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
        "</function>\n</tool_call>"
    )
    case = says("Hi there. " + call, tools=[WEATHER_TOOL], logprobs=True)
    whole, chunks = check_both(server, CHAT, chat, case)
    assert whole["choices"][0]["message"].get("tool_calls")
    silent = [
        choice
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["delta"].get("tool_calls") and "token_ids" not in choice
    ]
    assert silent, "no step yielded more than one chunk: the case does not test C3"


@pytest.mark.clause("C2")
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS], ids=["chat", "completions"])
@pytest.mark.parametrize("server", ["default", "stream_output"], indirect=True)
def test_stop_token_id(server: Server, path: str) -> None:
    make = chat if path == CHAT else completion
    free = post(server, path, make(CASES["free text"]))["choices"][0]["token_ids"]
    stop = free[5]
    # ignore_eos would switch off stop token ids as well.
    case = {"max_tokens": 24, "stop_token_ids": [stop]}
    whole, _ = check_both(server, path, make, case)
    assert whole["choices"][0]["token_ids"] == free[: free.index(stop) + 1]
    assert whole["choices"][0]["finish_reason"] == "stop"


@pytest.mark.clause("C2", "C6")
@pytest.mark.parametrize("num", [1, 2], ids=["n=1", "n=2"])
@pytest.mark.parametrize("kind", ["text", "ids", "one list of ids"])
@pytest.mark.parametrize("server", ["default", "stream_output", "workers2"], indirect=True)
def test_lists_of_prompts(server: Server, kind: str, num: int) -> None:
    if (NUMBER, server.name, kind, num) == ((0, 5, 12), "workers2", "ids", 1):
        pytest.skip(f"{UPSTREAM} never answers lists of ids with several tokenizer workers")
    tokenizer = load_tokenizer()
    texts = ["Once upon", "日本語", "a"]
    ids = [tokenizer.encode(text) for text in texts]
    prompt: Any = {"text": texts, "ids": ids, "one list of ids": ids[1]}[kind]
    expected = [ids[1]] if kind == "one list of ids" else ids
    body = completion({"prompt": prompt, "n": num, "max_tokens": 5, "ignore_eos": True})
    whole = post(server, COMPLETIONS, body)
    chunks = stream(server, COMPLETIONS, body)
    streamed = check_stream(chunks, False, {})
    assert prompts_of(whole) == [prompt for prompt in expected for _ in range(num)]
    firsts = {
        choice["index"]: choice["prompt_token_ids"]
        for chunk in chunks
        for choice in chunk["choices"]
        if "prompt_token_ids" in choice
    }
    assert [firsts[i] for i in range(len(firsts))] == prompts_of(whole)
    assert [choice["token_ids"] for choice in whole["choices"]] == [
        streamed[i] for i in range(len(streamed))
    ]
    assert whole["usage"]["prompt_tokens"] == sum(map(len, expected))


@pytest.mark.clause("C2", "C6")
@pytest.mark.parametrize("server", ["default"], indirect=True)
def test_echo(server: Server) -> None:
    """The echoed text is not part of the completion's ids."""
    body = completion({"echo": True, "max_tokens": 6, "ignore_eos": True})
    whole = post(server, COMPLETIONS, body)
    choice = whole["choices"][0]
    assert choice["text"].startswith(body["prompt"])
    assert choice["prompt_token_ids"] == load_tokenizer().encode(body["prompt"])
    assert len(choice["token_ids"]) == 6
    assert check_stream(stream(server, COMPLETIONS, body), False, {})[0] == choice["token_ids"]


@pytest.mark.clause("C6")
@pytest.mark.parametrize("server", ["default"], indirect=True)
def test_chat_prompt(server: Server) -> None:
    """The prompt is what the chat template renders, with tools and without."""
    tokenizer = load_tokenizer()
    for tools in (None, [WEATHER_TOOL]):
        body = chat({"max_tokens": 2, "tools": tools})
        rendered = tokenizer.apply_chat_template(
            body["messages"], tools=tools, add_generation_prompt=True, return_dict=False
        )
        # The server fills in the fields of a tool that the request leaves out.
        prompt = post(server, CHAT, body)["prompt_token_ids"]
        if tools is None:
            assert prompt == rendered
        else:
            assert "get_weather" in tokenizer.decode(prompt)


@pytest.mark.clause("C6")
@pytest.mark.parametrize("server", ["default"], indirect=True)
def test_continue_final_message(server: Server) -> None:
    tokenizer = load_tokenizer()
    messages = [
        {"role": "user", "content": "Count."},
        {"role": "assistant", "content": "one two"},
    ]
    case = {"messages": messages, "continue_final_message": True, **CASES["free text"]}
    whole, _ = check_both(server, CHAT, chat, case)
    rendered = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=False
    )
    assert whole["prompt_token_ids"] == rendered + tokenizer.encode("one two")


@pytest.mark.clause("C6")
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS], ids=["chat", "completions"])
@pytest.mark.parametrize("server", ["auto_truncate_default_on_env"], indirect=True)
def test_truncated_prompt(server: Server, path: str) -> None:
    """A prompt that is too long comes back as the engine cut it."""
    tokenizer = load_tokenizer()
    text = "word " * 400
    make = chat if path == CHAT else completion
    fields = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {}
    case = {"max_tokens": 2, "ignore_eos": True, **fields}
    if path == COMPLETIONS:
        case["prompt"] = text
    whole, _ = check_both(server, path, make, case)
    prompt = prompts_of(whole)[0]
    full = tokenizer.encode(text)
    if path == CHAT:
        full = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
    assert len(prompt) < len(full)
    assert prompt == full[: len(prompt)]


def abort_mid_stream(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    chunks = []
    with (
        server.slowed_down(),
        requests.post(server.url + path, json=body, timeout=120, stream=True) as response,
    ):
        for line in response.iter_lines():
            if not line or line == b"data: [DONE]":
                continue
            chunks.append(json.loads(line.removeprefix(b"data: ")))
            if len(chunks) == 12:
                requests.post(
                    server.url + "/abort_request", json={"rid": chunks[-1]["id"]}, timeout=30
                )
    return chunks


@pytest.mark.clause("C2", "C7")
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS], ids=["chat", "completions"])
@pytest.mark.parametrize("server", ["default", "stream_output"], indirect=True)
@pytest.mark.skipif(FAILS_ABORTED_STREAMS, reason=ABORTED_STREAMS_FAIL)
def test_abort_mid_stream(server: Server, path: str) -> None:
    make = chat if path == CHAT else completion
    body = make({"max_tokens": 1500, "ignore_eos": True})
    chunks = abort_mid_stream(server, path, body)
    ids = check_stream(chunks, path == CHAT, {})[0]
    assert 5 <= len(ids) < 1500
    reasons = [c["finish_reason"] for chunk in chunks for c in chunk["choices"]]
    assert reasons[-1] == "abort"
    prompt = chunks[0].get("prompt_token_ids") or chunks[0]["choices"][0]["prompt_token_ids"]
    reference = {**body, "max_tokens": len(ids)}
    assert ids == sampled(server, reference, prompt)


@pytest.mark.clause("C2", "C7")
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS], ids=["chat", "completions"])
@pytest.mark.parametrize("server", ["default"], indirect=True)
def test_abort_whole(server: Server, path: str) -> None:
    """What was generated before an abort is reported whole."""
    make = chat if path == CHAT else completion
    rid = f"abort-whole-{time.time_ns()}"
    body = make({"max_tokens": 1500, "ignore_eos": True, "rid": rid})
    with aborting(server, rid, every_s=0.5):
        answer = post(server, path, body)
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "abort"
    assert len(choice["token_ids"]) == answer["usage"]["completion_tokens"] < 1500
    assert len(prompts_of(answer)[0]) == answer["usage"]["prompt_tokens"]


@pytest.mark.clause("C6", "C7")
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS], ids=["chat", "completions"])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("server", ["one_at_a_time"], indirect=True)
def test_abort_in_the_queue(server: Server, path: str, streamed: bool) -> None:
    """A request that is aborted before it ran has a prompt and an empty completion.

    From v0.5.23 on, the scheduler aborts it only once it runs.
    """
    if streamed and FAILS_ABORTED_STREAMS:
        pytest.skip(ABORTED_STREAMS_FAIL)
    make = chat if path == CHAT else completion
    rid = f"queued-{time.time_ns()}"
    fields = {"max_tokens": 1500, "ignore_eos": True}
    running = {**make(fields), "stream": True}
    ask = stream if streamed else post
    with (
        server.slowed_down(),
        requests.post(server.url + path, json=running, timeout=120, stream=True) as response,
        ThreadPoolExecutor(1) as pool,
    ):
        next(response.iter_lines())
        pending = pool.submit(ask, server, path, make({**fields, "rid": rid}))
        while not pending.done():
            time.sleep(0.2)
            requests.post(server.url + "/abort_request", json={"rid": rid}, timeout=30)
        answer = pending.result()
    if streamed:
        ids = check_stream(answer, path == CHAT, {})[0]
        reasons = [c["finish_reason"] for chunk in answer for c in chunk["choices"]]
        prompt = answer[0].get("prompt_token_ids") or answer[0]["choices"][0]["prompt_token_ids"]
        usage = answer[-1]["usage"]
    else:
        reasons = [answer["choices"][0]["finish_reason"]]
        ids = answer["choices"][0]["token_ids"]
        prompt, usage = prompts_of(answer)[0], answer["usage"]
    assert reasons[-1] == "abort"
    assert len(prompt) == usage["prompt_tokens"]
    assert len(ids) == usage["completion_tokens"] < 1500
    assert not ids or NUMBER >= (0, 5, 23)


@pytest.mark.clause("C2", "C7")
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS], ids=["chat", "completions"])
@pytest.mark.parametrize("server", ["retract"], indirect=True)
def test_retraction(server: Server, path: str) -> None:
    """Requests that the scheduler takes back and prefills again lose no id."""
    make = chat if path == CHAT else completion
    bodies = [make(samples_ascii(40, seed=i, logprobs=True)) for i in range(6)]
    retracted = re.compile(r"#retracted_reqs: [1-9]")
    before = len(retracted.findall(server.log_text()))
    with ThreadPoolExecutor(6) as pool:
        streams = list(pool.map(lambda body: stream(server, path, body), bodies))
    assert len(retracted.findall(server.log_text())) > before, "nothing was retracted"
    for chunks in streams:
        ids = check_stream(chunks, path == CHAT, {"logprobs": True})[0]
        shown = "".join(text_of(c) for chunk in chunks for c in chunk["choices"])
        assert len(ids) == 40
        assert shown == load_tokenizer().decode(ids, skip_special_tokens=True)


@pytest.mark.clause("C7")
@pytest.mark.parametrize("server", ["default", "stream_output"], indirect=True)
def test_client_hangs_up(server: Server) -> None:
    """A client that goes away leaves a server that answers the next one exactly."""
    body = chat({"max_tokens": 1500, "ignore_eos": True, "stream": True})
    with requests.post(server.url + CHAT, json=body, timeout=60, stream=True) as response:
        lines = response.iter_lines()
        for _ in range(8):
            next(lines)
    check_both(server, CHAT, chat, CASES["multi-byte"])


@pytest.mark.clause("C2", "C3", "C7")
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS], ids=["chat", "completions"])
@pytest.mark.parametrize("server", ["stream_output"], indirect=True)
def test_concurrent_incremental_streams(server: Server, path: str) -> None:
    """The HTTP side lags behind the engine, and must still miss no id."""
    make = chat if path == CHAT else completion
    # Fewer than 16: after so many outputs stock lets the streams send theirs.
    start = threading.Barrier(12)
    fields = samples_ascii(60)

    def one(number: int) -> tuple[list[dict[str, Any]], dict[int, list[int]]]:
        body = make({**fields, "seed": number})
        start.wait()
        chunks = stream(server, path, body)
        return chunks, check_stream(chunks, path == CHAT, {})

    cuts_text = CUTS_INCREMENTAL_CHAT if path == CHAT else CUTS_INCREMENTAL_COMPLETIONS
    merged = 0
    with server.lagging(), ThreadPoolExecutor(12) as pool:
        results = list(pool.map(one, range(12)))
    for chunks, ids in results:
        assert len(ids[0]) == 60
        if not cuts_text:
            shown = "".join(text_of(c) for chunk in chunks for c in chunk["choices"])
            assert shown == load_tokenizer().decode(ids[0], skip_special_tokens=True)
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        merged += sum(len(choice.get("token_ids", [])) > 1 for choice in choices)
    if ON_GPU and not merged:
        pytest.skip("The GPU was done before the HTTP side lagged behind.")
    assert merged, "no chunk brought several ids: nothing was tested"


@pytest.mark.clause("C9")
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS], ids=["chat", "completions"])
@pytest.mark.parametrize("server", ["default_on", "auto_truncate_default_on_env"], indirect=True)
def test_server_default(server: Server, path: str) -> None:
    make = chat if path == CHAT else completion
    check_both(server, path, unasked(make), CASES["multi-byte"])
    body = make({"return_token_ids": False, **CASES["multi-byte"]})
    for answer in (post(server, path, body), *stream(server, path, body)):
        assert "token_ids" not in json.dumps(answer)


@pytest.mark.clause("C9")
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS], ids=["chat", "completions"])
@pytest.mark.parametrize("server", ["default"], indirect=True)
def test_off_by_default(server: Server, path: str) -> None:
    make = chat if path == CHAT else completion
    for asked in (None, False):
        body = make({"return_token_ids": asked, **CASES["multi-byte"]})
        if asked is None:
            del body["return_token_ids"]
        for answer in (post(server, path, body), *stream(server, path, body)):
            assert "token_ids" not in json.dumps(answer)


NO_BOOLEANS: list[Any] = [[], {}, 1.5, "maybe"]
if not IS_NATIVE:
    NO_BOOLEANS += ["yes", 1, 0, "true"]


@pytest.mark.clause("C9", "C10")
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("server", ["default_on"], indirect=True)
def test_the_default_leaves_echo_with_logprobs(server: Server, streamed: bool) -> None:
    """Evaluation harnesses ask for it. Log-probabilities cannot line up with ids there."""
    case = {"max_tokens": 4, "echo": True, "logprobs": True, "top_logprobs": 1}
    body = {**unasked(completion)(case), "stream": streamed}

    def answer(**fields: Any) -> Any:
        flush_cache(server.url)
        return ask(server.url, COMPLETIONS, {**body, **fields})

    plain = answer(return_token_ids=False)
    assert plain[0] == 200 and "error" not in repr(plain) and "token_ids" not in repr(plain)
    # A stream is cut into chunks differently from time to time, and either may be.
    assert any(answer() == answer(return_token_ids=False) for _ in range(TRIES))
    asking = answer(return_token_ids=True)
    if IS_NATIVE:
        assert asking[0] == 200 and "token_ids" in repr(asking)
    else:
        assert asking[0] == 400


@pytest.mark.clause("C10")
@pytest.mark.parametrize("value", ["yes", 1, "true"], ids=repr)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS], ids=["chat", "completions"])
@pytest.mark.parametrize("server", ["default"], indirect=True)
@pytest.mark.skipif(not IS_NATIVE, reason=f"stock {UPSTREAM} does not read return_token_ids")
def test_the_reading_of_stock_stays(server: Server, path: str, value: Any) -> None:
    make = chat if path == CHAT else completion
    choice = post(server, path, make({"max_tokens": 2, "return_token_ids": value}))["choices"][0]
    assert len(choice["token_ids"]) == 2


@pytest.mark.clause("C10")
@pytest.mark.parametrize("value", NO_BOOLEANS, ids=repr)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS], ids=["chat", "completions"])
@pytest.mark.parametrize("server", ["default"], indirect=True)
def test_not_a_boolean(server: Server, path: str, value: Any) -> None:
    make = chat if path == CHAT else completion
    body = make({"max_tokens": 2, "return_token_ids": value})
    response = requests.post(server.url + path, json=body, timeout=60)
    assert 400 <= response.status_code < 500
    assert "return_token_ids" in response.json()["message"]
    post(server, path, make({"max_tokens": 2}))


@pytest.mark.clause("C10")
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("server", ["default"], indirect=True)
@pytest.mark.skipif(IS_NATIVE, reason=f"stock {UPSTREAM} serves it")
def test_echo_with_logprobs_is_refused(server: Server, streamed: bool) -> None:
    body = completion({"echo": True, "max_tokens": 2, "stream": streamed})
    response = requests.post(server.url + COMPLETIONS, json={**body, "logprobs": 1}, timeout=60)
    assert response.status_code == 400
    message = response.json()["message"]
    assert all(word in message for word in ("return_token_ids", "echo", "logprobs"))
    assert "\n" not in message
    post(server, COMPLETIONS, completion({"max_tokens": 2}))
