"""Weight control by the names that trainers call: broadcasts, folders, pauses, keys."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file

from bench.soak import KINDS, EngineClients, start_clients
from testbed.client import (
    CHAT,
    COMPLETIONS,
    GENERATE,
    NUM_TOKENS,
    PROMPT,
    TOOL,
    Running,
    body_for,
    chat,
    control,
    flush_cache,
    fresh,
    generate,
    post,
)
from testbed.pool import ServerPool
from testbed.server import FAILS_ABORTED_STREAMS, ON_GPU, Server
from testbed.tiny_model import NUM_LAYERS, make_adapter, tiny_model_path
from testbed.trainer import BAD_PARAMETER, Trainer
from tools.verify import reserve_port

trainer_mode = pytest.mark.parametrize("server", ["trainer"], indirect=True)
SHORT = 32
# How many ids to how many clients in how many processes, and of a request, by the number of
# servers.
LOADS = (
    {1: (1_000_000, 64, 8, 300), 2: (500_000, 64, 8, 300)}
    if ON_GPU
    else {1: (12_000, 8, 1, 60), 2: (30_000, 8, 2, 60)}
)
NUM_UPDATES = 10
SECONDS_BETWEEN_UPDATES = 0.5
# By when the watchdog of NCCL has ended a process where a broadcast has failed.
NCCL_WATCHDOG_S = 75.0
ROUTES = [
    "/pause",
    "/resume",
    "/reset_prefix_cache",
    "/update_weights",
    "/reload_weights",
    "/init_broadcaster",
    "/sleep",
    "/wake_up",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/skyrl/v1/load_lora_adapter",
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/finish_weight_update",
    "/collective_rpc",
]
# What clients of vLLM call beside them.
CLIENT_ROUTES = ["/finish_session", "/v1/chat/completions/render"]
# Where requests are refused while paused by abort or wait.
GENERATES = [
    "/generate",
    "/v1/completions",
    CHAT,
    "/v1/chat/completions/tokens",
    "/v1/messages",
    "/v1/responses",
    GENERATE,
]
TOKENS = "/v1/chat/completions/tokens"
RENDER = "/v1/chat/completions/render"
MESSAGES = [{"role": "user", "content": "Say something, 日本語."}]
INIT = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa"}}
# Where BAD_PARAMETER is.
SHARD = "model-2.safetensors"


def join(
    servers: list[Server], timeout: float = 60.0, by_rank: bool = False, tp_size: int = 1
) -> Trainer:
    """Start a trainer and have the servers join it."""
    world_size = len(servers) * tp_size
    trainer = Trainer(world_size, timeout)
    answers: list[requests.Response] = []

    def init(rank: int) -> None:
        ranks = {"server_rank": rank, "num_inference_server": len(servers)}
        if by_rank:
            ranks = {"rank_offset": rank * tp_size, "inference_world_size": world_size}
        where = {"host": "127.0.0.1", "port": trainer.port, "timeout": timeout}
        answers.append(control(servers[rank], "/init_broadcaster", **where, **ranks))

    threads = [threading.Thread(target=init, args=(rank,)) for rank in range(len(servers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(answer.ok for answer in answers), [answer.text for answer in answers]
    return trainer


def update(servers: list[Server], **fields: Any) -> list[requests.Response]:
    """Call /update_weights of all at once, since the broadcast waits for all."""
    answers: dict[int, requests.Response] = {}

    def call(rank: int) -> None:
        answers[rank] = control(servers[rank], "/update_weights", **fields)

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(len(servers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[rank] for rank in range(len(servers))]


def check_update(
    trainer: Trainer, server: Server, seed: int, by_seed: dict[int, list[int]]
) -> None:
    trainer.send(seed)
    [answer] = update([server])
    assert answer.ok, answer.text
    assert fresh(server, PROMPT, SHORT) == by_seed[seed]


def check_versions(spans: list[dict[str, Any]], *versions: str) -> None:
    """Check which weights the tokens of a request came from, in order."""
    assert tuple(span["version"] for span in spans) == versions


def is_paused(server: Server) -> bool:
    paused: bool = requests.get(f"{server.url}/is_paused", timeout=30).json()["is_paused"]
    return paused


def ids_by_seed(server: Server) -> dict[int, list[int]]:
    """What the weights of each seed make of the prompt, as stock's update loads them."""
    ids = {}
    for seed in (1, 2, 0):
        path = str(tiny_model_path(seed))
        # Stock's update ends the server while a request is on its way out of the scheduler.
        flush_cache(server.url)
        assert control(server, "/update_weights_from_disk", model_path=path).ok
        ids[seed] = fresh(server, PROMPT, SHORT)
    assert len({tuple(value) for value in ids.values()}) == 3
    return ids


@pytest.fixture(scope="module")
def by_seed(servers: ServerPool) -> dict[int, list[int]]:
    return ids_by_seed(servers.get("trainer"))


@pytest.fixture(autouse=True)
def first_weights(server: Server) -> Iterator[None]:
    yield
    if server.name == "trainer":
        restore(server)


def restore(server: Server) -> None:
    """Have no requests and the first weights again."""
    # Stock's update ends the server if a test that failed has left a request.
    control(server, "/pause", mode="abort")
    control(server, "/resume")
    flush_cache(server.url)
    path = str(tiny_model_path())
    assert control(server, "/update_weights_from_disk", model_path=path).ok
    assert control(server, "/update_weight_version", new_version="default").ok


def with_another(server: Server, servers: ServerPool) -> list[Server]:
    """Return a server and another one: on GPUs, it has the card that the trainer has."""
    another = servers.get("trainer_beside" if ON_GPU else "weights")
    restore(another)
    return [server, another]


