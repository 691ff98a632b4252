"""A verification: every check on every kernel and precision, then the record."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from random import Random

from ...checkpoint.loaded import Decoder
from ...config.data import DataConfig
from ...config.verification import VerifyConfig
from ...data.examples import load_prompts
from ...decoding.loop import check_prompt
from ...errors import DataError, LayerSkipError
from ...model.native.compiled import VARIANTS
from ..measure.environment import environment
from ..measure.runner import Progress
from .continuing import check_continuing
from .drafting import check_batches, check_drafting, exits_of
from .passes import check_passes
from .peer import check_transformers
from .results import CheckResult, VerifyRecord
from .sampled import check_sampled
from .setups import TRANSFORMERS, Opened, Setup, near_tie_precision, opened, reasons, setups_of
from .subject import Prompts, Subject

_MOST_RANDOM = 48  # tokens of a random prompt


def verify(config: VerifyConfig) -> Iterator[Progress | VerifyRecord]:
    """Yields progress, then the record. Kernels and precisions that are not here are left out, and noted.

    Raises:
        ConfigError: the model has no such exit, or there are no such kernels.
        CheckpointError: the model cannot be read.
        DataError: there are no prompts, or none that fits.
    """
    setups = setups_of(config)
    texts = [example.prompt for example in load_prompts(DataConfig(config.data, "test", limit=(config.samples + 1) // 2))]
    if not texts:
        raise DataError(f"`data` {config.data} has no rows")
    results: list[CheckResult] = []
    skipped: dict[Setup, LayerSkipError] = {}
    machine = None
    for number, setup in enumerate(setups):
        yield Progress(number, len(setups), f"{setup.kernels} {setup.precision}")
        try:
            found = opened(setup, config)
        except LayerSkipError as error:
            skipped[setup] = error
            continue
        exits_of(config, found.loaded)  # so that a wrong exit is an error before anything is measured
        machine = machine or environment(found.loaded)
        prompts = prompts_of(config, found.loaded, texts)
        for result in _checked(config, found, prompts):
            results.append(result)
            yield Progress(number, len(setups), f"{setup.kernels} {setup.precision}")
    if machine is None:
        raise next(iter(skipped.values()))
    machine = {key: value for key, value in machine.items() if key not in ("dtype", "implementation", "notes")}
    yield VerifyRecord(asdict(config), machine | {"skipped": list(reasons(skipped))}, tuple(results))


def prompts_of(config: VerifyConfig, loaded: Decoder, texts: list[str]) -> Prompts:
    """Those of `texts` that fit this model's context, in its template, and random token ids."""
    room = loaded.backend.max_positions - config.max_new_tokens
    encoded = [(text, loaded.encode_prompt(text)) for text in texts]
    fitting = [(text, tuple(ids)) for text, ids in encoded if ids and len(ids) < room]
    if not fitting:
        check_prompt(encoded[0][1], room, "every prompt of `data`")
    random, most = Random(config.seed), max(1, min(_MOST_RANDOM, room // 3))
    drawn = [
        tuple(random.randrange(loaded.backend.vocab_size) for _ in range(random.randint(1, most)))
        for _ in range(config.samples - len(fitting))
    ]
    return Prompts(tuple(text for text, _ in fitting), (*(ids for _, ids in fitting), *drawn))


def _checked(config: VerifyConfig, found: Opened, prompts: Prompts) -> Iterator[CheckResult]:
    """All checks of one setup."""
    setup, rounding = found.setup, near_tie_precision(found.setup, found.loaded)
    if setup.kernels not in (*VARIANTS, TRANSFORMERS):  # these are slow, and promise less
        prompts, config = prompts.half(), replace(config, specs=config.specs[-1:], draws=config.draws // 2)
    names = (setup.kernels, setup.precision)
    subject = Subject(names, found.loaded, prompts, config.max_new_tokens, config.seed, rounding)
    if setup.kernels == TRANSFORMERS:
        yield from check_transformers(config, subject)
        return
    yield from check_passes(subject)
    yield from check_drafting(config, subject, found.trimmed)
    yield from check_batches(config, subject)
    yield from check_continuing(config, subject)
    yield from check_sampled(config, subject)
