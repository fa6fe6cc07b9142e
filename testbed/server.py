"""The real SGLang server in a process of its own: on the CPU, or with TEST_DEVICE=cuda."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import requests

from testbed.chained_model import Replies, chained_model_path, replies_that_call
from testbed.chat_shapes import SHAPES
from testbed.forks import ForkedModule
from testbed.harmony import ENCODINGS_BASE, FOLDER, HARMONY_VOCAB_SIZE, harmony_model_path
from testbed.release import NUMBER, ROOT, STOCK, UPSTREAM
from testbed.tiny_model import draft_model_path, moe_model_path, tiny_model_path
from tools.verify import kill_group, reserve_port

START_TIMEOUT_S = 600.0
ON_GPU = os.environ.get("TEST_DEVICE") == "cuda"
BASE_FLAGS = [
    "--grammar-backend=llguidance",
    "--skip-server-warmup",
    # An idle scheduler would otherwise keep one core busy.
    "--sleep-on-idle",
    "--max-total-tokens=65536",
    "--tool-call-parser=qwen",
]
# The model is on the disk: nothing is to be looked up.
BASE_ENV = {"HF_HUB_OFFLINE": "1"}
if ON_GPU:
    BASE_FLAGS += ["--attention-backend=triton", "--sampling-backend=pytorch"]
    BASE_FLAGS += ["--mem-fraction-static=0.3", "--cuda-graph-max-bs=64"]
    # The prefill graphs of v0.5.15.post1 failed with this model.
    BASE_FLAGS += ["--cuda-graph-backend-prefill=disabled"]
else:
    BASE_FLAGS += ["--device=cpu", "--attention-backend=torch_native"]
    BASE_ENV |= {"SGLANG_USE_CPU_ENGINE": "1", "TEST_FORK": "1"}
    # The model is so small that more threads only wait for each other.
    BASE_ENV |= {"OMP_NUM_THREADS": "1"}

# What a server reads when it starts, and not when SGLang is imported.
READ_AT_START = {
    "SGLANG_RETURN_TOKEN_IDS",
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS",
    ENCODINGS_BASE,
}

INCREMENTAL = "--stream-output" if NUMBER < (0, 5, 10) else "--incremental-streaming-output"
# Stock takes the new text of an incremental completion for all of it, and cuts off as much
# as it has sent.
CUTS_INCREMENTAL_COMPLETIONS = (0, 5, 10) <= NUMBER < (0, 5, 23)
CUTS_INCREMENTAL_CHAT = (0, 5, 10) <= NUMBER < (0, 5, 12)
# Stock looks up the name of the status that an aborted request does not have.
FAILS_ABORTED_STREAMS = (0, 5, 10) <= NUMBER < (0, 5, 12)
ABORTED_STREAMS_FAIL = f"stock {UPSTREAM} looks up the name of a status that an abort does not have"
# Whether a stream of chat or completions says why stock's scheduler has ended it.
SAYS_WHY_STREAMS_END = NUMBER >= (0, 5, 10)
# Later releases want </think> to be one token where there are grammars.
THINK_IS_A_TOKEN = NUMBER >= (0, 5, 12)
# The CPU engine of later releases has no grammars beside a reasoning parser.
REGEX_HOLDS_BESIDE_REASONING = NUMBER < (0, 5, 12)
# Whether log-probabilities have the bytes of a token that is a part of a character.
KNOWS_TOKEN_BYTES = NUMBER >= (0, 5, 23)

# Whether `return_token_ids` is a field of stock, whose reading of it stays.
IS_NATIVE = NUMBER >= (0, 5, 23)
# Whether `input_ids` of chat is one: what stock reads and serves stays, and bounds are added.
STOCK_TAKES_INPUT_IDS = NUMBER >= (0, 5, 15)
# Whether scheduler and tokenizer manager track the versions of weights by themselves.
STOCK_TRACKS_VERSIONS = NUMBER >= (0, 5, 20)
# Between them an update that flushes the cache ends the server if a request is waiting.
FLUSHES_WHILE_REQUESTS_WAIT = NUMBER < (0, 5, 10) or NUMBER >= (0, 5, 23)
# Whether an overlap scheduler that is paused in place leaves the result of a step for later.
LEAVES_A_STEP_BEHIND = NUMBER >= (0, 5, 10)
# Whether responses are kept for previous_response_id unasked.
KEEPS_RESPONSES = NUMBER < (0, 5, 23)
KEEP_RESPONSES = () if KEEPS_RESPONSES else ("--enable-response-store",)
# Whether the CPU engine wants cores for the ranks of all replicas rather than of each.
BINDS_ALL_RANKS = NUMBER >= (0, 5, 23)
# What a server takes for gpt-oss that is none.
HARMONY_FLAGS = (
    f'--json-model-override-args={{"model_type": "gpt_oss", "vocab_size": {HARMONY_VOCAB_SIZE}}}',
)
CRASH_DUMPS = ROOT / "build" / "crash-dumps" / UPSTREAM
LOGS = ROOT / "build" / "logs" / UPSTREAM

# What docs/troubleshooting.md has servers behind a router start with.
ROUTED = (
    "--return-token-ids-endpoints=chat,completions,messages,responses",
    "--keep-turns=1000",
)
SMALLEST_LAYERS = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


@dataclasses.dataclass(frozen=True)
class Mode:
    """How a server is started.

    Attributes:
        spawns: Whether its processes are spawned, as they are for users. To fork them takes
            a third of the CPU time.
        without_weights: Whether the folder of the model has none.
        shape: Which of `SHAPES` the model has.
        replies: What the model says, instead of anything at random (`chained_model`).
        speaks_harmony: Whether the model is taken for gpt-oss (`harmony`).
        moe: Whether the model is one of experts.
        drafts: Whether another model drafts what it says.
    """

    flags: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    overlap: bool = False
    stock: bool = False
    qwen: bool = False
    spawns: bool = False
    without_weights: bool = False
    shape: str = ""
    replies: Replies = ()
    speaks_harmony: bool = False
    moe: bool = False
    drafts: bool = False


RETRACT = (("SGLANG_TEST_RETRACT", "1"), ("SGLANG_TEST_RETRACT_INTERVAL", "5"))
# Tests come in this order, so those that are compared with stock are next to it.
MODES: dict[str, Mode] = {
    "stock": Mode(stock=True, spawns=True),
    "default": Mode(spawns=True),
    "default_on": Mode(("--return-token-ids",)),
    # Both are behind one router.
    "routed": Mode(ROUTED),
    "routed_replica": Mode(ROUTED),
    "default_agents": Mode(("--return-token-ids-endpoints=completions,messages,responses",)),
    "stream_output": Mode((INCREMENTAL,)),
    "stream_interval": Mode(("--stream-interval=4",)),
    "stream_output_interval": Mode((INCREMENTAL, "--stream-interval=3")),
    "overlap": Mode(overlap=True),
    # Its own environment also keeps it from being forked, after which uvicorn's workers would
    # have no standard input. Busy cores take them longer than stock waits.
    "workers2": Mode(
        ("--tokenizer-worker-num=2",),
        env=(("SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT", "120"),),
    ),
    "retract": Mode(env=RETRACT),
    "reasoning": Mode(("--reasoning-parser=qwen3",), qwen=THINK_IS_A_TOKEN),
    "reasoning_interval": Mode(
        ("--reasoning-parser=qwen3", "--stream-interval=16"), qwen=THINK_IS_A_TOKEN
    ),
    "many_calls_a_step": Mode(("--tool-call-parser=qwen3_coder", "--stream-interval=64")),
    # Two things that have nothing to do with each other, in one server.
    "auto_truncate_default_on_env": Mode(
        ("--allow-auto-truncate", "--context-length=256"),
        env=(("SGLANG_RETURN_TOKEN_IDS", "1"),),
    ),
    # It is brought to an end.
    "dumps": Mode(
        (f"--crash-dump-folder={CRASH_DUMPS}",),
        env=(("SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS", "0"),),
    ),
    "one_at_a_time": Mode(("--max-running-requests=1",)),
    # Attention over long contexts would take the CPU hours with the model of the tests.
    "long": Mode(
        (
            "--context-length=16384",
            "--max-total-tokens=700000",
            "--load-format=dummy",
            f"--json-model-override-args={json.dumps(SMALLEST_LAYERS)}",
        ),
        env=(("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", "1"),),
    ),
    # Their weights change.
    "weights": Mode(("--enable-trainer-routes",)),
    "weights_overlap": Mode(overlap=True),
    "weights_chunked": Mode(("--chunked-prefill-size=32",)),
    "trainer": Mode(("--enable-trainer-routes",), overlap=True, spawns=True),
    "trainer_tp": Mode(
        ("--enable-trainer-routes", "--tp-size=2"),
        env=(("SGLANG_CPU_OMP_THREADS_BIND", "0|1"),),
    ),
    # These cannot keep the old weights if something is wrong with the new ones.
    "trainer_dp": Mode(
        ("--enable-trainer-routes", "--dp-size=2"),
        env=(("SGLANG_CPU_OMP_THREADS_BIND", "0|1"),) if BINDS_ALL_RANKS else (),
    ),
    "trainer_dummy": Mode(("--enable-trainer-routes", "--load-format=dummy"), without_weights=True),
    "trainer_lora": Mode(
        (
            "--enable-trainer-routes",
            "--enable-lora",
            "--lora-backend=torch_native",
            "--max-loras-per-batch=2",
            "--max-lora-rank=4",
            "--lora-target-modules=o_proj",
        ),
    ),
    # Some wait, and are retracted.
    "trainer_metrics": Mode(
        ("--enable-trainer-routes", "--enable-metrics", "--max-running-requests=2"),
        env=RETRACT,
    ),
    "trainer_key": Mode(("--enable-trainer-routes", "--admin-api-key=secret")),
    # The transfer is a fake: there is no server for the prefill.
    "disaggregated": Mode(
        ("--disaggregation-mode=decode", "--disaggregation-transfer-backend=fake"),
    ),
    "id_names": Mode((INCREMENTAL, "--return-input-ids", "--return-output-ids")),
    "processors": Mode(
        (
            "--logit-processors",
            "only=testbed.own_processors:Only",
            "fails=testbed.own_processors:Fails",
        ),
        env=(("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")),),
        overlap=True,
    ),
    "qwen": Mode(qwen=True),
    "experts": Mode(("--enable-return-routed-experts",), moe=True),
    "experts_overlap": Mode(
        ("--enable-return-routed-experts", INCREMENTAL, "--stream-interval=3"),
        overlap=True,
        moe=True,
    ),
}
for _name, _shape in SHAPES.items():
    _flags = [f"--tool-call-parser={_shape.tool_call_parser}"]
    if _shape.reasoning_parser and REGEX_HOLDS_BESIDE_REASONING:
        _flags += [f"--reasoning-parser={_shape.reasoning_parser}"]
    _flags += ["--keep-turns=2000", "--enable-cache-report", *KEEP_RESPONSES]
    MODES[f"turns_{_name}"] = Mode(tuple(_flags), shape=_name)
for _name, _tool, _argument in (("bash", "bash", "command"), ("codex", "exec_command", "cmd")):
    MODES[f"agent_{_name}"] = Mode(
        (
            "--reasoning-parser=qwen3",
            "--keep-turns=100",
            "--context-length=65536",
            *KEEP_RESPONSES,
        ),
        env=(("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", "1"),),
        replies=replies_that_call(_tool, _argument),
    )
MODES["gpt_oss"] = Mode(
    # Grammars would want the tokenizer that the model has not.
    (*HARMONY_FLAGS, "--grammar-backend=none", "--keep-turns=1000", *KEEP_RESPONSES),
    env=((ENCODINGS_BASE, str(FOLDER)),),
    speaks_harmony=True,
)
# Where a server that decodes finds the one that prefills.
BOOTSTRAP_PORT = reserve_port() if ON_GPU else 0
# What the CPU engine does not have or has no kernels for.
GPU_MODES: dict[str, Mode] = {}
if ON_GPU:
    GPU_MODES = {
        "tp2": Mode(("--tp-size=2",), overlap=True),
        "dp2": Mode(("--dp-size=2",), overlap=True),
        "ngram": Mode(("--speculative-algorithm=NGRAM",)),
        # To capture graphs, it would import packages that these tests do without.
        "standalone": Mode(
            (
                "--speculative-algorithm=STANDALONE",
                "--speculative-num-steps=2",
                "--speculative-eagle-topk=1",
                "--speculative-num-draft-tokens=3",
                "--cuda-graph-backend-decode=disabled",
            ),
            drafts=True,
        ),
        "trainer_sleep": Mode(
            ("--enable-trainer-routes", "--enable-memory-saver", "--enable-weights-cpu-backup")
        ),
        "trainer_deep_sleep": Mode(("--enable-trainer-routes", "--enable-memory-saver")),
        "trainer_beside": Mode(("--enable-trainer-routes", "--base-gpu-id=1"), overlap=True),
    }
    MODES |= GPU_MODES
    # A card each, and the KV cache goes from one to the other.
    _flags = ["--disaggregation-transfer-backend=nixl", "--host=127.0.0.1"]
    _flags += [f"--disaggregation-bootstrap-port={BOOTSTRAP_PORT}"]
    for _number, _name in enumerate(("prefill", "decode")):
        MODES[_name] = Mode(
            (f"--disaggregation-mode={_name}", f"--base-gpu-id={_number}", *_flags),
            env=(("SGLANG_HOST_IP", "127.0.0.1"), ("HOST_IP", "127.0.0.1")),
        )
# How outputs reach the handlers.
STREAMING_MODES = (
    "default",
    "stream_output",
    "stream_interval",
    "stream_output_interval",
    "overlap",
    "workers2",
    "retract",
)
# Those that `make test` starts: enough for every clause and every capability.
SHORT_MODES = (
    "stock",
    "default",
    "default_on",
    "stream_output",
    "reasoning",
    "auto_truncate_default_on_env",
    "dumps",
    "weights",
    "trainer",
    "id_names",
    "processors",
    "turns_qwen3",
    "trainer_metrics",
    "experts",
)


def wait_until_healthy(
    name: str, url: str, process: subprocess.Popen[bytes] | ForkedModule, log: Path
) -> None:
    """Wait for a server of any kind.

    Raises:
        RuntimeError: If it ends, with the end of its log.
        TimeoutError: If it takes longer than `START_TIMEOUT_S`, likewise.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        if process.poll() is not None:
            raise RuntimeError(f"The {name} server ended:\n{end_of(log)}")
        try:
            if requests.get(f"{url}/health", timeout=10).ok:
                return
        except requests.RequestException:
            pass
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"The {name} server was not healthy after {START_TIMEOUT_S:.0f} s:\n{end_of(log)}"
            )
        time.sleep(0.5)


