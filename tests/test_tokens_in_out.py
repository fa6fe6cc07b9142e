"""POST /inference/v1/generate, whole and streamed, and a client that was written for vLLM's."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
import requests

from testbed import client
from testbed.client import CHAT, COMPLETIONS, GENERATE, PROMPT, generate, post
from testbed.release import SERIES, UPSTREAM
from testbed.server import Server
from testbed.tiny_model import load_tokenizer, tiny_model_path

pytestmark = pytest.mark.skipif(
    "/openai-add-inference-v1-generate-" not in SERIES,
    reason=f"the series of {UPSTREAM} has no patch for it",
)
modes = pytest.mark.parametrize("server", ["default", "stream_output"], indirect=True)
default = pytest.mark.parametrize("server", ["default"], indirect=True)


def ask_completions(server: Server, **fields: Any) -> dict[str, Any]:
    """The same by the endpoint of the contract."""
    body = {"model": "m", "prompt": PROMPT, "temperature": 0, "max_tokens": 16, "ignore_eos": True}
    return post(server, COMPLETIONS, {**body, "return_token_ids": True, **fields})


def stream(server: Server, body: dict[str, Any]) -> list[dict[str, Any]]:
    return client.stream(server, GENERATE, {"stream_options": None, **body})


def join(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The choices of a stream as a whole response has them."""
    joined: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            whole = joined.setdefault(choice["index"], {"token_ids": [], "logprobs": None})
            assert whole.get("finish_reason") is None, "nothing comes after the end"
            ids, logprobs = whole["token_ids"] + choice["token_ids"], whole["logprobs"]
            if choice["logprobs"]:
                assert len(choice["logprobs"]["content"]) == len(choice["token_ids"])
                before = logprobs["content"] if logprobs else []
                logprobs = {"content": before + choice["logprobs"]["content"]}
            whole |= {**choice, "token_ids": ids, "logprobs": logprobs}
    return joined


def numbers_apart(choice: dict[str, Any]) -> tuple[dict[str, Any], list[float]]:
    """A choice without its log-probabilities, and these: they depend a little on the batch."""
    numbers: list[float] = []

    def take_out(value: Any) -> Any:
        if isinstance(value, float):
            numbers.append(value)
            return None
        if isinstance(value, list):
            return [take_out(item) for item in value]
        if isinstance(value, dict):
            return {key: take_out(item) for key, item in value.items()}
        return value

    return take_out(choice), numbers


@modes
@pytest.mark.parametrize(
    "fields",
    [{}, {"logprobs": 0}, {"logprobs": 3}, {"n": 3}, {"n": 2, "logprobs": 1}, {"max_tokens": 1}],
    ids=str,
)
def test_ids_are_those_of_completions(server: Server, fields: dict[str, Any]) -> None:
    whole = post(server, GENERATE, generate(**fields))
    same = ask_completions(server, **fields)
    assert set(whole["usage"]) >= {"prompt_tokens", "completion_tokens", "total_tokens"}
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        if fields.get("n", 1) == 1:
            assert whole["usage"][key] == same["usage"][key]
    assert whole["usage"]["completion_tokens"] == sum(
        len(choice["token_ids"]) for choice in whole["choices"]
    )
    for choice, other in zip(whole["choices"], same["choices"], strict=True):
        assert choice["token_ids"] == other["token_ids"]
        assert choice["finish_reason"] == other["finish_reason"] == "length"
        assert choice["stop_reason"] is None
        if "logprobs" not in fields:
            assert choice["logprobs"] is None
            continue
        content = choice["logprobs"]["content"]
        assert [entry["logprob"] for entry in content] == pytest.approx(
            other["logprobs"]["token_logprobs"], abs=2e-3
        )
        for entry, token_id in zip(content, choice["token_ids"], strict=True):
            assert entry["token_id"] == token_id and entry["token"] == f"token_id:{token_id}"
            top = entry["top_logprobs"]
            assert len(top) == max(fields["logprobs"], 1)
            assert top[0] == {k: entry[k] for k in ("token_id", "token", "logprob")}
            # Greedy: the sampled one is the likeliest.
            values = [candidate["logprob"] for candidate in top]
            assert values == sorted(values, reverse=True)
            assert len({candidate["token_id"] for candidate in top}) == len(top)

    chunks = stream(server, generate(**fields))
    assert all(chunk["request_id"] == chunks[0]["request_id"] for chunk in chunks)
    streamed = join(chunks)
    assert sorted(streamed) == list(range(fields.get("n", 1)))
    for choice in whole["choices"]:
        expected, numbers = numbers_apart(choice)
        same_choice, same_numbers = numbers_apart(streamed[choice["index"]])
        assert same_choice == expected
        assert same_numbers == pytest.approx(numbers, abs=2e-3)


