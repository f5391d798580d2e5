"""From ids back to text: whole responses, and what each token shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from tether.data.chat import encode_completion


def completion_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop_ids: Iterable[int]) -> str:
    """A response as people and reward functions read it: without its stop token, special tokens skipped."""
    return _decode(tokenizer, without_stop(ids, stop_ids))


def fragments(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop_ids: Iterable[int]) -> list[str]:
    """The text that each token adds to `completion_text`; joined they are exactly that.

    Tokens that show nothing (stop and special tokens) get "". Of tokens that make up one character together, the last
    gets it. Fragments are slices of the decoded whole; where they begin is worked out from short pieces.
    """
    body = without_stop(ids, stop_ids)
    text = _decode(tokenizer, body)
    settled = [0]  # settled[i]: characters of text that stand once the first i tokens are decoded
    while len(settled) <= len(body):
        settled += _settle(tokenizer, body, text, settled)
    settled[-1] = len(text)  # where the end shows more than its tokens do by themselves, the last one gets it
    return [text[a:b] for a, b in pairwise(settled)] + [""] * (len(ids) - len(body))


def _settle(tokenizer: PreTrainedTokenizerBase, body: list[int], text: str, settled: list[int]) -> list[int]:
    """The next entries of `settled`: of every token that reads the same by itself, else of one torn character."""
    begin, done = len(settled) - 1, settled[-1]
    found, end = [], done
    for i, token in enumerate(body[begin:], begin):
        piece = _piece(tokenizer, token, opens=i == 0)
        if not text.startswith(piece, end):
            break
        end += len(piece)
        found.append(end)
    return found or _settle_torn(tokenizer, body, text, begin, done)


_CONTEXT, _LONGEST = 4, 16  # tokens: seen to the left of a torn character; tried for its length


def _settle_torn(tokenizer: PreTrainedTokenizerBase, body: list[int], text: str, begin: int, done: int) -> list[int]:
    """The shortest run of tokens from `begin` whose text, decoded in a window, is what the whole goes on with."""
    left = max(0, begin - _CONTEXT)
    base = _decode(tokenizer, body[left:begin])
    longest = min(begin + _LONGEST, len(body))
    for end in range(begin + 1, longest + 1):
        window = _decode(tokenizer, body[left:end])
        if window.startswith(base) and text.startswith(window[len(base) :], done):
            found = [
                done + common_prefix(_decode(tokenizer, body[left:i])[len(base) :], text[done : done + len(window)])
                for i in range(begin + 1, end + 1)
            ]
            break
    else:  # the window shows something else than the whole: decode from the start, however long that takes
        found = [common_prefix(_decode(tokenizer, body[:i]), text) for i in range(begin + 1, longest + 1)]
    return [max(done, *found[: i + 1]) for i in range(len(found))]


@lru_cache(maxsize=1 << 18)
def _piece(tokenizer: PreTrainedTokenizerBase, token: int, *, opens: bool) -> str:
    """What a token shows when it opens a text, or inside one (where a leading space is not stripped)."""
    if opens:
        return _decode(tokenizer, [token])
    anchor = encode_completion(tokenizer, "a")[-1:]
    return _decode(tokenizer, [*anchor, token]).removeprefix(_decode(tokenizer, anchor))


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two sequences begin with alike."""
    shorter = min(len(a), len(b))
    return shorter if a[:shorter] == b[:shorter] else next(i for i in range(shorter) if a[i] != b[i])


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def without_stop(ids: Sequence[int], stop_ids: Iterable[int | None]) -> list[int]:
    return list(ids[:-1] if ids and ids[-1] in set(stop_ids) else ids)
