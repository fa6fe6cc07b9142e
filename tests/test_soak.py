"""Every id that leaves the scheduler reaches its client once, and nothing is left behind.

A short run of `bench.http_process --soak`.
"""

from __future__ import annotations

import time

import pytest
import requests

from bench.common import MESSAGES
from bench.soak import KINDS, MODES, soak
from testbed.scheduler import EnginelessServer
from testbed.server import FAILS_ABORTED_STREAMS

pytestmark = pytest.mark.full
# Stock keeps what belongs to a stream for 2 s after its end.
KEPT_S = 30.0


@pytest.mark.clause("C2", "C3", "C5", "C7")
@pytest.mark.parametrize("mode", MODES)
def test_every_id_is_received_once_and_nothing_is_left(mode: str) -> None:
    num_ids, reasons = soak(mode, num_ids=8_000, clients=20, processes=1, tokens=64)
    assert num_ids.total() >= 8_000
    assert num_ids.keys() == KINDS.keys()
    assert reasons["abort: abort"] > 0 or FAILS_ABORTED_STREAMS
    assert reasons["hang up: None"] > 0


@pytest.mark.clause("C7")
def test_requests_do_not_wait_for_the_garbage_collector() -> None:
    """To look at all objects of the HTTP process takes half a second, in which it serves nobody."""
    with EnginelessServer("garbage") as server:
        server.left("no garbage collector")
        body = {"model": "m", "max_tokens": 8, "stream": True, "return_token_ids": True, **MESSAGES}
        for _ in range(3):
            response = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
            assert '"token_ids":[' in response.text
        deadline = time.monotonic() + KEPT_S
        while (left := server.left("count"))["recorders"] and time.monotonic() < deadline:
            time.sleep(0.5)
        assert left == {"states": 0, "recorders": 0}
