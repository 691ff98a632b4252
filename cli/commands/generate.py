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
from ..loading import DecoderFlags, load_to_decode, offer_calibration
from ..options import Prompt, command

if TYPE_CHECKING:
    from layerskip_core.checkpoint.loaded import Decoder
    from layerskip_core.decoding import Answer, DecodeStats
    from layerskip_core.decoding.dialogue import TextStream
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
_DECODED = hints_of(RequestOptions)  # keys of a row that say how it is decoded


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
    _check_usage(prompt, lines, jsonl, batch_size, flags)
    loaded, config = load_to_decode(flags, all_policies=jsonl)
    from layerskip_core.decoding.drafters.lookup import EarlierAnswers

    earlier = EarlierAnswers(remember)
    prompts = console.PromptLines()
    if jsonl:
        requests = _rows(prompts, loaded, config, flags)
    elif lines:
        requests = (Request(number, line, config) for number, line in enumerate(prompts, start=1))
    else:
        requests = iter([Request(1, console.given_prompt(prompt, may_be_empty=True), config)])
    if batch_size > 1:
        answers = _together(loaded, requests, earlier, batch_size, prompts.is_ready)
    else:
        answers = _one_by_one(loaded, requests, earlier)
    printer = _Printer(loaded, jsonl, raises=not (lines or jsonl))
    try:
        for request, answer in answers:
            printer.print(request, answer)
    except KeyboardInterrupt:
        if not jsonl:  # JSON lines are written whole
            sys.stdout.write("\n")
        raise typer.Exit(130) from None
    if stats:
        _narrate_stats(loaded, config, printer.total, batch_size)
    if printer.has_failed:
        raise typer.Exit(1)


def _check_usage(
    prompt: str | None, lines: bool, jsonl: bool, batch_size: int, flags: DecoderFlags
) -> None:
    """Raises Typer's BadParameter for flags that exclude each other."""
    if lines and jsonl:
        raise typer.BadParameter("give --lines or --jsonl, not both")
    if "logprobs" in flags.decoding and not jsonl:
        raise typer.BadParameter("--logprobs is for the answers of --jsonl")
    if lines or jsonl:
        if prompt is not None:
            raise typer.BadParameter(
                "--lines and --jsonl read standard input; give no PROMPT with them"
            )
        if not console.is_piped():
            raise typer.BadParameter("pipe the prompts of --lines or --jsonl into standard input")
        return
    if batch_size > 1:
        raise typer.BadParameter("--batch-size is for the prompts of --lines or --jsonl")
    if prompt is None and not (console.is_piped() or console.is_terminal()):
        raise typer.BadParameter("give a PROMPT, or pipe one into standard input")


@dataclass(frozen=True)
class Request:
    """A prompt, its line number and how to decode it."""

    number: int
    prompt: str
    config: DecodingConfig
    error: LayerSkipError | None = None  # why it cannot be decoded
    id: Any = None  # as given in its row


AnswerStream = Iterator[tuple[Request, "Answer | TextStream | LayerSkipError"]]


