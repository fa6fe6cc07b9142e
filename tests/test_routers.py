"""What routers from PyPI pass on and what they drop, with two real servers behind.

The table of docs/troubleshooting.md is what is expected here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests

from testbed.agents import LAST_EVENTS, MESSAGES, RESPONSES, TEXTS
from testbed.client import CHAT, COMPLETIONS, GENERATE, PROMPT
from testbed.pool import ServerPool
from testbed.release import ROOT
from testbed.server import ROUTED, START_TIMEOUT_S, running
from testbed.tiny_model import load_tokenizer, tiny_model_path
from tests.clients.environments import CLIENTS, client_python
from tools.verify import reserve_port

pytestmark = pytest.mark.full
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
MODULES = {"sglang-router": "sglang_router", "smg": "smg"}
POLICIES = ("cache_aware", "round_robin")
SERVERS = ("routed", "routed_replica")
STOCK_GENERATE = "/generate"
# What tells an answer that has something of ours from one that has not.
NAMES = ("prompt_token_ids", "token_ids", "meta_info", "sglext", "weight_versions")
NAMES += ("token_logprobs", "logprob")
TURNS = 4
NUM_TOKENS = 12


BODIES: dict[str, Callable[[int], dict[str, Any]]] = {
    CHAT: lambda num: {"messages": TEXTS, "max_tokens": num},
    COMPLETIONS: lambda num: {"prompt": "Once upon a time", "max_tokens": num},
    MESSAGES: lambda num: {"messages": TEXTS, "max_tokens": num},
    RESPONSES: lambda num: {"input": TEXTS, "max_output_tokens": num},
    GENERATE: lambda num: {
        "token_ids": PROMPT,
        "sampling_params": {"temperature": 0, "max_tokens": num},
    },
    STOCK_GENERATE: lambda num: {
        "text": "a",
        "sampling_params": {"temperature": 0, "max_new_tokens": num},
    },
}


def body_for(path: str, **fields: Any) -> dict[str, Any]:
    """A greedy request that says nothing of ids."""
    # Routers know the model by the path that the servers were started with.
    body: dict[str, Any] = {"model": str(tiny_model_path()), "temperature": 0}
    body |= BODIES[path](NUM_TOKENS)
    return {**body, **fields}


@dataclasses.dataclass(frozen=True)
class Said:
    """What an answer says that has to do with tokens, or why there is none."""

    status: int
    prompt: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()
    num_prompt_tokens: int = 0
    names: frozenset[str] = frozenset()


def names_in(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(names_in, value.values()))
    if isinstance(value, list):
        return set().union(*map(names_in, value))
    return {"token_id:"} if isinstance(value, str) and value.startswith("token_id:") else set()


def said_in(response: requests.Response) -> Said:
    """Read an answer of any endpoint, whole or streamed."""
    if not response.ok:
        return Said(response.status_code)
    # An event stream says no charset.
    text = response.content.decode()
    lines = re.findall(r"^data: (\{.*)$", text, re.MULTILINE)
    events = [json.loads(line) for line in lines or [text]]
    prompt: list[int] = []
    ids: list[int] = []
    num_prompt_tokens = 0
    for event in events:
        # The last event of a response has all ids once more.
        if event.get("type") in LAST_EVENTS:
            event = event["response"]
            assert not ids or ids == event["token_ids"]
            prompt, ids = [], []
        if "output_ids" in event:
            # Those of /generate are of all steps.
            ids, num_prompt_tokens = event["output_ids"], event["meta_info"]["prompt_tokens"]
        message = event.get("message") or {}
        for part in (event, *event.get("choices", []), message):
            prompt += part.get("prompt_token_ids", [])
            ids += part.get("token_ids", [])
            usage = part.get("usage") or {}
            num_prompt_tokens |= usage.get("prompt_tokens", usage.get("input_tokens", 0))
    names = names_in(events).intersection([*NAMES, "token_id:"])
    return Said(200, tuple(prompt), tuple(ids), num_prompt_tokens, frozenset(names))


def ask(url: str, path: str, stream: bool, body: dict[str, Any], headers: dict[str, str]) -> Said:
    if stream and path in (CHAT, COMPLETIONS, GENERATE):
        body = {**body, "stream_options": {"include_usage": True}}
    body = {**body, "stream": stream}
    return said_in(requests.post(url + path, json=body, headers=headers, timeout=120))


# The URL of a server and the endpoint to the fields of a request, and the same without what a
# router may drop.
Make = Callable[[str, str], tuple[dict[str, Any], dict[str, Any]]]


def fields(**values: Any) -> Make:
    return lambda url, path: (values, {})


def input_ids(url: str, path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"input_ids": PROMPT, "text": None}, {}


def logprobs(url: str, path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"logprobs": path == CHAT or 0}, {}


def first_turn(url: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The ids of a turn, as its answer has them, and the messages of the next one."""
    for letter in "abcdefgh":
        messages = [{"role": "user", "content": letter}]
        # The server is not to know the turn by itself.
        body = body_for(CHAT, messages=messages, user="somebody else")
        answer = requests.post(url + CHAT, json=body, timeout=120).json()
        [choice] = answer["choices"]
        text, ids = choice["message"]["content"], choice["token_ids"]
        if load_tokenizer().encode(text, add_special_tokens=False) != ids:
            break
    reply = {"role": "assistant", "content": text}
    known = {"prompt_token_ids": answer["prompt_token_ids"], "token_ids": ids}
    return known, [*messages, reply, {"role": "user", "content": "And now?"}]


