"""The run of `verify`: every check on all kernels in every precision; its record, tables and
CSV.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any

from ..checkpoint.loaded import Decoder, decoder_of
from ..checkpoint.locate import ModelRef
from ..checkpoint.open import for_decoding, for_training
from ..checkpoint.shipped import read_exit_blocks
from ..config.evaluation import VerifyConfig
from ..config.model import DataConfig, PackingConfig
from ..data import load_prompts
from ..errors import ConfigError, ContextError, LayerSkipError, number, plural, require_choice
from ..model import TransformersBackend
from ..model.native.compiled import VARIANTS, requesting
from .checks import CHECKS, LOW_BIT, CheckResult, Ids, Subject, check_drafts, check_sampling
from .measure import Progress
from .measure.figures import environment
from .report import csv_text
from .report.tables import TextTable

# Torch: on repacked weights; exact: split calls; generic: transformers'
KERNELS = (*VARIANTS, "torch", "exact", "generic")
_MOST_RANDOM = 48  # tokens of a random prompt
_SHOWN = 20  # misses in the table; JSON has all
_LEGEND = """\
bits: logits with the same bits. same: the same tokens. p: the probability of
draws this far from the model's distribution. -: not promised, or impossible.
N ties: N outputs differ, first where two tokens are almost equally likely;
kernels other than our own promise no more. NOT n/m: n of m comparisons broke
their promise."""


@dataclass(frozen=True)
class VerifyRecord:
    """One run of `verify`; `config` has defaults filled in."""

    config: dict[str, Any]
    environment: dict[str, Any]
    results: tuple[CheckResult, ...]


def verify(config: VerifyConfig) -> Iterator[Progress | VerifyRecord]:
    """Yields progress, then the record; notes unavailable kernels. Raises ConfigError, DataError,
    LayerSkipError.
    """
    for name in config.kernels:
        require_choice(name, "kernels", KERNELS)
    texts = [
        example.prompt
        for example in load_prompts(
            DataConfig(config.data, "test", limit=(config.samples + 1) // 2)
        )
    ]
    results: list[CheckResult] = []
    skipped: dict[str, list[str]] = {}  # kernels and precisions by reason
    machine = None
    setups = [
        (kernels, precision)
        for precision in config.precisions
        for kernels in config.kernels or KERNELS
    ]
    for done, names in enumerate(setups):
        yield Progress(done, len(setups), " ".join(names))
        try:
            loaded = opened(config, *names)
        except LayerSkipError as error:
            skipped.setdefault(str(error), []).append(" ".join(names))
            continue
        machine = machine or environment(loaded)
        slow = names[0] not in VARIANTS
        own = replace(config, specs=config.specs[-1:], draws=config.draws // 2) if slow else config
        subject = Subject(
            loaded, names, prompts_of(config, loaded, texts)[:: 2 if slow else 1], own
        )
        for check in (check_drafts, check_sampling) if loaded.backend.exact else CHECKS:
            for result in check(subject):
                results.append(result)
                yield Progress(done, len(setups), " ".join(names))
    if machine is None:
        raise LayerSkipError(next(iter(skipped)))
    notes = [f"not verified: {', '.join(names)}: {reason}" for reason, names in skipped.items()]
    machine = {
        key: value
        for key, value in machine.items()
        if key not in ("dtype", "implementation", "notes")
    }
    yield VerifyRecord(asdict(config), machine | {"skipped": notes}, tuple(results))


def opened(config: VerifyConfig, kernels: str, precision: str) -> Decoder:
    """The model on these kernels, with low-bit copies where there are kernels for them. Raises
    LayerSkipError.
    """
    device = config.machine.device
    quantize = LOW_BIT.get(precision)
    if kernels == "generic":
        if quantize is not None:
            raise LayerSkipError("transformers' layers have no low-bit weights")
        trainable = for_training(config.model, device, precision)
        generic = decoder_of(trainable)
        folder = ModelRef.of(config.model).fetched().folder
        if folder is None:
            return generic
        blocks = read_exit_blocks(folder, generic.backend.spec, trainable.model.get_parameter)
        return replace(generic, backend=TransformersBackend(trainable.model, blocks))
    dtype = "auto" if quantize else precision
    packing = PackingConfig(quantize, draft_model=config.draft_model, exact=kernels == "exact")
    with requesting(kernels if kernels in VARIANTS else "torch"):
        try:
            copies = () if quantize or packing.exact else tuple(LOW_BIT.values())
            loaded = for_decoding(
                config.model, device, dtype, replace(packing, draft_weights=copies)
            )
        except ConfigError:  # no kernel for low-bit weights of these widths
            loaded = for_decoding(config.model, device, dtype, packing)
    if kernels in VARIANTS and not loaded.backend.implementation.startswith(f"native ({kernels}"):
        raise LayerSkipError(
            "this model, this CPU or this installation does not suit these kernels"
        )
    if kernels not in VARIANTS and isinstance(loaded.backend, TransformersBackend):
        raise LayerSkipError("the weights of this model cannot be repacked")
    return loaded


def prompts_of(config: VerifyConfig, loaded: Decoder, texts: list[str]) -> list[Ids]:
    """The `texts` that fit the context, in the model's template, and random token ids."""
    room = loaded.backend.spec.context - config.max_new_tokens
    size = loaded.backend.spec.vocab
    encoded = [loaded.encode_prompt(text) for text in texts]
    fitting = [list(ids) for ids in encoded if ids and len(ids) < room]
    if not fitting:
        shortest = min(map(len, encoded), default=0)
        raise ContextError(
            f"every prompt of `data` must be of 1 to {room - 1} tokens, got {shortest} for the shortest"
        )
    random = Random(config.seed)
    most = max(1, min(_MOST_RANDOM, room // 3))
    lengths = [random.randint(1, most) for _ in range(config.samples - len(fitting))]
    return [*fitting, *([random.randrange(size) for _ in range(length)] for length in lengths)]


def tables(record: VerifyRecord) -> list[TextTable]:
    """A table for each precision (checks by kernels), then the mismatches that break a promise."""
    results = record.results
    machine = record.environment
    shown = []
    for precision in dict.fromkeys(result.precision for result in results):
        own = [result for result in results if result.precision == precision]
        kernels = dict.fromkeys(result.kernels for result in own)
        rows = tuple(
            (
                check,
                *(
                    _cell([each for each in own if (each.check, each.kernels) == (check, name)])
                    for name in kernels
                ),
            )
            for check in dict.fromkeys(result.check for result in own)
        )
        shown.append(TextTable((precision, *kernels), rows, ""))
    broken = [result for result in results if not result.passed]
    prompts = max(result.prompts for result in results)
    tokens = sum(result.tokens for result in results)
    where = f"{machine['device_name']}, {plural(machine['threads'], 'thread')}"
    notes = [
        f"{len(results)} comparisons of up to {prompts} prompts, {tokens} tokens in all; {where}.",
        _LEGEND,
        *machine["skipped"],
        f"{len(broken)} of {len(results)} comparisons broke their promise."
        if broken
        else "Every promise was kept.",
    ]
    shown[-1] = replace(shown[-1], note="\n".join(notes))
    if misses := [(result, miss) for result in broken for miss in result.mismatches][:_SHOWN]:
        headers = (
            "miss",
            "setting",
            "kernels",
            "prompt",
            "place",
            "expected",
            "found",
            "gap",
            "near tie",
        )
        cells = (
            (result.check, result.setting, f"{result.kernels} {result.precision}", str(miss.prompt), str(miss.position),
             number(miss.expected, ""), number(miss.found, ""), number(miss.gap, ".3g"), "yes" if miss.near_tie else "no")
            for result, miss in misses
        )  # fmt: skip
        note = "gap: by how much the model prefers the expected token, in logits. -: past an end."
        shown.append(TextTable(headers, tuple(cells), note))
    return shown


def _cell(results: list[CheckResult]) -> str:
    """The joint outcome of a check's settings."""
    if not results:
        return "-"
    if broken := sum(not result.passed for result in results):
        return f"NOT {broken}/{len(results)}"
    if results[0].promise == "distribution":
        return f"p {min(result.p_value or 0.0 for result in results):.2g}"
    ties = sum(len(result.mismatches) for result in results)
    return plural(ties, "tie") if ties else "bits" if results[0].promise == "bits" else "same"


def to_csv(record: VerifyRecord) -> str:
    """A row per check, setting, kernels and precision; mismatches are counted."""
    return csv_text(
        [asdict(result) | {"mismatches": len(result.mismatches)} for result in record.results]
    )
