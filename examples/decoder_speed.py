"""Measures the speed of decoding on this machine: against transformers, against the memory limit, and between settings.

    python examples/decoder_speed.py PART... [--model FOLDER] [--prompts FILE] [--threads N] [--settings E:D:BITS,...]

Parts:
    throughput   tokens/s of autoregressive and self-speculative decoding at batch sizes 1 and 8
    step         autoregressive decoding by kind of weights, against transformers' generate and the memory limit
    rounds       the cost of a draft step and of a verification
    rows         a pass by its rows: the model's weights, and low-bit copies
    speculation  self-speculative decoding against autoregressive decoding and, with --assistant, both of transformers'
    exact        the price of --exact
    prefill      the first token of prompts of 128, 512 and 2,048 tokens, against transformers
    context      a step at 2,048 tokens of context against one at 128
    memory       peak memory of a process per strategy
    perplexity   perplexity by kind of weights, on the text file --text
    llamacpp     llama.cpp on a --gguf file (needs the package xllamacpp)

Decoding is greedy, at batch size 1 unless the part says otherwise. Times are medians of --repeats runs in one process, in turn,
so that a slow moment of the machine slows all settings. The prompts are the `prompt`, `article` or `text` of a .jsonl file, by
default those of the embedded data set `commands`. Prints a JSON document per part, then a table of targets and measurements.
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

from layerskip_core.checkpoint.loaded import Decoder, decoder_of
from layerskip_core.checkpoint.open import for_decoding, for_training
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import DataConfig, PackingConfig
from layerskip_core.data import load_examples
from layerskip_core.decoding import DecodeStats, decode, decode_batch
from layerskip_core.decoding.drafters import Context, DrafterSetup, drafter_for
from layerskip_core.decoding.sampling import Sampler
from layerskip_core.evaluation.measure.figures import environment
from layerskip_core.model.backend import DraftSide
from layerskip_core.model.vocabulary import most_probable

REPEATS = 5
BATCH_SIZES = (1, 8)
IDS = 256  # random tokens come from the first ids, which every model has


def seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median of `repeats` runs, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return median(times[1:])


def read_bandwidth() -> float:
    """Bytes per second of one pass over 1 GB of fp32: the limit of a step, which reads every weight once."""
    data = torch.ones(1 << 28)
    return data.numel() * 4 / seconds(data.sum)


def prompts_of(arguments: argparse.Namespace, loaded: Decoder) -> list[list[int]]:
    """Token ids of the prompts. Of longer ones the last --prompt-tokens tokens are kept."""
    if arguments.prompts is None:
        texts = [row.prompt for row in load_examples(DataConfig("commands", "test", limit=arguments.samples))]
    else:
        rows = [json.loads(line) for line in Path(arguments.prompts).read_text(encoding="utf-8").splitlines()]
        texts = [next(row[key] for key in ("prompt", "article", "text") if key in row) for row in rows[: arguments.samples]]
    return [loaded.encode_prompt(text)[-arguments.prompt_tokens :] for text in texts]


def load(arguments: argparse.Namespace, **packing: Any) -> Decoder:
    return for_decoding(arguments.model, "cpu", arguments.dtype, PackingConfig(**packing))


def end_ids(loaded: Decoder) -> frozenset[int]:
    """The EOS ids of the embedded model. Other models go on after EOS, so that all their outputs have the same length."""
    return loaded.eos_ids if loaded.name == "embedded" else frozenset()


def decode_all(loaded: Decoder, prompts: list[list[int]], config: DecodingConfig, **options: Any) -> Any:
    """(outputs, stats) of all prompts, one by one."""
    outputs, total = [], DecodeStats()
    for prompt in prompts:
        decoding = decode(loaded.backend, prompt, config, end_ids(loaded), **options)
        outputs.append([token for [step] in decoding for token in step.ids])
        total += decoding.stats
    return outputs, total


def decode_batches(loaded: Decoder, prompts: list[list[int]], config: DecodingConfig, batch_size: int) -> int:
    """The number of new tokens of all prompts, `batch_size` prompts at a time."""
    tokens = 0
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        tokens += sum(len(output.ids) for output in decode_batch(loaded.backend, batch, config, end_ids(loaded)))
    return tokens


def weight_bytes(loaded: Decoder, kind: str) -> float:
    """Bytes of weights that a step reads: all layers and the head, in the precision of this kind of weights."""
    bits = {"int8": 8, "int4": 5}.get(kind, 8 * loaded.backend.dtype.itemsize)
    return loaded.backend.spec.weights_read(1) * bits / 8


def interleave(runs: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each run and its last result. The runs take turns; the first turn is a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    results = {}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            results[name] = run()
            times[name].append(time.perf_counter() - started)
    return {name: median(measured[1:]) for name, measured in times.items()}, results


def passes(backend: Any, layers: int, count: int, context: int, cache: Any = None) -> Callable[[], Tensor]:
    """A function that runs `count` tokens after a context through the first layers and the head, and chooses a token.

    `backend` may be a draft side, if there is a cache.
    """
    new = torch.randint(5, IDS, (context + count,))[context:]
    if cache is None:
        cache = filled_cache(backend, context)
    chain, unembed = (backend.layers, backend.whole.unembed) if isinstance(backend, DraftSide) else (backend, backend.unembed)
    places = cache.span(context, context + count)
    return lambda: most_probable(unembed(chain.run_layers(chain.embed(new), 0, layers, places)))


def filled_cache(backend: Any, context: int) -> Any:
    cache, ids = backend.new_cache(), torch.randint(5, IDS, (context,))
    backend.run_layers(backend.embed(ids), 0, backend.num_layers, cache.span(0, context))
    return cache


@torch.inference_mode()
def pass_seconds(backend: Any, settings: dict[str, tuple[Any, int, int, int]], repeats: int = 30) -> dict[str, float]:
    """Median seconds of each pass, given as (layers of, number of layers, tokens, context), with `backend`'s cache."""
    caches = {context: filled_cache(backend, context) for *_, context in settings.values()}
    runs = {name: passes(*setting, caches[setting[-1]]) for name, setting in settings.items()}
    return interleave(runs, repeats)[0]


