"""Settings of `layerskip serve`."""

from dataclasses import dataclass, field
from typing import Annotated

from msgspec import Meta

from .checks import require
from .decoding import DecodingOptions
from .options import BatchSize, Count, Flag, ModelName, Text, Without


@dataclass(frozen=True)
class ServeConfig:
    """Address and limits of a server. `decoding`: options that a request leaves out."""

    model: ModelName = "embedded"
    host: Annotated[Text, Flag("Server", "Address to listen on; 0.0.0.0 is all of this machine's.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535), Flag("Server", "Port to listen on; 0: a free one.")] = 8000
    batch_size: Annotated[BatchSize, Flag("Server", "Answers that are decoded together.")] = 8
    queue_size: Annotated[
        int,
        Meta(ge=0, le=1_000_000),
        Flag("Server", "Answers that may wait besides; a request beyond gets status 429.", "--queue"),
    ] = 256
    token_limit: Annotated[Count, Flag("Server", "Most tokens that a request may ask for.")] = 4096
    body_limit: Annotated[int, Meta(ge=1_024, le=2**30), Flag("Server", "Most bytes of a request's body.")] = 2**20
    decoding: Annotated[DecodingOptions, Without("seed")] = field(default_factory=lambda: DecodingOptions())

    def __post_init__(self) -> None:
        asked = self.decoding.get("max_new_tokens")
        fits = asked is None or asked <= self.token_limit
        require(fits, "max_new_tokens", f"at most `token_limit`, {self.token_limit}", asked)
