"""What encoding and decoding need of a tokenizer: transformers' tokenizers have it all, and so has LeanTokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def chat_template(self) -> Any:
        """A text, several by name, or None. It comes with the model and is not checked."""

    @property
    def special_tokens_map(self) -> Mapping[str, Any]:
        """The special tokens that have a name, such as eos_token."""

    @property
    def all_special_tokens(self) -> Sequence[str]: ...

    @property
    def all_special_ids(self) -> Sequence[int]: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """The tokens that were added to the model's vocabulary, by id; each says whether it is `special`."""

    @property
    def vocab_size(self) -> int:
        """Tokens without the added ones."""

    def __len__(self) -> int:
        """Tokens with the added ones."""

    def __call__(self, text: Any, *, add_special_tokens: bool = True) -> Mapping[str, Any]:
        """`input_ids` of a text, or a list of them for several texts."""

    def decode(
        self, token_ids: list[int], skip_special_tokens: bool = False, *, clean_up_tokenization_spaces: bool = False
    ) -> Any: ...

    def get_vocab(self) -> dict[str, int]: ...

    def convert_ids_to_tokens(self, ids: int) -> Any:
        """The text by which the vocabulary names a token."""


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The special tokens, which have no text in an answer, by the text that names them."""
    added = (token_id for token_id, token in tokenizer.added_tokens_decoder.items() if getattr(token, "special", False))
    return {str(tokenizer.convert_ids_to_tokens(token_id)): token_id for token_id in {*tokenizer.all_special_ids, *added}}
