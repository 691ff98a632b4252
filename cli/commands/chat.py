"""Talk with a model in the terminal."""

import signal
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.options import Flag, Without
from layerskip_core.errors import ContextError, LayerSkipError, plural
from layerskip_core.interruption import Interruption

from .. import console
from ..console import ResultsConsole, narrate, one_line
from ..loading import DecoderFlags, load_to_decode, of_answers
from ..options import command
from .generate import stats_text

if TYPE_CHECKING:
    from layerskip_core.checkpoint.loaded import Decoder
    from layerskip_core.decoding.dialogue import TextStream

_COMMANDS = """\
/reset   start a new conversation
/forget  leave out the oldest turn
/stats   counts and speed, and how full the context is
/help    this list
/exit    leave, as Ctrl-D does
Write // at the beginning of a message that begins with /. Ctrl-C stops an answer."""
_ROOM = "/forget leaves out the oldest turn, /reset all turns"


@command
def chat(
    flags: Annotated[DecoderFlags, Without(("logprobs", "prompt_logprobs"))],
    show_drafts: Annotated[
        bool, Flag("On a terminal, show accepted drafts in green.", panel="Output")
    ] = False,
    stats: Annotated[
        bool, Flag("Print counts and speed to stderr after every answer.", panel="Output")
    ] = False,
) -> None:
    """Talk with a model, which sees the whole conversation; earlier turns are not computed again.

    Models without a chat template, such as the embedded ones, answer every message by itself. /help
    lists the commands. Over a pipe every line is a message; empty lines are skipped.

    Example: layerskip chat --show-drafts
    """
    loaded, _ = load_to_decode(flags)
    config = loaded.resolve(of_answers(loaded, flags.decoding), flags.packing)
    chat = _Chat(loaded, config, show_drafts, stats)
    if console.is_terminal():
        chat.on_terminal()
    else:
        chat.over_pipe()


class _Chat:
    """A conversation and its display."""

    def __init__(
        self, loaded: "Decoder", config: DecodingConfig, show_drafts: bool, stats: bool
    ) -> None:
        from layerskip_core.decoding import DecodeStats
        from layerskip_core.decoding.dialogue import Dialogue

        self._loaded = loaded
        self._policy = config.policy
        self._stats = stats
        self._dialogue = Dialogue(loaded, config)
        self._console = ResultsConsole()
        self._colours = (
            show_drafts and self._console.is_terminal and self._console.color_system is not None
        )
        self._last: TextStream | None = None
        self._total = DecodeStats()
        self._refused = False  # whether a line failed so far
        if console.is_terminal():
            narrate(
                f"{loaded.name}: {loaded.backend.implementation}; prompt template: {loaded.template.name}"
            )
        if not self._dialogue.has_turns:
            narrate(
                f"{loaded.template.name} is no chat template: every message is a prompt of its own"
            )

    def on_terminal(self) -> None:
        """Asks for messages until /exit or Ctrl-D; after an error the conversation goes on."""
        if self._colours:
            narrate(f"accepted drafts are {'underlined' if self._console.no_color else 'green'}")
        narrate("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
        while True:
            line = None
            try:
                line = console.typed_line("> ")
                self._take(line)
            except KeyboardInterrupt:
                narrate("\n/exit or Ctrl-D leaves" if line is None else "\nstopped")
            except EOFError:
                if line is None:
                    narrate("")
                return

    def over_pipe(self) -> None:
        """Answers every line. Exits with 1 if one could not be answered, with 130 after Ctrl-C."""
        try:
            for number, line in enumerate(console.prompts_stream(), start=1):
                self._take(line.rstrip("\r\n"), number)
        except EOFError:
            pass
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            raise typer.Exit(130) from None
        if self._refused:
            raise typer.Exit(1)

    def _take(self, line: str, number: int | None = None) -> None:
        """Handles a line, a message or a /command; raises EOFError to end the chat. `number`: of a
        line over a pipe.
        """
        try:
            match line.split():
                case []:
                    pass
                case ["/exit"]:
                    raise EOFError
                case ["/reset"]:
                    self._dialogue.forget()
                    narrate("a new conversation")
                case ["/forget"]:
                    self._dialogue.forget(1)
                    narrate(f"{plural(len(self._dialogue.turns), 'turn')} left")
                case ["/stats"]:
                    if self._last is None:
                        narrate("no answer yet")
                    else:
                        narrate(f"last answer: {self._stats_of(self._last)}")
                        total = stats_text(self._total, self._loaded, self._policy)
                        narrate(f"{plural(self._total.sequences, 'answer')}: {total}")
                case ["/help"]:
                    narrate(_COMMANDS)
                case _ if line.startswith("/") and not line.startswith("//"):
                    raise LayerSkipError(
                        f"needed a message or a command, found {line!r:.60}; /help lists the commands"
                    )
                case _:
                    self._answer(line[1:] if line.startswith("//") else line, number is None)
        except LayerSkipError as error:
            self._refused = True
            room = f"; {_ROOM}" if isinstance(error, ContextError) and self._dialogue.turns else ""
            narrate(f"error: {'' if number is None else f'line {number}: '}{one_line(error)}{room}")

    def _answer(self, message: str, interactive: bool) -> None:
        """Prints an answer as it comes. On a terminal Ctrl-C stops it after the current pass, a
        second one at once.
        """
        with Interruption(signal.SIGINT) if interactive else nullcontext() as interruption:
            stream = self._last = self._dialogue.ask(message)
            for segments in stream.segments():
                if self._colours:
                    mark = "underline" if self._console.no_color else "green"
                    text = Text.assemble(
                        *((piece, mark if from_draft else "") for piece, from_draft in segments)
                    )
                    self._console.print(text, end="", soft_wrap=True)
                else:
                    sys.stdout.write("".join(piece for piece, _ in segments))
                    sys.stdout.flush()
                if interruption is not None and interruption.signal is not None:
                    break
        sys.stdout.write("\n")
        sys.stdout.flush()
        self._total = self._total + stream.stats
        if stream.finish_reason == "context":
            room = f"; {_ROOM}" if self._dialogue.has_turns else ""
            limit = self._loaded.backend.spec.context
            narrate(
                f"the answer ends here because the model's context of {limit} tokens is full{room}"
            )
        elif interactive and stream.finish_reason == "length":
            narrate(f"the answer ends here because of `max_new_tokens` {stream.stats.new_tokens}")
        elif interactive and stream.finish_reason is None:
            narrate(
                "stopped" if stream.text else "stopped before the answer: the message was left out"
            )
        if self._stats:
            narrate(self._stats_of(stream))

    def _stats_of(self, stream: "TextStream") -> str:
        counts = stream.stats
        limit = self._loaded.backend.spec.context
        reused = stream.decoding.reused_tokens
        return (
            f"{stats_text(counts, self._loaded, self._policy)}; prompt: {plural(counts.prompt_tokens, 'token')}, "
            f"{reused} of them reused; context: {counts.prompt_tokens + counts.new_tokens} of {limit} tokens"
        )
