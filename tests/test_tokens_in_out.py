"""POST /inference/v1/generate, whole and streamed, and a client that was written for vLLM's."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import requests

from testbed import client
from testbed.client import CHAT, COMPLETIONS, GENERATE, PROMPT, generate, post
from testbed.release import NUMBER, SERIES, UPSTREAM
from testbed.server import ON_GPU, Server
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
    # What is cached of the prompt can decide between tokens that are nearly alike.
    client.flush_cache(server.url)
    whole = post(server, GENERATE, generate(**fields))
    client.flush_cache(server.url)
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
            assert top[0] == {k: entry[k] for k in ("token_id", "token", "logprob", "rank")}
            ranks = [candidate["rank"] for candidate in top]
            assert ranks == list(range(1, len(top) + 1)) if fields["logprobs"] else [None]
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
def test_stop_token_ids_hold_beside_ignore_eos(server: Server) -> None:
    """For those who ask this endpoint. In SGLang itself `ignore_eos` ignores both."""
    eos = load_tokenizer().eos_token_id
    # It samples the end of sequence now and then, and goes on.
    params: dict[str, Any] = {"max_tokens": 40, "temperature": 1, "logit_bias": {str(eos): 4}}
    [stop_id, *others] = [5 + i for i in range(120)]
    params |= {"stop_token_ids": [stop_id, *others]}
    num_with_eos = 0
    for _ in range(10):
        body = generate(ignore_eos=True, **params)
        for choice in (post(server, GENERATE, body)["choices"][0], join(stream(server, body))[0]):
            *before, last = choice["token_ids"]
            num_with_eos += eos in before
            assert not set(before) & set(params["stop_token_ids"])
            if choice["finish_reason"] == "stop":
                assert last in params["stop_token_ids"] and choice["stop_reason"] == last
            else:
                assert (choice["finish_reason"], len(before)) == ("length", 39)
    assert num_with_eos

    stock = {"max_new_tokens": 40, "temperature": 0, "ignore_eos": True}
    plain = post(server, "/generate", {"input_ids": PROMPT, "sampling_params": stock})
    stock["stop_token_ids"] = [plain["output_ids"][3]]
    same = post(server, "/generate", {"input_ids": PROMPT, "sampling_params": stock})
    assert same["output_ids"] == plain["output_ids"]


def engine_logprobs(server: Server, prompt: list[int], num_top: int) -> list[Any]:
    """For each position of a prompt, its own and the most likely, as the engine has them."""
    client.flush_cache(server.url)
    body = {"input_ids": prompt, "return_logprob": True, "logprob_start_len": 0}
    body |= {"top_logprobs_num": num_top, "sampling_params": {"max_new_tokens": 1}}
    meta_info = post(server, "/generate", body)["meta_info"]
    client.flush_cache(server.url)
    tops = meta_info["input_top_logprobs"] if num_top else [[]] * len(prompt)
    return list(zip(meta_info["input_token_logprobs"], tops, strict=True))


@modes
@pytest.mark.parametrize("num_top", [0, 1, 4, -1])
def test_prompt_logprobs_are_those_of_the_engine(server: Server, num_top: int) -> None:
    tokenizer = load_tokenizer()
    num_ids = len(tokenizer)
    prompt = [5 + 7 * i % 250 for i in range(60)]
    expected = engine_logprobs(server, prompt, num_ids if num_top == -1 else num_top)
    assert expected[0][0][0] is None

    body = generate(prompt, prompt_logprobs=num_top, max_tokens=1)
    # The first chunk of a stream has what a whole response has, and no other has it.
    whole = post(server, GENERATE, body)
    assert whole["choices"][0]["logprobs"] is None
    client.flush_cache(server.url)
    body["sampling_params"]["max_tokens"] = 3
    first, *others = stream(server, body)
    assert others and not any("prompt_logprobs" in chunk for chunk in others)
    for answer in (whole, first):
        rows = answer["prompt_logprobs"]
        assert len(rows) == len(prompt) and rows[0] is None
        for token_id, row, ((logprob, own_id, _), top) in zip(
            prompt[1:], rows[1:], expected[1:], strict=True
        ):
            # prime-rl takes the first for the token's own.
            assert list(row)[0] == str(token_id) == str(own_id)
            assert list(row.values())[0]["logprob"] == logprob
            others_of_row = [(int(key), value["logprob"]) for key, value in row.items()][1:]
            assert others_of_row == [(i, value) for value, i, _ in top if i != own_id]
            ranks = {i: rank for rank, (_, i, _) in enumerate(top, 1)}
            for key, value in row.items():
                assert value["rank"] == ranks.get(int(key))
                assert value["decoded_token"] == tokenizer.decode([int(key)])


@default
def test_prompt_logprobs_beside_others(server: Server) -> None:
    """Each has as many as are asked for it, and nothing depends on what is cached."""
    assert post(server, GENERATE, generate())["prompt_logprobs"] is None
    prompt = [5 + 7 * i % 250 for i in range(60)]
    post(server, GENERATE, generate(prompt))
    for num_prompt, num_output in ((1, 3), (3, 1), (2, 0), (2, None)):
        body = generate(prompt, prompt_logprobs=num_prompt, logprobs=num_output, n=2)
        whole = post(server, GENERATE, body)
        rows = whole["prompt_logprobs"]
        assert len(rows) == len(prompt)
        assert all(num_prompt <= len(row) <= num_prompt + 1 for row in rows[1:])
        for choice in whole["choices"]:
            if num_output is None:
                assert choice["logprobs"] is None
                continue
            for entry in choice["logprobs"]["content"]:
                assert len(entry["top_logprobs"]) == max(num_output, 1)

    without_text = generate(prompt, prompt_logprobs=1, detokenize=False)
    for row in post(server, GENERATE, without_text)["prompt_logprobs"][1:]:
        assert {value["decoded_token"] for value in row.values()} == {None}
    one = post(server, GENERATE, generate([7], prompt_logprobs=2))
    assert one["prompt_logprobs"] == [None]


@default
def test_prefill_logprobs_as_prime_rl_asks(server: Server) -> None:
    """Its `prefill_logprobs`: one for each token, and 0 for the first."""
    prompt = [5 + 7 * i % 250 for i in range(60)]
    expected = [own[0] or 0.0 for own, _ in engine_logprobs(server, prompt, 1)]
    params = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "prompt_logprobs": 1}
    body = {"model": "m", "token_ids": prompt, "sampling_params": params}
    rows = post(server, GENERATE, body)["prompt_logprobs"]
    flat = [next(iter(row.values()))["logprob"] if row else 0.0 for row in rows]
    assert flat == expected


@default
def test_models_say_the_length_of_the_context(server: Server) -> None:
    """Stock says it; prime-rl bounds its rollouts by it."""
    [card] = requests.get(server.url + "/v1/models", timeout=60).json()["data"]
    assert card["max_model_len"] == 4096


@default
def test_top_logprobs_are_not_cut(server: Server) -> None:
    """The sampled token first, then as many as are asked for, itself not repeated."""
    body = generate(temperature=1, logprobs=2, max_tokens=100)
    [choice] = post(server, GENERATE, body)["choices"]
    lengths = set()
    for entry in choice["logprobs"]["content"]:
        first, *others = entry["top_logprobs"]
        assert first["token_id"] == entry["token_id"] and first["rank"] == entry["rank"]
        assert entry["token_id"] not in {other["token_id"] for other in others}
        ranks = [other["rank"] for other in others]
        assert ranks == [rank for rank in (1, 2) if rank != first["rank"]]
        lengths.add(len(others))
    assert lengths >= {2}


@modes
@pytest.mark.parametrize("fields", [{}, {"n": 2, "temperature": 1}], ids=str)
def test_text_beside_ids(server: Server, fields: dict[str, Any]) -> None:
    tokenizer = load_tokenizer()
    body = {**generate(logprobs=2, max_tokens=24, **fields), "output_mode": "text"}
    # Half a character is no text of its own.
    ascii_ids = [i for i in range(len(tokenizer)) if tokenizer.decode([i]).isascii()]
    body["sampling_params"]["allowed_token_ids"] = ascii_ids
    whole = post(server, GENERATE, body)
    chunks = stream(server, body)
    assert {answer["output_mode"] for answer in (whole, *chunks)} == {"text"}
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    streamed = join(chunks)
    assert len(chunks) > 3 and len(streamed) == len(whole["choices"])
    for choice in whole["choices"]:
        same = streamed[choice["index"]]
        if not fields:
            assert same["token_ids"] == choice["token_ids"]
        for ids, text in (
            (choice["token_ids"], choice["text"]),
            (same["token_ids"], texts[choice["index"]]),
        ):
            assert text == tokenizer.decode(ids, skip_special_tokens=True) and text
        for content, ids in (
            (choice["logprobs"]["content"], choice["token_ids"]),
            (same["logprobs"]["content"], same["token_ids"]),
        ):
            for entry, token_id in zip(content, ids, strict=True):
                assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
                assert entry["token"] == tokenizer.decode([token_id])
                assert bytes(entry["bytes"]).decode() == entry["token"]
                assert entry["top_logprobs"][0] == {
                    key: entry[key] for key in ("token", "logprob", "bytes")
                }
                assert len(entry["top_logprobs"]) in (2, 3)
    plain = post(server, GENERATE, {**body, "output_mode": "tokens"})
    assert plain["output_mode"] == "tokens" and "text" not in plain["choices"][0]


@default
def test_text_without_the_stop_string(server: Server) -> None:
    text = "one STOP two"
    params: dict[str, Any] = {"structured_outputs": {"regex": text}, "max_tokens": 60}
    params |= {"ignore_eos": False, "stop": ["STOP"]}
    body = {**generate(**params), "output_mode": "text"}
    [choice] = post(server, GENERATE, body)["choices"]
    assert choice["text"] == "one " and choice["stop_reason"] == "STOP"
    assert load_tokenizer().decode(choice["token_ids"]).startswith("one STOP")
    body["sampling_params"]["include_stop_str_in_output"] = True
    assert post(server, GENERATE, body)["choices"][0]["text"] == "one STOP"


@pytest.mark.parametrize("server", ["default", "stream_interval"], indirect=True)
def test_stream_interval_of_a_request(server: Server) -> None:
    """It does not go below the server's, which is 4 in one of them."""
    of_server = 4 if server.name == "stream_interval" else 1
    expected = post(server, GENERATE, generate(max_tokens=40))["choices"][0]["token_ids"]
    for asked in (None, 1, 10):
        chunks = stream(server, generate(max_tokens=40, stream_interval=asked))
        lengths = [len(chunk["choices"][0]["token_ids"]) for chunk in chunks]
        ids = [i for chunk in chunks for i in chunk["choices"][0]["token_ids"]]
        assert ids == expected
        interval = max(asked or 1, of_server)
        # The first comes at once, and what queued up comes together.
        assert lengths[0] == 1 or interval == 1
        assert all(length >= interval for length in lengths[1:-1])


