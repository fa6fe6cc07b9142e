"""A weight update that fails is undone, on all ranks of a server, or refused beforehand."""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import requests

from testbed.client import PROMPT, control, fresh
from testbed.server import ON_GPU, Server
from testbed.tiny_model import tiny_model_path
from tools.verify import reserve_port

RANKS = (0, 1)
TIMEOUT_S = 180
# For what takes no time.
SOON_S = 10
OLD, NEW = 1.0, 2.0


def make_updater(model: Any, ranks: Any = None, path: Path | None = None, **fields: Any) -> Any:
    """What updates `model`, as the only rank of a server or one of `ranks`.

    Args:
        path: The checkpoint of the start.
        fields: Other values of the runner and of its configurations.
    """
    import torch
    from sglang.srt.weight_sync.all_or_nothing import AllOrNothingUpdater

    values = {
        "model_path": str(path or tiny_model_path()),
        "dtype": torch.float32,
        "quantization": None,
        "load_format": "auto",
        "device": "cpu",
        **fields,
    }
    config = SimpleNamespace(revision=None, hf_config=SimpleNamespace(), **values)
    load_config = SimpleNamespace(download_dir=None, load_format=values["load_format"])
    runner: Any = SimpleNamespace(
        model=model, model_config=config, load_config=load_config, device=values["device"]
    )
    return AllOrNothingUpdater(runner, ranks or SimpleNamespace(world_size=1))


def load(
    model: Any,
    loads: Callable[[], None],
    error: str | None = None,
    flush_error: str | None = None,
    updater: Any = None,
    **fields: Any,
) -> tuple[bool, str]:
    """Have `model` load a weight by `loads`.

    Args:
        updater: What updates it, or None for a new one.
    """
    import torch

    def load_weights(weights: Iterable[tuple[str, Any]]) -> None:
        for _ in weights:
            loads()

    model.load_weights = load_weights
    updater = updater or make_updater(model, **fields)
    weights = [("weight", torch.empty(1))]
    answer: tuple[bool, str] = updater._load_or_undo(error, weights, lambda: flush_error)
    return answer


def update_on(rank: int, port: int, error_on: int | None, fails_on: int | None, error: str) -> Any:
    """Update a model of one weight as `rank`, and return the answer and the weight.

    Args:
        error_on: The rank where something is wrong before weights are loaded.
        fails_on: The rank where loading fails.
        error: What is wrong.
    """
    import torch
    import torch.distributed as dist

    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=len(RANKS))
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(OLD)
    group = SimpleNamespace(cpu_group=dist.group.WORLD, world_size=len(RANKS))

    def loads() -> None:
        model.weight.data.fill_(NEW)
        if rank == fails_on:
            raise ValueError("it does not fit")

    success, message = load(model, loads, error if rank == error_on else None, ranks=group)
    dist.destroy_process_group()
    return success, message, model.weight.item()


