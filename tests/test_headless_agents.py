"""Agents from npm and PyPI, unmodified and headless, through a proxy that records.

The model says what they need to hear (`chained_model`): three calls of a shell, after
thoughts, alone and after text. What it samples is known, and what a tokenizer would make
of it is something else.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from testbed.agents import (
    MESSAGES,
    RESPONSES,
    STREAMS_RESPONSES,
    Read,
    check_turns,
    events_of,
    read_stream,
    read_whole,
)
from testbed.chained_model import chained_model_path, sampled_ids
from testbed.client import CHAT
from testbed.recorder import Exchange, RecordingProxy
from testbed.release import UPSTREAM
from testbed.server import MODES, Server
from tests.clients.environments import client_python, codex_command, run_client
from tools.common import ToolError

pytestmark = pytest.mark.full
# What the first command prints.
PRINTED = "naïve 日本語"
TIMEOUT_S = 110
MINI_CONFIG = """\
model:
  model_kwargs:
    max_tokens: 4096
    extra_headers: {X-Return-Token-Ids: "1"}
"""
# Without what would make the first prompt longer.
CODEX_CONFIG = """\
model = "MODEL"
model_provider = "sglang"
model_instructions_file = "instructions.md"
web_search = "disabled"
include_permissions_instructions = false
include_apps_instructions = false
include_environment_context = false
[model_providers.sglang]
name = "SGLang"
base_url = "URL/v1"
wire_api = "responses"
http_headers = { "X-Return-Token-Ids" = "1" }
[skills]
include_instructions = false
"""


def run(command: list[Any], folder: Path, **env: str) -> str:
    """Run an agent in a folder that is its home as well, and return what it says."""
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(folder), "LANG": "C.UTF-8", **env},
        timeout=TIMEOUT_S,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    return result.stdout


def read(exchange: Exchange) -> Read:
    """Read an answer of any of the endpoints."""
    assert exchange.status == 200, exchange.text
    if exchange.request.get("stream"):
        return read_stream(exchange.path, events_of(exchange.text))
    answer = exchange.answer
    if exchange.path == CHAT:
        [choice] = answer["choices"]
        answer["token_ids"] = choice["token_ids"]
    return read_whole(answer)


def check(server: Server, exchanges: list[Exchange], path: str, num_turns: int) -> None:
    """See that the ids are all that was sampled, and that each turn goes on from the last."""
    from transformers import AutoTokenizer

    replies = MODES[server.name].replies
    tokenizer = AutoTokenizer.from_pretrained(chained_model_path(replies))
    assert [exchange.path for exchange in exchanges] == [path] * num_turns
    turns = [read(exchange) for exchange in exchanges]
    for turn, ids in zip(turns, sampled_ids(replies)):
        assert turn.ids == ids, "C1"
        assert len(turn.ids) == turn.num_tokens, "C2"
        text = tokenizer.decode(turn.ids, skip_special_tokens=False)
        assert tokenizer.encode(text, add_special_tokens=False) != turn.ids
    check_turns(turns)
    result = tokenizer.decode(turns[1].prompt[len(turns[0].prompt + turns[0].ids) :])
    assert PRINTED in result or json.dumps(PRINTED)[1:-1] in result


@pytest.mark.clause("C1", "C2", "C6")
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize("server", ["agent_bash"], indirect=True)
def test_mini_swe_agent(server: Server, path: str, tmp_path: Path) -> None:
    """Its last call hands the work in."""
    mini = client_python("mini").with_name("mini")
    (tmp_path / "ids.yaml").write_text(MINI_CONFIG)
    provider = "openai" if path == CHAT else "anthropic"
    with server.slowed_down(), RecordingProxy(server.url) as proxy:
        command = [mini, "-m", f"{provider}/m", "-t", f"Say {path}", "-y", "--exit-immediately"]
        run(
            [*command, "-o", "said.json", "-c", "mini.yaml", "-c", "ids.yaml"],
            tmp_path,
            OPENAI_BASE_URL=f"{proxy.url}/v1",
            OPENAI_API_KEY="none",
            ANTHROPIC_BASE_URL=proxy.url,
            ANTHROPIC_API_KEY="none",
            LITELLM_LOCAL_MODEL_COST_MAP="True",
            MSWEA_CONFIGURED="true",
            MSWEA_COST_TRACKING="ignore_errors",
        )
    check(server, proxy.exchanges, path, num_turns=3)


@pytest.mark.clause("C1", "C2", "C5")
@pytest.mark.parametrize("server", ["agent_bash"], indirect=True)
def test_strands(server: Server) -> None:
    """It sends ids to /generate itself, and what it trains on is what was sampled there."""
    replies = MODES[server.name].replies
    with RecordingProxy(server.url) as proxy:
        model = chained_model_path(replies)
        rollout = run_client("strands", "strands_turns.py", proxy.url, model, "3")
    # The results of earlier turns are not rendered again, so the third turn is the second.
    first, second = sampled_ids(replies)[:2]
    assert len(rollout["commands"]) == len(proxy.exchanges) == 3
    ids: list[int] = []
    is_sampled: list[int] = []
    logprobs: list[float] = []
    for exchange, sampled in zip(proxy.exchanges, [first, second, second], strict=True):
        prompt, answer = exchange.request["input_ids"], exchange.answer
        assert prompt[: len(ids)] == ids and answer["output_ids"] == sampled
        ids = prompt + sampled
        is_sampled += [0] * (len(prompt) - len(is_sampled)) + [1] * len(sampled)
        logprobs += [logprob for logprob, _, _ in answer["meta_info"]["output_token_logprobs"]]
    assert rollout["token_ids"] == ids and rollout["loss_mask"] == is_sampled
    assert [value for value, mask in zip(rollout["logprobs"], is_sampled) if mask] == logprobs


@pytest.mark.clause("C1", "C2", "C6")
@pytest.mark.skipif(
    not STREAMS_RESPONSES, reason=f"/v1/responses of stock {UPSTREAM} takes no functions"
)
@pytest.mark.parametrize("server", ["agent_codex"], indirect=True)
def test_codex(server: Server, tmp_path: Path) -> None:
    try:
        codex = codex_command()
    except ToolError as error:
        pytest.skip(str(error))
    (tmp_path / "instructions.md").write_text("You are a coding agent.\n")
    with server.slowed_down(), RecordingProxy(server.url) as proxy:
        # Later releases want the name of the model.
        model = chained_model_path(MODES[server.name].replies)
        config = CODEX_CONFIG.replace("URL", proxy.url).replace("MODEL", str(model))
        (tmp_path / "config.toml").write_text(config)
        options = ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
        said = run([*codex, "exec", *options, "Look at it."], tmp_path, CODEX_HOME=str(tmp_path))
    check(server, proxy.exchanges, RESPONSES, num_turns=4)
    # The last reply, without its thoughts.
    assert "".join(MODES[server.name].replies[-1][1:]) in said