@trainer_mode
def test_a_broadcast_to_two_servers(
    server: Server, servers: ServerPool, by_seed: dict[int, list[int]]
) -> None:
    pair = with_another(server, servers)
    trainer = join(pair)
    try:
        for server in pair:
            assert fresh(server, PROMPT, SHORT) == by_seed[0]
        running = [Running(server, GENERATE, max_tokens=NUM_TOKENS) for server in pair]
        for stream in running:
            stream.wait_for(10)
        # As prime-rl does it.
        for server in pair:
            query = {"mode": "keep", "clear_cache": "false"}
            answer = requests.post(f"{server.url}/pause", params=query, timeout=60)
            assert answer.ok and is_paused(server)
        trainer.send(1)
        assert [a.status_code for a in update(pair, weight_dir="/runs/a/step_1")] == [200, 200]
        for server in pair:
            assert is_paused(server)
            assert control(server, "/resume").ok and not is_paused(server)

        for server, stream in zip(pair, running):
            [(ids, spans)] = stream.finish().values()
            assert len(ids) == NUM_TOKENS, "nothing in flight is lost"
            check_versions(spans, "default", "step_1")
            boundary = spans[0]["end"]
            # The cache was reset, so the new weights computed everything again.
            rest = fresh(server, PROMPT + ids[:boundary], NUM_TOKENS - boundary)
            assert ids[boundary:] == rest
            assert fresh(server, PROMPT, SHORT) == by_seed[1]

        # The next step, with requests running and nobody having paused.
        running = [Running(server, GENERATE, max_tokens=NUM_TOKENS) for server in pair]
        for stream in running:
            stream.wait_for(10)
        trainer.send(2)
        answers = update(pair, weight_dir=None, weight_version="2", skip_prefix_cache_reset=True)
        assert [a.status_code for a in answers] == [200, 200]
        for server, stream in zip(pair, running):
            [(ids, spans)] = stream.finish().values()
            assert len(ids) == NUM_TOKENS
            check_versions(spans, "step_1", "2")
            assert fresh(server, PROMPT, SHORT) == by_seed[2]
    finally:
        trainer.stop()


@trainer_mode
@pytest.mark.full
@pytest.mark.parametrize("num_servers", LOADS)
@pytest.mark.clause("C2", "C3", "C5")
def test_clients_lose_no_id_by_updates(
    server: Server, servers: ServerPool, by_seed: dict[int, list[int]], num_servers: int
) -> None:
    """Requests of every kind, hang-ups and aborts, and a bad update among the good ones."""
    own = with_another(server, servers) if num_servers == 2 else [server]
    num_ids, clients, processes, tokens = LOADS[num_servers]
    ports = [own[i % num_servers].port for i in range(processes)]
    each = [EngineClients(port, i * 1_000_000) for i, port in enumerate(ports)]
    trainer = join(own)
    try:
        pipes = start_clients(each, clients, num_ids, tokens)
        for step in range(1, NUM_UPDATES + 1):
            time.sleep(SECONDS_BETWEEN_UPDATES)
            early = [pipe.recv() for pipe in pipes if pipe.poll()]
            assert not early, f"{early} after {step - 1} updates"
            if step == NUM_UPDATES // 2:
                trainer.send(0, "wrong_shape")
                answers = update(own, weight_version="never")
                assert all(x.status_code == 400 for x in answers), [x.text for x in answers]
            trainer.send(step % 2)
            answers = update(own, weight_version=str(step))
            assert all(x.ok for x in answers), [x.text for x in answers]
        results = []
        for pipe in pipes:
            results.append(pipe.recv())
            assert not isinstance(results[-1], Exception), results[-1]
    finally:
        trainer.stop()
    by_kind, reasons, by_version = (
        sum((result[i] for result in results), Counter()) for i in range(3)
    )
    assert by_kind.total() >= num_ids and by_kind.keys() == KINDS.keys()
    assert reasons["abort: abort"] > 0 or FAILS_ABORTED_STREAMS
    assert reasons["hang up: None"] > 0
    assert by_version.keys() == {"default", *map(str, range(1, NUM_UPDATES + 1))}
    for server in own:
        assert fresh(server, PROMPT, SHORT) == by_seed[NUM_UPDATES % 2]


@trainer_mode
@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("missing", f"parameter {BAD_PARAMETER} is missing"),
        ("wrong_shape", f"parameter {BAD_PARAMETER} has the shape [255, 128]"),
        ("unknown", BAD_PARAMETER),
        ("not_loadable", f"parameter {BAD_PARAMETER} could not be loaded"),
    ],
)
def test_bad_weights_leave_the_old_ones(
    server: Server, by_seed: dict[int, list[int]], fault: str, named: str
) -> None:
    trainer = join([server], by_rank=True)
    try:
        running = Running(server, GENERATE, max_tokens=NUM_TOKENS)
        running.wait_for(10)
        trainer.send(1, fault)
        [answer] = update([server])
        assert answer.status_code == 400 and named in answer.text
        [(ids, spans)] = running.finish().values()
        assert len(ids) == NUM_TOKENS
        check_versions(spans, "default")
        assert fresh(server, PROMPT, SHORT) == by_seed[0]
        # The trainer is still there.
        check_update(trainer, server, 1, by_seed)
    finally:
        trainer.stop()


@trainer_mode
@pytest.mark.parametrize("fault", ["dies", "dies_between", "falls_silent"])
def test_a_trainer_that_is_gone(server: Server, by_seed: dict[int, list[int]], fault: str) -> None:
    trainer = join([server], timeout=5)
    trainer.send(1, fault)
    start = time.monotonic()
    [answer] = update([server])
    trainer.stop()
    assert answer.status_code == 400 and "the trainer has to join again" in answer.text
    assert re.search(r"parameter model\.\S+ is missing", answer.text), answer.text
    assert time.monotonic() - start < 30
    assert not is_paused(server)
    if ON_GPU and fault == "dies":
        time.sleep(NCCL_WATCHDOG_S)
    assert fresh(server, PROMPT, SHORT) == by_seed[0]
    [answer] = update([server])
    assert answer.status_code == 400 and "/init_broadcaster" in answer.text

    trainer = join([server])
    try:
        check_update(trainer, server, 2, by_seed)
    finally:
        trainer.stop()


