"""What the tool-call parsers make of answers whose parts are known: upstream/parsers.md.

    build/env-v0.5.23/bin/python -m testbed.parser_answers

Each answer is made of text, calls and cut markers, so what is right is known without asking a
parser. It is parsed as a whole, as a stream by token, and as a stream in one chunk, which is what
a client gets whose chunks were joined; once by stock and once by stock with all pull requests.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from testbed.dialects import (
    REQUIRED_CALL,
    TOOL,
    WORDS,
    prepare_tokenizer,
    tool_call_dialect,
    tool_call_parsers,
)
from tools.common import BUILD, ROOT

TARGET = ROOT / "upstream" / "parsers.md"
# Not the first tool: where its position is taken for the number of a call, it shows.
OTHER = {"type": "function", "function": {"name": "g", "parameters": {"type": "object"}}}
WAYS = ["whole", "by token", "in one chunk"]
# What an argument looks like, to be left out of a call.
ARGUMENTS = [
    (r'\{"a": "@"\}', "{}"),
    (r'a="@"|a:<\|"\|>@<\|"\|>', ""),
    (r"\]<\]minimax\[>\[<a>@\]<\]minimax\[>\[</a>", ""),
    (r"<\|open\|>argument.*<\|close\|>argument<\|sep\|>", ""),
    (r"<(?:ifm\|)?arg_key>.*@\n?</(?:ifm\|)?arg_value>\n?", ""),
    (r"<[^<>]*param[^<>]*>\n?@\n?</[^<>]*param[^<>]*>\n?", ""),
]


class Answer(NamedTuple):
    """An answer of a model, and what is right to make of it."""

    kind: str
    text: str
    content: str
    calls: list[dict[str, Any]]


class Parsed(NamedTuple):
    """What a parser made of an answer: text, and the name and arguments of each call."""

    content: str
    calls: list[list[Any]]


def answers(call: str, marker: str) -> Iterator[Answer]:
    """Make answers in the form of a parser.

    Args:
        call: With a place for words as the value of its argument.
        marker: What opens a call, or nothing where that is not known.
    """
    x, y = ({"a": value} for value in "xy")
    one, two = (call.replace(WORDS, value) for value in "xy")
    yield Answer("a call", one, "", [x])
    yield Answer("two calls", f"{one}\n{two}", "", [x, y])
    yield Answer("text, a call, text", f"Hi. {one} Bye.", "Hi.Bye.", [x])
    for pattern, replacement in ARGUMENTS:
        bare = re.sub(pattern, replacement, call, flags=re.DOTALL)
        if bare != call:
            yield Answer("a call without arguments", bare, "", [{}])
            break
    if marker:
        yield Answer("cut after a marker", marker, marker, [])
        yield Answer("cut in a marker", f"Hi. {marker[:-2]}", f"Hi. {marker[:-2]}", [])


def make_parser(name: str, tokenizer: Any) -> Any:
    from sglang.srt.entrypoints.openai.protocol import Tool
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    tools = [Tool(**OTHER), Tool(**TOOL)]
    known = {"tools": tools, "tool_call_parser": name, "tokenizer": tokenizer}
    wanted = inspect.signature(FunctionCallParser).parameters
    return FunctionCallParser(**{key: known[key] for key in wanted if key in known})


def arguments_of(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse_whole(parser: Any, text: str) -> Parsed:
    """Parse as the chat handler does without streaming."""
    content, calls = parser.parse_non_stream(text) if parser.has_tool_call(text) else (text, [])
    return Parsed(content, [[call.name, arguments_of(call.parameters)] for call in calls])


def parse_stream(parser: Any, pieces: list[str]) -> Parsed:
    """Parse as the chat handler does in a stream, and join what is sent as a client does."""
    results = [parser.parse_stream_chunk(piece) for piece in pieces]
    results.append(parser.parse_stream_end())
    calls: dict[int, list[str]] = {}
    for item in (item for _, items in results for item in items):
        call = calls.setdefault(item.tool_index, ["", ""])
        call[0] += item.name or ""
        call[1] += item.parameters or ""
    # What the handler sends of the last call when its parser has not sent all.
    detector = parser.detector
    last = len(detector.prev_tool_call_arr) - 1
    if 0 <= last < len(detector.streamed_args_for_tool) and last in calls:
        wanted = detector.prev_tool_call_arr[last].get("arguments", {})
        wanted = wanted if isinstance(wanted, str) else json.dumps(wanted, ensure_ascii=False)
        sent = detector.streamed_args_for_tool[last]
        calls[last][1] += wanted[len(sent) :] if wanted.startswith(sent) else ""
    content = "".join(text or "" for text, _ in results)
    return Parsed(content, [[name, arguments_of(text)] for name, text in calls.values()])


def tokens_of(text: str) -> list[str]:
    """Cut a text as a tokenizer does that has the markers as tokens."""
    return re.findall(r"<[^<>\s]+>|\[[A-Z_]+\]?|.", text, re.DOTALL)


def parse(parser: Any, text: str, way: str) -> Parsed:
    if way == "whole":
        return parse_whole(parser, text)
    return parse_stream(parser, tokens_of(text) if way == "by token" else [text])


def wrongs() -> Iterator[tuple[str, str, str, str, dict[str, str]]]:
    """Yield parser, kind, answer, what is right, and what each way of parsing makes instead."""
    from transformers import AutoTokenizer

    from testbed.tiny_model import tiny_model_path

    logging.disable(logging.CRITICAL)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
    prepare_tokenizer(tokenizer)
    seen = set()
    for name in tool_call_parsers():
        detector = type(make_parser(name, tokenizer).detector)
        if detector in seen:
            continue
        seen.add(detector)
        dialect = tool_call_dialect(name, tokenizer)
        calls = [call for call in dialect.calls if call != REQUIRED_CALL]
        marker = getattr(make_parser(name, tokenizer).detector, "bot_token", "")
        # A detector may understand the form of another as well.
        call = next((call for call in calls if marker and call.startswith(marker)), calls[0])
        for answer in answers(call, marker if call.startswith(marker) else ""):
            right = Parsed(answer.content, [["f", call] for call in answer.calls])
            ways = {}
            for way in WAYS:
                parsed = parse(make_parser(name, tokenizer), answer.text, way)
                if not is_same(parsed, right):
                    ways[way] = shown(parsed)
            yield name, answer.kind, answer.text, shown(right), ways


def is_same(left: Parsed, right: Parsed) -> bool:
    """Compare but for white space, which is not what is wrong here."""
    texts = ["".join(parsed.content.split()) for parsed in (left, right)]
    return texts[0] == texts[1] and left.calls == right.calls


def shown(parsed: Parsed) -> str:
    calls = [f"{name}({json.dumps(arguments)})" for name, arguments in parsed.calls]
    return " ".join([json.dumps(parsed.content, ensure_ascii=False), *calls])


def run_in(tree: Path) -> list[Any]:
    """Return what `wrongs` yields with the SGLang of a tree."""
    env = {**os.environ, "PYTHONPATH": str(tree), "SGLANG_USE_CPU_ENGINE": "1"}
    command = [sys.executable, "-m", "testbed.parser_answers", "--json"]
    found: list[Any] = json.loads(subprocess.check_output(command, cwd=ROOT, env=env))
    return found


def cell(text: str) -> str:
    """Write something as code in a cell of a table."""
    return "`" + text.replace("\n", "⏎").replace("|", "\\|") + "`"


def table() -> str:
    from tools.check_pull_requests import make_pristine
    from tools.pull_requests import BASE, folders, git, write_pull_requests
    from tools.releases import load_release

    release = load_release(BASE)
    stock = run_in(BUILD / f"stock-{BASE}")
    with tempfile.TemporaryDirectory() as scratch:
        written, tree = Path(scratch) / "written", Path(scratch) / "tree"
        write_pull_requests(release, written)
        make_pristine(release, tree)
        for folder in folders():
            git(tree, "am", "--quiet", str(written / f"{folder.name}.mbox"))
        mended = run_in(tree / "python")
    rows = []
    counts = [0, 0]
    for (name, kind, text, right, ways), (*_, after) in zip(stock, mended, strict=True):
        counts[0] += len(ways)
        counts[1] += len(ways.keys() - after.keys())
        cells = ["right" if way not in ways else cell(ways[way]) for way in WAYS]
        for i, way in enumerate(WAYS):
            if way in ways and way not in after:
                cells[i] += " **mended**"
        if ways:
            rows.append(f"| {name} | {kind} | {cell(text)} | {cell(right)} | {' | '.join(cells)} |")
    return f"""# What the tool-call parsers of {BASE} get wrong

Made by `build/env-{BASE}/bin/python -m testbed.parser_answers`: answers whose parts are known,
parsed by stock as a whole, as a stream by token, and as a stream in one chunk. White space is not
compared. Of {3 * len(stock)} results {counts[0]} are wrong. With the pull requests here
{counts[1]} of these are right (**mended**).

That a marker is text after which an answer was cut is the view of #35565. Several parsers drop it
on purpose, and a text before it is kept by most.

| parser | answer | as text | right | {" | ".join(WAYS)} |
|---|---|---|---|{"---|" * len(WAYS)}
""" + "".join(f"{row}\n" for row in rows)


def main() -> int:
    if "--json" in sys.argv[1:]:
        print(json.dumps(list(wrongs())))
    else:
        TARGET.write_text(table())
        print(TARGET)
    return 0


if __name__ == "__main__":
    sys.exit(main())