@pytest.mark.skipif(
    NUMBER >= (0, 5, 23) and not ON_GPU,
    reason=f"a server of {UPSTREAM} that decodes alone pins memory, which takes a GPU",
)
@pytest.mark.parametrize("server", ["disaggregated"], indirect=True)
def test_kv_transfer_params(server: Server) -> None:
    """SGLang's own, since vLLM's are what its connectors make of them."""
    # The address that stock has for transfers that are fakes.
    params = {"bootstrap_host": "2.2.2.2", "bootstrap_port": 8998, "bootstrap_room": 7}
    body = {**generate(), "kv_transfer_params": params}
    whole = post(server, GENERATE, body)
    assert whole["kv_transfer_params"] == params
    streamed = join(stream(server, body))
    for choice in (*whole["choices"], *streamed.values()):
        assert len(choice["token_ids"]) == 16
    several = {**generate(n=2), "kv_transfer_params": params}
    refused = requests.post(server.url + GENERATE, json=several, timeout=60)
    assert refused.status_code == 400 and "n is 2" in refused.text
    for lacking in (None, {**params, "bootstrap_host": None}, {**params, "bootstrap_room": None}):
        body = {**generate(), "kv_transfer_params": lacking}
        refused = requests.post(server.url + GENERATE, json=body, timeout=60)
        assert refused.status_code == 400
        assert "bootstrap_host and bootstrap_room" in refused.text


