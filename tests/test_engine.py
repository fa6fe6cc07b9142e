"""An engine inside a program: in any thread and loop, and ended without the program."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import pytest

from testbed.engine_programs import DEAD_S, NUM_RUNNING_TOKENS, Observed, run_program
from testbed.server import ON_GPU

overlaps = pytest.mark.parametrize(
    "overlap",
    [pytest.param(False, id=""), pytest.param(True, id="overlap", marks=pytest.mark.full)],
)


# Each takes the time of some starts, and is run once.
run_once = cache(run_program)


def program(name: str, overlap: bool = False, spawns: bool = False) -> Observed:
    return run_once(name, overlap, spawns)


def check_end(observed: Observed) -> None:
    assert observed["end"]
    assert observed.status == 0, observed.log[-3000:]
    assert observed.left == []


@overlaps
@pytest.mark.parametrize(
    ("form", "times"),
    [
        ("threads", 4),
        ("a loop", 4),
        ("another loop", 4),
        ("loops at once", 4),
        ("loops that stop", 4),
        ("loops and threads", 4),
        ("streams of one loop", 4),
        ("a stream", 0),
        ("an asynchronous stream", 0),
        ("a stream read slowly", 0),
        ("after a stream was left", 0),
        ("after one was cancelled", 0),
        ("a call that blocks a loop", 0),
    ],
)
def test_calls_from_anywhere(form: str, times: int, overlap: bool) -> None:
    """The engine was made in a thread that has ended."""
    observed = program("calls", overlap)
    expected = observed["expected"]
    assert len(expected) == 8
    assert observed[form] == ([expected] * times if times else expected)


@overlaps
def test_the_tokenizer_manager_can_be_awaited(overlap: bool) -> None:
    observed = program("calls", overlap)
    assert observed["the manager"] == [observed["expected"], True]


def test_scores() -> None:
    first, second = program("calls")["score"]
    # The batches are not the same.
    assert first == [pytest.approx(scores, rel=0.01) for scores in second]
    assert [len(scores) for scores in first] == [2, 2]


def test_answers_are_grouped_by_prompt() -> None:
    observed = program("calls")
    a, b, c, d = observed["groups"]
    assert a == b == observed["expected"] != c
    assert c == d


@overlaps
def test_controls(overlap: bool) -> None:
    found = program("calls", overlap)["controls"]
    assert isinstance(found, dict), found
    session = found.pop("session")
    assert isinstance(session, str) and session
    assert found == {
        "paused": True,
        "went on": 8,
        "aborted": "abort",
        "flushed": True,
        "disk": True,
        "version of disk": "disk",
        "tensors": True,
        "version of tensors": "tensors",
        "version of an answer": "tensors",
        "label": "label",
        # No handle is there.
        "ipc": False,
        "weights": 2,
        "info": True,
    }


def test_weights_from_a_broadcast() -> None:
    assert program("calls")["broadcast"] == {
        "joined": True,
        "updated": True,
        "version": "broadcast",
        "weights": [1.0, 1.0],
        "left": True,
    }


def test_synchronous_controls() -> None:
    expected = {"paused": True, "answers": 1, "version": "again"}
    assert program("calls")["synchronous controls"] == expected


@overlaps
def test_the_program_stays_as_it_is(overlap: bool) -> None:
    """Its handlers of signals, its other children, and its end."""
    observed = program("calls", overlap)
    assert observed["handlers"] is True
    assert observed["children"] == ["sleep"]
    assert observed["after the end"] == "EngineDeadError"
    check_end(observed)


@pytest.mark.parametrize("call", ["generate", "async_generate", "stream", "manager", "rpc"])
def test_a_dead_scheduler_ends_calls(call: str) -> None:
    pending, seconds = program("dies", spawns=True)[call]
    assert (pending, 0 <= seconds < DEAD_S) == ("EngineDeadError", True)


@pytest.mark.parametrize("call", ["generate", "async_generate", "flush_cache", "rpc", "abort"])
def test_later_calls_raise(call: str) -> None:
    later, seconds = program("dies", spawns=True)[f"later {call}"]
    assert (later, 0 <= seconds < DEAD_S) == ("EngineDeadError", True)


def test_another_engine_follows() -> None:
    observed = program("dies", spawns=True)
    assert "exit code -9" in observed["message"]
    assert observed["children of a dead engine"] == ["sleep"]
    assert observed["another engine"] == "returned 8"
    assert observed["adapter"] == [True, True]
    assert observed["generate at shutdown"][0] == "EngineDeadError"
    assert observed["children"] == ["sleep"]
    check_end(observed)


@pytest.mark.full
def test_a_dead_replica_ends_calls() -> None:
    observed = program("loses_a_replica")
    assert observed["ids"] == [8, 8]
    assert observed["seconds"] < DEAD_S
    assert "exit code -9" in observed["message"]
    assert observed["children"] == []
    check_end(observed)


@pytest.mark.parametrize("where", ["in the main thread", "in a thread"])
def test_a_failed_start_says_why(where: str) -> None:
    message = program("does_not_start")[where]
    assert "did not start" in message
    assert "Cannot find any model weights" in message


def test_a_failed_start_leaves_nothing() -> None:
    observed = program("does_not_start")
    assert observed["children"] == ["sleep"]
    assert observed["children of a thread"] == ["sleep"]
    assert observed["collected"] == "True"
    assert "no_such_argument" in observed["no argument"]
    check_end(observed)


@overlaps
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("too large an id", ["1000000", "vocabulary"]),
        ("a negative id", ["-1", "vocabulary"]),
        ("stop", ["stop", "tokenizer"]),
        ("min_new_tokens", ["min_new_tokens", "tokenizer"]),
        ("release of an unknown tag", ["'disk'", "kv_cache"]),
        ("resume of an unknown tag", ["'disk'", "kv_cache"]),
        ("release while requests run", ["2 requests"]),
        ("waking what is awake", ["None"]),
    ],
)
def test_refused_with_the_engine_alive(asked: str, words: list[str], overlap: bool) -> None:
    answer, goes_on = program("refuses", overlap)[asked]
    assert all(word in answer for word in words), answer
    assert goes_on


@overlaps
def test_memory(overlap: bool) -> None:
    observed = program("refuses", overlap)
    whole = [NUM_RUNNING_TOKENS] * 2
    assert observed["they went on"] == whole
    assert observed["release right after an answer"] == [["None"], True]
    assert observed["release after a retraction"] == [["None", "None"], True]
    assert observed["the retracted went on"] == whole


@overlaps
@pytest.mark.parametrize(
    ("case", "words"), [("shape", ["has the shape"]), ("type", ["could not be loaded"])]
)
def test_tensors_as_a_whole_or_not_at_all(case: str, words: list[str], overlap: bool) -> None:
    (success, message), is_as_before = program("refuses", overlap)[f"a tensor of another {case}"]
    assert not success
    assert all(word in message for word in ["model.layers.1.mlp.gate_proj.weight", *words])
    assert is_as_before


@overlaps
def test_updates_while_requests_run(overlap: bool) -> None:
    observed = program("refuses", overlap)
    (unknown, _), goes_on = observed["an unknown name"]
    assert unknown and goes_on
    ((flushing, reason), (keeping, _)), goes_on = observed["tensors while paused in place"]
    assert (flushing, keeping, goes_on) == (False, True, True)
    assert "1 request" in reason
    assert observed["a disk under load"] == [[True] * 5, True]


@overlaps
def test_sessions(overlap: bool) -> None:
    found = program("refuses", overlap)["sessions"]
    states = found.pop("hidden states")
    assert states[0] and states[0] <= states[1]
    assert found == {
        "turn two": True,
        "prompt of turn two": 4 + 8 + 2,
        "end of sequence": [True, "stop"],
    }


@overlaps
def test_the_engine_that_refuses_ends(overlap: bool) -> None:
    check_end(program("refuses", overlap))


@pytest.mark.full
def test_in_an_actor() -> None:
    """In an asynchronous actor of Ray, and in one with threads."""
    observed = program("ray_actors", spawns=True)
    answers = observed["asynchronous"]
    assert len(answers) == 4 and len(answers[0]) == 8
    assert answers == [answers[0]] * 4 == observed["threaded"]
    assert observed["control"] is True
    assert observed["asynchronous end"] == observed["threaded end"] == []
    assert observed["after a death"] == ["EngineDeadError"]
    assert observed.status == 0, observed.log[-3000:]


def test_the_engine_of_skyrl() -> None:
    """As it is but for its patch of SGLang, in its asynchronous actor."""
    observed = program("skyrl_actor", spawns=True)
    ids, reasons = observed["after it"]
    assert [len(x) for x in ids] == [8, 8]
    assert reasons == ["length", "length"]
    assert observed["answers"] == [[ids, reasons]] * 4
    assert observed["slept"] is True
    assert observed["children"] == []
    assert observed.status == 0, observed.log[-3000:]


@pytest.mark.skipif(not ON_GPU, reason="a CPU has no memory that tags free, and no CUDA IPC")
def test_on_a_card() -> None:
    observed = program("on_a_card", spawns=True)
    # The cache of 65536 tokens, and weights of 150 MB.
    assert min(observed["freed"]) > 2**26, observed["freed"]
    assert "Memory was not taken" in observed["too little to wake"]
    assert observed["enough to wake"] == "None"
    assert observed["tensors of the card"] == [True, True]
    assert observed["adapter"] == [True, True]
    assert "did not start" in observed["too little memory"]
    assert observed["children"] == []
    check_end(observed)


@pytest.mark.skipif(not ON_GPU, reason="a CPU has no CUDA IPC")
@pytest.mark.skipif(
    find_spec("checkpoint_engine") is None, reason="the package checkpoint-engine is not installed"
)
def test_weights_from_a_parameter_server() -> None:
    observed = program("takes_handles", spawns=True)
    new, old = observed["expected"]
    assert new != old
    (success, _), ids, version, label = observed["updated"]
    assert success
    assert (ids, version, label) == (new, "new", "new")
    (success, message), ids, label = observed["refused"]
    assert not success and "GPU-of-nobody" in message
    assert (ids, label) == (new, "new")
    check_end(observed)


def test_the_engine_ends_with_the_program() -> None:
    observed = program("ends_with_it")
    assert observed["ids"] == 8
    check_end(observed)
