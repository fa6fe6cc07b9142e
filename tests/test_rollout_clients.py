"""Rollouts by the clients of trainers, unmodified: what they train on is what the server said.

With TEST_VLLM=1 they run against vLLM as well, and nothing may differ but the ids.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.client import CHAT, GENERATE, flush_cache, post
from testbed.pool import ServerPool
from testbed.recorder import Exchange, RecordingProxy
from testbed.release import UPSTREAM
from testbed.server import STOCK_TRACKS_VERSIONS
from testbed.tiny_model import CALL, load_tokenizer, make_adapter, tiny_model_path
from testbed.vllm import vllm_server
from tests.clients.environments import name_tokens_by_id, run_client

pytestmark = pytest.mark.full
VLLM_FLAGS = ["--enable-scale-out", "--enable-auto-tool-choice", "--tool-call-parser=hermes"]
needs_vllm = pytest.mark.skipif(
    os.environ.get("TEST_VLLM") != "1", reason="vLLM is not asked for: see make test-vllm"
)
# Script, environment, endpoint.
TRAIN = ("verifiers_train.py", "new", GENERATE)
GATEWAY = ("agentcore_gateway.py", "new", GENERATE)
LEGACY = ("verifiers_legacy.py", "old", CHAT)
LIST_IN_METADATA = f"stock {UPSTREAM} has a list in metadata, which the models of openai refuse"


@pytest.fixture(scope="module")
def vllm_url() -> Iterator[str]:
    with vllm_server(*VLLM_FLAGS, qwen=True) as url:
        yield url


@pytest.fixture
def sglang_url(servers: ServerPool) -> str:
    return servers.get("qwen").url


def call_ids() -> str:
    """The ids of a tool call, separated by commas."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path(qwen=True))
    pieces = ["<tool_call>", CALL, "</tool_call>", "<|im_end|>"]
    return ",".join(str(tokenizer.convert_tokens_to_ids(piece)) for piece in pieces)


def rollout(
    client: tuple[str, str, str], url: str, amend: Any = None
) -> tuple[Any, list[Exchange]]:
    """What the client made of the answers, and what it asked and got."""
    script, environment, endpoint = client
    with RecordingProxy(url, amend) as proxy:
        result = run_client(environment, script, proxy.url, tiny_model_path(qwen=True), call_ids())
    exchanges = [exchange for exchange in proxy.exchanges if exchange.path == endpoint]
    assert len(exchanges) == len(proxy.exchanges) >= 3
    return result, exchanges


def logprobs_of(choice: dict[str, Any]) -> list[float]:
    return [entry["logprob"] for entry in choice["logprobs"]["content"]]


def check_train(result: Any, exchanges: list[Exchange]) -> None:
    prompts = [exchange.request["token_ids"] for exchange in exchanges]
    choices = [exchange.answer["choices"][0] for exchange in exchanges]
    for prompt, choice, following in zip(prompts, choices, prompts[1:]):
        start = prompt + choice["token_ids"]
        assert following[: len(start)] == start
    ids = prompts[-1] + choices[-1]["token_ids"]
    assert result["ids"] == ids
    is_sampled, logprobs = [False] * len(ids), [0.0] * len(ids)
    for prompt, choice in zip(prompts, choices):
        end = len(prompt) + len(choice["token_ids"])
        is_sampled[len(prompt) : end] = [True] * len(choice["token_ids"])
        logprobs[len(prompt) : end] = logprobs_of(choice)
    assert result["is_sampled"] == is_sampled
    # renderers rounds them to single precision.
    assert result["logprobs"] == pytest.approx(logprobs, abs=1e-4)
    assert result["tool_calls"] == len(exchanges) - 1
    assert [choice["finish_reason"] for choice in choices] == ["stop", "stop", "stop", "length"]
    assert result["is_truncated"] and result["finish_reasons"][-1] == "length"


