"""C12: dumps and shutdown are stock's while requests with ids run and after them."""

from __future__ import annotations

import contextlib
import pickle
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import requests

from testbed.client import CHAT, COMPLETIONS, chat, completion, post
from testbed.server import CRASH_DUMPS, Server

TIMEOUT_S = 60.0


def dumps_in(folder: Path) -> list[list[Any]]:
    """Return the requests of each dump, but not of one that is still being written."""
    dumps = []
    for path in folder.rglob("*.pkl"):
        with contextlib.suppress(EOFError, pickle.UnpicklingError):
            dumps.append(list(pickle.loads(path.read_bytes())["requests"]))
    return dumps


@pytest.mark.clause("C12")
@pytest.mark.parametrize("server", ["dumps"], indirect=True)
def test_requests_with_ids_are_dumped(server: Server, tmp_path: Path) -> None:
    """Both kinds of dump hold the requests, and a server whose child fails ends."""
    config = {"dump_requests_folder": str(tmp_path), "dump_requests_threshold": 3}
    requests.post(f"{server.url}/configure_logging", json=config, timeout=30).raise_for_status()
    post(server, CHAT, chat({"max_tokens": 4}))
    post(server, COMPLETIONS, completion({"max_tokens": 4, "n": 2}))
    deadline = time.monotonic() + TIMEOUT_S
    while not (dumps := dumps_in(tmp_path)):
        assert time.monotonic() < deadline, "no dump of the requests was written"
        time.sleep(0.1)
    assert len(dumps[0]) == 3

    shutil.rmtree(CRASH_DUMPS, ignore_errors=True)
    server.slow_down()
    body = chat({"max_tokens": 400, "ignore_eos": True, "stream": True})
    with requests.post(server.url + CHAT, json=body, stream=True, timeout=TIMEOUT_S) as response:
        next(response.iter_lines())
        # What a child that fails sends to the first process.
        server.process.send_signal(signal.SIGQUIT)
        server.process.wait(TIMEOUT_S)
    [dump] = dumps_in(CRASH_DUMPS)
    # Three requests that are done, and the one that is not.
    assert len(dump) >= 4
