"""The server's default for return_token_ids.

python test/registered/openai_server/basic/test_token_ids_default.py
"""

import os
import tempfile
import unittest
from unittest.mock import patch

from transformers import LlamaConfig

from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
)
from sglang.srt.environ import envs
from sglang.srt.runtime_context import get_serving, publish, reset_context
from sglang.srt.server_args import prepare_server_args
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.scripted_serving import ScriptedServingTestCase, Step, choices_of

register_cpu_ci(est_time=10, suite="base-a-test-cpu")

STEPS = [Step([10], "a"), Step([2], "")]


class TestTokenIdsDefault(ScriptedServingTestCase):
    def has_ids(self, request_class, default, **fields):
        chunks = self.ask(
            request_class, [STEPS], config={"return_token_ids": default}, **fields
        )
        return any("token_ids" in choice for choice in choices_of(chunks))

    def test_default_applies_to_requests_that_do_not_say(self):
        for request_class in (ChatCompletionRequest, CompletionRequest):
            for stream in (False, True):
                with self.subTest(request_class=request_class, stream=stream):
                    self.assertTrue(self.has_ids(request_class, True, stream=stream))
                    self.assertFalse(self.has_ids(request_class, False, stream=stream))

    def test_a_request_that_says_wins(self):
        for request_class in (ChatCompletionRequest, CompletionRequest):
            with self.subTest(request_class=request_class):
                self.assertFalse(
                    self.has_ids(request_class, True, return_token_ids=False)
                )
                self.assertTrue(
                    self.has_ids(request_class, False, return_token_ids=True)
                )

    def published(self, *flags):
        with tempfile.TemporaryDirectory() as model, patch.dict(os.environ):
            config = LlamaConfig(architectures=["LlamaForCausalLM"])
            config.save_pretrained(model)
            args = [f"--model-path={model}", "--device=cpu", *flags]
            server_args = prepare_server_args(args)
            reset_context()
            publish(server_args, role="tokenizer")
        return get_serving().return_token_ids

    def test_flag_and_environment_variable(self):
        self.assertFalse(self.published())
        self.assertTrue(self.published("--return-token-ids"))
        with envs.SGLANG_RETURN_TOKEN_IDS.override(True):
            self.assertTrue(self.published())


if __name__ == "__main__":
    unittest.main()
