"""Adaptive drafting against plain decoding, by batch size.

    python examples/batches.py --model MODEL --prompts examples/kinds.jsonl --rows 1,2,4,8,16
    --context 0,2000

Both decode all prompts in batches of --rows, in turns in one process. Outputs must be identical.
`--context`: tokens of this folder's documents before each prompt. `--through serve`: by the
server's dispatcher. Run nothing else meanwhile.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from measuring import head, in_turns, line, pieces, read_prompts, share

from layerskip_core.checkpoint.loaded import Decoder
from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import DataConfig, PackingConfig
from layerskip_core.config.options import parse_counts
from layerskip_core.config.resolution import resolve
from layerskip_core.data import load_examples
from layerskip_core.decoding import DecodeStats, decode_batch
from layerskip_core.serving import Dispatcher, Request, Update


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    loaded = for_decoding(
        arguments.model, "cpu", arguments.dtype, PackingConfig(arguments.quantize, adaptive=True)
    )
    if arguments.prompts is None:
        texts = [
            row.prompt
            for row in load_examples(DataConfig("commands", "validation", limit=arguments.samples))
        ]
    else:
        texts = read_prompts(arguments.prompts, arguments.samples)
    prompts = [loaded.encode_prompt(text) for text in texts]
    options = {"max_new_tokens": arguments.max_new_tokens}
    configs = {
        name: resolve(
            {**options, "strategy": name}, loaded.recommended(), loaded.backend.num_layers
        )
        for name in ("autoregressive", "adaptive")
    }
    print(
        f"{loaded.name}: {loaded.backend.implementation}, {loaded.backend.dtype}, {torch.get_num_threads()} threads\n"
    )
    head(
        "context",
        "rows",
        "plain, tokens/s",
        "adaptive over plain",
        "lowest",
        "accepted",
        "steps by",
    )
    answer = served if arguments.through == "serve" else generated
    for context in arguments.context:
        before = pieces(loaded.tokenizer, len(prompts), context)
        ids = [[*text, *prompt] for text, prompt in zip(before, prompts, strict=True)]
        for rows in arguments.rows:
            some = ids[: max(rows, arguments.least)]
            runs = {
                name: partial(answer, loaded, config, some, rows)
                for name, config in configs.items()
            }
            times, results = in_turns(runs, arguments.repeats)
            (expected, plain), (outputs, stats) = (results[name] for name in configs)
            if outputs != expected:
                sys.exit(f"error: context {context}, {rows} rows: the outputs differ")
            seconds, adaptive = (times[name] for name in configs)
            lowest = min(a / b for a, b in zip(seconds, adaptive, strict=True))
            steps = sorted(stats.steps_by_drafter.items(), key=lambda item: -item[1])
            by = ", ".join(f"{name} {count}" for name, count in steps)
            ratio = f"{median(seconds) / median(adaptive):.2f}"
            rate = f"{plain.new_tokens / median(seconds):.1f}"
            accepted = share(stats.accepted, stats.drafted)
            line(context, rows, rate, ratio, f"{lowest:.2f}", accepted, by)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--prompts", help="a .jsonl file (default: validation rows of the embedded `commands`)"
    )
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantize", choices=("int8", "int4"))
    parser.add_argument(
        "--rows", type=lambda text: parse_counts(text, "rows"), default=(1, 2, 4, 8, 16)
    )
    parser.add_argument(
        "--context", type=lambda text: tuple(map(int, text.split(","))), default=(0,)
    )
    for flag, default in (
        ("samples", 16),
        ("max-new-tokens", 128),
        ("repeats", 3),
        ("threads", torch.get_num_threads()),
    ):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--least", type=int, default=8, help="least prompts per measurement")
    parser.add_argument("--through", choices=("generate", "serve"), default="generate")
    return parser.parse_args()


def generated(
    loaded: Decoder, config: DecodingConfig, prompts: Sequence[list[int]], rows: int
) -> tuple[Any, DecodeStats]:
    outputs = list[list[int]]()
    stats = DecodeStats()
    for start in range(0, len(prompts), rows):
        batch = decode_batch(
            loaded.backend, prompts[start : start + rows], config, loaded.eos_ids, loaded.detokenize
        )
        for answer in batch:
            outputs.append(list(answer.ids))
            stats += answer.stats
    return outputs, stats


def served(
    loaded: Decoder, config: DecodingConfig, prompts: Sequence[list[int]], rows: int
) -> tuple[Any, DecodeStats]:
    texts = [""] * len(prompts)

    def receiver(place: int) -> Callable[[Update], None]:
        def deliver(update: Update) -> None:
            texts[place] += update.text

        return deliver

    dispatcher = Dispatcher(loaded, rows)
    requests = [
        Request(ids, config, receiver(place), streams=False) for place, ids in enumerate(prompts)
    ]
    for request in requests:
        dispatcher.add(request)
    while dispatcher.held:
        dispatcher.step()
    return texts, sum((request.stats for request in requests), DecodeStats())


if __name__ == "__main__":
    main()
