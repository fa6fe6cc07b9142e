"""A weight update that fails on one rank of a server is undone on all of them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine.release import UPSTREAM
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


def test_it_takes_effect_on_all_ranks(ranks: Any) -> None:
    assert ranks() == [(True, "Updated 1 weights.", NEW)] * len(RANKS)


@pytest.mark.parametrize("rank", RANKS)
def test_what_is_wrong_on_one_rank_is_wrong_on_all(ranks: Any, rank: int) -> None:
    message = "Weights were not updated: it is missing."
    assert ranks(error_on=rank) == [(False, message, OLD)] * len(RANKS)


@pytest.mark.parametrize("rank", RANKS)
def test_what_fails_on_one_rank_is_undone_on_all(ranks: Any, rank: int) -> None:
    reason = "parameter weight could not be loaded: it does not fit"
    message = f"Weights were not updated: {reason}."
    assert ranks(fails_on=rank) == [(False, message, OLD)] * len(RANKS)
