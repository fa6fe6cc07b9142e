"""A proxy that passes requests on as they are, and records what was asked and answered."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests

# What holds for one connection is not passed on.
HOP_BY_HOP = ("host", "connection", "content-length", "transfer-encoding", "accept-encoding")


@dataclasses.dataclass
class Exchange:
    """A request and its answer.

    Attributes:
        path: Without a query.
        text: The answer, whole or the events of a stream.
    """

    path: str
    request: dict[str, Any]
    status: int
    text: str

    @property
    def answer(self) -> Any:
        """The answer of a request that is not streamed."""
        return json.loads(self.text)


class RecordingProxy:
    """Use it as a context manager.

    Args:
        target: The URL of the server, without a trailing slash.
        amend: Changes an answer, not streamed, before it is passed on and recorded.

    Attributes:
        url: Where it listens, without a trailing slash.
        exchanges: The requests with a body, in the order in which their answers ended.
    """

    def __init__(self, target: str, amend: Callable[[dict[str, Any]], None] | None = None):
        self.exchanges: list[Exchange] = []
        exchanges = self.exchanges

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.pass_on(b"")

            def do_POST(self) -> None:
                self.pass_on(self.rfile.read(int(self.headers["Content-Length"])))

            def pass_on(self, body: bytes) -> None:
                headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP_BY_HOP}
                url = target + self.path
                answer = requests.request(
                    self.command, url, data=body, headers=headers, stream=True, timeout=300
                )
                self.send_response(answer.status_code)
                self.send_header("Content-Type", answer.headers.get("Content-Type", ""))
                self.end_headers()
                parts = []
                for part in self.parts_of(answer):
                    parts.append(part)
                    self.wfile.write(part)
                if body:
                    text = b"".join(parts).decode()
                    path = self.path.partition("?")[0]
                    exchanges.append(Exchange(path, json.loads(body), answer.status_code, text))

            def parts_of(self, answer: requests.Response) -> Iterable[bytes]:
                if amend is None or not answer.ok:
                    return answer.iter_content(None)
                data = answer.json()
                amend(data)
                return [json.dumps(data).encode()]

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> RecordingProxy:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
