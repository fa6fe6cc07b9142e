"""Make a page with tables and plots of the results.

    python -m bench.report [--results FOLDER] [--output FOLDER]

Exit status: 0, or 2 if there are no results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.common import Row, spread
from testbed.release import ROOT

RESULTS = ROOT / "bench" / "results"
TITLES = {
    "serving_layer": "Serving layer alone",
    "instructions": "Serving layer alone, counted",
    "http_process": "Whole HTTP process",
    "whole_server": "Whole server",
    "vllm": "vLLM: asking against not asking",
    "memory": "Memory of the HTTP process",
    "gpu": "On a GPU",
}
NOTES = {
    "serving_layer": (
        "CPU time of the handlers of `/v1/chat/completions` and `/v1/completions`, driven by "
        "recorded engine outputs of one token a step; the cost of the recording itself is "
        "taken off. `floor` is the time that it takes to write the digits of the ids as JSON. "
        "`stock, tokenized again` adds one `tokenizer.encode` of the text, without the proxy "
        "that would call it. The string-replacing patch does not touch completions. All of the "
        "text is reasoning in `chat with reasoning`, and no call in `chat with tools`; "
        "`chat with usage` asks for `continuous_usage_stats`."
    ),
    "instructions": (
        "Instructions of a streamed chunk under callgrind, which settles what times are too "
        "noisy for. The source of the outputs is included."
    ),
    "http_process": (
        "CPU time of the process that serves HTTP, with the real tokenizer manager and detokenizer "
        "and a stand-in for the scheduler that puts out one token a step for each client. `stock "
        "again` shows how far equal runs differ. At a fixed rate the process is idle most of the "
        "time; `as fast as it can` has a step as soon as clients have read the one before. No call "
        "and no thought is in the text of `tools`."
    ),
    "whole_server": (
        "`sglang.bench_serving` against a stock and a patched server in alternation. On a CPU "
        "the engine takes most of the time, and on a shared machine the ratios of equal runs "
        "spread as far as those of different ones."
    ),
    "vllm": "The same client against one vLLM server, asking for ids and not.",
    "memory": (
        "Growth of the resident set of the process that serves HTTP, tokenizer manager included."
    ),
    "gpu": (
        "A stock and a patched server with a real engine on the same card, loaded in alternation "
        "by 8 client processes: a random Qwen2-shaped model of 1.2 B parameters, CUDA graphs on, "
        "and a word for each token, so that each is a chunk of its own."
    ),
}


def groups(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by case."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.case, []).append(row)
    return found


def table(rows: list[Row]) -> list[str]:
    """A line for each variant: its figures and their ratios to those of the first one.

    The columns are numbers of tokens, or units if there are several.
    """
    columns = list(dict.fromkeys((row.tokens, row.unit) for row in rows))
    cells = {(row.variant, row.tokens, row.unit): row for row in rows}
    units = {row.unit for row in rows}
    if len(units) == 1:
        corner = rows[0].unit
        heads = [f"{tokens} tokens" for tokens, _ in columns]
    else:
        corner = f"{rows[0].tokens} tokens"
        heads = [unit for _, unit in columns]
    lines = [
        f"| {corner} | " + " | ".join(f"{head} | ratio" for head in heads) + " |",
        "|---" * (1 + 2 * len(columns)) + "|",
    ]
    for variant in dict.fromkeys(row.variant for row in rows):
        line = [variant]
        for column in columns:
            row = cells[variant, *column]
            line += [f"{statistics.median(row.values):.3g}", spread(row.ratios)]
        lines.append("| " + " | ".join(line) + " |")
    return lines


def plot(rows: list[Row], path: Path) -> None:
    """Draw the figures over the number of tokens, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for variant in dict.fromkeys(row.variant for row in rows):
        own = sorted((row for row in rows if row.variant == variant), key=lambda row: row.tokens)
        axes.plot(
            [row.tokens for row in own],
            [statistics.median(row.values) for row in own],
            marker="o",
            markersize=4,
            label=variant,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("output tokens")
    axes.set_ylabel(rows[0].unit)
    axes.set_title(rows[0].case)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def section(name: str, result: dict[str, Any], output: Path) -> list[str]:
    kind = name.partition("-")[0]
    rows = [Row(**row) for row in result["rows"]]
    keys = ("vllm" if "vllm" in result else "sglang", "torch", "python", "commit")
    versions = ", ".join(f"{key} {result[key]}" for key in keys)
    release = "" if "vllm" in result else f", {result['sglang'].partition('+')[0]}"
    lines = [f"## {TITLES.get(kind, kind)}{release}", "", NOTES.get(kind, ""), ""]
    lines += [f"{result['machine']}; {versions}.", ""]
    for number, (case, own) in enumerate(groups(rows).items()):
        lines += [f"### {case}", "", *table(own), ""]
        if len({row.tokens for row in own}) > 1:
            picture = output / f"{name}-{number}.png"
            plot(own, picture)
            lines += [f"![{case}]({picture.name})", ""]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of *.json")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the page")
    args = parser.parse_args()
    files = sorted(args.results.glob("*.json"))
    if not files:
        parser.error(f"no results in {args.results}: run `make bench` first")
    args.output.mkdir(parents=True, exist_ok=True)
    order = list(TITLES)
    files.sort(key=lambda path: (order.index(path.stem.partition("-")[0]), path.stem))
    lines = [
        "# What exact ids cost",
        "",
        "Made by `make bench-report` from the JSON files beside it. Each cell has the median "
        "of the rounds, then the ratio to the first line of the table, run by run: its median "
        "and its range.",
        "",
    ]
    for path in files:
        lines += section(path.stem, json.loads(path.read_text()), args.output)
    page = args.output / "report.md"
    page.write_text("\n".join(lines))
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
