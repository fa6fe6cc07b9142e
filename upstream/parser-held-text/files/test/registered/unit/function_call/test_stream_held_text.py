"""Text that was held back for a marker is sent when the stream ends without one.

python test/registered/unit/function_call/test_stream_held_text.py
"""

import unittest

from sglang.srt.entrypoints.openai.protocol import Function, Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=5, suite="base-a-test-cpu")

TOOL = Tool(type="function", function=Function(name="f", parameters={}))
# What opens a call.
MARKERS = {
    "cohere_command4": "<|START_ACTION|>",
    "deepseekv32": "<｜DSML｜function_calls>",
    "glm45": "<tool_call>",
    "glm47": "<tool_call>",
    "hermes": "<tool_call>",
    "interns1": "<|action_start|> <|plugin|>",
    "lfm2": "<|tool_call_start|>",
    "llama3": "<|python_tag|>",
    "mistral": "[TOOL_CALLS",
    "qwen25": "<tool_call>\n",
    "step3": "<｜tool_calls_begin｜>",
    "trinity": "<tool_call>\n",
}


class TestStreamHeldText(CustomTestCase):
    def assert_kept(self, name, text):
        for chunks in (list(text), [text], [text[:-1], text[-1]]):
            with self.subTest(parser=name, chunks=chunks):
                parser = FunctionCallParser([TOOL], name)
                self.assertFalse(parser.has_tool_call(text))
                results = [parser.parse_stream_chunk(chunk) for chunk in chunks]
                results.append(parser.parse_stream_end())
                self.assertEqual("".join(normal for normal, _ in results), text)
                self.assertEqual([call for _, calls in results for call in calls], [])
                self.assertEqual(parser.parse_stream_end(), ("", []))

    def test_cut_in_a_marker(self):
        for name, marker in MARKERS.items():
            for size in range(1, len(marker)):
                self.assert_kept(name, "Hi. " + marker[:size])

    def test_ends_with_the_first_character(self):
        for name in MARKERS:
            self.assert_kept(name, "std::vector<")
            self.assert_kept(name, "</")

    def test_a_call_is_not_text(self):
        call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
        for chunks in (list(call), list(call[:-4])):
            parser = FunctionCallParser([TOOL], "qwen25")
            results = [parser.parse_stream_chunk(chunk) for chunk in chunks]
            results.append(parser.parse_stream_end())
            self.assertEqual("".join(normal for normal, _ in results), "")


if __name__ == "__main__":
    unittest.main()
