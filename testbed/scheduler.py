"""A server without an engine: a stand-in takes the place of the scheduler process.

HTTP server, tokenizer manager and detokenizer are the real ones, in the processes that
`launch_server` starts. The stand-in speaks the scheduler's protocol and puts out one token a
step for each running request, at a pace that `/slow_down` sets: as fast as it can, or a step
in so many seconds. What it puts out is a function of the request, so that a client can tell
whether it has all of it, once and in order: see `Script`.

    python -m testbed.scheduler [--control-fd N] [--progress FILE] FLAGS OF THE SERVER
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import mmap
import os
import random
import re
import signal
import socket
import threading
import time
from array import array
from pathlib import Path
from typing import Any

from testbed.release import ROOT
from testbed.server import Server
from testbed.tiny_model import EOS, load_tokenizer, tiny_model_path

# So long that ids out of place do not look right by chance.
TABLE_LENGTH = 65_537
# What the names of the classes end with that record the ids of a request.
RECORDER = "TokenIdRecorder"
# As many tokens of the prompt as the scheduler gives to the detokenizer.
NUM_CONTEXT_TOKENS = 5
# The progress of up to so many processes of clients, as integers of 8 bytes.
MAX_CLIENT_PROCESSES = 64
PROGRESS_BYTES = 8 * MAX_CLIENT_PROCESSES
# Pace at which steps wait for the clients, which a server cannot be asked for by itself.
LOCKSTEP = -1.0
# How long a step waits for them at most: outputs that were read together come as one chunk.
LOCKSTEP_PATIENCE_S = 0.1


class Script:
    """What the stand-in says, for itself and for the clients that check it.

    A request with a seed gets the ids of a table of random ASCII tokens from a position on
    that follows from the seed, and of choice k the ones further on. A `regex` in the request
    is an escaped text that it says first, a character a token, and stops after it.
    """

    def __init__(self) -> None:
        tokenizer = load_tokenizer()
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        # No letters that a parser could take for the start of something.
        self.ids = [i for i, text in enumerate(texts) if re.fullmatch(r"[ a-zA-Z,.]+", text)]
        self.characters = {text: i for i, text in enumerate(texts) if len(text) == 1}
        self.eos: int = tokenizer.convert_tokens_to_ids(EOS)
        self.table = random.Random(0).choices(self.ids, k=TABLE_LENGTH)
        self.table += self.table

    def plan(self, seed: int, length: int, text: str | None, choice: int = 0) -> list[int]:
        """Return the ids of a choice that nothing interrupts."""
        if text is not None:
            return [*(self.characters[x] for x in text), self.eos][:length]
        start = (seed * 7919 + choice * 104_729) % TABLE_LENGTH
        ids = self.table[start : start + length]
        while len(ids) < length:
            ids += self.table[: length - len(ids)]
        return ids

    @staticmethod
    def logprob(position: int) -> float:
        """The log-probability of the id at this position. Exact in single precision."""
        return -(position % 1021 + 1) / 64


@dataclasses.dataclass
class Running:
    """A request that has not ended."""

    request: Any
    ids: list[int]
    stops: bool
    num_sent: int = 0
    num_done: int = 0
    is_aborted: bool = False


class StandIn:
    """The stand-in for the scheduler."""

    def __init__(self, server_args: Any, port_args: Any, progress: str | None):
        import zmq
        from sglang.srt.managers import io_struct

        try:
            from sglang.srt.utils.network import get_zmq_socket
        except ImportError:
            from sglang.srt.utils import get_zmq_socket

        context = zmq.Context(2)
        self.zmq, self.io = zmq, io_struct
        self.receiver = get_zmq_socket(context, zmq.PULL, port_args.scheduler_input_ipc_name, False)
        self.to_tokenizer = get_zmq_socket(context, zmq.PUSH, port_args.tokenizer_ipc_name, False)
        self.to_detokenizer = get_zmq_socket(
            context, zmq.PUSH, port_args.detokenizer_ipc_name, False
        )
        self.is_packed = hasattr(io_struct, "sock_send")
        self.script = Script()
        self.stream_interval: int = server_args.stream_interval
        self.running: dict[str, Running] = {}
        self.choices: dict[int, int] = {}
        self.pace = 0.0
        # The next step is due then, or in lockstep when clients have read so many chunks.
        self.due = 0.0
        self.enough = 0
        self.progress: memoryview | None = None
        if progress:
            with open(progress, "r+b") as file:
                self.progress = memoryview(mmap.mmap(file.fileno(), PROGRESS_BYTES)).cast("q")

    def send(self, socket_: Any, message: Any) -> None:
        if self.is_packed:
            self.io.sock_send(socket_, message)
        else:
            socket_.send_pyobj(message)

    def receive(self) -> Any:
        if self.is_packed:
            return self.io.sock_recv(self.receiver, self.zmq.NOBLOCK)
        return self.receiver.recv_pyobj(self.zmq.NOBLOCK)

    def run(self) -> None:
        while True:
            # Polls are in whole milliseconds, so one that is too short does not wait.
            wait = int(self.seconds_to_wait() * 1000) if self.running else None
            if self.receiver.poll(wait):
                with contextlib.suppress(self.zmq.Again):
                    while True:
                        self.handle(self.receive())
            elif wait == 0 and (seconds := self.seconds_to_wait()):
                time.sleep(seconds)
            if self.running and not self.seconds_to_wait():
                # Before the step is sent: clients may read it before the next one is planned.
                progress = self.count_progress() if self.pace == LOCKSTEP else 0
                self.step()
                self.plan_next_step(progress)

    def seconds_to_wait(self) -> float:
        """How long to wait before it is looked again whether a step is due. It is with 0."""
        now = time.monotonic()
        if now >= self.due:
            return 0.0
        if self.pace == LOCKSTEP:
            return 0.001 if self.count_progress() < self.enough else 0.0
        return self.due - now

    def plan_next_step(self, progress: int) -> None:
        """Say when the next step is due, after one at whose start clients had read so much."""
        now = time.monotonic()
        if self.pace == LOCKSTEP:
            # Few are left of a step when the next one is sent, or they would be read together.
            count = len(self.running)
            self.enough = progress + max(1, count - (count + 19) // 20)
            self.due = now + LOCKSTEP_PATIENCE_S
        else:
            # A late step is not made up for.
            self.due = max(self.due + self.pace, now)

    def count_progress(self) -> int:
        assert self.progress is not None, "Start the server with --progress."
        return sum(self.progress)

    def handle(self, message: Any) -> None:
        io = self.io
        if isinstance(message, io.TokenizedGenerateReqInput):
            self.start(message)
        elif isinstance(message, io.BatchTokenizedGenerateReqInput):
            for request in message:
                self.start(request)
        elif isinstance(message, io.AbortReq):
            for rid, running in self.running.items():
                running.is_aborted |= message.abort_all or rid.startswith(message.rid)
        elif isinstance(message, io.SlowDownReqInput):
            self.pace = message.forward_sleep_time or 0.0
            self.due = 0.0
            self.reply(message, io.SlowDownReqOutput())
        elif isinstance(message, io.FlushCacheReqInput):
            self.choices.clear()
            self.reply(message, io.FlushCacheReqOutput(success=not self.running))
        elif isinstance(message, io.GetInternalStateReq):
            self.reply(message, io.GetInternalStateReqOutput(internal_state={}))
        elif not isinstance(message, io.FreezeGCReq):
            raise TypeError(f"The stand-in does not know {type(message).__name__}.")

    def reply(self, message: Any, answer: Any) -> None:
        answer.rid, answer.http_worker_ipc = message.rid, message.http_worker_ipc
        self.send(self.to_tokenizer, answer)

    def start(self, request: Any) -> None:
        sampling = request.sampling_params
        text = None if sampling.regex is None else re.sub(r"(?s)\\(.)", r"\1", sampling.regex)
        seed = sampling.sampling_seed or 0
        choice = self.choices.get(seed, 0)
        if sampling.sampling_seed is not None and sampling.max_new_tokens > 0:
            self.choices[seed] = choice + 1
        ids = self.script.plan(seed, sampling.max_new_tokens, text, choice)
        # There is one for no tokens before those of n choices, to prime the cache.
        self.running[request.rid] = Running(request, ids, stops=text is not None)

    def step(self) -> None:
        outputs: list[tuple[Running, dict[str, Any] | None]] = []
        for running in list(self.running.values()):
            running.num_done = min(running.num_done + 1, len(running.ids))
            reason = None
            if running.num_done == len(running.ids):
                reason = {"type": "length", "length": len(running.ids)}
                if running.stops and running.ids[-1:] == [self.script.eos]:
                    reason = {"type": "stop", "matched": self.script.eos}
            elif running.is_aborted:
                reason = {
                    "type": "abort",
                    "message": "Aborted",
                    "status_code": None,
                    "err_type": None,
                }
            if reason is not None:
                del self.running[running.request.rid]
            elif not running.request.stream or (
                self.stream_interval > 1 and running.num_done % self.stream_interval != 1
            ):
                continue
            outputs.append((running, reason))
        if outputs:
            self.send(self.to_detokenizer, self.make_output(outputs))
        for running, _ in outputs:
            running.num_sent = running.num_done

    def make_output(self, outputs: list[tuple[Running, dict[str, Any] | None]]) -> Any:
        known = _fields(self.io.BatchTokenIDOutput)
        pack = functools.partial(array, "q") if self.is_packed else list
        values: dict[str, Any] = dict.fromkeys(known[0])
        columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS if name in known[1]}
        with_logprobs = any(running.request.return_logprob for running, _ in outputs)
        logprobs: dict[str, list[Any]] = {}
        if with_logprobs:
            logprobs = {name: [] for name in known[1] if "logprobs_" in name}
            logprobs = {k: v for k, v in logprobs.items() if "flat" not in k}
        for running, reason in outputs:
            request, sampling = running.request, running.request.sampling_params
            new = running.ids[running.num_sent : running.num_done]
            context = list(request.input_ids[-NUM_CONTEXT_TOKENS:])
            row = {
                "rids": request.rid,
                "http_worker_ipcs": request.http_worker_ipc,
                "finished_reasons": reason,
                "decoded_texts": "",
                "decode_ids": pack(new if running.num_sent else context + new),
                "read_offsets": len(context),
                "output_ids": pack(new),
                "skip_special_tokens": sampling.skip_special_tokens,
                "spaces_between_special_tokens": sampling.spaces_between_special_tokens,
                "no_stop_trim": sampling.no_stop_trim,
                "prompt_tokens": len(request.input_ids),
                "reasoning_tokens": 0,
                "completion_tokens": running.num_done,
                "cached_tokens": 0,
                "retraction_counts": 0,
            }
            for name, column in columns.items():
                column.append(row[name])
            if not with_logprobs:
                continue
            positions = range(running.num_sent, running.num_done)
            for column in logprobs.values():
                column.append([])
            if request.return_logprob:
                own = [self.script.logprob(i) for i in positions]
                logprobs["output_token_logprobs_val"][-1] = own
                logprobs["output_token_logprobs_idx"][-1] = new
                count = request.top_logprobs_num
                others = [
                    [token, *(x for x in self.script.ids[:count] if x != token)][:count]
                    for token in new
                ]
                logprobs["output_top_logprobs_idx"][-1] = others
                logprobs["output_top_logprobs_val"][-1] = [
                    [value - k for k in range(count)] for value in own
                ]
        values.update(columns)
        values.update(logprobs)
        return self.io.BatchTokenIDOutput(**values)


_COLUMNS = (
    "rids http_worker_ipcs finished_reasons decoded_texts decode_ids read_offsets output_ids "
    "skip_special_tokens spaces_between_special_tokens no_stop_trim prompt_tokens "
    "reasoning_tokens completion_tokens cached_tokens retraction_counts"
).split()


@functools.lru_cache
def _fields(message_class: type) -> tuple[list[str], list[str]]:
    """The fields of a message that have no default, and all of them."""
    if dataclasses.is_dataclass(message_class):
        fields = dataclasses.fields(message_class)
        missing = dataclasses.MISSING
        return (
            [f.name for f in fields if f.default is missing and f.default_factory is missing],
            [f.name for f in fields],
        )
    import msgspec

    found = msgspec.structs.fields(message_class)
    return [f.name for f in found if f.required], [f.name for f in found]


def run_stand_in(
    progress: str | None, server_args: Any, port_args: Any, *args: Any, **_: Any
) -> None:
    """Take the place of `run_scheduler_process`. The pipe is the last argument that it has."""
    from sglang.srt.utils import kill_itself_when_parent_died

    kill_itself_when_parent_died()
    [pipe] = [arg for arg in args if hasattr(arg, "send")]
    stand_in = StandIn(server_args, port_args, progress)
    pipe.send(
        {
            "status": "ready",
            "max_total_num_tokens": 1 << 24,
            "max_req_input_len": 1 << 20,
            "startup_time": {},
        }
    )
    stand_in.run()


def answer(control: socket.socket) -> None:
    """Answer each line with what is left in the HTTP process of requests, as JSON.

    The garbage collector runs before the answer to `collect`, and never again after
    `no garbage collector`.
    """
    from sglang.srt.entrypoints import http_server

    with control.makefile("rw") as stream:
        for line in stream:
            if line.strip() == "collect":
                gc.collect()
            elif line.strip() == "no garbage collector":
                gc.disable()
            manager = http_server.get_global_state().tokenizer_manager
            recorders = sum(type(x).__name__.endswith(RECORDER) for x in gc.get_objects())
            report = {"states": len(manager.rid_to_state), "recorders": recorders}
            stream.write(json.dumps(report) + "\n")
            stream.flush()
    # Who started the server is gone. The group is the server's own.
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import prepare_server_args

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--control-fd", type=int, help="a socket to ask for what is left")
    parser.add_argument("--progress", help="a file that clients count chunks in")
    args, flags = parser.parse_known_args()
    server_args = prepare_server_args(flags)
    if args.control_fd is not None:
        control = socket.socket(fileno=args.control_fd)
        os.set_inheritable(args.control_fd, False)
        threading.Thread(target=answer, args=(control,), daemon=True).start()
    launch_server(
        server_args,
        run_scheduler_process_func=functools.partial(run_stand_in, args.progress),
    )


class EnginelessServer(Server):
    """A server with the stand-in, as a context manager.

    Args:
        package: The folder of the package that it runs, or None for the installed one.
        progress: Where clients count chunks, if steps are to wait for them.
    """

    def __init__(
        self, name: str, *flags: str, package: Path | None = None, progress: Path | None = None
    ):
        self.control, theirs = socket.socketpair()
        command = ["testbed.scheduler", f"--control-fd={theirs.fileno()}"]
        if progress is not None:
            command.append(f"--progress={progress}")
        command += ["--model-path", str(tiny_model_path())]
        command += ["--device=cpu", "--attention-backend=torch_native", "--skip-server-warmup"]
        command += ["--disable-overlap-schedule", "--max-total-tokens=65536", *flags]
        # What the package imports may be there as well.
        paths = [str(package) if package else None, os.environ.get("PYTHONPATH"), str(ROOT)]
        env = {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        log = f"engineless-{re.sub(r'[^a-z0-9]+', '-', name)}"
        with theirs:
            self._start(name, log, command, env, (theirs.fileno(),))

    def left(self, command: str = "collect") -> dict[str, int]:
        """How many requests the tokenizer manager knows, and how many recorders there are."""
        with self.control.dup() as control, control.makefile("rw") as stream:
            stream.write(f"{command}\n")
            stream.flush()
            return json.loads(stream.readline())

    def stop(self) -> None:
        super().stop()
        self.control.close()


if __name__ == "__main__":
    main()
