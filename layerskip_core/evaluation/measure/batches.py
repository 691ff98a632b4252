"""What every way of decoding answers, whatever time it takes: many prompts at once, for quality."""

from collections.abc import Generator, Sequence

import torch

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig
from ...config.evaluation import BenchConfig, SweepConfig
from ...data.examples import Example
from ...data.records import spread
from ...decoding.batch import decode_batch
from ...decoding.loop import check_prompt
from ...errors import LayerSkipError
from ..outputs import Output, Outputs, Timed, answer_text, require_outputs
from .journal import Journal
from .runner import Progress, Setting, measure

_TIMED = 8  # prompts, where nobody says how many
_QUALITY = -1  # in the journal, where a measurement has the number of its repeat


def timed_by_default(config: BenchConfig | SweepConfig) -> int | None:
    """How many prompts are measured; None for all of them, which are then not answered in batches."""
    return _TIMED if config.batch_size > 1 and config.timed is None else config.timed


def timed_examples(examples: Sequence[Example], timed: int | None) -> Sequence[Example]:
    """Those to measure, at even distances; `timed` as in `timed_by_default`."""
    return examples if timed is None else spread(examples, timed) if timed else ()


def answer_together(
    loaded: Decoder,
    examples: Sequence[Example],
    settings: Sequence[Setting],
    batch_size: int,
    journal: Journal | None = None,
) -> Generator[Progress, None, list[Outputs]]:
    """Answers every prompt in every setting, `batch_size` prompts at a time; yields progress, returns outputs by setting.

    In fp32 an answer is the one that `measure` gives, near-ties excepted. These have no times: a batch's belong to none of its
    prompts. Prompts of like length share a batch. What the journal holds is not answered again. Raises LayerSkipError when
    every prompt failed in the first setting.
    """
    answers = {number: known for number in range(len(examples)) if journal and (known := journal.recall(_QUALITY, number))}
    left = sorted(set(range(len(examples))) - set(answers), key=lambda number: len(examples[number].prompt))
    for start in range(0, len(left), batch_size):
        batch = left[start : start + batch_size]
        prompts = [examples[number].prompt for number in batch]
        found = [_answers(loaded, prompts, setting) for setting in settings]  # by [setting][prompt]
        for number, *mine in zip(batch, *found, strict=True):
            answers[number] = mine
            if journal is not None:
                journal.add(_QUALITY, number, mine)
        yield Progress(len(answers), len(examples), "answers")
    by_setting = [Outputs(tuple(answers[number][place] for number in range(len(examples)))) for place in range(len(settings))]
    require_outputs(by_setting[0])
    return by_setting


def _answers(loaded: Decoder, prompts: Sequence[str], setting: Setting) -> list[Output]:
    """An output for each prompt; one by one where they do not fit together, so that the error is one prompt's own."""
    try:
        ids = [loaded.encode_prompt(prompt) for prompt in prompts]
        for mine in ids:
            check_prompt(mine, loaded.backend.max_positions)
        found = _decoded(loaded, ids, setting) if isinstance(setting, DecodingConfig) else setting.run_together(loaded, ids)
    except (LayerSkipError, torch.OutOfMemoryError):
        return [measure(loaded, prompt, setting) for prompt in prompts]
    pairs = zip(ids, found, strict=True)
    return [Output(one.ids, answer_text(loaded, mine, one.ids), (), one.stats, one.finish_reason) for mine, one in pairs]


def _decoded(loaded: Decoder, prompts: list[list[int]], setting: DecodingConfig) -> list[Timed]:
    finished = decode_batch(loaded.backend, prompts, setting, loaded.eos_ids, loaded.detokenize)
    in_order = sorted(finished, key=lambda one: one.row)
    return [Timed(tuple(one.ids), (), one.stats, one.finish_reason) for one in in_order]
