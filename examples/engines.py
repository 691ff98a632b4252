"""A model and its draft in llama.cpp, and behind `layerskip serve` with several requests at once or a common beginning.

    python examples/engines.py llama.cpp [--model embedded --exit 4 --spec 12] [--formats f16,q8_0,q4_0]
    python examples/engines.py llama.cpp --model WITH_A_DRAFTER --eagle3 --spec 4
    python examples/engines.py serve [--model embedded]
    python examples/engines.py prefix --model MODEL [--tokens 1500]

Prompts are test rows of `commands`, or --prompts FILE (JSON lines). Decoding is greedy. llama.cpp (package xllamacpp) reads
what `layerskip export --engine llama.cpp` writes, and takes turns with this toolkit prompt by prompt, after a pass to warm
up. `prefix` asks short questions after so many tokens of this folder's documents. Prints a table in Markdown. Run nothing
beside it.
"""

import argparse
import asyncio
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import DataConfig, PackingConfig
from layerskip_core.data import load_prompts
from layerskip_core.decoding import decode

AT_ONCE = (1, 4, 16, 64)
ROWS = 16  # of the server; more requests wait
PORT = 8078


class Answer(NamedTuple):
    ids: list[int]
    drafted: int
    accepted: int
    seconds: float


Method = Callable[[list[int]], Answer]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["llama.cpp", "serve", "prefix"])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--prompts", default="commands")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--exit", type=int, default=4)
    parser.add_argument("--eagle3", action="store_true", help="drafts by the model's drafter in the EAGLE-3 layout")
    parser.add_argument("--spec", type=int, default=12)
    parser.add_argument("--formats", default="f16,q8_0,q4_0")
    parser.add_argument("--tokens", type=int, default=1500)
    arguments = parser.parse_args()
    rows = load_prompts(DataConfig(arguments.prompts, "test", limit=arguments.samples))
    prompts = [row.prompt for row in rows]
    {"llama.cpp": llama_cpp, "serve": serve, "prefix": prefix}[arguments.engine](arguments, prompts)


def llama_cpp(arguments: argparse.Namespace, prompts: list[str]) -> None:
    """Target alone and with its draft, by format; this toolkit beside both, in fp32."""
    torch.set_num_threads(arguments.threads)
    print("| GGUF | | tokens/s | speedup | drafts accepted | tokens as here | as the same without drafts |\n|" + "---|" * 7)
    for form in arguments.formats.split(","):
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--engine", "llama.cpp", "--dtype", form, "--output", folder, "--overwrite"]
            flags += [] if arguments.eagle3 else ["--exit", str(arguments.exit)]
            subprocess.run(["layerskip", "export", arguments.model, *flags], check=True, stdout=subprocess.DEVNULL)
            target, draft = (str(Path(folder) / f"{name}.gguf") for name in ("target", "draft"))
            methods = {
                **toolkit(arguments),
                "llama.cpp, target alone": llama_cpp_server(arguments, target),
                "llama.cpp, with the draft": llama_cpp_server(arguments, target, draft),
            }
            report(form, methods, prompts, arguments)


def report(form: str, methods: dict[str, Method], prompts: list[str], arguments: argparse.Namespace) -> None:
    loaded = for_decoding(arguments.model, "cpu", "fp32")
    encoded = [loaded.encode_prompt(prompt) for prompt in prompts]
    answers: dict[str, list[list[Answer]]] = {name: [] for name in methods}  # [repeat][prompt], the first repeat warms up
    for repeat in range(arguments.repeats + 1):
        for name in methods:
            answers[name].append([])
        for number, ids in enumerate(encoded):
            names = list(methods)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                start = time.perf_counter()
                answer = methods[name](ids)
                answers[name][repeat].append(answer._replace(seconds=time.perf_counter() - start))
    own, alone = answers["here, autoregressive"], answers["llama.cpp, target alone"]
    for name, repeats in answers.items():
        base = own if name.startswith("here") else alone
        speeds = [tokens_per_second(one) for one in repeats[1:]]
        ratios = [speed / tokens_per_second(other) for speed, other in zip(speeds, base[1:], strict=True)]
        drafted = sum(answer.drafted for answer in repeats[-1])
        accepted = f"{sum(answer.accepted for answer in repeats[-1]) / drafted:.1%}" if drafted else ""
        same = [sum(mine.ids == other.ids for mine, other in zip(repeats[-1], them[-1], strict=True)) for them in (own, base)]
        print(
            f"| {form} | {name} | {median(speeds):.0f} | {median(ratios):.2f}x | {accepted} | {same[0]} of {len(prompts)} "
            f"| {same[1]} of {len(prompts)} |",
            flush=True,
        )


