"""Talk with a model in the terminal."""

import signal
import sys
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
_ADVICE = "/forget leaves out the oldest turn, /reset all turns"


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
        self._context = loaded.backend.spec.context
        self._stats = stats
        self._dialogue = Dialogue(loaded, config)
        self._console = ResultsConsole()
        has_colours = self._console.is_terminal and self._console.color_system is not None
        self._shows_drafts = show_drafts and has_colours
        self._draft_style = "underline" if self._console.no_color else "green"
        self._last: TextStream | None = None
        self._total = DecodeStats()
        template = loaded.template.name
        if console.is_terminal():
            implementation = loaded.backend.implementation
            narrate(f"{loaded.name}: {implementation}; prompt template: {template}")
        if not self._dialogue.has_turns:
            narrate(f"{template} is no chat template: every message is a prompt of its own")

    def on_terminal(self) -> None:
        """Asks for messages until /exit or Ctrl-D; after an error the conversation goes on."""
        if self._shows_drafts:
            narrate(f"accepted drafts are {self._draft_style}")
        narrate("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
        while True:
            try:
                line = console.typed_line("> ")
            except KeyboardInterrupt:
                narrate("\n/exit or Ctrl-D leaves")
                continue
            except EOFError:
                narrate("")
                return
            try:
                self._handle(line, interactive=True)
            except LayerSkipError as error:
                narrate(f"error: {self._message(error)}")
            except KeyboardInterrupt:
                narrate("\nstopped")
            except EOFError:
                return

    def over_pipe(self) -> None:
        """Answers every line. Exits with 1 if one could not be answered, with 130 after Ctrl-C."""
        has_failed = False
        try:
            for number, line in enumerate(console.prompts_stream(), start=1):
                try:
                    self._handle(line.rstrip("\r\n"), interactive=False)
                except LayerSkipError as error:
                    has_failed = True
                    narrate(f"error: line {number}: {self._message(error)}")
        except EOFError:
            pass
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            raise typer.Exit(130) from None
        if has_failed:
            raise typer.Exit(1)

    def _handle(self, line: str, interactive: bool) -> None:
        """Handles a message or a /command. Raises EOFError to end the chat, LayerSkipError if it
        cannot be answered.
        """
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
                self._narrate_stats()
            case ["/help"]:
                narrate(_COMMANDS)
            case _ if line.startswith("/") and not line.startswith("//"):
                raise LayerSkipError(
                    f"needed a message or a command, found {line!r:.60}; /help lists the commands"
                )
            case _:
                message = line[1:] if line.startswith("//") else line
                if interactive:
                    # Ctrl-C stops the answer after the current pass, a second one at once.
                    with Interruption(signal.SIGINT) as interruption:
                        stream = self._answer(message, interruption)
                else:
                    stream = self._answer(message, None)
                self._narrate_end(stream, interactive)

    def _answer(self, message: str, interruption: Interruption | None) -> "TextStream":
        """Prints an answer as it comes."""
        stream = self._last = self._dialogue.ask(message)
        for segments in stream.segments():
            if self._shows_drafts:
                styled = [
                    (piece, self._draft_style if from_draft else "")
                    for piece, from_draft in segments
                ]
                self._console.print(Text.assemble(*styled), end="", soft_wrap=True)
            else:
                sys.stdout.write("".join(piece for piece, _ in segments))
                sys.stdout.flush()
            if interruption is not None and interruption.signal is not None:
                break
        sys.stdout.write("\n")
        sys.stdout.flush()
        self._total = self._total + stream.stats
        return stream

    def _narrate_end(self, stream: "TextStream", interactive: bool) -> None:
        """Says why an answer ends early."""
        reason = stream.finish_reason
        if reason == "context":
            advice = f"; {_ADVICE}" if self._dialogue.has_turns else ""
            full = f"the model's context of {self._context} tokens is full"
            narrate(f"the answer ends here because {full}{advice}")
        elif interactive and reason == "length":
            narrate(f"the answer ends here because of `max_new_tokens` {stream.stats.new_tokens}")
        elif interactive and reason is None:
            kept = "" if stream.text else " before the answer: the message was left out"
            narrate(f"stopped{kept}")
        if self._stats:
            narrate(self._stats_of(stream))

    def _narrate_stats(self) -> None:
        if self._last is None:
            narrate("no answer yet")
            return
        narrate(f"last answer: {self._stats_of(self._last)}")
        total = stats_text(self._total, self._loaded, self._policy)
        narrate(f"{plural(self._total.sequences, 'answer')}: {total}")

    def _stats_of(self, stream: "TextStream") -> str:
        counts = stream.stats
        prompt = plural(counts.prompt_tokens, "token")
        used = counts.prompt_tokens + counts.new_tokens
        return (
            f"{stats_text(counts, self._loaded, self._policy)}; prompt: {prompt}, "
            f"{stream.decoding.reused_tokens} of them reused; "
            f"context: {used} of {self._context} tokens"
        )

    def _message(self, error: LayerSkipError) -> str:
        """An error in one line, with advice where the conversation is too long."""
        if isinstance(error, ContextError) and self._dialogue.turns:
            return f"{one_line(error)}; {_ADVICE}"
        return one_line(error)