@pytest.mark.parametrize(("by_rank", "fault"), [(False, "dies"), (True, "dies_between")])
@pytest.mark.parametrize("server", ["trainer_tp"], indirect=True)
def test_all_ranks_of_a_server_or_none(server: Server, by_rank: bool, fault: str) -> None:
    by_seed = ids_by_seed(server)
    # With NCCL, a rank that does not receive from the trainer itself only knows by the time.
    trainer = join([server], timeout=20, by_rank=by_rank, tp_size=2)
    try:
        check_update(trainer, server, 1, by_seed)
        trainer.send(2, "not_loadable")
        [answer] = update([server])
        assert answer.status_code == 400 and f"{BAD_PARAMETER} could not be" in answer.text
        assert fresh(server, PROMPT, SHORT) == by_seed[1]
        check_update(trainer, server, 2, by_seed)
        trainer.send(0, fault)
        [answer] = update([server])
        assert answer.status_code == 400 and "the trainer has to join again" in answer.text
        assert fresh(server, PROMPT, SHORT) == by_seed[2]
    finally:
        trainer.stop()


@trainer_mode
def test_a_trainer_that_never_comes(server: Server, by_seed: dict[int, list[int]]) -> None:
    ranks = {"server_rank": 0, "num_inference_server": 1}
    answer = control(
        server, "/init_broadcaster", host="127.0.0.1", port=reserve_port(), timeout=2, **ranks
    )
    assert answer.status_code == 400
    assert fresh(server, PROMPT, SHORT) == by_seed[0]


@pytest.fixture
def folder(server: Server, tmp_path: Path) -> Path:
    """The weights of seed 1 in two files, as large checkpoints have them."""
    # It may have had a trainer, and weights would come from there.
    assert not control(server, "/update_weights").ok
    folder = tmp_path / "step_7"
    shutil.copytree(tiny_model_path(1), folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {"model-1.safetensors": names[::2], SHARD: names[1::2]}
    for file, own in files.items():
        save_file({name: weights[name] for name in own}, folder / file)
    weight_map = {name: file for file, own in files.items() for name in own}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@trainer_mode
def test_a_folder(server: Server, by_seed: dict[int, list[int]], folder: Path) -> None:
    name = post(server, CHAT, body_for(CHAT, max_tokens=1))["model"]
    models = requests.get(f"{server.url}/v1/models", timeout=30).json()["data"]
    running = Running(server, GENERATE, max_tokens=NUM_TOKENS)
    running.wait_for(10)
    answer = control(server, "/update_weights", weight_dir=str(folder))
    assert answer.ok and answer.json() == {"status": "ok"}
    [(ids, spans)] = running.finish().values()
    assert len(ids) == NUM_TOKENS
    check_versions(spans, "default", "step_7")
    assert fresh(server, PROMPT, SHORT) == by_seed[1]
    # Clients know the model by the name it had.
    assert post(server, CHAT, body_for(CHAT, max_tokens=1))["model"] == name
    after = requests.get(f"{server.url}/v1/models", timeout=30).json()["data"]
    assert [model["id"] for model in after] == [model["id"] for model in models]

    # Trainers remove old folders.
    shutil.rmtree(folder)
    assert control(server, "/update_weights", weight_dir=str(folder)).status_code == 400
    assert fresh(server, PROMPT, SHORT) == by_seed[1]
    assert control(server, "/reload_weights").ok
    assert fresh(server, PROMPT, SHORT) == by_seed[0]


def no_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def damaged_shard(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-100])


def wrong_shape(folder: Path) -> None:
    weights = load_file(folder / SHARD)
    weights[BAD_PARAMETER] = weights[BAD_PARAMETER][:-1].contiguous()
    save_file(weights, folder / SHARD)


@trainer_mode
@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (no_shard, ["parameter", "is missing", "model-2.safetensors"]),
        (damaged_shard, ["model-2.safetensors", "damaged"]),
        (wrong_shape, [f"parameter {BAD_PARAMETER} has the shape [255, 128]", "[256, 128]"]),
        (shutil.rmtree, ["weight_dir"]),
    ],
)
def test_a_bad_folder_leaves_the_old_weights(
    server: Server,
    by_seed: dict[int, list[int]],
    folder: Path,
    spoil: Callable[[Path], None],
    named: list[str],
) -> None:
    spoil(folder)
    running = Running(server, GENERATE, max_tokens=NUM_TOKENS)
    running.wait_for(10)
    answer = control(server, "/update_weights", weight_dir=str(folder))
    assert answer.status_code == 400
    assert all(part in answer.text for part in named), answer.text
    [(ids, spans)] = running.finish().values()
    assert len(ids) == NUM_TOKENS
    check_versions(spans, "default")
    assert fresh(server, PROMPT, SHORT) == by_seed[0]


