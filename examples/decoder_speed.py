"""How fast the decoder is on this machine, in ratios of one run: against transformers, the memory limit and itself.

    python examples/decoder_speed.py PART... [--model FOLDER] [--prompts FILE] [--gguf FILE] [--threads N] [--ways E:D:BITS,...]

Parts: `step` (autoregressive decoding by kind of weights, against transformers' generate and the memory limit), `rounds` (the
cost of a draft step and of a verification), `speculation` (self-speculative against autoregressive and both of transformers'),
`exact` (the price of --exact), `context` (2,048 tokens against 128), `memory`, `perplexity`, `llamacpp` (needs the package
xllamacpp, and a .gguf file). Greedy, batch 1; medians of --repeats runs, taken in turns so that what disturbs the machine
disturbs all of them. Prompts: lines of a .jsonl (`prompt`, `article` or `text`), else of the embedded `commands`. Prints one
JSON document a part, then a table of what was measured beside what was aimed at.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from layerskip_core.checkpoint.load import for_decoding, for_training
from layerskip_core.checkpoint.loaded import Decoder, decoder_of
from layerskip_core.config.data import DataConfig
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.packing import PackingConfig
from layerskip_core.data.examples import load_examples
from layerskip_core.decoding import DecodeStats, decode
from layerskip_core.evaluation.measure.environment import environment
from layerskip_core.model.drafting import most_probable

REPEATS = 5


def seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median of some runs behind one that warms up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return median(times[1:])


def read_bandwidth() -> float:
    """Bytes a second that one pass over 1 GB of fp32 reads: the limit of a step that reads every weight once."""
    data = torch.ones(1 << 28)
    return data.numel() * 4 / seconds(data.sum)


def prompts_of(arguments: argparse.Namespace, loaded: Decoder) -> list[list[int]]:
    """Token ids of the prompts; texts that leave no room for the answer are cut at their start."""
    if arguments.prompts is None:
        texts = [row.prompt for row in load_examples(DataConfig("commands", "test", limit=arguments.samples))]
    else:
        rows = [json.loads(line) for line in Path(arguments.prompts).read_text(encoding="utf-8").splitlines()]
        texts = [next(row[key] for key in ("prompt", "article", "text") if key in row) for row in rows[: arguments.samples]]
    return [loaded.encode_prompt(text)[-arguments.prompt_tokens :] for text in texts]


def load(arguments: argparse.Namespace, **packing: Any) -> Decoder:
    return for_decoding(arguments.model, "cpu", arguments.dtype, PackingConfig(**packing))


def decoded(loaded: Decoder, prompts: list[list[int]], config: DecodingConfig, **settings: Any) -> Any:
    """(outputs, stats) of all prompts; no EOS, so that every output has the same length, unless the model is embedded."""
    outputs, total = [], DecodeStats()
    for prompt in prompts:
        decoding = decode(
            loaded.backend, prompt, config, loaded.eos_ids if loaded.name == "embedded" else frozenset(), **settings
        )
        outputs.append([token.id for tokens in decoding for token in tokens])
        total += decoding.stats
    return outputs, total


def weight_bytes(loaded: Decoder) -> float:
    """Bytes of weights that a step reads: all layers and the head, by the precision they are kept in."""
    spec = loaded.backend.spec
    attention = 2 * spec.hidden * (spec.queries + spec.keys)
    count = spec.layers * (attention + 3 * spec.hidden * spec.inner) + spec.hidden * spec.vocab
    bits = {"int8": 8, "int4": 5}.get(loaded.backend._quantize, 8 * loaded.backend.dtype.itemsize)
    return count * bits / 8


def in_turns(ways: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each way, run in turns behind one turn that warms up, and its last result."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            results[name] = way()
            times[name].append(time.perf_counter() - started)
    return {name: median(found[1:]) for name, found in times.items()}, results


def passes(backend: Any, layers: int, count: int, context: int, cache: Any = None) -> Callable[[], Tensor]:
    """One pass of `count` tokens behind a context, through the first layers and the head, with the choice of a token."""
    ids = torch.randint(5, min(1000, backend.vocab_size), (1, context + count))
    positions = torch.arange(context + count)[None]
    if cache is None:
        cache = filled_cache(backend, context)
    new, places = ids[:, context:], positions[:, context:]
    return lambda: most_probable(backend.unembed(backend.run_layers(backend.embed(new), 0, layers, places, cache)))


def filled_cache(backend: Any, context: int) -> Any:
    cache, ids = backend.new_cache(), torch.randint(5, min(1000, backend.vocab_size), (1, context))
    backend.run_layers(backend.embed(ids), 0, backend.num_layers, torch.arange(context)[None], cache)
    return cache


@torch.inference_mode()
def pass_seconds(backend: Any, settings: dict[str, tuple[Any, int, int, int]], repeats: int = 30) -> dict[str, float]:
    """Median seconds of passes by name, each (model, layers, tokens, context), in turns; the cache is `backend`'s."""
    caches = {context: filled_cache(backend, context) for *_, context in settings.values()}
    ways = {name: passes(*setting, caches[setting[-1]]) for name, setting in settings.items()}
    return in_turns(ways, repeats)[0]


