"""The clauses of the contract that can be seen in answers alone."""

from __future__ import annotations

from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from testbed.client import CHAT, post, prompts_of, stream
from testbed.server import KNOWS_TOKEN_BYTES, Server
from testbed.tiny_model import load_tokenizer

# As a byte-level vocabulary spells bytes.
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


def bytes_of(token: str) -> bytes:
    """The bytes of a token as the vocabulary has it, or its text if it is an added one."""
    if all(character in BYTE_OF for character in token):
        return bytes(BYTE_OF[character] for character in token)
    return token.encode()


def check_logprobs(choice: dict[str, Any], num_top: int) -> None:
    """C5: one entry for each id, in order, with alternatives of its own."""
    # Its first tokens are those of the other one.
    tokenizer = load_tokenizer(qwen=True)
    ids = choice.get("token_ids", [])
    logprobs = choice["logprobs"]
    if logprobs is None:
        assert not ids
        return
    expected = [tokenizer.decode([i]) for i in ids]
    if KNOWS_TOKEN_BYTES:
        raw = [bytes_of(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    else:
        raw = [text.encode() for text in expected]
    if "content" in logprobs:
        assert [bytes(entry["bytes"]) for entry in logprobs["content"]] == raw
        assert [entry["token"] for entry in logprobs["content"]] == expected
        values = [entry["logprob"] for entry in logprobs["content"]]
        tops = [[top["logprob"] for top in entry["top_logprobs"]] for entry in logprobs["content"]]
        assert all(len(top) == num_top for top in tops)
    else:
        if KNOWS_TOKEN_BYTES:
            # There is no place for them here: each is shown as a character of its own.
            expected = [
                piece.decode("latin-1") if "\N{REPLACEMENT CHARACTER}" in text else text
                for text, piece in zip(expected, raw)
            ]
        assert logprobs["tokens"] == expected
        values = logprobs["token_logprobs"]
        tops = [list(top.values()) for top in logprobs["top_logprobs"]]
    assert len(values) == len(ids)
    assert all(value <= 0 for value in values)
    if num_top and "content" in logprobs:
        # A grammar may rule out the best token, but not make a worse one score better.
        assert all(value <= top[0] + 1e-4 for value, top in zip(values, tops))


def check_stream(
    chunks: list[dict[str, Any]], is_chat: bool, case: dict[str, Any]
) -> dict[int, list[int]]:
    """Check the clauses that can be seen in a stream alone; return its ids by choice."""
    ids: dict[int, list[int]] = {}
    for position, chunk in enumerate(chunks):
        assert ("prompt_token_ids" in chunk) == (is_chat and position == 0)
        for choice in chunk["choices"]:
            is_first = choice["index"] not in ids
            assert ("prompt_token_ids" in choice) == (not is_chat and is_first)
            sent = ids.setdefault(choice["index"], [])
            assert choice.get("token_ids", [0]), "an empty key must be left out"
            sent += choice.get("token_ids", [])
            if case.get("logprobs"):
                check_logprobs(choice, case.get("top_logprobs", 0))
            else:
                assert choice["logprobs"] is None
    usage = chunks[-1]["usage"]
    assert sum(map(len, ids.values())) == usage["completion_tokens"]
    return ids


def check_both(
    server: Server, path: str, make: Any, case: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask whole and streamed, and compare both with each other and with the engine."""
    is_chat = path == CHAT
    body = make(case)
    whole = post(server, path, body)
    chunks = stream(server, path, body)

    ids = check_stream(chunks, is_chat, case)
    for choice in whole["choices"]:
        assert choice["token_ids"] == ids[choice["index"]], "C2"
        if case.get("logprobs"):
            check_logprobs(choice, case.get("top_logprobs", 0))
    assert len(whole["choices"]) == len(ids) == body.get("n", 1)
    num_ids = sum(len(choice["token_ids"]) for choice in whole["choices"])
    assert num_ids == whole["usage"]["completion_tokens"]

    prompts = prompts_of(whole)
    assert len(prompts[0]) == whole["usage"]["prompt_tokens"], "C6"
    first = chunks[0] if is_chat else chunks[0]["choices"][0]
    assert first["prompt_token_ids"] == prompts[0], "C6"
    check_in_time(chunks)
    return whole, chunks


def check_in_time(chunks: list[dict[str, Any]]) -> None:
    """C4: the ids sent so far decode to all the text shown so far."""
    tokenizer = load_tokenizer(qwen=True)
    ids: dict[int, list[int]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            sent = ids.setdefault(choice["index"], [])
            sent += choice.get("token_ids", [])
            delta = choice.get("delta") or {}
            shown = [choice.get("text"), delta.get("content"), delta.get("reasoning_content")]
            decoded = tokenizer.decode(sent)
            for text in shown:
                if text and "\ufffd" not in text:
                    assert text in decoded, "C4"
            for call in delta.get("tool_calls") or []:
                arguments = call["function"].get("arguments") or ""
                # Some parsers write the JSON around the values themselves.
                assert all(c in decoded for c in arguments if c.isalnum()), "C4"