@pytest.mark.parametrize("server", ["trainer_lora"], indirect=True)
def test_adapters_are_left_alone(server: Server, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter")
    adapter = {"lora_name": "adapter", "lora_path": str(tmp_path / "adapter")}
    by_seed = ids_by_seed(server)

    def load() -> None:
        answer = control(server, "/load_lora_adapter", **adapter)
        assert answer.ok, answer.text

    def ids() -> tuple[list[int], list[int]]:
        return fresh(server, PROMPT, SHORT), fresh(server, PROMPT, SHORT, lora_path="adapter")

    load()
    with_first = ids()[1]
    assert control(server, "/update_weights", weight_dir=str(tiny_model_path(1))).ok
    base, with_adapter = ids()
    assert base == by_seed[1]
    assert with_adapter not in (base, with_first)
    shutil.copytree(tiny_model_path(2), tmp_path / "bad")
    weights = load_file(tmp_path / "bad" / "model.safetensors")
    weights[BAD_PARAMETER] = weights[BAD_PARAMETER][:-1].contiguous()
    save_file(weights, tmp_path / "bad" / "model.safetensors")
    assert not control(server, "/update_weights", weight_dir=str(tmp_path / "bad")).ok
    assert ids() == (base, with_adapter)
    # It is what it is when it comes to the new weights.
    assert control(server, "/unload_lora_adapter", lora_name="adapter").ok
    load()
    assert ids() == (base, with_adapter)


@pytest.mark.parametrize("server", ["trainer_lora"], indirect=True)
@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/load_lora_adapter", {}),
        ("/v1/load_lora_adapter", {"load_inplace": True}),
        ("/skyrl/v1/load_lora_adapter", {}),
    ],
)
def test_an_adapter_is_loaded_again_as_a_whole_or_not_at_all(
    server: Server, tmp_path: Path, path: str, more: dict[str, Any]
) -> None:
    folder = tmp_path / "adapter"
    make_adapter(folder)
    weights = load_file(folder / "adapter_model.safetensors")

    def load(**fields: Any) -> requests.Response:
        return control(server, path, lora_name="own", lora_path=str(folder), **more, **fields)

    def write(scale: float) -> None:
        # Trainers write the next one where the one before was.
        scaled = {x: w * scale if "lora_B" in x else w for x, w in weights.items()}
        save_file(scaled, folder / "adapter_model.safetensors")

    def ids() -> list[int]:
        return fresh(server, PROMPT, SHORT, model="own")

    base = fresh(server, PROMPT, SHORT)
    assert load().ok
    try:
        first = ids()
        assert first != base and fresh(server, PROMPT, SHORT, lora_path="own") == first
        running = Running(server, COMPLETIONS, {"model": "own"}, max_tokens=NUM_TOKENS)
        running.wait_for(10)
        assert control(server, "/pause", mode="keep", clear_cache=False).ok
        write(-1.0)
        assert load().ok
        assert control(server, "/resume").ok
        [(old, _)] = running.finish().values()
        assert len(old) == NUM_TOKENS and old[:SHORT] == first
        second = ids()
        assert second not in (base, first)

        (folder / "adapter_model.safetensors").write_bytes(b"cut off")
        refused = load()
        assert refused.status_code == 400 and "@" not in refused.text, refused.text
        assert ids() == second
        write(1.0)
        assert load().ok
        assert ids() == first

        again = control(server, "/v1/load_lora_adapter", lora_name="own", lora_path=str(folder))
        assert again.status_code == 400 and "load_inplace" in again.text
        named = requests.get(f"{server.url}/v1/models", timeout=30).json()["data"]
        assert "own" in [model["id"] for model in named]
    finally:
        unloaded = control(server, "/unload_lora_adapter", lora_name="own")
    assert unloaded.ok and "own" not in unloaded.json()["loaded_adapters"]
    missing = control(server, "/v1/unload_lora_adapter", lora_name="own")
    assert missing.status_code == 404 and missing.json()["error"]["type"] == "NotFoundError"
    bad = control(server, "/v1/load_lora_adapter", lora_name="own")
    assert bad.status_code == 400 and "lora_path" in bad.text
    assert fresh(server, PROMPT, SHORT) == base


@trainer_mode
@pytest.mark.parametrize("mode", ["keep", "in_place", "retract", "abort", "wait"])
def test_pause(server: Server, mode: str) -> None:
    assert not is_paused(server)
    num_tokens = 100 if mode == "wait" else NUM_TOKENS
    running = Running(server, GENERATE, max_tokens=num_tokens)
    running.wait_for(10)
    answer = control(server, "/pause", mode=mode, clear_cache=mode != "in_place")
    assert answer.ok and answer.json() == {"status": "paused"}
    assert is_paused(server)
    if mode in ("abort", "wait"):
        [(ids, _)] = running.finish().values()
        assert (len(ids) == num_tokens) == (mode == "wait")
    else:
        time.sleep(0.5)
        seen = running.num_tokens
        time.sleep(0.5)
        assert running.num_tokens == seen < num_tokens
    flushed = control(server, "/reset_prefix_cache")
    assert flushed.ok == (mode != "in_place"), flushed.text

    if flushed.ok:
        assert flushed.json() == {"success": True}

    # A request that comes in between is refused as by vLLM, or waits.
    if mode in ("abort", "wait"):
        for path in GENERATES:
            for body in (generate(max_tokens=5), {"stream": True}):
                refused = control(server, path, **body)
                assert refused.status_code == 503, (path, refused.text)
                error = refused.json()["error"]
                assert error["type"] == "ServiceUnavailableError" and error["code"] == 503
                assert "/resume" in error["message"]
        assert control(server, RENDER, messages=MESSAGES).ok
        assert control(server, "/resume").json() == {"status": "resumed"}
        waiting = Running(server, GENERATE, max_tokens=5)
    else:
        waiting = Running(server, GENERATE, max_tokens=5)
        waiting.thread.join(0.5)
        assert waiting.thread.is_alive()
        assert control(server, "/resume").json() == {"status": "resumed"}
    assert not is_paused(server)
    [(ids, _)] = waiting.finish().values()
    assert len(ids) == 5
    if mode not in ("abort", "wait"):
        [(ids, _)] = running.finish().values()
        assert len(ids) == num_tokens


