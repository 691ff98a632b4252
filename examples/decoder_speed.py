"""How fast the decoder is on this machine, in ratios of one run: against transformers, the memory limit and itself.

    python examples/decoder_speed.py PART [--model FOLDER] [--prompts FILE] [--gguf FILE] [--threads N] [--exit E --spec D]

Parts: `step` (autoregressive steps by kind of weights, against transformers' generate and the memory limit), `rounds` (the
cost of a draft step and of a verification), `speculation` (self-speculative against autoregressive and both of transformers'),
`context` (2,048 tokens against 128), `memory`, `perplexity`, `llamacpp` (needs the package xllamacpp). Medians of 5, warm, 128
new tokens, greedy, batch 1. Prompts: 16 lines of a .jsonl (`prompt`, `article` or `text`), else of the embedded `commands`.
Prints one JSON document a part.
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

from layerskip_core.checkpoint import LoadedModel, load_checkpoint
from layerskip_core.config import DataConfig, DecodingConfig, PackingConfig
from layerskip_core.data import load_examples
from layerskip_core.decoding import DecodeStats, decode
from layerskip_core.evaluation.record import environment
from layerskip_core.model.linear import prepacks

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


def prompts_of(arguments: argparse.Namespace, loaded: LoadedModel) -> list[list[int]]:
    """Token ids of the prompts; texts that leave no room for the answer are cut at their start."""
    if arguments.prompts is None:
        texts = [row.prompt for row in load_examples(DataConfig("commands", "test", limit=arguments.samples))]
    else:
        rows = [json.loads(line) for line in Path(arguments.prompts).read_text(encoding="utf-8").splitlines()]
        texts = [next(row[key] for key in ("prompt", "article", "text") if key in row) for row in rows[: arguments.samples]]
    return [loaded.encode_prompt(text)[-arguments.prompt_tokens :] for text in texts]


def load(arguments: argparse.Namespace, **packing: Any) -> LoadedModel:
    return load_checkpoint(arguments.model, "cpu", arguments.dtype, implementation="auto", packing=PackingConfig(**packing))


def decoded(loaded: LoadedModel, prompts: list[list[int]], config: DecodingConfig, **settings: Any) -> Any:
    """(outputs, stats) of all prompts; no EOS, so that every output has the same length, unless the model is embedded."""
    outputs, total = [], DecodeStats()
    for prompt in prompts:
        decoding = decode(
            loaded.depth, prompt, config, loaded.eos_ids if loaded.name == "embedded" else frozenset(), **settings
        )
        outputs.append([token.id for tokens in decoding for token in tokens])
        total += decoding.stats
    return outputs, total


def weight_bytes(loaded: LoadedModel) -> float:
    """Bytes of weights that a step reads: all layers and the head, by the precision they are kept in."""
    config, size = loaded.depth.config, loaded.depth.hidden_size
    heads, width = config.num_attention_heads, loaded.depth._layers[0].head_dim
    attention = size * width * (2 * heads + 2 * config.num_key_value_heads)
    count = config.num_hidden_layers * (attention + 3 * size * config.intermediate_size) + size * loaded.depth.vocab_size
    bits = {"int8": 8, "int4": 5}.get(loaded.depth._quantize, 8 * loaded.depth.dtype.itemsize)
    return count * bits / 8


def step_seconds(depth: Any, layers: int, count: int, context: int) -> float:
    """One pass of `count` tokens behind a context, through the first layers and the head, with its argmax."""
    with torch.inference_mode():
        cache, positions = depth.new_cache(), torch.arange(context + count)[None]
        ids = torch.randint(5, min(1000, depth.vocab_size), (1, context + count))
        depth.run_layers(depth.embed(ids[:, :context]), 0, depth.num_layers, positions[:, :context], cache)
        new, places = ids[:, context:], positions[:, context:]

        def step() -> None:
            for _ in range(10):
                depth.unembed(depth.run_layers(depth.embed(new), 0, layers, places, cache)).argmax(-1)

        return seconds(step, 7) / 10


def transformers_seconds(model: Any, prompts: list[list[int]], new_tokens: int, **settings: Any) -> float:
    """Seconds a new token, prefill included, of transformers' own generate."""
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, **settings}

    def one(prompt: list[int]) -> int:
        ids = torch.tensor([prompt])
        return int(model.generate(ids, attention_mask=torch.ones_like(ids), **settings).shape[1]) - len(prompt)

    with torch.inference_mode():
        one(prompts[0])
        started = time.perf_counter()
        return (tokens := sum(map(one, prompts))) and (time.perf_counter() - started) / tokens