@pytest.mark.parametrize("server", ["trainer_dp"], indirect=True)
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_data_parallel_rank(server: Server, streamed: bool) -> None:
    def ask(rank: Any) -> requests.Response:
        body = {**generate(max_tokens=2), "stream": streamed}
        headers = {"X-data-parallel-rank": str(rank)}
        return requests.post(server.url + GENERATE, json=body, headers=headers, timeout=60)

    def count_prefills() -> list[int]:
        lines = [line for line in server.log_text().splitlines() if "Prefill batch" in line]
        return [sum(f"DP{rank}" in line for line in lines) for rank in range(2)]

    for rank in (0, 1, 1, 0):
        expected = count_prefills()
        expected[rank] += 1
        assert ask(rank).ok
        deadline = time.monotonic() + 10
        while count_prefills() != expected:
            assert time.monotonic() < deadline, (count_prefills(), expected)
            time.sleep(0.1)
    for bad in (2, -1, "one", "1.0"):
        response = ask(bad)
        assert response.status_code == 400, response.text
        assert f"X-data-parallel-rank is {bad}, but has to be from 0 to 1" in response.text
    assert post(server, GENERATE, generate())["choices"]


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
        ({"sampling_params": {"prompt_logprobs": 301}}, ["prompt_logprobs is 301", "0 to 300"]),
        ({"sampling_params": {"prompt_logprobs": -2}}, ["prompt_logprobs is -2", "0 to 300"]),
        ({"sampling_params": {"stream_interval": 0}}, ["stream_interval"]),
        ({"kv_transfer_params": {"bootstrap_room": 1}}, ["--disaggregation-mode"]),
        (
            {"kv_transfer_params": {"do_remote_decode": True}},
            ["bootstrap_host", "not do_remote_decode"],
        ),
        (
            {"sampling_params": {"structured_outputs": {"grammar": "root ::= x"}}},
            ["structured_outputs", "regex and json", "grammar"],
        ),
        ({"sampling_params": {"temperature": -1}}, ["temperature", "-1"]),
        ({"sampling_params": {"top_p": 2}}, ["top_p", "2"]),
        ({"sampling_params": {"n": 0}}, ["n"]),
        ({"features": {"mm_hashes": {}}}, ["features"]),
        ({"output_mode": "derender"}, ["output_mode", "'text'"]),
        ({"output_mode": "text", "sampling_params": {"detokenize": False}}, ["detokenize"]),
        ({"sampling_params": {"output_kind": 3}}, ["output_kind"]),
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
        ({"sampling_params": {"logprobs": -2}}, ["logprobs is -2", "0 to 300"]),
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
    whole = post(server, GENERATE, generate(logprobs=num_ids, max_tokens=2))
    [choice] = whole["choices"]
    assert post(server, GENERATE, generate(logprobs=-1, max_tokens=2))["choices"] == [choice]
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
    # The last output, which SkyRL's client asks for.
    body["sampling_params"]["output_kind"] = 2
    body |= {"features": None, "kv_transfer_params": None, "cache_salt": None, "priority": None}
    expected = post(server, GENERATE, generate())["choices"]
    assert post(server, GENERATE, body)["choices"] == expected


