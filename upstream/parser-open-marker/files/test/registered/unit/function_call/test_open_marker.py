"""An answer that is cut after the marker that opens a call is not deleted.

python test/registered/unit/function_call/test_open_marker.py
"""

import unittest

from sglang.srt.entrypoints.openai.protocol import Function, Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=5, suite="base-a-test-cpu")

TOOL = Tool(type="function", function=Function(name="f", parameters={}))
MARKERS = {
    "cohere_command4": "<|START_ACTION|>",
    "deepseekv3": "<｜tool▁calls▁begin｜>",
    "deepseekv31": "<｜tool▁calls▁begin｜>",
    "glm": "<tool_call>",
    "glm45": "<tool_call>",
    "hermes": "<tool_call>",
    "hunyuan": "<tool_calls>",
    "lfm2": "<|tool_call_start|>",
    "mimo": "<tool_call>",
    "mistral": "[TOOL_CALLS",
    "poolside_v1": "<tool_call>",
    "qwen3_coder": "<tool_call>",
    "step3p5": "<tool_call>",
}


class TestOpenMarker(CustomTestCase):
    def test_whole(self):
        for name, marker in MARKERS.items():
            with self.subTest(parser=name):
                parser = FunctionCallParser([TOOL], name)
                self.assertEqual(parser.parse_non_stream(marker), (marker, []))

    def test_stream(self):
        for name, marker in MARKERS.items():
            for chunks in ([marker], [marker[:3], marker[3:]]):
                with self.subTest(parser=name, chunks=chunks):
                    parser = FunctionCallParser([TOOL], name)
                    results = [parser.parse_stream_chunk(chunk) for chunk in chunks]
                    results.append(parser.parse_stream_end())
                    self.assertEqual("".join(normal for normal, _ in results), marker)
                    self.assertEqual(parser.parse_stream_end(), ("", []))

    def test_text_before_a_marker_is_enough(self):
        """As before: what is cut of a call is dropped if there is text."""
        for name in ("glm45", "hermes"):
            with self.subTest(parser=name):
                parser = FunctionCallParser([TOOL], name)
                text, calls = parser.parse_non_stream("Hi. " + MARKERS[name])
                self.assertEqual((text.strip(), calls), ("Hi.", []))


if __name__ == "__main__":
    unittest.main()