def part_step(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second by kind of weights. Absolute figures beside every ratio."""
    bandwidth = read_bandwidth()
    generic = load_checkpoint(arguments.model, "cpu", arguments.dtype)
    prompts = prompts_of(arguments, generic)
    baseline = transformers_seconds(generic.model, prompts[:2], 32)
    del generic
    rows = {"transformers generate": {"tokens_per_second": 1 / baseline}}
    config = DecodingConfig("autoregressive", max_new_tokens=32)
    for name, packing in {"packed": {}, "int8": {"quantize": "int8"}, "int4": {"quantize": "int4"}}.items():
        loaded = load(arguments, **packing)
        step = step_seconds(loaded.depth, loaded.depth.num_layers, 1, 128)
        whole = decoded(loaded, prompts[:2], config)[1]
        rows[name] = {
            "implementation": loaded.depth.implementation,
            "tokens_per_second": whole.tokens_per_second,
            "over_transformers": whole.tokens_per_second * baseline,
            "step_ms": 1000 * step,
            "share_of_memory_limit": weight_bytes(loaded) / bandwidth / step,
        }
    return {"read_gb_per_second": bandwidth / 1e9, "rows": rows}


def part_rounds(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a verification and a low-bit draft step cost, in autoregressive steps."""
    loaded = load(arguments, draft_weights="int4", draft_layers=arguments.exit, draft_vocab=arguments.draft_vocab)
    depth = loaded.depth
    one = step_seconds(depth, depth.num_layers, 1, 128)
    rows = {count: step_seconds(depth, depth.num_layers, count, 128) / one for count in (2, 4, 7, 8)}
    own = step_seconds(depth, arguments.exit, 1, 128)
    low = step_seconds_of_draft(depth, arguments.exit)
    return {
        "step_ms": 1000 * one,
        "verification_of_rows_over_step": rows,
        "draft_step_over_step": {"own weights": own / one, f"int4, {arguments.draft_vocab or 'all'} rows": low / one},
    }


def step_seconds_of_draft(depth: Any, layers: int) -> float:
    """A draft step by the low-bit copy, on the cache of the model that it drafts for."""
    with torch.inference_mode():
        cache, places = depth.new_cache(), torch.arange(129)[None]
        ids = torch.randint(5, 1000, (1, 129))
        depth.run_layers(depth.embed(ids), 0, depth.num_layers, places, cache)

        def step() -> None:
            for _ in range(10):
                hidden = depth.draft.run_layers(depth.draft.embed(ids[:, 128:]), 0, layers, places[:, 128:], cache)
                depth.draft.unembed(hidden).argmax(-1)

        return seconds(step, 7) / 10


def part_speculation(arguments: argparse.Namespace) -> dict[str, Any]:
    """Self-speculation at (E, d) against plain decoding, with and without reuse, and against transformers' two ways."""
    loaded = load(arguments)
    prompts = prompts_of(arguments, loaded)
    plain = DecodingConfig("autoregressive", max_new_tokens=arguments.new_tokens)
    drafting = DecodingConfig("self-speculative", arguments.exit, arguments.spec, arguments.new_tokens)
    ways: dict[str, Callable[[], Any]] = {
        "autoregressive": lambda: decoded(loaded, prompts, plain),
        "self-speculative": lambda: decoded(loaded, prompts, drafting),
        "self-speculative, exit states recomputed": lambda: decoded(loaded, prompts, drafting, reuse_exit_states=False),
    }
    for bits in ("int8", "int4"):
        low = load(arguments, draft_weights=bits, draft_layers=arguments.exit, draft_vocab=arguments.draft_vocab)
        ways[f"self-speculative, {bits} drafts"] = lambda low=low: decoded(low, prompts, drafting)
    outputs: dict[str, Any] = {}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.repeats + 1):
        for name, way in ways.items():
            outputs[name] = way()
            speeds[name].append(outputs[name][1].tokens_per_second)
    rates = {name: median(speed[1:]) for name, speed in speeds.items()}
    rows: dict[str, dict[str, float]] = {
        name: {
            "tokens_per_second": rate,
            "over_autoregressive": rate / rates["autoregressive"],
            "acceptance": outputs[name][1].acceptance_rate,
            "identical_outputs": sum(a == b for a, b in zip(outputs[name][0], outputs["autoregressive"][0], strict=True)),
        }
        for name, rate in rates.items()
    }
    generic = load_checkpoint(arguments.model, "cpu", arguments.dtype)
    length = max(1, outputs["autoregressive"][1].new_tokens // len(prompts))
    assistant = {"assistant_early_exit": arguments.exit, "num_assistant_tokens": arguments.spec}
    for name, settings in {"transformers generate": {}, "transformers assistant_early_exit": assistant}.items():
        rate = 1 / transformers_seconds(generic.model, prompts[:4], length, **settings)
        rows[name] = {"tokens_per_second": rate, "self_speculative_over_it": rates["self-speculative"] / rate}
    return {"exit": arguments.exit, "spec": arguments.spec, "prompts": len(prompts), "rows": rows}


def part_context(arguments: argparse.Namespace) -> dict[str, Any]:
    depth = load(arguments).depth
    times = {context: step_seconds(depth, depth.num_layers, 1, context) for context in (128, 2048)}
    return {"step_ms": {context: 1000 * time for context, time in times.items()}, "ratio": times[2048] / times[128]}


def part_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak resident memory of a process of its own for each way."""
    peaks = {}
    for way in ("load", "autoregressive", "self-speculative"):
        command = [sys.executable, __file__, "peak", "--way", way, *sys.argv[2:]]
        peaks[way] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {"peak_mb": peaks, "ratio": peaks["self-speculative"] / peaks["autoregressive"]}


def peak(arguments: argparse.Namespace) -> None:
    loaded = load(arguments)
    if arguments.way != "load":
        decoded(loaded, prompts_of(arguments, loaded)[:2], DecodingConfig(arguments.way, arguments.exit, arguments.spec, 64))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def part_perplexity(arguments: argparse.Namespace) -> dict[str, Any]:
    """By kind of weights, over the first tokens of a text file, in pieces of 512 that see nothing of each other."""
    text = Path(arguments.text).read_text(encoding="utf-8")[: 8 * arguments.tokens]
    found = {}
    for name, packing in {"packed": {}, "int8": {"quantize": "int8"}, "int4": {"quantize": "int4"}}.items():
        loaded = load(arguments, **packing)
        ids = torch.tensor(loaded.tokenizer(text)["input_ids"])[: arguments.tokens]
        losses = []
        with torch.inference_mode():
            for piece in ids.split(512):
                tokens, places = piece[None], torch.arange(len(piece))[None]
                hidden = loaded.depth.run_layers(loaded.depth.embed(tokens), 0, loaded.depth.num_layers, places)
                logits = loaded.depth.unembed(hidden)[0, :-1].float()
                losses.append(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="none"))
        found[name] = float(torch.cat(losses).mean().exp())
    return {"tokens": len(ids), "perplexity": found}


def part_llamacpp(arguments: argparse.Namespace) -> dict[str, Any]:
    """llama.cpp on a GGUF file, by its own count of a completion's time."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = arguments.gguf
    settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = 2048, 1, arguments.threads or torch.get_num_threads()
    server = xllamacpp.Server(settings)
    request = {"prompt": "The history of the town begins", "n_predict": 128, "temperature": 0, "ignore_eos": True}
    rates = [server.handle_completions(request)["timings"]["predicted_per_second"] for _ in range(3)]
    return {"gguf": Path(arguments.gguf).name, "tokens_per_second": median(rates)}


PARTS = {
    "step": part_step, "rounds": part_rounds, "speculation": part_speculation, "context": part_context,
    "memory": part_memory, "perplexity": part_perplexity, "llamacpp": part_llamacpp,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "peak"])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--prompts", help="a .jsonl file")
    parser.add_argument("--text", help="a text file, for perplexity")
    parser.add_argument("--gguf", help="for llamacpp")
    parser.add_argument("--way", default="autoregressive")
    parser.add_argument("--dtype", default="auto")
    for flag, default in (("threads", 0), ("exit", 8), ("spec", 6), ("draft-vocab", 0), ("samples", 16), ("repeats", REPEATS)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    for flag, default in (("new-tokens", 128), ("prompt-tokens", 512), ("tokens", 4096)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.part == "peak":
        return peak(arguments)
    result = PARTS[arguments.part](arguments)
    machine = environment(load(arguments))
    kept = {key: machine[key] for key in ("cpu", "threads", "dtype", "load_average")}
    kept["prepacks bf16"] = prepacks(torch.bfloat16)
    print(json.dumps({"part": arguments.part, "model": arguments.model, **kept, **result}, indent=1, default=float))


if __name__ == "__main__":
    main()
