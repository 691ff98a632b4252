"""Settings of `layerskip serve`."""

from dataclasses import dataclass, field
from typing import Annotated

from msgspec import Meta

from .checks import require
from .decoding import DecodingOptions
from .options import MODEL, SERVER, Flag, Text


@dataclass(frozen=True)
class ServeConfig:
    """What is served, where, and its limits. `decoding`: for what a request does not say itself."""

    model: Annotated[Text, Flag(MODEL, "embedded, embedded-base, a folder, a .gguf file or a hub id.")] = "embedded"
    host: Annotated[Text, Flag(SERVER, "Address to listen on; 0.0.0.0 is all of this machine's.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535), Flag(SERVER, "Port to listen on; 0: a free one.")] = 8000  # 0: any free one
    batch_size: Annotated[int, Meta(ge=1, le=65_536), Flag(SERVER, "Answers that are decoded together.")] = (
        8  # requests decoded together
    )
    queue_size: Annotated[
        int,
        Meta(ge=0, le=1_000_000),
        Flag(SERVER, "Answers that may wait besides; a request beyond gets status 429.", "--queue"),
    ] = 256  # requests that wait besides
    token_limit: Annotated[int, Meta(ge=1, le=10_000_000), Flag(SERVER, "Most tokens that a request may ask for.")] = (
        4096  # of an answer, the most that a request may ask for
    )
    body_limit: Annotated[int, Meta(ge=1_024, le=1_073_741_824), Flag(SERVER, "Most bytes of a request's body.")] = (
        1_048_576  # bytes
    )
    decoding: DecodingOptions = field(default_factory=lambda: DecodingOptions())

    def __post_init__(self) -> None:
        asked = self.decoding.get("max_new_tokens")
        fits = asked is None or asked <= self.token_limit
        require(fits, "max_new_tokens", f"at most `token_limit`, {self.token_limit}", asked)
