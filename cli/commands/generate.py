"""Generate text from prompts."""

import json
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from layerskip_core.config.decoding import (
    REMEMBERED,
    DecodingConfig,
    Remember,
    RequestOptions,
    changed,
)
from layerskip_core.config.options import BatchSize, Flag, checked, hints_of
from layerskip_core.errors import DataError, LayerSkipError, plural
from layerskip_core.files import parse_json

from .. import console
from ..console import narrate
from ..loading import DecoderFlags, load_to_decode
from ..options import Prompt, command

if TYPE_CHECKING:
    from layerskip_core.checkpoint.loaded import Decoder
    from layerskip_core.decoding import Answer, DecodeStats
    from layerskip_core.decoding.drafters.lookup import EarlierAnswers
    from layerskip_core.decoding.output import TokenLogprobs

_COUNTS = (
    "prompt_tokens",
    "new_tokens",
    "drafted",
    "accepted",
    "rounds",
    "acceptance_rate",
    "steps_by_drafter",
    "mean_layers",
)
_OPTIONS = re.compile(f"`({'|'.join(hints_of(RequestOptions))})`")


@command
def generate(
    prompt: Prompt = None,
    lines: Annotated[
        bool, Flag("Standard input holds one prompt per line.", panel="Input")
    ] = False,
    jsonl: Annotated[
        bool,
        Flag(
            "Standard input holds one JSON object with a `prompt` per line; answers are objects too. `policy`, "
            "`max_new_tokens`, `temperature`, `stop` and other decoding options in an object apply to its prompt alone.",
            panel="Input",
        ),
    ] = False,
    batch_size: Annotated[
        BatchSize, Flag("Prompts of --lines or --jsonl to decode together.", panel="Input")
    ] = 1,
    *,
    flags: DecoderFlags,
    remember: Remember = REMEMBERED,
    stats: Annotated[
        bool,
        Flag(
            "Print counts, speed, memory bandwidth and the prompt template to stderr.",
            panel="Output",
        ),
    ] = False,
) -> None:
    """Generate text with self-speculative decoding: the same text as autoregressive decoding, in
    fewer full passes.

    Without --exit, --spec or --strategy every round drafts by whatever is fastest: lookups in the
    text, trained exits, an int8 copy of the model, other drafters, or not at all.

    Example: printf 'remind me to call mom at 5' | layerskip generate --exit 8 --spec 6
    """
    several = lines or jsonl
    is_piped = console.is_piped()
    for is_wrong, reason in (
        (
            several and prompt is not None,
            "--lines and --jsonl read standard input; give no PROMPT with them",
        ),
        (lines and jsonl, "give --lines or --jsonl, not both"),
        ("logprobs" in flags.decoding and not jsonl, "--logprobs is for the answers of --jsonl"),
        (batch_size > 1 and not several, "--batch-size is for the prompts of --lines or --jsonl"),
        (several and not is_piped, "pipe the prompts of --lines or --jsonl into standard input"),
        (
            prompt is None and not (is_piped or console.is_terminal()),
            "give a PROMPT, or pipe one into standard input",
        ),
    ):
        if is_wrong:
            raise typer.BadParameter(reason)
    loaded, usual = load_to_decode(flags, all_policies=jsonl)
    given = console.PromptLines()
    if several:
        requests = requests_of(
            given,
            jsonl,
            flags.decoding,
            usual,
            lambda options: loaded.resolve(options, flags.packing),
        )
    else:
        requests = iter([Request(1, console.given_prompt(prompt, may_be_empty=True), usual)])
    from layerskip_core.decoding.drafters.lookup import EarlierAnswers

    earlier = EarlierAnswers(remember)
    is_ready = given.is_ready
    answers: Answers = ((request, None) for request in requests)
    if batch_size > 1:
        answers = _together(loaded, requests, earlier, batch_size, is_ready)
    try:
        failed, total = print_answers(loaded, answers, earlier, not several, jsonl)
    except KeyboardInterrupt:
        if not jsonl:  # JSON lines are written whole
            sys.stdout.write("\n")
        raise typer.Exit(130) from None
    if stats:
        _narrate_stats(loaded, usual, total, batch_size)
    if failed:
        raise typer.Exit(1)


def _narrate_stats(
    loaded: "Decoder", usual: DecodingConfig, total: "DecodeStats", batch_size: int
) -> None:
    from layerskip_core.evaluation.measure.cost_model import bandwidth, plain_step, speed_of
    from layerskip_core.evaluation.results import bandwidth_text

    narrate(bandwidth_text(bandwidth(loaded, plain_step(loaded))))
    narrate(stats_text(total, loaded, usual.policy))
    by_exit = (
        usual.strategy == "self-speculative"
        and usual.policy is None
        and total.rounds
        and batch_size == 1
    )
    if by_exit and (speed := speed_of(loaded, total)) < 1:
        narrate(
            f"about {speed:.2f}x of plain decoding: --strategy adaptive chooses the fastest for every round"
        )


@dataclass
class Request:
    """A prompt, its line number and its options. `error`: why it cannot be decoded. `id`: as given
    in its row.
    """

    number: int
    prompt: str
    config: DecodingConfig
    error: LayerSkipError | None = None
    id: Any = None


