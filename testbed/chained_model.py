"""A tiny model that says what a test has it say, with no grammar and nothing in the request.

Agents cannot be told to send a grammar, and none holds beside a reasoning parser. So here
the weights decide: a reply is a chain of tokens, each of which the model says after the one
before with all of its probability. The chat template ends a prompt with the token that
starts a chain, which one by how many results of tools the conversation has.

Two tokens of a chain are one token as well. So what a tokenizer makes of the text is not what
was sampled, as with real models.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

from testbed.chat_shapes import SHAPES, Shape
from testbed.tiny_model import MODELS, make, make_once

Replies = tuple[tuple[str, ...], ...]
QWEN3 = SHAPES["qwen3"]
# What mini-swe-agent ends at.
HANDED_IN = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
STARTS = tuple(f"<|reply_{number}|>" for number in range(4))
_PROMPT = "{{ '<|im_start|>assistant\n' }}\n  {%- if enable_thinking"
_NUM_RESULTS = "messages | selectattr('role', 'equalto', 'tool') | list | length"
_STARTED = (
    "{{ '<|im_start|>assistant\n<|reply_' ~ (" + _NUM_RESULTS + ") ~ '|>' }}\n"
    "  {%- if enable_thinking"
)
# Far more than what the layers add to a token, and than what else a token is followed by.
_STRENGTH = 100.0


def replies_that_call(tool: str, argument: str) -> Replies:
    """Replies with a tool call each, after thoughts, alone, and after text, and one without.

    Args:
        argument: The name of what is a command of a shell.
    """
    first, second, third = (
        _call(tool, {argument: command})
        for command in ("echo naïve 日本語", "printf b", f"echo {HANDED_IN}")
    )
    return (
        ("<think>", "\nI had better ", "look at it first.\n", "</think>\n\n", *first),
        ("<think></think>", *second),
        ("<think>\n\n</think>", "\n\nNow I ", "hand it in.", *third),
        ("<think>\n</think>\n\n", "It is ", "done, naïve 日本語."),
    )


def _call(tool: str, arguments: dict[str, str]) -> tuple[str, str]:
    """A tool call in two tokens, which meet in the arguments."""
    said = json.dumps(arguments, ensure_ascii=False)
    middle = 2 * len(said) // 3
    call = f'<tool_call>\n{{"name": "{tool}", "arguments": {said[:middle]}'
    return call, f"{said[middle:]}}}\n</tool_call>"


def chained_model_path(replies: Replies) -> Path:
    """Return the folder of the model, and make it if there is none.

    Args:
        replies: The tokens of each, by how many results of tools there are before it. No
            token is in two of them, or twice.
    """
    shape = Shape(
        (*QWEN3.special_tokens, *STARTS),
        QWEN3.stop_tokens,
        QWEN3.template.replace(_PROMPT, _STARTED),
        QWEN3.say,
        QWEN3.tool_call_parser,
    )
    assert shape.template != QWEN3.template and len(replies) <= len(STARTS)
    digest = hashlib.sha256(repr((shape.template, replies)).encode()).hexdigest()

    def make_it(unfinished: Path) -> None:
        said = [token for reply in replies for token in reply]
        joined = [a + b for reply in replies for a, b in itertools.pairwise(reply)]
        make(unfinished, 0, [*QWEN3.tokens, *said, *joined], shape)
        _chain(unfinished, replies, QWEN3.stop_tokens[0])

    return make_once(MODELS / f"tiny-chained-{digest[:8]}", make_it)


def sampled_ids(replies: Replies) -> list[list[int]]:
    """The ids that the model samples for each reply, the one that ends it included."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chained_model_path(replies))
    stop = QWEN3.stop_tokens[0]
    return [tokenizer.convert_tokens_to_ids([*reply, stop]) for reply in replies]


def _chain(path: Path, replies: Replies, stop: str) -> None:
    """Change the weights so that each token of a reply is followed by the next one."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    weights = load_file(path / "model.safetensors")
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    pairs = [
        pair
        for start, reply in zip(STARTS, replies)
        for pair in itertools.pairwise([start, *reply, stop])
    ]
    assert len({first for first, _ in pairs}) == len(pairs) <= embedding.shape[1]
    # A dimension of its own for each pair.
    for dimension, (first, second) in enumerate(pairs):
        ids = tokenizer.convert_tokens_to_ids([first, second])
        embedding[ids[0]] = 0
        embedding[ids[0], dimension] = _STRENGTH
        head[:, dimension] = 0
        head[ids[1], dimension] = _STRENGTH
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
