"""Scripts of the engine, drawn by hypothesis: texts, their cuts, ids, and the order of choices."""

from __future__ import annotations

import re
from typing import Any

from hypothesis import strategies as st

from testbed.scripted import MARK, Plan, Step
from testbed.server import FAILS_ABORTED_STREAMS

WHOLE = re.compile(r"</?think>|</?tool_call>|\[f\(.*?\)]")
FINISH_REASONS: list[dict[str, Any]] = [
    {"type": "stop", "matched": 3},
    {"type": "stop", "matched": "END"},
    {"type": "length", "length": 9},
]
if not FAILS_ABORTED_STREAMS:
    FINISH_REASONS.append({"type": "abort", "message": "Aborted", "status_code": None})


@st.composite
def plans(draw: st.DrawFn, with_tags: bool) -> Plan:
    num_choices = draw(st.sampled_from([1, 1, 2, 3]))
    choices: list[list[Step]] = []
    for index in range(num_choices):
        text = draw(texts(with_tags))
        num_cuts = draw(st.integers(0, 11))
        where = list(range(len(text) + 1))
        if draw(st.booleans()):
            # A tag is often one token, and a step of several ids may have a whole call.
            spans = [match.span() for match in WHOLE.finditer(text)]
            where = [i for i in where if not any(start < i < end for start, end in spans)]
        drawn = draw(st.lists(st.sampled_from(where), min_size=num_cuts, max_size=num_cuts))
        cuts = sorted(drawn)
        steps = []
        position = 0
        for start, end in zip([0, *cuts], [*cuts, len(text)]):
            # A later step may bring nothing but text that was held back.
            size = draw(st.integers(0 if steps else 1, 4))
            ids = [10_000 * index + position + k for k in range(size)]
            position += size
            steps.append(Step(ids, text[start:end]))
        choices.append(steps)
    turns = [index for index, steps in enumerate(choices) for _ in steps]
    order = draw(st.permutations(turns))
    waits = draw(st.lists(st.integers(0, 12), min_size=len(order), max_size=len(order)))
    finish = [draw(st.sampled_from(FINISH_REASONS)) for _ in choices]
    start = draw(st.integers(0, 6))
    reasoning = start, start + draw(st.integers(0, 12))
    return Plan(choices, finish, list(zip(order, waits)), reasoning)


@st.composite
def texts(draw: st.DrawFn, with_tags: bool) -> str:
    """A text of marks, with reasoning and tool calls, possibly cut short."""
    marks = iter(range(MARK, MARK + 10_000))

    def words() -> str:
        size = draw(st.integers(0, 8 if with_tags else 20))
        return "".join(chr(next(marks)) for _ in range(size))

    text = words()
    if with_tags:
        if draw(st.booleans()):
            text = f"<think>{text}</think>{words()}"
        for _ in range(draw(st.integers(0, 2))):
            # As the parsers have it: qwen, pythonic, and the one of required calls.
            form = draw(
                st.sampled_from(
                    [
                        '<tool_call>\n{"name": "f", "arguments": {"a": "@"}}\n</tool_call>',
                        '[f(a="@")]',
                        '[{"name": "f", "parameters": {"a": "@"}}]',
                    ]
                )
            )
            text += form.replace("@", words())
            text += draw(st.sampled_from(["", "\n", words()]))
        if draw(st.booleans()):
            text = text[: draw(st.integers(0, len(text)))]
    return text