def transformers_tokens(model: Any, prompts: list[list[int]], new_tokens: int, **settings: Any) -> int:
    """The number of new tokens of transformers' generate for all prompts."""
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, **settings}
    tokens = 0
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            tokens += int(model.generate(ids, attention_mask=torch.ones_like(ids), **settings).shape[1]) - len(prompt)
    return tokens


KINDS: dict[str, dict[str, Any]] = {"bf16": {}, "int8": {"quantize": "int8"}, "int4": {"quantize": "int4"}}


def part_throughput(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of all prompts, prefill included, by strategy and batch size. Batch size 1 is `decode`."""
    exit_layer, drafts, _ = settings_of(arguments)[0]
    loaded = load(arguments)
    prompts, limit = prompts_of(arguments, loaded), arguments.new_tokens
    configs = {
        "autoregressive": DecodingConfig("autoregressive", max_new_tokens=limit),
        f"self-speculative, exit {exit_layer}, {drafts} drafts": DecodingConfig(
            "self-speculative", exit_layer, drafts, max_new_tokens=limit
        ),
    }
    runs: dict[str, Callable[[], int]] = {}
    for name, config in configs.items():
        runs[f"{name}, batch 1"] = lambda config=config: decode_all(loaded, prompts, config)[1].new_tokens
        for size in BATCH_SIZES[1:]:
            runs[f"{name}, batch {size}"] = lambda config=config, size=size: decode_batches(loaded, prompts, config, size)
    times, tokens = interleave(runs, arguments.repeats)
    rates = {name: tokens[name] / seconds for name, seconds in times.items()}
    baseline = rates["autoregressive, batch 1"]
    table = [
        (f"{name}, over autoregressive batch 1", None, rate / baseline, f"{rate:.1f} tokens/s") for name, rate in rates.items()
    ]
    return {"tokens_per_second": rates, "new_tokens": tokens, "prompts": len(prompts), "table": table}


def part_step(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second by kind of weights, prefill included."""
    bandwidth = read_bandwidth()
    generic = for_training(arguments.model, "cpu", arguments.dtype)
    prompts, count = prompts_of(arguments, decoder_of(generic)), arguments.new_tokens
    config = DecodingConfig("autoregressive", max_new_tokens=count)
    models = {name: load(arguments, **packing) for name, packing in KINDS.items()}
    runs: dict[str, Callable[[], Any]] = {"transformers": lambda: transformers_tokens(generic.model, prompts, count)}
    runs |= {name: lambda loaded=loaded: decode_all(loaded, prompts, config)[1].new_tokens for name, loaded in models.items()}
    times, tokens = interleave(runs, arguments.repeats)
    rates = {name: tokens[name] / seconds for name, seconds in times.items()}
    steps = {name: one_step(loaded.backend) for name, loaded in models.items()}
    shares = {name: weight_bytes(loaded, name) / bandwidth / steps[name] for name, loaded in models.items()}
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
    """Seconds of an autoregressive step."""
    return pass_seconds(backend, {"step": (backend, backend.num_layers, 1, context)})["step"]


@torch.inference_mode()
def one_call_draft(backend: Any, exit_layer: int, count: int, context: int) -> float:
    """Seconds of a token of a greedy draft by the model's own layers."""
    token = torch.randint(5, IDS, (1,))
    config = DecodingConfig(exit_layer=exit_layer)
    drafter = drafter_for(DrafterSetup(backend, Sampler(config, backend.device), config))
    start = Context([0], [token.tolist()], token, filled_cache(backend, context), [0], [context])
    return seconds(lambda: drafter.draft(start, [count]), 60) / count


def part_rows(arguments: argparse.Namespace) -> dict[str, Any]:
    """Passes of all layers and the head over 1, 4, 8 and 16 tokens after 64, over one of one token."""
    backend = load(arguments, draft_weights=("int8", "int4")).backend
    sides = {"own weights": backend, **{weights: side for weights, side in backend.draft_sides.items() if weights}}
    counts = (1, 4, 8, 16)
    cases = {f"{name}, {count} rows": (side, backend.num_layers, count, 64) for name, side in sides.items() for count in counts}
    times = pass_seconds(backend, cases)
    table = [
        (f"{name}, {count} rows over one", None, times[f"{name}, {count} rows"] / one, f"one row: {1000 * one:.2f} ms")
        for name in sides
        for count, one in ((count, times[f"{name}, 1 rows"]) for count in counts[1:])
    ]
    return {"seconds": times, "table": table}


def part_rounds(arguments: argparse.Namespace) -> dict[str, Any]:
    """The cost of a verification and of a draft step, in autoregressive steps."""
    exit_layer = arguments.exit
    drafting = {"draft_weights": ("int4",), "draft_layers": exit_layer, "draft_vocab": arguments.draft_vocab}
    backend = load(arguments, quantize=arguments.quantize, **drafting).backend
    settings = {f"{count} rows": (backend, backend.num_layers, count, 128) for count in (1, 2, 4, 7, 8, 9)}
    settings |= {
        "draft, own weights": (backend, exit_layer, 1, 128),
        "draft, int4": (backend.draft_sides["int4"], exit_layer, 1, 128),
    }
    times = pass_seconds(backend, settings, 60)
    times["draft of 8 in one call, by token"] = one_call_draft(backend, exit_layer, 8, 128)
    one, rest = times["1 rows"], backend.num_layers - exit_layer
    ratio = {name: seconds / one for name, seconds in times.items()}
    table = [
        ("one pass of 4 rows over one row", None, ratio["4 rows"], f"{1000 * times['4 rows']:.2f} ms"),
        ("one pass of 7 rows over one row", -1.15, ratio["7 rows"], f"{1000 * times['7 rows']:.2f} ms"),
        ("one pass of 9 rows over one row", None, ratio["9 rows"], f"{1000 * times['9 rows']:.2f} ms"),
        (f"int4 draft step, E = {exit_layer}", -0.15, ratio["draft, int4"], f"{1000 * times['draft, int4']:.2f} ms"),
        (f"own draft step, E = {exit_layer}", None, ratio["draft, own weights"], f"{rest} layers left"),
        (f"own draft, E = {exit_layer}, by token", None, ratio["draft of 8 in one call, by token"], "as decoding drafts"),
    ]
    return {"step_ms": 1000 * one, "over_step": ratio, "table": table}


def settings_of(arguments: argparse.Namespace) -> list[tuple[int, int, str]]:
    """(exit layer, draft tokens, precision of low-bit drafts or an empty text) of each of --settings."""
    parts = [setting.split(":") for setting in arguments.settings.split(",")]
    return [(int(exit_layer), int(drafts), bits[0] if bits else "") for exit_layer, drafts, *bits in parts]


def part_speculation(arguments: argparse.Namespace) -> dict[str, Any]:
    """Self-speculative against autoregressive decoding, with and without exit-state reuse, and against transformers."""
    settings = settings_of(arguments)
    exit_layer, spec, _ = settings[0]
    loaded = load(arguments)
    prompts = prompts_of(arguments, loaded)
    plain = DecodingConfig("autoregressive", max_new_tokens=arguments.new_tokens)
    first = DecodingConfig("self-speculative", exit_layer, spec, arguments.new_tokens)
    runs: dict[str, Callable[[], Any]] = {
        "autoregressive": lambda: decode_all(loaded, prompts, plain),
        f"E {exit_layer}, d {spec}, without reuse": lambda: decode_all(loaded, prompts, first, reuse_exit_states=False),
    }
    models: dict[str, Decoder] = {"": loaded}
    for layer, drafts, bits in settings:
        if bits not in models:
            layers = max(layer for layer, _, precision in settings if precision == bits)
            models[bits] = load(arguments, draft_weights=(bits,), draft_layers=layers, draft_vocab=arguments.draft_vocab)
        config = DecodingConfig("self-speculative", layer, drafts, arguments.new_tokens, draft_weights=bits or None)
        name = f"E {layer}, d {drafts}" + (f", {bits} drafts" if bits else "")
        runs[name] = lambda model=models[bits], config=config: decode_all(model, prompts, config)
    times, results = interleave(runs, arguments.repeats)
    rates = {name: results[name][1].new_tokens / seconds for name, seconds in times.items()}
    expected = results["autoregressive"][0]
    same = {
        name: sum(ids == other for ids, other in zip(outputs, expected, strict=True)) for name, (outputs, _) in results.items()
    }
    acceptance = {name: stats.acceptance_rate for name, (_, stats) in results.items()}
    table: list[Any] = [("autoregressive", None, 1.0, f"{rates['autoregressive']:.1f} tokens/s")]
    for name in list(runs)[1:]:
        note = f"{rates[name]:.1f} tokens/s; {acceptance[name]:.0%} accepted; {same[name]}/{len(prompts)} identical"
        table.append((f"{name} over autoregressive", None, rates[name] / rates["autoregressive"], note))
    if arguments.assistant:
        best = max(list(runs)[1:], key=lambda name: rates[name])
        length = max(1, results["autoregressive"][1].new_tokens // len(prompts))
        for name, rate in transformers_rates(arguments, prompts[:4], length, exit_layer, spec).items():
            rates[name] = rate
            table.append((f"{best} over {name}", None, rates[best] / rate, f"{rate:.1f} tokens/s"))
    return {"tokens_per_second": rates, "acceptance": acceptance, "identical": same, "prompts": len(prompts), "table": table}


def transformers_rates(
    arguments: argparse.Namespace, prompts: list[list[int]], new_tokens: int, exit_layer: int, drafts: int
) -> dict[str, float]:
    """Tokens per second of transformers' generate, autoregressive and with its own early-exit drafts."""
    model = for_training(arguments.model, "cpu", arguments.dtype).model
    assistant = {"assistant_early_exit": exit_layer, "num_assistant_tokens": drafts}
    runs: dict[str, Callable[[], Any]] = {
        "transformers generate": lambda: transformers_tokens(model, prompts, new_tokens),
        "assistant_early_exit": lambda: transformers_tokens(model, prompts, new_tokens, **assistant),
    }
    times, tokens = interleave(runs, min(3, arguments.repeats))
    return {name: tokens[name] / seconds for name, seconds in times.items()}


def part_exact(arguments: argparse.Namespace) -> dict[str, Any]:
    """Autoregressive and self-speculative decoding with and without --exact."""
    exit_layer, spec, _ = settings_of(arguments)[0]
    models = {"": load(arguments), " --exact": load(arguments, exact=True)}
    prompts = prompts_of(arguments, models[""])[:4]
    configs = {
        "autoregressive": DecodingConfig("autoregressive", max_new_tokens=64),
        "self-speculative": DecodingConfig("self-speculative", exit_layer, spec, 64),
    }
    runs = {
        strategy + flag: lambda loaded=loaded, config=config: decode_all(loaded, prompts, config)
        for flag, loaded in models.items()
        for strategy, config in configs.items()
    }
    times, results = interleave(runs, arguments.repeats)
    rates = {name: results[name][1].new_tokens / seconds for name, seconds in times.items()}
    table: list[Any] = []
    for strategy in configs:
        exact = f"{strategy} --exact"
        table.append(
            (f"price of --exact, {strategy}", None, rates[strategy] / rates[exact] - 1, f"{rates[exact]:.1f} tokens/s")
        )
    same = {}
    for flag in models:
        pairs = zip(results["autoregressive" + flag][0], results["self-speculative" + flag][0], strict=True)
        same[flag] = sum(ids == drafted for ids, drafted in pairs)
        share = same[flag] / len(prompts)
        table.append((f"self-speculative outputs identical{flag}", None, share, f"of {len(prompts)} prompts"))
    return {"tokens_per_second": rates, "identical": same, "prompts": len(prompts), "table": table}


def part_prefill(arguments: argparse.Namespace) -> dict[str, Any]:
    """The time to the first token by the length of the prompt, which is random, against transformers' generate."""
    loaded = load(arguments)
    model = for_training(arguments.model, "cpu", arguments.dtype).model
    one, rates, ratios, table = DecodingConfig("autoregressive", max_new_tokens=1), {}, {}, []
    for length, goal in ((128, 1.8), (512, 2.0), (2048, 2.0)):
        if length >= loaded.backend.spec.context:
            continue
        prompt = torch.randint(5, IDS, (length,)).tolist()
        runs: dict[str, Callable[[], Any]] = {
            "layerskip": lambda prompt=prompt: decode_all(loaded, [prompt], one),
            "transformers": lambda prompt=prompt: transformers_tokens(model, [prompt], 1),
        }
        times, _ = interleave(runs, arguments.repeats)
        rates[length] = {name: length / seconds for name, seconds in times.items()}
        ratios[length] = times["transformers"] / times["layerskip"]
        note = f"{1000 * times['layerskip']:.1f} over {1000 * times['transformers']:.1f} ms"
        table.append((f"prompt of {length:,} tokens, over transformers", goal, ratios[length], note))
    return {"tokens_per_second": rates, "ratio": ratios, "table": table}


def part_context(arguments: argparse.Namespace) -> dict[str, Any]:
    """A step with a long context against one with a short context."""
    backend = load(arguments).backend
    long = min(2048, backend.spec.context - 1)
    times = pass_seconds(backend, {str(context): (backend, backend.num_layers, 1, context) for context in (128, long)})
    note = f"{1000 * times[str(long)]:.2f} over {1000 * times['128']:.2f} ms"
    return {"step_seconds": times, "table": [(f"context {long:,} over 128", -1.3, times[str(long)] / times["128"], note)]}


def part_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak resident memory of a process that loads the model, and of one for each strategy."""
    peaks = {}
    options = [argument for argument in sys.argv[1:] if argument not in PARTS]
    for work in ("load", "autoregressive", "self-speculative"):
        command = [sys.executable, __file__, "peak", "--work", work, *options]
        peaks[work] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    ratio = peaks["self-speculative"] / peaks["autoregressive"]
    note = f"{peaks['self-speculative']:.0f} over {peaks['autoregressive']:.0f} MB"
    return {"peak_mb": peaks, "table": [("peak memory, self-speculative over autoregressive", -1.05, ratio, note)]}


def print_peak(arguments: argparse.Namespace) -> None:
    """Does the --work of one process of `part_memory`, and prints the process's peak memory in MB."""
    loaded = load(arguments)
    exit_layer, spec, _ = settings_of(arguments)[0]
    if arguments.work != "load":
        decode_all(loaded, prompts_of(arguments, loaded)[:2], DecodingConfig(arguments.work, exit_layer, spec, 64))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def part_perplexity(arguments: argparse.Namespace) -> dict[str, Any]:
    """Perplexity by kind of weights, over the first --tokens tokens of a text file, in independent windows of 512."""
    text = Path(arguments.text).read_text(encoding="utf-8")[: 8 * arguments.tokens]
    perplexities = {}
    for name, packing in KINDS.items():
        loaded = load(arguments, **packing)
        ids = torch.tensor(loaded.tokenizer(text)["input_ids"])[: arguments.tokens]
        losses = []
        with torch.inference_mode():
            for window in ids.split(512):
                backend = loaded.backend
                places = backend.new_cache(1, len(window)).span(0, len(window))
                hidden = backend.run_layers(backend.embed(window), 0, backend.num_layers, places)
                logits = backend.unembed(hidden)[:-1].float()
                losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
        perplexities[name] = float(torch.cat(losses).mean().exp())
    table = [(f"perplexity, {name}", None, value, f"{len(ids)} tokens") for name, value in perplexities.items()]
    return {"tokens": len(ids), "perplexity": perplexities, "table": table}


def part_llamacpp(arguments: argparse.Namespace) -> dict[str, Any]:
    """llama.cpp on a GGUF file, by its own timings."""
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
    "throughput": part_throughput, "step": part_step, "rounds": part_rounds, "rows": part_rows, "speculation": part_speculation,
    "prefill": part_prefill, "exact": part_exact, "context": part_context, "memory": part_memory, "perplexity": part_perplexity,
    "llamacpp": part_llamacpp,
}  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "peak"], metavar="PART")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--prompts", help="a .jsonl file")
    parser.add_argument("--text", help="a text file, for perplexity")
    parser.add_argument("--gguf", help="a file, for llamacpp")
    parser.add_argument("--work", default="autoregressive", help=argparse.SUPPRESS)  # of a process of `memory`
    parser.add_argument(
        "--settings", default="2:7", help="exit layer:drafts[:int8 or int4 drafts], comma-separated; the first is the main one"
    )
    parser.add_argument("--assistant", action="store_true", help="speculation: measure transformers, too")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="rounds: the target's weights")
    for flag, default in (("threads", 0), ("exit", 8), ("draft-vocab", 0), ("samples", 16), ("repeats", REPEATS)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    for flag, default in (("new-tokens", 128), ("prompt-tokens", 512), ("tokens", 4096)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if "peak" in arguments.parts:
        return print_peak(arguments)
    table: list[Any] = []
    for part in arguments.parts:
        result = PARTS[part](arguments)
        table += result.pop("table")
        print(json.dumps({"part": part, "model": arguments.model, **result}, default=float), flush=True)
    machine = environment(load(arguments))
    print(json.dumps({key: machine[key] for key in ("cpu", "threads", "dtype", "load_average", "implementation")}))
    print("| measurement | target | measured | absolute |\n|---|---|---|---|")
    for name, goal, value, note in table:
        target = "" if goal is None else f"at most {-goal}" if goal < 0 else f"at least {goal}"
        print(f"| {name} | {target} | {value:.3g} | {note} |")


if __name__ == "__main__":
    main()
