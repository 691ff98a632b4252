"""A model and its draft in llama.cpp, and in `layerskip serve` with concurrent requests or a shared
prefix.

    python examples/engines.py llama.cpp [--model embedded --exit 4 --spec 12] [--formats
    f16,q8_0,q4_0] python examples/engines.py llama.cpp --model WITH_A_DRAFTER --eagle3 --spec 4
    python examples/engines.py serve [--model embedded] [--clients 1,4,16,64] python
    examples/engines.py prefix --model MODEL [--tokens 1500]

Prompts are test rows of `commands`, or --prompts FILE (JSON lines). Decoding is greedy. llama.cpp
(package xllamacpp) reads what `layerskip export --engine llama.cpp` writes, and takes turns with
this toolkit. `prefix` asks short questions after
--tokens tokens of this folder's documents. Run nothing else meanwhile.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from measuring import Stream, free_port, head, in_turns, line, pieces, running, share, streams

from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import DataConfig, PackingConfig
from layerskip_core.data import load_prompts
from layerskip_core.decoding import decode

ROWS = 16  # batch size of the server; more requests wait


class Answer(NamedTuple):
    ids: list[int]
    drafted: int
    accepted: int


Method = Callable[[list[int]], Answer]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", choices=["llama.cpp", "serve", "prefix"])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--prompts", default="commands")
    parser.add_argument(
        "--eagle3", action="store_true", help="drafts by the model's drafter in the EAGLE-3 layout"
    )
    parser.add_argument("--formats", default="f16,q8_0,q4_0")
    parser.add_argument("--clients", default="1,4,16,64", help="requests at once")
    counts = {
        "samples": 32,
        "max-new-tokens": 64,
        "threads": 1,
        "repeats": 3,
        "exit": 4,
        "spec": 12,
        "tokens": 1500,
    }
    for flag, default in counts.items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    arguments = parser.parse_args()
    prompts = [
        row.prompt
        for row in load_prompts(DataConfig(arguments.prompts, "test", limit=arguments.samples))
    ]
    {"llama.cpp": llama_cpp, "serve": serve, "prefix": prefix}[arguments.engine](arguments, prompts)


def llama_cpp(arguments: argparse.Namespace, prompts: list[str]) -> None:
    """Target alone and with its draft, by format, in turns with this toolkit in fp32."""
    torch.set_num_threads(arguments.threads)
    loaded = for_decoding(arguments.model, "cpu", "fp32", PackingConfig())
    encoded = [loaded.encode_prompt(prompt) for prompt in prompts]
    head(
        "GGUF",
        "",
        "tokens/s",
        "speedup",
        "drafts accepted",
        "same tokens as here",
        "same as without drafts",
    )
    for form in arguments.formats.split(","):
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--engine", "llama.cpp", "--dtype", form, "--output", folder, "--overwrite"]
            flags += [] if arguments.eagle3 else ["--exit", str(arguments.exit)]
            subprocess.run(
                ["layerskip", "export", arguments.model, *flags],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            target, draft = (str(Path(folder) / f"{name}.gguf") for name in ("target", "draft"))
            methods = {
                **toolkit(arguments, loaded),
                "llama.cpp, target alone": llama_cpp_server(arguments, loaded, target),
                "llama.cpp, with the draft": llama_cpp_server(arguments, loaded, target, draft),
            }
            runs = {
                name: lambda method=method: [method(ids) for ids in encoded]
                for name, method in methods.items()
            }
            report(form, *in_turns(runs, arguments.repeats))


def report(form: str, times: dict[str, list[float]], answers: dict[str, list[Answer]]) -> None:
    own = answers["here, autoregressive"]
    alone = answers["llama.cpp, target alone"]
    for name, mine in answers.items():
        first = "here, autoregressive" if name.startswith("here") else "llama.cpp, target alone"
        speed, base = (
            sum(len(one.ids) for one in answers[key]) / median(times[key]) for key in (name, first)
        )
        accepted = share(sum(one.accepted for one in mine), sum(one.drafted for one in mine))
        same = [
            sum(a.ids == b.ids for a, b in zip(mine, them, strict=True))
            for them in (own, answers[first])
        ]
        line(
            form,
            name,
            f"{speed:.0f}",
            f"{speed / base:.2f}x",
            accepted,
            *(f"{count} of {len(alone)}" for count in same),
        )


def toolkit(arguments: argparse.Namespace, loaded: Any) -> dict[str, Method]:
    def method(strategy: Any, **settings: Any) -> Method:
        config = DecodingConfig(strategy, max_new_tokens=arguments.max_new_tokens, **settings)

        def run(prompt: list[int]) -> Answer:
            decoding = decode(loaded.backend, prompt, config, loaded.eos_ids, loaded.detokenize)
            ids = [
                token for [step] in decoding for token in step.ids if token not in loaded.eos_ids
            ]
            return Answer(ids, decoding.stats.drafted, decoding.stats.accepted)

        return run

    strategy, exits = (
        ("eagle3", {}) if arguments.eagle3 else ("self-speculative", {"exit_layer": arguments.exit})
    )
    drafted = method(strategy, num_draft_tokens=arguments.spec, **exits)
    return {"here, autoregressive": method("autoregressive"), f"here, {strategy}": drafted}


def llama_cpp_server(
    arguments: argparse.Namespace, loaded: Any, target: str, draft: str | None = None
) -> Method:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = target
    settings.n_ctx = 1024
    settings.n_parallel = 1
    settings.port = 0
    settings.warmup = settings.fit_params = False
    settings.verbosity = settings.cache_ram_mib = 0
    parts = [settings.cpuparams, settings.cpuparams_batch]
    if draft is not None:
        speculative = settings.speculative
        types = xllamacpp.common_speculative_type
        simple = types.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE
        eagle3 = types.COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3
        speculative.types = [eagle3 if arguments.eagle3 else simple]
        speculative.draft.mparams.path = draft
        speculative.draft.n_max = arguments.spec
        parts += [speculative.draft.cpuparams, speculative.draft.cpuparams_batch]
    for part in parts:
        part.n_threads = arguments.threads
    server = xllamacpp.Server(settings)
    request = {
        "max_tokens": arguments.max_new_tokens, "temperature": 0, "samplers": ["temperature"], "cache_prompt": False,
        "return_tokens": True, "verbose": True,
    }  # fmt: skip

    def run(prompt: list[int]) -> Answer:
        found = server.handle_completions({"prompt": prompt, **request})["__verbose"]
        times = found["timings"]
        ids = [token for token in found["tokens"] if token not in loaded.eos_ids]
        return Answer(ids, times.get("draft_n", 0), times.get("draft_n_accepted", 0))

    return run


@contextmanager
def server(
    arguments: argparse.Namespace, flags: list[str]
) -> Iterator[Callable[..., list[Stream]]]:
    """Runs a server with these flags; yields a function that streams its answers to prompts."""
    name = Path(arguments.model).name
    options = {"port": free_port(), "batch-size": ROWS, "threads": arguments.threads}
    flags = [*flags, *(f"--{option}={value}" for option, value in options.items())]
    with running(
        ["layerskip", "serve", "--model", arguments.model, *flags],
        url := f"http://127.0.0.1:{options['port']}",
    ):
        yield lambda prompts, most, limits: streams(url, name, prompts, most, limits)


def serve(arguments: argparse.Namespace, prompts: list[str]) -> None:
    """Speed without drafts and with the default flags, by the number of concurrent requests, of
    different lengths.
    """
    clients = tuple(map(int, arguments.clients.split(",")))
    prompts = (prompts * max(clients))[: max(*clients, len(prompts))]
    limits = [arguments.max_new_tokens * (place % 4 + 1) // 4 for place in range(len(prompts))]
    head(
        "",
        "at once",
        "tokens/s",
        "speedup",
        "first token",
        "longest wait",
        "drafts accepted",
        "same as alone without drafts",
    )
    first = dict[int, float]()
    expected = list[str]()
    for name, flags in (
        ("without drafts", ["--strategy", "autoregressive"]),
        ("default flags", []),
    ):
        # Every pass repeats the prompts
        with server(arguments, [*flags, "--prefix-cache", "0"]) as ask:
            runs = {str(most): lambda most=most: ask(prompts, most, limits) for most in clients}
            times, answers = in_turns(runs, arguments.repeats)
        for most, found in zip(clients, answers.values(), strict=True):
            details = [one.usage.completion_tokens_details for one in found]
            accepted = sum(detail.accepted_prediction_tokens for detail in details)
            drafted = accepted + sum(detail.rejected_prediction_tokens for detail in details)
            expected = expected or [one.text for one in found]
            same = sum(one.text == other for one, other in zip(found, expected, strict=True))
            speed = sum(one.usage.completion_tokens for one in found) / median(times[str(most)])
            begun = median(one.first for one in found)
            wait = max(one.longest for one in found)
            line(name, most, f"{speed:.0f}", f"{speed / first.setdefault(most, speed):.2f}x", f"{1000 * begun:.0f} ms",
                 f"{1000 * wait:.0f} ms", share(accepted, drafted), f"{same} of {len(prompts)}")  # fmt: skip


def prefix(arguments: argparse.Namespace, prompts: list[str]) -> None:
    """Time to first token of two questions after each of several shared prefixes, with and without
    the prefix cache.
    """
    tokenizer = for_decoding(arguments.model).tokenizer
    questions = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts[:2]]
    starts = pieces(tokenizer, arguments.repeats + 1, arguments.tokens)
    head("prefix cache", "first request", "second request", "its cached tokens")
    texts: list[list[str]] = []
    for name, flags in (("512 MB", []), ("none", ["--prefix-cache", "0"])):
        with server(arguments, flags) as ask:
            pairs = [[ask([[*start, *ids]], 1, [16])[0] for ids in questions] for start in starts]
        # The first pair warms up
        medians = (f"{median(pair[place].first for pair in pairs[1:]):.3f} s" for place in (0, 1))
        line(name, *medians, pairs[-1][1].usage.prompt_tokens_details.cached_tokens)
        texts.append([one.text for pair in pairs for one in pair])
    same = sum(one == other for one, other in zip(*texts, strict=True))
    print(f"\n{same} of {len(texts[0])} answers are the same with and without the cache.")


if __name__ == "__main__":
    main()
