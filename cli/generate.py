"""`layerskip generate`: prompts in, text out, for shell pipelines."""

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from layerskip_core.config.checks import require_choice, require_exit_layer, require_given
from layerskip_core.config.decoding import DecodingConfig, SamplingConfig
from layerskip_core.config.packing import DTYPES
from layerskip_core.config.ranges import require_ranges

from . import standard_input
from .answers import answer_all, answer_in_batches
from .console import (
    Device,
    DraftVocab,
    DraftWeights,
    Exact,
    Precision,
    Quantize,
    Threads,
    narrate,
    narrate_notes,
    packing,
    use_threads,
)

if TYPE_CHECKING:
    from layerskip_core.checkpoint.loaded import Decoder
    from layerskip_core.decoding import DecodeStats

_UNMEASURED = (
    "decoding without drafts, because no exit of this model was trained or measured: `layerskip finetune` trains exits, "
    "`layerskip sweep-exits --save` finds one that pays, --exit N tries one"
)


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; without it, standard input is read.")] = None,
    model: Annotated[str, typer.Option(help="embedded, embedded-base, a folder, a .gguf file or a hub id.")] = "embedded",
    exit_layer: Annotated[
        int | None, typer.Option("--exit", help="Draft with this many layers. [default: the checkpoint's]")
    ] = None,
    spec: Annotated[int | None, typer.Option("--spec", help="Drafted tokens a round. [default: the checkpoint's]")] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="self-speculative, early-exit or autoregressive. [default: self-speculative, but autoregressive for a model "
            "whose exits nobody trained or measured, unless --exit or another flag about drafts is given]"
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k most probable tokens; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the most probable tokens of this total probability.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    draft_confidence: Annotated[float, typer.Option(help="Stop drafting below this probability; 0 is never.")] = 0.0,
    lines: Annotated[bool, typer.Option("--lines", help="Standard input holds one prompt a line.")] = False,
    jsonl: Annotated[
        bool, typer.Option("--jsonl", help="Standard input holds objects with `prompt`, one a line; answers are objects too.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Prompts of --lines or --jsonl to decode together.")] = 1,
    raw: Annotated[
        bool, typer.Option("--raw", help="Leave out the prompt template; special tokens in the prompt count.")
    ] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print counts and speed to stderr.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    device: Device = "auto",
    dtype: Precision = "auto",
    quantize: Quantize = None,
    draft_weights: DraftWeights = None,
    draft_vocab: DraftVocab = 0,
    exact: Exact = False,
    threads: Threads = 0,
) -> None:
    """Generate text with self-speculative decoding: the text of plain decoding, in fewer full passes.

    A model whose exits were neither trained (finetune) nor measured (sweep-exits --save) is decoded plainly.

    Example: printf 'remind me to call mom at 5' | layerskip generate --exit 8 --spec 6
    """
    if prompt is not None and (lines or jsonl):
        raise typer.BadParameter("--lines and --jsonl read standard input; give no PROMPT with them")
    if lines and jsonl:
        raise typer.BadParameter("give --lines or --jsonl, not both")
    if batch_size > 1 and not (lines or jsonl):
        raise typer.BadParameter("--batch-size is for the prompts of --lines or --jsonl")
    if prompt is None and not standard_input.is_piped():
        raise typer.BadParameter("give a PROMPT, or pipe one into standard input")
    require_ranges(batch_size=batch_size)
    require_given("model", model)
    config = DecodingConfig(
        strategy=strategy or "self-speculative",
        exit_layer=exit_layer if exit_layer is not None else 1,
        num_draft_tokens=spec if spec is not None else 1,
        max_new_tokens=max_new_tokens,
        draft_confidence=draft_confidence,
        stop=tuple(stop or ()),
        sampling=SamplingConfig(temperature, top_k, top_p, seed),
    )
    require_choice(dtype, "dtype", DTYPES)
    weights = packing(quantize, draft_weights, draft_vocab, exact, exit_layer or 0)
    use_threads(threads)
    from layerskip_core.checkpoint.load import for_decoding

    loaded = for_decoding(model, device, dtype, weights)
    narrate_notes(loaded)
    use_threads(threads, loaded)
    drafting = exit_layer is not None or spec is not None or weights.drafts_apart or draft_confidence > 0
    config = _resolved(config, loaded, exit_layer, spec, known=strategy is not None or drafting)
    try:
        if batch_size > 1:
            failed, total = answer_in_batches(loaded, config, batch_size, jsonl, raw)
        else:
            failed, total = answer_all(loaded, config, prompt, lines, jsonl, raw)
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        raise typer.Exit(130) from None
    if stats:
        narrate(_stats_text(total, loaded))
    if failed:
        raise typer.Exit(1)


def _resolved(
    config: DecodingConfig, loaded: "Decoder", exit_layer: int | None, spec: int | None, known: bool
) -> DecodingConfig:
    """The config with the checkpoint's exit and draft length where none was given, and its strategy unless that is `known`."""
    strategy = config.strategy
    if not known:
        strategy = loaded.strategy or "autoregressive"
    best_exit, best_spec = loaded.recommended()
    chosen_exit = best_exit if exit_layer is None else exit_layer
    if strategy != "autoregressive":
        require_exit_layer(chosen_exit, loaded.backend.num_layers, strategy)
    num_draft_tokens = best_spec if spec is None else spec
    config = replace(config, strategy=strategy, exit_layer=chosen_exit, num_draft_tokens=num_draft_tokens)
    if not known and loaded.strategy is None:
        narrate(_UNMEASURED)
    return config


def _stats_text(stats: "DecodeStats", loaded: "Decoder") -> str:
    return (
        f"{stats.new_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s; drafted {stats.drafted}, "
        f"accepted {stats.accepted} ({stats.acceptance_rate:.1%}) in {stats.rounds} rounds; "
        f"{loaded.backend.implementation} layers, {str(loaded.backend.dtype).removeprefix('torch.')} on {loaded.backend.device}"
    )
