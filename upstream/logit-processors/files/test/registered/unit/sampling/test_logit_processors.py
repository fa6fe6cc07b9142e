"""Logit processors that requests ask for by name, and those that are pickled.

python test/registered/unit/sampling/test_logit_processors.py
"""

import asyncio
import unittest
from http import HTTPStatus
from types import SimpleNamespace
from unittest.mock import Mock, patch

import dill
import orjson
import torch

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, maybe_stub_sgl_kernel

maybe_stub_sgl_kernel()

from sglang.srt.entrypoints import http_server
from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    MessageProcessingResult,
)
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.runtime_context import (
    publish,
    reset_context,
    restore_context,
    snapshot_context,
)
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
from sglang.srt.sampling.logit_processor_batch import LogitProcessorBatch, fail_requests
from sglang.srt.sampling.logit_processors import (
    FIELD,
    load_logit_processors,
    prepare_logit_processors,
)
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs

register_cpu_ci(est_time=15, suite="base-a-test-cpu")

VOCAB_SIZE = 16
SCHEDULE = {"initial_temp": 2.0, "final_temp": 0.5, "warmup_tokens": 3}


class Fails(CustomLogitProcessor):
    def __call__(self, logits, custom_param_list=None):
        if any(params.get("fail") for params in custom_param_list):
            raise RuntimeError("no more of this")
        return logits


def by_name(name, **params):
    return {"name": name, "params": params}


def make_manager(**server_args):
    server_args = {"enable_custom_logit_processor": False, **server_args}
    manager = TokenizerManager.__new__(TokenizerManager)
    manager.server_args = SimpleNamespace(logit_processors=None, **server_args)
    manager.model_config = SimpleNamespace(vocab_size=VOCAB_SIZE)
    manager.preferred_sampling_params = None
    return manager


def prepare(value, manager=None, input_ids=(1, 2), **fields):
    """Return what the scheduler is sent for a request."""
    obj = GenerateReqInput(
        input_ids=list(input_ids), custom_logit_processor=value, **fields
    )
    prepare_logit_processors(obj, manager or make_manager())
    return obj.custom_logit_processor


def make_req(value, prompt_len=2):
    return Req(
        rid="r",
        origin_input_text="",
        origin_input_ids=[1] * prompt_len,
        sampling_params=SamplingParams(),
        custom_logit_processor=prepare(value),
    )


def make_info(reqs):
    return SamplingBatchInfo(
        temperatures=torch.ones(len(reqs), 1),
        top_ps=torch.ones(len(reqs)),
        top_ks=torch.full((len(reqs),), -1),
        min_ps=torch.zeros(len(reqs)),
        is_all_greedy=False,
        is_any_greedy=False,
        need_top_p_sampling=False,
        need_top_k_sampling=False,
        need_min_p_sampling=False,
        vocab_size=VOCAB_SIZE,
        device="cpu",
    )


class TestRequests(CustomTestCase):
    def refused(self, value, said, **fields):
        with self.assertRaisesRegex(ValueError, said):
            prepare(value, **fields)

    def test_forms_mean_the_same(self):
        mask = by_name("action_mask", token_ids=[3, 4])
        forms = [mask, orjson.dumps(mask).decode(), "rl_action_mask:3,4", [mask]]
        self.assertEqual({prepare(form) for form in forms}, {prepare(mask)})

    def test_a_list_has_an_entry_for_each_prompt(self):
        mask = by_name("action_mask", token_ids=[3])
        prepared = prepare([mask, None], input_ids=[[1], [2]])
        self.assertEqual(prepared, [prepare(mask), None])
        self.refused([mask], "1 entries for 2 prompts", input_ids=[[1], [2]])

    def test_what_is_wrong_is_said(self):
        for value, said in (
            (by_name("mask"), "no logit processor 'mask'. There are action_mask"),
            (by_name("action_mask"), "token_ids must be given"),
            (by_name("action_mask", ids=[1]), "no parameter 'ids'"),
            (by_name("action_mask", token_ids=[]), "an empty list"),
            (by_name("action_mask", token_ids=[True]), "True is none"),
            (by_name("action_mask", token_ids=[-1]), "-1, which is negative"),
            (by_name("action_mask", token_ids=[16]), "16, .* vocabulary of 16 ids"),
            (["rl_action_mask:1", "disallowed_tokens:1"], "leave no token"),
            (by_name("temperature_schedule", **SCHEDULE | {"final_temp": 0}), "posi"),
        ):
            with self.subTest(value=value):
                self.refused(value, said)
        schedule = by_name("temperature_schedule", **SCHEDULE)
        self.refused(schedule, "temperature 0", sampling_params={"temperature": 0})

    def test_pickles_are_refused_and_not_loaded(self):
        pickled = Fails.to_str()
        with patch.object(dill, "loads", side_effect=AssertionError("loaded")):
            for value in (pickled, [pickled], orjson.loads(pickled)):
                with self.subTest(value=type(value)):
                    self.refused(value, "custom.logit.processor")
            prepared = prepare(
                pickled, make_manager(enable_custom_logit_processor=True)
            )
        self.assertEqual(prepared, pickled)

    def test_openai_requests_are_answered_before_a_stream(self):
        self.addCleanup(restore_context, snapshot_context())
        reset_context()
        publish(ServerArgs(model_path="dummy"), role="tokenizer")
        fields = {"model": "m", "stream": True, FIELD: by_name("mask")}
        model_config = Mock(is_multimodal=False, context_len=1000, vocab_size=1000)
        model_config.hf_config = Mock(model_type="llama", architectures=["A"])
        model_config.get_default_sampling_params.return_value = {}
        manager = Mock(model_config=model_config, served_model_name="m")
        manager.request_logger.log_requests = False
        manager.tokenizer = Mock(chat_template=None, bos_token_id=1)
        manager.tokenizer.encode.return_value = [1, 2]
        no_template = Mock(chat_template_name=None, completion_template_name=None)
        processed = MessageProcessingResult("", [1, 2], None, None, [], [], None)
        user = {"role": "user", "content": "Hi"}
        with patch.object(
            OpenAIServingChat, "_process_messages", return_value=processed
        ):
            for handler, request in (
                (OpenAIServingChat, ChatCompletionRequest(messages=[user], **fields)),
                (OpenAIServingCompletion, CompletionRequest(prompt=[1, 2], **fields)),
            ):
                with self.subTest(handler=handler.__name__):
                    response = asyncio.run(
                        handler(manager, no_template).handle_request(request, None)
                    )
                    self.assertEqual(response.status_code, HTTPStatus.BAD_REQUEST)
                    self.assertIn(b"no logit processor 'mask'", response.body)

    def test_native_requests_are_answered_before_a_stream(self):
        obj = GenerateReqInput(
            input_ids=[1], stream=True, custom_logit_processor=by_name("mask")
        )
        state = SimpleNamespace(tokenizer_manager=make_manager())
        with patch.object(http_server, "_global_state", state):
            coroutine = http_server.serve_generate_request(obj, request=None)
            with self.assertRaises(StopIteration) as stop:
                coroutine.send(None)
        response = stop.exception.value
        self.assertEqual(response.status_code, HTTPStatus.BAD_REQUEST)
        self.assertIn(b"no logit processor 'mask'", response.body)


