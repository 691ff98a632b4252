"""Greedy output with drafts, whatever drafts, against plain output; and batches against single prompts."""

from collections.abc import Iterator
from dataclasses import replace

from ...checkpoint.loaded import Decoder
from ...config.checks import require_exit_layer
from ...config.decoding import DecodingConfig
from ...config.verification import VerifyConfig
from ...decoding.strategies import loop_of
from ...wording import plural
from .results import CheckResult
from .subject import Ids, Subject

SPECULATIVE, BATCH, JOINED = "speculative = plain", "batch = single", "joining a batch = single"
_CONFIDENCE = 0.6


def exits_of(config: VerifyConfig, loaded: Decoder) -> tuple[int, ...]:
    """Those that were asked for, else the recommended exit, one below and one above; and those with a block.

    Raises ConfigError for an exit that the model does not have.
    """
    layers, best = loaded.backend.num_layers, loaded.recommended().exit_layer
    for exit_layer in config.exits:
        require_exit_layer(exit_layer, layers, field="exits")
    usual = {max(1, best // 2), min(best, layers - 1), min(2 * best, layers - 1)} if layers > 1 else set()
    return tuple(sorted({*(config.exits or usual), *loaded.backend.exit_blocks}))


def drafting_settings(config: VerifyConfig, subject: Subject) -> dict[str, DecodingConfig]:
    """Ways to draft with this model, by what a report calls them."""
    loaded, limit = subject.loaded, subject.max_new_tokens
    exits, layers = exits_of(config, loaded), loaded.backend.num_layers
    settings: dict[str, DecodingConfig] = {}
    for number, exit_layer in enumerate(exits):
        kind = "exit block" if exit_layer in loaded.backend.exit_blocks else "exit"
        for spec in config.specs if number == len(exits) // 2 else (config.specs[number % len(config.specs)],):
            name = f"{kind} {exit_layer}, {plural(spec, 'draft')}"
            settings[name] = DecodingConfig("self-speculative", exit_layer, spec, limit)
    drafts = max(config.specs)
    if exits:
        drafted = DecodingConfig("self-speculative", exits[-1], drafts, limit)
        settings[f"exit {exits[-1]}, confidence {_CONFIDENCE}"] = replace(drafted, draft_confidence=_CONFIDENCE)
        settings[f"lookup, then exit {exits[-1]}"] = replace(drafted, lookup=1)
    settings["lookup"] = DecodingConfig("lookup", None, drafts, limit, lookup=1)
    if layers > 2:
        skip = tuple(range(2, layers, 3))
        settings[f"skipping {len(skip)} layers"] = DecodingConfig("draft-and-verify", None, drafts, limit, skip=skip)
    for kind in subject.copies:
        copied = DecodingConfig("self-speculative", layers, drafts, limit, draft_weights=kind)
        settings[f"{kind} copy, {layers} layers"] = copied
        if exits:
            settings[f"{kind} copy, exit {exits[-1]}"] = replace(copied, exit_layer=exits[-1])
    known = loaded.recommended()
    settings["adaptive"] = DecodingConfig("adaptive", None, 32, limit, exits=known.exits or exits, profile=known.profile)
    return settings


def check_drafting(config: VerifyConfig, subject: Subject, trimmed: Decoder | None) -> Iterator[CheckResult]:
    """Every way to draft gives the tokens of plain decoding, each prompt alone."""
    prompts = [list(ids) for ids in subject.prompts.ids]
    settings = drafting_settings(config, subject)
    for name, setting in settings.items():
        yield subject.compared(SPECULATIVE, name, [subject.alone(prompt, setting) for prompt in prompts])
    if trimmed is not None:
        for exit_layer in exits_of(config, trimmed)[-1:]:
            setting = DecodingConfig("self-speculative", exit_layer, max(config.specs), subject.max_new_tokens)
            outputs = [subject.alone(prompt, setting, loaded=trimmed) for prompt in prompts]
            yield subject.compared(SPECULATIVE, f"exit {exit_layer}, drafts among a quarter of the tokens", outputs)


def check_batches(config: VerifyConfig, subject: Subject) -> Iterator[CheckResult]:
    """Rows of a batch give what they give alone, also where rows join it while it is decoded, as requests to `serve` do."""
    backend, limit = subject.loaded.backend, subject.max_new_tokens
    if backend.exact:
        return
    prompts = [list(ids) for ids in subject.prompts.ids]
    exits = exits_of(config, subject.loaded)
    yield subject.compared(BATCH, "autoregressive", subject.together(prompts, subject.plain))
    yield subject.compared(JOINED, "autoregressive", _joining(subject, prompts, subject.plain))
    for exit_layer in exits[len(exits) // 2 :][:1]:
        drafted = DecodingConfig("self-speculative", exit_layer, max(config.specs), limit)
        name = f"exit {exit_layer}, {plural(max(config.specs), 'draft')}"
        yield subject.compared(BATCH, name, subject.together(prompts, drafted))
        yield subject.compared(JOINED, name, _joining(subject, prompts, drafted))
        block = backend.exit_blocks.get(exit_layer)
        if block is None or block.stands_alone:
            early = DecodingConfig("early-exit", exit_layer, max_new_tokens=limit)
            alone = [subject.alone(prompt, early) for prompt in prompts]
            yield subject.compared(BATCH, f"early exit {exit_layer}", subject.together(prompts, early), alone)
    adaptive = drafting_settings(config, subject)["adaptive"]
    yield subject.compared(BATCH, "adaptive", subject.together(prompts, adaptive))


def _joining(subject: Subject, prompts: list[Ids], config: DecodingConfig) -> list[Ids]:
    """The outputs of prompts that join a loop one by one, a step apart, as in continuous batching."""
    loaded = subject.loaded
    outputs: list[Ids] = [[] for _ in prompts]
    owner: dict[int, int] = {}  # the prompt of each row of the loop
    running, waiting = None, list(range(len(prompts)))
    while waiting or owner:
        if waiting:
            prompt = waiting.pop(0)
            loop = loop_of(loaded.backend, [prompts[prompt]], config, loaded.eos_ids, loaded.detokenize)
            (step,) = next(loop)
            outputs[prompt] += [token.id for token in step.tokens]
            if step.finish_reason is None:
                if owner and running is not None:
                    (row,) = running.join(loop)
                else:
                    running, row = loop, step.row
                owner[row] = prompt
        if owner and running is not None:
            for step in next(running):
                outputs[owner[step.row]] += [token.id for token in step.tokens]
                if step.finish_reason is not None:
                    del owner[step.row]
    return outputs
