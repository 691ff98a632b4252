"""Adaptive drafting against plain decoding, and against every fixed setting, on prompts of several kinds.

    python examples/any_checkpoint.py --model MODEL --prompts examples/kinds.jsonl
    python examples/any_checkpoint.py --model embedded --prompts prompts.jsonl --exits 4,6,8 --specs 4,8,12,16,24

Each line of a file of prompts has a `prompt`, and a `category` by which results are grouped. All methods decode a prompt
before the next prompt comes, in an order that rotates, in one process. The first prompts are not counted, until adaptive
drafting has `--settle` tokens to know the model by. Outputs must be identical. Run nothing beside it.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from layerskip_core.checkpoint.loaded import Decoder
from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.config.decoding import DecodingConfig, DecodingOptions, decoding
from layerskip_core.config.model import PackingConfig
from layerskip_core.config.options import parse_counts
from layerskip_core.config.resolution import resolve
from layerskip_core.decoding import DecodeStats, decode
from layerskip_core.decoding.drafters.adaptive import AdaptiveDrafter
from layerskip_core.decoding.drafters.exit import ExitDrafter, drafter_name


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    loaded = for_decoding(arguments.model, "cpu", arguments.dtype, PackingConfig(draft_weights=arguments.copies, adaptive=True))
    rows = [json.loads(line) for line in Path(arguments.prompts).read_text(encoding="utf-8").splitlines()]
    methods = methods_of(arguments, loaded)
    for name, method in methods.items():  # warm-up
        if name != "adaptive":
            decoded(loaded, rows[0]["prompt"], method)
    times: dict[str, list[list[float]]] = {name: [] for name in methods}  # by method, prompt and repeat
    stats: dict[str, list[DecodeStats]] = {name: [] for name in methods}
    identical, own_time, spent, settled = 0, [0.0], 0.0, 0
    while settled < arguments.settle:
        settled += decoded(loaded, rows.pop(0)["prompt"], methods["adaptive"])[1].new_tokens
    for place, row in enumerate(rows):
        outputs = {}
        for name in methods:
            times[name].append([])
        for repeat in range(arguments.repeats):
            names = list(methods)
            turn = (place + repeat) % len(names)
            for name in [*names[turn:], *names[:turn]]:
                with own_time_of_the_controller(own_time):
                    outputs[name], counts, seconds = decoded(loaded, row["prompt"], methods[name])
                times[name][-1].append(seconds)
                spent += seconds if name == "adaptive" else 0.0
                if repeat == 0:
                    stats[name].append(counts)
        identical += all(ids == outputs["autoregressive"] for ids in outputs.values())
        print(f"{place + 1} of {len(rows)}", end="\r", file=sys.stderr, flush=True)
    medians = {name: [median(repeats) for repeats in prompts] for name, prompts in times.items()}
    report(arguments, loaded, rows, medians, stats, identical, own_time[0] / spent)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--copies", type=lambda text: tuple(text.split(",")), default=(), help="int8, int4 or both")
    parser.add_argument("--exits", type=lambda text: parse_counts(text, "exits"), default=())
    parser.add_argument("--specs", type=lambda text: parse_counts(text, "specs"), default=())
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--settle", type=int, default=0, help="tokens of adaptive drafting that are not counted")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", help="a JSON file for the figures")
    return parser.parse_args()


def methods_of(arguments: argparse.Namespace, loaded: Decoder) -> dict[str, DecodingConfig]:
    """Plain, adaptive, lookups, and each draft length with each of the exits, of the copies too, with lookups and without."""
    options: DecodingOptions = {"max_new_tokens": arguments.max_new_tokens}
    layers = loaded.backend.num_layers
    methods = {
        name: resolve({**options, "strategy": name}, loaded.recommended(), layers) for name in ("autoregressive", "adaptive")
    }
    fixed = [
        (weights, exit_layer)
        for weights, side in loaded.backend.draft_sides.items()
        for exit_layer in (*arguments.exits, *([layers] if weights else []))
        if exit_layer <= side.num_layers
    ]
    for spec in arguments.specs:
        methods[f"lookup, {spec} drafts"] = decoding("lookup", options, num_draft_tokens=spec)
        for (weights, exit_layer), lookup in product(fixed, (0, 2)):
            name = f"{drafter_name(weights, exit_layer, layers)}, {spec} drafts{', lookups' if lookup else ''}"
            fixed_exit = {"exit_layer": exit_layer, "num_draft_tokens": spec, "draft_weights": weights, "lookup": lookup}
            methods[name] = decoding("self-speculative", options, **fixed_exit)
    return methods


def decoded(loaded: Decoder, prompt: str, method: DecodingConfig) -> tuple[list[int], DecodeStats, float]:
    """Token ids, counts, and the seconds from the start of the prefill to the last token."""
    started = time.perf_counter()
    decoding = decode(loaded.backend, loaded.encode_prompt(prompt), method, loaded.eos_ids, loaded.detokenize)
    ids = [token for [step] in decoding for token in step.ids]
    return ids, decoding.stats, time.perf_counter() - started


@contextmanager
def own_time_of_the_controller(total: list[float]) -> Iterator[None]:
    """Adds to `total` the seconds that adaptive drafting takes besides drafting."""
    originals: list[tuple[Any, str, Callable[..., Any], int]] = [
        (AdaptiveDrafter, "draft", AdaptiveDrafter.draft, 1),
        (AdaptiveDrafter, "observe", AdaptiveDrafter.observe, 1),
        (ExitDrafter, "draft", ExitDrafter.draft, -1),
    ]
    inside = [0]

    def timed(function: Callable[..., Any], sign: int) -> Callable[..., Any]:
        def run(*values: Any) -> Any:
            if sign < 0 and not inside[0]:  # a fixed drafter
                return function(*values)
            inside[0] += 1
            started = time.perf_counter()
            result = function(*values)
            total[0] += sign * (time.perf_counter() - started)
            inside[0] -= 1
            return result

        return run

    for owner, name, function, sign in originals:
        setattr(owner, name, timed(function, sign))
    try:
        yield
    finally:
        for owner, name, function, _ in originals:
            setattr(owner, name, function)


def report(
    arguments: argparse.Namespace,
    loaded: Decoder,
    rows: list[dict[str, str]],
    times: dict[str, list[float]],
    stats: dict[str, list[DecodeStats]],
    identical: int,
    own_share: float,
) -> None:
    kinds = list(dict.fromkeys(row.get("category", "all") for row in rows))
    print(f"{loaded.name}: {loaded.backend.implementation}, {loaded.backend.dtype}, {torch.get_num_threads()} threads")
    print(f"{identical} of {len(rows)} prompts gave the same tokens by all methods; controller: {own_share:.2%} of the time\n")
    print("| prompts | method | tokens/s | speedup | worst prompt | acceptance | tokens per round | steps by |")
    print("|---|---|---|---|---|---|---|---|")
    figures = []
    for kind in [*kinds, *(["all"] if len(kinds) > 1 else [])]:
        places = [place for place, row in enumerate(rows) if kind in ("all", row.get("category", "all"))]
        plain = [times["autoregressive"][place] for place in places]
        for name in times:
            seconds = [times[name][place] for place in places]
            total = sum((stats[name][place] for place in places), DecodeStats())
            ratios = [before / after for before, after in zip(plain, seconds, strict=True)]
            steps = sum(total.steps_by_drafter.values())
            by = {
                drafter: count / steps for drafter, count in sorted(total.steps_by_drafter.items(), key=lambda item: -item[1])
            }
            figure = {
                "kind": kind, "method": name, "tokens_per_second": total.new_tokens / sum(seconds),
                "speedup": sum(plain) / sum(seconds), "worst": min(ratios), "acceptance": total.acceptance_rate,
                "tokens_per_round": 1 + total.mean_accepted_tokens, "steps_by": by,
            }  # fmt: skip
            figures.append(figure)
            drafted = (f"{total.acceptance_rate:.1%}", f"{1 + total.mean_accepted_tokens:.2f}") if total.drafted else ("-", "-")
            print(
                f"| {kind} | {name} | {figure['tokens_per_second']:.1f} | {figure['speedup']:.2f} | {min(ratios):.2f} | "
                f"{drafted[0]} | {drafted[1]} | {', '.join(f'{drafter} {share:.0%}' for drafter, share in by.items())} |"
            )
    print("\n| prompts | best fixed setting | its speedup | adaptive over it | adaptive's worst prompt over plain |")
    print("|---|---|---|---|---|")
    for kind in dict.fromkeys(figure["kind"] for figure in figures):
        found = {figure["method"]: figure for figure in figures if figure["kind"] == kind}
        adaptive = found.pop("adaptive")
        best = max(found.values(), key=lambda figure: figure["speedup"])
        ratio = adaptive["speedup"] / best["speedup"]
        print(f"| {kind} | {best['method']} | {best['speedup']:.2f} | {ratio:.3f} | {adaptive['worst']:.2f} |")
    of_adaptive = stats["adaptive"]
    print("\nAdaptive drafting, prompt by prompt: " + "; ".join(
        ", ".join(f"{name} {count}" for name, count in sorted(one.steps_by_drafter.items(), key=lambda item: -item[1]))
        for one in of_adaptive
    ))  # fmt: skip
    print(f"Calibration error of its chances: {sum(of_adaptive, DecodeStats()).calibration_error:.1%}")
    if arguments.output:
        document = {
            "model": loaded.name,
            "own_share": own_share,
            "identical": identical,
            "prompts": len(rows),
            "figures": figures,
        }
        Path(arguments.output).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