class TestBatch(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        source = f"fails={__name__}:Fails"
        load_logit_processors(SimpleNamespace(logit_processors=[source]))

    def apply(self, reqs, position=1):
        """Return logits and temperatures of a step whose logits are all 1."""
        batch = SimpleNamespace(reqs=reqs)
        output = SimpleNamespace(next_token_logits=torch.ones(len(reqs), VOCAB_SIZE))
        info = make_info(reqs)
        positions = torch.full((len(reqs),), position)
        processors = LogitProcessorBatch.from_reqs(reqs)
        info = processors.apply(output, info, positions)
        fail_requests(batch, SimpleNamespace(logits_output=output))
        return output.next_token_logits, info.temperatures.flatten().tolist()

    def test_each_request_has_its_mask(self):
        values = ["rl_action_mask:3,4", None, "disallowed_tokens:5"]
        logits, _ = self.apply([make_req(value) for value in values])
        left = [row.isfinite().nonzero().flatten().tolist() for row in logits]
        everything = list(range(VOCAB_SIZE))
        self.assertEqual(left, [[3, 4], everything, [*range(5), *range(6, 16)]])

    def test_masks_stay_with_their_requests(self):
        def make(*values):
            reqs = [make_req(value) for value in values]
            info = make_info(reqs)
            info.adjusted_from_schedule_batch(SimpleNamespace(reqs=reqs), VOCAB_SIZE)
            return info

        info = make(None, None)
        for value in ("rl_action_mask:3", "rl_action_mask:4"):
            other = make(value, None)
            # As merge_batch does, which extends the tensors before.
            info.temperatures = torch.cat([info.temperatures, other.temperatures])
            info.adjusted_merge_batch(other)
        kept = [2, 4]
        info.adjusted_filter_batch(kept, torch.tensor(kept))
        output = SimpleNamespace(next_token_logits=torch.ones(2, VOCAB_SIZE))
        info.logit_processors.apply(output, make_info(kept), torch.ones(2))
        left = output.next_token_logits.isfinite().nonzero().tolist()
        self.assertEqual(left, [[0, 3], [1, 4]])

    def test_the_temperature_is_that_of_the_position(self):
        reqs = [make_req(by_name("temperature_schedule", **SCHEDULE)), make_req(None)]
        for position, expected in ((1, 2.0), (2, 1.5), (4, 0.5), (9, 0.5)):
            _, temperatures = self.apply(reqs, position)
            self.assertEqual(temperatures, [expected, 1.0])

    def test_a_processor_that_raises_fails_its_own_request(self):
        values = [by_name("fails", fail=True), by_name("fails"), "rl_action_mask:3"]
        reqs = [make_req(value) for value in values]
        self.apply(reqs)
        self.assertIsInstance(reqs[0].to_finish, FINISH_ABORT)
        self.assertIn("RuntimeError: no more of this", reqs[0].to_finish.message)
        self.assertEqual([req.to_finish for req in reqs[1:]], [None, None])


if __name__ == "__main__":
    unittest.main()
