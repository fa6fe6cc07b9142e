"""Verify that a server returns exact token ids, for your own model and GPU.

Checks a running server (--url), or starts one with the Python that runs this
(--model, with server flags after `--`). The tokenizer comes from --model, or from the
path that the server reports. Needs `transformers` to decode.

Exit status: 0 if no check failed, 1 if one did, 2 if the checks could not be run.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from tools.common import ToolError, say

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Look up the weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]


class ServerTrouble(ToolError):
    """The checks could not be run. The message is one line."""

    exit_status = 2


class Failed(Exception):
    """A check failed. The message says what differed."""


class Skipped(Exception):
    """A check does not apply. The message says why."""


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise Failed(what)


def expect_same(actual: object, expected: object, what: str) -> None:
    if actual != expected:
        raise Failed(f"{what}: {brief(actual)} instead of {brief(expected)}")


def brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}...{text[-15:]}"


@dataclasses.dataclass
class Stream:
    """A streamed response: its chunks, and what they hold by choice."""

    chunks: list[dict[str, Any]]

    def choices(self, index: int = 0) -> list[dict[str, Any]]:
        return [c for chunk in self.chunks for c in chunk["choices"] if c["index"] == index]

    def ids(self, index: int = 0) -> list[int]:
        return [i for choice in self.choices(index) for i in choice.get("token_ids") or []]

    def text(self, index: int = 0) -> str:
        return "".join(plain_text(choice) for choice in self.choices(index))

    @property
    def usage(self) -> dict[str, int]:
        usage: dict[str, int] = self.chunks[-1]["usage"]
        return usage


def plain_text(choice: dict[str, Any]) -> str:
    """The text of a choice of a response or a chunk, with its reasoning in front."""
    message = choice.get("message") or choice.get("delta") or {}
    parts = (choice.get("text"), message.get("reasoning_content"), message.get("content"))
    return "".join(part or "" for part in parts)


class Server:
    """A running server and the tokenizer of its model."""

    def __init__(self, url: str, api_key: str | None, model: str | None):
        self.url = url.rstrip("/")
        self.headers = {"Content-Type": "application/json"}
        if api_key:
            self.headers["Authorization"] = f"Bearer {api_key}"
        self.model = model or str(self.get("/get_model_info")["model_path"])
        try:
            from transformers import AutoTokenizer
        except ImportError as e:
            raise ServerTrouble(f"transformers is needed to decode token ids: {e}") from None
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(self.model, trust_remote_code=True)
        except (OSError, ValueError) as e:
            reason = str(e).splitlines()[0]
            raise ServerTrouble(f"no tokenizer for {self.model}: {reason}") from None

    def get(self, path: str) -> dict[str, Any]:
        request = urllib.request.Request(self.url + path, headers=self.headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                answer: dict[str, Any] = json.load(response)
                return answer
        except (OSError, ValueError) as e:
            raise ServerTrouble(f"{self.url}{path}: {e}") from None

    def send(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        """Return the status and the body of a response, also of an error."""
        data = json.dumps({"model": "default", **body}).encode()
        request = urllib.request.Request(self.url + path, data, self.headers)
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as e:
            return e.code, e.read().decode(errors="replace")
        except OSError as e:
            raise ServerTrouble(f"{self.url}{path}: {e}") from None

    def whole(self, path: str, **body: Any) -> dict[str, Any]:
        status, text = self.send(path, {"temperature": 0, "return_token_ids": True, **body})
        expect(status == 200, f"HTTP {status}: {text[:200]}")
        answer: dict[str, Any] = json.loads(text)
        return answer

    def streamed(self, path: str, **body: Any) -> Stream:
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        status, text = self.send(
            path, {"temperature": 0, "return_token_ids": True, **usage, **body}
        )
        expect(status == 200, f"HTTP {status}: {text[:200]}")
        lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
        chunks = [json.loads(line) for line in lines if line.startswith("{")]
        for chunk in chunks:
            expect("error" not in chunk, f"an error in the stream: {chunk.get('error')}")
        return Stream(chunks)

    def expect_decodes(self, ids: list[int], text: str) -> None:
        """Expect that ids decode to a text, however the server treats special tokens.

        A reasoning or tool parser takes tags and white space out of the text, and a stop
        takes its end; what is left must be found in the decoded ids in order.
        """
        variants = [self.tokenizer.decode(ids, skip_special_tokens=skip) for skip in (True, False)]
        if any(variant == text for variant in variants):
            return
        for variant in variants:
            position = 0
            for character in text:
                position = variant.find(character, position) + 1
                if position == 0:
                    break
            else:
                return
        raise Failed(f"the ids decode to {brief(variants[0])}, the text is {brief(text)}")


@dataclasses.dataclass
class Options:
    prompt: str
    max_tokens: int

    @property
    def chat(self) -> dict[str, Any]:
        messages = [{"role": "user", "content": self.prompt}]
        return {"messages": messages, "max_tokens": self.max_tokens}

    @property
    def completion(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "max_tokens": self.max_tokens}


def field(data: dict[str, Any], name: str, where: str) -> list[int]:
    expect(name in data, f"no {name} {where}")
    value = data[name]
    ids = isinstance(value, list) and all(type(i) is int for i in value)
    expect(ids, f"{name} {where} is {brief(value)}")
    return list(value)


def check_chat_whole(server: Server, options: Options) -> None:
    answer = server.whole(CHAT, **options.chat)
    prompt = field(answer, "prompt_token_ids", "on the response")
    choice = answer["choices"][0]
    ids = field(choice, "token_ids", "on the choice")
    expect_same(len(prompt), answer["usage"]["prompt_tokens"], "number of prompt ids")
    expect_same(len(ids), answer["usage"]["completion_tokens"], "number of ids")
    server.expect_decodes(ids, plain_text(choice))


def check_chat_streamed(server: Server, options: Options) -> None:
    stream = server.streamed(CHAT, **options.chat)
    prompt = field(stream.chunks[0], "prompt_token_ids", "on the first chunk")
    for number, chunk in enumerate(stream.chunks[1:], 2):
        expect("prompt_token_ids" not in chunk, f"prompt_token_ids again on chunk {number}")
    expect_same(len(prompt), stream.usage["prompt_tokens"], "number of prompt ids")
    expect_same(len(stream.ids()), stream.usage["completion_tokens"], "number of ids")
    server.expect_decodes(stream.ids(), stream.text())


def check_modes_agree(server: Server, options: Options) -> None:
    answer = server.whole(CHAT, **options.chat)
    stream = server.streamed(CHAT, **options.chat)
    whole = field(answer["choices"][0], "token_ids", "on the choice")
    expect_same(stream.ids(), whole, "streamed ids")
    prompt = field(stream.chunks[0], "prompt_token_ids", "on the first chunk")
    expect_same(prompt, answer["prompt_token_ids"], "streamed prompt ids")


def check_tools_agree(server: Server, options: Options) -> None:
    """A tool parser changes what is shown, and must not change the ids."""
    with_tools = {**options.chat, "tools": TOOLS}
    parsed = server.whole(CHAT, **with_tools)
    stream = server.streamed(CHAT, **with_tools)
    ids = field(parsed["choices"][0], "token_ids", "on the choice")
    expect_same(stream.ids(), ids, "streamed ids")
    expect_same(len(ids), parsed["usage"]["completion_tokens"], "number of ids")
    # The same prompt as ids, past all parsers.
    body = {**options.completion, "prompt": parsed["prompt_token_ids"]}
    plain = server.whole(COMPLETIONS, **body, skip_special_tokens=False)["choices"][0]
    expect_same(ids, field(plain, "token_ids", "on the choice"), "ids with tools")


def check_several_choices(server: Server, options: Options) -> None:
    answer = server.whole(CHAT, **options.chat, n=2)
    stream = server.streamed(CHAT, **options.chat, n=2)
    ids = [field(choice, "token_ids", "on the choice") for choice in answer["choices"]]
    expect_same(len(ids), 2, "number of choices")
    total = answer["usage"]["completion_tokens"]
    expect_same(sum(map(len, ids)), total, "number of ids")
    for index in range(2):
        expect_same(stream.ids(index), ids[index], f"streamed ids of choice {index}")


def check_logprobs(server: Server, options: Options) -> None:
    body = {**options.chat, "logprobs": True, "top_logprobs": 2}
    choice = server.whole(CHAT, **body)["choices"][0]
    expect_logprobs(server, choice, "the response")
    stream = server.streamed(CHAT, **body)
    for number, chunk in enumerate(stream.chunks, 1):
        for choice in chunk["choices"]:
            expect_logprobs(server, choice, f"chunk {number}")
    expect(bool(stream.ids()), "no token_ids in the stream")


def expect_logprobs(server: Server, choice: dict[str, Any], where: str) -> None:
    ids = choice.get("token_ids") or []
    entries = (choice.get("logprobs") or {}).get("content") or []
    expect_same(len(entries), len(ids), f"log-probabilities on {where}")
    expect(bool(ids) or where != "the response", "no token_ids on the choice")
    for entry, token_id in zip(entries, ids):
        expect_same(entry["token"], server.tokenizer.decode([token_id]), f"token on {where}")


def check_completions(server: Server, options: Options) -> None:
    answer = server.whole(COMPLETIONS, **options.completion)
    choice = answer["choices"][0]
    prompt = field(choice, "prompt_token_ids", "on the choice")
    ids = field(choice, "token_ids", "on the choice")
    expect_same(prompt, server.tokenizer.encode(options.prompt), "prompt ids")
    server.expect_decodes(ids, choice["text"])
    stream = server.streamed(COMPLETIONS, **options.completion)
    first = stream.choices()[0]
    expect_same(field(first, "prompt_token_ids", "on the first chunk"), prompt, "prompt ids")
    expect_same(stream.ids(), ids, "streamed ids")


def check_prompt_ids_come_back(server: Server, options: Options) -> None:
    ids = server.tokenizer.encode(options.prompt)
    # Not the canonical tokens of their text, so that tokenizing again would show.
    prompt = [*ids, *ids[-1:], *ids[:1]]
    choice = server.whole(COMPLETIONS, prompt=prompt, max_tokens=4)["choices"][0]
    expect_same(field(choice, "prompt_token_ids", "on the choice"), prompt, "prompt ids")


def check_stop_string(server: Server, options: Options) -> None:
    body = {**options.completion, "ignore_eos": True}
    text = server.whole(COMPLETIONS, **body)["choices"][0]["text"]
    stop = next((c for c in text[1:] if c.isalnum() and c.isascii()), None)
    if stop is None:
        raise Skipped("the model said nothing that could serve as a stop string")
    answer = server.whole(COMPLETIONS, **body, stop=[stop])
    choice = answer["choices"][0]
    ids = field(choice, "token_ids", "on the choice")
    expect_same(len(ids), answer["usage"]["completion_tokens"], "number of ids")
    decoded = server.tokenizer.decode(ids)
    expect(stop in decoded, f"the ids of the stop string {stop!r} are missing")
    stream = server.streamed(COMPLETIONS, **body, stop=[stop])
    expect_same(stream.ids(), ids, "streamed ids")


def check_off(server: Server, options: Options) -> None:
    for path, body in ((CHAT, options.chat), (COMPLETIONS, options.completion)):
        answer = server.whole(path, **body, return_token_ids=False)
        stream = server.streamed(path, **body, return_token_ids=False)
        text = json.dumps([answer, stream.chunks])
        expect("token_ids" not in text, f"{path} has token_ids though false was asked for")


def check_bad_input(server: Server, options: Options) -> None:
    for path, body in ((CHAT, options.chat), (COMPLETIONS, options.completion)):
        # A release that has the field itself reads "yes" as true.
        status, text = server.send(path, {**body, "return_token_ids": "maybe"})
        expect(400 <= status < 500, f"{path} answers {status} to a return_token_ids of 'maybe'")
        expect("return_token_ids" in text, f"the error of {path} does not name the field")


CHECKS: dict[str, Callable[[Server, Options], None]] = {
    "chat, whole": check_chat_whole,
    "chat, streamed": check_chat_streamed,
    "chat, whole and streamed agree": check_modes_agree,
    "tools on and off agree": check_tools_agree,
    "n=2": check_several_choices,
    "log-probabilities line up": check_logprobs,
    "completions": check_completions,
    "prompt ids come back": check_prompt_ids_come_back,
    "stop string": check_stop_string,
    "false means none": check_off,
    "bad input": check_bad_input,
}


def run_checks(server: Server, options: Options) -> list[dict[str, str]]:
    results = []
    width = max(map(len, CHECKS))
    for name, check in CHECKS.items():
        verdict, detail = "PASS", ""
        try:
            check(server, options)
        except Failed as e:
            verdict, detail = "FAIL", str(e)
        except Skipped as e:
            verdict, detail = "SKIP", str(e)
        except (KeyError, IndexError, TypeError) as e:
            verdict, detail = "FAIL", f"unexpected response: {e!r}"
        print(f"{verdict}  {name:{width}}  {detail}".rstrip(), flush=True)
        results.append({"check": name, "verdict": verdict, "detail": detail})
    return results


_reserved: list[socket.socket] = []


class GroupLeader(Protocol):
    """What is needed of a process that leads a group."""

    pid: int

    def wait(self) -> int: ...


def kill_group(process: GroupLeader) -> None:
    """End a process that leads a group of its own, and all others of the group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def reserve_port() -> int:
    """Return a port of 127.0.0.1 that nobody else is given while this process lives.

    A server takes long to start before it binds its port. Until then this process has it:
    with SO_REUSEADDR, which servers set too, two may bind a port while nobody listens on it.
    """
    while True:
        s = socket.socket()
        # SGLang adds 10000 to it.
        port = random.randrange(20000, 55000)
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            s.close()
            continue
        # Not before: two would reserve the same one.
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _reserved.append(s)
        return port


