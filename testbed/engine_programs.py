"""Programs that hold an `sglang.Engine`, and one that watches them from outside.

    python -m testbed.engine_programs NAME

runs a program of `PROGRAMS`. What it observes it prints, a line of JSON each.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import faulthandler
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from testbed.release import NUMBER, ROOT
from testbed.tiny_model import load_tokenizer, make_adapter, tiny_model_path
from tools.verify import kill_group, reserve_port

if TYPE_CHECKING:
    from sglang import Engine

# Comes before what a program observes, on a line of its own.
MARK = "observed: "
PROGRAM_TIMEOUT_S = 300.0
# By when a call has to have raised whose engine is dead.
DEAD_S = 20.0
PROMPT = [10, 20, 30, 40]
SHORT: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
HAS_CARD = os.environ.get("TEST_DEVICE") == "cuda"
# What takes much longer than the moment after which the program looks.
NUM_RUNNING_TOKENS = 3000 if HAS_CARD else 1000
# As long as the program likes: it ends it.
LONG: dict[str, Any] = {"max_new_tokens": 4000, "temperature": 0, "ignore_eos": True}
GROUP = "weights"
ADAPTERS: dict[str, Any] = {
    "enable_lora": True,
    "lora_backend": "torch_native",
    "max_loras_per_batch": 2,
    "max_lora_rank": 4,
    "lora_target_modules": ["o_proj"],
}
# What releases more than a card's own bookkeeping takes.
LARGER = {"num_hidden_layers": 24, "intermediate_size": 8192}
ON_CPU: dict[str, Any] = {"device": "cpu", "attention_backend": "torch_native"}
ON_CARD: dict[str, Any] = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "mem_fraction_static": 0.3,
}
if NUMBER < (0, 5, 15):
    ON_CARD |= {"cuda_graph_max_bs": 8}
else:
    # As the servers have it.
    ON_CARD |= {"cuda_graph_max_bs_decode": 8, "cuda_graph_backend_prefill": "disabled"}


@dataclasses.dataclass
class Observed:
    """What a program has said, and how it ended.

    Attributes:
        values: What it has observed, by name.
        status: Its exit status, or None if it had to be ended.
        left: The command lines of processes that it left behind.
        log: The rest of what it printed.
    """

    values: dict[str, Any]
    status: int | None
    left: list[str]
    log: str

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            raise AssertionError(f"The program has not come to {name!r}:\n{self.log[-8000:]}")
        return self.values[name]


def run_program(name: str, overlap: bool, spawns: bool) -> Observed:
    """Run a program of this module, and look at what it leaves behind.

    Args:
        overlap: Whether its engines schedule with overlap.
        spawns: Whether the processes of its engines are spawned, as they are for users.
    """
    from testbed.server import BASE_ENV, MODES

    env = os.environ | BASE_ENV | {"TEST_FORK": str(int(not spawns)), "OVERLAP": str(int(overlap))}
    if name == loses_a_replica.__name__:
        env |= dict(MODES["trainer_dp"].env)
    process = subprocess.Popen(
        [sys.executable, "-m", "testbed.engine_programs", name],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    status: int | None = None
    with contextlib.suppress(subprocess.TimeoutExpired):
        # What is left behind may have its standard output, so its end is not waited for.
        reader = Reader(process)
        status = process.wait(PROGRAM_TIMEOUT_S)
    time.sleep(1)
    left = [" ".join(p.cmdline()) for p in in_session(process.pid)]
    kill_group(process)
    lines = reader.lines()
    observed = [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]
    log = "\n".join(line for line in lines if not line.startswith(MARK))
    return Observed(dict(observed), status, left, log)


class Reader:
    """Reads what a process prints, while it does."""

    def __init__(self, process: subprocess.Popen[str]):
        self._lines: list[str] = []
        self._thread = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        self._thread.start()

    def _read(self, stream: Any) -> None:
        for line in stream:
            self._lines.append(line.rstrip("\n"))

    def lines(self) -> list[str]:
        self._thread.join(10)
        return list(self._lines)


def in_session(leader: int) -> list[psutil.Process]:
    """Return the processes of a session that are neither its leader nor ended."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            is_member = os.getsid(process.pid) == leader and process.pid != leader
            if is_member and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def tell(name: str, value: Any) -> None:
    print(f"\n{MARK}{json.dumps([name, value], default=str)}", flush=True)


