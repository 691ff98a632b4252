"""Measures several ways of decoding on the same prompts: one by one in turn, for speed, and in batches, for quality alone."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig
from ...config.evaluation import BenchConfig, SweepConfig
from ...data import Example, Item, spread
from ...decoding import check_prompt, decode, decode_batch
from ...errors import LayerSkipError
from ...model.backend import Backend
from ..metrics import Scores
from ..outputs import Journal, Output, answer_text, require_outputs
from ..results import Difference, Step

Baseline = Callable[[Decoder, list[int], DecodingConfig], Output]
"""Answers the ids of a prompt in place of our own decoding. The setting's strategy is the baseline's name."""

# A top-2 logit gap below this is a near-tie: kernels for one row and for several rows may round to either side of it. In bf16,
# logits of 16 to 32 are 1/8 apart, so the bound is two steps. In fp32 it is a thousand times the spread between the kernels.
NEAR_TIE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.25}

_WARM_UP_TOKENS = 16
_DEFAULT_TIMED = 8
_BATCHES = -1  # the journal's repeat number of answers from batches
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size


@dataclass(frozen=True)
class Progress:
    """The progress of one phase of a measurement."""

    done: int
    total: int
    phase: str


@dataclass(frozen=True)
class Measured:
    """One way of decoding: its answers to all prompts, and the outputs that were timed in each repeat.

    `scores` are those of the answers, `differences` where they depart from the first setting's.
    """

    setting: DecodingConfig
    answers: Sequence[Output]
    repeats: Sequence[Sequence[Output]]
    differences: tuple[Difference, ...] = ()
    scores: Mapping[str, Scores] = field(default_factory=dict)

    @property
    def texts(self) -> list[str | None]:
        """None for a prompt that failed."""
        return [None if output.error is not None else output.text for output in self.answers]

    def of(self, samples: Sequence[int], timed: Sequence[int]) -> "Measured":
        """The same for some of the prompts. `timed`: their indices among the timed prompts."""
        repeats = [[outputs[place] for place in timed] for outputs in self.repeats if timed]
        scores = {name: each.of(samples) for name, each in self.scores.items()}
        return Measured(self.setting, [self.answers[sample] for sample in samples], repeats, (), scores)

    def __add__(self, other: "Measured") -> "Measured":
        """The same way of decoding on more prompts."""
        moved = [replace(each, sample=len(self.answers) + each.sample) for each in other.differences]
        repeats = [[*mine, *theirs] for mine, theirs in zip(self.repeats, other.repeats, strict=True)]
        return Measured(self.setting, [*self.answers, *other.answers], repeats, (*self.differences, *moved))


def default_timed(config: BenchConfig | SweepConfig) -> int | None:
    """How many prompts are timed. None: all of them, and answers do not come from batches."""
    return _DEFAULT_TIMED if config.batch_size > 1 and config.timed is None else config.timed


def timed_examples(examples: Sequence[Item], timed: int | None) -> Sequence[Item]:
    """The examples to time, or their indices, evenly spaced; `timed` is `default_timed`'s."""
    return examples if timed is None else spread(examples, timed) if timed else ()


def measure(
    loaded: Decoder,
    examples: Sequence[Example],
    settings: Sequence[DecodingConfig],
    config: BenchConfig | SweepConfig,
    repeats: int = 1,
    baselines: Mapping[str, Baseline] | None = None,
    journal: Journal | None = None,
    task: str = "",
) -> Generator[Progress, None, list[Measured]]:
    """Decodes every prompt by every setting. Yields progress; returns what was measured of each setting.

    With a batch size above 1, answers come from batches, whose time cannot be divided among their prompts, and only some
    prompts are timed. In fp32 the answers of a batch equal those that each prompt gets alone, except at near-ties.

    Args:
        settings: the first is full depth, which the others are compared with. The same setting can be timed twice.
        config: tells the batch size and how many prompts are timed.
        journal: of an interrupted run, whose outputs are not measured again; new ones are added to it.
        task: a name that stands before the phases of progress.

    Raises:
        LayerSkipError: every prompt failed with the first setting.
    """
    decoded = partial(_decoded, loaded, settings, baselines, journal)
    timed, batched = timed_examples(examples, config.timed), None
    outputs: list[list[list[Output]]] = [[] for _ in settings]
    if config.batch_size > 1:
        batched = yield from decoded(examples, [_BATCHES], config.batch_size, f"{task} answers".strip())
    if timed:
        outputs = yield from decoded(timed, range(repeats), 1, f"{task} prompts".strip())
    measured: list[Measured] = []
    for setting, times, (answers, *_) in zip(settings, outputs, batched or outputs, strict=True):
        exact = setting.strategy != "early-exit" and not settings[0].temperature
        base = measured[0].answers if measured else answers
        differing = differences(loaded, examples, answers, base) if exact else ()
        measured.append(Measured(setting, answers, times, differing))
    return measured


