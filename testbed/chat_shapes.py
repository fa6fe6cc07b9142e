"""Chat templates in the shape of those of well-known models, for the tiny tokenizer.

What makes it hard that a turn extends the one before: reasoning of earlier turns is left
out (Qwen3, gpt-oss), contents are trimmed (Llama 3), a turn ends with other tokens than the
model samples (gpt-oss), and tool calls are written in a form of their own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

Calls = list[dict[str, str]]
"""The arguments of each call of `get_weather`."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a model is talked to, and how it talks.

    Attributes:
        special_tokens: Of the tokenizer. The first one is for padding.
        stop_tokens: Those that end a turn of the model. The first is the tokenizer's.
        tokens: Other tokens.
        reasoning_parser: That of a server, where a regex holds beside it.
        tool_call_parser: That of a server.
        say: Write reasoning, text and calls as the model does.
    """

    special_tokens: tuple[str, ...]
    stop_tokens: tuple[str, ...]
    template: str
    say: Callable[[str, str, Calls], str]
    tool_call_parser: str
    tokens: tuple[str, ...] = ()
    reasoning_parser: str = ""


def _call(arguments: dict[str, str], key: str = "arguments") -> str:
    return json.dumps({"name": "get_weather", key: arguments}, ensure_ascii=False)


def _say_qwen3(reasoning: str, text: str, calls: Calls) -> str:
    said = f"<think>\n{reasoning}\n</think>\n\n{text}" if reasoning else text
    for arguments in calls:
        said += f"\n<tool_call>\n{_call(arguments)}\n</tool_call>"
    return said


_QWEN3 = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}
{%- endfor %}{{ '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}
  {%- if m.role == 'assistant' %}
    {%- set content = m.content or '' %}
    {%- set reasoning = m.reasoning_content or '' %}
    {%- if not reasoning and '</think>' in content %}
      {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
      {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\n' }}
    {%- if reasoning and loop.index0 > ns.last %}
      {{- '<think>\n' + reasoning + '\n</think>\n\n' }}
    {%- endif %}
    {{- content }}
    {%- for call in m.tool_calls or [] %}
      {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
      {{- call.function.arguments | tojson }}
      {{- '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
  {%- elif m.role == 'tool' %}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
      {{- '<|im_start|>user' }}
    {%- endif %}
    {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
      {{- '<|im_end|>\n' }}
    {%- endif %}
  {%- else %}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
  {%- if enable_thinking is defined and not enable_thinking %}
    {{- '<think>\n\n</think>\n\n' }}
  {%- endif %}
{%- endif %}
"""


def _say_llama3(reasoning: str, text: str, calls: Calls) -> str:
    if calls:
        written = (_call(arguments, "parameters") for arguments in calls)
        return f"<|python_tag|>{';'.join(written)}"
    return f"{reasoning} So: {text}" if reasoning else text


