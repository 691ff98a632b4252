"""Random decoding settings on tiny models: speculation must equal plain decoding, whatever drafts, and a batch its rows alone.

So must rows that join a batch, and texts that begin with what is known from the one before. A depth for each token must equal
plain decoding where no exit is confident, and early exit where the first one always is.
"""

from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

from .campaign import Case
from .outcome import Miss
from .probe import COUNTED, probe

CASES, SHORT = 128, (5, 15, 25, 28)  # each with several settings
_SETTINGS = 25
_STRATEGIES = ("autoregressive", "early-exit", "self-speculative", "adaptive", "lookup", "draft-and-verify")
_KINDS = (
    *("generic", "packed", "windows", "native", "native bf16", "native int8", "native int4", "int8 drafts", "few drafts"),
    *("smollm3", "gemma3_text", "qwen2", "native gemma2", "native gemma3_text", "native granite", "native olmo3"),
    *("native phi3", "native starcoder2"),
    *("generic blocks", "packed blocks", "windows blocks", "native blocks", "native bf16 blocks", "native int8 blocks"),
    *("native int4 blocks", "int8 drafts blocks", "few drafts blocks", "gemma3_text blocks", "native gemma2 blocks"),
    *("native qwen3 blocks", "native smollm3 blocks", "native granite blocks"),
)
_COUNTS = ("prompt_tokens", "new_tokens", "drafted", "accepted", "rounds", "tested_by_position", "accepted_by_position")


def attack(case: Case) -> Iterator[Miss]:
    """Tries several settings on one model."""
    kind = _KINDS[case.number % len(_KINDS)]
    seed = case.random.randrange(2**31)
    case.say(f"{kind}, seed {seed}")
    yield from probe(case, lambda: _settings(kind, Random(seed)), case.random.choice((1, 1, 1, 1, 1, 1, 1, 2)))


def _settings(kind: str, random: Random) -> Iterator[Miss | str]:
    model = _model(kind.removesuffix(" blocks"), random if kind.endswith(" blocks") else None)
    for _ in range(_SETTINGS):
        yield COUNTED
        prompts = [[random.randrange(3, 67) for _ in range(random.randint(1, 14))] for _ in range(random.randint(1, 4))]
        for fault in _faults(model, prompts, random):
            yield Miss("wrong", f"{kind}: {fault}")


def _model(kind: str, with_blocks: Random | None) -> Any:
    """`with_blocks` chooses exits and their blocks."""
    import torch
    from conftest import tiny_model

    from layerskip_core.config.packing import PackingConfig
    from layerskip_core.model import GenericBackend, NativeBackend, PackedBackend, can_run_native
    from layerskip_core.model.architectures import ARCHITECTURES

    wide = {"intermediate_size": 64, "hidden_size": 64}
    if kind in ("generic", "gemma3_text"):
        model = tiny_model("llama" if kind == "generic" else kind)
        return GenericBackend(model, _blocks(model, with_blocks))
    if kind in ("packed", "windows", "smollm3", "qwen2"):
        types = {"packed": "llama", "windows": "mistral"}
        model = tiny_model(types.get(kind, kind), **({"sliding_window": 5} if kind == "windows" else {}))
        return PackedBackend.of(model, exit_blocks=_blocks(model, with_blocks))
    packing = {
        "native int8": PackingConfig(quantize="int8"),
        "native int4": PackingConfig(quantize="int4"),
        "int8 drafts": PackingConfig(draft_weights=("int8",)),
        "few drafts": PackingConfig(draft_vocab=30),
    }.get(kind)
    dtype = torch.bfloat16 if "bf16" in kind or "int4" in kind else torch.float32
    named = kind.removeprefix("native ")
    tiny = tiny_model(named if named in ARCHITECTURES else "llama", dtype, **wide)
    if not can_run_native(tiny.config, dtype, torch.device("cpu"), packing):  # only this backend promises identical bits
        model = tiny_model("llama", torch.float64)
        return PackedBackend.of(model, exit_blocks=_blocks(model, with_blocks))
    return NativeBackend.of(tiny, packing, exit_blocks=_blocks(tiny, with_blocks))


def _blocks(model: Any, random: Random | None) -> Any:
    """Near the weights that training starts from, or far from them."""
    from exit_block_models import random_blocks

    from layerskip_core.model.exit_blocks import NO_BLOCKS, ExitBlock

    if random is None:
        return NO_BLOCKS
    exits = random.sample(range(1, model.config.num_hidden_layers), random.choice((1, 2, 2, 3)))
    blocks = [ExitBlock(exit_layer, random.choice(("none", "final"))) for exit_layer in exits]
    return random_blocks(model, *blocks, scale=random.choice((0.05, 0.3, 2.0)))


