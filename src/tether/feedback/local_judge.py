"""A judge that is a model directory: one forward pass a question, and the log-probs of what may answer it."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tether.config import JudgeConfig
from tether.data.chat import encode_completion, encode_prompts
from tether.data.tokenizer import check_vocabulary, load_tokenizer
from tether.errors import DataError, ModelError
from tether.feedback.verdict import Comparison, NoVerdict, Outcome, Question, plain_question
from tether.models.language_model import LanguageModel
from tether.models.loading import context_length, load_causal_lm, model_config, resolve_device, resolve_dtype
from tether.types import Text, microbatches

_AT_ONCE = 64  # of what is asked, whose questions are tokenized and sorted together
_FORWARD_TOKENS = 8192  # padded tokens in one forward pass


class LocalJudge:
    """A model that need not be loaded yet: what is asked of it is known from its tokenizer and its config."""

    def __init__(self, config: JudgeConfig, symbols: str = Comparison.symbols) -> None:
        """symbols: those of the questions that it will be asked."""
        path, trust = config.judge.model, config.trust_remote_code
        self._path, self._trust, self._device, self._dtype = path, trust, config.device, config.dtype
        self._model_config = model_config(path, trust_remote_code=trust)
        self.context = context_length(self._model_config)
        self.tokenizer = load_tokenizer(path, trust_remote_code=trust)
        check_vocabulary(self.tokenizer, self._model_config.get_text_config().vocab_size)
        self._symbols = symbol_tokens(self.tokenizer, symbols)
        self._opening = opening_token(self.tokenizer, symbols)

    def encode(self, comparison: Question[Any], order: tuple[int, ...]) -> list[int]:
        """The ids after which the answer comes."""
        return encode_question(self.tokenizer, comparison.question(order, "logprobs"), comparison.lead)

    def compare(self, comparisons: Iterable[Question[Outcome]]) -> Generator[Outcome | NoVerdict | None, None, None]:
        """What the model says of each, in their order; None after a forward pass, so that a signal can be heeded."""
        waiting = iter(comparisons)
        while batch := list(islice(waiting, _AT_ONCE)):
            yield from self._compare(self.model, batch)

    def cost(self) -> str:
        """Nothing that would be paid for."""
        return ""

    @cached_property
    def model(self) -> LanguageModel:
        """Loaded when it is first asked for."""
        device = resolve_device(self._device)
        dtype = resolve_dtype(self._dtype, device, self._model_config)
        lm = load_causal_lm(self._path, dtype=dtype, device=device, trust_remote_code=self._trust)
        model = LanguageModel(lm.eval().requires_grad_(False), dtype)
        model.check_head()
        return model

    def _compare(
        self, model: LanguageModel, batch: Sequence[Question[Outcome]]
    ) -> Iterator[Outcome | NoVerdict | None]:
        asked = [(i, order, self.encode(x, order)) for i, x in enumerate(batch) for order in x.orders]
        fits = [row for row in asked if self.context is None or len(row[2]) + len(self._opening) <= self.context]
        rows = [(row, ids) for row, (_, _, ids) in enumerate(fits)]
        if self._opening:  # what may come behind it is looked at as well
            rows += [(row, [*ids, *self._opening]) for row, ids in rows]
        found: dict[int, list[float]] = {}  # of `rows`
        for index in microbatches([len(ids) for _, ids in rows], _FORWARD_TOKENS) if rows else []:
            part = index.tolist()
            targets = [*self._symbols.values(), *self._opening]
            found |= zip(part, next_logprobs(model, [rows[k][1] for k in part], targets).tolist(), strict=True)
            yield None
        logprobs = {}
        for row, (i, order, _) in enumerate(fits):
            logprobs[i, order] = dict(zip(self._symbols, found[row], strict=False))
            if self._opening:
                behind = [found[row][-1] + x for x in found[len(fits) + row]]
                logprobs[i, order] |= dict(zip((f"{text}  " for text in self._symbols), behind, strict=False))
        for i, comparison in enumerate(batch):
            if any((i, order) not in logprobs for order in comparison.orders):
                yield NoVerdict(comparison.item, f"longer than the model's {self.context} tokens")
                continue
            read = {}
            for order in comparison.orders:
                if (p := comparison.read_logprobs(logprobs[i, order])) is not None:
                    read[order] = p, {"form": "logprobs", "reply": logprobs[i, order]}
            if len(read) == len(comparison.orders):
                yield comparison.outcome(read)
            else:
                yield NoVerdict(comparison.item, comparison.unlikely, str(logprobs[i, comparison.orders[0]]))


def encode_question(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], lead: str) -> list[int]:
    """A question's ids, after which the answer comes; lead: its opening, for a model without a chat template."""
    asked: Text = messages if tokenizer.chat_template else plain_question(messages, lead)
    try:
        return encode_prompts(tokenizer, [asked])[0]
    except DataError:  # a template that knows no system message
        whole = "\n\n".join(message["content"] for message in messages)
        return encode_prompts(tokenizer, [[{"role": "user", "content": whole}]])[0]


def symbol_tokens(tokenizer: PreTrainedTokenizerBase, symbols: str) -> dict[str, int]:
    """Every single token that writes one of some characters, with a space before it or without: text → id."""
    found: dict[str, int] = {}
    for symbol in symbols:
        for text in (symbol, f" {symbol}"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) == 1 and ids[0] not in found.values():
                found[text] = ids[0]
        bare = tokenizer.convert_tokens_to_ids(symbol)  # where encoding puts a space before every text
        if isinstance(bare, int) and bare != tokenizer.unk_token_id and bare not in found.values():
            found[symbol if symbol not in found else f"{symbol} "] = bare
    if missing := [symbol for symbol in symbols if not any(text.strip() == symbol for text in found)]:
        what = "digit" if missing[0].isdigit() else "letter"
        raise ModelError(
            f"judge.model={tokenizer.name_or_path}: its tokenizer has no token for the {what} {missing[0]}, so it "
            "could not answer. Use another model, or one behind an endpoint (judge.base_url), whose text is read."
        )
    return found


def opening_token(tokenizer: PreTrainedTokenizerBase, symbols: str) -> list[int]:
    """The token that stands before some of the characters where they open an answer: the space of SentencePiece, which
    Llama 2 writes before a digit. Empty where there is none."""
    encoded = [encode_completion(tokenizer, symbol) for symbol in symbols]
    openings = {ids[0] for ids in encoded if len(ids) == 2}
    return [*openings] if len(openings) == 1 else []


@torch.no_grad()
def next_logprobs(model: LanguageModel, prompts: Sequence[Sequence[int]], targets: Sequence[int]) -> Tensor:
    """[B, K] log-probs in nats of each of K tokens as what follows each of B prompts; float32, on the CPU."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in prompts], device=model.device)
    row = torch.arange(len(prompts), device=model.device).repeat_interleave(len(targets))
    last = torch.tensor([len(ids) - 1 for ids in prompts], device=model.device).repeat_interleave(len(targets))
    wanted = torch.tensor(list(targets), device=model.device).repeat(len(prompts))
    logprobs, _, _ = model.logprobs(tokens, (row, last), wanted)
    return logprobs.view(len(prompts), len(targets)).float().cpu()