def _rows(
    lines: Iterable[str], loaded: "Decoder", config: DecodingConfig, flags: DecoderFlags
) -> Iterator[Request]:
    """Yields a request per JSON object; its decoding options override the flags."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row: Any = {}
        try:
            row = parse_json(line, "row", DataError)
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise DataError("needed an object with a text `prompt`")
            own = checked(
                RequestOptions, {key: value for key, value in row.items() if key in _DECODED}
            )
            options = changed(flags.decoding, cast(RequestOptions, own))
            row_config = loaded.resolve(options, flags.packing) if own else config
            yield Request(number, row["prompt"], row_config, id=row.get("id"))
        except LayerSkipError as error:
            name = row.get("id") if isinstance(row, dict) else None
            yield Request(number, "", config, error, name)


def _one_by_one(
    loaded: "Decoder", requests: Iterator[Request], earlier: "EarlierAnswers"
) -> AnswerStream:
    """AnswerStream that are decoded as they are read."""
    from layerskip_core.decoding.dialogue import TextStream

    for request in requests:
        answer: TextStream | LayerSkipError
        try:
            if request.error is not None:
                raise request.error
            answer = TextStream(loaded, request.prompt, request.config, earlier=earlier)
        except LayerSkipError as error:
            answer = error
        yield request, answer


def _together(
    loaded: "Decoder",
    requests: Iterator[Request],
    earlier: "EarlierAnswers",
    batch_size: int,
    is_ready: Callable[[], bool],
) -> AnswerStream:
    """Decodes up to `batch_size` requests at once. `is_ready`: whether the next can be read without
    waiting.
    """
    from layerskip_core.serving.batch import answers_to

    unanswered = deque[Request]()

    def read() -> Iterator[tuple[list[int], DecodingConfig] | LayerSkipError]:
        for request in requests:
            unanswered.append(request)
            try:
                if request.error is not None:
                    raise request.error
                ids = loaded.encode_prompt(request.prompt)
            except LayerSkipError as error:
                yield error
            else:
                yield ids, request.config

    for answer in answers_to(loaded, read(), batch_size, earlier, is_ready):
        request = unanswered.popleft()
        if isinstance(answer, LayerSkipError):
            yield request, answer
        else:
            yield request, answer.error or answer


class _Printer:
    """Prints answers in order, and errors in their place. `total`: counts of those answered."""

    def __init__(self, loaded: "Decoder", jsonl: bool, raises: bool) -> None:
        """`raises`: an error is raised, because there is one prompt only."""
        from layerskip_core.decoding import DecodeStats

        self.total = DecodeStats()
        self.has_failed = False
        self._loaded = loaded
        self._jsonl = jsonl
        self._raises = raises

    def print(self, request: Request, answer: "Answer | TextStream | LayerSkipError") -> None:
        """Prints an answer, piece by piece if it is decoded now."""
        from layerskip_core.decoding.dialogue import TextStream

        try:
            if isinstance(answer, LayerSkipError):
                raise answer
            if isinstance(answer, TextStream):
                for piece in answer:
                    if not self._jsonl:
                        _write(piece)
                answer = answer.answer
            elif not self._jsonl:
                _write(answer.text)
            if self._jsonl:
                self._write_row(request, self._document(request, answer))
            self.total = self.total + answer.stats
        except LayerSkipError as error:
            if self._raises:
                raise
            self.has_failed = True
            message = f"line {request.number}: {str(error).removeprefix('row: ')}"
            if self._jsonl:  # with the row's keys, where other messages have flags
                named = re.sub(rf"`({'|'.join(_DECODED)})`", r"\1", message)
                self._write_row(request, {"error": named})
            else:
                narrate(f"error: {message}")
        _write("\n")

    def _document(self, request: Request, answer: "Answer") -> dict[str, Any]:
        stats = answer.stats
        document: dict[str, Any] = {
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "policy": request.config.policy,
        }
        for name in ("logprobs", "prompt_logprobs"):
            listed = getattr(answer, name)
            if listed:
                document[name] = [_logprobs(one, self._loaded.token_text) for one in listed]
        document |= {name: getattr(stats, name) for name in _COUNTS}
        document["acceptance_rate"] = round(stats.acceptance_rate, 4)
        document["mean_layers"] = round(stats.mean_layers, 2)
        return document

    def _write_row(self, request: Request, content: dict[str, Any]) -> None:
        named: dict[str, Any] = {"line": request.number}
        if request.id is not None:
            named["id"] = request.id
        _write(json.dumps(named | content, ensure_ascii=False))


def _logprobs(one: "TokenLogprobs", text_of: Callable[[int], str]) -> dict[str, Any]:
    """A token, its log probability and the top alternatives, as an object."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"id": token, "token": text_of(token), "logprob": round(logprob, 6)}

    top = [entry(token, logprob) for token, logprob in one.top]
    return {**entry(one.id, one.logprob), "top": top}


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _narrate_stats(
    loaded: "Decoder", config: DecodingConfig, total: "DecodeStats", batch_size: int
) -> None:
    from layerskip_core.evaluation.measure.bandwidth import bandwidth
    from layerskip_core.evaluation.measure.passes import plain_step, speed_of
    from layerskip_core.evaluation.results import bandwidth_text

    narrate(bandwidth_text(bandwidth(loaded, plain_step(loaded))))
    narrate(stats_text(total, loaded, config.policy))
    offer_calibration(loaded)
    is_fixed = config.strategy == "self-speculative" and config.policy is None
    if is_fixed and total.rounds and batch_size == 1:
        speed = speed_of(loaded, total)
        if speed < 1:
            narrate(
                f"about {speed:.2f}x of plain decoding: --strategy adaptive chooses the fastest for every round"
            )


def stats_text(stats: "DecodeStats", loaded: "Decoder", policy: str | None) -> str:
    """Counts and speed of answers, and how they were decoded."""
    backend = loaded.backend
    parts = [f"{plural(stats.new_tokens, 'token')}, {stats.tokens_per_second:.1f} tokens/s"]
    if sum(stats.tokens_by_layers[: backend.num_layers - 1]):  # some tokens left early
        counts = enumerate(stats.tokens_by_layers, start=1)
        exits = ", ".join(f"exit {layers}: {count}" for layers, count in counts if count)
        parts.append(f"{stats.mean_layers:.1f} layers per token ({exits})")
    parts.append(
        f"drafted {stats.drafted}, accepted {stats.accepted} ({stats.acceptance_rate:.1%}) "
        f"in {plural(stats.rounds, 'round')}"
    )
    steps = sorted(stats.steps_by_drafter.items(), key=lambda item: -item[1])
    if steps:
        parts.append("steps by " + ", ".join(f"{name}: {count}" for name, count in steps))
    graphs = ", CUDA graphs" if stats.replayed else ""
    dtype = str(backend.dtype).removeprefix("torch.")
    parts.append(f"layers: {backend.implementation}{graphs}, {dtype} on {backend.device}")
    parts.append(f"prompt template: {loaded.template.name}")
    if policy is not None:
        parts.append(f"policy: {policy}")
    return "; ".join(parts)
