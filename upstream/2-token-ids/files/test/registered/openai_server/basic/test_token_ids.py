"""Token ids in whole responses of /v1/chat/completions and /v1/completions.

python test/registered/openai_server/basic/test_token_ids.py
"""

import unittest
from types import SimpleNamespace

from pydantic import ValidationError

from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
)
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.scripted_serving import PROMPT_IDS, ScriptedServingTestCase, Step

register_cpu_ci(est_time=10, suite="base-a-test-cpu")

STEPS = [Step([10], "a"), Step([11, 12], ""), Step([13], "猫"), Step([2], "")]
IDS = [10, 11, 12, 13, 2]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


class TestTokenIds(ScriptedServingTestCase):
    def test_chat(self):
        (response,) = self.ask(ChatCompletionRequest, [STEPS], return_token_ids=True)
        self.assertEqual(response["prompt_token_ids"], PROMPT_IDS)
        self.assertEqual(response["choices"][0]["token_ids"], IDS)
        self.assertEqual(response["choices"][0]["message"]["content"], "a猫")

    def test_completions(self):
        (response,) = self.ask(CompletionRequest, [STEPS], return_token_ids=True)
        self.assertNotIn("prompt_token_ids", response)
        self.assertEqual(response["choices"][0]["prompt_token_ids"], PROMPT_IDS)
        self.assertEqual(response["choices"][0]["token_ids"], IDS)

    def test_several_choices(self):
        other = [Step([20], "b"), Step([2], "")]
        for request_class in (ChatCompletionRequest, CompletionRequest):
            with self.subTest(request_class=request_class):
                (response,) = self.ask(
                    request_class, [STEPS, other], return_token_ids=True
                )
                ids = [choice["token_ids"] for choice in response["choices"]]
                self.assertEqual(ids, [IDS, [20, 2]])

    def test_tool_call_and_reasoning(self):
        text = (
            '<think>b</think><tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
        )
        (response,) = self.ask(
            ChatCompletionRequest,
            [[Step([10, 11, 12], text), Step([2], "")]],
            config={"tool_call_parser": "qwen", "reasoning_parser": "qwen3"},
            tools=[TOOL],
            return_token_ids=True,
        )
        (choice,) = response["choices"]
        self.assertEqual(choice["message"]["tool_calls"][0]["function"]["name"], "f")
        self.assertEqual(choice["token_ids"], [10, 11, 12, 2])

    def test_logprobs_line_up(self):
        (chat,) = self.ask(
            ChatCompletionRequest,
            [STEPS],
            return_token_ids=True,
            logprobs=True,
            top_logprobs=2,
        )
        content = chat["choices"][0]["logprobs"]["content"]
        self.assertEqual([-entry["logprob"] for entry in content], IDS)
        for entry in content:
            self.assertEqual(entry["top_logprobs"][0]["logprob"], entry["logprob"])

        (completion,) = self.ask(
            CompletionRequest, [STEPS], return_token_ids=True, logprobs=2
        )
        logprobs = completion["choices"][0]["logprobs"]
        self.assertEqual([-value for value in logprobs["token_logprobs"]], IDS)

    def test_not_asked(self):
        for request_class in (ChatCompletionRequest, CompletionRequest):
            for fields in ({}, {"return_token_ids": False}):
                with self.subTest(request_class=request_class, fields=fields):
                    (response,) = self.ask(request_class, [STEPS], **fields)
                    self.assertNotIn("prompt_token_ids", response)
                    self.assertNotIn("token_ids", response["choices"][0])

    def test_earlier_chat_fields_stay(self):
        (response,) = self.ask(ChatCompletionRequest, [STEPS], return_token_ids=True)
        (choice,) = response["choices"]
        self.assertEqual(choice["prompt_token_ids"], PROMPT_IDS)
        self.assertEqual(choice["response_token_ids"], IDS)

    def test_must_be_boolean(self):
        for value in ("yes", 1, []):
            with self.subTest(value=value), self.assertRaises(ValidationError):
                CompletionRequest(model="m", prompt="a", return_token_ids=value)
            with self.subTest(value=value), self.assertRaises(ValidationError):
                ChatCompletionRequest(model="m", messages=[], return_token_ids=value)


class TestRecordTokenIds(unittest.TestCase):
    """The tokenizer manager hands over the prompt as it goes to the scheduler."""

    def record(self, obj):
        state = SimpleNamespace(obj=obj)
        manager = SimpleNamespace(rid_to_state={"rid": state})
        tokenized_obj = SimpleNamespace(rid="rid", input_ids=[7, 8])
        TokenizerManager._record_token_ids(manager, tokenized_obj)
        return state

    def test_recorder_is_handed_over(self):
        tracked = []
        obj = GenerateReqInput(text=["a", "b"], rid=["r0", "r1"], sampling_params={})
        obj.normalize_batch_and_arguments()
        recorder = SimpleNamespace(track=lambda *args: tracked.append(args))
        obj.token_id_recorder = recorder
        self.assertIs(obj[1].token_id_recorder, recorder)
        state = self.record(obj[1])
        self.assertEqual(tracked, [("rid", [7, 8], state)])

    def test_without_recorder(self):
        self.record(GenerateReqInput(text="a"))
        self.record(EmbeddingReqInput(text="a"))

    def test_cannot_be_set_from_a_request_body(self):
        with self.assertRaises(TypeError):
            GenerateReqInput(text="a", token_id_recorder=object())


if __name__ == "__main__":
    unittest.main()