def weights_of_odd_sizes() -> dict[str, Any]:
    """Weights that do not all begin where their dtype is aligned when they are put in a row.

    So many that announcing them takes more than 64 KiB.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    floats = torch.rand(3, 5, generator=generator)
    return {
        "bytes": torch.arange(3, dtype=torch.uint8),
        "bfloat16": floats.bfloat16(),
        "float32": floats,
        "scalar": torch.tensor(7.0),
        "none": torch.empty(0, 4),
        "last": torch.arange(5, dtype=torch.int64),
        **{f"{'long' * 10}.{i}": torch.tensor([i]) for i in range(1200)},
    }


def broadcast_on(
    rank: int, port: int, bucket: int, min_large: int | None, has_room: bool
) -> tuple[list[tuple[str, Any]], str | None]:
    """Send weights as rank 0, or receive them. Each rank has its own card, or all the CPU.

    Args:
        min_large: From how many bytes on a tensor is sent as it is, or None for the default.
        has_room: Whether the receiver finds room for a bucket beside others.

    Returns:
        The weights, and what is left of the setting of a group of NCCL.
    """
    import torch
    import torch.distributed as dist
    from sglang.srt.weight_sync import broadcast

    changes: dict[str, Any] = {"_MIN_LARGE_BYTES": min_large or broadcast._MIN_LARGE_BYTES}
    if not has_room:
        changes["has_room"] = lambda *_: False
    device = f"cuda:{rank}" if ON_GPU and torch.cuda.device_count() > 1 else "cpu"
    weights = list(weights_of_odd_sizes().items())
    with mock.patch.multiple(broadcast, **changes):
        if rank == 0:
            broadcaster = broadcast.WeightBroadcaster("127.0.0.1", port, 1, 60, device)
            broadcaster.send(weights, max_bucket_bytes=bucket)
            broadcaster.close()
        else:
            group = broadcast.join("127.0.0.1", port, rank, 2, 60, device)
            others = threading.enumerate()
            received = list(broadcast.receive_weights(group, device))
            for thread in set(threading.enumerate()).difference(others):
                thread.join(SOON_S)
                assert not thread.is_alive(), "it watches for broadcasts that never come"
            weights = [(name, tensor.cpu()) for name, tensor in received]
            dist.destroy_process_group(group)
    return weights, os.environ.get("TORCH_NCCL_BLOCKING_WAIT")


@pytest.fixture(scope="module")
def processes() -> Any:
    """A process for each rank."""
    with multiprocessing.get_context("spawn").Pool(len(RANKS)) as pool:
        yield pool


def run(processes: Any, function: Callable[..., Any], jobs: list[tuple[Any, ...]]) -> list[Any]:
    """Return what a function returns for each job, or fail if a process has ended meanwhile."""
    found: list[Any] = processes.starmap_async(function, jobs, chunksize=1).get(TIMEOUT_S)
    return found


@pytest.fixture
def ranks(processes: Any) -> Any:
    def update(
        error_on: int | None = None, fails_on: int | None = None, error: str = "it is missing"
    ) -> list[Any]:
        port = reserve_port()
        jobs = [(rank, port, error_on, fails_on, error) for rank in RANKS]
        return run(processes, update_on, jobs)

    return update


@pytest.mark.full
def test_it_takes_effect_on_all_ranks(ranks: Any) -> None:
    assert ranks() == [(True, "Updated 1 weights.", NEW)] * len(RANKS)


@pytest.mark.full
@pytest.mark.parametrize("rank", RANKS)
def test_what_is_wrong_on_one_rank_is_wrong_on_all(ranks: Any, rank: int) -> None:
    message = "Weights were not updated: it is missing."
    assert ranks(error_on=rank) == [(False, message, OLD)] * len(RANKS)


@pytest.mark.full
@pytest.mark.parametrize("rank", RANKS)
def test_what_fails_on_one_rank_is_undone_on_all(ranks: Any, rank: int) -> None:
    reason = "parameter weight could not be loaded: it does not fit"
    message = f"Weights were not updated: {reason}."
    assert ranks(fails_on=rank) == [(False, message, OLD)] * len(RANKS)


@pytest.mark.full
def test_a_trainer_that_is_gone_for_one_rank_is_gone_for_all(ranks: Any) -> None:
    from sglang.srt.weight_sync.all_or_nothing import TRAINER_IS_GONE

    message = f"Weights were not updated: {TRAINER_IS_GONE}."
    answers = ranks(error_on=1, fails_on=0, error=TRAINER_IS_GONE)
    assert answers == [(False, message, OLD)] * len(RANKS)


def update_twice(rank: int, port: int, folder: Path, fault: str | None) -> list[tuple[bool, str]]:
    """Send a model's weights twice as rank 0, or load them and return the answers.

    Args:
        folder: The checkpoint of the model.
        fault: What is wrong the first time.
    """
    import torch
    import torch.distributed as dist
    from safetensors.torch import load_file
    from sglang.srt.weight_sync import broadcast

    is_loaded = folder / "is_loaded"
    weights = load_file(folder / "model.safetensors")
    if rank == 0:
        broadcaster = broadcast.WeightBroadcaster("127.0.0.1", port, 1, 60, "cpu")

        def first() -> Iterable[tuple[str, torch.Tensor]]:
            for i, (name, tensor) in enumerate(weights.items()):
                deadline = time.monotonic() + 30
                while fault is None and i == 5 and not is_loaded.exists():
                    assert time.monotonic() < deadline, "nothing is loaded before all has come"
                    time.sleep(0.01)
                yield name, tensor[:1] if (fault, i) == ("shape", 2) else tensor

        for named_tensors in (first(), weights.items()):
            broadcaster.send(named_tensors, max_bucket_bytes=1)
        broadcaster.close()
        return []

    model = torch.nn.Module()
    for name, tensor in weights.items():
        model.register_buffer(name, torch.full_like(tensor, OLD))
    group = broadcast.join("127.0.0.1", port, rank, 2, 60, "cpu")

    def load_weights(fails: bool, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in named_tensors:
            if fails and name == "weight_2":
                raise ValueError("it does not fit")
            assert tensor.shape == (2,)
            getattr(model, name).copy_(tensor)
            is_loaded.touch()

    answers = []
    for current in (fault, None):
        model.load_weights = functools.partial(load_weights, current == "loading")
        load_format = "gguf" if current == "refused" else "auto"
        updater = make_updater(model, path=folder, load_format=load_format)
        answers.append(updater.update_from_trainer(group, lambda: None))
        expected = OLD if current else NEW
        assert all(tensor.eq(expected).all() for tensor in model.buffers())
    dist.destroy_process_group(group)
    return answers


@pytest.mark.full
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (None, "Updated 7 weights."),
        ("loading", "parameter weight_2 could not be loaded: it does not fit"),
        ("shape", "parameter weight_2 has the shape [1], and the model's has [2]"),
        ("refused", "--load-format is gguf"),
    ],
)
def test_weights_are_loaded_as_they_come(
    processes: Any, tmp_path: Path, fault: str | None, message: str
) -> None:
    """What comes after a fault is received as well, so that the next update is in step."""
    import torch
    from safetensors.torch import save_file

    weights = {f"weight_{i}": torch.full((2,), NEW) for i in range(7)}
    save_file(weights, tmp_path / "model.safetensors")
    port = reserve_port()
    jobs = [(rank, port, tmp_path, fault) for rank in RANKS]
    _, answers = run(processes, update_twice, jobs)
    assert answers[0][0] == (fault is None) and message in answers[0][1]
    assert answers[1] == (True, "Updated 7 weights.")


@pytest.mark.full
@pytest.mark.parametrize(
    ("bucket", "min_large", "has_room"),
    [
        (1, None, True),
        (40, None, True),
        (1_000_000, None, True),
        # Some of a bucket are large and some are not, and then all but the two smallest are.
        (40, 20, True),
        (1_000_000, 20, True),
        (1_000_000, 4, False),
    ],
)
def test_what_is_sent_is_received(
    processes: Any, bucket: int, min_large: int | None, has_room: bool
) -> None:
    import torch

    port = reserve_port()
    jobs = [(rank, port, bucket, min_large, has_room) for rank in RANKS]
    (sent, left), (received, also_left) = run(processes, broadcast_on, jobs)
    if min_large is not None:
        # These come first in their bucket, and both kinds stay in their order.
        sent.sort(key=lambda named: named[1].nbytes >= min_large)
        received.sort(key=lambda named: named[1].nbytes >= min_large)
    assert [name for name, _ in received] == [name for name, _ in sent]
    for (name, tensor), (_, other) in zip(sent, received):
        assert tensor.dtype == other.dtype and torch.equal(tensor, other), name
    # It is for the group alone.
    assert left is None and also_left is None


def test_a_broadcast_is_watched_whoever_waits_for_it() -> None:
    import torch
    import torch.distributed as dist
    from sglang.srt.weight_sync import broadcast

    group = broadcast.join("127.0.0.1", reserve_port(), 0, 1, TIMEOUT_S, "cpu")
    with broadcast._watched(group, torch.device("cpu")) as begin:
        watched = [begin([torch.zeros(1)]) for _ in range(3)]
        deadline = time.monotonic() + SOON_S
        while any(x._works for x in watched):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    dist.destroy_process_group(group)


def test_what_cannot_be_announced() -> None:
    import torch
    from sglang.srt.weight_sync.broadcast import WeightBroadcaster

    broadcaster = WeightBroadcaster("127.0.0.1", reserve_port(), 0, 60, "cpu")
    with pytest.raises(ValueError, match=r"long.* takes more than the 65536 bytes"):
        broadcaster.send([("long" * 20_000, torch.empty(1))])
    broadcaster.close()


def in_place(layer: Any) -> None:
    layer.weight.data.fill_(NEW)


def other_data(layer: Any) -> None:
    layer.weight.data = layer.weight.data.new_full((2, 4), NEW)


def other_parameter(layer: Any) -> None:
    import torch

    layer.weight = torch.nn.Parameter(layer.weight.data.new_full((2, 4), NEW))
    layer.register_buffer("table", layer.table + NEW)


def other_item(layer: Any) -> None:
    layer.scales[0] = layer.scales[0] + NEW


def other_attributes(layer: Any) -> None:
    layer.unpacked = layer.unpacked + NEW
    layer.parts["first"] = layer.parts["first"] + NEW
    other_item(layer)
    layer.quant_method.scale.fill_(NEW)
    layer.quant_method.is_packed = True
    layer.weight.format_ue8m0 = True
    layer.register_parameter("weight_scale", layer.weight)
    layer.act.register_buffer("scale", layer.table)
    layer.table.is_scaled = True


def removed(layer: Any) -> None:
    del layer.weight, layer.table, layer.unpacked


SPOILS = [in_place, other_data, other_parameter, other_attributes, removed]


def replaceable_model() -> Any:
    """A model of one layer with all that loading may replace."""
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False))
    layer: Any = model[0]
    layer.weight.data.fill_(OLD)
    layer.weight.format_ue8m0 = False
    layer.register_buffer("table", torch.full((3,), OLD))
    # Neither it nor the table has what loading may add to them.
    layer.act = torch.nn.Identity()
    # As MLA's are, and as one that shares memory with a parameter.
    layer.unpacked = torch.full((3,), OLD)
    layer.parts = {"first": layer.weight.data[:1].expand(3, 4)}
    layer.scales = [torch.full((1,), OLD)]
    layer.quant_method = SimpleNamespace(
        scale=torch.full((1,), OLD),
        is_packed=False,
        process_weights_after_loading=lambda _: None,
    )
    return model


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize("block_bytes", [1, 20, 1024])
def test_all_that_loading_replaces_is_restored(
    spoil: Callable[[Any], None],
    block_bytes: int,
    is_ahead: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same tensors are back, in the same memory, which CUDA graphs have the address of."""
    import torch
    from sglang.srt.weight_sync import snapshot

    monkeypatch.setattr(snapshot, "_BLOCK_BYTES", block_bytes)
    model = replaceable_model()
    layer: Any = model[0]
    tensors = {
        "weight": layer.weight,
        "table": layer.table,
        "unpacked": layer.unpacked,
        "first": layer.parts["first"],
        "item": layer.scales[0],
        "scale": layer.quant_method.scale,
    }
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}

    def loads() -> None:
        spoil(layer)
        raise ValueError("it does not fit")

    updater = make_updater(model)
    if is_ahead:
        updater.back_up()
        has_copied(updater)
    success, message = load(model, loads, updater=updater)
    assert not success and "it does not fit" in message
    assert layer.weight is tensors["weight"] and layer.table is tensors["table"]
    assert layer.unpacked is tensors["unpacked"]
    assert layer.parts["first"] is tensors["first"]
    assert layer.scales[0] is tensors["item"]
    assert layer.quant_method.scale is tensors["scale"]
    assert not layer.quant_method.is_packed and not layer.weight.format_ue8m0
    assert list(model.state_dict()) == ["0.weight", "0.table"]
    assert not vars(layer.table)
    assert layer.weight.shape == (2, 4)
    for name, tensor in tensors.items():
        assert tensor.data_ptr() == addresses[name], name
        assert torch.equal(tensor, torch.full_like(tensor, OLD)), name