@modes
def test_prompt_ids_and_usage_on_request(server: Server) -> None:
    plain = post(server, GENERATE, generate())
    assert "prompt_token_ids" not in plain
    asking = {**generate(), "return_token_ids": True, "request_id": f"mine-{time.time_ns()}"}
    whole = post(server, GENERATE, asking)
    assert whole["prompt_token_ids"] == PROMPT
    assert whole["request_id"] == asking["request_id"]

    options = {"include_usage": True, "continuous_usage_stats": True}
    first, *others = stream(server, {**asking, "request_id": None, "stream_options": options})
    assert first["prompt_token_ids"] == PROMPT
    assert not any("prompt_token_ids" in chunk for chunk in others)
    assert others[-1]["choices"] == []
    assert others[-1]["usage"]["completion_tokens"] == 16
    seen = 0
    for chunk in [first, *others[:-1]]:
        seen += len(chunk["choices"][0]["token_ids"])
        assert chunk["usage"]["completion_tokens"] == seen


@default
def test_stops(server: Server) -> None:
    [plain] = post(server, GENERATE, generate(max_tokens=40))["choices"]
    ids = plain["token_ids"]
    assert load_tokenizer().eos_token_id not in ids
    stop_id = ids[5]
    end = ids.index(stop_id) + 1
    body = generate(max_tokens=40, ignore_eos=False, stop_token_ids=[stop_id])
    for choice in (post(server, GENERATE, body)["choices"][0], join(stream(server, body))[0]):
        assert choice["token_ids"] == ids[:end]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop_id)

    tokenizer = load_tokenizer()
    positions = [i for i in range(3, 30) if tokenizer.decode([ids[i]]).strip().isalnum()]
    word = tokenizer.decode([ids[positions[0]]])
    [choice] = post(server, GENERATE, generate(max_tokens=40, stop=[word]))["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", word)
    assert choice["token_ids"] == ids[: len(choice["token_ids"])]
    assert word in tokenizer.decode(choice["token_ids"])

    # The end-of-sequence token is no reason of its own.
    eos = tokenizer.eos_token_id
    body = generate(max_tokens=40, ignore_eos=False, logit_bias={str(eos): 100})
    [choice] = post(server, GENERATE, body)["choices"]
    assert choice["token_ids"][-1] == eos
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)


@default
def test_structured_outputs(server: Server) -> None:
    for structured, text in (({"regex": "ab{3}c"}, "abbbc"), ({"json": {"const": "x"}}, '"x"')):
        params = {"ignore_eos": False, "max_tokens": 60, "structured_outputs": structured}
        [choice] = post(server, GENERATE, generate(**params))["choices"]
        assert choice["finish_reason"] == "stop"
        assert load_tokenizer().decode(choice["token_ids"], skip_special_tokens=True) == text


@default
def test_without_max_tokens_the_context_is_the_limit(server: Server) -> None:
    body = generate([7] * 4000)
    del body["sampling_params"]["max_tokens"]
    [choice] = post(server, GENERATE, body)["choices"]
    assert choice["finish_reason"] == "length" and len(choice["token_ids"]) > 16


