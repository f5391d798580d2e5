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
from tether.data.chat import encode_prompts
from tether.data.tokenizer import check_vocabulary, load_tokenizer
from tether.errors import DataError, ModelError
from tether.feedback.verdict import Comparison, NoVerdict, Outcome, Question, plain_question
from tether.models.language_model import LanguageModel
from tether.models.loading import context_length, load_causal_lm, model_config, resolve_device, resolve_dtype
from tether.types import microbatches

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

    def encode(self, comparison: Question[Any], order: tuple[int, ...]) -> list[int]:
        """The ids after which the answer comes."""
        messages = comparison.question(order, "logprobs")
        if not self.tokenizer.chat_template:
            return encode_prompts(self.tokenizer, [plain_question(messages, comparison.lead)])[0]
        try:
            return encode_prompts(self.tokenizer, [messages])[0]
        except DataError:  # a template that knows no system message
            whole = "\n\n".join(message["content"] for message in messages)
            return encode_prompts(self.tokenizer, [[{"role": "user", "content": whole}]])[0]

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
        fits = [row for row in asked if self.context is None or len(row[2]) <= self.context]
        logprobs: dict[tuple[int, tuple[int, ...]], dict[str, float]] = {}
        for index in microbatches([len(ids) for *_, ids in fits], _FORWARD_TOKENS) if fits else []:
            rows = [fits[k] for k in index.tolist()]
            found = next_logprobs(model, [ids for *_, ids in rows], list(self._symbols.values()))
            for (i, order, _), row in zip(rows, found.tolist(), strict=True):
                logprobs[i, order] = dict(zip(self._symbols, row, strict=True))
            yield None
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
