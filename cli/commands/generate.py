"""`layerskip generate`: prompts in, text out, for shell pipelines."""

import sys
from typing import Annotated

import typer

from layerskip_core.config.checks import require
from layerskip_core.config.decoding import DecodingConfig, DecodingOptions
from layerskip_core.config.machine import MachineConfig
from layerskip_core.config.options import INPUT, MODEL, OUTPUT, BatchSize, check
from layerskip_core.config.packing import PackingConfig
from layerskip_core.config.prompting import PromptingConfig
from layerskip_core.errors import LayerSkipError

from .. import streams
from ..answers import answer_all, answer_in_batches
from ..console import narrate
from ..loading import load_to_decode
from ..requests import Request, read_requests, requests_of
from ..signature import command
from ..stats import stats_text


@command
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt. [default: standard input, or an example on a terminal]")
    ] = None,
    lines: Annotated[
        bool, typer.Option("--lines", help="Standard input holds one prompt per line.", rich_help_panel=INPUT)
    ] = False,
    jsonl: Annotated[
        bool,
        typer.Option(
            "--jsonl",
            help="Standard input holds one JSON object with a `prompt` per line; answers are objects too. `policy`, "
            "`max_new_tokens`, `temperature`, `stop` and other options of decoding in an object are for its prompt alone.",
            rich_help_panel=INPUT,
        ),
    ] = False,
    batch_size: Annotated[
        int, typer.Option(help="Prompts of --lines or --jsonl to decode together.", rich_help_panel=INPUT)
    ] = 1,
    model: Annotated[
        str, typer.Option(help="embedded, embedded-base, a folder, a .gguf file or a hub id.", rich_help_panel=MODEL)
    ] = "embedded",
    *,
    decoding: DecodingOptions,
    prompting: PromptingConfig,
    packing: PackingConfig,
    machine: MachineConfig,
    stats: Annotated[
        bool,
        typer.Option("--stats", help="Print counts, speed and the prompt template to stderr.", rich_help_panel=OUTPUT),
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
    if (lines or jsonl) and not streams.is_piped():
        raise typer.BadParameter("pipe the prompts of --lines or --jsonl into standard input")
    if prompt is None and not (streams.is_piped() or streams.is_terminal()):
        raise typer.BadParameter("give a PROMPT, or pipe one into standard input")
    check("batch_size", BatchSize, batch_size)
    single = batch_size == 1 or not decoding.get("exit_confidence")
    require(single, "batch_size", "1 with `exit_confidence`", batch_size)
    loaded, usual = load_to_decode(model, decoding, prompting, packing, machine, all_policies=jsonl)

    def resolve(request: Request) -> DecodingConfig:
        if request.problem is not None:
            raise LayerSkipError(request.problem)
        return usual if request.options is None else loaded.resolve(request.options, packing)

    if prompt is None and streams.is_terminal():
        prompt = streams.example_prompt()
    given = streams.PromptLines()
    requests = requests_of(given, jsonl, decoding) if lines or jsonl else read_requests(prompt)
    try:
        if batch_size > 1:
            failed, total = answer_in_batches(loaded, resolve, requests, given.is_ready, batch_size, jsonl)
        else:
            failed, total = answer_all(loaded, resolve, requests, lines, jsonl)
    except KeyboardInterrupt:
        if not jsonl:  # whose lines are objects
            sys.stdout.write("\n")
        raise typer.Exit(130) from None
    if stats:
        narrate(stats_text(total, loaded, usual.policy))
    if failed:
        raise typer.Exit(1)
