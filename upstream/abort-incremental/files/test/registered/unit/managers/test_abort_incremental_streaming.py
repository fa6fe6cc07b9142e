"""An abort of a stream with --incremental-streaming-output sends only what is new.

python test/registered/unit/managers/test_abort_incremental_streaming.py
"""

import asyncio
import unittest
from unittest.mock import Mock

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, maybe_stub_sgl_kernel

maybe_stub_sgl_kernel()

from sglang.srt.managers.io_struct import AbortReq, BatchStrOutput, GenerateReqInput
from sglang.srt.managers.tokenizer_manager import ReqState, TokenizerManager
from sglang.srt.observability.req_time_stats import APIServerReqTimeStats
from sglang.srt.runtime_context import get_context

register_cpu_ci(est_time=10, suite="base-a-test-cpu")

RID = "rid"


class TestAbortIncrementalStreaming(CustomTestCase):
    def setUp(self):
        override = get_context().override_server_args(batch_notify_size=1)
        override.install()
        self.addCleanup(override.restore)

    def make_manager(self, incremental: bool) -> TokenizerManager:
        manager = TokenizerManager.__new__(TokenizerManager)
        manager.incremental_streaming_output = incremental
        manager.config_value = Mock(return_value="default")
        manager.skip_tokenizer_init = False
        manager.enable_metrics = False
        manager.enable_lora = False
        manager.dump_requests_folder = ""
        manager.crash_dump_folder = ""
        manager.request_logger = Mock()
        manager.request_metrics_exporter_manager = Mock()
        manager.request_metrics_exporter_manager.exporter_enabled.return_value = False
        manager.detokenize_logprob_tokens = lambda values, ids, _: list(
            zip(values, ids, map(str, ids))
        )
        return manager

    def stream(self, steps, num_read, incremental=True):
        """Abort after `steps`, of which the client has read some, and return all chunks."""
        return asyncio.run(self._stream(steps, num_read, incremental))

    async def _stream(self, steps, num_read, incremental):
        manager = self.make_manager(incremental)
        obj = GenerateReqInput(
            rid=RID,
            input_ids=[1],
            stream=True,
            return_logprob=True,
            top_logprobs_num=0,
        )
        obj.normalize_batch_and_arguments()
        state = ReqState([], False, asyncio.Event(), obj, APIServerReqTimeStats())
        manager.rid_to_state = {RID: state}
        responses = manager._wait_one_response(obj)
        chunks = []
        num_tokens = 0
        for number, (ids, text) in enumerate(steps):
            num_tokens += len(ids)
            await manager._handle_batch_output(self.batch(ids, text, num_tokens))
            if number < num_read:
                chunks.append(await anext(responses))
        manager._handle_abort_req(AbortReq(rid=RID))
        chunks += [chunk async for chunk in responses]
        self.assertEqual(chunks[-1]["meta_info"]["finish_reason"]["type"], "abort")
        self.assertEqual(chunks[-1]["meta_info"]["completion_tokens"], num_tokens)
        return chunks

    def batch(self, ids, text, num_tokens):
        fields = dict.fromkeys(BatchStrOutput.__struct_fields__)
        return BatchStrOutput(
            **{
                **fields,
                "rids": [RID],
                "finished_reasons": [None],
                "output_strs": [text],
                "output_ids": [ids],
                "prompt_tokens": [1],
                "completion_tokens": [num_tokens],
                "cached_tokens": [0],
                "reasoning_tokens": [0],
                "retraction_counts": [0],
                "input_token_logprobs_val": [[]],
                "input_token_logprobs_idx": [[]],
                "output_token_logprobs_val": [[-float(i) for i in ids]],
                "output_token_logprobs_idx": [ids],
            }
        )

    def assert_once(self, chunks, steps):
        """Text, ids and log-probabilities of the chunks join to those of the steps."""
        ids = [i for step_ids, _ in steps for i in step_ids]
        self.assertEqual(
            "".join(c["text"] for c in chunks), "".join(t for _, t in steps)
        )
        self.assertEqual([i for c in chunks for i in c["output_ids"]], ids)
        logprobs = [e for c in chunks for e in c["meta_info"]["output_token_logprobs"]]
        self.assertEqual([i for _, i, _ in logprobs], ids)

    def test_all_was_read(self):
        steps = [([10], "a"), ([11, 12], "b")]
        chunks = self.stream(steps, num_read=2)
        self.assert_once(chunks, steps)
        self.assertEqual(chunks[-1]["text"], "")
        self.assertEqual(chunks[-1]["output_ids"], [])

    def test_chunks_are_queued(self):
        """The abort joins the chunks that the client has not read yet."""
        steps = [([10], "a"), ([11, 12], "b"), ([13], "")]
        for num_read in (0, 1):
            with self.subTest(num_read=num_read):
                self.assert_once(self.stream(steps, num_read), steps)

    def test_before_the_first_token(self):
        self.assert_once(self.stream([], num_read=0), [])

    def test_cumulative_stream_has_all(self):
        steps = [([10], "a"), ([11, 12], "b")]
        last = self.stream(steps, num_read=1, incremental=False)[-1]
        self.assertEqual((last["text"], last["output_ids"]), ("ab", [10, 11, 12]))


if __name__ == "__main__":
    unittest.main()
