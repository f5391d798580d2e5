"""What a cell of a row may hold: text, or chat messages."""

from __future__ import annotations

from typing import Any

from tether.data.chat import Messages
from tether.data.table import kind, listed
from tether.errors import DataError, did_you_mean
from tether.types import Text


def as_text(value: Any) -> str:
    """A text that a tokenizer can take."""
    if not isinstance(value, str):
        raise DataError(f"is {kind(value)}, where a text belongs. Write it in quotes.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"holds {value[error.start]!r}, half a character, which no UTF-8 text can hold. Write it whole."
            ) from error
    return value


def as_text_or_messages(value: Any) -> Text:
    if isinstance(value, list):
        return as_messages(value)
    if isinstance(value, str):
        return as_text(value)
    raise DataError(
        f"is {kind(value)}, where a text or a list of messages belongs. "
        'Write "…" or [{"role": "user", "content": "…"}].'
    )


def as_messages(value: Any) -> Messages:
    """A conversation: at least one message, each with a role, and a content or tool calls."""
    if not isinstance(value, list) or not value:
        raise DataError(
            f"is {kind(value)}, where a list of messages belongs. Write "
            '[{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}].'
        )
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise DataError(f'message {i} is {kind(message)}. Write {{"role": "user", "content": "…"}}.')
        message = {k: v for k, v in message.items() if v is not None}  # Parquet fills in every key that any message has
        if not isinstance(message.get("role"), str):
            raise DataError(
                f"message {i} has no 'role', only {listed(message)}.{did_you_mean('role', message)} "
                'Write {"role": "user", "content": "…"}.'
            )
        content = message.get("content")
        if isinstance(content, str):
            as_text(content)
        elif not isinstance(content, list) and "tool_calls" not in message:
            raise DataError(f"message {i}: its 'content' is {kind(content)}, where a text belongs. Write it in quotes.")
        messages.append(message)
    return messages


def as_prompt(value: Any) -> Text:
    """A text, or messages that wait for an answer."""
    source = as_text_or_messages(value)
    if not isinstance(source, str) and source[-1]["role"] == "assistant":
        raise DataError(
            "ends with the assistant's message, so there is nothing left to answer. Remove that message, or move it to "
            "the column that holds the answer."
        )
    return source


def as_answer(prompt: Text, value: Any) -> Text:
    """An answer in its prompt's form: text to text, one assistant message (or its bare text) to messages."""
    answer = as_text_or_messages(value)
    if isinstance(prompt, str):
        return as_text(answer)
    messages: Messages = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise DataError(
            f"is {len(messages)} messages by {', '.join(m['role'] for m in messages)}, where one answer of the "
            'assistant belongs. Write [{"role": "assistant", "content": "…"}], and what precedes it in the prompt.'
        )
    return messages
