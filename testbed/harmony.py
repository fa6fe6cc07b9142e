"""gpt-oss for the tests: the encoding that its prompts go by, and a tiny model that speaks it.

The vocabulary of harmony is not on PyPI by itself, and openai-harmony would fetch it from
elsewhere. The wheel of litellm has the file.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from testbed.tiny_model import CONTEXT_LENGTH, MODELS, make_once, tiny_model_path
from tools.common import BUILD, ToolError, run_pip, say, sha256_of

# What openai-harmony looks for, and where.
FOLDER = BUILD / "harmony"
ENCODINGS_BASE = "TIKTOKEN_ENCODINGS_BASE"
VOCABULARY = FOLDER / "o200k_base.tiktoken"
SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
WHEEL = "litellm==1.80.0"
MEMBER = "litellm/litellm_core_utils/tokenizers/fb374d419588a4632f3f557e76b4b70aebbca790"

HARMONY_VOCAB_SIZE = 201088
Token = str | bytes
ENDS: tuple[Token, ...] = ("<|end|>", "<|return|>")
# What a token of the model may be followed by, each with the same probability. It says thoughts
# and texts in any order, in tokens that a tokenizer would not make of them.
FOLLOWING: dict[Token, tuple[Token, ...]] = {
    "assistant": ("<|channel|>",),
    "<|channel|>": ("analysis", "final"),
    "analysis": ("<|message|>",),
    "final": ("<|message|>",),
    "<|message|>": ("S", "na"),
    "S": ("un",),
    "un": ("ny", *ENDS),
    "ny": ENDS,
    "na": (b"\xc3",),
    b"\xc3": (b"\xaf",),
    b"\xaf": ("ve",),
    "ve": (" ", *ENDS),
    " ": ("S",),
    "<|end|>": ("<|start|>",),
    "<|start|>": ("assistant",),
}
_STRENGTH = 100.0


def fetch_vocabulary() -> None:
    """Put the vocabulary of harmony into `FOLDER`, unless it is there.

    Raises:
        ToolError: If it cannot be had.
    """
    if VOCABULARY.exists():
        return
    say(f"taking the vocabulary of harmony from {WHEEL}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        run_pip(sys.executable, "download", "--no-deps", "--dest", folder, WHEEL)
        [wheel] = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member:
            unfinished = Path(folder, VOCABULARY.name)
            unfinished.write_bytes(member.read())
        if sha256_of(unfinished) != SHA256:
            raise ToolError(f"{MEMBER} of {WHEEL} is not the vocabulary of harmony")
        unfinished.rename(VOCABULARY)


@functools.lru_cache
def load_encoding() -> Any:
    """Return the encoding of harmony, for this process and for SGLang in it."""
    fetch_vocabulary()
    os.environ[ENCODINGS_BASE] = str(FOLDER)
    from openai_harmony import HarmonyEncodingName, load_harmony_encoding

    return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)


def encode(text: str) -> list[int]:
    """The ids of a text, in which special tokens are written as they are."""
    ids: list[int] = load_encoding().encode(text, allowed_special="all")
    return ids


def decode(ids: list[int]) -> str:
    text: str = load_encoding().decode(ids)
    return text


def harmony_model_path() -> Path:
    """Return the folder of the model, and make it if there is none.

    It is a Llama: a server takes it for gpt-oss if it is told that its type is that.
    """
    fetch_vocabulary()
    digest = hashlib.sha256(repr(FOLLOWING).encode()).hexdigest()
    return make_once(MODELS / f"tiny-harmony-{digest[:8]}", _make)


def _make(path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    # Whose tokenizer is never asked.
    shutil.copytree(tiny_model_path(), path)
    ids = {token: id_of(token) for token in FOLLOWING}
    config = LlamaConfig(
        vocab_size=HARMONY_VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=id_of("<|start|>"),
        eos_token_id=[id_of("<|return|>"), id_of("<|call|>")],
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    layer = model.model.layers[0]
    embedding, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
    # The layer adds nothing, and each token has a dimension of its own.
    for weight in (embedding, head, layer.self_attn.o_proj.weight.data):
        weight.zero_()
    layer.mlp.down_proj.weight.data.zero_()
    for dimension, (token, following) in enumerate(FOLLOWING.items()):
        embedding[ids[token], dimension] = _STRENGTH
        for other in following:
            head[id_of(other), dimension] = _STRENGTH
    model.save_pretrained(path)


def id_of(token: Token) -> int:
    """The id of what is one token."""
    if isinstance(token, bytes):
        return _ranks()[base64.b64encode(token)]
    [token_id] = encode(token)
    return token_id


@functools.lru_cache
def _ranks() -> dict[bytes, int]:
    fetch_vocabulary()
    lines = (line.split() for line in VOCABULARY.read_bytes().splitlines())
    return {token: int(rank) for token, rank in lines}
