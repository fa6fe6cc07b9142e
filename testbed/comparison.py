"""Answers in a form in which those of two servers can be compared.

Ids, times and latencies are masked; a stream is joined by the kinds of its chunks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import requests

TRIES = 8
MASKS = [
    (r'"(id|rid|request_id|item_id)": ?"[^"]*"', r'"\1":"ID"'),
    (r"\b(call|msg|resp|rs)_[0-9a-f]{16,}", r"\1_ID"),
    (r'"(created|created_at|completed_at)": ?("[^"]*"|[0-9.]+)', r'"\1":0'),
    (r'"\w*(latency|duration|_ts|_time)": ?[0-9.e-]+', '"latency":0'),
    (r"\b[0-9a-f]{32}\b", "ID"),
    # What was cached depends on the requests before, also of the other runs.
    (r'"cached_tokens": ?\d+', '"cached_tokens":0'),
    (r"/[\w./+-]+/sglang/", "/sglang/"),
    (r"line \d+, in", "line 0, in"),
]
# What each chunk says anew: /generate's is cumulative, and some strings never change.
CUMULATIVE = (".text", ".output_ids[]")
CONSTANT = (".object", ".model", ".id", ".role", ".type", ".created_at")


def mask(text: str) -> str:
    for pattern, replacement in MASKS:
        text = re.sub(pattern, replacement, text)
    return text


def shape(value: Any) -> Any:
    """The keys of a value in order, with the kinds of their values."""
    if isinstance(value, dict):
        # The keys of top_logprobs are tokens.
        return [
            (key, "present" if key == "top_logprobs" else shape(item))
            for key, item in value.items()
        ]
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "null" if value is None else type(value).__name__.replace("int", "float")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item, f"{path}[]")
    else:
        yield path, value


def join_stream(body: str) -> list[Any]:
    """What a stream says, no matter where it was cut.

    Returns:
        For each choice: its kinds of chunk, each once, and for each key the
        strings joined, or else the last value; log-probabilities are joined as a list.
    """
    choices: dict[Any, dict[str, Any]] = {}
    for line in body.splitlines():
        data = line.removeprefix("data: ")
        if not data.startswith("{"):
            choices.setdefault(data, {})
            continue
        chunk = json.loads(data)
        inner = chunk.get("choices") or [{}]
        index = chunk.get("index", inner[0].get("index"))
        entry = choices.setdefault(index, {"kinds": [], "values": {}})
        if (kind := shape(chunk)) not in entry["kinds"]:
            entry["kinds"].append(kind)
        for path, value in leaves(chunk):
            if value is None or "content[].top_logprobs" in path:
                # Stock repeats the first token's for all tokens of a chunk.
                continue
            if path in CUMULATIVE or ".meta_info" in path:
                entry["values"][path] = value
            elif "logprobs" in path:
                entry["values"].setdefault(path, []).append(value)
            elif isinstance(value, str) and not path.endswith(CONSTANT):
                entry["values"][path] = entry["values"].get(path, "") + value
            else:
                entry["values"][path] = value
    for entry in choices.values():
        # Which kinds of chunk come first is timing; whether they come is not.
        entry.get("kinds", []).sort(key=repr)
    return sorted(choices.items(), key=repr)


def ask(url: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
    parts: list[bytes] = []
    with requests.post(url + path, json=body, timeout=120, stream=True) as response:
        try:
            parts += response.iter_content(None)
        except requests.exceptions.ChunkedEncodingError:
            # Some errors in the middle of a stream make stock hang up.
            parts.append(b"\nhung up")
    headers = {k.lower(): v for k, v in response.headers.items()}
    for name in ("date", "content-length", "x-request-id"):
        headers.pop(name, None)
    text = mask(b"".join(parts).decode())
    kind = headers.get("content-type", "")
    is_stream = "event-stream" in kind or "ndjson" in kind
    return response.status_code, headers, join_stream(text) if is_stream else text
