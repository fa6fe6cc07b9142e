"""Which tokens of a completion came from which weights, when these change in its middle."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from testbed.client import (
    CHAT,
    COMPLETIONS,
    GENERATE,
    NUM_TOKENS,
    PROMPT,
    Running,
    body_for,
    control,
    flush_cache,
    fresh,
    generate,
    post,
)
from testbed.pool import ServerPool
from testbed.release import UPSTREAM
from testbed.server import Server
from testbed.tiny_model import tiny_model_path

pytestmark = [
    pytest.mark.skipif(
        UPSTREAM != "v0.5.9", reason=f"the series of {UPSTREAM} has no patch for it"
    ),
    pytest.mark.parametrize("server", ["weights"], indirect=True),
]
ENDPOINTS = [GENERATE, CHAT, COMPLETIONS]


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


@pytest.fixture(scope="module")
def before() -> list[int]:
    """What the first weights make of the prompt, once a test has asked them."""
    return []


@pytest.fixture
def expected(server: Server, before: list[int]) -> list[int]:
    if not before:
        before += fresh(server, PROMPT, NUM_TOKENS)
    flush_cache(server.url)
    return before


@pytest.mark.parametrize(
    ("endpoint", "label"),
    [
        (GENERATE, "with the update"),
        (GENERATE, "by itself"),
        (GENERATE, "before the update"),
        (CHAT, "with the update"),
        (COMPLETIONS, "with the update"),
    ],
)
@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_an_update_in_the_middle(
    server: Server, expected: list[int], endpoint: str, mode: str, label: str
) -> None:
    running = Running(server, endpoint, max_tokens=NUM_TOKENS)
    running.wait_for(10)
    assert control(server, "/pause_generation", mode=mode).ok
    # The cache cannot be flushed under requests that keep theirs.
    fields: dict[str, Any] = {"flush_cache": mode == "retract"}
    if label == "with the update":
        fields["weight_version"] = "1"
    # It would otherwise abort what is running.
    set_label = {"new_version": "1", "abort_all_requests": False}
    if label == "before the update":
        assert control(server, "/update_weight_version", **set_label).ok
    answer = load_weights(server, 1, **fields)
    assert answer.ok and answer.json()["success"], answer.text
    if label == "by itself":
        assert control(server, "/update_weight_version", **set_label).ok
    assert control(server, "/continue_generation").ok
    [(ids, spans)] = running.finish().values()

    assert len(ids) == NUM_TOKENS
    first = spans[0]["end"]
    assert first >= 10
    assert spans == [
        {"version": "0", "start": 0, "end": first},
        {"version": "1", "start": first, "end": NUM_TOKENS},
    ]

    # Neither a token less nor a token more than the old weights made.
    assert ids[:first] == expected[:first]
    if mode == "retract":
        # Everything was computed again, so the new weights made the rest as from a prompt.
        assert ids[first:] == fresh(server, PROMPT + ids[:first], NUM_TOKENS - first)
        assert ids[first:] != expected[first:]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_several_updates_and_choices(server: Server, endpoint: str) -> None:
    running = Running(server, endpoint, max_tokens=NUM_TOKENS, n=3)
    for version in ("1", "2"):
        running.wait_for(30 * int(version))
        assert control(server, "/pause_generation", mode="retract").ok
        # What the label was changed from belongs to the tokens that are there.
        set_label = {"new_version": version, "abort_all_requests": False}
        assert control(server, "/update_weight_version", **set_label).ok
        # Trainers update in several parts: one after the other at the same token.
        for _ in range(2):
            assert load_weights(server, int(version) % 2).ok
        assert control(server, "/continue_generation").ok
    choices = running.finish()
    assert sorted(choices) == [0, 1, 2]
    for ids, spans in choices.values():
        assert [span["version"] for span in spans] == ["0", "1", "2"]
        assert spans[0]["start"] == 0 and spans[-1]["end"] == len(ids)
        assert all(a["end"] == b["start"] for a, b in zip(spans, spans[1:]))


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_whole_responses_have_them_too(server: Server, endpoint: str) -> None:
    answers: list[dict[str, Any]] = []
    body = body_for(endpoint, max_tokens=NUM_TOKENS)
    thread = threading.Thread(target=lambda: answers.append(post(server, endpoint, body)))
    watched = Running(server, endpoint, max_tokens=NUM_TOKENS)
    thread.start()
    watched.wait_for(10)
    assert control(server, "/pause_generation", mode="retract").ok
    assert load_weights(server, 1, weight_version="1").ok
    assert control(server, "/continue_generation").ok
    watched.finish()
    thread.join()
    [choice] = answers[0]["choices"]
    spans = choice["weight_versions"]
    assert [span["version"] for span in spans] == ["0", "1"]
    assert spans[-1]["end"] == len(choice["token_ids"]) == NUM_TOKENS


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_without_an_update_there_is_one_version(server: Server, endpoint: str) -> None:
    body = body_for(endpoint, max_tokens=16)
    [choice] = post(server, endpoint, body)["choices"]
    assert choice["weight_versions"] == [{"version": "0", "start": 0, "end": 16}]
    assert load_weights(server, 1, weight_version="later").ok
    [choice] = post(server, endpoint, body)["choices"]
    assert choice["weight_versions"] == [{"version": "later", "start": 0, "end": 16}]


def test_who_does_not_ask_gets_none(server: Server) -> None:
    for endpoint in (CHAT, COMPLETIONS):
        body = {**body_for(endpoint, max_tokens=16), "return_token_ids": False}
        assert "weight_versions" not in str(post(server, endpoint, body))
    params = {"max_new_tokens": 16, "ignore_eos": True}
    answer = post(server, "/generate", {"input_ids": PROMPT, "sampling_params": params})
    assert answer["meta_info"]["weight_version"] == "0"
    assert "weight_versions" not in answer["meta_info"]


def test_an_update_that_fails_changes_nothing(server: Server, expected: list[int]) -> None:
    running = Running(server, GENERATE, max_tokens=NUM_TOKENS)
    running.wait_for(10)
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
    [(ids, spans)] = running.finish().values()
    assert ids == expected
    assert spans == [{"version": "0", "start": 0, "end": NUM_TOKENS}]


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_an_update_between_two_chunks_of_a_prefill(
    server: Server, servers: ServerPool, mode: str
) -> None:
    server = servers.get("weights_chunked")
    flush_cache(server.url)
    assert control(server, "/update_weight_version", new_version="0").ok
    body = generate([70 + i % 50 for i in range(2000)], max_tokens=8)
    answers: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: answers.append(post(server, GENERATE, body)))
    num_before = server.log_text().count("Prefill batch")
    with server.slowed_down():
        thread.start()
        deadline = time.monotonic() + 60
        while server.log_text().count("Prefill batch") < num_before + 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert control(server, "/pause_generation", mode=mode).ok
        num_chunks = server.log_text().count("Prefill batch")
        fields = {"weight_version": "1", "flush_cache": mode == "retract"}
        assert load_weights(server, 1, **fields).ok
        assert control(server, "/continue_generation").ok
    thread.join()
    assert server.log_text().count("Prefill batch") > num_chunks, "it was in its middle"
    [choice] = answers[0]["choices"]
    assert choice["weight_versions"] == [{"version": "1", "start": 0, "end": 8}]


class Engine:
    """The real requests of a scheduler, and what a tokenizer manager knows of them."""

    def __init__(self) -> None:
        from sglang.srt.managers.schedule_batch import ScheduleBatch
        from sglang.srt.managers.weight_versions import watch_weight_updates

        def batches() -> list[Any]:
            return [ScheduleBatch(reqs=[]), None]

        self.scheduler: Any = SimpleNamespace(
            pp_size=1,
            running_batch=ScheduleBatch(reqs=[]),
            last_batch=None,
            cur_batch=None,
            chunked_req=None,
            waiting_queue=[],
            grammar_manager=SimpleNamespace(grammar_queue=[]),
            **{name: batches() for name in ("running_mbs", "mbs", "last_mbs")},
        )
        self.manager: Any = SimpleNamespace(
            server_args=SimpleNamespace(weight_version="0", tokenizer_worker_num=1),
            rid_to_state={},
            _result_dispatcher=SimpleNamespace(_mapping=Handlers()),
        )
        watch_weight_updates(self.manager)

    def add_request(self, num_tokens: int) -> Any:
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.managers.weight_versions import track_weight_versions
        from sglang.srt.sampling.sampling_params import SamplingParams

        rid = f"r{len(self.manager.rid_to_state)}"
        req = Req(rid, "", [1, 2, 3], SamplingParams(max_new_tokens=9))
        req.output_ids.extend(range(num_tokens))
        state: Any = SimpleNamespace(weight_versions=None, output_ids=[])
        self.manager.rid_to_state[rid] = state
        track_weight_versions(self.manager, state)
        return req

    def update(self, version: str) -> None:
        from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqOutput
        from sglang.srt.managers.weight_versions import note_weight_update

        output = UpdateWeightFromDiskReqOutput(success=True, message="")
        asked = SimpleNamespace(weight_version=version)
        note_weight_update(self.scheduler, asked, output)
        self.manager._result_dispatcher._mapping[type(output)](output)

    def spans(self, req: Any, num_tokens: int) -> list[tuple[str, int, int]]:
        versions = self.manager.rid_to_state[req.rid].weight_versions
        found = versions.spans(num_tokens, self.manager.server_args.weight_version)
        return [(span["version"], span["start"], span["end"]) for span in found]


class Handlers(dict[type, Any]):
    def __missing__(self, key: type) -> Any:
        return lambda output: output


@pytest.mark.parametrize(
    "place", ["running", "waiting", "chunked", "grammar", "running_mbs", "mbs", "last_mbs"]
)
@pytest.mark.parametrize("num_tokens", [0, 4])
def test_a_request_anywhere_in_the_scheduler(server: Server, place: str, num_tokens: int) -> None:
    engine = Engine()
    req = engine.add_request(num_tokens)
    scheduler = engine.scheduler
    if place == "chunked":
        scheduler.chunked_req = req
    elif place.endswith("mbs"):
        scheduler.pp_size = 2
        getattr(scheduler, place)[0] = type(scheduler.running_batch)(reqs=[req])
    else:
        queues = {
            "running": scheduler.running_batch.reqs,
            "waiting": scheduler.waiting_queue,
            "grammar": scheduler.grammar_manager.grammar_queue,
        }
        queues[place].append(req)
    engine.update("1")
    req.output_ids += [1, 2]
    engine.update("2")
    first = [("0", 0, num_tokens)] if num_tokens else []
    spans = [*first, ("1", num_tokens, num_tokens + 2), ("2", num_tokens + 2, 9)]
    assert engine.spans(req, 9) == spans


def test_a_stop_inside_an_output(server: Server) -> None:
    engine = Engine()
    req = engine.add_request(6)
    req.finished_len = 5
    engine.scheduler.running_batch.reqs.append(req)
    engine.update("1")
    assert engine.spans(req, 5) == [("0", 0, 5)]
    # It ends earlier than it had come.
    other = engine.add_request(6)
    engine.scheduler.running_batch.reqs.append(other)
    engine.update("2")
    assert engine.spans(other, 5) == [("1", 0, 5)]


def test_a_last_output_that_is_overtaken_by_an_update(server: Server) -> None:
    engine = Engine()
    req = engine.add_request(4)
    engine.scheduler.running_batch.reqs.append(req)
    engine.update("1")
    req.output_ids += [1, 2]
    engine.scheduler.running_batch.reqs.clear()
    engine.update("2")
    assert engine.spans(req, 6) == [("0", 0, 4), ("1", 4, 6)]
