"""A tiny random Llama, or Qwen3-MoE, with a byte-level BPE tokenizer, made on the spot."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from testbed.chat_shapes import SHAPES, Shape
from testbed.release import ROOT, UPSTREAM

# Older releases of transformers do not read what newer ones write.
MODELS = ROOT / "build" / "models" / UPSTREAM

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Call a tool: name, arguments, city, weather, parameters.",
    "naïve café 日本語 東京 🙂",
]
EOS = "<|im_end|>"
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", EOS]
# As Qwen3's tokenizer has them, for renderers that are made for it.
QWEN_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
QWEN_TOKENS += ["<think>", "</think>"]
# A tool call in one token, so that a bias for few tokens makes the model call the tool.
CALL = '\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n'
CALL_WITH_TAGS = f"<tool_call>{CALL}</tool_call>"
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}\n<tool_call>\n"
    "{{ {'name': call['function']['name'], 'arguments': call['function']['arguments']} | tojson }}"
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT_LENGTH = 4096
NUM_LAYERS = 2
# Of the model that has any
NUM_EXPERTS, NUM_EXPERTS_PER_TOKEN = 8, 2
DEFAULT_SHAPE = Shape(tuple(SPECIAL_TOKENS), (EOS,), CHAT_TEMPLATE, lambda _, text, __: text, "")


def tiny_model_path(
    seed: int = 0, qwen: bool = False, without_weights: bool = False, shape: str = ""
) -> Path:
    """Return the folder of the model, and make it if there is none.

    Args:
        seed: Other seeds give the same model with other weights.
        qwen: Whether the tokenizer has Qwen3's tokens for thoughts and tool calls.
        without_weights: Whether there is all but the weights.
        shape: Which of `SHAPES` the chat template has.
    """
    if shape:
        return _shaped_model_path(shape)
    path = MODELS / ("tiny" + ("-qwen3" if qwen else "") + (f"-seed-{seed}" if seed else ""))
    if without_weights:
        path = path.with_name(f"{path.name}-no-weights")

    def make_it(unfinished: Path) -> None:
        make(unfinished, seed, [*QWEN_TOKENS, CALL, CALL_WITH_TAGS] if qwen else [])
        if without_weights:
            (unfinished / "model.safetensors").unlink()

    return make_once(path, make_it)


def moe_model_path() -> Path:
    """Return the folder of a Qwen3-MoE, and make it if there is none."""
    return make_once(MODELS / "tiny-moe", lambda unfinished: make(unfinished, 0, [], moe=True))


def draft_model_path() -> Path:
    """Return the folder of a model that often says what the other one does, and make it."""

    def make_it(unfinished: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        shutil.copytree(tiny_model_path(), unfinished)
        weights = load_file(unfinished / "model.safetensors")
        generator = torch.Generator().manual_seed(0)
        for name, weight in weights.items():
            if weight.dim() == 2:
                noise = torch.randn(weight.shape, generator=generator) * weight.float().std()
                weights[name] = weight + (0.15 * noise).to(weight.dtype)
        save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})

    return make_once(MODELS / "tiny-draft", make_it)


def make_once(path: Path, make_it: Callable[[Path], None]) -> Path:
    """Return the folder of a model, and have it made if there is none, whole or not at all.

    Args:
        make_it: Makes the model in the folder that it is given.
    """
    if not path.exists():
        unfinished = path.with_name(f"tiny-{os.getpid()}")
        make_it(unfinished)
        try:
            unfinished.rename(path)
        except OSError:
            # Another process has been faster.
            shutil.rmtree(unfinished)
    return path


def make_adapter(path: Path) -> None:
    """Make a LoRA adapter of the attention, which changes what the model says."""
    import torch
    from safetensors.torch import save_file

    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["o_proj"]}
    (path / "adapter_config.json").write_text(json.dumps({**config, "bias": "none"}))
    weights = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.o_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(4, 128, generator=generator)
        weights[f"{name}.lora_B.weight"] = torch.randn(128, 4, generator=generator)
    save_file(weights, path / "adapter_model.safetensors")


def _shaped_model_path(name: str) -> Path:
    shape = SHAPES[name]
    # Another template is another model.
    digest = hashlib.sha256(repr(dataclasses.replace(shape, say=str)).encode()).hexdigest()
    path = MODELS / f"tiny-{name}-{digest[:8]}"
    return make_once(path, lambda unfinished: make(unfinished, 0, list(shape.tokens), shape))


@functools.lru_cache
def load_tokenizer(qwen: bool = False, shape: str = "") -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_path(qwen=qwen, shape=shape))


def make(
    path: Path,
    seed: int,
    more_tokens: list[str],
    shape: Shape = DEFAULT_SHAPE,
    moe: bool = False,
) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(shape.special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=shape.special_tokens[0],
        eos_token=shape.stop_tokens[0],
        pad_token=shape.special_tokens[0],
        chat_template=shape.template,
        # Without one, /tokenize of some releases says a number that is no JSON.
        model_max_length=CONTEXT_LENGTH,
    )
    fast.add_tokens(more_tokens)
    fast.save_pretrained(path)

    stop_ids = fast.convert_tokens_to_ids(list(shape.stop_tokens))
    torch.manual_seed(seed)
    # Head size 64 is the smallest that the CPU kernels of other engines load as well.
    sizes: dict[str, Any] = dict(
        vocab_size=len(fast),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=fast.bos_token_id,
        eos_token_id=stop_ids if len(stop_ids) > 1 else fast.eos_token_id,
    )
    model: Any
    if moe:
        config = Qwen3MoeConfig(
            **sizes,
            head_dim=64,
            num_experts=NUM_EXPERTS,
            num_experts_per_tok=NUM_EXPERTS_PER_TOKEN,
            moe_intermediate_size=64,
        )
        model = Qwen3MoeForCausalLM(config)
        for layer in model.model.layers:
            # So that the last digits of a step, which depend on its batch, decide nothing.
            layer.mlp.gate.weight.data.mul_(100)
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    if more_tokens:
        # So that it prefers nothing by itself, and a bias decides.
        model.lm_head.weight.data.mul_(0.1)
    model.save_pretrained(path)