def _faults(model: Any, prompts: list[list[int]], random: Random) -> Iterator[str]:
    from layerskip_core.config.decoding import DecodingConfig, SamplingConfig
    from layerskip_core.decoding import decode_batch

    sampled = random.random() < 0.35
    sampling = SamplingConfig(
        random.choice((0.3, 1.0, 3.0)) if sampled else 0.0,
        random.choice((0, 0, 1, 3, 40)),
        random.choice((1.0, 0.9, 0.1)),
        random.randrange(1000),
    )
    strategy = random.choices(_STRATEGIES, (1, 1, 3, 2, 1, 1))[0]
    speculative = strategy not in ("autoregressive", "early-exit")
    weights = random.choice(list(model.draft_sides)) if strategy in ("self-speculative", "draft-and-verify") else None
    free = _alone(model, prompts[0], DecodingConfig("autoregressive", max_new_tokens=20), frozenset())[0]
    config = DecodingConfig(
        strategy,
        random.choice([*model.exit_blocks, *_exits(model, strategy)])
        if speculative
        else random.choice(_exits(model, strategy)),
        random.randint(1, 9),
        random.choices((1, 2, 5, 12, 30, 500), (4, 4, 4, 4, 4, 1))[0],
        random.choice((0.0, 0.0, 0.2, 0.7, 0.99)) if strategy == "self-speculative" else 0.0,
        tuple(_letters(free[place : place + 2]) for place in random.sample(range(18), random.choice((0, 0, 1, 2)))),
        sampling,
        weights,
        lookup=random.choice((0, 0, 1, 2, 5)) if speculative else 0,
        exits=_known_exits(model, random) if strategy == "adaptive" else (),
        skip=tuple(random.sample(range(1, model.num_layers + 1), random.randint(1, model.num_layers - 1)))
        if strategy == "draft-and-verify"
        else (),
    )
    ends = frozenset(random.sample(free, random.choice((0, 0, 1, 2))))
    where = f"{config}, ends {sorted(ends)}, prompts {prompts}"
    alone = [_alone(model, prompt, config, ends) for prompt in prompts]
    for prompt, (ids, reason, stats) in zip(prompts, alone, strict=True):
        yield from (f"{fault}; {where}" for fault in _inconsistent(model, prompt, config, ids, reason, stats))
    if not sampled and speculative:
        plain = DecodingConfig("autoregressive", None, 1, config.max_new_tokens, 0.0, config.stop)
        for place, prompt in enumerate(prompts):
            if (expected := _alone(model, prompt, plain, ends)[:2]) != alone[place][:2]:
                yield f"speculation gave {alone[place][:2]}, plain decoding {expected}; {where}"
    if random.random() < 0.3:
        yield from (f"{fault}; {where}" for fault in _depth_faults(model, prompts[0], config, ends, random))
    if random.random() < 0.25:
        yield from (f"{fault}; {where}" for fault in _prefix_faults(model, prompts, config, ends))
    if not (sampled and speculative) and random.random() < 0.25:
        for row, ids in enumerate(_joining(model, prompts, config, ends, random)):
            if ids != alone[row][0]:
                yield f"row {row}, which joined a batch, gave {ids}, alone {alone[row][0]}; {where}"
    crowded = any(reason == "context" for _, reason, _ in alone)  # near the context's end the longest row limits the drafts
    mixed = (
        config.lookup and strategy != "lookup"
    )  # where some rows found a text to copy, the others draft nothing in this round
    for output in decode_batch(model, prompts, config, ends, _letters):
        ids, reason, stats = alone[output.row]
        if sampled and speculative:  # draws depend on the number of drafts, which other rows may limit
            continue
        if (output.ids, output.finish_reason) != (ids, reason):
            yield f"row {output.row} of the batch gave {output.ids}, {output.finish_reason}, alone {ids}, {reason}; {where}"
        elif (
            not (crowded or mixed)
            and strategy != "adaptive"
            and (different := [name for name in _COUNTS if getattr(output.stats, name) != getattr(stats, name)])
        ):
            found = ", ".join(f"{name} {getattr(output.stats, name)} and {getattr(stats, name)}" for name in different)
            yield f"row {output.row} of the batch counts otherwise than alone: {found}; {where}"


def _known_exits(model: Any, random: Random) -> tuple[int, ...]:
    """The exits that adaptive drafting chooses among: those with blocks, else any, or none."""
    others = random.sample(range(1, model.num_layers), random.choice((0, 1, 3)))
    return tuple(model.exit_blocks) or tuple(sorted(others))


