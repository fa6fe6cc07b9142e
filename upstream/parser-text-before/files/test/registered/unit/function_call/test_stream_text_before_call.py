"""Text before a call is sent if both arrive in one chunk, as it is without streaming.

python test/registered/unit/function_call/test_stream_text_before_call.py
"""

import unittest

from sglang.srt.entrypoints.openai.protocol import Function, Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.function_call.json_array_parser import JsonArrayParser
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
GLM = "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x</arg_value>\n</tool_call>"
QWEN = '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>'
# A call of f: what opens it, and the rest.
CALLS = {
    "glm45": ("<tool_call>", GLM[11:]),
    "ling3": ("<tool_call>", GLM[11:]),
    "llama3": ("<|python_tag|>", '{"name": "f", "arguments": {"a": "x"}}'),
    "qwen25": ("<tool_call>\n", QWEN[12:]),
    "trinity": ("<tool_call>\n", QWEN[12:]),
    "deepseekv3": (
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n"
        '```json\n{"a": "x"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    ),
    "deepseekv31": (
        "<｜tool▁calls▁begin｜>",
        '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": "x"}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
}
# Their markers are several tokens, so a chunk may end in one.
CUT_IN_MARKERS = ["glm45", "ling3", "llama3", "qwen25", "trinity"]


class TestStreamTextBeforeCall(CustomTestCase):
    def stream(self, name, chunks):
        """Return the text of a stream and the names of its calls."""
        parser = FunctionCallParser([TOOL], name)
        results = [parser.parse_stream_chunk(chunk) for chunk in chunks]
        results.append(parser.parse_stream_end())
        text = "".join(normal for normal, _ in results)
        calls = [call for _, calls in results for call in calls]
        return text, [call.name for call in calls if call.name]

    def test_text_is_sent_with_the_call(self):
        for name, (marker, call) in CALLS.items():
            with self.subTest(parser=name):
                parser = FunctionCallParser([TOOL], name)
                text, calls = parser.parse_stream_chunk("Hi. " + marker + call)
                self.assertEqual((text, calls[0].name), ("Hi. ", "f"))

    def test_text_is_sent_with_the_marker(self):
        for name, (marker, call) in CALLS.items():
            with self.subTest(parser=name):
                chunks = ["Hi. " + marker, call]
                self.assertEqual(self.stream(name, chunks), ("Hi. ", ["f"]))

    def test_deepseek_without_its_first_marker(self):
        for name in ("deepseekv3", "deepseekv31"):
            with self.subTest(parser=name):
                marker, call = CALLS[name]
                parser = FunctionCallParser([TOOL], name)
                # The marker of the next block is not what opens this call.
                results = parser.parse_stream_chunk("Hi. " + call + marker)
                self.assertEqual((results[0], results[1][0].name), ("Hi. ", "f"))

    def test_any_two_chunks(self):
        for name in CUT_IN_MARKERS:
            answer = "a < b. " + "".join(CALLS[name])
            for size in range(len(answer)):
                with self.subTest(parser=name, size=size):
                    text, names = self.stream(name, [answer[:size], answer[size:]])
                    self.assertEqual((text.strip(), names), ("a < b.", ["f"]))

    def test_markup_is_not_text(self):
        for name in CUT_IN_MARKERS:
            call = "".join(CALLS[name])
            with self.subTest(parser=name):
                # An increment for each step of the calls.
                text, names = self.stream(name, [call + "\n" + call, "", "", ""])
                self.assertEqual((text.strip(), names), ("", ["f", "f"]))
        stray = "Hi. </tool_call>" + GLM
        self.assertEqual(self.stream("glm45", [stray]), ("Hi. ", ["f"]))

    def test_a_list_in_arguments_is_no_marker(self):
        """The marker of forced calls is a bracket, which arguments have as well."""
        call = '{"name": "f", "parameters": {"a": ["x"]}}'
        for chunks in (list(f"[{call}, {call}]"), [f"[{call}", "", f", {call}]", ""]):
            with self.subTest(chunks=chunks):
                parser = JsonArrayParser()
                results = [parser.parse_streaming_increment(c, [TOOL]) for c in chunks]
                calls = [call for result in results for call in result.calls]
                self.assertEqual([c.name for c in calls if c.name], ["f", "f"])
                self.assertEqual("".join(r.normal_text for r in results), "")


if __name__ == "__main__":
    unittest.main()