@trainer_mode
@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/pause", {"mode": "gently"}, ["mode", "keep", "clear_cache"]),
        ("/pause", {"modus": "keep"}, ["modus", "clear_cache"]),
        ("/pause", [1], ["JSON object"]),
        ("/reset_prefix_cache", {"reset_running_requests": True}, ["reset_running_requests"]),
        ("/sleep", {"level": 3}, ["level", "2"]),
        ("/sleep", {"level": 1}, ["level 1", "--enable-memory-saver"]),
        ("/sleep?level=2", None, ["level 2", "--enable-memory-saver"]),
        ("/wake_up?tags=weights&tags=graphs", None, ["graphs", "kv_cache", "scheduling"]),
        (RENDER, {"messages": 5}, ["messages"]),
        (RENDER, [1], ["JSON object"]),
        (RENDER, {"messages": MESSAGES, "ebnf": "root ::= 'a'"}, ["support", "ebnf"]),
        (
            RENDER,
            {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "required"},
            ["support", "tool_choice"],
        ),
        (
            RENDER,
            {"messages": [{"role": "user", "content": [IMAGE]}]},
            ["support", "image_url"],
        ),
        ("/init_weight_transfer_engine", {}, ["init_info"]),
        ("/init_weight_transfer_engine", {"init_info": INIT | {"rank_offset": 2}}, ["from 2 on"]),
        (
            "/init_weight_transfer_engine",
            {"init_info": INIT | {"nccl_unique_id_b64": "aaaa"}},
            ["init_info.nccl_unique_id_b64"],
        ),
        ("/start_weight_update", {}, ["No trainer", "/init_weight_transfer_engine"]),
        ("/finish_weight_update", {}, ["No update"]),
        ("/update_weights", {"update_info": {}}, ["No trainer"]),
        ("/update_weights", {"update_info": [{}]}, ["update_info"]),
        ("/update_weights", {"update_info": {"names": ["a"]}}, ["differ in length"]),
        ("/update_weights", {"update_info": {"ipc_handles_pickled": "a"}}, ["ipc_handles_pickled"]),
        ("/update_weights", {"update_info": {}, "weight_dir": "/a"}, ["update_info"]),
        ("/collective_rpc", {"method": "update_weights_ipc"}, ["update_weights_ipc", "pickle"]),
        ("/collective_rpc", {"method": "shutdown"}, ["shutdown", "update_weights_nccl"]),
        ("/collective_rpc", {"method": "update_weights_nccl"}, ["has to come before"]),
        ("/update_weights", {}, ["weight_dir", "/init_broadcaster"]),
        ("/update_weights", {"weight_dir": 5}, ["weight_dir", "string"]),
        ("/init_broadcaster", {"host": "localhost"}, ["port"]),
        ("/init_broadcaster", {"host": "localhost", "port": 1}, ["server_rank", "rank_offset"]),
        (
            "/init_broadcaster",
            {"host": "localhost", "port": 1, "rank_offset": 1, "inference_world_size": 1},
            ["1 ranks", "from 1 on", "world of 1"],
        ),
        (
            "/init_broadcaster",
            {"host": "a", "port": 1, "rank_offset": 0, "inference_world_size": 1, "timeout": 0},
            ["timeout", "greater than 0"],
        ),
    ],
)
def test_bad_input_is_named(server: Server, path: str, body: Any, named: list[str]) -> None:
    # A trainer that is gone may still have joined.
    control(server, "/update_weights")
    answer = requests.post(server.url + path, json=body, timeout=30)
    assert answer.status_code == 400
    assert all(part in answer.text for part in named), answer.text
    assert not is_paused(server)


@pytest.mark.parametrize("server", ["default"], indirect=True)
def test_off_by_default(server: Server) -> None:
    for path in [*ROUTES, *CLIENT_ROUTES]:
        assert requests.post(server.url + path, json={}, timeout=30).status_code == 404
    for path in ("/is_paused", "/is_sleeping", "/liveness", "/get_world_size", "/metrics"):
        assert requests.get(server.url + path, timeout=30).status_code == 404
    assert post(server, "/detokenize", {"tokens": PROMPT}).keys() == {"text"}


@pytest.mark.parametrize("server", ["trainer_key"], indirect=True)
def test_they_obey_the_admin_key(server: Server) -> None:
    headers = {"Authorization": "Bearer secret"}
    for path in ROUTES:
        for wrong in ({}, {"Authorization": "Bearer other"}):
            answer = requests.post(server.url + path, json={}, headers=wrong, timeout=30)
            assert answer.status_code == 401
    assert requests.get(server.url + "/is_paused", timeout=30).status_code == 401
    assert requests.get(server.url + "/is_paused", headers=headers, timeout=30).ok
    for path in ("/pause", "/reload_weights", "/resume"):
        assert requests.post(server.url + path, headers=headers, timeout=60).ok
    assert post(server, GENERATE, body_for(GENERATE, max_tokens=3))["choices"]


@trainer_mode
@pytest.mark.parametrize("keeps_cache", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("path", "mode"),
    [
        ("/pause", "keep"),
        ("/pause", "abort"),
        ("/pause", "wait"),
        ("/pause_generation", "in_place"),
        ("/pause_generation", "retract"),
        ("/pause_generation", "abort"),
    ],
)
def test_a_pause_during_an_update_holds(
    server: Server, path: str, mode: str, keeps_cache: bool
) -> None:
    num_tokens = 60
    keeps_requests = mode not in ("abort", "wait")
    trainer = join([server])
    pauses: list[requests.Response] = []
    try:
        running = Running(server, GENERATE, max_tokens=num_tokens)
        running.wait_for(10)
        fields = {"skip_prefix_cache_reset": keeps_cache, "weight_version": "1"}
        updating = threading.Thread(target=update, args=([server],), kwargs=fields)
        updating.start()
        wait_until_paused(server)
        body = {"mode": mode, **({"clear_cache": False} if path == "/pause" else {})}
        pausing = threading.Thread(target=lambda: pauses.append(control(server, path, **body)))
        pausing.start()
        if keeps_requests:
            # The update still waits for its weights.
            pausing.join(10)
            assert pauses and updating.is_alive()
        time.sleep(0.5)
        trainer.send(1)
        updating.join()
        pausing.join(30)
        assert pauses[0].ok and is_paused(server)
        if keeps_requests:
            # A pause that retracts has let out the token that was under way.
            time.sleep(0.5)
            seen = running.num_tokens
            time.sleep(0.5)
            assert running.num_tokens == seen < num_tokens and is_paused(server)
            assert control(server, "/resume").ok
        [(ids, _)] = running.finish().values()
        assert (len(ids) == num_tokens) == (mode != "abort")
    finally:
        trainer.stop()
        control(server, "/resume")


