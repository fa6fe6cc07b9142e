"""Log-probabilities of steps that have no text, in streams of /v1/chat/completions.

python test/registered/openai_server/basic/test_chat_stream_logprobs.py
"""

import unittest

from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.scripted_serving import ScriptedServingTestCase, Step, choices_of

register_cpu_ci(est_time=10, suite="base-a-test-cpu")


class TestChatStreamLogprobs(ScriptedServingTestCase):
    def stream(self, *choices, **kwargs):
        return self.ask(
            ChatCompletionRequest,
            choices,
            stream=True,
            logprobs=True,
            top_logprobs=2,
            **kwargs,
        )

    def assert_complete(self, chunks, steps, index=0):
        """Each id has its log-probability once, in order, never before its text."""
        expected = [i for step in steps for i in step.ids]
        sent = []
        text = ""
        for choice in choices_of(chunks, index):
            for entry in (choice["logprobs"] or {}).get("content", []):
                sent.append(-entry["logprob"])
                self.assertEqual(entry["top_logprobs"][0]["logprob"], entry["logprob"])
            text += choice["delta"].get("content") or ""
        self.assertEqual(sent, expected)
        self.assertEqual(text, "".join(step.text for step in steps))

    def test_character_split_across_steps(self):
        steps = [Step([10], "a"), Step([11], ""), Step([12], ""), Step([13], "猫")]
        for incremental in (False, True):
            with self.subTest(incremental=incremental):
                chunks = self.stream(steps, incremental=incremental)
                self.assert_complete(chunks, steps)
                with_text = [c for c in choices_of(chunks) if c["delta"].get("content")]
                sizes = [len(c["logprobs"]["content"]) for c in with_text]
                self.assertEqual(sizes, [1, 3])

    def test_last_step_without_text(self):
        steps = [Step([10], "a"), Step([11], "b"), Step([2], "")]
        chunks = self.stream(steps)
        self.assert_complete(chunks, steps)
        last = choices_of(chunks)[-1]
        self.assertEqual(last["finish_reason"], "stop")
        self.assertEqual(len(last["logprobs"]["content"]), 1)

    def test_choices_are_kept_apart(self):
        first = [Step([10], ""), Step([11], "a"), Step([2], "")]
        second = [Step([20], "b"), Step([21], ""), Step([22, 2], "c")]
        chunks = self.stream(first, second)
        self.assert_complete(chunks, first, index=0)
        self.assert_complete(chunks, second, index=1)

    def test_no_chunk_without_text(self):
        steps = [Step([10], "a"), Step([11], ""), Step([12], "b")]
        with_logprobs = self.stream(steps)
        without = self.ask(ChatCompletionRequest, [steps], stream=True)
        self.assertEqual(len(with_logprobs), len(without))


if __name__ == "__main__":
    unittest.main()
