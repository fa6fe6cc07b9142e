"""Calls of a stream are numbered by their position in it.

python test/registered/unit/function_call/test_stream_call_index.py
"""

import json
import unittest

from sglang.srt.entrypoints.openai.protocol import Function, Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=5, suite="base-a-test-cpu")

PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}}}
# That the tool is not the first one shows if its position is taken.
TOOLS = [
    Tool(type="function", function=Function(name=name, parameters=PARAMETERS))
    for name in ("g", "f")
]
TWO_CALLS = {
    "cohere_command4": (
        '<|START_ACTION|>[{"tool_name": "f", "parameters": {"a": "x"}}, '
        '{"tool_name": "f", "parameters": {"a": "y"}}]<|END_ACTION|>'
    ),
    "gemma4": (
        '<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>'
        '<|tool_call>call:f{a:<|"|>y<|"|>}<tool_call|>'
    ),
    "lfm2": (
        '<|tool_call_start|>[f(a="x")]<|tool_call_end|>'
        '<|tool_call_start|>[f(a="y")]<|tool_call_end|>'
    ),
    "pythonic": '[f(a="x")]\n[f(a="y")]',
}


class TestStreamCallIndex(CustomTestCase):
    def test_calls_are_kept_apart(self):
        for name, text in TWO_CALLS.items():
            with self.subTest(parser=name):
                parser = FunctionCallParser(TOOLS, name)
                calls = {}
                for character in text:
                    for item in parser.parse_stream_chunk(character)[1]:
                        call = calls.setdefault(item.tool_index, ["", ""])
                        call[0] += item.name or ""
                        call[1] += item.parameters or ""
                self.assertEqual(list(calls), [0, 1])
                self.assertEqual([called for called, _ in calls.values()], ["f", "f"])
                arguments = [json.loads(text) for _, text in calls.values()]
                self.assertEqual(arguments, [{"a": "x"}, {"a": "y"}])


if __name__ == "__main__":
    unittest.main()
