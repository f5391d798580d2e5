"""A judge that is a model directory: one forward pass an order, and the log-probs of the letters A and B."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tether.config import JudgeConfig
from tether.data.chat import encode_prompts
from tether.data.tokenizer import check_vocabulary, load_tokenizer
from tether.errors import DataError, ModelError
from tether.feedback.records import Verdict
from tether.feedback.verdict import Comparison, NoVerdict, letter_probability, plain_question, verdict_of
from tether.models.language_model import LanguageModel
from tether.models.loading import context_length, load_causal_lm, model_config, resolve_device, resolve_dtype
from tether.types import microbatches

_AT_ONCE = 64  # comparisons whose questions are tokenized and sorted together
_FORWARD_TOKENS = 8192  # padded tokens in one forward pass


class LocalJudge:
    """A model that need not be loaded yet: what is asked of it is known from its tokenizer and its config."""

    def __init__(self, config: JudgeConfig) -> None:
        path, trust = config.judge.model, config.trust_remote_code
        self._path, self._trust, self._device, self._dtype = path, trust, config.device, config.dtype
        self._model_config = model_config(path, trust_remote_code=trust)
        self.context = context_length(self._model_config)
        self.tokenizer = load_tokenizer(path, trust_remote_code=trust)
        check_vocabulary(self.tokenizer, self._model_config.get_text_config().vocab_size)
        self._letters = letter_tokens(self.tokenizer)

    def encode(self, comparison: Comparison, order: tuple[int, int]) -> list[int]:
        """The ids after which the letter comes."""
        return encode_question(self.tokenizer, comparison.question(order, "logprobs"), "The better answer is")

    def compare(self, comparisons: Iterable[Comparison]) -> Generator[Verdict | NoVerdict | None, None, None]:
        """What the model says of each, in their order; None after a forward pass, so that a signal can be heeded."""
        model = self._load()
        waiting = iter(comparisons)
        while batch := list(islice(waiting, _AT_ONCE)):
            yield from self._compare(model, batch)

    def cost(self) -> str:
        """Nothing that would be paid for."""
        return ""

    def _load(self) -> LanguageModel:
        device = resolve_device(self._device)
        dtype = resolve_dtype(self._dtype, device, self._model_config)
        lm = load_causal_lm(self._path, dtype=dtype, device=device, trust_remote_code=self._trust)
        model = LanguageModel(lm.eval().requires_grad_(False), dtype)
        model.check_head()
        return model

    def _compare(self, model: LanguageModel, batch: Sequence[Comparison]) -> Iterator[Verdict | NoVerdict | None]:
        asked = [(i, order, self.encode(x, order)) for i, x in enumerate(batch) for order in x.orders]
        fits = [row for row in asked if self.context is None or len(row[2]) <= self.context]
        logprobs: dict[tuple[int, tuple[int, int]], dict[str, float]] = {}
        for index in microbatches([len(ids) for *_, ids in fits], _FORWARD_TOKENS) if fits else []:
            rows = [fits[k] for k in index.tolist()]
            found = next_logprobs(model, [ids for *_, ids in rows], list(self._letters.values()))
            for (i, order, _), row in zip(rows, found.tolist(), strict=True):
                logprobs[i, order] = dict(zip(self._letters, row, strict=True))
            yield None
        for i, comparison in enumerate(batch):
            if any((i, order) not in logprobs for order in comparison.orders):
                yield NoVerdict(comparison.item, f"longer than the model's {self.context} tokens")
                continue
            read = {}
            for order in comparison.orders:
                if (p := letter_probability(logprobs[i, order])) is not None:
                    read[order] = p, {"form": "logprobs", "reply": logprobs[i, order]}
            if len(read) == len(comparison.orders):
                yield verdict_of(comparison, read)
            else:
                yield NoVerdict(comparison.item, "neither letter likely", str(logprobs[i, comparison.orders[0]]))


def encode_question(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], cue: str) -> list[int]:
    """A question's ids, after which the reply comes; cue: its opening, for a model without a chat template."""
    if not tokenizer.chat_template:
        return encode_prompts(tokenizer, [plain_question(messages, cue)])[0]
    try:
        return encode_prompts(tokenizer, [messages])[0]
    except DataError:  # a template that knows no system message
        whole = "\n\n".join(message["content"] for message in messages)
        return encode_prompts(tokenizer, [[{"role": "user", "content": whole}]])[0]


def letter_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Every single token that writes A or B, with a space before it or without: text → id."""
    found: dict[str, int] = {}
    for letter in "AB":
        for text in (letter, f" {letter}"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) == 1 and ids[0] not in found.values():
                found[text] = ids[0]
        bare = tokenizer.convert_tokens_to_ids(letter)  # where encoding puts a space before every text
        if isinstance(bare, int) and bare != tokenizer.unk_token_id and bare not in found.values():
            found[letter if letter not in found else f"{letter} "] = bare
    if missing := [letter for letter in "AB" if not any(text.strip() == letter for text in found)]:
        raise ModelError(
            f"judge.model={tokenizer.name_or_path}: its tokenizer has no token for the letter {missing[0]}, so it "
            "could not name an answer. Use another model, or one behind an endpoint (judge.base_url), whose "
            "text is read."
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
