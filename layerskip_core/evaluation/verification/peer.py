"""The same questions put to transformers' `generate`, as information: its early-exit drafts, and its batches."""

from collections.abc import Iterator

from ...config.verification import VerifyConfig
from ...errors import ConfigError, LayerSkipError
from ...model import GenericBackend
from ...wording import plural
from ..measure.baselines import TransformersGenerate, require_early_exit
from .drafting import exits_of
from .results import CheckResult
from .setups import TRANSFORMERS
from .subject import Ids, Subject

EARLY_EXIT, BATCH = "assistant_early_exit = plain", "padded batch = single"


def check_transformers(config: VerifyConfig, subject: Subject) -> Iterator[CheckResult]:
    """Its greedy `generate` for each prompt alone, against its own early-exit drafts and against its own padded batch.

    `subject`: of a backend over the layers of transformers.
    """
    assert isinstance(subject.loaded.backend, GenericBackend)
    model, loaded = subject.loaded.backend.model, subject.loaded
    plain = TransformersGenerate(TRANSFORMERS, model, subject.max_new_tokens)
    prompts = [list(ids) for ids in subject.prompts.ids]
    expected = [list(plain.run(loaded, prompt).ids) for prompt in prompts]
    together = [list(output.ids) for output in plain.run_batch(loaded, prompts)]
    yield subject.compared(BATCH, f"{len(prompts)} rows", together, expected, promise="none")
    try:
        require_early_exit(model)
    except ConfigError:
        return
    for number, exit_layer in enumerate(exits_of(config, loaded)):
        drafts = config.specs[number % len(config.specs)]
        options = {"assistant_early_exit": exit_layer}
        drafting = TransformersGenerate(EARLY_EXIT, model, subject.max_new_tokens, exit_layer, drafts, options=options)
        outputs: list[Ids] = []
        failed = ""
        for prompt in prompts:
            try:
                outputs.append(list(drafting.run(loaded, prompt).ids))
            except LayerSkipError as error:
                outputs.append([])
                failed = str(error)
        yield subject.compared(
            EARLY_EXIT, f"exit {exit_layer}, {plural(drafts, 'draft')}", outputs, expected, promise="none", note=failed
        )