def tokens_per_second(answers: list[Answer]) -> float:
    return sum(len(answer.ids) for answer in answers) / sum(answer.seconds for answer in answers)


def toolkit(arguments: argparse.Namespace) -> dict[str, Method]:
    loaded = for_decoding(arguments.model, "cpu", "fp32", PackingConfig())

    def method(strategy: Any, **settings: Any) -> Method:
        config = DecodingConfig(strategy, max_new_tokens=arguments.max_new_tokens, **settings)

        def run(prompt: list[int]) -> Answer:
            decoding = decode(loaded.backend, prompt, config, loaded.eos_ids, loaded.detokenize)
            ids = [token for [step] in decoding for token in step.ids if token not in loaded.eos_ids]
            return Answer(ids, decoding.stats.drafted, decoding.stats.accepted, 0.0)

        return run

    strategy, exits = ("eagle3", {}) if arguments.eagle3 else ("self-speculative", {"exit_layer": arguments.exit})
    drafted = method(strategy, num_draft_tokens=arguments.spec, **exits)
    return {"here, autoregressive": method("autoregressive"), f"here, {strategy}": drafted}


def llama_cpp_server(arguments: argparse.Namespace, target: str, draft: str | None = None) -> Method:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.port = target, 1024, 1, 0
    settings.warmup = settings.fit_params = False
    settings.verbosity = settings.cache_ram_mib = 0
    parts = [settings.cpuparams, settings.cpuparams_batch]
    if draft is not None:
        speculative = settings.speculative
        types = xllamacpp.common_speculative_type
        simple, eagle3 = types.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE, types.COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3
        speculative.types = [eagle3 if arguments.eagle3 else simple]
        speculative.draft.mparams.path, speculative.draft.n_max = draft, arguments.spec
        parts += [speculative.draft.cpuparams, speculative.draft.cpuparams_batch]
    for part in parts:
        part.n_threads = arguments.threads
    server = xllamacpp.Server(settings)
    request = {
        "max_tokens": arguments.max_new_tokens, "temperature": 0, "samplers": ["temperature"], "cache_prompt": False,
        "return_tokens": True, "verbose": True,
    }  # fmt: skip
    ends = for_decoding(arguments.model, "cpu", "fp32").eos_ids

    def run(prompt: list[int]) -> Answer:
        found = server.handle_completions({"prompt": prompt, **request})["__verbose"]
        times = found["timings"]
        ids = [token for token in found["tokens"] if token not in ends]
        return Answer(ids, times.get("draft_n", 0), times.get("draft_n_accepted", 0), 0.0)

    return run


class Stream(NamedTuple):
    text: str
    usage: Any
    first: float  # seconds to the first token
    longest: float  # and between two chunks after it


def serve(arguments: argparse.Namespace, prompts: list[str]) -> None:
    """Without drafts and with the default flags, by the number of requests at once, whose lengths differ."""
    prompts = (prompts * max(AT_ONCE))[: max(*AT_ONCE, len(prompts))]
    print("| | at once | tokens/s | speedup | first token | longest wait | drafts accepted | as alone without drafts |")
    print("|" + "---|" * 8)
    first: dict[int, float] = {}
    expected: list[str] | None = None
    for name, flags in (("without drafts", ["--strategy", "autoregressive"]), ("default flags", [])):
        with running(arguments, [*flags, "--prefix-cache", "0"]):  # the passes repeat their prompts
            asyncio.run(ask(arguments, prompts, max(AT_ONCE)))
            for most in AT_ONCE:
                passes, streams = [], list[Stream]()
                for _ in range(arguments.repeats):
                    start = time.perf_counter()
                    streams = asyncio.run(ask(arguments, prompts, most))
                    tokens = sum(stream.usage.completion_tokens for stream in streams)
                    passes.append(tokens / (time.perf_counter() - start))
                choices = [stream.text for stream in streams]
                details = [stream.usage.completion_tokens_details for stream in streams]
                accepted = sum(detail.accepted_prediction_tokens for detail in details)
                drafted = accepted + sum(detail.rejected_prediction_tokens for detail in details)
                expected = expected or choices
                same = sum(text == other for text, other in zip(choices, expected, strict=True))
                speed, wait = median(passes), 1000 * max(stream.longest for stream in streams)
                begun = 1000 * median(stream.first for stream in streams)
                share = f"{accepted / drafted:.1%}" if drafted else ""
                print(
                    f"| {name} | {most} | {speed:.0f} | {speed / first.setdefault(most, speed):.2f}x "
                    f"| {begun:.0f} ms | {wait:.0f} ms | {share} | {same} of {len(prompts)} |",
                    flush=True,
                )