class OwnServer:
    """A server started for the checks, ended with its whole process group."""

    def __init__(self, model: str, flags: list[str], timeout_s: float):
        port = reserve_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model]
        command += ["--port", str(port), *flags]
        with tempfile.NamedTemporaryFile(
            "w", prefix="verify-server-", suffix=".log", delete=False
        ) as log:
            self.log = Path(log.name)
            say(f"starting a server; its log is {self.log}")
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            self._wait(timeout_s)
        except BaseException:
            self.stop()
            raise

    def _wait(self, timeout_s: float) -> None:
        start = time.monotonic()
        shown = 0
        while True:
            waited = time.monotonic() - start
            if self.process.poll() is not None:
                lines = self.log.read_text(errors="replace").split("\n")
                last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
                raise ServerTrouble(f"the server ended before it was healthy: {last} ({self.log})")
            if waited > timeout_s:
                raise ServerTrouble(
                    f"the server was not healthy after {timeout_s:.0f} s: see {self.log}"
                )
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
            if waited // 10 > shown:
                shown = int(waited // 10)
                say(f"waiting for it to be healthy: {waited:.0f} s")

    def stop(self) -> None:
        kill_group(self.process)


def check_usable(args: argparse.Namespace) -> None:
    """Raise a ServerTrouble if the checks cannot be run, before anything is started."""
    if not args.url and not args.model:
        raise ServerTrouble("give --model (MODEL=) to start a server, or --url of a running one")
    if args.url and args.flags:
        raise ServerTrouble(
            "server flags after `--` are for a server that this starts, not for --url"
        )
    needed = "transformers" if args.url else "sglang"
    if importlib.util.find_spec(needed) is None:
        python = args.otherwise
        if python and Path(python).exists() and Path(python) != Path(sys.executable):
            say(f"{sys.executable} has no {needed}: running with {python}")
            os.execv(python, [python, "-m", "tools", *sys.argv[1:]])
        raise ServerTrouble(
            f"{sys.executable} has no {needed}: name a Python that has with PYTHON="
        )
    # A name on a hub has one slash at most, and is no path.
    if args.model and not Path(args.model).exists():
        if args.model.startswith(("/", ".", "~")) or args.model.count("/") > 1:
            raise ServerTrouble(f"there is no model at {args.model}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [--model PATH] [--url URL] [options] [-- server flags]"
    parser.add_argument("--model", help="the model, or its tokenizer")
    parser.add_argument("--url", help="a running server; without it, one is started")
    parser.add_argument("--api-key", help="the key of the running server")
    parser.add_argument("--prompt", default="Tell me about the weather in Paris.")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--timeout", type=float, default=1200, help="seconds to wait for a start")
    parser.add_argument("--json", metavar="FILE", help="also write the results to a file")
    parser.add_argument("--otherwise", metavar="PYTHON", help="to run with if this has no SGLang")
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> int:
    check_usable(args)
    own = None if args.url else OwnServer(args.model, args.flags, args.timeout)
    try:
        server = Server(own.url if own else args.url, args.api_key, args.model)
        results = run_checks(server, Options(args.prompt, args.max_tokens))
    finally:
        if own:
            own.stop()
    counts = {v: sum(r["verdict"] == v for r in results) for v in ("PASS", "FAIL", "SKIP")}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if args.json:
        Path(args.json).write_text(json.dumps({"checks": results, **counts}, indent=2) + "\n")
    return 1 if counts["FAIL"] else 0
