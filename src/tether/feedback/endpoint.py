"""A judge behind an OpenAI-compatible endpoint: what is sent, what comes back, and what it may cost.

    comparison ── both orders × votes ── cached? ── reserved? ── sent (retried) ── kept ── read ── P(a is better)

A thread asks everything of one comparison; `limits.concurrency` of them are at work. The three forms of an answer are
tried in their order: one that the endpoint cannot give is not tried again, also not when the command is run again.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tether.config import JudgeSection, LimitsConfig
from tether.errors import ConfigError, ModelError, first_line
from tether.feedback.judge_cache import JudgeCache, request_key
from tether.feedback.records import Verdict
from tether.feedback.verdict import (
    FORMS,
    SCHEMA,
    Comparison,
    NoVerdict,
    json_verdict,
    letter_probability,
    text_verdict,
    verdict_of,
)
from tether.remote import Cancelled, GaveUp, Temporary, describe_status, temporary, with_retries
from tether.statistics import vote_probability

_OVERHEAD_TOKENS = 256  # what a server's chat template may add to a question
_TRIES = 3  # answers in a form of which none could be read: then the endpoint counts as not able to give it
_GIVE_UP_AFTER = 20  # comparisons in a row that failed for lack of an answer: the endpoint is gone
_KEPT_CHARACTERS = 2000  # of a reply, in the store; the cache has the whole


@dataclass(frozen=True)
class Reply:
    """What one request gave."""

    text: str
    logprobs: dict[str, float] | None  # of what could have been the first token, in nats
    whole: bool  # neither filtered, refused nor cut


class _Unable(Exception):
    """The endpoint does not know this form of an answer."""


class _Spent(Exception):
    """A limit does not allow one more request."""


class Endpoint:
    """Asks; what is cached costs nothing. Once `stop` is set, no further request is sent."""

    def __init__(self, config: JudgeSection, limits: LimitsConfig, cache: JudgeCache) -> None:
        self._config, self._limits, self._cache = config, limits, cache
        self._key = check_key(config)
        self._client = _client(config, limits, self._key)
        self._forms: list[str] = list(FORMS) if config.answer == "auto" else [config.answer]
        self._form_name = f"form of {config.base_url} {config.model}"
        if config.answer == "auto" and (known := cache.remembered(self._form_name)):
            self._forms = list(FORMS[FORMS.index(known) :])
        self._read, self._unread = dict.fromkeys(FORMS, 0), dict.fromkeys(FORMS, 0)
        self._turn = threading.Condition()
        self._in_flight = self._answered = self._in_a_row = self._refusals = 0
        self.stop = threading.Event()
        self.spent = False  # a limit was reached

    # ------------------------------------------------------------ comparisons

    def compare(self, comparisons: Iterable[Comparison]) -> Generator[Verdict | NoVerdict | None, None, None]:
        """What the judge says of each, as it comes. The first alone: it shows which form of answer there is.

        None: nothing came for a moment, and whoever reads this may look at something else. Ends early where a limit is
        reached (`spent`). Left early, it sends nothing more, and waits for what is in flight.
        """
        waiting = iter(comparisons)
        running: set[Future[Verdict | NoVerdict | None]] = set()
        pool = ThreadPoolExecutor(self._limits.concurrency, thread_name_prefix="judge")
        try:
            ended = False
            most = 1
            while not ended or running:
                while not ended and len(running) < most:
                    following = None if self.stop.is_set() or self.spent else next(waiting, None)
                    if following is None:
                        ended = True
                    else:
                        running.add(pool.submit(self._compare, following))
                done, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                most = self._limits.concurrency if done else most
                yield from (future.result() for future in done) if done else [None]
        finally:
            self.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            for future in running:  # answered while we were stopping: it is in the cache
                with suppress(BaseException):
                    future.result()

    def cost(self) -> str:
        """What was sent and paid since the judge's first start."""
        requests, tokens = self._cache.spent()
        return f"{requests:,} requests and {tokens:,} tokens so far"

    def _compare(self, comparison: Comparison) -> Verdict | NoVerdict | None:
        """None where it was not asked to the end: a limit, or a stop."""
        unable: list[str] = []  # forms
        failure = NoVerdict(comparison.item, "")
        try:
            for form in list(self._forms):
                try:
                    outcome = self._in_form(comparison, form)
                except _Unable as error:
                    failure = NoVerdict(comparison.item, "the endpoint refused the question", str(error))
                    if self._read[form]:
                        break  # it can: this question is too long for it, say
                    unable.append(form)
                    continue
                if isinstance(outcome, Verdict):
                    self._settle(form, unable)
                    return outcome
                failure = outcome
                with self._turn:
                    self._in_a_row, self._unread[form] = 0, self._unread[form] + 1
            if len(unable) == len(self._forms):
                self._refused(failure.reply)
        except (_Spent, Cancelled):
            return None
        except GaveUp as error:
            return self._gave_up(comparison, error)
        return failure

    def _in_form(self, comparison: Comparison, form: str) -> Verdict | NoVerdict:
        read: dict[tuple[int, int], tuple[float, dict[str, Any]]] = {}
        for order in comparison.orders:
            body = self._body(comparison, order, form)
            if form == "logprobs":
                reply = self._ask(body, 0, form)
                p = letter_probability(reply.logprobs or {}) if reply.whole else None
                if p is None:
                    return NoVerdict(comparison.item, "neither letter likely", reply.text)
                read[order] = p, {"form": form, "reply": reply.logprobs}
                continue
            replies = [self._ask(body, vote, form) for vote in range(self._config.votes)]
            letters = [(json_verdict if form == "json" else text_verdict)(r.text) if r.whole else None for r in replies]
            valid = [letter for letter in letters if letter is not None]
            if not valid or 2 * len(valid) < len(letters):
                unread = next(r for r, letter in zip(replies, letters, strict=True) if letter is None)
                why = "no verdict in the answer" if unread.whole else "refused, filtered or cut"
                return NoVerdict(comparison.item, why, unread.text)
            wins = valid.count("A")
            kept = {"form": form, "votes": len(valid), "wins": wins, "reply": replies[0].text[:_KEPT_CHARACTERS]}
            read[order] = vote_probability(wins, len(valid)), kept
        return verdict_of(comparison, read)

    def _body(self, comparison: Comparison, order: tuple[int, int], form: str) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._config.model, "messages": comparison.question(order, form)}
        if form == "logprobs":
            return body | {"max_tokens": 1, "temperature": 0.0, "logprobs": True, "top_logprobs": 20}
        body |= {"max_tokens": self._config.answer_tokens, "temperature": 0.0 if self._config.votes == 1 else 1.0}
        if form == "json":
            schema = {"name": "verdict", "strict": True, "schema": SCHEMA}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def _settle(self, form: str, unable: Sequence[str]) -> None:
        """An answer was read in this form: those before it that the endpoint cannot give are tried no more."""
        with self._turn:
            self._in_a_row, self._read[form] = 0, self._read[form] + 1
            before = self._forms[: self._forms.index(form)] if form in self._forms else []
            lost = [f for f in before if not self._read[f] and (f in unable or self._unread[f] >= _TRIES)]
            if lost:
                self._forms = [f for f in self._forms if f not in lost]
                self._cache.remember(self._form_name, self._forms[0])

    def _refused(self, why: str) -> None:
        """The endpoint knew no form of this question. One question may be at fault, several are not."""
        with self._turn:
            self._refusals += 1
            if self._refusals >= _TRIES and not any(self._read.values()):
                raise self._error(why)

    def _gave_up(self, comparison: Comparison, error: GaveUp) -> NoVerdict:
        with self._turn:
            self._in_a_row += 1
            if not self._answered or self._in_a_row >= _GIVE_UP_AFTER:
                raise self._error(str(error)) from error
        return NoVerdict(comparison.item, "the endpoint gave no answer", error.reason)

    # ------------------------------------------------------------ one request

    def _ask(self, body: dict[str, Any], vote: int, form: str) -> Reply:
        """The reply to one request, cached or paid for."""
        key = request_key(str(self._config.base_url), body, vote)
        kept = self._cache.answer(key)
        if kept is not None:
            with self._turn:
                self._answered += 1
            return Reply(kept["text"], kept["logprobs"], True)
        each = self._limits.timeout_s
        return with_retries(
            lambda left: self._send(body, key, form, min(each, left)),
            deadline_s=(each + 20) * (self._limits.retries + 1), retries=self._limits.retries, stop=self.stop,
        )  # fmt: skip

    def _send(self, body: dict[str, Any], key: str, form: str, timeout_s: float) -> Reply:
        import openai

        reserved = most_tokens(body)
        self._reserve(reserved)
        refund = 0  # a request that timed out may have been paid for
        try:
            raw = self._client.chat.completions.with_raw_response.create(**body, timeout=timeout_s)
            reply, used = self._parse(raw.http_response.content, form)
            refund = reserved - used if used is not None else 0
            if reply.logprobs is None and form == "logprobs":
                raise _Unable("no log-probs")
            if reply.whole:
                self._cache.keep(key, {"text": reply.text, "logprobs": reply.logprobs}, refund=refund)
                refund = 0
            with self._turn:
                self._answered += 1
            return reply
        except openai.APIStatusError as error:
            refund = reserved
            raise self._status_error(error) from None
        except openai.APITimeoutError:
            raise Temporary(f"no answer within {timeout_s:g} s") from None
        except openai.APIConnectionError as error:
            raise Temporary(self._scrub(first_line(error.__cause__ or error))) from None
        finally:
            if refund:
                self._cache.refund(refund)
            with self._turn:
                self._in_flight -= 1
                self._turn.notify_all()

    def _reserve(self, tokens: int) -> None:
        """Count the request, or raise _Spent; where only what is in flight stands in the way, wait for it."""
        most = self._limits.tokens
        if most is not None and tokens > most:
            raise ConfigError(
                f"limits.tokens={most} is below the {tokens} tokens that one request can take: nothing could be asked. "
                f"Set it to {tokens} or more."
            )
        with self._turn:
            while not self._cache.reserve(tokens, most_requests=self._limits.requests, most_tokens=self._limits.tokens):
                requests, _ = self._cache.spent()
                out_of_requests = self._limits.requests is not None and requests >= self._limits.requests
                if out_of_requests or not self._in_flight:
                    self.spent = True
                    raise _Spent
                self._turn.wait()
                if self.stop.is_set():
                    raise Cancelled
            self._in_flight += 1

    def _parse(self, content: bytes, form: str) -> tuple[Reply, int | None]:
        """(reply, tokens used) of a response's body; Temporary where it is only half there."""
        try:
            body = json.loads(content)
            (choice, *_) = body["choices"]
            message = choice["message"]
            text = message.get("content") or ""
            tokens = (choice.get("logprobs") or {}).get("content") or []
            logprobs: dict[str, float] | None = None
            if tokens:
                logprobs = {}
                for entry in [tokens[0], *(tokens[0].get("top_logprobs") or [])]:
                    logprobs[entry["token"]] = float(entry["logprob"])
            ended = ("stop", "length") if form == "logprobs" else ("stop",)  # after one token every answer is cut
            whole = choice.get("finish_reason") in ended and not message.get("refusal")
            used = (body.get("usage") or {}).get("total_tokens")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Temporary(f"the answer is no chat completion ({first_line(error)})") from None
        return Reply(str(message.get("refusal") or text), logprobs, whole), used if isinstance(used, int) else None

    def _status_error(self, error: Any) -> Exception:
        """What a status stands for: to be tried again, a form that is not known, or the end."""
        status, said = error.status_code, self._scrub(first_line(error))[:200]
        if (passing := temporary(status, error.response.headers)) is not None:
            return passing
        if status in (400, 422):
            return _Unable(f"{describe_status(status)}: {said}")
        return self._error(describe_status(status) + ("" if status in (401, 403) else f": {said}"))

    def _error(self, what: str) -> ModelError:
        url, env = self._config.base_url, self._config.key_env
        remedy = "Check that it is running, and the address, which mostly ends in /v1"
        if "HTTP 401" in what or "HTTP 403" in what:
            remedy = f"Check the key in {env}" if env else "Set judge.key_env to the variable that holds its key"
        elif "HTTP 404" in what:
            remedy = "Check the address, which mostly ends in /v1, and judge.model, as the endpoint calls it"
        elif "HTTP 4" in what:
            remedy = "Check judge.model, and what the endpoint can do; judge.answer chooses another form of answer"
        return ModelError(
            f"judge.base_url={url} does not answer as an endpoint for {self._config.model} ({what}): no pair could be "
            f"compared. {remedy}."
        )

    def _scrub(self, text: str) -> str:
        """What a server said, without our key in it."""
        return text.replace(self._key, "…") if self._key else text