@contextlib.contextmanager
def observing(name: str) -> Iterator[None]:
    """Tell what is raised, and go on."""
    try:
        yield
    except Exception as error:
        tell(name, f"{type(error).__name__}: {error}")


def outcome(call: Callable[[], Any]) -> str:
    """Return the name of what a call raises, or what it returns."""
    try:
        return f"returned {call()!r:.200}"
    except Exception as error:
        return type(error).__name__


def engine_options(**kwargs: Any) -> dict[str, Any]:
    return (
        {
            "model_path": str(tiny_model_path()),
            "grammar_backend": "llguidance",
            "max_total_tokens": 65536,
            "sleep_on_idle": True,
            "disable_overlap_schedule": os.environ["OVERLAP"] == "0",
        }
        | (ON_CARD if HAS_CARD else ON_CPU)
        | kwargs
    )


def start_engine(**kwargs: Any) -> Engine:
    from sglang import Engine

    return Engine(**engine_options(**kwargs))


def in_thread(call: Callable[[], Any]) -> Any:
    """Return what a call returns in a thread that has ended since.

    Raises:
        Exception: What it raises there.
    """
    return together([call])[0]


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """Return what calls return, each in a thread of its own and all at once.

    Raises:
        Exception: What the first to fail has raised.
    """
    results: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            results[i] = calls[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        if thread.is_alive():
            raise TimeoutError("a call has not returned within 120 s")
    if errors:
        raise errors[0]
    return results


def children() -> list[str]:
    """Return the names of the processes that descend from this one, without Python's own.

    Calls raise before the last process of a dead engine has ended, so these have a moment.
    """
    names: list[str] = []
    for _ in range(50):
        names = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if "resource_tracker" not in " ".join(process.cmdline()):
                    names.append(process.name())
        if not any("sglang" in name or "python" in name for name in names):
            break
        time.sleep(0.1)
    return names


def handlers() -> list[str]:
    numbers = (signal.SIGQUIT, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
    return [str(signal.getsignal(number)) for number in numbers]


def ids_of(answer: Any) -> Any:
    return answer["output_ids"]


def whole(chunks: list[Any]) -> Any:
    """Return all ids of a stream, if each chunk still has those that it came with."""
    for chunk in chunks:
        if len(ids_of(chunk)) != chunk["meta_info"]["completion_tokens"]:
            return f"{len(ids_of(chunk))} ids in {chunk}"
    return ids_of(chunks[-1])


def scores_of(result: Any) -> Any:
    # Later releases have them beside other things.
    return getattr(result, "scores", result)


def calls() -> None:
    """Make an engine in a thread, and call it from threads and loops of all kinds."""
    before = handlers()
    other = subprocess.Popen(["sleep", "1000"])
    engine = in_thread(start_engine)
    # The processes would end with the thread that has started them.
    time.sleep(1)

    def generate() -> Any:
        return ids_of(engine.generate(input_ids=PROMPT, sampling_params=SHORT))

    async def async_generate() -> Any:
        return ids_of(await engine.async_generate(input_ids=PROMPT, sampling_params=SHORT))

    async def chunks(pause_s: float = 0.0) -> Any:
        answer: Any = await engine.async_generate(
            input_ids=PROMPT, sampling_params=SHORT, stream=True
        )
        async for chunk in answer:
            yield chunk
            await asyncio.sleep(pause_s)

    async def async_stream(pause_s: float = 0.0) -> Any:
        return whole([chunk async for chunk in chunks(pause_s)])

    async def left_stream() -> Any:
        async with contextlib.aclosing(chunks()) as left:
            async for _ in left:
                break
        return await async_stream()

    def stream() -> Any:
        answer: Any = engine.generate(input_ids=PROMPT, sampling_params=SHORT, stream=True)
        return whole(list(answer))

    async def several(call: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        return await asyncio.gather(*[call() for _ in range(4)])

    def in_loop(call: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """On a loop that stops, and closes with what else is on it."""
        loop = asyncio.new_event_loop()
        try:
            return loop.run_until_complete(call())
        finally:
            loop.close()

    async def by_the_manager() -> Any:
        from sglang.srt.managers.io_struct import GenerateReqInput

        manager = engine.tokenizer_manager
        obj = GenerateReqInput(input_ids=PROMPT, sampling_params=dict(SHORT))
        answer = await manager.generate_request(obj, None).__anext__()
        flushed = await manager.flush_cache()
        return [ids_of(answer), flushed.success]

    async def cancelled() -> Any:
        task = asyncio.create_task(
            engine.async_generate(input_ids=PROMPT, sampling_params=LONG)  # type: ignore[arg-type]
        )
        await asyncio.sleep(1)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await engine.async_abort_request(abort_all=True)
        return await async_generate()

    async def waits_for_itself() -> Any:
        return ids_of(engine.generate(input_ids=PROMPT, sampling_params=SHORT))

    tell("expected", generate())
    forms: dict[str, Callable[[], Any]] = {
        "threads": lambda: together([generate] * 4),
        "a loop": lambda: asyncio.run(several(async_generate)),
        "another loop": lambda: asyncio.run(several(async_generate)),
        "loops at once": lambda: together([lambda: asyncio.run(async_generate())] * 4),
        "loops that stop": lambda: together([lambda: in_loop(async_generate)] * 4),
        "loops and threads": lambda: together(
            [generate, lambda: in_loop(async_generate), stream, lambda: asyncio.run(async_stream())]
        ),
        "a stream": stream,
        "an asynchronous stream": lambda: asyncio.run(async_stream()),
        "streams of one loop": lambda: asyncio.run(several(async_stream)),
        "a stream read slowly": lambda: asyncio.run(async_stream(pause_s=0.3)),
        "after a stream was left": lambda: asyncio.run(left_stream()),
        "the manager": lambda: asyncio.run(by_the_manager()),
        "after one was cancelled": lambda: asyncio.run(cancelled()),
        "a call that blocks a loop": lambda: asyncio.run(waits_for_itself()),
    }
    for name, form in forms.items():
        with observing(name):
            tell(name, in_thread(form) if name == "a stream" else form())
    with observing("score"):
        asked: dict[str, Any] = {
            "query": PROMPT,
            "items": [[50, 60], [70]],
            "label_token_ids": [80, 90],
        }
        score = scores_of(engine.score(**asked))
        tell("score", [score, scores_of(asyncio.run(engine.async_score(**asked)))])
    with observing("groups"):
        pairs: Any = engine.generate(
            input_ids=[PROMPT, PROMPT[::-1]], sampling_params={**SHORT, "n": 2}
        )
        tell("groups", [ids_of(answer) for answer in pairs])
    with observing("controls"):
        tell("controls", asyncio.run(controls(engine)))
    with observing("broadcast"):
        tell("broadcast", broadcast(engine))
    with observing("synchronous controls"):
        tell("synchronous controls", synchronous_controls(engine))
    tell("handlers", handlers() == before)
    engine.shutdown()
    engine.shutdown()
    tell("children", children())
    tell("after the end", outcome(generate))
    other.kill()
    other.wait()


@contextlib.contextmanager
def updating(engine: Any) -> Iterator[None]:
    """Begin and end an update, where the release wants that of tensors and broadcasts."""
    if not hasattr(engine, "begin_weight_update"):
        yield
        return
    engine.begin_weight_update()
    try:
        yield
    finally:
        engine.end_weight_update()


def update_from(engine: Any, tensors: dict[str, Any], **kwargs: Any) -> Any:
    with updating(engine):
        return engine.update_weights_from_tensor(list(tensors.items()), **kwargs)


async def controls(engine: Any) -> dict[str, Any]:
    """Call each asynchronous control."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    await engine.async_pause_generation(mode="in_place")
    waiting = asyncio.create_task(engine.async_generate(input_ids=PROMPT, sampling_params=SHORT))
    await asyncio.sleep(1)
    found["paused"] = not waiting.done()
    await engine.async_continue_generation()
    found["went on"] = len(ids_of(await waiting))
    running = asyncio.create_task(engine.async_generate(input_ids=PROMPT, sampling_params=LONG))
    await asyncio.sleep(1)
    await engine.async_abort_request(abort_all=True)
    found["aborted"] = (await running)["meta_info"]["finish_reason"]["type"]
    found["flushed"] = (await engine.async_flush_cache()).success
    session = await engine.async_open_session(capacity_of_str_len=1000)
    found["session"] = session
    await engine.async_close_session(session)
    path = str(tiny_model_path())
    found["disk"] = (await engine.async_update_weights_from_disk(path, weight_version="disk"))[0]
    found["version of disk"] = await engine.async_get_weight_version()
    tensors = list(load_file(f"{path}/model.safetensors").items())
    is_update_opened = hasattr(engine, "begin_weight_update")
    if is_update_opened:
        await engine.async_begin_weight_update()
    found["tensors"] = (
        await engine.async_update_weights_from_tensor(tensors, weight_version="tensors")
    )[0]
    if is_update_opened:
        await engine.async_end_weight_update()
    found["version of tensors"] = engine.get_weight_version()
    answer = await engine.async_generate(input_ids=PROMPT, sampling_params=SHORT)
    found["version of an answer"] = answer["meta_info"]["weight_version"]
    await engine.async_update_weight_version("label")
    found["label"] = engine.get_weight_version()
    found["ipc"] = (await engine.async_update_weights_from_ipc({}, flush_cache=False))[0]
    weights = await engine.async_get_weights_by_name("model.norm.weight", truncate_size=2)
    found["weights"] = len(weights)
    found["info"] = (await engine.async_get_server_info())["model_path"] == path
    return found


def synchronous_controls(engine: Any) -> dict[str, Any]:
    """Call the controls whose synchronous form stock lacks."""
    engine.pause_generation(mode="in_place")
    answers: list[Any] = []

    def generate() -> None:
        answers.append(engine.generate(input_ids=PROMPT, sampling_params=SHORT))

    thread = threading.Thread(target=generate)
    thread.start()
    time.sleep(1)
    paused = not answers
    engine.continue_generation()
    thread.join(60)
    engine.abort_request(abort_all=True)
    engine.update_weight_version("again", abort_all_requests=False)
    return {"paused": paused, "answers": len(answers), "version": engine.get_weight_version()}


def broadcast(engine: Any) -> dict[str, Any]:
    """Update a weight from a process group, in which this program is the trainer."""
    import torch
    from sglang.srt.utils.common import init_custom_process_group

    port = reserve_port()
    name, shape = "model.norm.weight", [128]
    groups: list[Any] = []

    def join() -> None:
        groups.append(
            init_custom_process_group(
                backend="gloo",
                init_method=f"tcp://127.0.0.1:{port}",
                world_size=2,
                rank=0,
                group_name=GROUP,
            )
        )

    async def update() -> dict[str, Any]:
        thread = threading.Thread(target=join)
        thread.start()
        joined = await engine.async_init_weights_update_group(
            "127.0.0.1", port, 1, 2, GROUP, backend="gloo"
        )
        thread.join(60)
        send = threading.Thread(
            target=lambda: torch.distributed.broadcast(torch.ones(shape), 0, group=groups[0])
        )
        send.start()
        with updating(engine):
            updated = await engine.async_update_weights_from_distributed(
                [name], ["float32"], [shape], group_name=GROUP, weight_version="broadcast"
            )
        send.join(60)
        return {
            "joined": joined[0],
            "updated": updated[0],
            "version": await engine.async_get_weight_version(),
            "weights": await engine.async_get_weights_by_name(name, truncate_size=2),
            "left": (await engine.async_destroy_weights_update_group(GROUP))[0],
        }

    return asyncio.run(update())


def dies() -> None:
    """Kill the scheduler of an engine while calls wait, and start another engine."""
    other = subprocess.Popen(["sleep", "1000"])
    engine: Any = start_engine()

    def raises_in(name: str, call: Callable[[], Any]) -> threading.Thread:
        def run() -> None:
            result = outcome(call)
            tell(name, [result, time.monotonic() - killed if killed else -1.0])

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def generate() -> Any:
        return engine.generate(input_ids=PROMPT, sampling_params=LONG)

    async def async_generate() -> Any:
        return await engine.async_generate(input_ids=PROMPT, sampling_params=LONG)

    async def stream() -> Any:
        chunks = await engine.async_generate(input_ids=PROMPT, sampling_params=LONG, stream=True)
        async for _ in chunks:
            pass

    async def flush() -> Any:
        # Of a scheduler that does not answer.
        await asyncio.sleep(3)
        return await engine.tokenizer_manager.get_internal_state()

    killed = 0.0
    ids_of(engine.generate(input_ids=PROMPT, sampling_params=SHORT))
    pending = [
        raises_in("generate", generate),
        raises_in("async_generate", lambda: asyncio.run(async_generate())),
        raises_in("stream", lambda: asyncio.run(stream())),
        raises_in("manager", lambda: asyncio.run(flush())),
    ]
    time.sleep(2)
    scheduler = next(p for p in psutil.Process().children(True) if is_scheduler(p))
    scheduler.suspend()
    pending.append(raises_in("rpc", lambda: engine.collective_rpc("no_method")))
    time.sleep(2)
    killed = time.monotonic()
    scheduler.kill()
    for thread in pending:
        thread.join(DEAD_S + 10)
    later = {
        "later generate": generate,
        "later async_generate": lambda: asyncio.run(async_generate()),
        "later flush_cache": engine.flush_cache,
        "later rpc": lambda: engine.collective_rpc("no_method"),
        "later abort": lambda: engine.abort_request(abort_all=True),
    }
    for name, call in later.items():
        killed = time.monotonic()
        raises_in(name, call).join(DEAD_S + 10)
    tell("message", outcome_text(generate))
    tell("children of a dead engine", children())
    engine.shutdown()
    engine = start_engine(**ADAPTERS)
    killed = 0.0
    tell("another engine", outcome(lambda: len(ids_of(short(engine)))))
    with observing("adapter"):
        tell("adapter", asyncio.run(adapter(engine)))
    waiting = raises_in("generate at shutdown", generate)
    time.sleep(2)
    killed = time.monotonic()
    engine.shutdown()
    waiting.join(DEAD_S + 10)
    engine.shutdown()
    tell("children", children())
    other.kill()
    other.wait()


async def adapter(engine: Any) -> list[bool]:
    """Whether an adapter changes what is said, and no longer after it was unloaded."""
    expected = ids_of(short(engine))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter"
        make_adapter(path)
        await engine.async_load_lora_adapter("adapter", str(path))
        options = {"input_ids": PROMPT, "sampling_params": SHORT}
        adapted = ids_of(await engine.async_generate(**options, lora_path="adapter"))
        await engine.async_unload_lora_adapter("adapter")
        return [adapted != expected, ids_of(await engine.async_generate(**options)) == expected]


def loses_a_replica() -> None:
    """Kill the scheduler of one of two replicas, which is no child of this program."""
    engine: Any = start_engine(dp_size=2)
    tell("ids", [len(ids_of(short(engine))) for _ in range(2)])
    next(p for p in psutil.Process().children(True) if is_scheduler(p)).kill()
    killed = time.monotonic()
    while outcome(lambda: short(engine)) != "EngineDeadError":
        if time.monotonic() - killed > DEAD_S:
            break
        time.sleep(0.5)
    tell("seconds", time.monotonic() - killed)
    tell("message", outcome_text(lambda: short(engine)))
    tell("children", children())
    engine.shutdown()


def short(engine: Any) -> Any:
    return engine.generate(input_ids=PROMPT, sampling_params=SHORT)


def outcome_text(call: Callable[[], Any]) -> str:
    try:
        return str(call())[:200]
    except Exception as error:
        return str(error)


def is_scheduler(process: psutil.Process) -> bool:
    return "scheduler" in process.name() or "scheduler" in " ".join(process.cmdline())


def does_not_start() -> None:
    """Make engines that cannot be."""
    other = subprocess.Popen(["sleep", "1000"])

    def start() -> Any:
        return start_engine(model_path=str(tiny_model_path(without_weights=True)))

    tell("in the main thread", outcome_text(start))
    tell("children", children())
    tell("in a thread", outcome_text(lambda: in_thread(start)))
    tell("children of a thread", children())
    # What is left of an engine that failed can be collected.
    tell("collected", outcome_text(lambda: in_thread(lambda: gc.collect() > 0)))
    tell("no argument", outcome_text(lambda: start_engine(no_such_argument=1)))
    other.kill()
    other.wait()


def refuses() -> None:
    """Ask an engine without a tokenizer for what it cannot do, and have it go on."""
    from safetensors.torch import load_file

    engine: Any = start_engine(skip_tokenizer_init=True, enable_return_hidden_states=True)
    expected = ids_of(short(engine))

    def still_says(name: str, refused: Any) -> None:
        """Tell what was answered, and whether the engine is as it was."""
        tell(name, [refused, outcome_text(lambda: ids_of(short(engine))) == str(expected)])

    def generate(ids: list[int], **sampling: Any) -> str:
        answer = lambda: engine.generate(input_ids=ids, sampling_params={**SHORT, **sampling})  # noqa: E731
        return outcome_text(lambda: ids_of(answer()))

    still_says("too large an id", generate([10, 10**6]))
    still_says("a negative id", generate([10, -1]))
    still_says("stop", generate(PROMPT, stop="x"))
    still_says("min_new_tokens", generate(PROMPT, min_new_tokens=2))
    for name in ("release", "resume"):
        call = getattr(engine, f"{name}_memory_occupation")
        still_says(f"{name} of an unknown tag", outcome_text(lambda call=call: call(["disk"])))
    still_says("waking what is awake", outcome_text(engine.resume_memory_occupation))
    with running(engine, 2) as answers:
        refused = outcome_text(engine.release_memory_occupation)
    still_says("release while requests run", refused)
    tell("they went on", [len(ids_of(answer)) for answer in answers])
    after = []
    for _ in range(20):
        short(engine)
        after.append(outcome_text(engine.release_memory_occupation))
        after.append(outcome_text(engine.resume_memory_occupation))
    still_says("release right after an answer", sorted(set(after)))

    with running(engine, 2) as answers:
        engine.pause_generation(mode="retract")
        slept = outcome_text(engine.release_memory_occupation)
        woke = outcome_text(engine.resume_memory_occupation)
        engine.continue_generation()
    still_says("release after a retraction", [slept, woke])
    tell("the retracted went on", [len(ids_of(answer)) for answer in answers])

    weights = load_file(tiny_model_path() / "model.safetensors")
    name = "model.layers.1.mlp.gate_proj.weight"
    tensors = {
        "another shape": {**weights, name: weights[name][:-1]},
        "another type": {**weights, name: as_bits(weights[name])},
    }
    first = next(iter(weights))
    for case, changed in tensors.items():
        # Nothing is loaded of what comes before it either.
        changed = {**changed, first: -changed[first]}
        result = update_from(engine, changed)
        still_says(f"a tensor of {case}", result)
    unknown = {**weights, "no.such.weight": weights[name]}
    still_says("an unknown name", update_from(engine, unknown))
    with running(engine, 1, SHORT | {"max_new_tokens": NUM_RUNNING_TOKENS + 1000}):
        engine.pause_generation(mode="in_place")
        flushing = update_from(engine, weights)
        keeping = update_from(engine, weights, flush_cache=False)
        engine.continue_generation()
    still_says("tensors while paused in place", [flushing, keeping])
    results = []
    with running(engine, 3, SHORT | {"max_new_tokens": 100}):
        for _ in range(5):
            results.append(engine.update_weights_from_disk(str(tiny_model_path()))[0])
    still_says("a disk under load", results)
    tell("sessions", sessions(engine))
    engine.shutdown()


def as_bits(tensor: Any) -> Any:
    """A tensor of a type that converts to no other."""
    import torch

    return torch.zeros(tensor.shape, dtype=torch.uint8).view(torch.bits8)


@contextlib.contextmanager
def running(engine: Any, count: int, sampling: dict[str, Any] | None = None) -> Iterator[list[Any]]:
    """Have requests run in the block. Their answers are there after it."""
    sampling = sampling or SHORT | {"max_new_tokens": NUM_RUNNING_TOKENS}
    answers: list[Any] = []

    def generate() -> None:
        answers.append(engine.generate(input_ids=PROMPT, sampling_params=sampling))

    threads = [threading.Thread(target=generate, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    # A machine that is busy takes long to send them, and a fast one has answered by then.
    sent = engine.tokenizer_manager.rid_to_state
    deadline = time.monotonic() + 60
    while len(sent) + len(answers) < count:
        assert time.monotonic() < deadline, f"{count} requests were not sent"
        time.sleep(0.01)
    time.sleep(0.3)
    yield answers
    for thread in threads:
        thread.join(120)


def sessions(engine: Any) -> dict[str, Any]:
    """Two turns of a session, and what the same ids give without one."""
    config = json.loads((tiny_model_path() / "config.json").read_text())
    eos = config["eos_token_id"]
    session = engine.open_session(capacity_of_str_len=1000)
    options = {"sampling_params": SHORT, "return_hidden_states": True}
    first = engine.generate(input_ids=PROMPT, session_params={"id": session}, **options)
    turn = {"id": session, "rid": first["meta_info"]["id"]}
    new = [50, 60]
    second = engine.generate(input_ids=new, session_params=turn, **options)
    whole = engine.generate(input_ids=PROMPT + ids_of(first) + new, **options)
    ends = {**SHORT, "ignore_eos": False, "logit_bias": {str(eos): 100.0}}
    last = engine.generate(input_ids=new, session_params=turn, sampling_params=ends)
    engine.close_session(session)
    return {
        "turn two": ids_of(second) == ids_of(whole),
        "prompt of turn two": second["meta_info"]["prompt_tokens"],
        "hidden states": [len(x["meta_info"].get("hidden_states") or ()) for x in (second, whole)],
        "end of sequence": [ids_of(last) == [eos], last["meta_info"]["finish_reason"]["type"]],
    }


class AsyncActor:
    """Runs its methods on a loop of Ray's."""

    def __init__(self) -> None:
        self.engine: Any = start_engine()

    async def generate(self) -> Any:
        return ids_of(await self.engine.async_generate(input_ids=PROMPT, sampling_params=SHORT))

    async def control(self) -> Any:
        await self.engine.async_pause_generation(mode="retract")
        flushed = await self.engine.tokenizer_manager.flush_cache()
        await self.engine.async_continue_generation()
        return flushed.success

    async def shutdown(self) -> list[str]:
        self.engine.shutdown()
        return children()


class ThreadedActor:
    """Runs its methods in several threads."""

    def __init__(self) -> None:
        self.engine: Any = start_engine()

    def generate(self) -> Any:
        return ids_of(short(self.engine))

    def after_a_death(self) -> list[Any]:
        next(p for p in psutil.Process().children(True) if is_scheduler(p)).kill()
        return [outcome(lambda: self.engine.generate(input_ids=PROMPT, sampling_params=LONG))]

    def shutdown(self) -> list[str]:
        self.engine.shutdown()
        return children()


def ray_actors() -> None:
    """Hold an engine in an asynchronous actor, and another in a threaded one."""
    import ray

    # The workers import them from there.
    from testbed import engine_programs

    ray.init(num_cpus=2, include_dashboard=False)
    actor: Any = ray.remote(engine_programs.AsyncActor).remote()
    with observing("asynchronous"):
        answers = ray.get([actor.generate.remote() for _ in range(4)], timeout=200)
        tell("asynchronous", answers)
        tell("control", ray.get(actor.control.remote(), timeout=100))
        tell("asynchronous end", ray.get(actor.shutdown.remote(), timeout=100))
    ray.kill(actor)
    actor = ray.remote(max_concurrency=4)(engine_programs.ThreadedActor).remote()
    with observing("threaded"):
        answers = ray.get([actor.generate.remote() for _ in range(4)], timeout=200)
        tell("threaded", answers)
        tell("after a death", ray.get(actor.after_a_death.remote(), timeout=100))
        tell("threaded end", ray.get(actor.shutdown.remote(), timeout=100))
    ray.shutdown()


class SkyRLActor:
    """Holds the engine of SkyRL as its own actor does."""

    def __init__(self) -> None:
        self.engine: Any = skyrl_engine()(tokenizer=load_tokenizer(), **engine_options())

    async def generate(self) -> Any:
        batch = {"prompt_token_ids": [PROMPT, PROMPT[::-1]], "sampling_params": SHORT}
        answer = await self.engine.generate(batch)
        return [answer["response_ids"], answer["stop_reasons"]]

    async def sleep(self) -> Any:
        await self.engine.sleep()
        await self.engine.wake_up(["weights"])
        await self.engine.wake_up(["kv_cache"])
        return (await self.engine.reset_prefix_cache()).success

    async def shutdown(self) -> list[str]:
        await self.engine.teardown()
        return children()


def skyrl_engine() -> Any:
    """Return the engine class of skyrl-train with its patch of SGLang undone.

    It was written for an older SGLang, whose names are put back for it, and for a GPU.
    """
    import torch
    from sglang.srt import utils
    from sglang.srt.entrypoints import engine
    from sglang.srt.managers import io_struct, tokenizer_manager

    own = engine._set_envs_and_config
    vars(utils)["maybe_set_triton_cache_manager"] = lambda: None
    for name in dir(io_struct):
        if name.endswith("ReqInput"):
            vars(tokenizer_manager).setdefault(name, getattr(io_struct, name))
    if not torch.cuda.is_available():
        torch.cuda.mem_get_info = lambda *_: (0, 0)  # type: ignore[assignment]
    from skyrl_train.inference_engines.sglang import sglang_engine

    assert engine._set_envs_and_config is not own
    engine._set_envs_and_config = own
    return sglang_engine.SGLangInferenceEngine


def skyrl_actor() -> None:
    """Hold the engine of SkyRL in an asynchronous actor."""
    import ray

    from testbed import engine_programs

    ray.init(num_cpus=2, include_dashboard=False)
    actor: Any = ray.remote(engine_programs.SkyRLActor).remote()
    tell("answers", ray.get([actor.generate.remote() for _ in range(4)], timeout=200))
    tell("slept", ray.get(actor.sleep.remote(), timeout=100))
    tell("after it", ray.get(actor.generate.remote(), timeout=100))
    tell("children", ray.get(actor.shutdown.remote(), timeout=100))
    ray.shutdown()


def on_a_card() -> None:
    """Release memory for real, hand over tensors of the card, and take an adapter."""
    import torch
    from safetensors.torch import load_file

    engine: Any = start_engine(
        enable_memory_saver=True, load_format="dummy", json_model_override_args=json.dumps(LARGER)
    )
    with observing("freed"):
        free = [torch.cuda.mem_get_info()[0]]
        for tag in ("kv_cache", "weights"):
            engine.release_memory_occupation([tag])
            free.append(torch.cuda.mem_get_info()[0])
        tell("freed", [free[1] - free[0], free[2] - free[1]])
    with observing("too little to wake"):
        taken = torch.empty(torch.cuda.mem_get_info()[0] - 2**24, dtype=torch.uint8, device="cuda")
        tell("too little to wake", outcome_text(engine.resume_memory_occupation))
        del taken
        torch.cuda.empty_cache()
        tell("enough to wake", outcome_text(engine.resume_memory_occupation))
    engine.shutdown()
    engine = start_engine(enable_memory_saver=True, **ADAPTERS | {"lora_backend": "triton"})
    expected = ids_of(short(engine))
    engine.release_memory_occupation()
    engine.resume_memory_occupation()
    with observing("tensors of the card"):
        weights = load_file(tiny_model_path() / "model.safetensors", device="cuda")
        updated = update_from(engine, weights)
        tell("tensors of the card", [updated[0], ids_of(short(engine)) == expected])
    with observing("adapter"):
        tell("adapter", asyncio.run(adapter(engine)))
    engine.shutdown()
    tell("too little memory", outcome_text(lambda: start_engine(mem_fraction_static=0.001)))
    tell("children", children())


def takes_handles() -> None:
    """Take weights of the card from a parameter server of the same program."""
    port = reserve_port()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "PS_MAX_BUCKET_SIZE_GB": "0.125"}
    from checkpoint_engine.ps import ParameterServer

    engine: Any = start_engine()
    expected: list[Any] = []
    for path in (tiny_model_path(seed=1), tiny_model_path()):
        assert engine.update_weights_from_disk(str(path))[0]
        expected.append(ids_of(short(engine)))
    tell("expected", expected)
    parameters = ParameterServer(auto_pg=True, mem_fraction=0.1)
    file = str(tiny_model_path(seed=1) / "model.safetensors")
    parameters.register_checkpoint("new", files=[file], named_tensors={})
    parameters.gather_metas("new")
    answers: list[Any] = []

    def update(handles: list[tuple[str, str]]) -> None:
        call = engine.async_update_weights_from_ipc(dict(handles), weight_version="new")
        answers.append(asyncio.run(call))

    parameters.update("new", update)
    answer = short(engine)
    version = answer["meta_info"]["weight_version"]
    tell("updated", [*answers, ids_of(answer), version, engine.get_weight_version()])
    refused = engine.update_weights_from_ipc({"GPU-of-nobody": "ipc://x"}, weight_version="bad")
    tell("refused", [refused, ids_of(short(engine)), engine.get_weight_version()])
    engine.shutdown()


def ends_with_it() -> None:
    """End without `shutdown`."""
    engine: Any = start_engine()
    tell("ids", len(ids_of(short(engine))))


PROGRAMS = {
    program.__name__: program
    for program in (
        calls,
        dies,
        does_not_start,
        loses_a_replica,
        refuses,
        ray_actors,
        skyrl_actor,
        on_a_card,
        takes_handles,
        ends_with_it,
    )
}


if __name__ == "__main__":
    # Who hangs says where.
    faulthandler.dump_traceback_later(PROGRAM_TIMEOUT_S - 20)
    PROGRAMS[sys.argv[1]]()
    tell("end", True)
