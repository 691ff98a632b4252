"""A model that answers prompts: what `layerskip_core.load` gives a program or a notebook."""

import warnings
from collections.abc import AsyncIterator, Sequence
from functools import partial
from threading import Lock
from typing import Unpack, cast

from .checkpoint.loaded import Decoder
from .checkpoint.open import for_decoding
from .config.decoding import DecodingConfig, Remember, RequestOptions
from .config.model import DType, PackingConfig, PromptingConfig, Quantization
from .config.options import BatchSize, check, checked
from .decoding import Answer, check_prompt
from .decoding.dialogue import Dialogue, TextStream
from .decoding.drafters.lookup import EarlierAnswers
from .errors import LayerSkipError
from .serving import Request
from .serving.batch import answers_to
from .serving.thread import DecodingThread, Updates

# The most asynchronous answers decoded together, and waiting
_TOGETHER = 8
_WAITING = 1 << 16
_TOGETHER_IN_BATCH = 32


class LanguageModel:
    """A model in memory, ready to decode. Answers of several threads are decoded in turns, a step
    of each.
    """

    def __init__(
        self, decoder: Decoder, packing: PackingConfig, earlier: EarlierAnswers | None = None
    ) -> None:
        self.decoder = decoder
        self._packing = packing
        self._earlier = earlier
        self._engine: DecodingThread | None = None  # for `astream`, from its first call on
        self._starting = Lock()

    def generate(self, prompt: str, **options: Unpack[RequestOptions]) -> Answer:
        """The whole answer to a prompt.

        Raises ConfigError for a prompt or an option that does not suit the model, TypeError for an
        unknown option, CheckpointError for a chat template that fails.
        """
        return self.stream(prompt, **options).finish()

    def stream(self, prompt: str, **options: Unpack[RequestOptions]) -> TextStream:
        """Iterates over the pieces of an answer as they are verified. Raises as `generate` does."""
        return TextStream(self.decoder, prompt, self._resolved(options), earlier=self._earlier)

    async def astream(self, prompt: str, **options: Unpack[RequestOptions]) -> AsyncIterator[str]:
        """The pieces of an answer as they are verified, for your own server: concurrent answers
        share passes.

            async for piece in model.astream("wake me up at six"):
                print(piece, end="")

        Leaving the iteration (`aclose`, a cancelled task) cancels the answer. A thread decodes
        until `close`. Raises as `generate` does.
        """
        config = self._resolved(options)
        ids = self.decoder.encode_prompt(prompt)
        check_prompt(ids, self.decoder.backend)
        updates = Updates()
        request = Request(ids, config, partial(updates.deliver, 0))
        with self._starting:
            if self._engine is None:
                self._engine = DecodingThread(
                    self.decoder, _TOGETHER, _WAITING, earlier=self._earlier
                )
            engine = self._engine
        engine.hold(1)
        engine.submit(request)
        try:
            async for _, update in updates.all(1):
                if update.error is not None:
                    raise update.error
                if update.text:
                    yield update.text
        finally:
            engine.cancel(request)

    def close(self) -> None:
        """Ends the thread of `astream`, if there is one; unfinished answers raise Stopped."""
        if self._engine is not None:
            self._engine.stop()
            self._engine = None

    def generate_batch(
        self,
        prompts: Sequence[str],
        *,
        batch_size: int = _TOGETHER_IN_BATCH,
        **options: Unpack[RequestOptions],
    ) -> list[Answer]:
        """Answers to any number of prompts, at most `batch_size` of them decoded together.

        Raises as `generate` does, for the first prompt that does not fit. An answer that cannot
        match its grammar has an `error` in place of an exception.
        """
        most = check("batch_size", BatchSize, batch_size)
        decoder = self.decoder
        config = self._resolved(options)
        encoded = [decoder.encode_prompt(prompt) for prompt in prompts]
        for ids in encoded:
            check_prompt(ids, decoder.backend)
        earlier = EarlierAnswers() if self._earlier is None else self._earlier
        answers = list[Answer]()
        for answer in answers_to(decoder, ((ids, config) for ids in encoded), most, earlier):
            if isinstance(answer, LayerSkipError):
                raise answer
            answers.append(answer)
        return answers

    def dialogue(self, *, system: str | None = None, **options: Unpack[RequestOptions]) -> Dialogue:
        """A conversation: each answer sees the turns before it, and computes only new tokens.

            talk = model.dialogue(system="Answer briefly.")
            print(talk.ask("Who wrote Emma?").finish().text)
            for piece in talk.ask("And when?"):
                print(piece, end="")

        `talk.turns` are the messages with their answers, `talk.forget(1)` leaves out the oldest and
        `talk.forget()` all. `system`: instead of the message given to `load`. Without a chat
        template each message is a prompt of its own (`talk.has_turns` is False). Several
        conversations can take turns, but not at once.

        Raises ConfigError for a system message without a chat template, and for options as
        `generate` does.
        """
        decoder = self.decoder
        if system is not None:
            decoder = decoder.with_template(decoder.template.text, system)
        return Dialogue(decoder, self._resolved(options))

    def _resolved(self, options: RequestOptions) -> DecodingConfig:
        return self.decoder.resolve(
            cast(RequestOptions, checked(RequestOptions, options)), self._packing
        )


def load(
    name: str = "embedded",
    *,
    device: str = "auto",
    dtype: DType = "auto",
    template: str | None = None,
    system: str | None = None,
    quantize: Quantization | None = None,
    draft_weights: Quantization | None = None,
    draft_head: Quantization | None = None,
    draft_vocab: int = 0,
    draft_model: str | None = None,
    exact: bool = False,
    remember: int = 0,
    cache: bool = True,
) -> LanguageModel:
    """Loads a model to decode with: an embedded name, a folder, a GGUF file or a hub id.

    `template`: `chat`, `raw` or a text with {prompt} in it, instead of the checkpoint's own.
    `system`: a system message, for a chat template. `remember`: tokens of earlier answers for
    lookups, for programs that repeat themselves; without it `generate_batch` searches the answers
    of its call. `cache`: read packed weights from the user's cache (LAYERSKIP_CACHE, else
    ~/.cache/layerskip) and keep them there, so that later loads are faster. The others are fields
    of PackingConfig. On a small model one thread is fastest: torch.set_num_threads(1).

    Raises:
        CheckpointError: the model is not there, is damaged, or has an unsupported architecture.
        ConfigError: a setting is out of its range or does not suit the model or this machine.
    """
    settings = {
        "quantize": quantize,
        "draft_weights": () if draft_weights is None else (draft_weights,),
        "draft_head": draft_head,
        "draft_vocab": draft_vocab,
        "draft_model": draft_model,
    }
    packing = PackingConfig(**checked(PackingConfig, settings), exact=exact, adaptive=True)
    prompting = PromptingConfig(template, system)
    decoder = for_decoding(name, device, dtype, packing, policies=None, cache=cache).with_template(
        prompting.asked, system
    )
    for note in decoder.notes:
        warnings.warn(note, stacklevel=2)
    earlier = EarlierAnswers(remember) if check("remember", Remember, remember) else None
    return LanguageModel(decoder, packing, earlier)