def other_view(layer: Any) -> None:
    layer.weight.data = layer.weight.data.t()


def other_layer(layer: Any) -> None:
    import torch

    layer.act = torch.nn.Linear(1, 1)


def tensors_of(model: Any) -> list[tuple[int, Any]]:
    layer = model[0]
    attributes = [vars(layer).get("unpacked"), layer.parts["first"], *layer.scales]
    values = [*model.state_dict().values(), layer.quant_method.scale, *attributes]
    return [(x.data_ptr(), x.clone()) for x in values if x is not None]


@pytest.mark.parametrize("change", [None, *SPOILS, other_item, other_view, other_layer])
def test_what_a_model_consists_of_is_known_from_the_last_update(
    change: Callable[[Any], None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless others have changed it since, as SGLang's own updates may."""
    from sglang.srt.weight_sync import all_or_nothing

    class Counted(all_or_nothing.Snapshot):
        num = 0

        def __init__(self, model: Any):
            Counted.num += 1
            super().__init__(model)

    monkeypatch.setattr(all_or_nothing, "Snapshot", Counted)
    model = replaceable_model()
    fails = [False, True, True]

    def load_weights(weights: Iterable[tuple[str, Any]]) -> None:
        for tensor in model.state_dict().values():
            tensor.zero_()
        if fails.pop(0):
            in_place(model[0])
            raise ValueError("it does not fit")

    model.load_weights = load_weights
    updater = make_updater(model)
    success, message = updater._load_or_undo(None, [], lambda: None)
    assert success, message
    if change is not None:
        change(model[0])
    before = tensors_of(model)
    for _ in range(2):
        assert not updater._load_or_undo(None, [], lambda: None)[0]
        after = tensors_of(model)
        assert [address for address, _ in after] == [address for address, _ in before]
        assert all(now.equal(old) for (_, now), (_, old) in zip(after, before))
    assert Counted.num == (1 if change in (None, in_place) else 2)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has the number of bytes that each update had to copy."""
    from sglang.srt.weight_sync import snapshot

    copy, found = snapshot._copy, []

    def counted(tensors: list[Any]) -> list[Any]:
        found.append(sum(tensor.nbytes for tensor in tensors))
        copies: list[Any] = copy(tensors)
        return copies

    monkeypatch.setattr(snapshot, "_copy", counted)
    return found


def spoiled(weight: Any) -> None:
    weight.zero_()
    raise ValueError("it does not fit")


def wide_model() -> tuple[Any, Any]:
    """A model, and its one weight of 16 KiB."""
    import torch

    model = torch.nn.Linear(4096, 1, bias=False)
    model.weight.data.copy_(torch.arange(4096.0))
    return model, model.weight.data


def has_copied(updater: Any) -> Any:
    """Wait until what is copied beforehand is there."""
    backup = updater._backup
    if backup._worker is not None:
        backup._worker.join(TIMEOUT_S)
        assert not backup._worker.is_alive()
    return backup


def test_what_is_copied_beforehand_is_not_copied_by_an_update(copied: list[int]) -> None:
    model, weight = wide_model()
    updater = make_updater(model)
    for i in range(4):
        assert load(model, lambda: weight.fill_(NEW * 2), updater=updater)[0]
        has_copied(updater)
        assert load(model, lambda: weight.fill_(NEW), updater=updater)[0]
        has_copied(updater)
        assert not load(model, lambda: spoiled(weight), updater=updater)[0]
        assert weight.eq(NEW).all()
        assert copied == [0 if i else weight.nbytes] * 3
        copied.clear()
        updater.back_up()
        has_copied(updater)


def test_an_update_does_not_wait_for_memory(
    copied: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It copies what has not been copied yet. The rest follows after the next one."""
    import torch
    from sglang.srt.weight_sync import snapshot

    monkeypatch.setattr(snapshot, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(snapshot, "_PAUSE_S", 1.0)
    model = torch.nn.Sequential(*[torch.nn.Linear(1, 1, bias=False) for _ in range(100)])
    weights = [parameter.data for parameter in model.parameters()]
    updater = make_updater(model)
    updater.back_up()
    backup = updater._backup
    deadline = time.monotonic() + TIMEOUT_S
    while not backup._copies and time.monotonic() < deadline:
        time.sleep(0.01)
    old = torch.stack(weights)

    def spoils_all() -> None:
        for weight in weights:
            weight.zero_()
        raise ValueError("it does not fit")

    start = time.monotonic()
    assert not load(model, spoils_all, updater=updater)[0]
    assert time.monotonic() - start < 10
    assert torch.stack(weights).equal(old)
    assert 50 * 4 < copied[0] < 100 * 4
    monkeypatch.setattr(snapshot, "_PAUSE_S", 0.0)
    assert load(model, lambda: None, updater=updater)[0]
    has_copied(updater)
    assert not load(model, spoils_all, updater=updater)[0]
    assert torch.stack(weights).equal(old)
    assert copied[2] == 0


def halves_swapped(weight: Any) -> None:
    weight.copy_(weight.clone().roll(2048))


@pytest.mark.parametrize("change", [lambda weight: weight[0, 5].add_(1), halves_swapped])
def test_what_others_have_changed_since_is_kept(
    change: Callable[[Any], None], copied: list[int]
) -> None:
    """By SGLang's own routes, for example."""
    model, weight = wide_model()
    model.register_buffer("table", weight.new_zeros(3))
    updater = make_updater(model)
    updater.back_up()
    has_copied(updater)
    change(weight)
    changed = weight.clone()
    assert not load(model, lambda: spoiled(weight), updater=updater)[0]
    assert weight.equal(changed)
    assert copied == [weight.nbytes]


def test_a_host_without_room_has_updates_copy(
    copied: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sglang.srt.weight_sync import snapshot

    monkeypatch.setattr(snapshot, "_RESERVED_BYTES", 1 << 60)
    model, weight = wide_model()
    updater = make_updater(model)
    updater.back_up()
    has_copied(updater)
    assert not load(model, lambda: spoiled(weight), updater=updater)[0]
    assert load(model, lambda: weight.fill_(NEW), updater=updater)[0]
    has_copied(updater)
    assert copied == [weight.nbytes] * 2
    assert caplog.text.count("the host has room for") == 1


@pytest.mark.parametrize("can_sleep", [False, True])
def test_weights_that_may_sleep_are_not_read_meanwhile(
    can_sleep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.weight_sync import trainer_updates

    model, weight = wide_model()
    handlers = make_handlers(monkeypatch, model, can_sleep=can_sleep)
    monkeypatch.setattr(trainer_updates, "join", lambda *_: None)
    request = trainer_updates.TrainerJoinReqInput(
        master_address="127.0.0.1", master_port=1, rank_offset=1, world_size=2
    )
    handler = handlers[trainer_updates.TrainerJoinReqInput]
    assert handler(request).success
    backup = has_copied(handler.__self__.updater)
    sizes = [x.nbytes for x in backup._copies.values()]
    assert sizes == ([] if can_sleep else [weight.nbytes])


def fp8_model(block_quant: bool) -> Any:
    """A model of one layer with fp8 weights, as loading leaves it."""
    import torch
    from sglang.srt.layers.parameter import ModelWeightParameter
    from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod
    from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod

    block = [2, 2] if block_quant else None
    config = Fp8Config(is_checkpoint_fp8_serialized=block_quant, weight_block_size=block)
    method = Fp8LinearMethod(config)
    model = torch.nn.Module()
    model.proj = torch.nn.Module()
    model.proj.quant_method = method
    method.create_weights(model.proj, 4, [4], 4, 4, torch.bfloat16, weight_loader=lambda *_: None)
    assert isinstance(model.proj.weight, ModelWeightParameter)
    model.proj.weight.data.fill_(OLD)
    model.attn = torch.nn.Module()
    model.attn.quant_method = BaseKVCacheMethod(config)
    model.attn.quant_method.create_weights(model.attn)
    return model


def process(model: Any) -> None:
    for layer in (model.proj, model.attn):
        layer.quant_method.process_weights_after_loading(layer)


def test_what_fp8_makes_of_weights_is_restored() -> None:
    """SGLang's own method replaces the weight by a new parameter of another shape and dtype."""
    import torch

    model = fp8_model(block_quant=False)
    old = dict(model.named_parameters())
    error = "requests have something in the cache"
    success, message = load(model, lambda: model.proj.weight.data.fill_(NEW), flush_error=error)
    assert not success and error in message
    assert dict(model.named_parameters()).keys() == old.keys()
    assert all(parameter is old[name] for name, parameter in model.named_parameters())
    assert model.proj.weight.dtype == torch.bfloat16
    assert torch.equal(model.proj.weight, torch.full_like(model.proj.weight, OLD))


def test_layers_that_take_no_new_weights_are_named() -> None:
    model = fp8_model(block_quant=False)
    assert make_updater(model, quantization="fp8").why_unsupported() is None
    process(model)
    reason = make_updater(model, quantization="fp8").why_unsupported()
    assert reason is not None and "parameter proj.weight" in reason and "fp8" in reason
    # Without quantization, it is not looked for.
    assert make_updater(model).why_unsupported() is None


def test_fp8_in_blocks_takes_new_weights_unless_its_scales_are_converted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang.srt.layers.quantization import fp8

    # They ask for the number of ranks, each release in its way.
    monkeypatch.setattr(fp8, "get_tensor_model_parallel_world_size", lambda: 1, raising=False)
    monkeypatch.setattr(
        fp8.Fp8LinearMethod, "validate_block_quant_shapes", lambda *_, **__: None, raising=False
    )
    model = fp8_model(block_quant=True)
    updater = make_updater(model, quantization="fp8")
    assert updater.why_unsupported() is None
    model.proj.weight_scale_inv.format_ue8m0 = True
    reason = updater.why_unsupported()
    assert reason is not None and "parameter proj.weight_scale_inv" in reason


@pytest.mark.parametrize("spoil", [other_data, other_parameter])
def test_what_cuda_graphs_do_not_read_is_undone(spoil: Callable[[Any], None]) -> None:
    import torch

    def new_model() -> Any:
        model = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False))
        model[0].register_buffer("table", torch.full((3,), OLD))
        model[0].weight.data.fill_(OLD)
        return model

    model = new_model()
    address = model[0].weight.data_ptr()
    # Nothing of it is on the device: that is only asked for what there are graphs for.
    success, message = load(model, lambda: spoil(model[0]), device="cuda")
    assert not success and "0.weight is in other memory" in message
    assert model[0].weight.data_ptr() == address and bool((model[0].weight == OLD).all())
    assert load(model, lambda: in_place(model[0]), device="cuda")[0]
    assert bool((model[0].weight == NEW).all())
    model = new_model()
    assert load(model, lambda: spoil(model[0]))[0], "a CPU has none"


def test_all_of_a_layer_with_adapters_is_loaded() -> None:
    """What wraps it does not have all parameters, and would hide the rest."""
    import torch

    class Wrapper(torch.nn.Module):
        def __init__(self, base_layer: torch.nn.Module):
            super().__init__()
            self.base_layer = base_layer
            self.weight = base_layer.weight
            self.adapter = torch.full((1,), OLD)

    layer = torch.nn.Linear(4, 2)
    model: Any = torch.nn.Sequential(Wrapper(layer))
    wrapper = model[0]

    def loads() -> None:
        names = ["0.weight", "0.bias"]
        assert [name for name, _ in model.named_parameters()] == names
        for parameter in model.parameters():
            parameter.data.fill_(NEW)

    assert load(model, loads) == (True, "Updated 1 weights.")
    assert model[0] is wrapper and wrapper.base_layer is layer
    assert bool((layer.bias == NEW).all() and (wrapper.weight == NEW).all())
    assert wrapper.adapter.item() == OLD

    def fails() -> None:
        loads()
        raise ValueError("it does not fit")

    layer.bias.data.fill_(OLD)
    assert not load(model, fails)[0]
    assert model[0] is wrapper and bool((layer.bias == OLD).all())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"dp_size": 2}, "--dp-size is 2, and has to be 1"),
        ({"pp_size": 4}, "--pp-size is 4, and has to be 1"),
        ({"weight_cache_mode": "auto"}, "--weight-cache-mode is auto, and has to be off"),
        ({}, None),
    ],
)
def test_servers_where_it_cannot_be_kept(fields: dict[str, Any], named: str | None) -> None:
    from sglang.srt.weight_sync.all_or_nothing import why_unsupported_by

    args = {"dp_size": 1, "pp_size": 1, **fields}
    server_args: Any = SimpleNamespace(**args)
    reason = why_unsupported_by(server_args)
    assert reason is None if named is None else reason is not None and named in reason


