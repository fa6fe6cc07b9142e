"""`stream_options.continuous_sglext`: what is new, with the chunk that is made of it.

python test/registered/openai_server/basic/test_sglext_stream.py
"""

import json
import unittest
from http import HTTPStatus
from types import SimpleNamespace
from unittest.mock import Mock, patch

from sglang.srt.entrypoints.openai.chat_encoding_adapters import token_output_sse_chunks
from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    FunctionResponse,
    StreamOptions,
    ToolCall,
)
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.entrypoints.openai.serving_deepseek_recipe import (
    DeepSeekRecipeChatEncodingAdapter,
)
from sglang.srt.entrypoints.openai.serving_inkling import InklingChatEncodingAdapter
from sglang.srt.entrypoints.openai.sglext_stream import SglExtStream
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.scripted_serving import (
    PROMPT_IDS,
    ScriptedServingTestCase,
    Step,
    choices_of,
)

register_cpu_ci(est_time=15, suite="base-a-test-cpu")

CONTINUOUS = {"continuous_sglext": True}
IDS = {"return_input_ids_in_sglext": True, "return_output_ids_in_sglext": True}
STEPS = [Step([10], "a"), Step([11], ""), Step([12], ""), Step([13], "猫")]
SPANS = [{"version": "1", "start": 0, "end": 1}, {"version": "2", "start": 1, "end": 2}]
AT_THE_END = {"routed_experts": "AAE=", "weight_versions": SPANS}
PARSERS = {"tool_call_parser": "qwen", "reasoning_parser": "qwen3"}
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
    },
}
# The parsers make no chunk of some of these and two of others.
PARSED_STEPS = [
    Step([10], "<think>"),
    Step([11], "b"),
    Step([12, 13], "</think>c"),
    Step([14], "<tool_call>\n"),
    Step([15, 16], '{"name": "f", "arguments": {"a": "d'),
    Step([17], '"}}\n</tool_call>'),
    Step([2], ""),
]


def events_of(chunks, index=0):
    """Return the choice and the `sglext` of each chunk of a choice."""
    return [
        (chunk["choices"][0], chunk.get("sglext", {}))
        for chunk in chunks
        if chunk["choices"] and chunk["choices"][0]["index"] == index
    ]


def ids_of(chunks, index=0):
    """Return the new ids of each chunk of a choice that has some."""
    deltas = [sglext.get("output_ids") for _, sglext in events_of(chunks, index)]
    return [delta[0] for delta in deltas if delta is not None]


def values_of(chunks, field, index=0):
    return [sglext[field] for _, sglext in events_of(chunks, index) if field in sglext]


