"""What exact ids cost on a whole server with a real engine, a stock and a patched one on one card.

Clients in several processes stream from both in alternation, for some of the rounds on one card
and for the rest on the other. The model is random, and each token of it is a word, so that each
is a chunk of its own.

    TEST_DEVICE=cuda python -m bench.gpu [--cards 0,1] [--clients 1,64,256] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.common import MESSAGES, Row, integers, stock_package, write_results
from bench.http_process import UNITS, VARIANTS, Load, make_rows, run_load
from bench.report import groups, table
from testbed.client import CHAT
from testbed.scheduler import MAX_CLIENT_PROCESSES, PROGRESS_BYTES
from testbed.server import BASE_FLAGS, ON_GPU, Server
from testbed.tiny_model import MODELS

NUM_WORDS = 32_000
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} "
    "<|im_end|> {% endfor %}<|im_start|> assistant "
)
CONTEXT_LENGTH = 4096
# 1.2 B parameters on a GPU.
LAYERS, HIDDEN, INTERMEDIATE, HEADS = (22, 2048, 5504, 16) if ON_GPU else (1, 64, 128, 4)
# A client has so many requests at most, so that one alone does not take all of the time.
MAX_REQUESTS = 2
Samples = dict[str, dict[str, list[float]]]


def make_model(path: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    words = SPECIAL + [f"w{i}" for i in range(NUM_WORDS - len(SPECIAL))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        unk_token=SPECIAL[0],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
    ).save_pretrained(path)
    config = Qwen2Config(
        vocab_size=NUM_WORDS,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=0,
        eos_token_id=2,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if ON_GPU else "cpu"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(path)


def model_path() -> Path:
    """Return the folder of the model, and make it if there is none.

    Raises:
        RuntimeError: If it could not be made.
    """
    path = MODELS / "words"
    if not path.exists():
        unfinished = path.with_name(f"{path.name}.part")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        # In a process of its own, which leaves no memory of a GPU behind.
        process = multiprocessing.get_context("spawn").Process(
            target=make_model, args=(unfinished,)
        )
        process.start()
        process.join()
        if process.exitcode != 0:
            raise RuntimeError("the model could not be made")
        unfinished.rename(path)
    return path


class LoadedServer(Server):
    """A server of the model, on one card.

    Args:
        name: "stock" or "patched".
        card: A number, or nothing on a CPU.
    """

    def __init__(self, name: str, card: str):
        command = ["sglang.launch_server", "--model-path", str(model_path()), *BASE_FLAGS]
        # No grammar backend can read this tokenizer.
        command += ["--grammar-backend=none", "--max-total-tokens=200000"]
        if ON_GPU:
            command += ["--cuda-graph-max-bs=256"]
        env = {"TEST_FORK": "0"}
        if card:
            env["CUDA_VISIBLE_DEVICES"] = card
        if name == "stock":
            paths = [str(stock_package()), os.environ.get("PYTHONPATH")]
            env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        self._start(name, f"gpu-{name}", command, env)


@contextlib.contextmanager
def servers_on(card: str) -> Iterator[dict[str, LoadedServer]]:
    with contextlib.ExitStack() as stack:
        servers = {}
        for name in ("stock", "patched"):
            servers[name] = LoadedServer(name, card)
            stack.callback(servers[name].stop)
        for server in servers.values():
            server.wait()
        yield servers


def measure_card(
    servers: Mapping[str, Server],
    loads: Mapping[int, Load],
    rounds: int,
    progress: Path,
    samples: Mapping[int, Samples],
) -> Iterator[int]:
    """Add to the samples of each number of clients, and yield it."""
    for clients, load in loads.items():
        # The first round warms up.
        for round_ in range(1 + rounds):
            # Another one is first in each round, since the first may find the machine idle.
            first = round_ % len(VARIANTS)
            for name, server, fields in VARIANTS[first:] + VARIANTS[:first]:
                body: dict[str, Any] = {
                    "model": "m",
                    "stream": True,
                    "ignore_eos": True,
                    "max_tokens": load.tokens,
                    **MESSAGES,
                    **fields,
                }
                found = run_load(servers[server], progress, CHAT, body, load)
                if round_:
                    for key, value in found.items():
                        samples[clients][name][key].append(value)
        yield clients


def rows_of(samples: Mapping[int, Samples], tokens: int) -> list[Row]:
    """Rows of the numbers of clients that have been measured."""
    rows = []
    for clients, own in samples.items():
        if all(values for by_key in own.values() for values in by_key.values()):
            who = "1 client" if clients == 1 else f"{clients} clients"
            rows += make_rows(f"chat, {who}, on the GPU", tokens, own)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cards", default="0,1", help="one after the other (default: 0,1)")
    parser.add_argument("--clients", type=integers, default="1,64,256", help="default: 1,64,256")
    parser.add_argument("--processes", type=int, default=8, help="of clients (default: 8)")
    parser.add_argument("--rounds", type=int, default=5, help="of all cards (default: 5)")
    parser.add_argument("--tokens", type=int, default=256, help="of a request (default: 256)")
    parser.add_argument("--machine", help="what runs it, for the report")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    cards = args.cards.split(",") if ON_GPU else [""]
    if not 1 <= args.processes <= MAX_CLIENT_PROCESSES:
        parser.error(f"argument --processes: must be 1 to {MAX_CLIENT_PROCESSES}")
    if args.rounds < len(cards):
        parser.error(f"argument --rounds: must be at least one for each of {len(cards)} cards")
    loads = {
        clients: Load(
            clients,
            min(args.processes, clients),
            1 if clients > 64 else MAX_REQUESTS,
            args.tokens,
            rate=0,
        )
        for clients in args.clients
    }
    samples: dict[int, Samples] = {
        clients: {name: {key: [] for key in UNITS} for name, _, _ in VARIANTS} for clients in loads
    }
    model_path()
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder, "progress")
        progress.write_bytes(bytes(PROGRESS_BYTES))
        for index, card in enumerate(cards):
            # The last ones have what does not divide.
            rounds = args.rounds * (index + 1) // len(cards) - args.rounds * index // len(cards)
            with servers_on(card) as servers:
                for clients in measure_card(servers, loads, rounds, progress, samples):
                    print(f"{clients} clients, card {card}: {rounds} rounds", file=sys.stderr)
                    # Who stops a long run keeps what it has measured.
                    if args.json:
                        rows = rows_of(samples, args.tokens)
                        write_results(args.json, rows, args.machine)
    for own in groups(rows_of(samples, args.tokens)).values():
        print("\n".join(["", own[0].case, "", *table(own)]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