async def ask(arguments: argparse.Namespace, prompts: list[str], most: int) -> list[Stream]:
    """The answers to all prompts, `most` at once, of a quarter to all of the tokens."""
    from openai import AsyncOpenAI

    free = asyncio.Semaphore(most)
    async with AsyncOpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", timeout=600) as client:

        async def one(place: int, prompt: str) -> Stream:
            limit = arguments.max_new_tokens * (place % 4 + 1) // 4
            options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
            async with free:
                times, pieces = [time.perf_counter()], list[str]()
                answer = await client.completions.create(
                    model=Path(arguments.model).name, prompt=prompt, max_tokens=limit, **options
                )
                async for chunk in answer:
                    if chunk.choices:
                        times.append(time.perf_counter())
                    pieces += [choice.text for choice in chunk.choices]
            gaps = [later - earlier for earlier, later in pairwise(times)]
            return Stream("".join(pieces), chunk.usage, gaps[0], max(gaps[1:], default=0.0))

        return await asyncio.gather(*(one(place, prompt) for place, prompt in enumerate(prompts)))


def prefix(arguments: argparse.Namespace, prompts: list[str]) -> None:
    """Time to the first token of two questions after each of several common beginnings, with the prefix cache and without."""
    from openai import OpenAI

    tokenizer = for_decoding(arguments.model).tokenizer
    documents = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.md")))
    ids = tokenizer(documents, add_special_tokens=False)["input_ids"]
    starts = [ids[turn * arguments.tokens : (turn + 1) * arguments.tokens] for turn in range(arguments.repeats + 1)]
    print("| prefix cache | first request | second request | its tokens that needed no pass |\n|" + "---|" * 4)
    texts: dict[str, list[str]] = {}
    for name, flags in (("512 MB", []), ("none", ["--prefix-cache", "0"])):
        with running(arguments, flags):
            client = OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", timeout=600)
            seconds, cached = list[tuple[float, float]](), 0
            for start in starts:  # the first one warms up
                pair = []
                for question in prompts[:2]:
                    prompt = start + tokenizer(question, add_special_tokens=False)["input_ids"]
                    options: dict[str, Any] = {"max_tokens": 16, "stream": True, "stream_options": {"include_usage": True}}
                    began, first = time.perf_counter(), 0.0
                    pieces = []
                    for chunk in client.completions.create(model=Path(arguments.model).name, prompt=prompt, **options):
                        first = first or time.perf_counter() - began
                        pieces += [choice.text for choice in chunk.choices]
                    texts.setdefault(name, []).append("".join(pieces))
                    cached = chunk.usage.prompt_tokens_details.cached_tokens
                    pair.append(first)
                seconds.append((pair[0], pair[1]))
        medians = (f"{median(times):.3f} s" for times in zip(*seconds[1:], strict=True))
        print(f"| {name} | {' | '.join(medians)} | {cached} |", flush=True)
    same = sum(one == other for one, other in zip(*texts.values(), strict=True))
    print(f"\n{same} of {len(texts['none'])} answers are the same with and without.")


@contextmanager
def running(arguments: argparse.Namespace, flags: list[str]) -> Iterator[None]:
    command = ["layerskip", "serve", "--model", arguments.model, "--port", str(PORT), "--batch-size", str(ROWS)]
    process = subprocess.Popen([*command, "--threads", str(arguments.threads), *flags], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = ""
        while not re.search(r"Ctrl-C stops it", line := process.stderr.readline()):
            said += line
            if not line:
                sys.exit(f"error: the server ended: {said}")
        yield
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
