"""Make a stock SGLang importable, and quick to start, on a machine without a GPU.

Loaded at every start of the test environment's Python, so that it also reaches the
processes that the server spawns. It stands in only for what does not import here or takes
too long, and only in the test environment. Nothing of it is in the wheel.

- `sgl_kernel` needs CUDA. It is imported unconditionally; nothing of it is called with
  the CPU engine. The stand-in has any attribute, and raises if one is called.
- `torchaudio` has no CPU build. SGLang 0.5.23 imports it.
- `torchvision` has no CPU build either: its Python part imports once the schemas of two
  operators are defined that its library would define.
- Memory can only be pinned for a GPU, or registered with it. LoRA adapters pin some on any
  device, SGLang 0.5.12 for log-probabilities of prompts, and the capture of routed experts
  in all releases.
- uvicorn ends a worker that does not answer within 5 s, again and again where it takes
  longer to import SGLang, as it does on two busy cores.
- With TEST_FORK=1 a server forks its scheduler and detokenizer. It otherwise spawns them,
  and what takes most of its start is that each imports SGLang again.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

MISSING = ("sgl_kernel", "torchaudio")


class Attribute:
    """An attribute of a missing module, or of such an attribute."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> Attribute:
        if name.startswith("__"):
            raise AttributeError(name)
        return Attribute(f"{self._name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(f"{self._name} was called, but it is only a stand-in.")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Attribute) and other._name == self._name

    def __hash__(self) -> int:
        return hash(self._name)


class MissingModule(types.ModuleType):
    """A module that cannot be installed here."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Attribute:
        if name.startswith("__"):
            raise AttributeError(name)
        return Attribute(f"{self.__name__}.{name}")


class MissingModuleFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the missing modules. It comes last, so that a real module wins."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in MISSING:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return MissingModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class BeforeImport(importlib.abc.MetaPathFinder):
    """Calls a function just before a module is first imported."""

    def __init__(self, module: str, prepare: Callable[[], None]):
        self.module = module
        self.prepare = prepare
        self.is_done = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> None:
        if fullname == self.module and not self.is_done:
            self.is_done = True
            self.prepare()


# The schemas last as long as their library.
libraries: list[Any] = []


def define_schemas() -> None:
    import torch

    if torch.version.cuda is not None:
        # With a CUDA build of torch the library loads and defines them itself.
        return
    library = torch.library.Library("torchvision", "DEF")
    libraries.append(library)
    signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    for name in ("nms", "qnms"):
        library.define(name + signature)


def ignore_pin_memory() -> None:
    import torch

    if torch.accelerator.is_available():
        return

    def unpinned(make: Callable[..., Any]) -> Callable[..., Any]:
        def make_unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
            return make(*args, **kwargs)

        return make_unpinned

    for name in ("tensor", "zeros"):
        setattr(torch, name, unpinned(getattr(torch, name)))
    tensor_class: Any = torch.Tensor
    tensor_class.pin_memory = lambda self: self
    runtime = types.SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    torch.cuda.cudart = lambda: runtime


def wait_for_slow_workers() -> None:
    import uvicorn

    uvicorn.run = functools.partial(uvicorn.run, timeout_worker_healthcheck=120)


def fork_processes() -> None:
    import multiprocessing

    if os.environ.get("TEST_FORK") != "1":
        return
    set_start_method: Any = multiprocessing.set_start_method

    def fork(method: str, force: bool = False) -> None:
        set_start_method("fork", force)

    multiprocessing.set_start_method = fork


PREPARATIONS = {
    "torchvision": define_schemas,
    "sglang.srt.layers.logits_processor": ignore_pin_memory,
    "sglang.srt.entrypoints.engine": fork_processes,
    "sglang.srt.entrypoints.http_server": wait_for_slow_workers,
}
sys.meta_path[:0] = [BeforeImport(*item) for item in PREPARATIONS.items()]
sys.meta_path.append(MissingModuleFinder())