def check_gateway(result: Any, exchanges: list[Exchange]) -> None:
    [row] = result["rows"]
    prompts = [exchange.request["token_ids"] for exchange in exchanges]
    choices = [exchange.answer["choices"][0] for exchange in exchanges]
    ids = prompts[-1] + choices[-1]["token_ids"]
    assert row["token_ids"] == ids
    # Masks and log-probabilities begin behind the first prompt.
    skipped = len(prompts[0])
    trained = [
        (i, logprob)
        for i, is_trained, logprob in zip(ids[skipped:], row["loss_mask"], row["logprobs"])
        if is_trained
    ]
    expected = [
        pair
        for choice in choices
        for pair in zip(choice["token_ids"], logprobs_of(choice), strict=True)
    ]
    assert trained == expected and len(expected) == 8 * len(exchanges)


def check_legacy(result: Any, exchanges: list[Exchange]) -> None:
    assert len(result["turns"]) == len(exchanges)
    for turn, exchange in zip(result["turns"], exchanges):
        [choice] = exchange.answer["choices"]
        tokens = turn["tokens"]
        assert tokens["prompt_ids"] == exchange.answer["prompt_token_ids"]
        assert tokens["completion_ids"] == choice["token_ids"]
        assert tokens["completion_logprobs"] == logprobs_of(choice)
        assert turn["finish_reason"] == choice["finish_reason"]
        assert turn["is_truncated"] == (choice["finish_reason"] == "length")
    assert [turn["tool_calls"] for turn in result["turns"]] == [1, 1, 0]
    assert result["turns"][-1]["is_truncated"]


CHECKS = {TRAIN: check_train, GATEWAY: check_gateway, LEGACY: check_legacy}
clients = pytest.mark.parametrize("client", CHECKS, ids=lambda client: client[0])


@pytest.mark.clause("C1", "C2", "C5", "C6")
@clients
def test_rollout(client: tuple[str, str, str], sglang_url: str) -> None:
    if client == LEGACY and STOCK_TRACKS_VERSIONS:
        pytest.skip(LIST_IN_METADATA)
    CHECKS[client](*rollout(client, sglang_url))


@pytest.mark.clause("C1", "C2", "C5")
@pytest.mark.skipif(STOCK_TRACKS_VERSIONS, reason=LIST_IN_METADATA)
def test_rollout_by_tokens(sglang_url: str) -> None:
    """`verifiers` 0.3.1 renders what follows a turn by `/tokenize`, and sends ids."""
    script, environment, _ = LEGACY
    with RecordingProxy(sglang_url) as proxy:
        arguments = (tiny_model_path(qwen=True), call_ids(), "tokens")
        result = run_client(environment, script, proxy.url, *arguments)
    paths = [exchange.path for exchange in proxy.exchanges]
    rendered = ["/tokenize", "/tokenize"]
    assert paths == [CHAT, *[*rendered, f"{CHAT}/tokens"] * 2]
    turns = [turn["tokens"] for turn in result["turns"]]
    for turn, following in zip(turns, turns[1:]):
        start = turn["prompt_ids"] + turn["completion_ids"]
        assert following["prompt_ids"][: len(start)] == start


