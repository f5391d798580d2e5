"""From text and chat messages to ids.

A prompt and its completion are tokenized apart. PPO knows no other way (it samples a completion after a finished
prompt), so supervised and reward training do the same, and no token ever straddles the border.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from tether.errors import DataError, ModelError, first_line
from tether.types import Text

Messages = list[dict[str, Any]]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool) -> list[list[int]]:
    """Ids of many texts at once; `special` lets the tokenizer add its own tokens (bos, mostly)."""
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    ids: list[list[int]] = []
    for start in range(0, len(texts), 4096):  # at once is fast, but what comes back weighs a hundred times the ids
        ids += tokenizer(texts[start : start + 4096], add_special_tokens=special, **options)["input_ids"]
    return ids


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, sources: Sequence[Text], chat_template_kwargs: dict[str, Any] | None = None
) -> list[list[int]]:
    """Prompts as the sampler gets them: text with the tokenizer's own special tokens, messages through its chat
    template up to where the assistant begins."""
    chat = [not isinstance(source, str) for source in sources]
    texts = [
        source if isinstance(source, str) else render_chat(tokenizer, source, chat_template_kwargs, to_answer=True)
        for source in sources
    ]
    plain = iter(encode_texts(tokenizer, [t for t, c in zip(texts, chat, strict=True) if not c], special=True))
    # a template writes the special tokens itself
    templated = iter(encode_texts(tokenizer, [t for t, c in zip(texts, chat, strict=True) if c], special=False))
    return [next(templated) if c else next(plain) for c in chat]


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A completion's ids: no special tokens, no stop token."""
    return encode_texts(tokenizer, [text], special=False)[0]


# ---------------------------------------------------------------- chat templates


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, kwargs: dict[str, Any] | None = None, *, to_answer: bool
) -> str:
    """Messages as the text that the template makes of them; `to_answer` adds the opening of an assistant's turn."""
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no chat template, so it is "
            "unknown how messages become text. Write plain text instead, or use a tokenizer that has one (an instruct "
            "model's; or add chat_template.jinja beside its tokenizer.json)."
        )
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=to_answer, **(kwargs or {})
        )
    except Exception as error:  # a template is a program of its own, and so are the ways it fails
        raise DataError(
            f"the tokenizer's chat template refuses these messages ({first_line(error)}). Write roles and contents "
            "that it knows, or set chat_template_kwargs that it needs."
        ) from error
    assert isinstance(text, str)
    return text


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Messages],
    at: Callable[[int], AbstractContextManager[None]],
    *,
    stop_id: int | None,
    kwargs: dict[str, Any] | None = None,
) -> list[tuple[list[int], list[bool]]]:
    """Every conversation as (ids, trained): True on what the assistant wrote, each turn's stop token included.

    What the assistant wrote is where the template says {% generation %}, else what each turn adds to the prompt before
    it. Where the template leaves the last stop token off, it is appended. The ids end with the last trained token.
    at: says where, in what is raised about conversation i.
    """
    rendered = []
    for i, messages in enumerate(conversations):
        with at(i):
            rendered.append(_render_with_spans(tokenizer, messages, kwargs))
    encoded = []
    for start in range(0, len(rendered), _AT_ONCE):
        batch = rendered[start : start + _AT_ONCE]
        splitter = _Splitter(tokenizer, [text for text, _ in batch])
        for i, (_, spans) in enumerate(batch):
            borders = [0, *(border for span in spans for border in span)]
            pieces = splitter.split(i, borders)
            encoded.append(_up_to_stops([(ids, k % 2 == 1) for k, ids in enumerate(pieces)], stop_id))
    return encoded


