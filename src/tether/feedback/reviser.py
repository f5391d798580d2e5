"""Who writes answers, critiques and revisions: a model directory in this process, or one behind an endpoint."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from tether.config import ReviseConfig
from tether.data.chat import encode_prompts
from tether.data.text import completion_text
from tether.feedback.chains import CUES, Chain, NoChain, kind_of_step
from tether.feedback.client import Client, Spent, Unable
from tether.feedback.judge_cache import JudgeCache
from tether.feedback.local_judge import encode_question
from tether.feedback.queue import draw
from tether.models.language_model import LanguageModel
from tether.models.loading import resolve_device
from tether.remote import Cancelled, GaveUp
from tether.samplers.local import LocalSampler
from tether.train.evaluate import Source
from tether.types import REVISE, Prompt, Sampling

_AT_ONCE = 64  # chains that a local model writes together

Outcome = Chain | NoChain


class EndpointReviser:
    """Each chain is written by one thread, step after step; what is cached is not asked again."""

    def __init__(self, config: ReviseConfig, cache: JudgeCache) -> None:
        self._config = config
        self._client = Client(config.revise, config.limits, cache, section="revise", lost="nothing could be revised")

    def revise(self, chains: Iterable[Chain]) -> Generator[Outcome | None, None, None]:
        """Every chain when it is done or broke off, see `Client.work`."""
        return self._client.work(chains, self._revise)

    def cost(self) -> str:
        return self._client.cost()

    def now(self) -> str:
        """What is being written: many things at once, of which the cost tells enough."""
        return ""

    def _revise(self, chain: Chain) -> Outcome | None:
        """None where it was not written to its end: a limit, or a stop."""
        try:
            while not chain.done:
                reply = self._client.ask(self.body(chain))
                if (why := chain.take(reply.text, whole=reply.whole)) is not None:
                    self._client.succeeded()
                    return NoChain(chain.number, why, reply.text)
        except (Spent, Cancelled):
            return None
        except Unable as error:
            self._client.refused(str(error))
            return NoChain(chain.number, f"the endpoint refused to write a {chain.kind}", str(error))
        except GaveUp as error:
            self._client.gave_up(error)
            return NoChain(chain.number, "the endpoint gave no answer", error.reason)
        self._client.succeeded()
        return chain

    def body(self, chain: Chain) -> dict[str, Any]:
        """The request for what comes next. Its seed follows from chain and step: the same again is the same request."""
        s = self._config.sampling
        body: dict[str, Any] = {
            "model": self._config.revise.model, "messages": chain.question(), "max_tokens": s.max_new_tokens,
            "temperature": s.temperature, "seed": draw(self._config.seed, "reply", chain.id, chain.step) >> 33,
        }  # fmt: skip
        return body | ({"top_p": s.top_p} if s.top_p < 1 else {})


class LocalReviser:
    """A model that need not be loaded yet. Up to `_AT_ONCE` chains go on together, all of them a step at a time.

    Counted sampling: what is drawn follows from the seed, the chain and the step.
    """

    def __init__(self, config: ReviseConfig) -> None:
        self._config = config
        self._source = Source(config.revise.model, config.sampling, config.trust_remote_code)
        self.context: int | None = self._source.room["context"]
        self._now = ""  # what is being written

    def revise(self, chains: Iterable[Chain]) -> Generator[Outcome | None, None, None]:
        """Every chain when it is done or broke off, in order; None after every token, so that a signal can be
        heeded."""
        model = self._source.load(resolve_device(self._config.device), self._config.dtype)
        sampler = LocalSampler(model, slots=self._config.sampling.slots)
        for _, batch in groupby(chains, key=lambda chain: chain.number // _AT_ONCE):  # the same however often stopped
            yield from self._revise(model, sampler, list(batch))

    def cost(self) -> str:
        """Nothing that would be paid for."""
        return ""

    def now(self) -> str:
        """What is being written, for whoever waits."""
        return self._now

    def encode(self, chain: Chain) -> list[int]:
        """The ids after which comes what is next."""
        tokenizer = self._source.tokenizer
        if chain.step == 0:
            return encode_prompts(tokenizer, [chain.prompt])[0]
        return encode_question(tokenizer, chain.question(), CUES[chain.kind])

    def _revise(self, model: LanguageModel, sampler: LocalSampler, batch: Sequence[Chain]) -> Iterator[Outcome | None]:
        s, stop_ids, most = self._config.sampling, self._source.stop_ids(model), self._config.sampling.max_new_tokens
        sampling = Sampling(s.temperature, s.top_k, s.top_p, most, stop_ids, 1, self._config.seed, REVISE)
        rounds = self._config.revise.rounds
        broken: dict[int, NoChain] = {}
        for step in range(1 + 2 * rounds):
            asked: list[tuple[Chain, Prompt]] = []
            for chain in batch:
                if chain.number in broken or chain.step != step:
                    continue
                ids = self.encode(chain)
                if self.context is not None and len(ids) + most > self.context:
                    why = f"the question for a {chain.kind} leaves no room for it in {self.context} tokens"
                    broken[chain.number] = NoChain(chain.number, why)
                else:
                    asked.append((chain, Prompt(tuple(ids), chain.prompt, chain.number)))
            if not asked:
                continue
            self._now = f"writing {len(asked)} {kind_of_step(step)}s, step {step + 1} of {1 + 2 * rounds}"
            numbers = [draw(chain.id) >> 1 for chain, _ in asked]
            for drawn in sampler.steps([p for _, p in asked], sampling, cycle=step, numbers=numbers):  # noqa: B007
                yield None
            found = drawn.completions()
            for (chain, _), ids, ended in zip(asked, found.response_ids, found.finish_reasons, strict=True):
                text = completion_text(self._source.tokenizer, ids, stop_ids)
                if (broke := chain.take(text, whole=ended == "stop")) is not None:
                    broken[chain.number] = NoChain(chain.number, broke, text)
        yield from (broken.get(chain.number, chain) for chain in batch)