@default
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"token_ids": []}, ["no token ids"]),
        ({"token_ids": None}, ["token_ids"]),
        ({"token_ids": "text"}, ["token_ids"]),
        ({"token_ids": [5, -1]}, ["-1", "vocabulary"]),
        ({"token_ids": [5, 1_000_000]}, ["1000000", "position 1", "vocabulary"]),
        ({"token_ids": [5] * 5000}, ["5000", "4096"]),
        ({"sampling_params": {"best_of": 2, "max_tokens": 3}}, ["best_of", "stop_token_ids"]),
        ({"sampling_params": {"prompt_logprobs": 1}}, ["prompt_logprobs"]),
        (
            {"sampling_params": {"structured_outputs": {"grammar": "root ::= x"}}},
            ["structured_outputs", "regex and json", "grammar"],
        ),
        ({"sampling_params": {"temperature": -1}}, ["temperature", "-1"]),
        ({"sampling_params": {"top_p": 2}}, ["top_p", "2"]),
        ({"sampling_params": {"n": 0}}, ["n"]),
        (
            {"sampling_params": {"ignore_eos": True, "stop_token_ids": [5]}},
            ["ignore_eos", "stop_token_ids"],
        ),
        ({"features": {"mm_hashes": {}}}, ["features"]),
        ({"output_mode": "text"}, ["output_mode"]),
        ({"stream": "yes"}, ["stream"]),
        ({"token_ids": [5, True]}, ["token_ids', 1", "valid integer"]),
        ({"token_ids": [5, 6, "7"]}, ["token_ids', 2", "valid integer"]),
        ({"token_ids": [3.0]}, ["token_ids', 0", "valid integer"]),
        (
            {"sampling_params": {"stop_token_ids": [5, True]}},
            ["stop_token_ids', 1", "valid integer"],
        ),
        ({"sampling_params": {"logprobs": 1_000_000}}, ["logprobs is 1000000", "0 to 300"]),
        ({"sampling_params": {"logprobs": 301}}, ["logprobs is 301", "0 to 300"]),
        ({"sampling_params": {"logprobs": -1}}, ["logprobs is -1", "0 to 300"]),
        ({"sampling_params": {"n": 1_000_000}}, ["n is 1000000", "1 to 4096"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(
    server: Server, change: dict[str, Any], named: list[str], streamed: bool
) -> None:
    body = {**generate(), "stream": streamed, **change}
    response = requests.post(server.url + GENERATE, json=body, timeout=60)
    assert response.status_code == 400, response.text
    for part in named:
        assert part in response.text
    assert post(server, GENERATE, generate())["choices"]


@default
def test_the_first_of_many_bad_ids_is_named(server: Server) -> None:
    body = generate(["7"] * 100_000)  # type: ignore[list-item]
    response = requests.post(server.url + GENERATE, json=body, timeout=60)
    assert response.status_code == 400 and "token_ids', 0" in response.text
    assert len(response.text) < 1000


@default
def test_as_many_logprobs_as_the_vocabulary_has(server: Server) -> None:
    num_ids = len(load_tokenizer())
    [choice] = post(server, GENERATE, generate(logprobs=num_ids, max_tokens=2))["choices"]
    for entry in choice["logprobs"]["content"]:
        ids = [candidate["token_id"] for candidate in entry["top_logprobs"]]
        assert sorted(ids) == list(range(num_ids))


@pytest.mark.parametrize("server", ["auto_truncate_default_on_env"], indirect=True)
@pytest.mark.parametrize("path", [CHAT, GENERATE])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("length", [253, 300])
def test_prompt_and_usage_are_those_prefilled(
    server: Server, path: str, n: int, length: int
) -> None:
    """The engine cuts prompts to somewhat less than the length of the context, 256."""
    prompt = [5 + i % 200 for i in range(length)]
    params = {"max_new_tokens": 1, "ignore_eos": True}
    plain = post(server, "/generate", {"input_ids": prompt, "sampling_params": params})
    num_prefilled = plain["meta_info"]["prompt_tokens"]
    assert num_prefilled < 253
    if path == CHAT:
        message = {"role": "user", "content": ""}
        body: dict[str, Any] = {"messages": [message], "input_ids": prompt, "n": n}
        body |= {"model": "m", "max_tokens": 1, "ignore_eos": True}
    else:
        body = generate(prompt, max_tokens=1, n=n)
    body |= {"return_token_ids": True}
    whole = post(server, path, body)
    chunks = client.stream(server, path, {**body, "stream_options": {"include_usage": True}})
    for answer, usage in ((whole, whole["usage"]), (chunks[0], chunks[-1]["usage"])):
        assert answer["prompt_token_ids"] == prompt[:num_prefilled]
        assert usage["prompt_tokens"] == num_prefilled
        assert usage["total_tokens"] == num_prefilled + usage["completion_tokens"]
        # Nothing is left for the completion of the longer one.
        assert usage["completion_tokens"] == (n if length == 253 else 0)


@default
def test_parameters_that_are_null_are_not_asked_for(server: Server) -> None:
    """Clients send all that vLLM has."""
    body = generate(prompt_logprobs=None, bad_words=None, seed=None, stop=None)
    # What the train client of verifiers adds to a turn that extends another.
    body["sampling_params"]["routed_experts_prompt_start"] = 3
    body |= {"features": None, "kv_transfer_params": None, "cache_salt": None, "priority": None}
    expected = post(server, GENERATE, generate())["choices"]
    assert post(server, GENERATE, body)["choices"] == expected


@default
def test_abort_by_request_id(server: Server) -> None:
    request_id = f"abort-{time.time_ns()}"
    body = {**generate(max_tokens=3000), "request_id": request_id}
    done = threading.Event()

    def abort() -> None:
        while not done.wait(0.1):
            requests.post(server.url + "/abort_request", json={"rid": request_id}, timeout=30)

    thread = threading.Thread(target=abort)
    thread.start()
    with server.slowed_down():
        [choice] = join(stream(server, body)).values()
    done.set()
    thread.join()
    assert choice["finish_reason"] == "abort"
    assert len(choice["token_ids"]) < 3000


@default
def test_renderers_client(server: Server) -> None:
    """`renderers` 0.1.12, unmodified: a rollout of turns with a tool."""
    import openai
    from renderers.base import create_renderer
    from renderers.client import generate as generate_by_client
    from renderers.configs import DefaultRendererConfig

    tokenizer = load_tokenizer()
    renderer = create_renderer(tokenizer, DefaultRendererConfig())
    seen: list[dict[str, Any]] = []

    async def rollout() -> None:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
            messages: list[Any] = [{"role": "user", "content": "Weather in Paris?"}]
            prompt_ids = None
            for turn in range(3):
                answer = await generate_by_client(
                    client=client,
                    renderer=renderer,
                    messages=messages,
                    model=str(tiny_model_path()),
                    prompt_ids=prompt_ids,
                    sampling_params={"temperature": 0, "max_tokens": 12, "min_tokens": 12},
                )
                seen.append(answer)
                new = renderer.render(
                    [{"role": "tool", "content": f"{turn}"}], add_generation_prompt=True
                )
                prompt_ids = answer["prompt_ids"] + answer["completion_ids"] + new.token_ids

    asyncio.run(rollout())
    assert len(seen) == 3
    for answer in seen:
        params = {"max_tokens": 12, "min_tokens": 12, "ignore_eos": False, "logprobs": 1}
        [same] = post(server, GENERATE, generate(answer["prompt_ids"], **params))["choices"]
        assert answer["completion_ids"] == same["token_ids"]
        expected = [entry["logprob"] for entry in same["logprobs"]["content"]]
        assert answer["completion_logprobs"] == pytest.approx(expected, abs=2e-3)
        assert answer["finish_reason"] == same["finish_reason"] == "length"
    for before, after in zip(seen, seen[1:]):
        start = before["prompt_ids"] + before["completion_ids"]
        assert after["prompt_ids"][: len(start)] == start
