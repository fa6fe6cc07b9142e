"""Streamed text with token ids, which is sent past the handler.

python test/registered/openai_server/basic/test_token_ids_text_chunks.py
"""

import json
import unittest
from unittest.mock import patch

from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
)
from sglang.srt.entrypoints.openai.token_ids import TokenIdRecorder
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.scripted_serving import ScriptedServingTestCase, Step, choices_of

register_cpu_ci(est_time=10, suite="base-a-test-cpu")

# Text that has to be escaped, is held back, or looks like a part of a chunk.
STEPS = [
    Step([10], "a"),
    Step([11], '"b\\'),
    Step([12], ""),
    Step([13, 14], "猫\n"),
    Step([15], '"finish_reason":null,"logprobs":null'),
    Step([16], "c"),
    Step([2], ""),
]
# Reasoning, content and a call, with text that a parser holds back, and steps that
# become two chunks.
PARSED_STEPS = [
    Step([30 + i], text)
    for i, text in enumerate(
        ["a", "b", "<", "c", "d</think>e", "f", "g", "h<tool", "i", "j"]
        + ['k<tool_call>\n{"name": "f", "arguments": {', "}}\n</tool_call>", ""]
    )
]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
PARSERS = {
    "reasoning": {"config": {"reasoning_parser": "qwen3"}},
    "calls": {"config": {"tool_call_parser": "qwen"}, "tools": [TOOL]},
    "both": {
        "config": {"reasoning_parser": "qwen3", "tool_call_parser": "qwen"},
        "tools": [TOOL],
    },
}
USAGE = {"include_usage": True, "continuous_usage_stats": True}


class TestTextChunks(ScriptedServingTestCase):
    def stream(self, request_class, steps=STEPS, **kwargs):
        """Return the chunks, and how many of them were sent past the handler."""
        sent = []
        send_chunk = TokenIdRecorder._send_chunk

        async def count(recorder, chunk):
            sent.append(chunk)
            await send_chunk(recorder, chunk)

        with patch.object(TokenIdRecorder, "_send_chunk", count):
            chunks = self.ask(request_class, [steps], stream=True, **kwargs)
        return chunks, len(sent)

    def without_ids(self, chunks):
        chunks = json.loads(json.dumps(chunks))
        for chunk in chunks:
            del chunk["created"]
            chunk.pop("prompt_token_ids", None)
            for choice in chunk["choices"]:
                choice.pop("prompt_token_ids", None)
                choice.pop("token_ids", None)
                for call in choice.get("delta", {}).get("tool_calls") or []:
                    del call["id"]
        return chunks

    def check(self, request_class, steps, min_direct, **fields):
        """Compare the chunks with those of the handler, and the ids with the steps."""
        fields["steps"] = steps
        plain, _ = self.stream(request_class, **fields)
        asking, num_direct = self.stream(request_class, return_token_ids=True, **fields)
        self.assertGreaterEqual(num_direct, min_direct)
        self.assertEqual(self.without_ids(asking), self.without_ids(plain))
        ids = [i for c in choices_of(asking) for i in c.get("token_ids", [])]
        self.assertEqual(ids, [i for step in steps for i in step.ids])

    def test_chunks_are_what_the_handler_would_send(self):
        for request_class in (ChatCompletionRequest, CompletionRequest):
            for incremental in (False, True):
                for options in (None, USAGE):
                    with self.subTest(
                        request_class=request_class,
                        incremental=incremental,
                        stream_options=options,
                    ):
                        self.check(
                            request_class,
                            STEPS,
                            3,
                            incremental=incremental,
                            stream_options=options,
                        )

    def test_parsed_chunks_are_what_the_handler_would_send(self):
        for name, fields in PARSERS.items():
            for incremental in (False, True):
                with self.subTest(parsers=name, incremental=incremental):
                    self.check(
                        ChatCompletionRequest,
                        PARSED_STEPS,
                        4,
                        incremental=incremental,
                        **fields,
                    )

    def test_logprobs_line_up(self):
        chunks, num_direct = self.stream(
            ChatCompletionRequest,
            return_token_ids=True,
            logprobs=True,
            top_logprobs=2,
        )
        self.assertGreaterEqual(num_direct, 3)
        for choice in choices_of(chunks):
            entries = (choice["logprobs"] or {}).get("content", [])
            values = [-entry["logprob"] for entry in entries]
            self.assertEqual(values, choice.get("token_ids", []))

    def test_handler_keeps_required_calls(self):
        _, num_direct = self.stream(
            ChatCompletionRequest,
            return_token_ids=True,
            tools=[TOOL],
            tool_choice="required",
            config={"tool_call_parser": "pythonic"},
        )
        self.assertEqual(num_direct, 0)


if __name__ == "__main__":
    unittest.main()
