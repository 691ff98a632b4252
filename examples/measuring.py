"""Shared by the scripts here: runs in turns, prompts, tables in Markdown, a server under load.
Needs openai at most.
"""

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen


def in_turns(
    runs: Mapping[str, Callable[[], Any]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each run by repeat, and its last result. A first turn warms up; each turn begins
    with another run.
    """
    names = list(runs)
    results = dict[str, Any]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        begin = turn % len(names)
        for name in [*names[begin:], *names[:begin]]:
            started = time.perf_counter()
            results[name] = runs[name]()
            if turn:
                times[name].append(time.perf_counter() - started)
    return times, results


def read_prompts(file: str, most: int | None = None) -> list[str]:
    """The `prompt` of the first rows of a .jsonl file."""
    return [
        json.loads(line)["prompt"]
        for line in Path(file).read_text(encoding="utf-8").splitlines()[:most]
    ]


def pieces(tokenizer: Any, count: int, tokens: int) -> list[list[int]]:
    """`count` different token sequences of this length, from this folder's documents."""
    text = "\n".join(
        path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.rglob("*.md"))
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    step = (len(ids) - tokens) // count
    return [ids[step * number : step * number + tokens] for number in range(count)]


def head(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |\n|" + "---|" * len(cells), flush=True)


def line(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else ""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def running(command: Sequence[str], url: str) -> Iterator[int]:
    """Runs a server and yields its process id once it answers. Its output goes to stderr."""
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        while not _is_up(f"{url}/health"):
            if process.poll() is not None:
                sys.exit(f"error: the server ended with status {process.returncode}")
            time.sleep(0.2)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def _is_up(url: str) -> bool:
    try:
        return bool(urlopen(url, timeout=5).status == 200)
    except OSError:
        return False


class Stream(NamedTuple):
    text: str
    usage: Any
    first: float  # seconds to the first token
    longest: float  # seconds between two later chunks, at most


def streams(
    url: str, model: str, prompts: Sequence[str | list[int]], at_once: int, limits: Sequence[int]
) -> list[Stream]:
    """Greedy answers of a server to all prompts, `at_once` of them in flight; `limits`: most tokens
    of each.
    """
    from openai import AsyncOpenAI

    async def ask() -> list[Stream]:
        free = asyncio.Semaphore(at_once)
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600) as client:

            async def one(prompt: Any, limit: int) -> Stream:
                options: dict[str, Any] = {
                    "stream": True,
                    "stream_options": {"include_usage": True},
                    "temperature": 0,
                }
                async with free:
                    times = [time.perf_counter()]
                    texts = list[str]()
                    async for chunk in await client.completions.create(
                        model=model, prompt=prompt, max_tokens=limit, **options
                    ):
                        if chunk.choices:
                            times.append(time.perf_counter())
                        texts += [choice.text for choice in chunk.choices]
                gaps = [later - earlier for earlier, later in pairwise(times)]
                return Stream("".join(texts), chunk.usage, gaps[0], max(gaps[1:], default=0.0))

            return await asyncio.gather(*map(one, prompts, limits))

    return asyncio.run(ask())
