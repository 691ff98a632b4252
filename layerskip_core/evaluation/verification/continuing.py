"""Outputs that go on from something kept: from a part of the output, from an interrupted run, from the turn before."""

import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from random import Random
from typing import TypeVar

from ...config.decoding import DecodingConfig
from ...config.verification import VerifyConfig
from ...data.examples import Example
from ...decoding import PrefixCache
from ...wording import plural
from ..measure.journal import FILE_NAME, Journal
from ..measure.runner import Method, measure_interleaved
from .drafting import exits_of
from .results import CheckResult
from .subject import Ids, Subject

Returned = TypeVar("Returned")

STREAM, RUN, TURN = "resumed stream = fresh", "resumed run = fresh", "next turn = fresh"


def check_continuing(config: VerifyConfig, subject: Subject) -> Iterator[CheckResult]:
    """Nothing that was kept changes what follows."""
    if subject.loaded.backend.exact:
        return  # promises that drafts change nothing, no more: prompts are run as a whole
    settings: dict[str, DecodingConfig] = {"autoregressive": subject.plain}
    exits = exits_of(config, subject.loaded)
    for exit_layer in exits[len(exits) // 2 :][:1]:
        drafts = max(config.specs)
        drafted = DecodingConfig("self-speculative", exit_layer, drafts, subject.max_new_tokens)
        settings[f"exit {exit_layer}, {plural(drafts, 'draft')}"] = drafted
    for name, setting in settings.items():
        yield _resumed_stream(subject, name, setting)
        yield _next_turn(subject, name, setting)
    if subject.prompts.texts:
        yield _resumed_run(subject, settings)


def _resumed_stream(subject: Subject, name: str, setting: DecodingConfig) -> CheckResult:
    """The prompt and the first tokens of its output, as a prompt: what follows is the rest of the output."""
    random = Random(subject.seed)
    prompts: list[Ids] = []
    rests: list[Ids] = []
    outputs: list[Ids] = []
    for prompt, output in zip(subject.prompts.ids, subject.expected, strict=True):
        kept = random.randint(1, max(1, len(output) - 1))
        prompts.append([*prompt, *output[:kept]])
        rests.append(output[kept:])
        outputs.append(subject.alone(prompts[-1], setting)[: len(rests[-1])] if rests[-1] else [])
    return subject.compared(STREAM, name, outputs, rests, prompts)


def _next_turn(subject: Subject, name: str, setting: DecodingConfig) -> CheckResult:
    """A text that begins with the one before, and starts at what that one left: as the turns of `chat`.

    Each prompt is followed by its output and the next prompt.
    """
    known = PrefixCache()
    following = [*subject.prompts.ids[1:], subject.prompts.ids[0]]
    half = subject.loaded.backend.max_positions - subject.max_new_tokens - 1
    prompts, fresh, reused = [], [], []
    for prompt, output, more in zip(subject.prompts.ids, subject.expected, following, strict=True):
        subject.alone(list(prompt), setting, known)
        prompts.append([*prompt, *output, *more][:half])
        reused.append(subject.alone(prompts[-1], setting, known))
        fresh.append(subject.alone(prompts[-1], setting))
    return subject.compared(TURN, name, reused, fresh, prompts)


def _resumed_run(subject: Subject, settings: dict[str, DecodingConfig]) -> CheckResult:
    """A run over prompts, one JSON line for each, that is interrupted within a line and then continued."""
    loaded, methods = subject.loaded, list[Method](settings.values())
    examples = [Example(text, "") for text in subject.prompts.texts]
    with tempfile.TemporaryDirectory(prefix="layerskip-verify-") as name:
        folder, size = Path(name), loaded.backend.vocab_size
        run = measure_interleaved(loaded, examples, methods, 1, Journal(folder, {}, False, len(methods), size))
        for _ in range((len(examples) + 1) // 2):
            next(run)
        run.close()
        file = folder / FILE_NAME
        file.write_bytes(file.read_bytes()[:-9])
        again = measure_interleaved(loaded, examples, methods, 1, Journal(folder, {}, True, len(methods), size))
        outputs = [list(output.ids) for (measured,) in finish(again) for output in measured.each]
    expected = [ids for _ in methods for ids in subject.expected[: len(examples)]]
    prompts = [list(ids) for _ in methods for ids in subject.prompts.ids[: len(examples)]]
    return subject.compared(RUN, ", ".join(settings), outputs, expected, prompts)


def finish(run: Generator[object, None, Returned]) -> Returned:
    """What a generator returns at its end."""
    while True:
        try:
            next(run)
        except StopIteration as end:
            returned: Returned = end.value
            return returned