@trainer_mode
@pytest.mark.parametrize("path", ["/resume", "/continue_generation"])
def test_a_resume_during_an_update_comes_after_it(
    server: Server, by_seed: dict[int, list[int]], path: str
) -> None:
    trainer = join([server])
    try:
        running = Running(server, GENERATE, max_tokens=NUM_TOKENS)
        running.wait_for(10)
        assert control(server, "/pause", mode="keep").ok
        updating = threading.Thread(target=update, args=([server],), kwargs={"weight_version": "1"})
        updating.start()
        time.sleep(1)
        start = time.monotonic()
        assert control(server, path).ok and time.monotonic() - start < 10
        assert updating.is_alive() and is_paused(server)
        trainer.send(1)
        updating.join()
        assert not is_paused(server)
        [(ids, spans)] = running.finish().values()
        assert len(ids) == NUM_TOKENS
        check_versions(spans, "default", "1")
        assert fresh(server, PROMPT, SHORT) == by_seed[1]
    finally:
        trainer.stop()


@trainer_mode
def test_a_pause_outlasts_an_update(server: Server) -> None:
    running = Running(server, GENERATE, max_tokens=NUM_TOKENS)
    running.wait_for(10)
    try:
        assert control(server, "/pause", mode="keep").ok
        assert control(server, "/reload_weights").ok
        assert is_paused(server)
        time.sleep(0.5)
        seen = running.num_tokens
        time.sleep(0.5)
        assert running.num_tokens == seen < NUM_TOKENS
    finally:
        control(server, "/resume")
    [(ids, _)] = running.finish().values()
    assert len(ids) == NUM_TOKENS


def wait_until_paused(server: Server) -> None:
    deadline = time.monotonic() + 30
    while not is_paused(server):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@trainer_mode
@pytest.mark.parametrize(
    ("headers", "data", "status"),
    [
        ({"Content-Type": "application/x-www-form-urlencoded"}, "mode=keep", 400),
        ({"Content-Type": "application/x-www-form-urlencoded"}, "", 400),
        ({"Content-Type": "text/plain"}, "{}", 400),
        ({"Content-Type": "multipart/form-data; boundary=x"}, "", 400),
        ({}, "{}", 400),
        ({"Content-Type": "application/octet-stream"}, "{}", 400),
        # The server answers the question of a browser whether it may send JSON by yes.
        ({"Content-Type": "application/json", "Origin": "http://web.page"}, "{}", 403),
        ({"Origin": "null"}, "", 403),
        ({"Sec-Fetch-Site": "cross-site"}, "", 403),
    ],
)
def test_a_web_page_cannot_post(
    server: Server, headers: dict[str, str], data: str, status: int
) -> None:
    for path in [*ROUTES, "/finish_session"]:
        answer = requests.post(server.url + path, data=data, headers=headers, timeout=30)
        assert answer.status_code == status, (path, answer.text)
        named = "application/json" if status == 400 else "web page"
        assert named in answer.text
        assert not is_paused(server)


@trainer_mode
@pytest.mark.parametrize(
    ("content_type", "data"),
    [
        ("application/json", "{}"),
        ("Application/JSON; charset=utf-8", "{}"),
        # As aiohttp does.
        ("application/octet-stream", ""),
    ],
)
def test_json_may_be_posted(server: Server, content_type: str, data: str) -> None:
    headers = {"Content-Type": content_type}
    for path in ("/pause", "/resume"):
        assert requests.post(server.url + path, data=data, headers=headers, timeout=60).ok


@trainer_mode
def test_errors_do_not_tell_what_the_file_system_has(server: Server, folder: Path) -> None:
    weights = folder / SHARD
    empty = folder.parent / "empty"
    empty.mkdir()
    loop = folder.parent / "loop"
    loop.symlink_to(loop)
    dangling = folder.parent / "dangling"
    dangling.mkdir()
    (dangling / "model.safetensors").symlink_to("nowhere")
    names = [folder.parent / "nowhere", weights, weights / "below", empty, loop, dangling]
    others = ["/etc/passwd", "/root", "no-such/model", "a/b/c", "../..", "a\0b", "x" * 5000, ""]
    answers = set()
    for name in [*map(str, names), *others]:
        answer = control(server, "/update_weights", weight_dir=name)
        assert answer.status_code == 400
        answers.add(answer.text)
        assert not is_paused(server)
    [text] = answers
    assert "weight_dir" in text and str(folder.parent) not in text
    # The operator is told.
    assert f"weight_dir='{loop}': " in server.log_text()
    assert "there is no safetensors file in it" in server.log_text()


@trainer_mode
@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 16, "ignore_eos": True},
        {"max_completion_tokens": 7, "seed": 5, "temperature": 0.5, "top_k": 20, "n": 2},
        {"regex": "(ab|cd){8}", "max_tokens": 16, "logprobs": True, "top_logprobs": 2},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"enum": ["xyz"]}},
            }
        },
        {"tools": [TOOL], "stop": ["a"], "max_tokens": 8, "logit_bias": {"70": 5.0}},
    ],
)
def test_a_rendered_request_generates_what_chat_does(
    server: Server, fields: dict[str, Any]
) -> None:
    body = chat({"temperature": 0, **fields})
    rendered = post(server, RENDER, body)
    assert rendered["return_token_ids"] is True and rendered["features"] is None
    flush_cache(server.url)
    expected = post(server, CHAT, body)
    flush_cache(server.url)
    answer = post(server, GENERATE, rendered)
    assert rendered["token_ids"] == expected["prompt_token_ids"]
    for choice, other in zip(answer["choices"], expected["choices"], strict=True):
        assert choice["finish_reason"] == other["finish_reason"]
        if "seed" not in fields:
            assert choice["token_ids"] == other["token_ids"]
    assert ("logprobs" in rendered["sampling_params"]) == ("logprobs" in fields)
    limit = fields.get("max_completion_tokens", fields.get("max_tokens"))
    assert rendered["sampling_params"].get("max_tokens") == limit


