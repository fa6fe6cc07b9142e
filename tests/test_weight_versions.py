"""Which tokens of a completion came from which weights, when these change in its middle."""

from __future__ import annotations

import pickle
import threading
import time
from array import array
from collections import deque
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
from testbed.release import SERIES, UPSTREAM
from testbed.server import (
    FLUSHES_WHILE_REQUESTS_WAIT,
    LEAVES_A_STEP_BEHIND,
    STOCK_TRACKS_VERSIONS,
    Server,
)
from testbed.tiny_model import tiny_model_path

pytestmark = pytest.mark.skipif(
    "/openai-add-inference-v1-generate-" not in SERIES,
    reason=f"the series of {UPSTREAM} has no patch for it",
)
weights = pytest.mark.parametrize("server", ["weights"], indirect=True)
ours = pytest.mark.skipif(STOCK_TRACKS_VERSIONS, reason="stock tracks the versions")
ENDPOINTS = [GENERATE, CHAT, COMPLETIONS]


def load_weights(
    server: Server, seed: int, mode: str = "in_place", **fields: Any
) -> requests.Response:
    """Update the weights while generation is paused.

    The cache is flushed if nothing of it is in use, which the caller has to know.
    """
    flush_cache = mode == "retract" and FLUSHES_WHILE_REQUESTS_WAIT
    fields = {"model_path": str(tiny_model_path(seed)), "flush_cache": flush_cache, **fields}
    return control(server, "/update_weights_from_disk", **fields)


@pytest.fixture
def server(server: Server) -> Iterator[Server]:
    """A server with the weights of seed 0, labelled 0, before each test and after it."""
    assert control(server, "/update_weight_version", new_version="0").ok
    yield server
    control(server, "/continue_generation")
    assert load_weights(server, 0, weight_version="0").ok
    flush_cache(server.url)


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


@weights
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
    check_update_in_the_middle(server, expected, endpoint, mode, label)


@pytest.mark.parametrize("server", ["weights_overlap"], indirect=True)
@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_an_update_with_overlap(server: Server, expected: list[int], mode: str) -> None:
    """A pause in place may leave a step behind whose result is not processed yet."""
    num_seen, first = check_update_in_the_middle(
        server, expected, GENERATE, mode, "with the update"
    )
    if not STOCK_TRACKS_VERSIONS:
        num_pending = 1 if LEAVES_A_STEP_BEHIND and mode == "in_place" else 0
        assert first == num_seen + num_pending, "the step left behind is of the old weights"


def check_update_in_the_middle(
    server: Server, expected: list[int], endpoint: str, mode: str, label: str
) -> tuple[int, int]:
    """Return how many tokens had come in the pause, and how many the old weights made."""
    running = Running(server, endpoint, max_tokens=NUM_TOKENS)
    running.wait_for(10)
    assert control(server, "/pause_generation", mode=mode).ok
    time.sleep(0.5)
    num_seen = running.num_tokens
    fields = {"weight_version": "1"} if label == "with the update" else {}
    # It would otherwise abort what is running.
    set_label = {"new_version": "1", "abort_all_requests": False}
    if label == "before the update":
        assert control(server, "/update_weight_version", **set_label).ok
    answer = load_weights(server, 1, mode, **fields)
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
        assert ids[first:] != expected[first:]
        if FLUSHES_WHILE_REQUESTS_WAIT:
            # Everything was computed again: the new weights made the rest as from a prompt.
            assert ids[first:] == fresh(server, PROMPT + ids[:first], NUM_TOKENS - first)
    return num_seen, first


@weights
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
            assert load_weights(server, int(version) % 2, "retract").ok
        assert control(server, "/continue_generation").ok
    choices = running.finish()
    assert sorted(choices) == [0, 1, 2]
    for ids, spans in choices.values():
        assert [span["version"] for span in spans] == ["0", "1", "2"]
        assert spans[0]["start"] == 0 and spans[-1]["end"] == len(ids)
        assert all(a["end"] == b["start"] for a, b in zip(spans, spans[1:]))


