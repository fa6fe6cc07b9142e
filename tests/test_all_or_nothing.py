"""A weight update that fails is undone, on all ranks of a server, or refused beforehand."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from testbed.client import PROMPT, control, fresh
from testbed.release import UPSTREAM
from testbed.server import Server
from testbed.tiny_model import tiny_model_path
from tools.verify import reserve_port

pytestmark = pytest.mark.skipif(
    UPSTREAM != "v0.5.9", reason=f"the series of {UPSTREAM} has no patch for it"
)
RANKS = (0, 1)
OLD, NEW = 1.0, 2.0


def update_on(rank: int, port: int, error_on: int | None, fails_on: int | None) -> Any:
    """Update a model of one weight as `rank`, and return the answer and the weight.

    Args:
        error_on: The rank where something is wrong before weights are loaded.
        fails_on: The rank where loading fails.
    """
    import torch
    import torch.distributed as dist
    from sglang.srt.weight_sync.all_or_nothing import _load_or_undo

    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=len(RANKS))
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(OLD)
    group = SimpleNamespace(cpu_group=dist.group.WORLD)
    runner: Any = SimpleNamespace(model=model, tp_size=len(RANKS), tp_group=group)

    def load(note: Callable[[str], None]) -> None:
        note("weight")
        model.weight.data.fill_(NEW)
        if rank == fails_on:
            raise ValueError("it does not fit")

    success, message = _load_or_undo(runner, "it is missing" if rank == error_on else None, load)
    dist.destroy_process_group()
    return success, message, model.weight.item()


@pytest.fixture(scope="module")
def ranks() -> Any:
    with multiprocessing.get_context("spawn").Pool(len(RANKS)) as pool:

        def update(error_on: int | None = None, fails_on: int | None = None) -> list[Any]:
            port = reserve_port()
            jobs = [(rank, port, error_on, fails_on) for rank in RANKS]
            return pool.starmap(update_on, jobs, chunksize=1)

        yield update


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


def in_place(layer: Any) -> None:
    layer.weight.data.fill_(NEW)


def other_data(layer: Any) -> None:
    layer.weight.data = layer.weight.data.new_full((2, 4), NEW)


def other_parameter(layer: Any) -> None:
    import torch

    layer.weight = torch.nn.Parameter(layer.weight.data.new_full((2, 4), NEW))
    layer.register_buffer("table", layer.table + NEW)


def other_attributes(layer: Any) -> None:
    layer.unpacked = layer.unpacked + NEW
    layer.parts["first"] = layer.parts["first"] + NEW
    layer.quant_method.scale.fill_(NEW)
    layer.quant_method.is_packed = True
    layer.weight.format_ue8m0 = True
    layer.register_parameter("weight_scale", layer.weight)


def removed(layer: Any) -> None:
    del layer.weight, layer.table, layer.unpacked


@pytest.mark.parametrize(
    "spoil", [in_place, other_data, other_parameter, other_attributes, removed]
)
def test_all_that_loading_replaces_is_restored(spoil: Callable[[Any], None]) -> None:
    """The same tensors are back, in the same memory, which CUDA graphs have the address of."""
    import torch
    from sglang.srt.weight_sync.all_or_nothing import _load_or_undo

    model = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False))
    layer: Any = model[0]
    layer.weight.data.fill_(OLD)
    layer.weight.format_ue8m0 = False
    layer.register_buffer("table", torch.full((3,), OLD))
    # As MLA's are, and as one that shares memory with a parameter.
    layer.unpacked = torch.full((3,), OLD)
    layer.parts = {"first": layer.weight.data[:1].expand(3, 4)}
    layer.quant_method = SimpleNamespace(scale=torch.full((1,), OLD), is_packed=False)
    tensors = {
        "weight": layer.weight,
        "table": layer.table,
        "unpacked": layer.unpacked,
        "first": layer.parts["first"],
        "scale": layer.quant_method.scale,
    }
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    runner: Any = SimpleNamespace(model=model, tp_size=1)

    def load(note: Callable[[str], None]) -> None:
        note("weight")
        spoil(layer)
        raise ValueError("it does not fit")

    success, message = _load_or_undo(runner, None, load)
    assert not success and "it does not fit" in message
    assert layer.weight is tensors["weight"] and layer.table is tensors["table"]
    assert layer.unpacked is tensors["unpacked"]
    assert layer.parts["first"] is tensors["first"]
    assert layer.quant_method.scale is tensors["scale"]
    assert not layer.quant_method.is_packed and not layer.weight.format_ue8m0
    assert list(model.state_dict()) == ["0.weight", "0.table"]
    assert layer.weight.shape == (2, 4)
    for name, tensor in tensors.items():
        assert tensor.data_ptr() == addresses[name], name
        assert torch.equal(tensor, torch.full_like(tensor, OLD)), name


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
    method.create_weights(
        model.proj, 4, [4], 4, 4, torch.bfloat16, weight_loader=lambda *_: None
    )
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
    from sglang.srt.weight_sync.all_or_nothing import _load_or_undo

    model = fp8_model(block_quant=False)
    old = dict(model.named_parameters())

    def load(note: Callable[[str], None]) -> None:
        note("weight")
        model.proj.weight.data.fill_(NEW)
        process(model)
        assert model.proj.weight is not old["proj.weight"]
        raise ValueError("another layer does not fit")

    runner: Any = SimpleNamespace(model=model, tp_size=1)
    success, _ = _load_or_undo(runner, None, load)
    assert not success
    assert dict(model.named_parameters()).keys() == old.keys()
    assert all(parameter is old[name] for name, parameter in model.named_parameters())
    assert model.proj.weight.dtype == torch.bfloat16
    assert torch.equal(model.proj.weight, torch.full_like(model.proj.weight, OLD))


def make_runner(model: Any, path: Path | str, **fields: Any) -> Any:
    args = {"dp_size": 1, "pp_size": 1, **fields}
    config = SimpleNamespace(model_path=str(path), revision=None, quantization="fp8")
    return SimpleNamespace(
        model=model,
        model_config=config,
        load_config=SimpleNamespace(download_dir=None),
        server_args=SimpleNamespace(**args),
    )


def test_layers_that_take_no_new_weights_are_named() -> None:
    from sglang.srt.weight_sync.all_or_nothing import why_unsupported

    model = fp8_model(block_quant=False)
    runner = make_runner(model, tiny_model_path())
    assert why_unsupported(runner) is None
    process(model)
    reason = why_unsupported(runner)
    assert reason is not None and "parameter proj.weight" in reason and "fp8" in reason
    # Without quantization, it is not looked for.
    runner.model_config.quantization = None
    assert why_unsupported(runner) is None


def test_fp8_in_blocks_takes_new_weights_unless_its_scales_are_converted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang.srt.layers.quantization import fp8
    from sglang.srt.weight_sync.all_or_nothing import why_unsupported

    monkeypatch.setattr(fp8, "get_tensor_model_parallel_world_size", lambda: 1)
    model = fp8_model(block_quant=True)
    runner = make_runner(model, tiny_model_path())
    assert why_unsupported(runner) is None
    model.proj.weight_scale_inv.format_ue8m0 = True
    reason = why_unsupported(runner)
    assert reason is not None and "parameter proj.weight_scale_inv" in reason


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"dp_size": 2}, "--dp-size is 2"), ({"pp_size": 4}, "--pp-size is 4")],
    ids=["data parallel", "pipeline parallel"],
)
def test_what_cannot_be_kept_in_parallel_is_refused(
    fields: dict[str, int], named: str
) -> None:
    from sglang.srt.weight_sync.all_or_nothing import why_unsupported

    reason = why_unsupported(make_runner(None, tiny_model_path(), **fields))
    assert reason is not None and named in reason and "has to be 1" in reason


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
    answer = control(
        server, "/init_broadcaster", **where, server_rank=0, num_inference_server=1
    )
    assert answer.status_code == 400, answer.text
    assert named in answer.text or "dp_size must be 1" in answer.text
    assert time.monotonic() - start < 4, "it has waited for the trainer"
    assert fresh(server, PROMPT, 8) == before
    assert requests.get(server.url + "/health", timeout=60).ok
