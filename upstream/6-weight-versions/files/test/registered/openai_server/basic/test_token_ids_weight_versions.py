"""Which token ids of a choice came from which weights.

python test/registered/openai_server/basic/test_token_ids_weight_versions.py
"""

import unittest

from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
)
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.scripted_serving import ScriptedServingTestCase, Step, choices_of

register_cpu_ci(est_time=10, suite="base-a-test-cpu")

ENDPOINTS = (ChatCompletionRequest, CompletionRequest)


def spans(boundary):
    return [
        {"version": "1", "start": 0, "end": boundary},
        {"version": "2", "start": boundary, "end": 3},
    ]


def steps(boundary):
    last = {"weight_versions": spans(boundary)}
    return [Step([10], "a"), Step([11], "b"), Step([2], "", last)]


class TestTokenIdsWeightVersions(ScriptedServingTestCase):
    def test_whole_responses_have_those_of_each_choice(self):
        for request_class in ENDPOINTS:
            with self.subTest(request_class=request_class):
                [response] = self.ask(
                    request_class, [steps(1), steps(2)], return_token_ids=True
                )
                found = [c["weight_versions"] for c in response["choices"]]
                self.assertEqual(found, [spans(1), spans(2)])

    def test_streams_have_them_once_and_at_the_end(self):
        for request_class in ENDPOINTS:
            with self.subTest(request_class=request_class):
                chunks = self.ask(
                    request_class,
                    [steps(1), steps(2)],
                    stream=True,
                    return_token_ids=True,
                )
                for index, boundary in enumerate((1, 2)):
                    having = [
                        choice
                        for choice in choices_of(chunks, index)
                        if "weight_versions" in choice
                    ]
                    self.assertEqual(len(having), 1)
                    self.assertEqual(having[0]["weight_versions"], spans(boundary))
                    self.assertEqual(having[0]["finish_reason"], "stop")

    def test_requests_that_do_not_ask_have_none(self):
        for request_class in ENDPOINTS:
            for stream in (False, True):
                with self.subTest(request_class=request_class, stream=stream):
                    chunks = self.ask(request_class, [steps(1)], stream=stream)
                    for choice in choices_of(chunks):
                        self.assertNotIn("weight_versions", choice)


if __name__ == "__main__":
    unittest.main()