def test_other_loaders_are_refused() -> None:
    updater = make_updater(None, load_format="flash_rl")
    reason = updater.why_unsupported()
    assert "--load-format is flash_rl, and has to be one of auto, safetensors, dummy" in reason


def make_handlers(
    monkeypatch: pytest.MonkeyPatch,
    model: Any,
    algorithm: str | None = None,
    obstacle: str | None = None,
    can_sleep: bool = False,
    resumed: list[Any] | None = None,
) -> dict[Any, Any]:
    """What a scheduler handles requests of the trainer routes with.

    Args:
        resumed: Gets what resumes it.
    """
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
    from sglang.srt.weight_sync import trainer_updates

    group = SimpleNamespace(world_size=1, rank_in_group=0)
    monkeypatch.setattr(trainer_updates, "get_tp_group", lambda: group)
    scheduler: Any = SimpleNamespace(
        server_args=SimpleNamespace(enable_trainer_routes=True, enable_memory_saver=can_sleep),
        spec_algorithm=SpeculativeAlgorithm.from_string(algorithm),
        tp_worker=SimpleNamespace(model_runner=make_updater(model)._runner),
        continue_generation=(resumed if resumed is not None else []).append,
    )
    return dict(trainer_updates.trainer_update_handlers(scheduler, lambda _: obstacle))


