"""The environments of the clients, and a proxy that keeps what they asked and got."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import requests

from testbed.tiny_model import tiny_model_path
from tools.common import BUILD
from tools.environment import PIP, make_environment, python_of

CLIENTS = Path(__file__).parent
TIMEOUT_S = 600


def client_python(name: str) -> Path:
    """Return the Python that has the packages of requirements-NAME.txt, made once."""
    env = BUILD / f"env-clients-{name}"
    requirements = (CLIENTS / f"requirements-{name}.txt").read_text()
    make_environment(env, [PIP], requirements)
    return python_of(env)


def run_client(environment: str, script: str, url: str, call: str) -> Any:
    """Run a script of this folder against a server and return what it prints."""
    result = subprocess.run(
        [client_python(environment), CLIENTS / script, url, tiny_model_path(qwen=True), call],
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "PRIME_API_KEY": "none"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


class Exchange(NamedTuple):
    """A request and its answer."""

    path: str
    request: dict[str, Any]
    answer: dict[str, Any]


def name_tokens_by_id(answer: dict[str, Any]) -> None:
    """Add what releases of vLLM before 0.32 have, and `renderers` 0.1.12 insists on."""
    for choice in answer["choices"]:
        for entry in choice["logprobs"]["content"]:
            entry["token"] = f"token_id:{entry['token_id']}"


class Proxy:
    """Passes requests on to a server, and keeps them with their answers, in order.

    Args:
        amend: Changes an answer before it is kept and passed on.
    """

    def __init__(self, target: str, amend: Callable[[dict[str, Any]], None] | None = None):
        self.exchanges: list[Exchange] = []
        exchanges = self.exchanges

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {"Content-Type": "application/json"}
                answer = requests.post(target + self.path, data=body, headers=headers, timeout=120)
                data = answer.json()
                if amend is not None and answer.ok:
                    amend(data)
                exchanges.append(Exchange(self.path, json.loads(body), data))
                content = json.dumps(data).encode()
                self.send_response(answer.status_code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
