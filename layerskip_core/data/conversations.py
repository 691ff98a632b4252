"""Rows of chat: a column `messages` with the turns of a conversation."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import DataError
from ..storage.reading import listed, quoted
from .records import Record

MESSAGES = "messages"  # the column of a conversation


@dataclass(frozen=True)
class Conversation:
    """Messages as (role, content), at least one of them the assistant's. `where` is its place, for errors."""

    messages: tuple[tuple[str, str], ...]
    where: str = field(default="", compare=False)


def conversation_of(record: Record) -> Conversation:
    """The conversation in a row's `messages`. Raises DataError for turns without text and if the assistant has none."""
    messages = record.fields[MESSAGES]
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise record.fault("messages must be a list of objects with role and content", messages)
    turns = tuple((message.get("role"), message.get("content")) for message in messages)
    for role, content in turns:
        if not isinstance(role, str) or not isinstance(content, str):
            needed = "role and content of a message must be texts"
            raise DataError(f"{record.where}: {needed}, found {quoted(role)} and {quoted(content)}")
    if not any(role == "assistant" and content.strip() for role, content in turns):
        roles = listed(role for role, _ in turns)
        raise DataError(f"{record.where}: needed a message of the role 'assistant' that is not empty, found {roles}")
    return Conversation(turns, record.where)
