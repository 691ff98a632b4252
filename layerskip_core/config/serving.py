"""Settings of `layerskip serve`."""

from dataclasses import dataclass, field

from .checks import require, require_given
from .decoding import DecodingOptions
from .ranges import require_ranges


@dataclass(frozen=True)
class ServeConfig:
    """What is served, where, and its limits. `decoding`: for what a request does not say itself."""

    model: str = "embedded"
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    batch_size: int = 8  # requests decoded together
    queue_size: int = 256  # requests that wait besides
    token_limit: int = 4096  # of an answer, the most that a request may ask for
    body_limit: int = 1_048_576  # bytes
    decoding: DecodingOptions = field(default_factory=lambda: DecodingOptions())

    def __post_init__(self) -> None:
        require_given("model", self.model)
        require_given("host", self.host)
        require_ranges(port=self.port, batch_size=self.batch_size, queue_size=self.queue_size)
        require_ranges(token_limit=self.token_limit, body_limit=self.body_limit)
        asked = self.decoding.get("max_new_tokens")
        fits = asked is None or asked <= self.token_limit
        require(fits, "max_new_tokens", f"at most `token_limit`, {self.token_limit}", asked)