@weights
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_whole_responses_have_them_too(server: Server, endpoint: str) -> None:
    answers: list[dict[str, Any]] = []
    body = body_for(endpoint, max_tokens=NUM_TOKENS)
    thread = threading.Thread(target=lambda: answers.append(post(server, endpoint, body)))
    watched = Running(server, endpoint, max_tokens=NUM_TOKENS)
    thread.start()
    watched.wait_for(10)
    assert control(server, "/pause_generation", mode="retract").ok
    assert load_weights(server, 1, "retract", weight_version="1").ok
    assert control(server, "/continue_generation").ok
    watched.finish()
    thread.join()
    [choice] = answers[0]["choices"]
    spans = choice["weight_versions"]
    assert [span["version"] for span in spans] == ["0", "1"]
    assert spans[-1]["end"] == len(choice["token_ids"]) == NUM_TOKENS


@weights
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_without_an_update_there_is_one_version(server: Server, endpoint: str) -> None:
    body = body_for(endpoint, max_tokens=16)
    [choice] = post(server, endpoint, body)["choices"]
    assert choice["weight_versions"] == [{"version": "0", "start": 0, "end": 16}]
    assert load_weights(server, 1, weight_version="later").ok
    [choice] = post(server, endpoint, body)["choices"]
    assert choice["weight_versions"] == [{"version": "later", "start": 0, "end": 16}]


@weights
def test_who_does_not_ask_gets_none(server: Server) -> None:
    for endpoint in (CHAT, COMPLETIONS):
        body = {**body_for(endpoint, max_tokens=16), "return_token_ids": False}
        answer = post(server, endpoint, body)
        assert "weight_versions" not in str(answer["choices"])
        assert ("weight_versions" in answer["metadata"]) == STOCK_TRACKS_VERSIONS
    params = {"max_new_tokens": 16, "ignore_eos": True}
    answer = post(server, "/generate", {"input_ids": PROMPT, "sampling_params": params})
    assert answer["meta_info"]["weight_version"] == "0"
    assert ("weight_versions" in answer["meta_info"]) == STOCK_TRACKS_VERSIONS


@weights
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


@pytest.mark.full
@weights
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
        assert load_weights(server, 1, mode, weight_version="1").ok
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
        from sglang.utils import TypeBasedDispatcher

        self.scheduler: Any = SimpleNamespace(
            server_args=SimpleNamespace(tokenizer_worker_num=1),
            running_batch=ScheduleBatch(reqs=[]),
            last_batch=None,
            cur_batch=None,
            chunked_req=None,
            waiting_queue=[],
            grammar_manager=SimpleNamespace(grammar_queue=[]),
            send_to_tokenizer=SimpleNamespace(send_output=self.send),
        )
        self.manager: Any = SimpleNamespace(
            server_args=SimpleNamespace(weight_version="0"),
            _update_weight_version_if_provided=self.set_label,
            rid_to_state={},
            _result_dispatcher=TypeBasedDispatcher([]),
        )
        watch_weight_updates(self.manager)

    def set_label(self, version: str) -> None:
        self.manager.server_args.weight_version = version

    def send(self, message: Any) -> None:
        """As it goes through the socket."""
        from sglang.srt.managers import io_struct

        if getattr(io_struct, "_USE_PICKLE_IPC", True):
            message = pickle.loads(pickle.dumps(message))
        else:
            message = io_struct.msgpack_decode(io_struct.msgpack_encode(message))
        self.manager._result_dispatcher(message)

    def add_request(self, num_tokens: int) -> Any:
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.managers.weight_versions import WeightVersions
        from sglang.srt.sampling.sampling_params import SamplingParams

        rid = f"r{len(self.manager.rid_to_state)}"
        # Lists in earlier releases.
        req = Req(rid, "", array("q", [1, 2, 3]), SamplingParams(max_new_tokens=9))
        req.output_ids.extend(range(num_tokens))
        versions = WeightVersions(self.manager.server_args.weight_version)
        self.manager.rid_to_state[rid] = SimpleNamespace(weight_versions=versions)
        return req

    def put(self, req: Any, place: str) -> None:
        scheduler = self.scheduler
        batch = type(scheduler.running_batch)(reqs=[req])
        if place == "chunked":
            scheduler.chunked_req = req
        elif place.endswith("mbs"):
            setattr(scheduler, place, [batch, None])
        else:
            queues = {
                "running": scheduler.running_batch.reqs,
                "waiting": scheduler.waiting_queue,
                "grammar": scheduler.grammar_manager.grammar_queue,
            }
            queues[place].append(req)

    def leave_behind(self, req: Any, accept_lens: list[int] | None = None) -> None:
        """A step has run, and its result is not processed yet."""
        import torch

        lens = None if accept_lens is None else torch.tensor(accept_lens)
        result = SimpleNamespace(accept_lens=lens, copy_done=None)
        batch = type(self.scheduler.running_batch)(reqs=[req])
        self.scheduler.result_queue = deque([(batch, result)])

    def update(self, version: str) -> None:
        from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqOutput
        from sglang.srt.managers.weight_versions import note_weight_update

        output = UpdateWeightFromDiskReqOutput(success=True, message="")
        note_weight_update(self.scheduler, SimpleNamespace(weight_version=version), output)

    def spans(self, req: Any, num_tokens: int) -> list[tuple[str, int, int]]:
        versions = self.manager.rid_to_state[req.rid].weight_versions
        found = versions.spans(num_tokens, self.manager.server_args.weight_version)
        return [(span["version"], span["start"], span["end"]) for span in found]


