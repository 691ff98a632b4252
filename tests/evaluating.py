"""A tiny random model with a real tokenizer, for the tests of evaluation."""

from dataclasses import replace
from functools import cache
from statistics import fmean

import torch
from conftest import tiny_model

from layerskip_core.checkpoint.info import CheckpointInfo
from layerskip_core.checkpoint.loaded import Decoder, Trainable, decoder_of
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.evaluation import TaskConfig
from layerskip_core.config.model import DataConfig, PackingConfig
from layerskip_core.data import PARSING_TEMPLATE, Example, load_examples
from layerskip_core.decoding import DecodeStats
from layerskip_core.evaluation.intervals import metric
from layerskip_core.evaluation.measure.measuring import Measured, Measurement, measure_prompt
from layerskip_core.evaluation.metrics import exact_match
from layerskip_core.evaluation.results import Output, Step
from layerskip_core.evaluation.tasks.task import Task
from layerskip_core.model import TorchBackend, TransformersBackend
from layerskip_core.training.encoding import train_tokenizer

LAYERS = 6
NEW_TOKENS = 12


@cache
def tiny_loaded(dtype: torch.dtype = torch.float64, **changes: object) -> Decoder:
    """Six random layers with `changes` of the config, a context of 128 tokens, and a tokenizer of
    300 entries.

    EOS is never the most probable token. If it were drafted after a wrong draft, a real round would
    end early, which the cost model cannot predict.
    """
    tokenizer = train_tokenizer(load_examples(DataConfig("commands", "train", limit=60)), 300)
    model = tiny_model(
        dtype=dtype, vocab_size=300, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, **changes,
    )  # fmt: skip
    model.get_output_embeddings().weight.data[tokenizer.eos_token_id] = 0
    return decoder_of(
        Trainable(
            "tiny", model, TransformersBackend(model), tokenizer, CheckpointInfo(PARSING_TEMPLATE)
        )
    )


TRAINED = CheckpointInfo(PARSING_TEMPLATE, details={"trained_exits": [2, 4]})


def repacked(packing: PackingConfig, **changes: object) -> Decoder:
    """The tiny model on PyTorch's kernels, with copies to draft with."""
    model = tiny_model(dtype=torch.float32, vocab_size=300, intermediate_size=64)
    return replace(tiny_loaded(torch.float32), backend=TorchBackend.of(model, packing), **changes)


def collect(events):
    seen = []
    while True:
        try:
            seen.append(next(events))
        except StopIteration as end:
            return seen, end.value


def task_of(*examples: Example) -> Task:
    config = TaskConfig("known", "known", max_new_tokens=NEW_TOKENS, completion_column="completion")
    references = [[example.completion] for example in examples]
    return Task(
        examples,
        config,
        "exact_match",
        lambda texts: {"exact_match": exact_match(texts, references)},
    )


def score(task: Task, predictions: list[str]) -> dict[str, float]:
    return {name: metric(each).value for name, each in task.score(predictions).items()}


@cache
def own_answers(samples: int = 3) -> Task:
    """Prompts of `commands` with the model's own answers as references."""
    loaded = tiny_loaded()
    prompts = [row.prompt for row in load_examples(DataConfig("commands", "test", limit=samples))]
    setting = DecodingConfig("autoregressive", max_new_tokens=NEW_TOKENS)
    return task_of(
        *(Example(prompt, measure_prompt(loaded, prompt, setting).text) for prompt in prompts)
    )


def early_exit_share(loaded: Decoder, task: Task, exit_layer: int) -> float:
    setting = DecodingConfig("early-exit", exit_layer, max_new_tokens=NEW_TOKENS)
    texts = [measure_prompt(loaded, example.prompt, setting).text for example in task.examples]
    return fmean(exact_match(texts, [[example.completion] for example in task.examples]))


TOO_LONG = Example("word " * 200, "x")  # longer than the tiny model's context


def outputs_of(
    *steps: list[tuple[int, float]],
    ids: tuple[tuple[int, ...], ...] = (),
    stats: DecodeStats | None = None,
) -> list[Output]:
    """Outputs with the given steps (tokens, seconds). Only the first output has the given stats."""
    each = []
    for number, own_steps in enumerate(steps):
        count = sum(tokens for tokens, _ in own_steps)
        tokens = ids[number] if ids else tuple(range(count))
        own_stats = stats if stats is not None and number == 0 else DecodeStats()
        each.append(
            Output(tokens, "", tuple(Step(*step) for step in own_steps), own_stats, "length")
        )
    return each


def measured_of(
    setting: DecodingConfig, *repeats: list[Output], answers_per_prompt: int = 1, **more: object
) -> Measured:
    """A setting with the given outputs in each repeat."""
    table = []
    for repeat, outputs in enumerate(repeats):
        for sample, output in enumerate(outputs):
            table.append(Measurement(sample, sample // answers_per_prompt, repeat, output))
    return Measured(setting, table, **more)