class TestChat(ScriptedServingTestCase):
    def stream(self, *choices, stream_options=CONTINUOUS, **fields):
        return self.ask(
            ChatCompletionRequest,
            choices,
            stream=True,
            stream_options=stream_options,
            **fields,
        )

    def assert_exact(self, chunks, steps, index=0):
        """Each id once and in order, none later than the text made of it."""
        expected = [i for step in steps for i in step.ids]
        deltas = ids_of(chunks, index)
        self.assertEqual([i for delta in deltas for i in delta], expected)
        self.assertNotIn([], deltas)
        ids, text = [], ""
        for choice, sglext in events_of(chunks, index):
            ids += sglext.get("output_ids", [[]])[0]
            text += choice["delta"].get("content") or ""
            made_of, made = [], ""
            for step in steps:
                if len(made) < len(text):
                    made_of += step.ids
                    made += step.text
            if choice["delta"].get("content"):
                self.assertEqual(ids[: len(made_of)], made_of)

    def test_ids_with_their_text(self):
        for incremental in (False, True):
            with self.subTest(incremental=incremental):
                chunks = self.stream(STEPS, incremental=incremental, **IDS)
                self.assert_exact(chunks, STEPS)
                self.assertEqual(ids_of(chunks), [[10], [11, 12, 13]])
                self.assertEqual(values_of(chunks, "input_ids"), [PROMPT_IDS])
                # None of them at the end again, and no chunk for them alone.
                self.assertTrue(all(chunk["choices"] for chunk in chunks))
                plain = self.stream(STEPS, incremental=incremental)
                self.assertEqual(len(chunks), len(plain))
                self.assertFalse([chunk for chunk in plain if "sglext" in chunk])

    def test_last_step_without_text(self):
        steps = [Step([10], "a"), Step([11], ""), Step([2], "")]
        for incremental in (False, True):
            with self.subTest(incremental=incremental):
                chunks = self.stream(steps, incremental=incremental, **IDS)
                self.assertEqual(ids_of(chunks), [[10], [11, 2]])
                choice, sglext = events_of(chunks)[-1]
                self.assertEqual(choice["finish_reason"], "stop")
                self.assertEqual(sglext["output_ids"], [[11, 2]])

    def test_parsers(self):
        for incremental in (False, True):
            with self.subTest(incremental=incremental):
                chunks = self.stream(
                    PARSED_STEPS,
                    incremental=incremental,
                    config=PARSERS,
                    tools=[TOOL],
                    **IDS,
                )
                expected = [i for step in PARSED_STEPS for i in step.ids]
                self.assertEqual([i for d in ids_of(chunks) for i in d], expected)
                seen = []
                for choice, sglext in events_of(chunks):
                    seen += sglext.get("output_ids", [[]])[0]
                    delta = choice["delta"]
                    if delta.get("reasoning_content"):
                        self.assertIn(11, seen)
                    if "c" in (delta.get("content") or ""):
                        self.assertIn(13, seen)
                    if delta.get("tool_calls"):
                        self.assertIn(16, seen)

    def test_logprobs_are_of_the_ids(self):
        for steps, config in ((STEPS, {}), (PARSED_STEPS, PARSERS)):
            for incremental in (False, True):
                with self.subTest(config=config, incremental=incremental):
                    chunks = self.stream(
                        steps,
                        incremental=incremental,
                        config=config,
                        tools=[TOOL] if config else None,
                        logprobs=True,
                        **IDS,
                    )
                    logprobs = [
                        [-entry["logprob"] for entry in choice["logprobs"]["content"]]
                        for choice in choices_of(chunks)
                        if choice["logprobs"]
                    ]
                    joined = [i for values in logprobs for i in values]
                    self.assertEqual(joined, [i for d in ids_of(chunks) for i in d])
                    if not config:
                        self.assertEqual(logprobs, ids_of(chunks))

    def test_choices_are_kept_apart(self):
        other = [Step([20], ""), Step([21], "b"), Step([22, 2], "", AT_THE_END)]
        chunks = self.stream(STEPS, other, return_routed_experts=True, **IDS)
        self.assert_exact(chunks, STEPS)
        self.assert_exact(chunks, other, index=1)
        self.assertEqual(values_of(chunks, "input_ids"), [PROMPT_IDS])
        self.assertEqual(values_of(chunks, "input_ids", index=1), [])
        for field, value in AT_THE_END.items():
            self.assertEqual(values_of(chunks, field), [])
            self.assertEqual(values_of(chunks, field, index=1), [value])

    def test_routed_experts_if_asked(self):
        steps = [Step([10], "a"), Step([2], "", AT_THE_END)]
        for asked in (False, True):
            with self.subTest(asked=asked):
                chunks = self.stream(steps, return_routed_experts=asked)
                values = values_of(chunks, "routed_experts")
                self.assertEqual(values, ["AAE="] if asked else [])
                self.assertEqual(values_of(chunks, "weight_versions"), [SPANS])
                self.assertEqual(values_of(chunks, "output_ids"), [])
                self.assertTrue(all(chunk["choices"] for chunk in chunks))

    def test_abort(self):
        """The last output has nothing new, or what an abort repeats today."""
        for incremental in (False, True):
            for repeated in ([], [11]) if incremental else ([],):
                with self.subTest(incremental=incremental, repeated=repeated):
                    aborted = {"finish_reason": {"type": "abort"}}
                    aborted["completion_tokens"] = 2
                    steps = [Step([10], "a"), Step([11], "")]
                    chunks = self.stream(
                        [*steps, Step(repeated, "", aborted)],
                        incremental=incremental,
                        **IDS,
                    )
                    self.assertEqual(ids_of(chunks), [[10], [11]])
                    choice, sglext = events_of(chunks)[-1]
                    self.assertEqual(choice["finish_reason"], "abort")
                    self.assertEqual(sglext["output_ids"], [[11]])

    def test_abort_before_the_first_token(self):
        aborted = {"finish_reason": {"type": "abort"}}
        for incremental in (False, True):
            with self.subTest(incremental=incremental):
                chunks = self.stream(
                    [Step([], "", aborted)], incremental=incremental, **IDS
                )
                self.assertEqual(ids_of(chunks), [])
                self.assertEqual(values_of(chunks, "input_ids"), [PROMPT_IDS])

    def test_error(self):
        failed = {
            "type": "abort",
            "message": "Failed",
            "status_code": HTTPStatus.INTERNAL_SERVER_ERROR,
        }
        steps = [Step([10], "a"), Step([11], "", {"finish_reason": failed})]
        for incremental in (False, True):
            with self.subTest(incremental=incremental):
                *chunks, error = self.stream(steps, incremental=incremental, **IDS)
                self.assertEqual(ids_of(chunks), [[10]])
                self.assertEqual(error["error"]["message"], "Failed")

    def test_not_asked(self):
        """All at the end, of the first choice that has some, and no spans."""
        steps = [*STEPS[:-1], Step([13], "猫", AT_THE_END)]
        for options in (None, {"continuous_sglext": False}):
            for incremental in (False, True):
                with self.subTest(options=options, incremental=incremental):
                    chunks = self.stream(
                        steps,
                        stream_options=options,
                        incremental=incremental,
                        return_routed_experts=True,
                        **IDS,
                    )
                    self.assertEqual([c for c in chunks[:-1] if "sglext" in c], [])
                    self.assertEqual(chunks[-1]["choices"], [])
                    self.assertEqual(
                        chunks[-1]["sglext"],
                        {
                            "routed_experts": "AAE=",
                            "input_ids": PROMPT_IDS,
                            "output_ids": [[10, 11, 12, 13]],
                        },
                    )

    def test_parsers_of_ids(self):
        """Models whose ids are parsed have adapters that make their chunks."""
        texts = [("", ""), ("a", "b"), ("", "c")]
        steps = [Step([10 + number], "") for number in range(len(texts))]
        deltas = [
            SimpleNamespace(reasoning=reasoning, content=content, tool_calls=[])
            for reasoning, content in texts
        ]
        for adapter_class in (
            DeepSeekRecipeChatEncodingAdapter,
            InklingChatEncodingAdapter,
        ):
            with self.subTest(adapter_class=adapter_class):
                adapter = adapter_class.__new__(adapter_class)
                adapter._hooks = Mock()
                parser = Mock(num_consumed_tokens=0)
                parser.feed.side_effect = deltas[:-1]
                parser.finish.return_value = deltas[-1]
                adapter._new_output_parser = Mock(return_value=parser)
                with patch.object(
                    OpenAIServingChat, "_encoding_output", return_value=adapter
                ):
                    chunks = self.stream(steps, **IDS)
                self.assertEqual(ids_of(chunks), [[10, 11], [12]])
                with_ids = [c for c, sglext in events_of(chunks) if sglext]
                self.assertEqual(
                    [c["delta"]["reasoning_content"] for c in with_ids], ["a", None]
                )
                self.assertEqual(with_ids[1]["delta"]["content"], "c")

    def test_details_stay_at_the_end(self):
        details = {"device": 1, "host": 0}
        steps = [Step([10], "a", {"cached_tokens_details": details})]
        chunks = self.stream(steps, return_cached_tokens_details=True, **IDS)
        self.assertEqual(chunks[-1]["choices"], [])
        self.assertEqual(chunks[-1]["sglext"], {"cached_tokens_details": details})
        self.assertEqual(ids_of(chunks), [[10]])


