"""What the HTTP client of SkyRL 0.3.0, written for servers of vLLM, makes of a server.

    python skyrl_client.py URL TOKENIZER ARGUMENT

ARGUMENT is JSON: `adapter`, the folder of a LoRA adapter, and `server`, the URL of the server
itself where URL is that of a router. Calls the methods of the client, without a tokenizer of
its own, and prints what each returned, or why it failed.

The package around the module of the client wants Python 3.12 and much else, so only this
module is imported, with the two of the package that it needs itself.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import sys
import types
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import skyrl

PACKAGE = types.ModuleType("skyrl.backends")
PACKAGE.__path__ = [str(Path(skyrl.__file__).parent / "backends")]
sys.modules["skyrl.backends"] = PACKAGE

from skyrl.backends.skyrl_train.inference_servers.remote_inference_client import (  # noqa: E402
    RemoteInferenceClient,
)

MESSAGES = [{"role": "user", "content": "Say something, 日本語."}]
PARAMS = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
TEXTS = ["Once upon a time", "日本語"]


async def call_all(url: str, argument: dict[str, Any]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    server = argument["server"]
    client = RemoteInferenceClient(url, [server], 1, model_name="tiny")

    async def call(name: str, answer: Awaitable[Any]) -> Any:
        try:
            results[name] = await asyncio.wait_for(answer, 120)
        except Exception as e:
            results[name] = {"error": str(e), "status": getattr(e, "status", None)}
        return results[name]

    async def control(name: str, answer: Awaitable[Any]) -> None:
        result = await call(name, answer)
        results[name] = result[server]["body"] if server in result else result

    chat = {"messages": MESSAGES, "session_id": "a", **PARAMS}
    await call("get_world_size", client.get_world_size())
    [*ids] = await call("tokenize", client.tokenize(TEXTS))
    await call("detokenize", client.detokenize(ids))
    await call("render", client.render_chat_completion({"json": dict(chat)}))
    await call("chat", client.chat_completion({"json": dict(chat)}))
    completion = {"prompt": ids[0], **PARAMS}
    await call("completion", client.completion({"json": completion}))
    batch = {"prompt_token_ids": ids, "sampling_params": {**PARAMS, "logprobs": 0}}
    await call("generate", client.generate({**batch, "session_ids": ["a", "b"]}))
    sample = {
        "prompt": {"chunks": [{"tokens": ids[0]}]},
        "sampling_params": {"max_tokens": 4, "temperature": 0},
        "include_prompt_logprobs": True,
        "topk_prompt_logprobs": 2,
    }
    await call("sample", client.sample({"json": sample}))
    await call("finish_session", client.finish_session("a"))

    # Keep is what it pauses by.
    await control("pause_generation", client.pause_generation())
    generating = asyncio.create_task(client.generate(batch))
    await asyncio.sleep(0.5)
    results["waits"] = not generating.done()
    await control("resume_generation", client.resume_generation())
    results["generated"] = await generating
    for mode in ("abort", "wait"):
        await control(f"pause {mode}", client.pause(mode, clear_cache=True))
        await call(f"generate in {mode}", client.generate(batch))
        await control(f"resume {mode}", client.resume())
    await control("reset_prefix_cache", client.reset_prefix_cache())
    await control("sleep", client.sleep(level=2, tags=["weights"]))
    await control("sleep 0", client.sleep(level=0))
    await control("wake_up", client.wake_up(tags=["weights", "kv_cache"]))

    for name in ("load", "load again"):
        await control(name, client.load_lora_adapter("own", argument["adapter"]))
    await call("adapted", client.generate(batch, model="own"))
    await control("unload", client.unload_lora_adapter("own"))
    await control("unload again", client.unload_lora_adapter("own"))

    clone = pickle.loads(pickle.dumps(client))
    await call("of a clone", clone.generate(batch))
    await clone.teardown()
    await client.teardown()
    return results


def main() -> None:
    url, _, argument = sys.argv[1:]
    print(json.dumps(asyncio.run(call_all(url, json.loads(argument)))))


main()
