"""Answers to many prompts at once, for quality. Speed is measured one prompt at a time."""

from collections.abc import Generator, Sequence

import torch

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig
from ...config.evaluation import BenchConfig, SweepConfig
from ...data.examples import Example
from ...data.records import Item, spread
from ...decoding import decode_batch
from ...decoding.loop import check_prompt
from ...errors import LayerSkipError
from ..outputs import Generation, Output, Outputs, answer_text, require_outputs
from .journal import Journal
from .runner import Method, Progress, measure_prompt

_DEFAULT_TIMED = 8
_QUALITY_REPEAT = -1  # the journal's repeat number of answers from batches


def default_timed(config: BenchConfig | SweepConfig) -> int | None:
    """How many prompts are timed. None: all of them, and answers do not come from batches."""
    return _DEFAULT_TIMED if config.batch_size > 1 and config.timed is None else config.timed


def timed_examples(examples: Sequence[Item], timed: int | None) -> Sequence[Item]:
    """The examples to time, or their places, evenly spaced; `timed` as returned by `default_timed`."""
    return examples if timed is None else spread(examples, timed) if timed else ()


def answer_in_batches(
    loaded: Decoder,
    examples: Sequence[Example],
    methods: Sequence[Method],
    batch_size: int,
    journal: Journal | None = None,
) -> Generator[Progress, None, list[Outputs]]:
    """Answers every prompt by every method, `batch_size` prompts at a time. Yields progress; returns outputs by method.

    In fp32 the answers equal those of `measure_prompt`, except at near-ties. They have no times, because a batch's time cannot
    be divided among its prompts. Prompts of similar length share a batch. Answers in the journal are not computed again.

    Raises LayerSkipError when every prompt failed with the first method.
    """
    answers = {sample: row for sample in range(len(examples)) if journal and (row := journal.recall(_QUALITY_REPEAT, sample))}
    missing = sorted(set(range(len(examples))) - set(answers), key=lambda sample: len(examples[sample].prompt))
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        prompts = [examples[sample].prompt for sample in batch]
        by_method = [_answers(loaded, prompts, method) for method in methods]
        for sample, *row in zip(batch, *by_method, strict=True):
            answers[sample] = row
            if journal is not None:
                journal.add(_QUALITY_REPEAT, sample, row)
        yield Progress(len(answers), len(examples), "answers")
    outputs = [Outputs(tuple(answers[sample][index] for sample in range(len(examples)))) for index in range(len(methods))]
    require_outputs(outputs[0])
    return outputs


def _answers(loaded: Decoder, prompts: Sequence[str], method: Method) -> list[Output]:
    """One output per prompt. If the batch fails, its prompts are answered one by one, so that only the culprit fails."""
    try:
        prompt_ids = [loaded.encode_prompt(prompt) for prompt in prompts]
        for ids in prompt_ids:
            check_prompt(ids, loaded.backend.max_positions)
        generations = _run_batch(loaded, prompt_ids, method)
    except (LayerSkipError, torch.OutOfMemoryError):
        return [measure_prompt(loaded, prompt, method) for prompt in prompts]
    return [
        Output(answer.ids, answer_text(loaded, ids, answer.ids), (), answer.stats, answer.finish_reason)
        for ids, answer in zip(prompt_ids, generations, strict=True)
    ]


def _run_batch(loaded: Decoder, prompt_ids: list[list[int]], method: Method) -> list[Generation]:
    if not isinstance(method, DecodingConfig):
        return method.run_batch(loaded, prompt_ids)
    finished = decode_batch(loaded.backend, prompt_ids, method, loaded.ends(method.stop), loaded.detokenize)
    in_order = sorted(finished, key=lambda output: output.row)
    return [Generation(tuple(output.ids), (), output.stats, output.finish_reason) for output in in_order]
