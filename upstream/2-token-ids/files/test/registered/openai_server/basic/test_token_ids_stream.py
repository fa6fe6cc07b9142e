"""Token ids in streams of /v1/chat/completions and /v1/completions.

python test/registered/openai_server/basic/test_token_ids_stream.py
"""

import unittest

from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
)
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.scripted_serving import (
    PROMPT_IDS,
    ScriptedServingTestCase,
    Step,
    choices_of,
)

register_cpu_ci(est_time=10, suite="base-a-test-cpu")

STEPS = [Step([10], "a"), Step([11, 12], ""), Step([13], "猫"), Step([2], "")]
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
    },
}
ENDPOINTS = (ChatCompletionRequest, CompletionRequest)


def ids_of(chunks, index=0):
    return [i for c in choices_of(chunks, index) for i in c.get("token_ids", [])]


class TestTokenIdsStream(ScriptedServingTestCase):
    def stream(self, request_class, *choices, **kwargs):
        return self.ask(request_class, choices, stream=True, **kwargs)

    def test_ids_are_sent_once(self):
        for request_class in ENDPOINTS:
            for incremental in (False, True):
                with self.subTest(request_class=request_class, incremental=incremental):
                    chunks = self.stream(
                        request_class,
                        STEPS,
                        incremental=incremental,
                        return_token_ids=True,
                    )
                    self.assertEqual(ids_of(chunks), [10, 11, 12, 13, 2])
                    for choice in choices_of(chunks):
                        self.assertNotEqual(choice.get("token_ids"), [])

    def test_prompt_ids_on_the_first_chunk(self):
        chunks = self.stream(ChatCompletionRequest, STEPS, STEPS, return_token_ids=True)
        self.assertEqual(chunks[0]["prompt_token_ids"], PROMPT_IDS)
        self.assertFalse(any("prompt_token_ids" in chunk for chunk in chunks[1:]))

        chunks = self.stream(CompletionRequest, STEPS, STEPS, return_token_ids=True)
        for index in (0, 1):
            first, *others = choices_of(chunks, index)
            self.assertEqual(first["prompt_token_ids"], PROMPT_IDS)
            self.assertFalse(any("prompt_token_ids" in choice for choice in others))

    def test_no_chunk_more_than_without(self):
        for request_class in ENDPOINTS:
            with self.subTest(request_class=request_class):
                plain = self.stream(request_class, STEPS)
                asking = self.stream(request_class, STEPS, return_token_ids=True)
                self.assertEqual(len(asking), len(plain))
                for chunk in plain:
                    self.assertNotIn("token_ids", chunk["choices"][0])

    def test_parsers_that_swallow_and_split_steps(self):
        steps = [
            Step([10], "<think>"),
            Step([11], "b"),
            Step([12], "</think>"),
            Step([13], "c"),
            Step([14], "<tool_call>\n"),
            Step([15, 16], '{"name": "f", "arguments": {"a": "d'),
            Step([17], '"}}\n</tool_call>'),
            Step([2], ""),
        ]
        expected = [i for step in steps for i in step.ids]
        for logprobs in (False, True):
            with self.subTest(logprobs=logprobs):
                chunks = self.stream(
                    ChatCompletionRequest,
                    steps,
                    config={"tool_call_parser": "qwen", "reasoning_parser": "qwen3"},
                    tools=[TOOL],
                    logprobs=logprobs,
                    return_token_ids=True,
                )
                self.assertEqual(ids_of(chunks), expected)
                seen = 0
                for choice in choices_of(chunks):
                    seen += len(choice.get("token_ids", []))
                    content = choice["delta"].get("content") or ""
                    if "c" in content:
                        self.assertGreaterEqual(seen, 4)
                    if logprobs:
                        entries = (choice["logprobs"] or {}).get("content", [])
                        self.assertEqual(
                            [-entry["logprob"] for entry in entries],
                            choice.get("token_ids", []),
                        )

    def test_logprobs_of_completions_line_up(self):
        chunks = self.stream(
            CompletionRequest, STEPS, logprobs=2, return_token_ids=True
        )
        for choice in choices_of(chunks):
            values = (choice["logprobs"] or {}).get("token_logprobs", [])
            self.assertEqual([-v for v in values], choice.get("token_ids", []))

    def test_choices_are_kept_apart(self):
        other = [Step([20], ""), Step([21], "b"), Step([2], "")]
        for request_class in ENDPOINTS:
            with self.subTest(request_class=request_class):
                chunks = self.stream(request_class, STEPS, other, return_token_ids=True)
                self.assertEqual(ids_of(chunks, 0), [10, 11, 12, 13, 2])
                self.assertEqual(ids_of(chunks, 1), [20, 21, 2])


if __name__ == "__main__":
    unittest.main()
