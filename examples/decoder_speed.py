"""Times passes of a model on this machine, in turns in one process, relative to the first pass of
each part.

    python examples/decoder_speed.py PART... [--model FOLDER] [--threads N] [--exit E] [--quantize
    int8|int4]

    rows      all layers and the head over several tokens: the model's weights, and low-bit copies
    bits      the same over bf16 weights in 16 and in 12 bits, and over prompts of 512 and 2,048 tokens
    rounds    one drafted token at --exit, by the model's own layers and by an int4 copy
    context   one token after 2,048 tokens of context, relative to 128
    prefill   the first token of prompts of 128, 512 and 2,048 tokens, against transformers' generate

Medians of --repeats runs. Tokens are random. Whole answers are measured by `layerskip bench`. Run
nothing else meanwhile.
"""

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from measuring import head, in_turns, line
from torch import Tensor

from layerskip_core.checkpoint.open import for_decoding, for_training
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import decode
from layerskip_core.model import native
from layerskip_core.model.backend import DraftSide
from layerskip_core.model.vocabulary import most_probable

IDS = 256  # random tokens come from the first ids, which every model has
ROWS = (1, 2, 4, 7, 9, 16)
BITS_ROWS = (1, 2, 4, 8, 16, 33, 512, 2048)  # the last two as in prompts
PROMPTS = (128, 512, 2048)
Runs = dict[str, Callable[[], object]]


def random_ids(count: int) -> Tensor:
    return torch.randint(5, IDS, (count,))


def filled_cache(backend: Any, context: int) -> Any:
    cache = backend.new_cache()
    backend.run_layers(
        backend.embed(random_ids(context)), 0, backend.num_layers, cache.span(0, context)
    )
    return cache


def one_pass(
    side: Any, cache: Any, count: int, context: int, layers: int | None = None
) -> Callable[[], Tensor]:
    """Runs `count` tokens after the context through the layers of a model or a draft side and its
    head, and chooses a token.
    """
    chain, whole = (side.layers, side.whole) if isinstance(side, DraftSide) else (side, side)
    places = cache.span(context, context + count)
    ids = random_ids(count)
    return lambda: most_probable(
        whole.unembed(chain.run_layers(chain.embed(ids), 0, layers or side.num_layers, places))
    )


def rows(arguments: argparse.Namespace) -> Runs:
    copies = ("int8", "int4") if arguments.quantize is None else ()
    backend = load(arguments, draft_weights=copies).backend
    cache = filled_cache(backend, 64)
    sides = {
        "own weights": backend,
        **{name: side for name, side in backend.draft_sides.items() if name},
    }
    return {
        f"{name}, {count} rows": one_pass(side, cache, count, 64)
        for name, side in sides.items()
        for count in ROWS
    }


def bits(arguments: argparse.Namespace) -> Runs:
    runs = Runs()
    backends = {}
    for name, least in (("16 bits", 1 << 60), ("12 bits", 0)):
        native.LEAST_CODED = least
        backends[name] = load(arguments).backend
    most = next(iter(backends.values())).spec.context - 64
    for count in (count for count in BITS_ROWS if count <= most):
        for name, backend in backends.items():
            runs[f"{name}, {count} rows"] = one_pass(backend, filled_cache(backend, 64), count, 64)
    return runs


def rounds(arguments: argparse.Namespace) -> Runs:
    backend = load(arguments, draft_weights=("int4",), draft_layers=arguments.exit).backend
    cache = filled_cache(backend, 128)
    sides = {"own weights": backend, "int4": backend.draft_sides["int4"]}
    drafts = {
        f"a draft, {name}": one_pass(side, cache, 1, 128, arguments.exit)
        for name, side in sides.items()
    }
    return {"one pass": one_pass(backend, cache, 1, 128), **drafts}


def context(arguments: argparse.Namespace) -> Runs:
    backend = load(arguments).backend
    lengths = (128, min(2048, backend.spec.context - 1))
    return {
        f"after {length:,}": one_pass(backend, filled_cache(backend, length), 1, length)
        for length in lengths
    }


def prefill(arguments: argparse.Namespace) -> Runs:
    loaded = load(arguments)
    model = for_training(arguments.model, "cpu", arguments.dtype).model
    one = DecodingConfig("autoregressive", max_new_tokens=1)
    runs = Runs()
    for length in (length for length in PROMPTS if length < loaded.backend.spec.context):
        ids = random_ids(length)
        runs[f"{length:,} tokens"] = lambda ids=ids: list(
            decode(loaded.backend, ids.tolist(), one, frozenset())
        )
        given = {
            "input_ids": ids[None],
            "attention_mask": torch.ones_like(ids[None]),
            "max_new_tokens": 1,
            "do_sample": False,
        }
        runs[f"{length:,} tokens, transformers"] = lambda given=given: model.generate(**given)
    return runs


def load(arguments: argparse.Namespace, **packing: Any) -> Any:
    return for_decoding(
        arguments.model, "cpu", arguments.dtype, PackingConfig(arguments.quantize, **packing)
    )


@torch.inference_mode()
def main() -> None:
    parts = {"rows": rows, "bits": bits, "rounds": rounds, "context": context, "prefill": prefill}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=list(parts), metavar="PART")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantize", choices=("int8", "int4"))
    for flag, default in (("threads", torch.get_num_threads()), ("exit", 8), ("repeats", 30)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loaded = load(arguments)
    print(
        f"{loaded.name}: {loaded.backend.implementation}, {loaded.backend.dtype}, {torch.get_num_threads()} threads\n"
    )
    head("part", "", "ms", "relative to the first")
    for part in arguments.parts:
        times, _ = in_turns(parts[part](arguments), arguments.repeats)
        first = median(next(iter(times.values())))
        for name, seconds in times.items():
            line(part, name, f"{1000 * median(seconds):.2f}", f"{median(seconds) / first:.2f}")


if __name__ == "__main__":
    main()