def prefix(url: str, path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    ids, messages = first_turn(url)
    prefix = ids["prompt_token_ids"] + ids["token_ids"]
    return {"messages": messages, "required_prefix_token_ids": prefix}, {"messages": messages}


def ids_on_messages(url: str, path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    ids, messages = first_turn(url)
    said = [{**m, **ids} if m["role"] == "assistant" else m for m in messages]
    return {"messages": said}, {"messages": messages}


@dataclasses.dataclass(frozen=True)
class Case:
    """What a router may drop.

    Attributes:
        makes: The kinds of requests that have it.
    """

    paths: tuple[str, ...]
    makes: tuple[Make, ...] = (fields(),)
    headers: tuple[tuple[str, str], ...] = ()


def answers(*paths: str) -> Case:
    """What is in answers, since the servers return ids by default."""
    return Case(paths, (lambda url, path: ({}, {"return_token_ids": False}),))


# An answer that has ids did not get it.
ASKING = (fields(return_token_ids=False),)
OTHER_NAMES = fields(
    return_prompt_token_ids=True,
    return_meta_info=True,
    return_weight_versions=True,
    return_output_ids_in_sglext=True,
)
HEADERS = (("X-Return-Token-Ids", "0"), ("x-sglext-return-input-ids", "1"))
# By the first cell of the rows of the table.
CASES = {
    "ids in answers of chat and completions": answers(CHAT, COMPLETIONS),
    "ids in answers of responses": answers(RESPONSES),
    "ids in answers of messages": answers(MESSAGES),
    "`return_token_ids` on completions": Case((COMPLETIONS,), ASKING),
    "`return_token_ids` on chat": Case((CHAT,), ASKING),
    "`return_token_ids` on messages": Case((MESSAGES,), ASKING),
    "`return_token_ids` on responses": Case((RESPONSES,), ASKING),
    "the headers that ask for ids": Case((CHAT, COMPLETIONS, RESPONSES), headers=HEADERS),
    "`logprobs` on chat and completions": Case((CHAT, COMPLETIONS), (logprobs,)),
    "[other names](names.md) on chat": Case((CHAT,), (OTHER_NAMES,)),
    "`input_ids`, `required_prefix_token_ids` on chat": Case(
        (CHAT,), (fields(input_ids=PROMPT), prefix)
    ),
    "ids on the messages of chat": Case((CHAT,), (ids_on_messages,)),
    "`prompt` of completions as ids": Case((COMPLETIONS,), (fields(prompt=PROMPT),)),
    "`input_ids` on `/generate`": Case((STOCK_GENERATE,), (input_ids,)),
    "`/inference/v1/generate`": Case((GENERATE,), (fields(return_token_ids=True),)),
}


def table() -> tuple[list[tuple[str, str]], dict[str, list[str]]]:
    """The routers with their versions, and what is said of each by row."""
    [text] = re.findall(r"^\| behind a router (\|(?:.|\n\|)*)", PAGE, re.MULTILINE)
    head, _, *rows = text.splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return re.findall(r"`([\w-]+)` ([\d.]+)", head), {row[0]: row[1:] for row in cells}


ROUTERS, EXPECTED = table()
NAMES_OF_ROUTERS = [name for name, _ in ROUTERS]
Start = Callable[[str, str], str]


@pytest.fixture(scope="module")
def start(servers: ServerPool) -> Iterator[Start]:
    """Start a router with a policy, once, and return its URL."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def start(name: str, policy: str) -> str:
            urls = [servers.get(server).url for server in SERVERS]
            port = reserve_port()
            url = f"http://127.0.0.1:{port}"
            command = [str(client_python("routers")), "-m", f"{MODULES[name]}.launch_router"]
            command += ["--host=127.0.0.1", f"--port={port}", f"--policy={policy}"]
            command += [f"--prometheus-port={reserve_port()}", "--worker-urls", *urls]
            stack.enter_context(running(f"{name}-{policy}", url, command))
            wait_for_workers(url, len(urls))
            return url

        yield start


def wait_for_workers(url: str, number: int) -> None:
    """A router is healthy before it has found its servers."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        workers = requests.get(f"{url}/workers", timeout=30).json()["workers"]
        if sum(worker["is_healthy"] for worker in workers) == number:
            return
        assert time.monotonic() < deadline, workers
        time.sleep(0.2)


def test_the_table_has_the_rows_and_versions_of_the_tests() -> None:
    assert list(EXPECTED) == list(CASES)
    pins = (CLIENTS / "requirements-routers.txt").read_text().splitlines()
    assert {f"{name}=={version}" for name, version in ROUTERS} <= set(pins)
    # The commands above the table.
    assert all(flag.replace("=", " ") in PAGE for flag in ROUTED)


@pytest.mark.clause("C9")
@pytest.mark.parametrize("row", CASES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("router", NAMES_OF_ROUTERS)
def test_what_passes(router: str, policy: str, row: str, start: Start, servers: ServerPool) -> None:
    case = CASES[row]
    url, direct = start(router, policy), servers.get(SERVERS[0]).url
    seen = set()
    for make, path, stream in itertools.product(case.makes, case.paths, (False, True)):
        those, rest = make(direct, path)
        body, headers = body_for(path, **those), dict(case.headers)
        with_it = ask(direct, path, stream, body, headers)
        without = ask(direct, path, stream, body_for(path, **rest), {})
        assert with_it.status == without.status == 200 and with_it != without
        said = ask(url, path, stream, body, headers)
        if said.status != 200:
            seen.add(f"status {said.status}")
        else:
            assert said in (with_it, without)
            seen.add("passes" if said == with_it else "dropped")
    [verdict] = seen
    assert verdict == EXPECTED[row][NAMES_OF_ROUTERS.index(router)]


@pytest.mark.parametrize("router", NAMES_OF_ROUTERS)
def test_both_servers_answer(router: str, start: Start, servers: ServerPool) -> None:
    url = start(router, "round_robin")
    counts = []
    for _ in range(2):
        for _ in range(2):
            assert requests.post(url + CHAT, json=body_for(CHAT), timeout=120).ok
        counts.append([servers.get(name).log_text().count(f"POST {CHAT}") for name in SERVERS])
    assert all(after > before for before, after in zip(*counts))


@pytest.mark.clause("C1", "C9")
@pytest.mark.parametrize("router", NAMES_OF_ROUTERS)
def test_turns_extend_each_other(router: str, start: Start) -> None:
    """A conversation with a key stays at the server that keeps its turns."""
    url = start(router, "manual")
    for key in ("a", "b", "c"):
        messages = [{"role": "user", "content": f"Say something, {router} {key}."}]
        ids: list[int] = []
        for _ in range(TURNS):
            body = body_for(CHAT, messages=messages)
            headers = {"X-SMG-Routing-Key": key}
            answer = requests.post(url + CHAT, json=body, headers=headers, timeout=120).json()
            [choice] = answer["choices"]
            assert answer["prompt_token_ids"][: len(ids)] == ids
            ids = answer["prompt_token_ids"] + choice["token_ids"]
            reply = {"role": "assistant", "content": choice["message"]["content"]}
            messages += [reply, {"role": "user", "content": "And now?"}]