_LLAMA3 = """
{{- '<|begin_of_text|>' }}
{%- for m in messages %}
  {%- if m.role == 'tool' %}
    {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content | tojson + '<|eot_id|>' }}
  {%- else %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
    {%- if m.tool_calls %}
      {%- for call in m.tool_calls %}
        {{- '{"name": "' + call.function.name + '", "parameters": ' }}
        {{- call.function.arguments | tojson }}
        {{- '}' }}
      {%- endfor %}
    {%- else %}
      {{- m.content | trim }}
    {%- endif %}
    {%- if tools and m.role == 'system' %}{% for tool in tools %}
      {{- '\n' + tool | tojson }}
    {%- endfor %}{% endif %}
    {{- '<|eot_id|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""


def _say_deepseek(reasoning: str, text: str, calls: Calls) -> str:
    said = f"{reasoning} So: {text}" if reasoning else text
    if calls:
        said += "<｜tool▁calls▁begin｜>"
        for arguments in calls:
            said += "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
            said += f"{json.dumps(arguments, ensure_ascii=False)}\n```<｜tool▁call▁end｜>"
        said += "<｜tool▁calls▁end｜>"
    return said


_DEEPSEEK = """
{{- '<｜begin▁of▁sentence｜>' }}
{%- for m in messages %}
  {%- if m.role == 'system' %}
    {{- m.content }}{% for tool in tools or [] %}{{ '\n' + tool | tojson }}{% endfor %}
  {%- elif m.role == 'user' %}
    {{- '<｜User｜>' + m.content }}
    {%- if loop.last or messages[loop.index0 + 1].role == 'assistant' %}{{ '<｜Assistant｜>' }}
    {%- endif %}
  {%- elif m.role == 'assistant' %}
    {{- m.content or '' }}
    {%- if m.tool_calls %}
      {{- '<｜tool▁calls▁begin｜>' }}
      {%- for call in m.tool_calls %}
        {{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name }}
        {{- '\n```json\n' + call.function.arguments | tojson + '\n```<｜tool▁call▁end｜>' }}
      {%- endfor %}
      {{- '<｜tool▁calls▁end｜>' }}
    {%- endif %}
    {{- '<｜end▁of▁sentence｜>' }}
  {%- elif m.role == 'tool' %}
    {%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<｜tool▁outputs▁begin｜>' }}{% endif %}
    {{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
      {{- '<｜tool▁outputs▁end｜>' }}
    {%- endif %}
  {%- endif %}
{%- endfor %}
"""


def _say_gpt_oss(reasoning: str, text: str, calls: Calls) -> str:
    said = f"<|channel|>analysis<|message|>{reasoning}<|end|><|start|>assistant" * bool(reasoning)
    if not calls:
        return f"{said}<|channel|>final<|message|>{text}"
    return said + "<|start|>assistant".join(
        "<|channel|>commentary to=functions.get_weather<|constrain|>json<|message|>"
        f"{json.dumps(arguments, ensure_ascii=False)}<|call|>"
        for arguments in calls
    )


_GPT_OSS = """
{{- '<|start|>system<|message|>You are a tiny model.<|end|>' }}
{%- if tools %}{{ '<|start|>developer<|message|>' }}{% for tool in tools %}
  {{- tool | tojson }}
{%- endfor %}{{ '<|end|>' }}{% endif %}
{%- for m in messages %}
  {%- if m.role == 'assistant' and m.tool_calls %}
    {%- for call in m.tool_calls %}
      {{- '<|start|>assistant to=functions.' + call.function.name }}
      {{- '<|channel|>commentary json<|message|>' + call.function.arguments | tojson }}
      {{- '<|call|>' }}
    {%- endfor %}
  {%- elif m.role == 'assistant' %}
    {{- '<|start|>assistant<|channel|>final<|message|>' + (m.content or '') }}
    {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
  {%- elif m.role == 'tool' %}
    {{- '<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>' }}
    {{- m.content | tojson + '<|end|>' }}
  {%- else %}
    {{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}
"""


SHAPES = {
    "qwen3": Shape(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        ("<|im_end|>",),
        _QWEN3,
        _say_qwen3,
        "qwen",
        ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
        + ("<think>", "</think>"),
        "qwen3",
    ),
    "llama3": Shape(
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ("<|eot_id|>",),
        _LLAMA3,
        _say_llama3,
        "llama3",
    ),
    "deepseek": Shape(
        ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        ("<｜end▁of▁sentence｜>",),
        _DEEPSEEK,
        _say_deepseek,
        "deepseekv3",
        ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>")
        + ("<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>")
        + ("<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
    ),
    "gpt_oss": Shape(
        ("<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|return|>", "<|call|>"),
        ("<|return|>", "<|call|>", "<|endoftext|>"),
        _GPT_OSS,
        _say_gpt_oss,
        "gpt-oss",
        ("<|channel|>", "<|constrain|>"),
        "gpt-oss",
    ),
}
