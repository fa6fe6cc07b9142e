"""What arrives whole in the last chunk of a stream is sent, as it is without streaming.

python test/registered/unit/function_call/test_stream_last_chunk.py
"""

import json
import unittest

from sglang.srt.entrypoints.openai.protocol import Function, Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=5, suite="base-a-test-cpu")

TOOL = Tool(
    type="function",
    function=Function(
        name="f",
        parameters={"type": "object", "properties": {"a": {"type": "string"}}},
    ),
)
# A call of f with the value %s.
CALLS = {
    "glm45": "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>%s</arg_value>\n</tool_call>",
    "glm47": "<tool_call>f<arg_key>a</arg_key><arg_value>%s</arg_value></tool_call>",
    "hermes": '<tool_call>{"name": "f", "arguments": {"a": "%s"}}</tool_call>',
    "llama3": '<|python_tag|>{"name": "f", "arguments": {"a": "%s"}}',
    "mistral": '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "%s"}}]',
    "qwen25": '<tool_call>\n{"name": "f", "arguments": {"a": "%s"}}\n</tool_call>',
    "trinity": '<tool_call>\n{"name": "f", "arguments": {"a": "%s"}}\n</tool_call>',
    "deepseekv3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n"
        '```json\n{"a": "%s"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    ),
}
# Several calls in one answer follow each other in these.
SEVERAL = ["glm45", "glm47", "llama3", "qwen25", "trinity"]


def stream(name, chunks):
    """Return the text and the calls that a client joins from a stream."""
    parser = FunctionCallParser([TOOL], name)
    results = [parser.parse_stream_chunk(chunk) for chunk in chunks]
    results.append(parser.parse_stream_end())
    calls = {}
    for item in (item for _, items in results for item in items):
        call = calls.setdefault(item.tool_index, ["", ""])
        call[0] += item.name or ""
        call[1] += item.parameters or ""
    text = "".join(text or "" for text, _ in results)
    return text, [(name, json.loads(arguments)) for name, arguments in calls.values()]


class TestStreamLastChunk(CustomTestCase):
    def test_a_call_in_one_chunk_has_its_arguments(self):
        for name, call in CALLS.items():
            with self.subTest(parser=name):
                _, calls = stream(name, [call % "x"])
                self.assertEqual(calls, [("f", {"a": "x"})])

    def test_no_call_is_lost(self):
        expected = [("f", {"a": value}) for value in "xyz"]
        for name in SEVERAL:
            text = "\n".join(CALLS[name] % value for value in "xyz")
            with self.subTest(parser=name):
                self.assertEqual(stream(name, [text])[1], expected)
                self.assertEqual(stream(name, [text[:5], text[5:]])[1], expected)

    def test_text_after_a_call_is_sent(self):
        for name in ("glm45", "glm47", "llama3", "mistral"):
            with self.subTest(parser=name):
                text, calls = stream(name, [CALLS[name] % "x" + " Bye."])
                self.assertEqual(calls, [("f", {"a": "x"})])
                self.assertEqual(text, " Bye.")

    def test_text_alone_is_sent_once(self):
        for name in CALLS:
            with self.subTest(parser=name):
                self.assertEqual(stream(name, ["Hello."]), ("Hello.", []))


if __name__ == "__main__":
    unittest.main()