def _render_with_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, kwargs: dict[str, Any] | None
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, and [start, end) of what the assistant wrote in it."""
    text = render_chat(tokenizer, messages, kwargs, to_answer=False)
    spans = _generation_spans(tokenizer, messages, text, kwargs)
    if spans is None:
        spans = _prefix_spans(tokenizer, messages, text, kwargs)
    if not spans:
        raise DataError(
            "no message is the assistant's, so there is nothing to learn. End with "
            '{"role": "assistant", "content": "…"}.'
        )
    return text, spans


def encode_answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Messages,
    answer: Messages,
    *,
    stop_id: int | None,
    kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """The assistant's answer as it would be sampled after `encode_prompts`' ids: up to and including its stop token."""
    ids = _continue(tokenizer, *_parted(tokenizer, prompt, answer, kwargs))
    return _up_to_stops([(ids, True)], stop_id)[0]


def _generation_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, text: str, kwargs: dict[str, Any] | None
) -> list[tuple[int, int]] | None:
    """[start, end) in characters of what the template marks as generated; None if it marks nothing."""
    template = tokenizer.get_chat_template()
    if not re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template):
        return None
    marked: Any = render_jinja_template(
        [messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **(kwargs or {})},
    )
    (rendered,), (spans,) = marked
    return spans if rendered == text else None  # some tokenizers have a renderer of their own


def _prefix_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, text: str, kwargs: dict[str, Any] | None
) -> list[tuple[int, int]]:
    """[start, end) in characters of what each turn of the assistant adds to the prompt before it."""
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if turn == 0:
            raise DataError("the assistant speaks first, so there is no prompt. Begin with the user's message.")
        prompt, answer = _parted(tokenizer, messages[:turn], [message], kwargs)
        if not text.startswith(prompt + answer):
            raise DataError(
                f"the chat template renders message {turn} differently once others follow it, so it cannot be found in "
                "the whole. Use a template that marks {% generation %}, or make every answer a row of its own."
            )
        spans.append((len(prompt), len(prompt) + len(answer)))
    return spans


def _parted(
    tokenizer: PreTrainedTokenizerBase, prompt: Messages, answer: Messages, kwargs: dict[str, Any] | None
) -> tuple[str, str]:
    """The text of a prompt, and what the answer adds to it."""
    before = render_chat(tokenizer, prompt, kwargs, to_answer=True)
    whole = render_chat(tokenizer, prompt + answer, kwargs, to_answer=False)
    if not whole.startswith(before):
        raise DataError(
            f"the chat template ends the prompt with {before[-40:]!r}, and renders it differently once it is answered, "
            "so the answer cannot be told from it. Set chat_template_kwargs with which the two agree, or use another "
            "template."
        )
    return before, whole[len(before) :]


class _Splitter:
    """Texts that are tokenized once, and cut into pieces that have the ids `_continue` gives them, at a linear cost.

    Tokenizers cut a text at special tokens first, and each stretch between two of them by itself. So what stands before
    a border is tokenized from the last special token on, which is short (an opening like "assistant\\n"), mostly known
    already, and compared with the ids of the whole. Where they differ, `_continue` decides.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self._tokenizer, self._texts = tokenizer, texts
        self._openings: dict[str, list[int]] = {}
        self._whole = None
        if tokenizer.is_fast:
            self._whole = tokenizer(
                list(texts), add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False,
                return_token_type_ids=False, verbose=False,
            )  # fmt: skip
        self._cuts = {  # the tokenizer cuts at these, whatever stands beside them
            token_id for token_id, token in tokenizer.added_tokens_decoder.items()
            if not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        }  # fmt: skip

    def split(self, i: int, borders: Sequence[int]) -> list[list[int]]:
        """The ids of the pieces of text i between each border and the next; borders ascend."""
        text = self._texts[i]
        counts = self._counts(i, borders)
        if counts is None:
            return [_continue(self._tokenizer, text[:a], text[a:b]) for a, b in pairwise(borders)]
        assert self._whole is not None
        return [self._whole["input_ids"][i][a:b] for a, b in pairwise(counts)]

    def _counts(self, i: int, borders: Sequence[int]) -> list[int] | None:
        """How many tokens of the whole stand before each border; None where one of them is not known to."""
        if self._whole is None:
            return None
        ids, offsets = self._whole["input_ids"][i], self._whole["offset_mapping"][i]
        cuts = [(*offsets[k], k) for k, token in enumerate(ids) if token in self._cuts]
        counts, passed = [], 0  # cuts before the border
        for border in borders:
            while passed < len(cuts) and cuts[passed][1] <= border:
                passed += 1
            if passed < len(cuts) and cuts[passed][0] == border:  # a cut follows: nothing before it depends on it
                counts.append(cuts[passed][2])
                continue
            start, _, before = cuts[passed - 1] if passed else (0, 0, 0)
            opening = self._opening(self._texts[i][start:border])
            if ids[before : before + len(opening)] != opening:
                return None
            counts.append(before + len(opening))
        return counts

    def _opening(self, text: str) -> list[int]:
        if text not in self._openings:
            self._openings[text] = encode_completion(self._tokenizer, text)
        return self._openings[text]


_AT_ONCE = 1024  # conversations


def _continue(tokenizer: PreTrainedTokenizerBase, before: str, piece: str) -> list[int]:
    """Ids of `piece` after `before`: as the whole text has them where a token ends at the border, else apart.

    Not always apart: many tokenizers open every text with a space of their own, which has no place in a rendering.
    """
    head, whole = encode_texts(tokenizer, [before, before + piece], special=False)
    return whole[len(head) :] if whole[: len(head)] == head else encode_completion(tokenizer, piece)


def _up_to_stops(pieces: list[tuple[list[int], bool]], stop_id: int | None) -> tuple[list[int], list[bool]]:
    """Join pieces, of which the last is an answer; an answer counts up to its first stop token."""
    ids: list[int] = []
    trained: list[bool] = []
    open_answer = False  # an answer before this piece has not stopped yet
    for piece, answer in pieces:
        stops = stop_id in piece
        if answer:
            counted = piece.index(stop_id) + 1 if stop_id is not None and stops else len(piece)
        else:  # some templates close {% generation %} before the stop token
            counted = int(open_answer and piece[:1] == [stop_id])
        ids += piece
        trained += [True] * counted + [False] * (len(piece) - counted)
        open_answer = answer and not stops
    if open_answer and stop_id is not None:
        ids.append(stop_id)
        trained.append(True)
    end = len(trained) - trained[::-1].index(True) if True in trained else 0
    return ids[:end], trained[:end]
