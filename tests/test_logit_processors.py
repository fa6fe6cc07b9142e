"""Logit processors by name: what they let be sampled, what they refuse, and who is harmed."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from testbed.client import CHAT, COMPLETIONS, GENERATE, PROMPT, flush_cache, post
from testbed.release import SERIES, UPSTREAM
from testbed.server import SAYS_WHY_STREAMS_END, Server
from testbed.tiny_model import EOS, load_tokenizer

pytestmark = pytest.mark.skipif(
    "/sampling-ask-for-logit-processors-by-name" not in SERIES,
    reason=f"the series of {UPSTREAM} has no patch for it",
)
processors = pytest.mark.parametrize("server", ["processors"], indirect=True)
# Without overlap scheduling, with it, and with requests that are prefilled again.
schedulers = pytest.mark.parametrize("server", ["default", "processors", "retract"], indirect=True)
NATIVE = "/generate"
ENDPOINTS = [NATIVE, CHAT, COMPLETIONS, GENERATE]
VOCAB_SIZE = 300
SCHEDULE = {"initial_temp": 3.0, "final_temp": 0.3, "warmup_tokens": 20}


def own(name: str, **params: Any) -> dict[str, Any]:
    return {"name": name, "params": params}


def mask(*token_ids: int, name: str = "action_mask") -> dict[str, Any]:
    return own(name, token_ids=list(token_ids))


def schedule(**params: Any) -> dict[str, Any]:
    return own("temperature_schedule", **{**SCHEDULE, **params})


def body_of(endpoint: str, value: Any, **fields: Any) -> dict[str, Any]:
    """A request for 8 ids at temperature 1 from PROMPT."""
    params = {"temperature": 1.0, "ignore_eos": True}
    asked = {"custom_logit_processor": value} if value is not None else {}
    if endpoint == NATIVE:
        sampling = {**params, "max_new_tokens": 8, **fields.pop("sampling_params", {})}
        return {"input_ids": PROMPT, "sampling_params": sampling, **asked, **fields}
    if endpoint == GENERATE:
        sampling = {**params, "max_tokens": 8, **fields.pop("sampling_params", {})}
        return {"model": "m", "token_ids": PROMPT, "sampling_params": sampling, **asked, **fields}
    body = {"model": "m", "max_tokens": 8, "return_token_ids": True, **params, **asked}
    prompt: dict[str, Any] = {"prompt": PROMPT}
    if endpoint == CHAT:
        prompt = {"messages": [{"role": "user", "content": "hi"}], "input_ids": PROMPT}
    return {**body, **prompt, **fields.pop("sampling_params", {}), **fields}


def ask(server: Server, endpoint: str, value: Any, **fields: Any) -> requests.Response:
    body = body_of(endpoint, value, **fields)
    return requests.post(server.url + endpoint, json=body, timeout=120)


def ids_of(server: Server, endpoint: str, value: Any, **fields: Any) -> list[list[int]]:
    """The ids of each choice."""
    response = ask(server, endpoint, value, **fields)
    assert response.status_code == 200, response.text
    if not fields.get("stream"):
        answer = response.json()
        if endpoint == NATIVE:
            answers = answer if isinstance(answer, list) else [answer]
            return [choice["output_ids"] for choice in answers]
        return [choice["token_ids"] for choice in answer["choices"]]
    events = [line for line in response.text.splitlines() if line.startswith("data: {")]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    if endpoint == NATIVE:
        return [chunks[-1]["output_ids"]]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return [[token_id for choice in choices for token_id in choice.get("token_ids", [])]]


def error_of(server: Server, endpoint: str, value: Any, **fields: Any) -> str:
    """The message of a request that is refused before anything is sent."""
    response = ask(server, endpoint, value, **fields)
    assert response.status_code == 400, response.text
    answer = response.json()
    message: str = answer.get("error", answer)["message"]
    assert "\n" not in message
    return message


def plain(server: Server) -> list[int]:
    """What a neighbour without processors gets."""
    [ids] = ids_of(server, NATIVE, None, sampling_params={"temperature": 0, "max_new_tokens": 16})
    return ids


@processors
@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("stream", [False, True])
def test_only_what_is_allowed(server: Server, endpoint: str, stream: bool) -> None:
    """Each form on each endpoint means the same."""
    for value, allowed in [
        (mask(80, 81), {80, 81}),
        (json.dumps(mask(80, 81)), {80, 81}),
        ([mask(80, 81, 82), mask(81, name="disallowed_tokens")], {80, 82}),
        (json.dumps([mask(80, 81, 82), mask(82, 80)]), {80, 82}),
        ("rl_action_mask:80,81", {80, 81}),
        (["rl_action_mask:80,81,82", "disallowed_tokens:81"], {80, 82}),
        ([mask(80, 81, 82), None, "disallowed_tokens:81"], {80, 82}),
        (own("only", token_id=83), {83}),
        ([mask(80, 81), own("only", token_id=81)], {81}),
    ]:
        [ids] = ids_of(server, endpoint, value, stream=stream)
        assert len(ids) == 8 and set(ids) <= allowed, value
    [ids] = ids_of(
        server, endpoint, mask(*range(VOCAB_SIZE - 1), name="disallowed_tokens"), stream=stream
    )
    assert set(ids) == {VOCAB_SIZE - 1}


@processors
def test_allowed_token_ids(server: Server) -> None:
    """The name that clients of vLLM have for the mask, alone and with others."""
    for stream in (False, True):
        params = {"allowed_token_ids": [80, 81, 82]}
        [ids] = ids_of(server, GENERATE, None, sampling_params=params, stream=stream)
        assert set(ids) <= {80, 81, 82}
        value = "disallowed_tokens:80,82"
        [ids] = ids_of(server, GENERATE, value, sampling_params=params, stream=stream)
        assert set(ids) == {81}
        for wrong, said in [([], "an empty list"), ([VOCAB_SIZE], "vocabulary of 300")]:
            fields = {"sampling_params": {"allowed_token_ids": wrong}, "stream": stream}
            assert said in error_of(server, GENERATE, None, **fields)


@schedulers
def test_choices_and_prompts(server: Server) -> None:
    """`n` with a chain, and a list of prompts with an entry for each."""
    masks = [mask(80, 81, 82, 83), mask(80, 81, 82, 84)]
    chain = [*masks, mask(81, name="disallowed_tokens")]
    for endpoint in ENDPOINTS:
        choices = ids_of(server, endpoint, chain, sampling_params={"n": 3})
        assert len(choices) == 3 and set(itertools.chain(*choices)) <= {80, 82}
    entries = [mask(80), json.dumps(mask(81)), None, chain, "rl_action_mask:84"]
    expected: list[set[int]] = [{80}, {81}, set(range(VOCAB_SIZE)), {80, 82}, {84}]
    for n in (1, 2):
        for endpoint, prompts in [(NATIVE, "input_ids"), (COMPLETIONS, "prompt")]:
            fields = {prompts: [PROMPT] * 5, "sampling_params": {"n": n}}
            choices = ids_of(server, endpoint, entries, **fields)
            assert len(choices) == 5 * n
            for index, ids in enumerate(choices):
                assert set(ids) <= expected[index // n], (index, ids)
            choices = ids_of(server, endpoint, mask(85), **fields)
            assert set(itertools.chain(*choices)) == {85}
    [ids] = ids_of(server, NATIVE, chain, input_ids=[PROMPT])
    assert set(ids) <= {80, 82}


def scores(server: Server, ids: list[int], num_prompt: int) -> list[list[float]]:
    """The log-probabilities of the whole vocabulary at each id after the prompt.

    They are those of a prefill, which knows nothing of processors.
    """
    flush_cache(server.url)
    every = list(range(VOCAB_SIZE))
    fields = {"return_logprob": True, "logprob_start_len": 0, "token_ids_logprob": every}
    body = body_of(NATIVE, None, sampling_params={"max_new_tokens": 1}, **fields)
    answer = post(server, NATIVE, {**body, "input_ids": ids})
    positions = answer["meta_info"]["input_token_ids_logprobs"]
    assert len(positions) == len(ids)
    return [[entry[0] for entry in position] for position in positions[num_prompt:]]


def check_logprobs(
    server: Server,
    answer: dict[str, Any],
    prompt: list[int],
    allowed: set[int],
    temperature: float,
    scheduled: bool,
) -> None:
    """Hold the log-probabilities of a completion against the formula of the documents."""
    returned = answer["meta_info"]["output_token_logprobs"]
    ids = [entry[1] for entry in returned]
    reference = scores(server, prompt + ids, len(prompt))
    for position, (entry, row) in enumerate(zip(returned, reference, strict=True)):
        progress = min(position / SCHEDULE["warmup_tokens"], 1.0)
        change = SCHEDULE["final_temp"] - SCHEDULE["initial_temp"]
        factor = SCHEDULE["initial_temp"] + progress * change if scheduled else 1.0
        scaled = {i: row[i] / (temperature * factor) for i in allowed}
        top = max(scaled.values())
        norm = top + math.log(sum(math.exp(value - top) for value in scaled.values()))
        assert entry[0] == pytest.approx(scaled[entry[1]] - norm, abs=0.02), position


@schedulers
def test_logprobs_are_those_of_the_formula(server: Server) -> None:
    """Of masks and temperatures by position, in one batch with others."""
    some = set(range(80, 120))
    cases: list[tuple[Any, set[int], float, bool]] = [
        (mask(*some), some, 0.7, False),
        (schedule(), set(range(VOCAB_SIZE)), 0.7, True),
        ([mask(*some), schedule()], some, 1.3, True),
        (None, set(range(VOCAB_SIZE)), 1.0, False),
        ([schedule(), mask(*range(200), name="disallowed_tokens")], set(range(200, 300)), 1, True),
        (mask(80, 90), {80, 90}, 1.0, False),
    ]
    retracted = re.compile(r"#retracted_reqs: [1-9]")
    before = len(retracted.findall(server.log_text()))

    def one(number: int) -> dict[str, Any]:
        value, _, temperature, _ = cases[number]
        # They leave the batch one after another.
        params = {"temperature": temperature, "max_new_tokens": 24 + number}
        fields = {"return_logprob": True, "input_ids": [*PROMPT, 70 + number]}
        return post(server, NATIVE, body_of(NATIVE, value, sampling_params=params, **fields))

    with ThreadPoolExecutor(len(cases)) as pool:
        answers = list(pool.map(one, range(len(cases))))
    if server.name == "retract":
        assert len(retracted.findall(server.log_text())) > before, "nothing was retracted"
    for number, (answer, case) in enumerate(zip(answers, cases)):
        check_logprobs(server, answer, [*PROMPT, 70 + number], *case[1:])


@processors
def test_a_turn_of_a_session_starts_at_its_first_token(server: Server) -> None:
    session = requests.post(
        f"{server.url}/open_session", json={"capacity_of_str_len": 1000}, timeout=60
    ).json()
    prompt: list[int] = []
    previous = None
    for turn in ([*PROMPT, 75], [76, 77]):
        params = {"id": session, "rid": previous}
        fields = {"return_logprob": True, "input_ids": turn, "session_params": params}
        sampling = {"max_new_tokens": 24}
        answer = post(
            server, NATIVE, body_of(NATIVE, schedule(), sampling_params=sampling, **fields)
        )
        previous = answer["meta_info"]["id"]
        ids = [entry[1] for entry in answer["meta_info"]["output_token_logprobs"]]
        # What was sampled last is not in the cache, but in the next turn's prompt.
        prompt += turn
        assert answer["meta_info"]["prompt_tokens"] == len(prompt)
        check_logprobs(server, answer, prompt, set(range(VOCAB_SIZE)), 1.0, True)
        prompt += ids
    requests.post(f"{server.url}/close_session", json={"session_id": session}, timeout=60)


@schedulers
def test_a_grammar_and_a_mask_both_hold(server: Server) -> None:
    tokenizer = load_tokenizer()
    [a], [b], [digit], [eos] = (tokenizer.encode(text) for text in ("a", "b", "7", EOS))
    grammar = {"regex": "[ab]{6}", "ignore_eos": False, "max_new_tokens": 16}
    for _ in range(3):
        [ids] = ids_of(server, NATIVE, mask(a, digit, eos), sampling_params=grammar)
        assert ids == [a] * 6 + [eos]
    message = error_of(server, NATIVE, mask(digit), sampling_params=grammar)
    assert message == "custom_logit_processor: action_mask left no token to sample after 0 tokens."
    # Where the grammar ends, the mask does not let the request end.
    message = error_of(server, NATIVE, mask(a, b), sampling_params=grammar)
    assert "action_mask left no token to sample after 6 tokens" in message


@schedulers
def test_who_has_no_token_left_fails_alone(server: Server) -> None:
    expected = plain(server)
    [eos] = load_tokenizer().encode(EOS)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (mask(eos), {"min_new_tokens": 2, "ignore_eos": False}, "action_mask left no token"),
    ]
    if server.name == "processors":
        cases += [
            (own("fails", how="-inf", after=3), {}, "fails left no token to sample after"),
            ([mask(80), own("only", token_id=81)], {}, "action_mask, only left no token"),
            (own("fails", how="nan", after=3), {}, "fails made a logit that is not finite"),
            (own("fails", how="inf"), {}, "fails made a logit that is not finite"),
            (own("fails", how="shape"), {}, "fails raised ValueError: it returned"),
            (
                own("fails", how="raise", what="words", after=5),
                {},
                "fails raised RuntimeError: no more of words",
            ),
        ]

    def one(number: int) -> Any:
        if number % 3 == 0:
            return plain(server)
        if number % 3 == 1:
            value = own("fails", how="raise", what="none", after=99)
            value = value if server.name == "processors" else mask(80)
            return ids_of(server, NATIVE, value, sampling_params={"max_new_tokens": 16})
        value, params, _ = cases[number // 3]
        return error_of(server, NATIVE, value, sampling_params={"max_new_tokens": 16, **params})

    with ThreadPoolExecutor(3 * len(cases)) as pool:
        answers = list(pool.map(one, range(3 * len(cases))))
    for number, answer in enumerate(answers):
        if number % 3 == 0:
            assert answer == expected, "a neighbour without processors"
        elif number % 3 == 1:
            assert len(answer[0]) == 16, "a neighbour with the same processor"
        else:
            assert cases[number // 3][2] in answer
    assert plain(server) == expected


@processors
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_stream_ends_with_the_error(server: Server, endpoint: str) -> None:
    value = own("fails", how="raise", what="words", after=3)
    response = ask(server, endpoint, value, stream=True)
    assert response.status_code == 200
    if SAYS_WHY_STREAMS_END or endpoint in (NATIVE, GENERATE):
        assert "fails raised RuntimeError: no more of words" in response.text
    else:
        assert '"finish_reason":"abort"' in response.text
    assert response.text.rstrip().endswith("data: [DONE]")
    # Whole.
    assert "no more of words" in error_of(server, endpoint, value)


NOT_A_FORM = "is not an object with name and params"
REFUSED: list[tuple[Any, str]] = [
    (5, f"custom_logit_processor: 5 {NOT_A_FORM}"),
    (0, NOT_A_FORM),
    ({}, "there is no logit processor None"),
    (True, NOT_A_FORM),
    ("action_mask", NOT_A_FORM),
    ("5", NOT_A_FORM),
    ('"rl_action_mask:5"', NOT_A_FORM),
    ([[[mask(5)]]], NOT_A_FORM),
    ({"name": "action_mask", "parms": {}}, "parms: an object has name and params"),
    (own("action_masks", token_ids=[5]), "no logit processor 'action_masks'. There are action_"),
    (own("os.system", token_ids=[5]), "temperature_schedule, only, fails."),
    ({"params": {}}, "there is no logit processor None"),
    ({"name": "action_mask"}, "action_mask: token_ids must be given"),
    ({"name": "action_mask", "params": [5]}, "params must be an object, not [5]"),
    (own("action_mask", token_id=[5]), "action_mask: there is no parameter 'token_id'"),
    (own("action_mask", token_ids=[5], x=1), "there is no parameter 'x'. There are token_ids"),
    (own("action_mask", token_ids=5), "token_ids must be a list of token ids, not 5"),
    (mask(), "action_mask: token_ids is an empty list"),
    ("rl_action_mask:", "action_mask: token_ids is an empty list"),
    ("rl_action_mask:5,x", "'x' is no token id"),
    (own("disallowed_tokens", token_ids=[5.0]), "integers, and 5.0 is none"),
    (own("disallowed_tokens", token_ids=[True]), "integers, and True is none"),
    (own("disallowed_tokens", token_ids=["5"]), "integers, and '5' is none"),
    (mask(5, -1), "token_ids has -1, which is negative"),
    ("rl_action_mask:5,-1", "token_ids has -1, which is negative"),
    (mask(5, VOCAB_SIZE), "has 300, which is outside of the vocabulary of 300 ids"),
    (mask(*range(VOCAB_SIZE), name="disallowed_tokens"), "token_ids disallows all 300 ids"),
    ([mask(5, 6), mask(7)], "action_mask and action_mask leave no token to sample"),
    (["rl_action_mask:5", "disallowed_tokens:5"], "action_mask and disallowed_tokens leave no"),
    (schedule(initial_temp=0), "initial_temp must be a positive finite number, not 0"),
    (schedule(final_temp=-0.5), "final_temp must be a positive finite number, not -0.5"),
    (schedule(final_temp="1"), "final_temp must be a positive finite number, not '1'"),
    (schedule(final_temp=True), "final_temp must be a positive finite number, not True"),
    (schedule(final_temp=1e39), "final_temp must be a positive finite number, not 1e+39"),
    (schedule(warmup_tokens=0), "warmup_tokens must be an integer above 0, not 0"),
    (schedule(warmup_tokens=1.5), "warmup_tokens must be an integer above 0, not 1.5"),
    (own("temperature_schedule", initial_temp=1), "final_temp, warmup_tokens must be given"),
    ([schedule(), schedule()], "temperature_schedule is there more than once"),
    (own("only", token_id=300), "only: token_id has to be one of 300"),
]
# Some readers of JSON refuse them already.
TOO_LARGE = [
    (schedule(initial_temp=10**400), "initial_temp must be a positive finite number, not 1000"),
    (schedule(warmup_tokens=10**400), "warmup_tokens must be an integer above 0, not 1000"),
]


@processors
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_what_is_wrong_is_said_before_a_stream_starts(server: Server, endpoint: str) -> None:
    for value, said in REFUSED:
        for stream in (False, True):
            message = error_of(server, endpoint, value, stream=stream)
            assert said in message and message.startswith("custom_logit_processor: "), message
    for value, said in TOO_LARGE:
        response = ask(server, endpoint, value)
        assert response.status_code == 400
        assert said in response.text or "infinity" in response.text, response.text
    for params in ({"temperature": 0}, {"top_k": 1}):
        message = error_of(server, endpoint, schedule(), sampling_params=params, stream=True)
        assert "temperature_schedule: with t" in message
    text = '{"initial_temp": Infinity, "final_temp": 1, "warmup_tokens": 5}'
    body = json.dumps(body_of(endpoint, schedule())).replace(json.dumps(SCHEDULE), text)
    response = requests.post(server.url + endpoint, data=body.encode(), timeout=60)
    assert response.status_code == 400, "not finite"


@processors
def test_an_entry_for_each_prompt(server: Server) -> None:
    fields = {"input_ids": [PROMPT] * 3}
    message = error_of(server, NATIVE, [mask(5)] * 2, **fields)
    assert message == "custom_logit_processor has 2 entries for 3 prompts."
    message = error_of(server, NATIVE, [mask(5), None, mask(300)], **fields)
    assert message.startswith("custom_logit_processor[2]: action_mask: token_ids has 300")


class Opens:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@processors
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_no_pickle_is_loaded(server: Server, endpoint: str, tmp_path: Path) -> None:
    import dill

    path = tmp_path / "unpickled"
    pickled = json.dumps({"callable": dill.dumps(Opens(path)).hex()})
    named = json.dumps({**mask(5), "callable": json.loads(pickled)["callable"]})
    forms = [pickled, [pickled], [pickled, mask(5)], [mask(5), pickled], [[pickled]]]
    for value in [*forms, named, json.loads(pickled), json.dumps([json.loads(pickled)])]:
        for stream in (False, True):
            error_of(server, endpoint, value, stream=stream)
    if endpoint == NATIVE:
        fields = {"input_ids": [PROMPT] * 2}
        error_of(server, endpoint, [None, pickled], **fields)
        # v0.5.23 looks into them for what this asks.
        error_of(server, endpoint, pickled, return_sampling_mask=True)
    assert not path.exists()
    assert "--enable-custom-logit-processor" in error_of(server, endpoint, pickled)


def test_a_path_that_does_not_import_fails_the_start() -> None:
    from sglang.srt.sampling.logit_processors import parse_processor_path

    for value, said in [
        ("mine=json:Mine", "'mine=json:Mine' cannot be imported: AttributeError"),
        ("mine=json:JSONDecoder", "no subclass of CustomLogitProcessor"),
        ("json:JSONDecoder", "has to be NAME=module:Class"),
    ]:
        with pytest.raises(argparse.ArgumentTypeError, match=said):
            parse_processor_path(value)
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", "m"]
    command += ["--logit-processors", "mine=no_such_module:Mine"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0
    assert "'mine=no_such_module:Mine' cannot be imported: ModuleNotFoundError" in result.stderr


def test_packages_register_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.sampling import logit_processors

    def load(*paths: str) -> set[str]:
        monkeypatch.setattr(logit_processors, "_own", {})
        logit_processors.load_logit_processors(SimpleNamespace(logit_processors=paths))
        return set(logit_processors._own)

    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    entry_points = info / "entry_points.txt"
    entry_points.write_text("[sglang.logit_processors]\nmine = testbed.own_processors:Only\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load() == {"mine"}
    assert load("mine=testbed.own_processors:Only", "other=testbed.own_processors:Fails") == {
        "mine",
        "other",
    }
    for path in ("mine=testbed.own_processors:Fails", "action_mask=testbed.own_processors:Only"):
        with pytest.raises(ValueError, match=re.escape(path)):
            load(path)
    entry_points.write_text("[sglang.logit_processors]\nbad = testbed.own_processors:Nothing\n")
    with pytest.raises(ValueError, match="bad=testbed.own_processors:Nothing"):
        load()


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("speculative_algorithm", "EAGLE", "--speculative-algorithm"),
        ("dllm_algorithm", "x", "--dllm-algorithm"),
        ("disaggregation_mode", "decode", "--disaggregation-mode"),
        ("pp_size", 2, "--pp-size"),
    ],
)
def test_servers_that_would_ignore_it_refuse(field: str, value: Any, flag: str) -> None:
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.sampling.logit_processors import prepare_logit_processors

    usual = {"speculative_algorithm": None, "pp_size": 1, "disaggregation_mode": "null"}
    args = {**usual, "dllm_algorithm": None, "enable_custom_logit_processor": False}
    manager = SimpleNamespace(model_config=SimpleNamespace(vocab_size=VOCAB_SIZE))
    for changed in ({}, {field: value}):
        manager.server_args = SimpleNamespace(**{**args, **changed})
        request = GenerateReqInput(input_ids=[5], custom_logit_processor=mask(5))
        if changed:
            with pytest.raises(ValueError, match=flag):
                prepare_logit_processors(request, manager)
        else:
            prepare_logit_processors(request, manager)


def test_strings_of_skyrl() -> None:
    from sglang.srt.sampling.logit_processors import (
        ActionMask,
        DisallowedTokens,
        TemperatureSchedule,
        create_rl_logit_processor,
        parse_rl_logit_processor,
    )

    assert create_rl_logit_processor() is None
    assert create_rl_logit_processor(action_mask=[2, 1]) == "rl_action_mask:2,1"
    assert create_rl_logit_processor(disallowed_tokens=[3]) == "disallowed_tokens:3"
    both = create_rl_logit_processor([1], [3], SCHEDULE)
    assert json.loads(both or "") == [mask(1), mask(3, name="disallowed_tokens"), schedule()]
    for processor in (ActionMask([1, 2]), DisallowedTokens([3]), TemperatureSchedule(1.0, 2.0, 3)):
        text = processor.to_str()
        assert parse_rl_logit_processor(text) == processor
        assert type(processor).from_str(text) == processor
    for text in ("rl_action_mask:", "disallowed_tokens:x", "else:1", '{"callable": "00"}', both):
        assert parse_rl_logit_processor(text or "") is None
    with pytest.raises(ValueError, match="is no disallowed_tokens"):
        DisallowedTokens.from_str("rl_action_mask:1")


token_ids = st.lists(st.integers(0, 19), min_size=1, max_size=4)
entries = st.one_of(
    st.just([]),
    st.builds(lambda drawn: [mask(*drawn)], token_ids),
    st.builds(lambda drawn: [mask(*drawn, name="disallowed_tokens")], token_ids),
    st.builds(lambda drawn: [mask(*drawn), schedule()], token_ids),
    st.just([schedule()]),
)
# Whether requests join or leave, and who they are.
changes = st.one_of(
    st.tuples(st.just("join"), st.lists(entries, min_size=1, max_size=6)),
    st.tuples(st.just("leave"), st.lists(st.booleans(), max_size=12)),
)


@dataclasses.dataclass
class Batch:
    """What of a `SamplingBatchInfo` the processors read, and whose it is."""

    requests: list[Any]
    logit_processors: Any
    temperatures: Any = None

    def __len__(self) -> int:
        return len(self.requests)

    def step(self) -> None:
        """Process logits, and hold the result against each request by itself."""
        if self.logit_processors is None:
            assert not any(request.entry for request in self.requests)
            return
        logits = torch.randn(len(self), 20)
        output = SimpleNamespace(next_token_logits=logits.clone())
        self.temperatures = torch.full((len(self), 1), 0.5)
        lengths = [len(r.origin_input_ids) + len(r.output_ids) for r in self.requests]
        info = self.logit_processors.apply(output, self, torch.tensor(lengths) - 1)
        for index, request in enumerate(self.requests):
            expected, factor = logits[index].clone(), 1.0
            for entry in request.entry:
                params = entry["params"]
                if entry["name"] == "action_mask":
                    banned = [i for i in range(20) if i not in params["token_ids"]]
                    expected[banned] = -math.inf
                elif entry["name"] == "disallowed_tokens":
                    expected[params["token_ids"]] = -math.inf
                else:
                    progress = min(len(request.output_ids) / params["warmup_tokens"], 1)
                    change = params["final_temp"] - params["initial_temp"]
                    factor = params["initial_temp"] + progress * change
            assert torch.equal(output.next_token_logits[index], expected)
            assert info.temperatures[index].item() == pytest.approx(0.5 * factor)
        assert self.temperatures.unique().tolist() == [0.5], "these are the requests'"
        assert not list(output.logit_processor_report.failures())


def request_of(entry: list[dict[str, Any]], number: int) -> Any:
    from sglang.srt.sampling.logit_processors import split_logit_processors

    chain, pickled = split_logit_processors(json.dumps(entry) if entry else None)
    assert pickled is None
    return SimpleNamespace(
        logit_processors=chain,
        entry=entry,
        origin_input_ids=[0] * (number + 3),
        output_ids=[0] * (number * 5),
    )


@given(st.lists(changes, max_size=12), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_batches_change_as_requests_come_and_go(steps: list[Any], max_masks: int) -> None:
    """With little room for masks, and batches that rest while others take it."""
    from sglang.srt.sampling import logit_processor_batch as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_MASKS", max_masks)
        patch.setattr(module, "_tables", {})
        running = Batch([], None)
        batches = [running]
        for what, detail in steps:
            if what == "join":
                requests = [request_of(entry, number) for number, entry in enumerate(detail)]
                new = Batch(requests, module.LogitProcessorBatch.from_reqs(requests))
                # As stock does: the first is extended before it is told.
                extended = Batch(running.requests + requests, running.logit_processors)
                merged = module.LogitProcessorBatch.merge(extended, new)
                running = Batch(extended.requests, merged)
                batches += [new, running]
            else:
                keep = [i for i in range(len(running)) if i >= len(detail) or detail[i]]
                kept = module.LogitProcessorBatch.filter(running, keep)
                running = Batch([running.requests[i] for i in keep], kept)
                batches.append(running)
            for batch in batches[-4:]:
                batch.step()


def test_masks_are_not_kept_for_ever() -> None:
    from sglang.srt.sampling import logit_processor_batch as module

    table = module.MaskTable(4000, torch.device("cpu"))
    for number in range(1000):
        chains = [request_of([mask(number, number + k)], 0).logit_processors for k in range(3)]
        rows = table.find([None, *(chain.mask for chain in chains)])
        assert rows[0] == 0 and not table.rows[0].any()
        for k, row in enumerate(rows[1:]):
            allowed = (~table.rows[row]).nonzero().flatten().tolist()
            assert allowed == sorted({number, number + k})
    assert len(table.rows) <= 2 * module.MAX_MASKS


class Counter(TorchDispatchMode):
    """Counts the operations on tensors."""

    num = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.num += 1
        return func(*args, **(kwargs or {}))


def test_many_masks_take_as_many_operations_as_one() -> None:
    from sglang.srt.sampling import logit_processor_batch as module

    counts = set()
    for num_masks in (1, 16, 128):
        requests = [request_of([mask(i % num_masks), schedule()], 0) for i in range(128)]
        batch = Batch(requests, module.LogitProcessorBatch.from_reqs(requests))
        batch.temperatures = torch.ones(128, 1)
        # The first step brings the masks to the device.
        for _ in range(2):
            output = SimpleNamespace(next_token_logits=torch.zeros(128, 2000))
            positions = torch.zeros(128, dtype=torch.int64)
            with Counter() as counter:
                batch.logit_processors.apply(output, batch, positions)
        counts.add(counter.num)
    assert len(counts) == 1
    assert counts.pop() < 30