def refused_update(
    algorithm: str | None, monkeypatch: pytest.MonkeyPatch, resumes: bool = False
) -> tuple[str, list[Any]]:
    """Have a scheduler update weights, and return its answer and what resumed it."""
    from sglang.srt.weight_sync import trainer_updates

    resumed: list[Any] = []
    obstacle = "the release has a cache"
    handlers = make_handlers(monkeypatch, None, algorithm, obstacle, resumed=resumed)
    request = trainer_updates.TrainerUpdateReqInput(names=[], dtypes=[], shapes=[])
    request.folder, request.resumes = str(tiny_model_path(1)), resumes
    output = handlers[trainer_updates.TrainerUpdateReqInput](request)
    assert not output.success
    return output.message, resumed


@pytest.mark.parametrize("resumes", [False, True])
def test_an_update_ends_its_pause_by_itself(resumes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer manager may be busy."""
    _, resumed = refused_update(None, monkeypatch, resumes)
    assert len(resumed) == resumes


@pytest.mark.parametrize(
    ("algorithm", "named"),
    [
        (None, "the release has a cache"),
        ("NGRAM", "the release has a cache"),
        ("EAGLE", "the draft model"),
        ("STANDALONE", "the draft model"),
    ],
)
def test_draft_models_and_what_the_release_cannot_load_again(
    algorithm: str | None, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPUs have no kernels for draft models."""
    message, _ = refused_update(algorithm, monkeypatch)
    assert named in message


@pytest.mark.parametrize("server", ["trainer_dp", "trainer_dummy"], indirect=True)
def test_a_server_that_cannot_keep_it_says_so(server: Server) -> None:
    """Nothing is loaded, and no trainer joins."""
    named = "--dp-size is 2" if server.name == "trainer_dp" else "checkpoint in safetensors"
    before = fresh(server, PROMPT, 8)
    answers = [
        control(server, "/update_weights", weight_dir=str(tiny_model_path(1))),
        control(server, "/reload_weights"),
    ]
    for answer in answers:
        assert answer.status_code == 400, answer.text
        assert answer.text.count(named) == 1, answer.text
    where = {"host": "127.0.0.1", "port": reserve_port(), "timeout": 5}
    start = time.monotonic()
    answer = control(server, "/init_broadcaster", **where, server_rank=0, num_inference_server=1)
    assert answer.status_code == 400, answer.text
    assert named in answer.text or "dp_size must be 1" in answer.text
    assert time.monotonic() - start < 4, "it has waited for the trainer"
    assert fresh(server, PROMPT, 8) == before
    assert requests.get(server.url + "/health", timeout=60).ok
