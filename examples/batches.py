"""Adaptive drafting against plain decoding, by the number of rows that decode together.

    python examples/batches.py --model MODEL --prompts examples/kinds.jsonl --rows 1,2,4,8,16 --context 0,2000

Both decode all prompts, in batches of so many rows, in turn in one process; the first turn warms up. Outputs must be identical.
With a `--context`, each prompt follows so many tokens of this folder's documents. `--through serve`: by the server's continuous
batching, which has all prompts at once and room for so many rows. Run nothing beside it.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import geometric_mean, median

import torch

from layerskip_core.checkpoint.loaded import Decoder
from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import DataConfig, PackingConfig
from layerskip_core.config.options import parse_counts
from layerskip_core.config.resolution import resolve
from layerskip_core.data import load_examples
from layerskip_core.decoding import DecodeStats, decode_batch
from layerskip_core.serving import Request, Scheduler, Update

Outputs = list[list[int]] | list[str]


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    packing = PackingConfig(quantize=arguments.quantize, adaptive=True)
    loaded = for_decoding(arguments.model, "cpu", arguments.dtype, packing)
    if arguments.prompts is None:
        texts = [row.prompt for row in load_examples(DataConfig("commands", "validation", limit=arguments.samples))]
    else:
        lines = Path(arguments.prompts).read_text(encoding="utf-8").splitlines()[: arguments.samples]
        texts = [json.loads(line)["prompt"] for line in lines]
    prompts = [loaded.encode_prompt(text) for text in texts]
    options = {"max_new_tokens": arguments.max_new_tokens}
    configs = {
        name: resolve({**options, "strategy": name}, loaded.recommended(), loaded.backend.num_layers)
        for name in ("autoregressive", "adaptive")
    }
    print(f"{loaded.name}: {loaded.backend.implementation}, {loaded.backend.dtype}, {torch.get_num_threads()} threads\n")
    print("| context | rows | plain, tokens/s | adaptive over plain | lowest | accepted | steps by |")
    print("|---|---|---|---|---|---|---|")
    speedups: dict[int, list[float]] = {}
    for context in arguments.context:
        before = documents(loaded, len(prompts), context)
        ids = [[*text, *prompt] for text, prompt in zip(before, prompts, strict=True)]
        for rows in arguments.rows:
            count = min(len(ids), max(rows, arguments.least))
            speedups.setdefault(rows, []).append(measured(arguments, loaded, configs, ids[:count], context, rows))
    means = ", ".join(f"{rows} rows {geometric_mean(ratios):.2f}" for rows, ratios in speedups.items())
    print(f"\nGeometric means: {means}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", help="a .jsonl file; validation rows of the embedded `commands` without")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantize", choices=("int8", "int4"))
    parser.add_argument("--rows", type=lambda text: parse_counts(text, "rows"), default=(1, 2, 4, 8, 16))
    parser.add_argument("--context", type=lambda text: tuple(map(int, text.split(","))), default=(0,))
    parser.add_argument("--samples", type=int, default=16, help="prompts")
    parser.add_argument("--least", type=int, default=8, help="prompts of a cell, if its rows are fewer")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--through", choices=("generate", "serve"), default="generate")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def documents(loaded: Decoder, count: int, tokens: int) -> list[list[int]]:
    """`count` different pieces of so many tokens."""
    if not tokens:
        return [[]] * count
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.md")))
    ids = loaded.tokenizer(text)["input_ids"]
    step = (len(ids) - tokens) // count
    return [ids[step * number : step * number + tokens] for number in range(count)]


def measured(
    arguments: argparse.Namespace,
    loaded: Decoder,
    configs: dict[str, DecodingConfig],
    prompts: list[list[int]],
    context: int,
    rows: int,
) -> float:
    """Prints a row of the table; returns the speedup, from the medians of the repeats."""
    answer = served if arguments.through == "serve" else generated
    times: dict[str, list[float]] = {name: [] for name in configs}
    for repeat in range(arguments.repeats + 1):
        for name, config in configs.items():
            started = time.perf_counter()
            outputs, stats = answer(loaded, config, prompts, rows)
            times[name].append(time.perf_counter() - started)
            if name == "autoregressive":
                expected, tokens = outputs, stats.new_tokens
            elif outputs != expected:
                sys.exit(f"context {context}, {rows} rows, repeat {repeat}: the outputs differ")
    plain, adaptive = (seconds[1:] for seconds in times.values())
    ratio, lowest = median(plain) / median(adaptive), min(a / b for a, b in zip(plain, adaptive, strict=True))
    by = ", ".join(f"{name} {count}" for name, count in sorted(stats.steps_by_drafter.items(), key=lambda item: -item[1]))
    accepted = f"{stats.acceptance_rate:.0%}" if stats.drafted else "-"
    rate = tokens / median(plain)
    print(f"| {context} | {rows} | {rate:.1f} | {ratio:.2f} | {lowest:.2f} | {accepted} | {by} |", flush=True)
    return ratio


def generated(loaded: Decoder, config: DecodingConfig, prompts: Sequence[list[int]], rows: int) -> tuple[Outputs, DecodeStats]:
    outputs, stats = list[list[int]](), DecodeStats()
    for start in range(0, len(prompts), rows):
        batch = decode_batch(loaded.backend, prompts[start : start + rows], config, loaded.eos_ids, loaded.detokenize)
        for answer in sorted(batch, key=lambda answer: answer.row):
            outputs.append(list(answer.ids))
            stats += answer.stats
    return outputs, stats


def served(loaded: Decoder, config: DecodingConfig, prompts: Sequence[list[int]], rows: int) -> tuple[Outputs, DecodeStats]:
    texts = [""] * len(prompts)

    def receiver(place: int) -> Callable[[Update], None]:
        def deliver(update: Update) -> None:
            texts[place] += update.text

        return deliver

    scheduler = Scheduler(loaded, rows)
    requests = [Request(ids, config, receiver(place), streams=False) for place, ids in enumerate(prompts)]
    for request in requests:
        scheduler.add(request)
    while scheduler.held:
        scheduler.step()
    return texts, sum((request.stats for request in requests), DecodeStats())


if __name__ == "__main__":
    main()