def requests_of(
    lines: Iterable[str],
    jsonl: bool,
    flags: RequestOptions,
    usual: DecodingConfig,
    resolve: Callable[[Any], DecodingConfig],
) -> Iterator[Request]:
    """Yields a request per line, with the config `usual`; a row of `jsonl` may override `flags`."""
    for number, line in enumerate(lines, start=1):
        if not jsonl:
            yield Request(number, line, usual)
        elif line.strip():
            request = Request(number, "", usual)
            try:
                row = parse_json(line, "row", DataError)
                prompt, request.id = (
                    (row.get("prompt"), row.get("id")) if isinstance(row, dict) else (None, None)
                )
                if not isinstance(prompt, str):
                    raise DataError("needed an object with a text `prompt`")
                request.prompt = prompt
                options = {
                    key: value for key, value in row.items() if key in hints_of(RequestOptions)
                }
                if own := checked(RequestOptions, options):
                    request.config = resolve(changed(flags, cast(RequestOptions, own)))
            except LayerSkipError as error:
                request.error = error
            yield request


Answers = Iterator[tuple[Request, "Answer | None"]]


def print_answers(
    loaded: "Decoder", answers: Answers, earlier: "EarlierAnswers", alone: bool, jsonl: bool
) -> tuple[bool, "DecodeStats"]:
    """Prints answers in order, decoding those still None; returns (any failed, summed counts).
    `alone`: errors are raised.
    """
    from layerskip_core.decoding import DecodeStats
    from layerskip_core.decoding.dialogue import TextStream

    failed = False
    total = DecodeStats()
    for request, ready in answers:
        named = {"line": request.number} | ({} if request.id is None else {"id": request.id})
        try:
            if request.error is not None:
                raise request.error
            answer = ready or TextStream(loaded, request.prompt, request.config, earlier=earlier)
            for piece in answer if isinstance(answer, TextStream) else [answer.text]:
                if not jsonl:
                    _write(piece)
        except LayerSkipError as error:
            if alone:
                raise
            failed = True
            message = f"line {request.number}: {str(error).removeprefix('row: ')}"
            if jsonl:  # with the row's keys, where other messages have flags
                _write(
                    json.dumps({**named, "error": _OPTIONS.sub(r"\1", message)}, ensure_ascii=False)
                )
            else:
                narrate(f"error: {message}")
        else:
            stats = answer.stats
            total = total + stats
            if jsonl:
                counts = {name: getattr(stats, name) for name in _COUNTS}
                rounded = {
                    "acceptance_rate": round(stats.acceptance_rate, 4),
                    "mean_layers": round(stats.mean_layers, 2),
                }
                document = named | {
                    "text": answer.text,
                    "finish_reason": answer.finish_reason,
                    "policy": request.config.policy,
                }
                whole = answer.answer if isinstance(answer, TextStream) else answer
                for name in ("logprobs", "prompt_logprobs"):
                    if listed := getattr(whole, name):
                        document[name] = [
                            _logprob_document(one, loaded.token_text) for one in listed
                        ]
                _write(json.dumps(document | counts | rounded, ensure_ascii=False))
        _write("\n")
    return failed, total


def _together(
    loaded: "Decoder",
    requests: Iterator[Request],
    earlier: "EarlierAnswers",
    batch_size: int,
    is_ready: Callable[[], bool],
) -> Answers:
    """Decodes up to `batch_size` requests at once. `is_ready`: whether the next can be read without
    waiting.
    """
    from layerskip_core.serving.batch import PromptOrError, answers_to

    unanswered = deque[Request]()

    def read() -> Iterator[PromptOrError]:
        for request in requests:
            unanswered.append(request)
            try:
                if request.error is not None:
                    raise request.error
                asked: PromptOrError = (loaded.encode_prompt(request.prompt), request.config)
            except LayerSkipError as error:
                asked = error
            yield asked

    for answer in answers_to(loaded, read(), batch_size, earlier, is_ready):
        request = unanswered.popleft()
        request.error = answer if isinstance(answer, LayerSkipError) else answer.error
        if isinstance(answer, LayerSkipError):
            yield request, None
        else:
            yield request, answer


def _logprob_document(one: "TokenLogprobs", text_of: Callable[[int], str]) -> dict[str, Any]:
    """A token, its log probability and the top alternatives, as an object."""
    own, *top = (
        {"id": token, "token": text_of(token), "logprob": round(logprob, 6)}
        for token, logprob in ((one.id, one.logprob), *one.top)
    )
    return {**own, "top": top}


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def stats_text(stats: "DecodeStats", loaded: "Decoder", policy: str | None) -> str:
    """Counts and speed of answers, and how they were decoded."""
    backend = loaded.backend
    graphs = ", CUDA graphs" if stats.replayed else ""
    steps = ", ".join(
        f"{name}: {count}"
        for name, count in sorted(stats.steps_by_drafter.items(), key=lambda item: -item[1])
    )
    exits = ""
    if sum(stats.tokens_by_layers[: backend.num_layers - 1]):  # some tokens left early
        by_exit = (
            f"exit {layers}: {count}"
            for layers, count in enumerate(stats.tokens_by_layers, start=1)
            if count
        )
        exits = f"{stats.mean_layers:.1f} layers per token ({', '.join(by_exit)}); "
    return (
        f"{plural(stats.new_tokens, 'token')}, {stats.tokens_per_second:.1f} tokens/s; {exits}drafted {stats.drafted}, "
        f"accepted {stats.accepted} ({stats.acceptance_rate:.1%}) in {plural(stats.rounds, 'round')}; "
        f"{f'steps by {steps}; ' if steps else ''}"
        f"layers: {backend.implementation}{graphs}, {str(backend.dtype).removeprefix('torch.')} on "
        f"{backend.device}; prompt template: {loaded.template.name}{'' if policy is None else f'; policy: {policy}'}"
    )
