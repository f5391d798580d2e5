"""A judge behind an OpenAI-compatible endpoint: what it is asked, and how its answers are read.

    question ── its orders × votes ── asked, see `client` ── read ── what follows

The three forms of an answer are tried in their order: one that the endpoint cannot give is not tried again, also not
when the command is run again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

from tether.config import JudgeSection, LimitsConfig
from tether.feedback.client import Client, NotKept, Reply, Spent, Unable
from tether.feedback.judge_cache import JudgeCache
from tether.feedback.verdict import FORMS, NoVerdict, Outcome, Question
from tether.remote import Cancelled, GaveUp

_TRIES = 3  # answers in a form of which none could be read: then the endpoint counts as not able to give it
_KEPT_CHARACTERS = 2000  # of a reply, in the store; the cache has the whole


class Endpoint:
    """Asks; what is cached costs nothing. Once `stop` is set, no further request is sent."""

    def __init__(self, config: JudgeSection, limits: LimitsConfig, cache: JudgeCache) -> None:
        self._config, self._cache = config, cache
        self._client = Client(config, limits, cache, section="judge", lost="no pair could be compared")
        self._turn = threading.Lock()
        self._forms: list[str] = list(FORMS) if config.answer == "auto" else [config.answer]
        self._form_name = f"form of {config.base_url} {config.model}"
        if config.answer == "auto" and (known := cache.remembered(self._form_name)):
            self._forms = list(FORMS[FORMS.index(known) :])
        self._read, self._unread = dict.fromkeys(FORMS, 0), dict.fromkeys(FORMS, 0)

    @property
    def spent(self) -> bool:
        """Whether a limit was reached."""
        return self._client.spent

    # ------------------------------------------------------------ comparisons

    def compare(self, comparisons: Iterable[Question[Outcome]]) -> Generator[Outcome | NoVerdict | None, None, None]:
        """What the judge says of each, as it comes. The first alone: it shows which form of answer there is.

        None: nothing came for a moment, and whoever reads this may look at something else. Ends early where a limit is
        reached (`spent`). Left early, it sends nothing more, and waits for what is in flight.
        """
        return self._client.work(comparisons, self._compare, self._kept)

    def cost(self) -> str:
        """What was sent and paid since the judge's first start."""
        return self._client.cost()

    def _kept(self, comparison: Question[Outcome]) -> Outcome | None:
        """What follows where every answer in the first form is cached, and can be read."""
        form = self._forms[0]
        try:
            outcome = self._in_form(comparison, form, self._client.kept)
        except NotKept:
            return None
        if isinstance(outcome, NoVerdict):
            return None
        self._settle(form, [])
        return outcome

    def _compare(self, comparison: Question[Outcome]) -> Outcome | NoVerdict | None:
        """None where it was not asked to the end: a limit, or a stop."""
        unable: list[str] = []  # forms
        failure = NoVerdict(comparison.item, "")
        try:
            for form in list(self._forms):
                try:
                    outcome = self._in_form(comparison, form, self._client.ask)
                except Unable as error:
                    failure = NoVerdict(comparison.item, "the endpoint refused the question", str(error))
                    if self._read[form]:
                        break  # it can: this question is too long for it, say
                    unable.append(form)
                    continue
                if not isinstance(outcome, NoVerdict):
                    self._settle(form, unable)
                    return outcome
                failure = outcome
                self._client.succeeded()
                with self._turn:
                    self._unread[form] += 1
            if len(unable) == len(self._forms):
                self._client.refused(failure.reply, "; judge.answer chooses another form of answer")
        except (Spent, Cancelled):
            return None
        except GaveUp as error:
            self._client.gave_up(error)
            return NoVerdict(comparison.item, "the endpoint gave no answer", error.reason, gone=True)
        return failure

    def _in_form(
        self, comparison: Question[Outcome], form: str, ask: Callable[[dict[str, Any], int], Reply]
    ) -> Outcome | NoVerdict:
        read: dict[tuple[int, ...], tuple[float, dict[str, Any]]] = {}
        for order in comparison.orders:
            body = self._body(comparison, order, form)
            if form == "logprobs":
                reply = ask(body, 0)
                p = comparison.read_logprobs(reply.logprobs or {}) if reply.whole else None
                if p is None:
                    return NoVerdict(comparison.item, comparison.unlikely, reply.text)
                read[order] = p, {"form": form, "reply": reply.logprobs}
                continue
            replies = [ask(body, vote) for vote in range(self._config.votes)]
            votes = [comparison.read_reply(r.text, form) if r.whole else None for r in replies]
            valid = [vote for vote in votes if vote is not None]
            if not valid or 2 * len(valid) < len(votes):
                unread = next(r for r, vote in zip(replies, votes, strict=True) if vote is None)
                why = "no verdict in the answer" if unread.whole else "refused, filtered or cut"
                return NoVerdict(comparison.item, why, unread.text)
            value, kept = comparison.read_votes(valid)
            read[order] = value, {"form": form, **kept, "reply": replies[0].text[:_KEPT_CHARACTERS]}
        return comparison.outcome(read)

    def _body(self, comparison: Question[Any], order: tuple[int, ...], form: str) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._config.model, "messages": comparison.question(order, form)}
        if form == "logprobs":
            return body | {"max_tokens": 1, "temperature": 0.0, "logprobs": True, "top_logprobs": 20}
        body |= {"max_tokens": self._config.answer_tokens, "temperature": 0.0 if self._config.votes == 1 else 1.0}
        if form == "json":
            schema = {"name": "verdict", "strict": True, "schema": comparison.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def _settle(self, form: str, unable: Sequence[str]) -> None:
        """An answer was read in this form: those before it that the endpoint cannot give are tried no more."""
        self._client.succeeded()
        with self._turn:
            self._read[form] += 1
            before = self._forms[: self._forms.index(form)] if form in self._forms else []
            lost = [f for f in before if not self._read[f] and (f in unable or self._unread[f] >= _TRIES)]
            if lost:
                self._forms = [f for f in self._forms if f not in lost]
                self._cache.remember(self._form_name, self._forms[0])