def _decoded(
    loaded: Decoder,
    settings: Sequence[DecodingConfig],
    baselines: Mapping[str, Baseline] | None,
    journal: Journal | None,
    examples: Sequence[Example],
    repeats: Sequence[int],
    batch_size: int,
    phase: str,
) -> Generator[Progress, None, list[list[list[Output]]]]:
    """Outputs by [setting][repeat][prompt].

    A prompt, or a batch of prompts of similar length, is decoded by all settings before the next one, so a machine that slows
    down slows all of them. The order of the settings rotates and reverses from prompt to prompt, so that none always follows
    the same other one. Before prompts are timed, each setting warms up with a few tokens.
    """
    wanted = [(repeat, sample) for repeat in repeats for sample in range(len(examples))]
    rows = {each: row for each in wanted if journal is not None and (row := journal.recall(*each)) is not None}
    missing = [each for each in wanted if each not in rows]
    if batch_size > 1:
        missing.sort(key=lambda each: len(examples[each[1]].prompt))
    for setting in settings if batch_size == 1 and missing else ():
        limit = min(_WARM_UP_TOKENS, setting.max_new_tokens)
        answer_prompts(loaded, [examples[0].prompt], replace(setting, max_new_tokens=limit), baselines)
    # Answers from batches are not timed, so those of a setting that stands in the list twice are computed once.
    distinct = [settings.index(setting) if batch_size > 1 else place for place, setting in enumerate(settings)]
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        prompts, turn = [examples[sample].prompt for _, sample in batch], sum(batch[0])
        found: dict[int, list[Output]] = {}
        for step in range(len(settings)):
            place = distinct[(turn - step if turn % 2 else turn + step) % len(settings)]
            if place not in found:
                found[place] = answer_prompts(loaded, prompts, _seeded(settings[place], batch[0][1]), baselines)
        for number, each in enumerate(batch):
            rows[each] = [found[place][number] for place in distinct]
            if journal is not None:
                journal.add(*each, rows[each])
        yield Progress(len(rows), len(wanted), phase)
    require_outputs([rows[each][0] for each in wanted])
    prompts_of = range(len(examples))
    return [[[rows[repeat, sample][place] for sample in prompts_of] for repeat in repeats] for place in range(len(settings))]


def answer_prompts(
    loaded: Decoder,
    prompts: Sequence[str],
    setting: DecodingConfig,
    baselines: Mapping[str, Baseline] | None = None,
) -> list[Output]:
    """An output per prompt, in the checkpoint's template; that of a single prompt is timed, without (de)tokenizing.

    A prompt that does not fit the context or the memory gives an Output with an error. If a batch fails, its prompts are
    answered one by one, so that only the culprit fails. Baselines have no batches.
    """
    model, alone = loaded.backend, len(prompts) == 1
    baseline = (baselines or {}).get(setting.strategy, own_output if alone else None)
    has_peak = alone and _reset_peak(model.device)
    try:
        ids = [loaded.encode_prompt(prompt) for prompt in prompts]
        for prompt_ids in ids:
            check_prompt(prompt_ids, model.spec.context)
        if baseline is not None:
            outputs = [baseline(loaded, prompt_ids, setting) for prompt_ids in ids]
        else:
            batch = decode_batch(model, ids, setting, loaded.ends(setting.stop), loaded.detokenize)
            answers = sorted(batch, key=lambda answer: answer.row)
            outputs = [Output(tuple(each.ids), "", (), each.stats, each.finish_reason) for each in answers]
    except (LayerSkipError, torch.OutOfMemoryError) as error:
        if alone:
            return [Output(error=str(error))]
        return [output for prompt in prompts for output in answer_prompts(loaded, [prompt], setting, baselines)]
    peak = _peak_mb(model.device) if has_peak else None
    texts = [answer_text(loaded, prompt_ids, output.ids) for prompt_ids, output in zip(ids, outputs, strict=True)]
    return [replace(output, text=text, peak_memory_mb=peak) for output, text in zip(outputs, texts, strict=True)]