@trainer_mode
def test_text_has_the_name_that_vllm_gives_it(server: Server) -> None:
    # An id of the special tokens is first.
    ids = [0, *PROMPT]
    one = post(server, "/detokenize", {"model": "m", "tokens": ids})
    assert one["prompt"].endswith(one["text"]) and one["prompt"] != one["text"] != ""
    assert post(server, "/tokenize", {"prompt": one["prompt"]})["tokens"] == ids
    many = post(server, "/v1/detokenize", {"model": "m", "tokens": [ids, PROMPT]})
    assert many == {"text": [one["text"]] * 2, "prompt": [one["prompt"], one["text"]]}
    assert post(server, "/detokenize", {"tokens": []}) == {"text": "", "prompt": ""}
    assert control(server, "/detokenize", tokens="a").status_code == 400


@trainer_mode
def test_what_is_asked_of_a_server(server: Server) -> None:
    def get(path: str) -> dict[str, Any]:
        answer = requests.get(server.url + path, json={}, timeout=30)
        assert answer.ok, answer.text
        fields: dict[str, Any] = answer.json()
        return fields

    assert get("/liveness") == {"status": "ok"}
    assert get("/get_world_size") == {"world_size": 1}
    assert get("/is_sleeping") == {"is_sleeping": False}
    finished = requests.post(f"{server.url}/finish_session?session_id=a", timeout=30)
    assert finished.ok


def read_metrics(server: Server, prefix: str = "vllm:") -> dict[str, Any]:
    """The values by their names, and the labels of those that say it with them."""
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    found: dict[str, Any] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples if family.name.startswith(prefix) else ():
            found[sample.name.removeprefix(prefix)] = (
                sample.labels if sample.name.endswith("_info") else sample.value
            )
    return found


def capacity(server: Server) -> int:
    info = requests.get(f"{server.url}/get_server_info", timeout=30).json()
    return int(info["max_total_num_tokens"])


def wait_for_load(server: Server, is_it: Callable[[int, int], bool]) -> dict[str, Any]:
    """Wait for numbers of running and waiting requests.

    Some releases count them once in so many steps.
    """
    deadline = time.monotonic() + 30
    while True:
        load = read_metrics(server)
        if is_it(load["num_requests_running"], load["num_requests_waiting"]):
            return load
        assert time.monotonic() < deadline, load
        time.sleep(0.05)


def is_idle(running: int, waiting: int) -> bool:
    return not running and not waiting


@trainer_mode
def test_the_load_has_the_names_that_vllm_gives_it(server: Server) -> None:
    """prime-rl's orchestrator begins with as many rollouts as the KV cache holds."""
    idle = wait_for_load(server, is_idle)
    assert idle["kv_cache_usage_perc"] == 0
    num_tokens = capacity(server)
    assert idle["cache_config_info"] == {
        "engine": "0",
        "block_size": "1",
        "num_gpu_blocks": str(num_tokens),
        "kv_cache_size_tokens": str(num_tokens),
    }
    # Nothing counts them without --enable-metrics.
    assert "num_preemptions_total" not in idle and not read_metrics(server, "sglang:")
    streams = [Running(server, GENERATE, max_tokens=NUM_TOKENS) for _ in range(3)]
    for stream in streams:
        stream.wait_for(60)
    busy = wait_for_load(server, lambda running, waiting: (running, waiting) == (3, 0))
    most = len(PROMPT) + 3 * NUM_TOKENS
    assert 3 * 40 <= busy["kv_cache_usage_perc"] * num_tokens <= most
    for stream in streams:
        stream.finish()
    wait_for_load(server, is_idle)


@pytest.mark.parametrize("server", ["trainer_metrics"], indirect=True)
def test_retracted_requests_are_preempted_by_the_name_of_vllm(server: Server) -> None:
    """Beside what the server has at /metrics in any case."""

    def generate() -> int:
        sampling = {"max_new_tokens": 60, "ignore_eos": True}
        body = {"input_ids": PROMPT, "sampling_params": sampling}
        meta = post(server, "/generate", body)["meta_info"]
        return int(meta["num_retractions" if "num_retractions" in meta else "total_retractions"])

    before = read_metrics(server)["num_preemptions_total"]
    with ThreadPoolExecutor(3) as pool, server.slowed_down():
        pending = [pool.submit(generate) for _ in range(3)]
        # Two run at the most.
        wait_for_load(server, lambda running, waiting: bool(running and waiting))
        num_retractions = sum(future.result() for future in pending)
    assert num_retractions > 0
    assert read_metrics(server)["num_preemptions_total"] - before == num_retractions
    stock = read_metrics(server, "sglang:")
    assert stock["num_retracted_requests_total"] == before + num_retractions


@pytest.mark.parametrize("server", ["trainer_metrics"], indirect=True)
@pytest.mark.parametrize("endpoint", [CHAT, TOKENS, COMPLETIONS, GENERATE, "/is_paused"])
def test_requests_count_by_their_paths(server: Server, endpoint: str) -> None:
    if endpoint == "/is_paused":
        assert not is_paused(server)
    else:
        body = body_for(CHAT if endpoint == TOKENS else endpoint, max_tokens=3)
        if endpoint == TOKENS:
            body["tokens"] = body.pop("input_ids")
        assert post(server, endpoint, body)["choices"]
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    assert f'sglang:http_requests_total{{endpoint="{endpoint}"' in text


@pytest.mark.parametrize("server", ["trainer_tp", "trainer_dp"], indirect=True)
def test_the_size_of_the_world(server: Server) -> None:
    sizes = [
        requests.get(f"{server.url}/get_world_size{query}", timeout=30).json()["world_size"]
        for query in ("", "?include_dp=false")
    ]
    assert sizes == ([2, 2] if server.name == "trainer_tp" else [2, 1])


