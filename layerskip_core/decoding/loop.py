"""Decoding of given prompts: clients of the scheduler that wait for every step."""

from collections.abc import Iterator, Sequence
from typing import Unpack

from ..config.decoding import DecodingConfig
from ..errors import ConfigError, ContextError, require
from ..model.backend import Backend
from ..model.cache import KVCache
from .drafters.lookup import EarlierAnswers
from .engine import EngineOptions, draft_length
from .output import Answer, DecodeStats, Detokenize, StopReason
from .row import Row, RowStep
from .scheduler import Scheduler, without_failure


def check_prompt(
    prompt_ids: list[int],
    model: Backend,
    what: str = "the prompt",
    num_draft_tokens: int = KVCache.steps_back,
) -> None:
    """Raises ConfigError for an empty prompt, ContextError if the context or the memory does not
    hold another token after it.

    `what`: the prompt's name in the error. `num_draft_tokens`: the most per round.
    """
    if not prompt_ids:
        raise ConfigError(f"{what} is empty")
    limit = model.context_length(num_draft_tokens)
    if len(prompt_ids) < limit:
        return
    why = "the memory for keys and values has room for"
    if limit == model.spec.context:
        why = "the model's context is"
    raise ContextError(
        f"{what} must be at most {limit - 1} tokens, got {len(prompt_ids)} ({why} {limit} tokens)"
    )


def new_row(
    model: Backend,
    prompt: list[int],
    config: DecodingConfig,
    eos_ids: frozenset[int] = frozenset(),
    detokenize: Detokenize | None = None,
    seed: int | None = None,
) -> Row:
    """A row for a scheduler. Raises ConfigError for a prompt that does not fit."""
    drafts = draft_length(config)
    check_prompt(prompt, model, num_draft_tokens=drafts)
    return Row(
        prompt,
        config,
        eos_ids=eos_ids,
        seed=seed,
        context_length=model.context_length(drafts),
        detokenize=detokenize,
    )


def decode(
    model: Backend,
    prompt_ids: list[int],
    config: DecodingConfig,
    eos_ids: frozenset[int] = frozenset(),
    detokenize: Detokenize | None = None,
    **options: Unpack[EngineOptions],
) -> "DecodingLoop":
    """Decode a prompt by the config's strategy: `[step.ids for [step] in decode(...)]` are the ids
    of each step.

    Every strategy that drafts gives the tokens of autoregressive decoding, sampled ones of equal
    seeds too. `detokenize`: ids to text, for stop strings only. `options`: Engine's. Raises
    ConfigError for a prompt that does not fit, and for draft weights that were not loaded.
    """
    return DecodingLoop(model, [prompt_ids], config, eos_ids, detokenize, **options)


def decode_batch(
    model: Backend,
    prompts: Sequence[list[int]],
    config: DecodingConfig,
    eos_ids: frozenset[int] = frozenset(),
    detokenize: Detokenize | None = None,
    seeds: Sequence[int] | None = None,
    earlier: EarlierAnswers | None = None,
) -> list[Answer]:
    """Decode prompts together by the config's strategy; return their answers.

    In fp32 and above a row's output equals that of `decode` for its prompt and seed alone,
    near-ties excepted. Without `detokenize` answers have ids only. `seeds`: by row, for sampling;
    None: the config's for all. Raises ConfigError as `decode`, and for several prompts with exact
    weights or an `exit_confidence`, where rows leave at different exits.
    """
    for name, is_used in (("exact", model.exact), ("exit_confidence", config.exit_confidence)):
        fits = not is_used or len(prompts) == 1
        require(fits, "batch_size", f"1 with `{name}`", len(prompts))
    if not prompts:
        return []
    loop = DecodingLoop(model, prompts, config, eos_ids, detokenize, seeds=seeds, earlier=earlier)
    for _ in loop:
        pass
    answers = []
    for row in loop.rows:
        text = row.text.add(row.output, finished=True)
        answers.append(row.answer(text, sum(row.steps, DecodeStats())))
    return answers


class DecodingLoop:
    """Iterates over steps: the new tokens of the rows that are not finished yet.

    A loop can be abandoned between any two steps. As in a generator, an exception in a step, such
    as Ctrl-C, ends it. Loops of one model can be in different threads.
    """

    def __init__(
        self,
        model: Backend,
        prompts: Sequence[list[int]],
        config: DecodingConfig,
        eos_ids: frozenset[int] = frozenset(),
        detokenize: Detokenize | None = None,
        *,
        seeds: Sequence[int] | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        """Arguments and errors as for `decode` and `decode_batch`, at least one prompt."""
        self.rows = []
        for index, prompt in enumerate(prompts):
            seed = None if seeds is None else seeds[index]
            self.rows.append(new_row(model, prompt, config, eos_ids, detokenize, seed))
        self._scheduler = Scheduler(model, **options)
        # One engine has all rows. It is held after their end, too, for its statistics
        self.engine = self._scheduler.engine_for(self.rows[0])
        for row in self.rows:
            self._scheduler.add(row)
        without_failure(self._scheduler.admit())
        # How many tokens of the first prompt had KV entries in a kept prefix
        self.reused_tokens = self.rows[0].num_cached_tokens

    def __iter__(self) -> Iterator[list[RowStep]]:
        return self

    def __next__(self) -> list[RowStep]:
        if self._scheduler.is_idle:
            raise StopIteration
        try:
            return without_failure(self._scheduler.step())
        except BaseException:
            self._scheduler.clear()
            raise

    def keep_texts(self) -> None:
        """Adds the texts of all rows so far to the prefixes."""
        self.engine.keep_texts()

    @property
    def stats(self) -> DecodeStats:
        """Counts and seconds of all steps so far. Time between two steps is the caller's and not
        counted.
        """
        counts = (step for row in self.rows for step in row.steps)
        return sum(counts, DecodeStats(**vars(self.engine.timings)))

    @property
    def finish_reason(self) -> StopReason | None:
        """Why the first prompt's output ended, once it has."""
        return self.rows[0].scanner.reason
