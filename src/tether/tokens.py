"""Between text and token ids: prompts, completions, chat templates, stop tokens, and the way back to text.

A prompt and its completion are tokenized apart. PPO knows no other way (it samples a completion after a finished
prompt), so supervised and reward training do the same, and no token ever straddles the border.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from tether.batch import Text
from tether.errors import ConfigError, DataError, ModelError

Messages = list[dict[str, Any]]

# ---------------------------------------------------------------- the tokenizer


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer in a model directory or of a hub id."""
    if Path(path).is_file():
        raise ModelError(f"{path} is a file, where a tokenizer is a directory with tokenizer.json. Name the directory.")
    local = Path(path).is_dir()
    if not local and looks_local(path):
        raise ModelError(
            f"{path} does not exist, so there is no tokenizer to load.{did_you_mean_path(path)} "
            "Check the path; a model on the hub is named owner/name."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises nearly anything here, ImportError and KeyError included
        remedy = (
            "A tokenizer needs tokenizer.json (tokenizer.save_pretrained writes it); copy it from the model's source."
            if local
            else "Check the name and the network; offline, give a directory that holds the tokenizer."
        )
        raise ModelError(f"{path}: its tokenizer cannot be loaded ({first_line(error)}). {remedy}") from error
    if not tokenizer.get_vocab():
        raise ModelError(
            f"{path}: its tokenizer knows no tokens, so every text would be empty. Copy tokenizer.json there."
        )
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise ModelError if the tokenizer can produce an id for which the model has no embedding.

    vocab_size: rows of the model's embedding. More rows than tokens is common (padding for speed) and harmless.
    """
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= vocab_size:
        raise ModelError(
            f"the tokenizer's {token!r} has id {highest}, but the model's {vocab_size} embeddings end at id "
            f"{vocab_size - 1}: a text with that token has no meaning to the model. Use the tokenizer that the model "
            f"was trained with, or give the model {highest + 1} embeddings (model.resize_token_embeddings)."
        )


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: Any | None, override: Sequence[int] | None
) -> tuple[int, ...]:
    """The tokens that end a response; training appends the first of them to its examples.

    override: `sampling.stop_token_ids`: None is every eos of generation_config, or the tokenizer's where that names
    none; a list replaces them; an empty one means that only the length ends a response.
    """
    vocabulary = set(tokenizer.get_vocab().values())
    if override is not None:
        for token in override:
            if token not in vocabulary:
                raise ConfigError(
                    f"sampling.stop_token_ids holds {token}, which is no token of the tokenizer (ids 0 to "
                    f"{max(vocabulary)}): no response could ever stop at it. Remove it; null uses the model's own."
                )
        return tuple(dict.fromkeys(override))

    own = tokenizer.eos_token_id
    eos = getattr(generation_config, "eos_token_id", None)
    ids = own if eos is None else eos
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    for token in ids:
        if token not in vocabulary:
            raise ModelError(
                f"the model's generation_config names eos_token_id {token}, which is no token of the tokenizer (ids 0 "
                f"to {max(vocabulary)}): no response could ever stop at it. Use the tokenizer that the model was "
                "trained with, correct generation_config.json, or set sampling.stop_token_ids."
            )
    # Llama 3 lists <|end_of_text|> before the <|eot_id|> that ends a turn; the tokenizer's eos is the one to train.
    return tuple(sorted(dict.fromkeys(ids), key=lambda token: token != own))


# ---------------------------------------------------------------- text to ids


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool) -> list[list[int]]:
    """Ids of many texts at once; `special` lets the tokenizer add its own tokens (bos, mostly)."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(
        texts, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
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


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, source: Text, chat_template_kwargs: dict[str, Any] | None = None
) -> list[int]:
    """One prompt, as `encode_prompts` does many."""
    return encode_prompts(tokenizer, [source], chat_template_kwargs)[0]


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


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    stop_id: int | None,
    kwargs: dict[str, Any] | None = None,
    first: int = 0,
    as_sampled: bool = False,
) -> tuple[list[int], list[bool]]:
    """A conversation as (ids, trained): True on what the assistant wrote from message `first` on, stop tokens included.

    The ids end with the last trained token: nothing after it could be learned from. Where the template leaves the stop
    token off, it is appended. What the assistant wrote is where the template says {% generation %}, else what each turn
    adds to the prompt before it. `as_sampled` takes the second way always, so that the ids before a completion are
    exactly `encode_prompt`'s.
    """
    text = render_chat(tokenizer, messages, kwargs, to_answer=False)
    spans = None if as_sampled else _generation_spans(tokenizer, messages, text, kwargs, first)
    if spans is None:
        spans = _prefix_spans(tokenizer, messages, text, kwargs, first)
    if not spans:
        raise DataError(
            "no message is the assistant's, so there is nothing to learn. End with "
            '{"role": "assistant", "content": "…"}.'
        )
    pieces: list[tuple[list[int], bool]] = []
    done = 0
    for start, end in spans:
        pieces.append((_continue(tokenizer, text[:done], text[done:start]), False))
        pieces.append((_continue(tokenizer, text[:start], text[start:end]), True))
        done = end
    return _up_to_stops(pieces, stop_id)


