"""What the parsers of a release listen for: its markers, and calls that it understands."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
    },
}
# Stands for words.
WORDS = "@"
_ARGS = '{"a": "@"}'
# As the parser of required and named calls wants them, whatever the model's form is.
REQUIRED_CALL = '[{"name": "f", "parameters": {"a": "@"}}]'
# Which parser understands which of them is found by asking it.
_CALLS = [
    REQUIRED_CALL,
    '<tool_call>\n{"name": "f", "arguments": {"a": "@"}}\n</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": "@"}}</tool_call>',
    '[f(a="@")]',
    f'<|python_tag|>{{"name": "f", "arguments": {_ARGS}}}',
    f'{{"name": "f", "parameters": {_ARGS}}}',
    f'[TOOL_CALLS] [{{"name": "f", "arguments": {_ARGS}}}]',
    f"[TOOL_CALLS]f[ARGS]{_ARGS}",
    '<|tool_call_start|>[f(a="@")]<|tool_call_end|>',
    f'<|action_start|> <|plugin|>\n{{"name": "f", "parameters": {_ARGS}}}<|action_end|>',
    f'<|tools_prefix|>[{{"f": {_ARGS}}}]<|tools_suffix|>',
    f'<|START_ACTION|>[{{"tool_call_id": "0", "tool_name": "f", "parameters": {_ARGS}}}]'
    "<|END_ACTION|>",
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n"
    f"```json\n{_ARGS}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{_ARGS}"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    *(
        f'<｜DSML｜{calls}>\n<｜DSML｜{space}invoke name="f">\n'
        f'<｜DSML｜{space}parameter name="a" string="true">@</｜DSML｜{space}parameter>\n'
        f"</｜DSML｜{space}invoke>\n</｜DSML｜{calls}>"
        for calls, space in [("function_calls", ""), ("tool_calls", ""), (" calls", " ")]
    ),
    '<｜GCML｜tool_calls>\n<｜GCML｜invoke name="f">\n'
    '<｜GCML｜parameter name="a" string="true">@</｜GCML｜parameter>\n'
    "</｜GCML｜invoke>\n</｜GCML｜tool_calls>",
    *(
        f"<{tag}>f{line}<arg_key>a</arg_key>{line}<arg_value>@</arg_value>{line}</{tag}>"
        for tag in ("tool_call", "iquest_tool_call")
        for line in ("\n", "")
    ),
    "<tool_calls>\n<tool_call>f<tool_sep>\n<arg_key>a</arg_key>\n<arg_value>@</arg_value>\n"
    "</tool_call>\n</tool_calls>",
    "<ifm|tool_calls><ifm|tool_call>f<ifm|arg_key>a</ifm|arg_key>"
    "<ifm|arg_value>@</ifm|arg_value></ifm|tool_call></ifm|tool_calls>",
    "<tool_call>\n<function=f>\n<parameter=a>\n@\n</parameter>\n</function>\n</tool_call>",
    "<tool_call>\n<function=f>\n<parameter=a>@</parameter>\n</function>\n</tool_call>",
    '<function name="f"><param name="a">@</param></function>',
    *(
        f'<{tag}>\n<invoke name="f">\n<parameter name="a">@</parameter>\n</invoke>\n</{tag}>'
        for tag in ("minimax:tool_call", "dots_function_call")
    ),
    ']<]minimax[>[<tool_call>\n]<]minimax[>[<invoke name="f">]<]minimax[>[<a>@]<]minimax[>[</a>'
    "]<]minimax[>[</invoke>\n]<]minimax[>[</tool_call>",
    '<|start|>assistant to=f<|message|><atem:function_calls>\n<atem:invoke name="f">\n'
    '<atem:parameter name="a">@</atem:parameter>\n</atem:invoke>\n</atem:function_calls><|eom|>',
    "<｜tool_calls_begin｜>\n<｜tool_call_begin｜>function<｜tool_sep｜>"
    '<steptml:invoke name="f">\n<steptml:parameter name="a">@</steptml:parameter>\n'
    "</steptml:invoke><｜tool_call_end｜>\n<｜tool_calls_end｜>",
    "<|start|>assistant<|channel|>commentary to=functions.f<|constrain|>json"
    f"<|message|>{_ARGS}<|call|>",
    " to=f<|channel|>analysis <|constrain|>xml<|message|>"
    '<rfl:parameter name="a">\n@\n</rfl:parameter><|end|><|start|>assistant',
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0"
    f"<|tool_call_argument_begin|>{_ARGS}<|tool_call_end|><|tool_calls_section_end|>",
    '<|open|>tools<|sep|><|open|>call tool="f" index="1"<|sep|>'
    '<|open|>argument key="a" type="string"<|sep|>@<|close|>argument<|sep|>'
    "<|close|>call<|sep|><|close|>tools<|sep|>",
    f'function call<|role_sep|>\n{{"name": "f", "arguments": {_ARGS}}}',
    f'<|function_call|>{{"name": "f", "arguments": {_ARGS}}}',
    '<|tool_call>call:f{a:<|"|>@<|"|>}<tool_call|>',
    '<|message_model|>f<|content_invoke_tool_json|>{"name": "f", "args": {"a": "@"}}'
    "<|end_message|>",
]


class Dialect(NamedTuple):
    """What a parser listens for."""

    markers: list[str]
    # Of a tool-call parser: calls that it understands.
    calls: list[str]
    # Of a reasoning parser: what is around the thoughts.
    start: str = ""
    end: str = ""


def tool_call_parsers() -> list[str]:
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    return list(FunctionCallParser.ToolCallParserEnum)


def reasoning_parsers() -> list[str]:
    from sglang.srt.parser.reasoning_parser import ReasoningParser

    return list(ReasoningParser.DetectorMap)


def prepare_tokenizer(tokenizer: Any) -> None:
    """Give the tokenizer the template of an answer that parsers may take from a checkpoint."""
    if "response_template" in reasoning_parsers():
        from sglang.srt.parser.beam import BEAM_RESPONSE_TEMPLATE

        tokenizer.response_template = BEAM_RESPONSE_TEMPLATE


@functools.cache
def tool_call_dialect(name: str, tokenizer: Any) -> Dialect:
    from sglang.srt.entrypoints.openai.protocol import Tool
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    def parser() -> Any:
        known = {"tools": [Tool(**TOOL)], "tool_call_parser": name, "tokenizer": tokenizer}
        wanted = inspect.signature(FunctionCallParser).parameters
        return FunctionCallParser(**{key: known[key] for key in wanted if key in known})

    detector = parser().detector
    calls = list(_CALLS)
    with contextlib.suppress(NotImplementedError):
        info = detector.structure_info()("f")
        calls.append(f"{info.begin}{_ARGS}{info.end}")
    understood = []
    for call in calls:
        # A detector may fail at what is not for it.
        with contextlib.suppress(Exception):
            _, items = parser().parse_non_stream(call.replace(WORDS, "x"))
            if any(item.name == "f" and "x" in item.parameters for item in items):
                understood.append(call)
    return Dialect(markers_of(detector), understood)


@functools.cache
def reasoning_dialect(name: str, tokenizer: Any) -> Dialect:
    from sglang.srt.parser.reasoning_parser import ReasoningParser

    wanted = inspect.signature(ReasoningParser).parameters
    more = {"tokenizer": tokenizer} if "tokenizer" in wanted else {}
    detector = ReasoningParser(name, **more).detector
    start = getattr(detector, "think_start_token", "<think>")
    end = getattr(detector, "think_end_token", "</think>")
    return Dialect(markers_of(detector), [], start, end)


def markers_of(detector: Any) -> list[str]:
    """The strings that a detector has, in its attributes or beside its class."""
    found: list[Any] = [vars(detector)]
    for cls in type(detector).__mro__:
        if cls.__module__.startswith("sglang."):
            found += [vars(cls), vars(sys.modules[cls.__module__])]
    texts = [text for names in found for text in _texts({**names})]
    markers = dict.fromkeys(marker for text in texts for marker in _markers_in(text))
    return list(markers)


def _texts(value: Any, depth: int = 0) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, re.Pattern):
        yield value.pattern if isinstance(value.pattern, str) else ""
    elif depth < 5 and isinstance(value, dict):
        for key, item in value.items():
            if not str(key).startswith("__"):
                yield from _texts(item, depth + 1)
    elif depth < 5 and isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _texts(item, depth + 1)


def _markers_in(text: str) -> Iterable[str]:
    if not re.search(r"\\|\(\?|\.\*", text):
        return [text] if len(text) < 50 and re.search(r"[^\w\s.,:/-]", text) else []
    # A regular expression: what is in it between brackets, and has no other ones.
    text = re.sub(r"\(\?P<\w+>", "(", text).replace("\\", "")
    return re.findall(r"</?[^\s<>()*?+^\[\]]+>|\[[A-Z_]+\]", text)
