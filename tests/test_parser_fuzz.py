"""Every parser of a release: a stream with ids is the stream without, and the ids.

Texts are drawn in the markers of the parsers, whole and broken, and cut into steps of a
scripted engine. The same script is served twice, to a request that does not ask for ids
and to one that does. Without the ids the two streams have to be equal, event by event,
also where the release itself fails at a text; the ids have to be those of the engine, and
log-probabilities, where they are asked for, those of the ids. With several choices, the
streams have to be equal choice by choice: which of them wakes first is up to the event loop.

    make test ARGS="-k parser_fuzz --fuzz-seconds=1800 --fuzz-seed=7"
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from testbed.dialects import (
    REQUIRED_CALL,
    TOOL,
    WORDS,
    Dialect,
    prepare_tokenizer,
    reasoning_dialect,
    reasoning_parsers,
    tool_call_dialect,
    tool_call_parsers,
)
from testbed.scripted import (
    DONE,
    MARK,
    PROMPT_IDS,
    Plan,
    Serving,
    Step,
    Stream,
    logprobs_of,
    marks_in,
    num_ids_behind,
    serve,
    without_ids,
)
from testbed.server import CUTS_INCREMENTAL_COMPLETIONS, INCREMENTAL

# So many take about a minute in all, and every pair of parsers has its turn.
NUM_CASES = 2200
RESPONSE_FORMATS = [
    {"type": "text"},
    {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
]
MAX_FAILURES = 5
MAX_SHRINKING = 400
FINISH_REASONS = [
    {"type": "stop", "matched": 3},
    {"type": "stop", "matched": "END"},
    {"type": "length", "length": 9},
    {"type": "abort", "message": "Aborted", "status_code": None},
]


@dataclasses.dataclass
class Case:
    """A request, and what the engine puts out for it."""

    tool_call_parser: str | None
    reasoning_parser: str | None
    is_chat: bool
    fields: dict[str, Any]
    # How many ids and which text a step has, and how often the event loop runs before it.
    steps: list[tuple[int, str, int]]
    finish: dict[str, Any]
    # The steps of further choices.
    others: list[list[tuple[int, str, int]]] = dataclasses.field(default_factory=list)

    @property
    def with_logprobs(self) -> bool:
        return bool(self.fields.get("logprobs"))

    def plan(self) -> Plan:
        ids = itertools.count(1000)
        choices = [self.steps, *self.others]
        # Each has a step in turn.
        turns = [
            (index, steps[position][2])
            for position in range(max(map(len, choices)))
            for index, steps in enumerate(choices)
            if position < len(steps)
        ]
        steps = [
            [Step([next(ids) for _ in range(size)], text) for size, text, _ in steps]
            for steps in choices
        ]
        return Plan(steps, [self.finish] * len(choices), turns, (2, 12))

    def request(self, **more: Any) -> Any:
        from sglang.srt.entrypoints.openai.protocol import (
            ChatCompletionRequest,
            CompletionRequest,
        )

        fields = {"model": "m", "stream": True, "n": 1 + len(self.others), **self.fields, **more}
        if not self.is_chat:
            return CompletionRequest(prompt=PROMPT_IDS, **fields)
        messages = [{"role": "user", "content": "hi"}]
        if fields.get("continue_final_message"):
            messages.append({"role": "assistant", "content": "Well,"})
        return ChatCompletionRequest(messages=messages, **fields)


class Drawer:
    """Draws cases for a pair of parsers."""

    def __init__(self, rng: random.Random, calls: Dialect, thoughts: Dialect, others: list[str]):
        self.rng = rng
        self.calls = calls
        self.thoughts = thoughts
        self.others = others
        self.marks = iter(range(MARK, MARK + 0x300))

    def draw(self, tool_call_parser: str | None, reasoning_parser: str | None) -> Case:
        is_chat = self.rng.random() < 0.95
        fields = self.fields() if is_chat else {}
        if self.rng.random() < 0.2:
            fields.update({"logprobs": True, "top_logprobs": 2} if is_chat else {"logprobs": 2})
        if self.rng.random() < 0.4:
            usage = self.rng.random() < 0.7
            fields["stream_options"] = {"include_usage": True, "continuous_usage_stats": usage}
        text = self.text(fields.get("tool_choice"))
        finish = self.rng.choice(FINISH_REASONS)
        steps = self.steps(text, finish)
        others = []
        if self.rng.random() < 0.15:
            texts = [self.text(fields.get("tool_choice")) for _ in range(self.rng.randint(1, 2))]
            others = [self.steps(text, finish) for text in texts]
        return Case(tool_call_parser, reasoning_parser, is_chat, fields, steps, finish, others)

    def fields(self) -> dict[str, Any]:
        from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

        rng = self.rng
        fields: dict[str, Any] = {}
        if rng.random() < 0.8:
            fields["tools"] = [TOOL]
            named = {"type": "function", "function": {"name": "f"}}
            choice = rng.choice([None, None, None, "auto", "none", "required", named])
            if choice is not None:
                fields["tool_choice"] = choice
        if rng.random() < 0.2:
            fields["separate_reasoning"] = False
        if rng.random() < 0.3:
            fields["stream_reasoning"] = False
        arguments = {
            name: rng.random() < 0.6
            for name in ("enable_thinking", "thinking", "force_nonempty_content")
            if rng.random() < 0.25
        }
        if rng.random() < 0.1:
            arguments["thinking_mode"] = "enabled"
        if arguments:
            fields["chat_template_kwargs"] = arguments
        if rng.random() < 0.2:
            fields["reasoning_effort"] = rng.choice(["low", "high"])
        if rng.random() < 0.05:
            fields["continue_final_message"] = True
        if rng.random() < 0.1:
            fields["response_format"] = rng.choice(RESPONSE_FORMATS)
        # In later releases.
        name = "return_output_ids_in_sglext"
        if name in ChatCompletionRequest.model_fields and rng.random() < 0.1:
            fields[name] = True
        return fields

    def words(self, most: int = 6) -> str:
        """Words, each with a character that occurs once, or none, or what looks special."""
        words = []
        for _ in range(self.rng.randint(0, most)):
            mark = chr(next(self.marks, MARK))
            word = self.rng.choice(["", "", "a", "the ", "42", "é", "🙂", "{", '"', "<", "[", ", "])
            words.append(mark + word if self.rng.random() < 0.7 else word)
        return "".join(words)

    def call(self, is_forced: bool) -> str:
        calls = [REQUIRED_CALL] if is_forced and self.rng.random() < 0.6 else self.calls.calls
        call = self.rng.choice(calls or [REQUIRED_CALL])
        # In JSON: no quotes, and not only what the parser holds back.
        words = self.words(3).replace('"', "").replace("<", "")
        return call.replace(WORDS, words or "x")

    def marker(self) -> str:
        sources = [self.calls.markers, self.thoughts.markers, self.others]
        return self.rng.choice(self.rng.choice([source for source in sources if source]))

    def text(self, tool_choice: Any) -> str:
        rng = self.rng
        is_forced = tool_choice not in (None, "auto", "none")
        parts = []
        if rng.random() < 0.6:
            # Some models start inside of their thoughts, some do not get out of them.
            start = self.thoughts.start if rng.random() < 0.7 else ""
            end = self.thoughts.end if rng.random() < 0.8 else ""
            inner = self.marker() if rng.random() < 0.1 else ""
            parts += [start, self.words(), inner, self.words(3), end]
        for _ in range(rng.randint(0, 4)):
            kind = rng.random()
            if kind < 0.35:
                parts.append(self.call(is_forced))
            elif kind < 0.5:
                parts.append(self.marker())
            elif kind < 0.6:
                parts.append(rng.choice(["\n", "\n\n", " "]))
            else:
                parts.append(self.words())
        text = "".join(parts)
        if text and rng.random() < 0.3:
            # Broken: cut short, or without a part in the middle.
            start = rng.randrange(len(text))
            text = text[:start] + ("" if rng.random() < 0.6 else text[start + rng.randint(1, 9) :])
        return text

    def steps(self, text: str, finish: dict[str, Any]) -> list[tuple[int, str, int]]:
        rng = self.rng
        if len(text) < 150 and rng.random() < 0.3:
            pieces = list(text)
        else:
            cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 14)))
            pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)])]
        if finish["type"] == "stop" or not pieces:
            # The token that ends the answer has no text, like one in the middle of a character.
            pieces.append("")
        waits = rng.choice([[0], [6], [0, 1, 2, 4, 8]])
        # A step may bring nothing but text that was held back.
        sizes = rng.choice([[1], [1, 1, 1, 2, 0], [1, 2, 3, 4]])
        steps = [(rng.choice(sizes), piece, rng.choice(waits)) for piece in pieces]
        return [(max(steps[0][0], 1), *steps[0][1:]), *steps[1:]]


class Fuzz:
    """Compares streams with and without ids of one server."""

    def __init__(self, serving: Serving, seed: int):
        self.serving = serving
        self.seed = seed
        self.tokenizer = serving.handlers.manager.tokenizer
        prepare_tokenizer(self.tokenizer)
        self.counts: Counter[str] = Counter()
        self.pairs: set[tuple[str | None, str | None]] = set()
        self.failures: list[str] = []
        # Tool-call parsers that need a package which is not here, and what they say then.
        self.not_served: dict[str, str] = {}
        self.tools_seen: set[str | None] = set()
        self.thoughts_seen: set[str | None] = set()
        self.used: tuple[str | None, str | None] = (None, None)
        self.calls = {name: tool_call_dialect(name, self.tokenizer) for name in tool_call_parsers()}
        self.thoughts = {
            name: reasoning_dialect(name, self.tokenizer) for name in reasoning_parsers()
        }
        dialects = [*self.calls.values(), *self.thoughts.values()]
        self.others = sorted({marker for dialect in dialects for marker in dialect.markers})

    def cases(self) -> Iterator[Case]:
        """Draw cases without end: round by round, one for every pair of parsers."""
        pairs = list(itertools.product([None, *self.calls], [None, *self.thoughts]))
        for number in itertools.count():
            order = random.Random(f"{self.seed}/{number}")
            order.shuffle(pairs)
            for tool_call_parser, reasoning_parser in pairs:
                # Of its own, so that a case does not depend on how the ones before were drawn.
                rng = random.Random(f"{self.seed}/{number}/{tool_call_parser}/{reasoning_parser}")
                # Without a parser, markers are text.
                calls = self.calls[tool_call_parser or rng.choice(list(self.calls))]
                thoughts = self.thoughts[reasoning_parser or rng.choice(list(self.thoughts))]
                drawer = Drawer(rng, calls, thoughts, self.others)
                yield drawer.draw(tool_call_parser, reasoning_parser)

    def run(self, goes_on: Callable[[int, float], bool]) -> None:
        start = time.monotonic()
        for number, case in enumerate(self.cases()):
            if not goes_on(number, time.monotonic() - start):
                return
            self.check(case)
            if len(self.failures) == MAX_FAILURES:
                return

    def check(self, case: Case) -> None:
        if CUTS_INCREMENTAL_COMPLETIONS and self.serving.is_incremental and not case.is_chat:
            logprobs = {"logprobs": True, "top_logprobs": 2} if case.with_logprobs else {}
            fields = {**case.fields, **logprobs}
            case = dataclasses.replace(case, is_chat=True, fields=fields)
        try:
            self.use_parsers(case)
        except ImportError as error:
            self.not_served[str(case.tool_call_parser)] = str(error)
            return
        self.pairs.add((case.tool_call_parser, case.reasoning_parser))
        self.counts["streams"] += 1
        found = self.difference(case, count=True)
        if found:
            case = self.shrunk(case)
            self.failures.append(f"{self.difference(case) or found}\n{case!r}")

    def use_parsers(self, case: Case) -> None:
        pair = case.tool_call_parser, case.reasoning_parser
        if pair != self.used:
            self.serving.handlers = self.serving.handlers.with_parsers(*pair)
            self.used = pair

    def difference(self, case: Case, count: bool = False) -> str:
        """Serve a case without ids and with, and say where the streams differ, if they do."""
        self.use_parsers(case)
        plan = case.plan()
        # With log-probabilities, stock sends chunks that have nothing else. What they say is on
        # the next chunk of a stream with ids.
        names = {"logprobs", "top_logprobs"}
        fields = {name: value for name, value in case.fields.items() if name not in names}
        plain = self.serving.stream(dataclasses.replace(case, fields=fields).request(), plan)
        asking = self.serving.stream(case.request(return_token_ids=True), plan)
        if count:
            self.count(case, plain)
        if case.others:
            if has_failed(plain) or has_failed(asking):
                # How far the others have come by then depends on who wakes first.
                equal = has_failed(plain) == has_failed(asking)
                return "" if equal else "one of the streams fails, and the other does not"
            pairs = zip(by_choice(case, plain), by_choice(case, asking), strict=True)
        else:
            pairs = zip([comparable(case, plain)], [comparable(case, asking)], strict=True)
        for index, (expected, got) in enumerate(pairs):
            for position, (left, right) in enumerate(itertools.zip_longest(expected, got)):
                if left != right:
                    where = f"event {position}" + (f" of choice {index}" if case.others else "")
                    return f"{where}\n  without ids: {left}\n  with ids:    {right}"
        return self.wrong_ids(case, plan, asking)

    def wrong_ids(self, case: Case, plan: Plan, stream: Stream) -> str:
        """Say what is wrong with the ids of a stream, if anything is."""
        sent: list[list[int]] = [[] for _ in plan.choices]
        is_failed = bool(stream.error)
        for position, event in enumerate(stream.events):
            if event == DONE:
                continue
            is_failed |= "error" in event
            is_first = position == 0
            if case.is_chat and ("prompt_token_ids" in event) != is_first and not is_failed:
                return f"event {position}: the prompt ids belong on the first chunk"
            for choice in event.get("choices", ()):
                ids = choice.get("token_ids", [])
                if "token_ids" in choice and not ids:
                    return f"event {position} has an empty list of ids"
                if case.with_logprobs:
                    expected_logprobs = [(-float(i), [-float(i), -float(i) - 0.5]) for i in ids]
                    if logprobs_of(choice) != expected_logprobs:
                        return f"event {position}: {logprobs_of(choice)} for the ids {ids}"
                index = choice["index"]
                sent[index] += ids
                for mark in marks_in(choice):
                    if len(sent[index]) < num_ids_behind(plan, index, mark):
                        return f"event {position}: an id is later than text made from it"
        for index, ids in enumerate(sent):
            expected = plan.ids(index)
            if ids != (expected[: len(ids)] if is_failed else expected):
                return f"ids of choice {index}\n  of the engine: {expected}\n  sent:          {ids}"
        return ""

    def count(self, case: Case, plain: Stream) -> None:
        self.counts["with logprobs"] += case.with_logprobs
        self.counts["with several choices"] += bool(case.others)
        if has_failed(plain):
            self.counts["failing"] += 1
        for event in plain.events:
            for choice in () if event == DONE else event.get("choices", ()):
                delta = choice.get("delta") or {}
                if delta.get("tool_calls"):
                    self.tools_seen.add(case.tool_call_parser)
                if delta.get("reasoning_content"):
                    self.thoughts_seen.add(case.reasoning_parser)

    def shrunk(self, case: Case) -> Case:
        """Make a failing case smaller for as long as it fails, step by step."""
        num_tries = 0
        is_smaller = True
        while is_smaller:
            is_smaller = False
            for smaller in smaller_cases(case):
                num_tries += 1
                if num_tries > MAX_SHRINKING:
                    return case
                if self.difference(smaller):
                    case, is_smaller = smaller, True
                    break
        return case

    def num_pairs(self) -> int:
        """How many pairs of parsers can be served here."""
        return (len(self.calls) - len(self.not_served) + 1) * (len(self.thoughts) + 1)

    def summary(self) -> str:
        unseen = sorted({*self.calls, *self.thoughts} - self.tools_seen - self.thoughts_seen)
        not_served = "".join(f"\n{x}: {error}" for x, error in sorted(self.not_served.items()))
        return (
            f"{self.counts['streams']} streams compared, {self.counts['failing']} of which the "
            f"release itself fails at, {self.counts['with logprobs']} with log-probabilities, "
            f"{self.counts['with several choices']} with several choices; {len(self.pairs)} of "
            f"{self.num_pairs()} pairs of parsers; "
            f"calls seen from {len(self.tools_seen - {None})} of {len(self.calls)} and reasoning "
            f"from {len(self.thoughts_seen - {None})} of {len(self.thoughts)}; seed {self.seed}"
            f"{', nothing from ' if unseen else ''}{', '.join(unseen)}{not_served}"
        )


def smaller_cases(case: Case) -> Iterator[Case]:
    replace = dataclasses.replace
    steps = case.steps
    for i in range(len(case.others)):
        yield replace(case, others=[*case.others[:i], *case.others[i + 1 :]])
    size = len(steps) // 2
    while size:
        for start in range(0, len(steps) - size + 1, size):
            yield replace(case, steps=steps[:start] + steps[start + size :])
        size //= 2
    for name in case.fields:
        yield replace(case, fields={k: v for k, v in case.fields.items() if k != name})
    for i, (first, second) in enumerate(itertools.pairwise(steps)):
        joined = (first[0] + second[0], first[1] + second[1], first[2])
        yield replace(case, steps=[*steps[:i], joined, *steps[i + 2 :]])
    for i, (num_ids, text, wait) in enumerate(steps):
        for half in (text[: len(text) // 2], text[len(text) // 2 :], text[:-1], text[1:]):
            if len(half) < len(text):
                yield replace(case, steps=[*steps[:i], (num_ids, half, wait), *steps[i + 1 :]])
    plain = [(min(num_ids, 1), text, 6) for num_ids, text, _ in steps]
    if plain != steps:
        yield replace(case, steps=plain)


def has_failed(stream: Stream) -> bool:
    is_error = any(event != DONE and "error" in event for event in stream.events)
    return bool(stream.error) or is_error


def comparable(case: Case, stream: Stream) -> list[Any]:
    """The events of a stream and what ended it, without ids and log-probabilities."""
    return [*(bare(event, case.with_logprobs) for event in stream.events), stream.error]


def by_choice(case: Case, stream: Stream) -> list[list[Any]]:
    """The events of each choice, and in the end those that belong to none."""
    lists: list[list[Any]] = [[] for _ in range(2 + len(case.others))]
    for event in comparable(case, stream)[:-1]:
        index = -1
        if event != DONE and event.get("choices"):
            index = event["choices"][0]["index"]
            # It says what all choices have had by then.
            event.pop("usage", None)
        lists[index].append(event)
    return lists


def bare(event: Any, with_logprobs: bool) -> Any:
    if event == DONE:
        return event
    event = without_ids(event)
    if with_logprobs:
        # Where stock sends none, and whose alternatives it sends, is its own affair.
        for choice in event.get("choices", ()):
            choice.pop("logprobs", None)
    return event


# Once, a stream with ids lost or doubled text in these.
ONCE_WRONG = [
    Case(
        "hermes",
        "ling3",
        True,
        {"tools": [TOOL]},
        [(1, "The answer", 6), (1, " is", 6), (1, " 42", 6), (1, "", 6)],
        FINISH_REASONS[0],
    ),
]


@pytest.fixture(scope="module", params=["cumulative", "incremental"])
def fuzz(request: pytest.FixtureRequest) -> Iterator[Fuzz]:
    flags = ["--enable-cache-report"]
    if request.param == "incremental":
        flags.append(INCREMENTAL)
    with serve(*flags) as serving:
        # Parsers tell at length what they do not understand.
        logging.disable(logging.CRITICAL)
        yield Fuzz(serving, request.config.getoption("--fuzz-seed"))
        logging.disable(logging.NOTSET)


def test_calls_of_every_parser_are_drawn(fuzz: Fuzz) -> None:
    """A parser of a new release has a form of calls that is not in the list yet."""
    unknown = [name for name, dialect in fuzz.calls.items() if not dialect.calls]
    assert not unknown, f"testbed/dialects.py has no call that {unknown} understand"


@pytest.mark.clause("C2", "C3", "C4", "C7", "C11")
@pytest.mark.parametrize(
    "case", ONCE_WRONG, ids=lambda case: f"{case.tool_call_parser}-{case.reasoning_parser}"
)
def test_streams_that_were_wrong_once(fuzz: Fuzz, case: Case) -> None:
    if case.tool_call_parser not in fuzz.calls or case.reasoning_parser not in fuzz.thoughts:
        pytest.skip("the release does not have these parsers")
    difference = fuzz.difference(case)
    assert not difference, difference


@pytest.mark.clause("C2", "C3", "C4", "C7", "C11")
def test_a_stream_with_ids_is_the_one_without(
    fuzz: Fuzz, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = request.config.getoption("--fuzz-seconds")
    if seconds is None:
        fuzz.run(lambda number, _: number < NUM_CASES)
    else:
        # Half of them for each of the two servers.
        fuzz.run(lambda _, elapsed: elapsed < seconds / 2)
    with capsys.disabled():
        print(f"\n{fuzz.summary()}")
    if fuzz.failures:
        pytest.fail("\n\n".join([fuzz.summary(), *fuzz.failures]), pytrace=False)
    if seconds is None:
        assert len(fuzz.pairs) == fuzz.num_pairs(), fuzz.summary()
