"""Which tokens of a completion came from which weights, when these change in its middle."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tests.engine.release import UPSTREAM
from tests.engine.server import Server
from tests.engine.tiny_model import tiny_model_path
from tests.test_end_to_end import post
from tests.test_tokens_in_out import GENERATE, generate, join

pytestmark = [
    pytest.mark.skipif(
        UPSTREAM != "v0.5.9", reason=f"the series of {UPSTREAM} has no patch for it"
    ),
    pytest.mark.parametrize("server", ["weights"], indirect=True),
]
# So many that they take longer than whatever may hold up a request to pause.
NUM_TOKENS = 1200
PROMPT = [70, 71, 72, 73]


def control(server: Server, path: str, **body: Any) -> requests.Response:
    return requests.post(server.url + path, json=body, timeout=120)


def load_weights(server: Server, seed: int, **fields: Any) -> requests.Response:
    path = str(tiny_model_path(seed))
    return control(server, "/update_weights_from_disk", model_path=path, **fields)


@pytest.fixture(autouse=True)
def first_weights(server: Server) -> Iterator[None]:
    """Start each test from the weights of seed 0, labelled 0."""
    yield
    control(server, "/continue_generation")
    assert load_weights(server, 0, weight_version="0").ok


@pytest.fixture(autouse=True)
def first_label(server: Server) -> None:
    assert control(server, "/update_weight_version", new_version="0").ok


class Running:
    """A streamed request that can be waited for while it runs."""

    def __init__(self, server: Server, body: dict[str, Any]):
        self.server, self.body = server, body
        self.chunks: list[dict[str, Any]] = []
        self.num_tokens = 0
        self.grown = threading.Condition()
        self.thread = threading.Thread(target=self.read)
        self.thread.start()

    def read(self) -> None:
        body = {**self.body, "stream": True}
        url = self.server.url + GENERATE
        with requests.post(url, json=body, timeout=300, stream=True) as response:
            for line in response.iter_lines():
                if line and line != b"data: [DONE]":
                    with self.grown:
                        self.chunks.append(json.loads(line.removeprefix(b"data: ")))
                        choices = self.chunks[-1]["choices"]
                        self.num_tokens += sum(len(c["token_ids"]) for c in choices)
                        self.grown.notify_all()

    def wait_for(self, num_tokens: int) -> None:
        with self.grown:
            assert self.grown.wait_for(lambda: self.num_tokens >= num_tokens, 60)

    def finish(self) -> dict[int, dict[str, Any]]:
        self.thread.join()
        return join(self.chunks)


def fresh(server: Server, prompt: list[int], num_tokens: int) -> list[int]:
    """What the weights of now make of a prompt that is not cached."""
    assert control(server, "/flush_cache").ok
    [choice] = post(server, GENERATE, generate(prompt, max_tokens=num_tokens))["choices"]
    ids: list[int] = choice["token_ids"]
    return ids


@pytest.fixture(scope="module")
def before() -> list[int]:
    """What the first weights make of the prompt, once a test has asked them."""
    return []


@pytest.fixture
def expected(server: Server, before: list[int]) -> list[int]:
    if not before:
        before += fresh(server, PROMPT, NUM_TOKENS)
    assert control(server, "/flush_cache").ok
    return before


@pytest.mark.parametrize("mode", ["retract", "in_place"])
@pytest.mark.parametrize("label", ["with the update", "by itself"])
def test_an_update_in_the_middle(
    server: Server, expected: list[int], mode: str, label: str
) -> None:
    running = Running(server, generate(PROMPT, max_tokens=NUM_TOKENS))
    running.wait_for(30)
    assert control(server, "/pause_generation", mode=mode).ok
    # The cache cannot be flushed under requests that keep theirs.
    fields: dict[str, Any] = {"flush_cache": mode == "retract"}
    if label == "with the update":
        fields["weight_version"] = "1"
    answer = load_weights(server, 1, **fields)
    assert answer.ok and answer.json()["success"], answer.text
    if label == "by itself":
        # It would abort what is running.
        keep = {"abort_all_requests": False}
        assert control(server, "/update_weight_version", new_version="1", **keep).ok
    assert control(server, "/continue_generation").ok
    [choice] = running.finish().values()

    ids, spans = choice["token_ids"], choice["weight_versions"]
    assert len(ids) == NUM_TOKENS
    first = spans[0]["end"]
    assert first >= 30
    assert spans == [
        {"version": "0", "start": 0, "end": first},
        {"version": "1", "start": first, "end": NUM_TOKENS},
    ]
    chunks = running.chunks
    assert not any(c["choices"][0]["weight_versions"] for c in chunks[:-1])

    # Neither a token less nor a token more than the old weights made.
    assert ids[:first] == expected[:first]
    if mode == "retract":
        # Everything was computed again, so the new weights made the rest as from a prompt.
        assert ids[first:] == fresh(server, PROMPT + ids[:first], NUM_TOKENS - first)
        assert ids[first:] != expected[first:]


def test_several_updates_and_choices(server: Server) -> None:
    running = Running(server, generate(PROMPT, max_tokens=NUM_TOKENS, n=3))
    for version in ("1", "2"):
        running.wait_for(60 * int(version))
        assert control(server, "/pause_generation", mode="retract").ok
        # Trainers update in several parts: one after the other at the same token.
        for _ in range(2):
            assert load_weights(server, int(version) % 2, weight_version=version).ok
        assert control(server, "/continue_generation").ok
    choices = running.finish()
    assert sorted(choices) == [0, 1, 2]
    for choice in choices.values():
        spans = choice["weight_versions"]
        assert [span["version"] for span in spans] == ["0", "1", "2"]
        assert spans[0]["start"] == 0 and spans[-1]["end"] == len(choice["token_ids"])
        assert all(a["end"] == b["start"] for a, b in zip(spans, spans[1:]))


def test_whole_responses_have_them_too(server: Server) -> None:
    answers: list[dict[str, Any]] = []
    body = generate(PROMPT, max_tokens=3000)
    thread = threading.Thread(target=lambda: answers.append(post(server, GENERATE, body)))
    watched = Running(server, body)
    thread.start()
    watched.wait_for(50)
    assert control(server, "/pause_generation", mode="retract").ok
    assert load_weights(server, 1, weight_version="1").ok
    assert control(server, "/continue_generation").ok
    thread.join()
    watched.finish()
    [choice] = answers[0]["choices"]
    spans = choice["weight_versions"]
    assert [span["version"] for span in spans] == ["0", "1"]
    assert spans[-1]["end"] == len(choice["token_ids"]) == 3000


def test_without_an_update_there_is_one_version(server: Server) -> None:
    [choice] = post(server, GENERATE, generate(PROMPT))["choices"]
    assert choice["weight_versions"] == [{"version": "0", "start": 0, "end": 16}]
    assert load_weights(server, 1, weight_version="later").ok
    [choice] = post(server, GENERATE, generate(PROMPT))["choices"]
    assert choice["weight_versions"] == [{"version": "later", "start": 0, "end": 16}]


def test_an_update_that_fails_changes_nothing(server: Server, expected: list[int]) -> None:
    running = Running(server, generate(PROMPT, max_tokens=NUM_TOKENS))
    running.wait_for(30)
    assert control(server, "/pause_generation", mode="in_place").ok
    answer = control(
        server,
        "/update_weights_from_disk",
        model_path="/nowhere",
        weight_version="1",
        flush_cache=False,
    )
    assert answer.status_code == 400 and not answer.json()["success"]
    assert control(server, "/continue_generation").ok
    [choice] = running.finish().values()
    assert choice["token_ids"] == expected
    assert choice["weight_versions"] == [{"version": "0", "start": 0, "end": NUM_TOKENS}]
