"""Processes that begin with SGLang imported, which otherwise takes each ten seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

PRELOADED = ["sglang.srt.entrypoints.http_server", "sglang.srt.weight_sync.broadcast"]


def processes(env: Mapping[str, str]) -> ForkServerContext:
    """Return what makes them.

    Args:
        env: What the first caller adds to the environment when SGLang is imported.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = dict(os.environ)
    os.environ.update(env)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


class ForkedModule:
    """A module that runs with its arguments, as `subprocess.Popen` has it.

    Args:
        command: The name of the module and its arguments.
        base_env: What it has beside the environment of the tests, the same for all.
        env: What it has beside that from its start on, but not when SGLang is imported.
        cwd: The folder it runs in.
        log: Where its output goes.
    """

    def __init__(
        self,
        command: list[str],
        base_env: Mapping[str, str],
        env: Mapping[str, str],
        cwd: Path,
        log: Path,
    ):
        arguments = (command, {**base_env, **env}, cwd, log)
        self.process = processes(base_env).Process(target=run_module, args=arguments)
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        status = self.process.exitcode
        if status is None:
            raise subprocess.TimeoutExpired("server", timeout or 0.0)
        return status

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


def run_module(command: list[str], env: dict[str, str], cwd: Path, log: Path) -> None:
    os.setsid()
    os.environ.update(env)
    os.chdir(cwd)
    with log.open("w") as stream:
        os.dup2(stream.fileno(), sys.stdout.fileno())
        os.dup2(stream.fileno(), sys.stderr.fileno())
    sys.argv = list(command)
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