@default
def test_deltas_need_a_stream(server: Server) -> None:
    """A whole answer would be the last of them."""
    body = generate(output_kind=1)
    refused = requests.post(server.url + GENERATE, json=body, timeout=60)
    assert refused.status_code == 400 and "output_kind" in refused.text
    [choice] = join(stream(server, body)).values()
    assert choice["token_ids"] == post(server, GENERATE, generate())["choices"][0]["token_ids"]


@default
def test_salts_keep_what_is_cached_apart(server: Server) -> None:
    """prime-rl salts the cache by the version of the policy."""
    name = "cache_salt" if NUMBER >= (0, 5, 23) else "extra_key"
    prompt = PROMPT * 10

    def num_cached(salt: str | None) -> int:
        body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 1}, name: salt}
        return int(post(server, "/generate", body)["meta_info"]["cached_tokens"])

    client.flush_cache(server.url)
    post(server, GENERATE, {**generate(prompt), "cache_salt": "one"})
    assert [num_cached(salt) for salt in ("two", None, "one")] == [0, 0, len(prompt) - 1]


@default
def test_abort_by_request_id(server: Server) -> None:
    request_id = f"abort-{time.time_ns()}"
    body = {**generate(max_tokens=3000), "request_id": request_id}
    with client.aborting(server, request_id, every_s=0.1):
        [choice] = join(stream(server, body)).values()
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