class TestCompletions(ScriptedServingTestCase):
    def test_each_choice_has_its_own(self):
        steps = [Step([10], "a"), Step([2], "", AT_THE_END)]
        other = [Step([20], "b"), Step([2], "", {"routed_experts": "AQ=="})]
        for options in (None, CONTINUOUS):
            with self.subTest(options=options):
                chunks = self.ask(
                    CompletionRequest,
                    [steps, other],
                    stream=True,
                    stream_options=options,
                    return_routed_experts=True,
                )
                if options is None:
                    self.assertEqual([c for c in chunks[:-1] if "sglext" in c], [])
                    self.assertEqual(chunks[-1]["sglext"], {"routed_experts": "AAE="})
                    continue
                self.assertEqual(events_of(chunks)[-1][1], AT_THE_END)
                self.assertEqual(
                    events_of(chunks, index=1)[-1][1], {"routed_experts": "AQ=="}
                )
                self.assertTrue(all(chunk["choices"] for chunk in chunks))


class TestSglExtStream(unittest.TestCase):
    def make_stream(self):
        request = ChatCompletionRequest(
            messages=[{"role": "user", "content": "Hi"}],
            stream_options=StreamOptions(**CONTINUOUS),
        )
        return SglExtStream(request, output_ids=True)

    def test_engine_is_ahead_of_the_stream(self):
        """Outputs of a cumulative stream share one list, which grows meanwhile."""
        stream = self.make_stream()
        live = [10, 11, 12]
        for num_tokens, delta in ((1, [10]), (3, [11, 12])):
            meta_info = {"completion_tokens": num_tokens}
            stream.add(0, {"output_ids": live, "meta_info": meta_info})
            self.assertEqual(stream.take(0).output_ids, [delta])
            self.assertIsNone(stream.take(0))

    def test_tool_calls_of_parsers_of_ids(self):
        stream = self.make_stream()
        call = ToolCall(index=0, function=FunctionResponse(name="f", arguments="{}"))
        fields = dict(chunk_id="id", created=0, model="model", index=0, usage=None)
        for number, (calls, expected) in enumerate([([], []), ([call], [[10, 11]])]):
            meta_info = {"completion_tokens": number + 1}
            stream.add(0, {"output_ids": [10, 11], "meta_info": meta_info})
            chunks = token_output_sse_chunks(
                logprobs=None,
                sglext_stream=stream,
                reasoning="",
                content="",
                tool_calls=calls,
                **fields,
            )
            deltas = [json.loads(c[len("data: ") :])["sglext"] for c in chunks]
            self.assertEqual([d["output_ids"][0] for d in deltas], expected)

    def test_arguments_left_at_the_end(self):
        stream = self.make_stream()
        meta_info = {"id": "id", "completion_tokens": 1}
        content = {"output_ids": [10], "meta_info": meta_info}
        stream.add(0, content)
        detector = Mock(
            prev_tool_call_arr=[{"arguments": "{}"}], streamed_args_for_tool=[""]
        )
        chunk = OpenAIServingChat._check_for_unstreamed_tool_args(
            None,
            Mock(detector=detector),
            content,
            Mock(model="model"),
            0,
            created=0,
            sglext_stream=stream,
        )
        sglext = json.loads(chunk[len("data: ") :])["sglext"]
        self.assertEqual(sglext, {"output_ids": [[10]]})


if __name__ == "__main__":
    unittest.main()
