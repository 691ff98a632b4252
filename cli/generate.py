"""`layerskip generate`: prompts in, text out, for shell pipelines."""

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from layerskip_core.config.checks import require, require_given
from layerskip_core.config.decoding import DecodingSettings
from layerskip_core.config.machine import MachineConfig
from layerskip_core.config.packing import PackingConfig
from layerskip_core.config.policies import EXACT
from layerskip_core.config.prompting import PromptingConfig
from layerskip_core.config.ranges import require_ranges

from . import options, standard_input
from .answers import answer_all, answer_in_batches
from .console import narrate, narrate_notes, use_threads
from .requests import read_requests
from .signature import command

if TYPE_CHECKING:
    from layerskip_core.checkpoint.loaded import Decoder
    from layerskip_core.decoding import DecodeStats


@command
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt. [default: standard input]")] = None,
    lines: Annotated[
        bool, typer.Option("--lines", help="Standard input holds one prompt per line.", rich_help_panel=options.INPUT)
    ] = False,
    jsonl: Annotated[
        bool,
        typer.Option(
            "--jsonl",
            help="Standard input holds one JSON object with a `prompt` per line; answers are objects too. `policy`, "
            "`max_new_tokens`, `temperature`, `top_k`, `top_p`, `seed` and `stop` of an object are for its prompt alone.",
            rich_help_panel=options.INPUT,
        ),
    ] = False,
    batch_size: Annotated[
        int, typer.Option(help="Prompts of --lines or --jsonl to decode together.", rich_help_panel=options.INPUT)
    ] = 1,
    model: Annotated[
        str, typer.Option(help="embedded, embedded-base, a folder, a .gguf file or a hub id.", rich_help_panel=options.MODEL)
    ] = "embedded",
    *,
    decoding: DecodingSettings,
    prompting: PromptingConfig,
    packing: PackingConfig,
    machine: MachineConfig,
    stats: Annotated[
        bool,
        typer.Option("--stats", help="Print counts, speed and the prompt template to stderr.", rich_help_panel=options.OUTPUT),
    ] = False,
) -> None:
    """Generate text with self-speculative decoding: the same text as autoregressive decoding, in fewer full passes.

    Without --exit, --spec or --strategy it drafts adaptively: by lookups in the text, by the exits of a model that `finetune`
    trained or by an int8 copy of any other, or not at all, whichever is fastest at the moment.

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
    single = batch_size == 1 or not decoding.generation.exit_confidence
    require(single, "batch_size", "1 with `exit_confidence`", batch_size)
    require_given("model", model)
    use_threads(machine.threads)
    from layerskip_core.checkpoint.load import for_decoding

    adaptive = decoding.policy is None and decoding.implied_strategy in (None, "adaptive")
    kept = replace(packing, draft_layers=decoding.exit_layer or 0, adaptive=adaptive)
    used = decoding.policy or (EXACT if decoding.is_open and not packing.drafts_apart else None)
    policies = None if jsonl else () if used is None else (used,)
    loaded = for_decoding(model, machine.device, machine.dtype, kept, policies)
    loaded = loaded.with_template(prompting.asked, prompting.system)
    narrate_notes(loaded)
    use_threads(machine.threads, loaded)
    policy = loaded.policy_for(decoding, packing)
    loaded.resolve(decoding, packing)  # so that a wrong flag is one error, not one per prompt
    requests = read_requests(prompt, lines, jsonl, decoding)
    try:
        if batch_size > 1:
            failed, total = answer_in_batches(loaded, packing, requests, batch_size, jsonl)
        else:
            failed, total = answer_all(loaded, packing, requests, lines, jsonl)
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        raise typer.Exit(130) from None
    if stats:
        narrate(_stats_text(total, loaded, policy))
    if failed:
        raise typer.Exit(1)


def _stats_text(stats: "DecodeStats", loaded: "Decoder", policy: str | None) -> str:
    steps = ", ".join(f"{name}: {count}" for name, count in sorted(stats.steps_by_drafter.items(), key=lambda item: -item[1]))
    return (
        f"{stats.new_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s; "
        f"{_exits_text(stats, loaded.backend.num_layers)}drafted {stats.drafted}, "
        f"accepted {stats.accepted} ({stats.acceptance_rate:.1%}) in {stats.rounds} rounds; "
        f"{f'steps by {steps}; ' if steps else ''}"
        f"layers: {loaded.backend.implementation}, {str(loaded.backend.dtype).removeprefix('torch.')} on "
        f"{loaded.backend.device}; prompt template: {loaded.template.name}{'' if policy is None else f'; policy: {policy}'}"
    )


def _exits_text(stats: "DecodeStats", num_layers: int) -> str:
    """`6.1 layers per token (exit 4: 27, exit 8: 4, exit 24: 3); ` if any token left early, else nothing."""
    if sum(stats.tokens_by_layers[: num_layers - 1]) == 0:
        return ""
    exits = ", ".join(f"exit {layers}: {count}" for layers, count in enumerate(stats.tokens_by_layers, start=1) if count)
    return f"{stats.mean_layers:.1f} layers per token ({exits}); "
