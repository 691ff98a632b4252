"""`layerskip export --check`: whether vLLM accepts as many of a drafter's drafts as this toolkit.

Both decode the same prompts greedily in fp32, one at a time; vLLM in a process of its own.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from inspect import getsource
from pathlib import Path

import msgspec

from ..checkpoint.locate import downloaded
from ..checkpoint.open import for_decoding
from ..checkpoint.sidecars import EAGLE3_FOLDER, PROPOSED
from ..config.decoding import DecodingConfig
from ..config.model import CheckConfig, DataConfig, PackingConfig
from ..data import load_prompts
from ..decoding import decode
from ..errors import CheckpointError, ConfigError, refused
from ..model.eagle3 import NO_DRAFTER

TOLERANCE = 0.01  # of the rates of acceptance
_ANSWER = 64  # tokens
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True)
class Drafted:
    """The answers of an engine, each as the token ids of its steps."""

    engine: str
    answers: list[list[list[int]]]

    @property
    def accepted(self) -> list[int]:
        """Accepted drafts per round, without an answer's last: engines count its drafts differently."""
        return [len(step) - 1 for answer in self.answers for step in answer[1:-1]]

    @property
    def rates(self) -> list[float]:
        """The share of rounds in which the draft at each position was accepted."""
        counts = self.accepted
        return [sum(count > place for count in counts) / max(len(counts), 1) for place in range(PROPOSED)]

    @property
    def ids(self) -> list[list[int]]:
        return [[token for step in answer for token in step] for answer in self.answers]


@dataclass(frozen=True)
class DrafterCheck:
    """The drafter here, and in vLLM if that is installed."""

    here: Drafted
    vllm: Drafted | None

    @property
    def difference(self) -> float:
        """The largest difference between acceptance rates by position; 0 without vLLM."""
        other = self.vllm or self.here
        return max(abs(ours - theirs) for ours, theirs in zip(self.here.rates, other.rates, strict=True))

    @property
    def same(self) -> int:
        """How many answers are the same."""
        return sum(ours == theirs for ours, theirs in zip(self.here.ids, (self.vllm or self.here).ids, strict=True))

    @property
    def passed(self) -> bool:
        return self.difference <= TOLERANCE and self.same == len(self.here.ids)

    def table(self) -> str:
        """Markdown, a row for each engine."""
        places = [f"draft {place + 1}" for place in range(PROPOSED)]
        rows = [["engine", "rounds", *places, "tokens per round"], ["---"] * (PROPOSED + 3)]
        for run in filter(None, (self.here, self.vllm)):
            tokens = f"{1 + sum(run.rates):.2f}"
            rows.append([run.engine, str(len(run.accepted)), *(f"{rate:.1%}" for rate in run.rates), tokens])
        return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def check_drafter(config: CheckConfig, model: str) -> DrafterCheck:
    """Decodes with a model's drafter here, and in vLLM if `python` has it. Raises ConfigError, CheckpointError, DataError."""
    folder = downloaded(model)
    if not (Path(folder) / EAGLE3_FOLDER).is_dir():
        raise ConfigError(f"`check`: {NO_DRAFTER}", "check")
    python = config.python or sys.executable
    try:
        looked = subprocess.run([python, "-c", "import importlib.util as u; exit(u.find_spec('vllm') is None)"])
    except OSError as error:
        raise refused("python", "the Python of an environment", python) from error
    decoder = for_decoding(folder, "cpu", "fp32", PackingConfig(rounds_drafter=False))
    prompts = [decoder.encode_prompt(row.prompt) for row in load_prompts(DataConfig(config.data, "test", limit=config.samples))]
    decoding = DecodingConfig("eagle3", num_draft_tokens=PROPOSED, max_new_tokens=_ANSWER)
    loops = (decode(decoder.backend, prompt, decoding, decoder.eos_ids) for prompt in prompts)
    here = Drafted("layerskip", [[list(step.ids) for [step] in loop] for loop in loops])
    return DrafterCheck(here, _in_vllm(python, folder, prompts) if looked.returncode == 0 else None)


def _in_vllm(python: str, folder: str, prompts: list[list[int]]) -> Drafted:
    asked = json.dumps({"model": str(Path(folder).resolve()), "prompts": prompts, "drafts": PROPOSED, "tokens": _ANSWER})
    program = [python, "-c", f"{getsource(vllm_drafts)}\nvllm_drafts()"]
    done = subprocess.run(program, input=asked, capture_output=True, text=True, env={**os.environ, **_ENVIRONMENT})
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise CheckpointError(f"vLLM ended with status {done.returncode}: {lines[-1].strip()}")
    return msgspec.json.decode(done.stdout.strip().splitlines()[-1], type=Drafted)


def vllm_drafts() -> None:
    """Runs in vLLM's Python, without this package: JSON on stdin; the last printed line is a JSON of `Drafted`."""
    import json
    import sys

    import vllm

    asked = json.load(sys.stdin)
    speculative = {"method": "eagle3", "model": f"{asked['model']}/eagle3", "num_speculative_tokens": asked["drafts"]}
    llm = vllm.LLM(
        asked["model"],
        speculative_config=speculative,
        dtype="float32",
        max_model_len=max(map(len, asked["prompts"])) + asked["tokens"] + asked["drafts"] + 1,
        max_num_seqs=1,
        kv_cache_memory_bytes=1 << 28,
        enforce_eager=True,
    )
    greedy, answers = vllm.SamplingParams(temperature=0, max_tokens=asked["tokens"]), []
    for number, prompt in enumerate(asked["prompts"]):
        llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, greedy)
        ids: list[int] = []
        steps: list[list[int]] = []
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                known, ids = len(ids), list(output.outputs[0].token_ids)
                steps.append(ids[known:])
        answers.append(steps)
    print(json.dumps({"engine": f"vLLM {vllm.__version__}", "answers": answers}))