def most_tokens(body: dict[str, Any]) -> int:
    """The most that a request can take: a token is a byte at least."""
    asked = sum(len(message["content"].encode(errors="replace")) for message in body["messages"])
    return asked + _OVERHEAD_TOKENS + int(body["max_tokens"])


def check_key(config: JudgeSection) -> str | None:
    """The endpoint's key out of the environment; None where it needs none. ConfigError where it is not there."""
    if config.key_env is None:
        return None
    key = os.environ.get(config.key_env, "").strip()
    if not key:
        raise ConfigError(
            f"judge.key_env={config.key_env}: there is no such variable in the environment, or it is empty, so the "
            f"endpoint would refuse every request. Set it: export {config.key_env}=…"
        )
    if not re.fullmatch(r"[!-~]+", key):  # HTTP clients quote such a header in their errors, and the key with it
        raise ConfigError(
            f"judge.key_env={config.key_env}: what is in that variable has spaces, line breaks or letters outside of "
            "ASCII, characters that no key has, and could not be sent. Set it to the key alone."
        )
    return key


def _client(config: JudgeSection, limits: LimitsConfig, key: str | None) -> Any:
    try:
        import httpx2
        import openai
    except ImportError as error:
        raise ConfigError(
            f"judge.base_url={config.base_url}: asking an endpoint takes the package openai, which is not installed. "
            "Install it: pip install 'tether[judge]'. A local model directory needs none (judge.base_url: null)."
        ) from error
    # max_retries=0, for every attempt is reserved. What else is in the environment is not for this server.
    elsewhere: Any = {name: openai.Omit() for name in ("OpenAI-Organization", "OpenAI-Project")}
    pool = httpx2.Limits(max_connections=limits.concurrency, max_keepalive_connections=limits.concurrency)
    return openai.OpenAI(
        base_url=config.base_url,
        api_key=key or "none",
        max_retries=0,
        timeout=limits.timeout_s,
        http_client=openai.DefaultHttpxClient(limits=pool),
        default_headers=elsewhere,
    )  # fmt: skip