@trainer_mode
def test_a_sleep_that_only_pauses(server: Server) -> None:
    running = Running(server, GENERATE, max_tokens=NUM_TOKENS)
    running.wait_for(10)
    answer = requests.post(f"{server.url}/sleep", params={"level": 0, "mode": "keep"}, timeout=60)
    assert answer.json() == {"status": "sleeping", "level": 0}
    assert is_paused(server)
    woken = requests.post(f"{server.url}/wake_up", params={"tags": ["scheduling"]}, timeout=60)
    assert woken.json() == {"status": "awake", "tags": ["scheduling"]}
    assert not is_paused(server)
    [(ids, _)] = running.finish().values()
    assert len(ids) == NUM_TOKENS


@pytest.mark.skipif(not ON_GPU, reason="a CPU has no memory that sleeps")
@pytest.mark.parametrize(
    ("server", "level"), [("trainer_sleep", 1), ("trainer_deep_sleep", 2)], indirect=["server"]
)
def test_a_sleep_gives_memory_back(server: Server, level: int) -> None:
    """The KV cache is most of it. Level 2 forgets the weights, and a trainer sends new ones."""
    import torch

    def is_sleeping() -> bool:
        answer = requests.get(f"{server.url}/is_sleeping", timeout=30).json()
        return bool(answer["is_sleeping"])

    before = fresh(server, PROMPT, SHORT)
    free, _ = torch.cuda.mem_get_info()
    asleep = requests.post(f"{server.url}/sleep", params={"level": level}, timeout=60)
    assert asleep.json() == {"status": "sleeping", "level": level}
    assert is_sleeping()
    # 65,536 tokens with a key and a value of at least 64 numbers of two bytes in each layer.
    freed = torch.cuda.mem_get_info()[0] - free
    assert freed > 65_536 * NUM_LAYERS * 2 * 64 * 2 // 2, freed
    weights = {"weight_dir": str(tiny_model_path())}
    refused = control(server, "/update_weights", **weights)
    assert refused.status_code == 400 and "asleep" in refused.text

    woken = requests.post(f"{server.url}/wake_up", params={"tags": ["weights"]}, timeout=60)
    assert woken.json() == {"status": "sleeping", "tags": ["weights"]}
    if level == 2:
        assert control(server, "/update_weights", **weights).ok
    woken = requests.post(f"{server.url}/wake_up", timeout=60)
    assert woken.json() == {"status": "awake", "tags": None}
    assert not is_sleeping() and not is_paused(server)
    assert fresh(server, PROMPT, SHORT) == before


def join_as_vllm(server: Server) -> Trainer:
    """Start a trainer and have a server join it, as trainers for vLLM do."""
    trainer = Trainer(world_size=1)
    info = INIT | {"master_port": trainer.port, "packed": True, "packed_num_buffers": 2}
    answer = control(server, "/init_weight_transfer_engine", init_info=info)
    assert answer.ok, answer.text
    assert answer.json() == {"message": "Weight transfer initialized"}
    return trainer


def metadata(seed: int) -> dict[str, Any]:
    """What vLLM is told of the weights."""
    weights = load_file(tiny_model_path(seed) / "model.safetensors")
    return {
        "names": list(weights),
        "dtype_names": [str(x.dtype).removeprefix("torch.") for x in weights.values()],
        "shapes": [list(x.shape) for x in weights.values()],
        "packed": True,
    }


@trainer_mode
def test_an_update_as_trainers_for_vllm_do_it(
    server: Server, by_seed: dict[int, list[int]]
) -> None:
    trainer = join_as_vllm(server)
    try:
        running = Running(server, GENERATE, max_tokens=NUM_TOKENS)
        running.wait_for(10)
        assert control(server, "/pause", mode="keep").ok
        assert control(server, "/start_weight_update").json()["message"] == "Weight update started"
        twice = control(server, "/start_weight_update")
        assert twice.status_code == 400 and "/finish_weight_update" in twice.text
        trainer.send(1)
        answer = control(server, "/update_weights", update_info=metadata(1))
        assert answer.ok and answer.json() == {"message": "Weights updated"}, answer.text
        answer = control(server, "/finish_weight_update", weight_version="7")
        assert answer.json() == {"message": "Weight update finished"}
        assert is_paused(server)
        assert control(server, "/resume").ok
        [(ids, spans)] = running.finish().values()
        assert len(ids) == NUM_TOKENS
        check_versions(spans, "default", "7")
        assert fresh(server, PROMPT, SHORT) == by_seed[1]

        # A bad one ends the update, and the trainer is still there.
        assert control(server, "/start_weight_update").ok
        trainer.send(2, "wrong_shape")
        bad = control(server, "/update_weights", update_info={})
        assert bad.status_code == 400 and f"{BAD_PARAMETER} has the shape" in bad.text
        assert control(server, "/finish_weight_update").status_code == 400
        assert fresh(server, PROMPT, SHORT) == by_seed[1]
        trainer.send(2)
        assert control(server, "/update_weights", update_info={}).ok
        assert fresh(server, PROMPT, SHORT) == by_seed[2]
    finally:
        trainer.stop()


@trainer_mode
def test_an_update_as_skyrl_does_it(server: Server, by_seed: dict[int, list[int]]) -> None:
    trainer = join_as_vllm(server)

    def call(method: str, **kwargs: Any) -> requests.Response:
        return control(server, "/collective_rpc", method=method, kwargs=kwargs)

    try:
        kernel = call("skyrl_start_weight_update", is_checkpoint_format=False)
        assert kernel.status_code == 400 and "is_checkpoint_format" in kernel.text
        assert call("skyrl_start_weight_update", is_checkpoint_format=True).ok
        trainer.send(1)
        answer = call("update_weights_nccl", update_info=metadata(1))
        assert answer.ok, answer.text
        assert call("skyrl_finish_weight_update").ok
        assert call("skyrl_finish_weight_update").status_code == 400
        assert fresh(server, PROMPT, SHORT) == by_seed[1]
    finally:
        trainer.stop()
