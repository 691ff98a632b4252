"""One prompt decoded and timed, and a whole task in many settings: what sweeps and benchmarks are made of."""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig
from ...data.examples import Example
from ...decoding import Decoding, decode
from ...errors import LayerSkipError
from ..metrics import Difference, first_difference, top2_gap
from .memory import PeakMemory

if TYPE_CHECKING:
    from .journal import Journal
from ..outputs import Output, Outputs, Step, Timed, answer_text, require_outputs

_WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Progress:
    """How far a phase of a measurement is."""

    done: int
    total: int
    phase: str


class Peer(Protocol):
    """A way of decoding that no DecodingConfig describes, named by `strategy`; a dataclass, so that `replace` shortens it."""

    @property
    def strategy(self) -> str: ...

    @property
    def exit_layer(self) -> int | None: ...

    @property
    def num_draft_tokens(self) -> int | None: ...

    @property
    def max_new_tokens(self) -> int: ...

    def run(self, loaded: Decoder, prompt_ids: list[int]) -> "Timed":
        """Raises LayerSkipError when the prompt cannot be answered."""

    def run_together(self, loaded: Decoder, prompts: list[list[int]]) -> "list[Timed]":
        """The same for several prompts, without times; one after the other where there is no other way."""


Setting = DecodingConfig | Peer


def timed(decoding: Decoding) -> Timed:
    """Decodes to the end; a step's time is all that passes until its tokens are there."""
    ids: list[int] = []
    steps: list[Step] = []
    started = time.perf_counter()
    for tokens in decoding:
        steps.append(Step(len(tokens), time.perf_counter() - started))
        ids += [token.id for token in tokens]
        started = time.perf_counter()
    return Timed(tuple(ids), tuple(steps), decoding.stats, decoding.finish_reason)


def measure(loaded: Decoder, prompt: str, setting: Setting) -> Output:
    """Decodes a prompt in the checkpoint's template. Neither tokenizing nor detokenizing is timed.

    A prompt that fits neither the context nor the memory gives an output with an error. The setting must suit the model.
    """
    memory = PeakMemory(loaded.backend.device)
    try:
        prompt_ids = loaded.encode_prompt(prompt)
        if isinstance(setting, DecodingConfig):
            found = timed(decode(loaded.backend, prompt_ids, setting, loaded.eos_ids, loaded.detokenize))
        else:
            found = setting.run(loaded, prompt_ids)
    except (LayerSkipError, torch.OutOfMemoryError) as error:
        return Output(error=str(error))
    text = answer_text(loaded, prompt_ids, found.ids)
    return Output(found.ids, text, found.steps, found.stats, found.finish_reason, memory.peak_mb())


def measure_interleaved(
    loaded: Decoder,
    examples: Sequence[Example],
    settings: Sequence[Setting],
    repeats: int = 1,
    journal: "Journal | None" = None,
) -> Generator[Progress, None, list[list[Outputs]]]:
    """Decodes every prompt in every setting, `repeats` times; yields progress, returns outputs by [setting][repeat].

    All settings meet a prompt one after the other, so a machine that slows down slows all of them. From prompt to prompt the
    order rotates and turns round, so none always follows the same other. Before all that each decodes a few tokens,
    unmeasured. What the journal holds is not measured again, and what is measured is added to it. Raises LayerSkipError when
    every prompt failed in the first setting.
    """
    for setting in settings:
        measure(loaded, examples[0].prompt, _shortened(setting))
    outputs: list[list[Outputs]] = [[] for _ in settings]
    for repeat in range(repeats):
        found: list[list[Output]] = []  # by [sample][setting]
        for number, example in enumerate(examples):
            mine = journal.recall(repeat, number) if journal is not None else None
            if mine is None:
                turn = _order(len(settings), number + repeat)
                by_place = {place: measure(loaded, example.prompt, _seeded(settings[place], number)) for place in turn}
                mine = [by_place[place] for place in range(len(settings))]
                if journal is not None:
                    journal.add(repeat, number, mine)
            found.append(mine)
            yield Progress(repeat * len(examples) + number + 1, repeats * len(examples), "prompts")
        for of_setting, new in zip(outputs, zip(*found, strict=True), strict=True):
            of_setting.append(Outputs(new))
        require_outputs(outputs[0][-1])
    return outputs


def differences(loaded: Decoder, examples: Sequence[Example], outputs: Outputs, baseline: Outputs) -> tuple[Difference, ...]:
    """Where outputs that should be the baseline's first differ from it; a sample that failed has no place."""
    differing = []
    for sample, (one, other) in enumerate(zip(outputs.each, baseline.each, strict=True)):
        position = first_difference(one.ids, other.ids)
        if position is not None and one.error is None and other.error is None:
            prefix = loaded.encode_prompt(examples[sample].prompt) + list(other.ids[:position])
            differing.append(Difference(sample, position, top2_gap(loaded.backend, prefix)))
    return tuple(differing)


def drafts_tokens(setting: Setting) -> bool:
    """Whether this way of decoding drafts tokens and verifies them."""
    return setting.strategy not in ("autoregressive", "early-exit", "transformers")


def _seeded(setting: Setting, sample: int) -> Setting:
    """With a seed of the sample's own, so that several answers to one prompt differ where they are drawn."""
    if not isinstance(setting, DecodingConfig) or not setting.sampling.temperature:
        return setting
    return replace(setting, sampling=replace(setting.sampling, seed=setting.sampling.seed + sample))


def _shortened(setting: Setting) -> Setting:
    """The same, for a few tokens."""
    changed: Setting = replace(cast(Any, setting), max_new_tokens=min(_WARM_UP_TOKENS, setting.max_new_tokens))
    return changed


def _order(count: int, turn: int) -> list[int]:
    """0..count-1 beginning at `turn`, backwards on every odd turn."""
    step = -1 if turn % 2 else 1
    return [(turn + step * place) % count for place in range(count)]
