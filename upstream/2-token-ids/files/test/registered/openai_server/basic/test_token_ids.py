"""Token ids of /v1/chat/completions and /v1/completions, whole and streamed.

python test/registered/openai_server/basic/test_token_ids.py
"""

import asyncio
import unittest
from types import SimpleNamespace
from unittest.mock import AsyncMock, MagicMock, patch

from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
)
from sglang.srt.managers import tokenizer_manager
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.scripted_serving import (
    PROMPT_IDS,
    ScriptedServingTestCase,
    Step,
    choices_of,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=20, suite="base-a-test-cpu")

STEPS = [Step([10], "a"), Step([11, 12], ""), Step([13], "猫"), Step([2], "")]
IDS = [10, 11, 12, 13, 2]
ENDPOINTS = (ChatCompletionRequest, CompletionRequest)
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
    },
}


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
        for request_class in ENDPOINTS:
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
        for request_class in ENDPOINTS:
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
                    self.assertEqual(ids_of(chunks), IDS)
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
                self.assertEqual(ids_of(chunks, 0), IDS)
                self.assertEqual(ids_of(chunks, 1), [20, 21, 2])


def spans(boundary):
    return [
        {"version": "1", "start": 0, "end": boundary},
        {"version": "2", "start": boundary, "end": 3},
    ]


class TestWeightVersions(ScriptedServingTestCase):
    """Which token ids of a choice came from which weights."""

    def ask_about(self, request_class, *boundaries, **fields):
        choices = [
            [
                Step([10], "a"),
                Step([11], "b"),
                Step([2], "", {"weight_versions": spans(boundary)}),
            ]
            for boundary in boundaries
        ]
        return self.ask(request_class, choices, **fields)

    def test_whole_responses_have_those_of_each_choice(self):
        for request_class in ENDPOINTS:
            with self.subTest(request_class=request_class):
                (response,) = self.ask_about(request_class, 1, 2, return_token_ids=True)
                found = [c["weight_versions"] for c in response["choices"]]
                self.assertEqual(found, [spans(1), spans(2)])

    def test_streams_have_them_once_and_at_the_end(self):
        for request_class in ENDPOINTS:
            with self.subTest(request_class=request_class):
                chunks = self.ask_about(
                    request_class, 1, 2, stream=True, return_token_ids=True
                )
                for index, boundary in enumerate((1, 2)):
                    (choice,) = [
                        choice
                        for choice in choices_of(chunks, index)
                        if "weight_versions" in choice
                    ]
                    self.assertEqual(choice["weight_versions"], spans(boundary))
                    self.assertEqual(choice["finish_reason"], "stop")

    def test_requests_that_do_not_ask_have_none(self):
        for request_class in ENDPOINTS:
            for stream in (False, True):
                with self.subTest(request_class=request_class, stream=stream):
                    chunks = self.ask_about(request_class, 1, stream=stream)
                    for choice in choices_of(chunks):
                        self.assertNotIn("weight_versions", choice)


class TestTokenIdTracking(CustomTestCase):
    """The tokenizer manager hands over the prompts as they go to the scheduler."""

    def send(self, is_batch, is_tracked):
        from sglang.srt.managers.token_id_tracking import generate_tracked

        requests = [
            MagicMock(rid=f"rid-{i}", input_ids=[7, 8 + i], mm_inputs=None)
            for i in range(2)
        ]
        manager = MagicMock(rid_to_state={r.rid: object() for r in requests})
        transport = manager.cuda_vmm_feature_transport
        transport.prepare_for_dispatch_async = AsyncMock(return_value=[])
        manager.encoder_dispatch_ready.pop.return_value = None

        async def generate():
            if is_batch:
                await TokenizerManager._send_batch_request(manager, requests)
            else:
                for request in requests:
                    await TokenizerManager._send_one_request(manager, request)
            yield "first"
            # Sent by whoever asks for the next output, who tracks nothing.
            await TokenizerManager._send_one_request(manager, requests[0])
            yield "second"

        tracked = []
        noted = []
        tracker = SimpleNamespace(
            track=lambda *args: tracked.append(args), note=noted.append
        )

        async def outputs():
            outputs = generate()
            if is_tracked:
                outputs = generate_tracked(outputs, tracker)
            return [output async for output in outputs]

        self.assertEqual(asyncio.run(outputs()), ["first", "second"])
        expected = [(r.rid, r.input_ids, manager.rid_to_state[r.rid]) for r in requests]
        self.assertEqual(tracked, expected if is_tracked else [])
        self.assertEqual(noted, ["first", "second"] if is_tracked else [])

    def test_requests_are_handed_over(self):
        with patch.object(tokenizer_manager, "wrap_shm_features", lambda obj: obj):
            for is_batch in (False, True):
                for is_tracked in (False, True):
                    with self.subTest(is_batch=is_batch, is_tracked=is_tracked):
                        self.send(is_batch, is_tracked)


if __name__ == "__main__":
    unittest.main()