@ours
@pytest.mark.parametrize(
    "place", ["running", "waiting", "chunked", "grammar", "running_mbs", "mbs", "last_mbs"]
)
@pytest.mark.parametrize("num_tokens", [0, 4])
def test_a_request_anywhere_in_the_scheduler(place: str, num_tokens: int) -> None:
    engine = Engine()
    req = engine.add_request(num_tokens)
    engine.put(req, place)
    engine.update("1")
    req.output_ids.extend([1, 2])
    engine.update("2")
    first = [("0", 0, num_tokens)] if num_tokens else []
    spans = [*first, ("1", num_tokens, num_tokens + 2), ("2", num_tokens + 2, 9)]
    assert engine.spans(req, 9) == spans


@ours
def test_the_other_format_of_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.managers import io_struct

    if not hasattr(io_struct, "msgpack_encode"):
        pytest.skip("messages are pickled")
    monkeypatch.setattr(io_struct, "_USE_PICKLE_IPC", False)
    engine = Engine()
    req = engine.add_request(4)
    engine.put(req, "running")
    engine.update("1")
    assert engine.spans(req, 9) == [("0", 0, 4), ("1", 4, 9)]


@ours
def test_a_stop_inside_an_output() -> None:
    engine = Engine()
    req = engine.add_request(6)
    req.finished_len = 5
    engine.put(req, "running")
    engine.update("1")
    assert engine.spans(req, 5) == [("0", 0, 5)]
    # It ends earlier than it had come.
    other = engine.add_request(6)
    engine.put(other, "running")
    engine.update("2")
    assert engine.spans(other, 5) == [("1", 0, 5)]


@ours
def test_a_last_output_that_is_overtaken_by_an_update() -> None:
    engine = Engine()
    req = engine.add_request(4)
    engine.put(req, "running")
    engine.update("1")
    req.output_ids.extend([1, 2])
    engine.scheduler.running_batch.reqs.clear()
    engine.update("2")
    assert engine.spans(req, 6) == [("0", 0, 4), ("1", 4, 6)]


@ours
@pytest.mark.parametrize(
    ("accept_lens", "is_chunk", "is_finished", "num_pending"),
    [
        (None, False, False, 1),
        ([3], False, False, 3),
        (None, True, False, 0),
        (None, False, True, 0),
    ],
    ids=["decode", "speculative", "between two chunks", "finished before"],
)
def test_a_step_whose_result_is_not_processed(
    accept_lens: list[int] | None, is_chunk: bool, is_finished: bool, num_pending: int
) -> None:
    engine = Engine()
    req = engine.add_request(4)
    engine.put(req, "running")
    if is_chunk:
        setattr(req, "is_chunked" if hasattr(req, "is_chunked") else "inflight_middle_chunks", 1)
    if is_finished:
        req.finished_reason = SimpleNamespace()
    engine.leave_behind(req, accept_lens)
    engine.update("1")
    assert engine.spans(req, 9) == [("0", 0, 4 + num_pending), ("1", 4 + num_pending, 9)]