@pytest.mark.clause("C1", "C2", "C5")
def test_every_method_of_skyrl(servers: ServerPool, tmp_path: Path) -> None:
    server = servers.get("trainer_lora")
    make_adapter(tmp_path / "adapter")
    argument = json.dumps({"adapter": str(tmp_path / "adapter"), "server": server.url})
    with RecordingProxy(server.url) as proxy:
        result = run_client("skyrl", "skyrl_client.py", proxy.url, tiny_model_path(), argument)
    tokenizer = load_tokenizer()
    texts = ["Once upon a time", "日本語"]
    ids = [tokenizer.encode(text) for text in texts]

    assert result["get_world_size"] == [1, 1]
    assert result["tokenize"] == ids and result["detokenize"] == tokenizer.batch_decode(ids)
    assert result["finish_session"] is None
    rendered = result["render"]
    [answer] = [x.answer for x in proxy.exchanges if x.path == CHAT]
    assert result["chat"] == answer and answer["choices"][0]["finish_reason"] == "length"
    flush_cache(server.url)
    [choice] = post(server, GENERATE, rendered)["choices"]
    text = tokenizer.decode(choice["token_ids"], skip_special_tokens=True)
    assert text == answer["choices"][0]["message"]["content"]
    assert len(result["completion"]["choices"][0]["text"]) > 0

    first = result["generate"]
    answers = [x.answer for x in proxy.exchanges if x.path == GENERATE]
    said = [a["choices"][0]["token_ids"] for a in answers if "choices" in a]
    for ids in first["response_ids"]:
        assert len(ids) == 8 and ids in said
    assert first["responses"] == tokenizer.batch_decode(first["response_ids"])
    assert [len(x) for x in first["response_logprobs"]] == [8, 8]
    assert first["stop_reasons"] == ["length", "length"]
    for again in ("generated", "of a clone"):
        assert result[again]["response_ids"] == first["response_ids"]

    sampled = result["sample"]
    [choice] = next(a["choices"] for a in answers if a.get("prompt_logprobs"))
    [sequence] = sampled["sequences"]
    assert sequence["tokens"] == choice["token_ids"] and len(sequence["logprobs"]) == 4
    assert sequence["stop_reason"] == "length"
    tops = sampled["topk_prompt_logprobs"]
    assert [top and len(top) for top in tops] == [None, *[2] * (len(tops) - 1)]
    assert None not in sampled["prompt_logprobs"][1:]

    # Paused by keep they wait, and else they are told to come again.
    assert result["waits"] and result["pause_generation"] == {"status": "paused"}
    assert result["resume_generation"] == {"status": "resumed"}
    for mode in ("abort", "wait"):
        assert result[f"pause {mode}"] == {"status": "paused"}
        assert result[f"generate in {mode}"]["status"] == 503
        assert result[f"resume {mode}"] == {"status": "resumed"}
    assert result["reset_prefix_cache"] == {"success": True}
    # The server has no memory saver, and its log says so: the client takes vLLM's errors.
    assert result["sleep"]["status"] == 400
    assert result["sleep 0"] == {"status": "sleeping", "level": 0}
    assert result["wake_up"] == {"status": "awake", "tags": ["weights", "kv_cache"]}

    for name in ("load", "load again"):
        assert result[name] == "Success: LoRA adapter 'own' added successfully."
    assert result["adapted"]["response_ids"] != first["response_ids"]
    assert result["unload"] == "Success: LoRA adapter 'own' removed successfully."
    assert result["unload again"]["status"] == 404


def shape(value: Any) -> Any:
    """A value without its numbers, and without the names of calls, which are random."""
    if isinstance(value, dict):
        names = {key: "name" for key in ("id", "tool_call_id") if key in value}
        return {key: shape(item) for key, item in sorted(value.items())} | names
    if isinstance(value, list) and all(isinstance(item, int | float) for item in value):
        return "numbers"
    if isinstance(value, list):
        return [shape(item) for item in value]
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else value


@needs_vllm
@clients
def test_nothing_differs_from_vllm_but_the_ids(
    client: tuple[str, str, str], sglang_url: str, vllm_url: str
) -> None:
    result, exchanges = rollout(client, sglang_url)
    # The train client does not take what vLLM 0.32.0 says, and takes what this server says.
    amend = name_tokens_by_id if client is TRAIN else None
    vllm_result, vllm_exchanges = rollout(client, vllm_url, amend)
    CHECKS[client](vllm_result, vllm_exchanges)
    assert shape(result) == shape(vllm_result)
    assert [shape(e.request) for e in exchanges] == [shape(e.request) for e in vllm_exchanges]