def end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]


@contextlib.contextmanager
def running(name: str, url: str, command: Sequence[str]) -> Iterator[None]:
    """Run a program that has /health, as a gateway or a router, and end it afterwards."""
    log = LOGS / f"{name}.log"
    LOGS.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_healthy(name, url, process, log)
        yield
    finally:
        kill_group(process)


class Server:
    """A server that starts. Use it as a context manager, or call `wait` and `stop`.

    Attributes:
        url: Where it listens, without a trailing slash.
    """

    def __init__(self, name: str):
        mode = MODES[name]
        if mode.speaks_harmony:
            model = harmony_model_path()
        elif mode.moe:
            model = moe_model_path()
        elif mode.replies:
            model = chained_model_path(mode.replies)
        else:
            model = tiny_model_path(
                qwen=mode.qwen, without_weights=mode.without_weights, shape=mode.shape
            )
        command = ["sglang.launch_server", "--model-path", str(model)]
        command += BASE_FLAGS if mode.overlap else [*BASE_FLAGS, "--disable-overlap-schedule"]
        command += mode.flags
        if mode.drafts:
            command.append(f"--speculative-draft-model-path={draft_model_path()}")
        env = dict(mode.env)
        if mode.spawns:
            env["TEST_FORK"] = "0"
        if mode.stock:
            # What it imports may be there as well.
            paths = [str(STOCK), os.environ.get("PYTHONPATH")]
            env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        forks = not ON_GPU and env.keys() <= READ_AT_START
        self._start(name, name, command, env, forks=forks)

    def _start(
        self,
        name: str,
        log: str,
        command: list[str],
        env: dict[str, str],
        pass_fds: tuple[int, ...] = (),
        forks: bool = False,
    ) -> None:
        """Start a module with its flags, and with a port.

        Args:
            log: The name of its log.
            env: What it has beside the environment of all servers.
            forks: Whether it begins with SGLang imported.
        """
        self.name = name
        self.port = reserve_port()
        self.url = f"http://127.0.0.1:{self.port}"
        LOGS.mkdir(parents=True, exist_ok=True)
        self.log = LOGS / f"{log}.log"
        command = [*command, "--port", str(self.port)]
        cwd = ROOT / "build"
        self.process: subprocess.Popen[bytes] | ForkedModule
        if forks:
            self.process = ForkedModule(command, BASE_ENV, env, cwd, self.log)
            return
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                env={**os.environ, **BASE_ENV, **env},
                cwd=cwd,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=pass_fds,
            )

    def wait(self) -> None:
        try:
            wait_until_healthy(self.name, self.url, self.process, self.log)
        except BaseException:
            self.stop()
            raise

    def cpu_seconds(self) -> float:
        """CPU time that the HTTP process has taken so far, with all of its threads."""
        # What /proc/PID/stat says in ticks of 10 ms: the clock of another process.
        return time.clock_gettime((~self.process.pid << 3) | 2)

    def slow_down(self, seconds: float = 0.05) -> None:
        """Have each step of the engine take so much longer, or no longer with 0.

        What is to happen in the middle of a request then does, however busy the machine is.
        """
        body = {"forward_sleep_time": seconds}
        requests.post(f"{self.url}/slow_down", json=body, timeout=30).raise_for_status()

    @contextlib.contextmanager
    def slowed_down(self) -> Iterator[None]:
        self.slow_down()
        try:
            yield
        finally:
            self.slow_down(0)

    @contextlib.contextmanager
    def lagging(self) -> Iterator[None]:
        """Stop the HTTP process now and then, so that it lags behind the engine."""
        done = threading.Event()

        def lag() -> None:
            while not done.wait(0.1):
                self.process.send_signal(signal.SIGSTOP)
                time.sleep(0.2)
                self.process.send_signal(signal.SIGCONT)

        thread = threading.Thread(target=lag)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self) -> None:
        kill_group(self.process)

    def __enter__(self) -> Server:
        self.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