def transformers_decoded(model: Any, prompts: list[list[int]], new_tokens: int, **settings: Any) -> int:
    """How many tokens transformers' own generate gave for all prompts."""
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, **settings}
    tokens = 0
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            tokens += int(model.generate(ids, attention_mask=torch.ones_like(ids), **settings).shape[1]) - len(prompt)
    return tokens


KINDS: dict[str, dict[str, Any]] = {"bf16": {}, "int8": {"quantize": "int8"}, "int4": {"quantize": "int4"}}


def part_step(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second by kind of weights, prefill included."""
    bandwidth = read_bandwidth()
    generic = for_training(arguments.model, "cpu", arguments.dtype)
    prompts, count = prompts_of(arguments, decoder_of(generic)), arguments.new_tokens
    config = DecodingConfig("autoregressive", max_new_tokens=count)
    models = {name: load(arguments, **packing) for name, packing in KINDS.items()}
    ways: dict[str, Callable[[], Any]] = {"transformers": lambda: transformers_decoded(generic.model, prompts, count)}
    ways |= {name: lambda loaded=loaded: decoded(loaded, prompts, config)[1].new_tokens for name, loaded in models.items()}
    times, tokens = in_turns(ways, arguments.repeats)
    rates = {name: tokens[name] / seconds for name, seconds in times.items()}
    steps = {name: one_step(loaded.backend) for name, loaded in models.items()}
    shares = {name: weight_bytes(loaded) / bandwidth / steps[name] for name, loaded in models.items()}
    table = [
        (f"autoregressive {name} over transformers", goal, rates[name] / rates["transformers"], f"{rates[name]:.1f} tokens/s")
        for name, goal in (("bf16", 2.5), ("int8", 3.5), ("int4", 5.0))
    ]
    table[0] = (*table[0][:3], f"{rates['bf16']:.1f} tokens/s; transformers {rates['transformers']:.1f}")
    step = f"step {1000 * steps['bf16']:.2f} ms; {bandwidth / 1e9:.1f} GB/s"
    table.append(("share of the memory limit, bf16", 0.82, shares["bf16"], step))
    return {
        "read_gb_per_second": bandwidth / 1e9,
        "tokens_per_second": rates,
        "step_ms": {name: 1000 * seconds for name, seconds in steps.items()},
        "share_of_memory_limit": shares,
        "table": table,
    }


def one_step(backend: Any, context: int = 128) -> float:
    return pass_seconds(backend, {"one": (backend, backend.num_layers, 1, context)})["one"]


def part_rounds(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a verification and a draft step cost, in autoregressive steps."""
    exit_layer = arguments.exit
    backend = load(arguments, draft_weights="int4", draft_layers=exit_layer, draft_vocab=arguments.draft_vocab).backend
    settings = {f"{count} rows": (backend, backend.num_layers, count, 128) for count in (1, 2, 4, 7, 8, 9)}
    settings |= {"draft, own weights": (backend, exit_layer, 1, 128), "draft, int4": (backend.draft_side, exit_layer, 1, 128)}
    times = pass_seconds(backend, settings, 60)
    one, rest = times["1 rows"], backend.num_layers - exit_layer
    ratio = {name: seconds / one for name, seconds in times.items()}
    table = [
        ("one pass of 7 rows over one row", -1.15, ratio["7 rows"], f"{1000 * times['7 rows']:.2f} ms"),
        (f"int4 draft step, E = {exit_layer}", -0.15, ratio["draft, int4"], f"{1000 * times['draft, int4']:.2f} ms"),
        (f"own draft step, E = {exit_layer}", None, ratio["draft, own weights"], f"{rest} layers left"),
    ]
    return {"step_ms": 1000 * one, "over_step": ratio, "table": table}


def part_speculation(arguments: argparse.Namespace) -> dict[str, Any]:
    """Self-speculation against plain decoding, with and without reuse, and against transformers' two ways."""
    ways_asked = [way.split(":") for way in arguments.ways.split(",")]
    exit_layer, spec = int(ways_asked[0][0]), int(ways_asked[0][1])
    loaded = load(arguments)
    prompts = prompts_of(arguments, loaded)
    plain = DecodingConfig("autoregressive", max_new_tokens=arguments.new_tokens)
    first = DecodingConfig("self-speculative", exit_layer, spec, arguments.new_tokens)
    ways: dict[str, Callable[[], Any]] = {
        "autoregressive": lambda: decoded(loaded, prompts, plain),
        f"E {exit_layer}, d {spec}, recomputed": lambda: decoded(loaded, prompts, first, reuse_exit_states=False),
    }
    kept: dict[str, Decoder] = {"": loaded}
    for exit_text, drafts, *rest in ways_asked:
        bits = rest[0] if rest else ""
        layers = max(int(way[0]) for way in ways_asked if way[2:] == [bits]) if bits else 0
        if bits not in kept:
            kept[bits] = load(arguments, draft_weights=bits, draft_layers=layers, draft_vocab=arguments.draft_vocab)
        config = DecodingConfig("self-speculative", int(exit_text), int(drafts), arguments.new_tokens)
        name = f"E {exit_text}, d {drafts}" + (f", {bits} drafts" if bits else "")
        ways[name] = lambda mine=kept[bits], config=config: decoded(mine, prompts, config)
    times, results = in_turns(ways, arguments.repeats)
    rates = {name: results[name][1].new_tokens / seconds for name, seconds in times.items()}
    same = {
        name: sum(a == b for a, b in zip(found[0], results["autoregressive"][0], strict=True))
        for name, found in results.items()
    }
    acceptance = {name: found[1].acceptance_rate for name, found in results.items()}
    table: list[Any] = [("autoregressive", None, 1.0, f"{rates['autoregressive']:.1f} tokens/s")]
    for name in list(ways)[1:]:
        note = f"{rates[name]:.1f} tokens/s; {acceptance[name]:.0%} accepted; {same[name]}/{len(prompts)} identical"
        table.append((f"{name} over autoregressive", None, rates[name] / rates["autoregressive"], note))
    best = max(list(ways)[1:], key=lambda name: rates[name])
    if arguments.assistant:
        generic = for_training(arguments.model, "cpu", arguments.dtype)
        length = max(1, results["autoregressive"][1].new_tokens // len(prompts))
        assistant = {"assistant_early_exit": exit_layer, "num_assistant_tokens": spec}
        theirs: dict[str, Callable[[], Any]] = {
            "transformers generate": lambda: transformers_decoded(generic.model, prompts[:4], length),
            "assistant_early_exit": lambda: transformers_decoded(generic.model, prompts[:4], length, **assistant),
        }
        their_times, tokens = in_turns(theirs, min(3, arguments.repeats))
        for name, seconds in their_times.items():
            rates[name] = tokens[name] / seconds
            table.append((f"{best} over {name}", None, rates[best] / rates[name], f"{rates[name]:.1f} tokens/s"))
    return {"tokens_per_second": rates, "acceptance": acceptance, "identical": same, "prompts": len(prompts), "table": table}


def part_exact(arguments: argparse.Namespace) -> dict[str, Any]:
    """Plain and speculative decoding with and without --exact."""
    exit_layer, spec = (int(number) for number in arguments.ways.split(",")[0].split(":")[:2])
    models = {"": load(arguments), " --exact": load(arguments, exact=True)}
    prompts = prompts_of(arguments, models[""])[:4]
    configs = {
        "autoregressive": DecodingConfig("autoregressive", max_new_tokens=64),
        "self-speculative": DecodingConfig("self-speculative", exit_layer, spec, 64),
    }
    ways = {
        way + flag: lambda loaded=loaded, config=config: decoded(loaded, prompts, config)
        for flag, loaded in models.items()
        for way, config in configs.items()
    }
    times, results = in_turns(ways, arguments.repeats)
    rates = {name: results[name][1].new_tokens / seconds for name, seconds in times.items()}
    table: list[Any] = []
    for way in configs:
        price = rates[way] / rates[way + " --exact"] - 1
        table.append((f"price of --exact, {way}", None, price, f"{rates[way + ' --exact']:.1f} tokens/s"))
    same = {
        flag: sum(
            a == b for a, b in zip(results["autoregressive" + flag][0], results["self-speculative" + flag][0], strict=True)
        )
        for flag in models
    }
    for flag, count in same.items():
        table.append((f"self-speculative output identical{flag}", None, count / len(prompts), f"of {len(prompts)} prompts"))
    return {"tokens_per_second": rates, "identical": same, "prompts": len(prompts), "table": table}


def part_context(arguments: argparse.Namespace) -> dict[str, Any]:
    backend = load(arguments).backend
    long = min(2048, backend.max_positions - 1)
    times = pass_seconds(backend, {str(context): (backend, backend.num_layers, 1, context) for context in (128, long)})
    note = f"{1000 * times[str(long)]:.2f} over {1000 * times['128']:.2f} ms"
    return {"step_seconds": times, "table": [(f"context {long:,} over 128", -1.3, times[str(long)] / times["128"], note)]}


def part_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak resident memory of a process of its own for each way."""
    peaks = {}
    rest = [argument for argument in sys.argv[1:] if argument not in (*PARTS, "all")]
    for way in ("load", "autoregressive", "self-speculative"):
        command = [sys.executable, __file__, "peak", "--way", way, *rest]
        peaks[way] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    ratio = peaks["self-speculative"] / peaks["autoregressive"]
    note = f"{peaks['self-speculative']:.0f} over {peaks['autoregressive']:.0f} MB"
    return {"peak_mb": peaks, "table": [("peak memory, self-speculative over autoregressive", -1.05, ratio, note)]}


def peak(arguments: argparse.Namespace) -> None:
    loaded = load(arguments)
    exit_layer, spec = (int(number) for number in arguments.ways.split(",")[0].split(":")[:2])
    if arguments.way != "load":
        decoded(loaded, prompts_of(arguments, loaded)[:2], DecodingConfig(arguments.way, exit_layer, spec, 64))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def part_perplexity(arguments: argparse.Namespace) -> dict[str, Any]:
    """By kind of weights, over the first tokens of a text file, in pieces of 512 that see nothing of each other."""
    text = Path(arguments.text).read_text(encoding="utf-8")[: 8 * arguments.tokens]
    found = {}
    for name, packing in KINDS.items():
        loaded = load(arguments, **packing)
        ids = torch.tensor(loaded.tokenizer(text)["input_ids"])[: arguments.tokens]
        losses = []
        with torch.inference_mode():
            for piece in ids.split(512):
                tokens, places = piece[None], torch.arange(len(piece))[None]
                hidden = loaded.backend.run_layers(loaded.backend.embed(tokens), 0, loaded.backend.num_layers, places)
                logits = loaded.backend.unembed(hidden)[0, :-1].float()
                losses.append(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="none"))
        found[name] = float(torch.cat(losses).mean().exp())
    table = [(f"perplexity, {name}", None, value, f"{len(ids)} tokens") for name, value in found.items()]
    return {"tokens": len(ids), "perplexity": found, "table": table}


def part_llamacpp(arguments: argparse.Namespace) -> dict[str, Any]:
    """llama.cpp on a GGUF file, by its own count of a completion's time."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = arguments.gguf
    settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = 2048, 1, arguments.threads or torch.get_num_threads()
    server = xllamacpp.Server(settings)
    request = {"prompt": "The history of the town begins", "n_predict": 128, "temperature": 0, "ignore_eos": True}
    rates = [server.handle_completions(request)["timings"]["predicted_per_second"] for _ in range(3)]
    name = Path(arguments.gguf).name
    return {
        "gguf": name,
        "tokens_per_second": median(rates),
        "table": [(f"llama.cpp, {name}", None, median(rates), "tokens/s")],
    }


PARTS = {
    "step": part_step, "rounds": part_rounds, "speculation": part_speculation, "exact": part_exact,
    "context": part_context, "memory": part_memory, "perplexity": part_perplexity, "llamacpp": part_llamacpp,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "peak"])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--prompts", help="a .jsonl file")
    parser.add_argument("--text", help="a text file, for perplexity")
    parser.add_argument("--gguf", help="for llamacpp")
    parser.add_argument("--way", default="autoregressive")
    parser.add_argument(
        "--ways", default="2:7", help="E:D or E:D:BITS, comma-separated; the first is compared with transformers"
    )
    parser.add_argument("--assistant", action="store_true", help="speculation: measure transformers' ways too")
    parser.add_argument("--dtype", default="auto")
    for flag, default in (("threads", 0), ("exit", 8), ("draft-vocab", 0), ("samples", 16), ("repeats", REPEATS)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    for flag, default in (("new-tokens", 128), ("prompt-tokens", 512), ("tokens", 4096)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if "peak" in arguments.parts:
        return peak(arguments)
    table: list[Any] = []
    for part in arguments.parts:
        result = PARTS[part](arguments)
        table += result.pop("table")
        print(json.dumps({"part": part, "model": arguments.model, **result}, default=float), flush=True)
    machine = environment(load(arguments))
    kept = {key: machine[key] for key in ("cpu", "threads", "dtype", "load_average")}
    print(json.dumps({**kept, "implementation": load(arguments).backend.implementation}))
    print("| what | target | measured | absolute |\n|---|---|---|---|")
    for what, goal, found, note in table:
        aim = "" if goal is None else f"at most {-goal}" if goal < 0 else f"at least {goal}"
        print(f"| {what} | {aim} | {found:.3g} | {note} |")


if __name__ == "__main__":
    main()