def _generation_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, text: str, kwargs: dict[str, Any] | None, first: int
) -> list[tuple[int, int]] | None:
    """[start, end) in characters of what the template marks as generated; None if it marks nothing."""
    template = tokenizer.get_chat_template()
    if not re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template):
        return None
    given = len(render_chat(tokenizer, messages[:first], kwargs, to_answer=False)) if first else 0
    marked: Any = render_jinja_template(
        [messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **(kwargs or {})},
    )
    (rendered,), (spans,) = marked
    if rendered != text:  # a tokenizer with a renderer of its own
        return None
    return [(start, end) for start, end in spans if start >= given]


def _prefix_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, text: str, kwargs: dict[str, Any] | None, first: int
) -> list[tuple[int, int]]:
    """[start, end) in characters of what each turn of the assistant adds to the prompt before it."""
    spans = []
    for turn in range(first, len(messages)):
        if messages[turn]["role"] != "assistant":
            continue
        if turn == 0:
            raise DataError("the assistant speaks first, so there is no prompt. Begin with the user's message.")
        prompt = render_chat(tokenizer, messages[:turn], kwargs, to_answer=True)
        answered = render_chat(tokenizer, messages[: turn + 1], kwargs, to_answer=False)
        if not (text.startswith(answered) and answered.startswith(prompt)):
            raise DataError(
                f"the chat template renders what precedes message {turn} differently once the assistant has answered, "
                "so its answer cannot be told from its prompt. Use a template that marks {% generation %}, or make "
                "every answer a row of its own."
            )
        spans.append((len(prompt), len(answered)))
    return spans


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


# ---------------------------------------------------------------- ids to text


def completion_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop_ids: Iterable[int]) -> str:
    """A response as people and reward functions read it: without its stop token, special tokens skipped."""
    return _decode(tokenizer, _without_stop(ids, stop_ids))


def fragments(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop_ids: Iterable[int]) -> list[str]:
    """The text that each token adds to `completion_text`; joined they are exactly that.

    Tokens that show nothing (stop and special tokens) get "". Of tokens that make up one character together, the last
    gets it. Every fragment is a slice of the decoded whole, so that the sum is exact whatever a decoder does at the
    borders; only where the slices begin is worked out from short pieces.
    """
    body = _without_stop(ids, stop_ids)
    text = _decode(tokenizer, body)
    settled = [0]  # settled[i]: characters of text that stand once the first i tokens are decoded
    while len(settled) <= len(body):
        settled += _settle(tokenizer, body, text, settled)
    settled[-1] = len(text)
    return [text[a:b] for a, b in pairwise(settled)] + [""] * (len(ids) - len(body))


def _settle(tokenizer: PreTrainedTokenizerBase, body: list[int], text: str, settled: list[int]) -> list[int]:
    """The next entries of `settled`: of every token that reads the same by itself, else of one torn character."""
    begin, done = len(settled) - 1, settled[-1]
    found, end = [], done
    for i, token in enumerate(body[begin:], begin):
        piece = _piece(tokenizer, token, opens=i == 0)
        if "\ufffd" in piece or not text.startswith(piece, end):
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


def _without_stop(ids: Sequence[int], stop_ids: Iterable[int]) -> list[int]:
    return list(ids[:-1] if ids and ids[-1] in set(stop_ids) else ids)


# ---------------------------------------------------------------- helping with mistakes


def looks_local(path: str) -> bool:
    """Whether a path that does not exist was meant as one: not `name` or `owner/name`, or a folder is called owner."""
    owner, _, name = path.partition("/")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.startswith("."):
        return True
    return bool(name) and Path(owner).is_dir()


def did_you_mean_path(path: str) -> str:
    """' Did you mean …?' with what the same folder holds, or where the path breaks off; '' if nothing is near."""
    folder = Path(path).parent
    if not folder.is_dir():
        while not folder.is_dir():
            folder = folder.parent
        return f" The path breaks off after {folder.resolve()}."
    return did_you_mean(Path(path).name, (entry.name for entry in folder.iterdir()))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean …?', or '' if nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def first_line(error: BaseException) -> str:
    """The first line of what another library said, for use inside our own message."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".:")