def measure_prompt(loaded: Decoder, prompt: str, setting: DecodingConfig) -> Output:
    """The timed output of our own decoding; see `answer_prompts`."""
    return answer_prompts(loaded, [prompt], setting)[0]


def own_output(loaded: Decoder, prompt_ids: list[int], setting: DecodingConfig, reuse_exit_states: bool = True) -> Output:
    """Our own decoding. A step's time ends when its tokens have arrived here."""
    ends = loaded.ends(setting.stop)
    decoding = decode(loaded.backend, prompt_ids, setting, ends, loaded.detokenize, reuse_exit_states=reuse_exit_states)
    ids: list[int] = []
    steps: list[Step] = []
    started = time.perf_counter()
    for tokens in decoding:
        seconds = time.perf_counter() - started
        steps.append(Step(len(tokens), seconds, decoding.drafter))
        ids += [token.id for token in tokens]
        started = time.perf_counter()
    return Output(tuple(ids), "", tuple(steps), decoding.stats, decoding.finish_reason)


def _seeded(setting: DecodingConfig, sample: int) -> DecodingConfig:
    """With a seed of its own for each sample, so that sampled answers to one prompt differ. The largest seed is 2**32 - 1."""
    return replace(setting, seed=(setting.seed + sample) % 2**32) if setting.temperature else setting


def differences(
    loaded: Decoder, examples: Sequence[Example], outputs: Sequence[Output], baseline: Sequence[Output]
) -> tuple[Difference, ...]:
    """The first difference of each output from the baseline's. Samples that failed in either are left out."""
    differing = []
    for sample, (output, expected) in enumerate(zip(outputs, baseline, strict=True)):
        position = first_difference(output.ids, expected.ids)
        if position is not None and output.error is None and expected.error is None:
            prefix = loaded.encode_prompt(examples[sample].prompt) + list(expected.ids[:position])
            differing.append(Difference(sample, position, top2_gap(loaded.backend, prefix)))
    return tuple(differing)


def first_difference(ids: Sequence[int], expected: Sequence[int]) -> int | None:
    """The first position where two outputs differ, None when they are equal. If one is a prefix of the other, its length."""
    if list(ids) == list(expected):
        return None
    pairs = enumerate(zip(ids, expected, strict=False))
    return next((position for position, (own, other) in pairs if own != other), min(len(ids), len(expected)))


@torch.inference_mode()
def top2_gap(model: Backend, ids: Sequence[int]) -> float:
    """The gap between the two largest logits of the full model for the token after `ids`."""
    tokens = torch.tensor([list(ids)], device=model.device)
    positions, cache = torch.arange(len(ids))[None], model.new_cache(1, len(ids))
    hidden = model.run_layers(model.embed(tokens), 0, model.num_layers, positions, cache)
    best, second = model.unembed(hidden[:, -1:])[0, -1].double().topk(2).values.tolist()
    return float(best - second)


def _reset_peak(device: torch.device) -> bool:
    """False if the system cannot reset its peak: not Linux, or a container that forbids it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _peak_mb(device: torch.device) -> float:
    """MB of 2**20 bytes since the reset: on CUDA what torch allocated, elsewhere the resident set of the whole process.

    That includes weights and interpreter, so that strategies hardly differ.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    line = next(line for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024