def _prefix_faults(model: Any, prompts: list[list[int]], config: Any, ends: frozenset[int]) -> Iterator[str]:
    """Texts one after another, each beginning with a part of the one before, as the turns of a conversation do."""
    from layerskip_core.decoding import PrefixCache, decode

    known, text = PrefixCache(), prompts[0]
    for more in (*prompts[1:], prompts[0]):
        expected = _alone(model, text, config, ends)[0]
        decoding = decode(model, text, config, ends, _letters, prefix=known)
        ids = [token.id for tokens in decoding for token in tokens]
        if ids != expected:
            yield f"after another text {text} gave {ids}, by itself {expected}"
        text = [*text, *ids, *more] if len(text) + len(ids) + len(more) < model.max_positions // 2 else text[: len(more)]


def _joining(model: Any, prompts: list[list[int]], config: Any, ends: frozenset[int], random: Random) -> list[list[int]]:
    """The outputs of prompts of which each joins the others after some of their steps."""
    from layerskip_core.decoding.strategies import loop_of

    outputs: list[list[int]] = [[] for _ in prompts]
    owners: dict[int, int] = {}
    running = None
    for place, prompt in enumerate(prompts):
        loop = loop_of(model, [prompt], config, ends, _letters)
        (step,) = next(loop)
        outputs[place] += [token.id for token in step.tokens]
        if step.finish_reason is None:
            if running is None or not owners:
                running, row = loop, step.row
            else:
                (row,) = running.join(loop)
            owners[row] = place
        last = place == len(prompts) - 1
        steps = 1000 if last else random.randint(0, 3)
        while owners and running is not None and steps > 0:
            steps -= 1
            for step in next(running):
                outputs[owners[step.row]] += [token.id for token in step.tokens]
                if step.finish_reason is not None:
                    del owners[step.row]
    return outputs


def _exits(model: Any, strategy: str) -> list[int]:
    """The exits that a strategy may have: below the last layer for drafts, any for answers that no feature is needed for."""
    if strategy != "early-exit":
        return list(range(1, model.num_layers))
    only_drafting = {exit_layer for exit_layer, block in model.exit_blocks.items() if not block.stands_alone}
    return [exit_layer for exit_layer in range(1, model.num_layers + 1) if exit_layer not in only_drafting]


def _depth_faults(model: Any, prompt: list[int], config: Any, ends: frozenset[int], random: Random) -> Iterator[str]:
    config = replace(config, draft_weights=None, exits=())
    known = _exits(model, "early-exit")[:-1]
    exits = tuple(sorted(random.sample(known, random.randint(1, len(known)))))
    always = replace(config, strategy="early-exit", exit_layer=exits[0])
    for confidence, same in ((1.0, replace(config, strategy="autoregressive")), (5e-324, always), (random.random(), None)):
        own = replace(config, strategy="early-exit", exits=exits, exit_confidence=confidence)
        ids, reason, stats = _alone(model, prompt, own, ends)
        yield from _inconsistent(model, prompt, own, ids, reason, stats)
        if sum(stats.tokens_by_layers) != len(ids) or len(stats.tokens_by_layers) > model.num_layers:
            yield f"{stats.tokens_by_layers} by layers for {len(ids)} tokens, exits {exits}, confidence {confidence}"
        if same is not None and (expected := _alone(model, prompt, same, ends)[:2]) != (ids, reason):
            yield f"exits {exits} with confidence {confidence} gave {(ids, reason)}, {same.strategy} {expected}"


def _alone(model: Any, prompt: list[int], config: Any, ends: frozenset[int]) -> tuple[list[int], Any, Any]:
    from layerskip_core.decoding import decode

    decoding = decode(model, prompt, config, ends, _letters)
    ids = [token.id for tokens in decoding for token in tokens]
    return ids, decoding.finish_reason, decoding.stats


def _letters(ids: list[int]) -> str:
    return "".join(chr(ord("0") + token) for token in ids)


def _inconsistent(model: Any, prompt: list[int], config: Any, ids: list[int], reason: Any, stats: Any) -> Iterator[str]:
    """Contradictions in the counts of one output."""
    if stats.new_tokens != len(ids) or stats.prompt_tokens != len(prompt):
        yield f"counts of {stats.prompt_tokens} and {stats.new_tokens} tokens for {len(prompt)} and {len(ids)}"
    if not 0 <= stats.accepted <= stats.drafted or stats.accepted >= max(1, len(ids)):
        yield f"{stats.accepted} accepted of {stats.drafted} drafts in {len(ids)} tokens"
    if sum(stats.accepted_by_position) != stats.accepted or stats.rounds > stats.drafted:
        yield f"{stats.accepted_by_position} by position, {stats.accepted} in all, {stats.rounds} rounds"
    room = min(config.max_new_tokens, model.max_positions - len(prompt))
    if len(ids) > room or (reason in ("length", "context")) != (len(ids) == room and reason not in ("eos", "stop")):
        yield f"{len(ids)} tokens of {room} ended by {reason}"
    if any(not 0 <= token < model.vocab_size for token in ids):
        yield f"a token beyond the vocabulary in {ids}"
