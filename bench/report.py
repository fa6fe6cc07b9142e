"""Make a page with tables and plots of the results, and the chart of README.md.

    python -m bench.report [--results FOLDER] [--output FOLDER]

Exit status: 0, or 2 if there are no results.
"""

from __future__ import annotations

import argparse
import html
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
    "weight_broadcast": "Weights by broadcast",
    "logit_processors": "Masks of the vocabulary",
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
    "weight_broadcast": (
        "Over NCCL from one GPU to another: bytes as they are, and as `WeightBroadcaster` "
        "announces them in buckets. Then updates of a server while clients stream: the longest "
        "time in which none of them got a token (`silent`), from the call on until the first token "
        "after the answer, and how long the request for the update took. `silent, no update` is "
        "the longest time without a token in an equally long time without an update, and `silent, "
        "first update` is of one that comes when the trainer has just joined."
    ),
    "logit_processors": (
        "The softmax of a batch in which each request has an `action_mask`, and the masks before "
        "it, by how many different ones there are."
    ),
}

# The chart of README.md: what it is of, and its bars with their names there.
CHART = "cost.svg"
CHART_KIND, CHART_CASE = "serving_layer", "chat, streamed"
BARS = {
    "stock": "stock",
    "patched, ids": "ids",
    "patched, ids and logprobs": "ids and log-probabilities",
    "stock, logprobs": "stock's log-probabilities",
    "stock, tokenized again": "stock, tokenized again",
}


def groups(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by case."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.case, []).append(row)
    return found


def table(rows: list[Row]) -> list[str]:
    """A line for each variant: its figures and their ratios to those of the first one.

    The columns are numbers of tokens, or units if there are several or nothing depends on tokens.
    """
    columns = list(dict.fromkeys((row.tokens, row.unit) for row in rows))
    cells = {(row.variant, row.tokens, row.unit): row for row in rows}
    units = {row.unit for row in rows}
    if len(units) == 1 and rows[0].tokens:
        corner = rows[0].unit
        heads = [f"{tokens} tokens" for tokens, _ in columns]
    else:
        corner = f"{rows[0].tokens} tokens" if rows[0].tokens else ""
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


def chart(result: dict[str, Any]) -> str | None:
    """Return an SVG with a bar for each of BARS that was measured, None if none was.

    The bars are as long as the median figures, and say the median ratio to the first one.
    """
    rows = [Row(**row) for row in result["rows"]]
    tokens = max((row.tokens for row in rows if row.case == CHART_CASE), default=0)
    found = {row.variant: row for row in rows if (row.case, row.tokens) == (CHART_CASE, tokens)}
    bars = [(label, found[name]) for name, label in BARS.items() if name in found]
    if not bars:
        return None
    left, width, step = 200, 360, 30
    longest = max(statistics.median(row.values) for _, row in bars)
    caption = (
        f"{bars[0][1].unit} of {CHART_CASE.replace(', ', ' ')}, serving layer alone, "
        f"{tokens} tokens, and ratio to stock"
    )
    machine = f"{result['machine']}; SGLang {result['sglang']}, Python {result['python']}"
    bottom = step * len(bars) + 10
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 {bottom + 52}" role="img">',
        f"<title>{html.escape(caption)}</title>",
        "<style>text { font: 14px sans-serif; fill: #24292f } .small { font-size: 12px }",
        "rect { fill: #0969da } .stock { fill: #8c959f }",
        "@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } rect { fill: #4493f8 } }",
        "</style>",
    ]
    for number, (label, row) in enumerate(bars):
        value, top = statistics.median(row.values), step * number + 8
        length = width * value / longest
        ratio = f"{statistics.median(row.ratios):.2f}× ({value:.1f} µs)"
        kind = "stock" if row.variant.startswith("stock") else "patched"
        lines += [
            f'<text x="{left - 10}" y="{top + 16}" text-anchor="end">{html.escape(label)}</text>',
            f'<rect class="{kind}" x="{left}" y="{top}" width="{length:.0f}" height="22" rx="3"/>',
            f'<text x="{left + length + 8:.0f}" y="{top + 16}">{ratio}</text>',
        ]
    for number, text in enumerate((caption, machine)):
        top = bottom + 20 + 18 * number
        lines.append(f'<text class="small" x="10" y="{top}">{html.escape(text)}</text>')
    return "\n".join([*lines, "</svg>\n"])


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
        result = json.loads(path.read_text())
        lines += section(path.stem, result, args.output)
        if path.stem.partition("-")[0] == CHART_KIND and (picture := chart(result)):
            (args.output / CHART).write_text(picture)
    page = args.output / "report.md"
    page.write_text("\n".join(lines))
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
