"""Generate text from prompts."""

import sys
from typing import Annotated

import typer

from layerskip_core.config.options import BatchSize, Flag
from layerskip_core.errors import require

from .. import streams
from ..answers import Request, print_answers, requests_of, stats_text
from ..console import narrate
from ..loading import DecoderFlags, load_to_decode
from ..options import Prompt, command


@command
def generate(
    prompt: Prompt = None,
    lines: Annotated[bool, Flag("Input", "Standard input holds one prompt per line.")] = False,
    jsonl: Annotated[
        bool,
        Flag(
            "Input",
            "Standard input holds one JSON object with a `prompt` per line; answers are objects too. `policy`, "
            "`max_new_tokens`, `temperature`, `stop` and other options of decoding in an object are for its prompt alone.",
        ),
    ] = False,
    batch_size: Annotated[BatchSize, Flag("Input", "Prompts of --lines or --jsonl to decode together.")] = 1,
    *,
    flags: DecoderFlags,
    stats: Annotated[bool, Flag("Output", "Print counts, speed and the prompt template to stderr.")] = False,
) -> None:
    """Generate text with self-speculative decoding: the same text as autoregressive decoding, in fewer full passes.

    Without --exit, --spec or --strategy it drafts adaptively: by lookups in the text, by the exits of a model that `finetune`
    trained or by an int8 copy of any other, or not at all, whichever is fastest at the moment.

    Example: printf 'remind me to call mom at 5' | layerskip generate --exit 8 --spec 6
    """
    several = lines or jsonl
    for wrong, told in (
        (several and prompt is not None, "--lines and --jsonl read standard input; give no PROMPT with them"),
        (lines and jsonl, "give --lines or --jsonl, not both"),
        (batch_size > 1 and not several, "--batch-size is for the prompts of --lines or --jsonl"),
        (several and not streams.is_piped(), "pipe the prompts of --lines or --jsonl into standard input"),
        (
            prompt is None and not (streams.is_piped() or streams.is_terminal()),
            "give a PROMPT, or pipe one into standard input",
        ),
    ):
        if wrong:
            raise typer.BadParameter(told)
    single = batch_size == 1 or not flags.decoding.get("exit_confidence")
    require(single, "batch_size", "1 with `exit_confidence`", batch_size)
    loaded, usual = load_to_decode(flags, all_policies=jsonl)
    given = streams.PromptLines()
    if several:
        requests = requests_of(given, jsonl, flags.decoding, usual, lambda options: loaded.resolve(options, flags.packing))
    else:
        requests = iter([Request(1, streams.given_prompt(prompt, may_be_empty=True), usual)])
    try:
        failed, total = print_answers(loaded, requests, batch_size, given.is_ready, not several, jsonl)
    except KeyboardInterrupt:
        if not jsonl:  # whose lines are objects
            sys.stdout.write("\n")
        raise typer.Exit(130) from None
    if stats:
        narrate(stats_text(total, loaded, usual.policy))
    if failed:
        raise typer.Exit(1)
