"""A model behind an OpenAI-compatible endpoint: requests within limits, tried again, and never paid for twice.

    request ── cached? ── reserved? ── sent (retried) ── kept ── its reply

What is asked is not known here: `endpoint` asks a judge, `reviser` has answers criticized and rewritten. A thread asks
everything of one item; `limits.concurrency` of them are at work.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from tether.config import AskedModelConfig, LimitsConfig
from tether.errors import ConfigError, ModelError, first_line
from tether.feedback.judge_cache import JudgeCache, request_key
from tether.remote import Cancelled, GaveUp, Temporary, describe_status, temporary, with_retries

_OVERHEAD_TOKENS = 256  # what a server's chat template may add to a question
_REFUSALS = 3  # items that the endpoint refused, before it answered anything: then it is none
_GIVE_UP_AFTER = 20  # items in a row that failed for lack of an answer: the endpoint is gone

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Reply:
    """What one request gave."""

    text: str
    logprobs: dict[str, float] | None  # of what could have been the first token, in nats
    whole: bool  # neither filtered, refused nor cut


class Unable(Exception):
    """The endpoint refused the request, or left out what it asked for."""


class Spent(Exception):
    """A limit does not allow one more request."""


class NotKept(Exception):
    """An answer is not in the cache, where it alone is looked at."""


class Client:
    """Asks; what is cached costs nothing. Once `stop` is set, no further request is sent.

    section: of the config, as errors name its keys. lost: what a dead endpoint means, for its error.
    """

    def __init__(
        self, config: AskedModelConfig, limits: LimitsConfig, cache: JudgeCache, *, section: str, lost: str
    ) -> None:
        self._config, self._limits, self._cache, self._section, self._lost = config, limits, cache, section, lost
        self._key = check_key(config, section)
        self._client = _openai_client(config, limits, self._key, section)
        self._turn = threading.Condition()
        self._in_flight = self._answered = self._in_a_row = self._refusals = 0
        self.stop = threading.Event()
        self.spent = False  # a limit was reached

    def work(
        self, items: Iterable[Item], do: Callable[[Item], Outcome | None],
        kept: Callable[[Item], Outcome | None] = lambda _: None,
    ) -> Generator[Outcome | None, None, None]:  # fmt: skip
        """What `do`, called in threads, makes of each item, as it comes. The first alone: it shows whether the
        endpoint is one, and what it can do.

        kept: what follows from the cache alone, else None, and `do` is called. It is called here: a thread for each
            item that is read in 0.1 ms would take longer than all else.
        None: nothing came for a moment, and whoever reads this may look at something else. Ends early where a limit is
        reached (`spent`). Left early, it sends nothing more, and waits for what is in flight.
        """
        waiting = iter(items)
        running: set[Future[Outcome | None]] = set()
        pool = ThreadPoolExecutor(self._limits.concurrency, thread_name_prefix="asking")
        try:
            ended = False
            most = 1
            while not ended or running:
                while not ended and len(running) < most:
                    following = None if self.stop.is_set() or self.spent else next(waiting, None)
                    if following is None:
                        ended = True
                    elif (outcome := kept(following)) is not None:
                        yield outcome
                    else:
                        running.add(pool.submit(do, following))
                if not running:
                    break
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
        """What was sent and paid since the first start."""
        requests, tokens = self._cache.spent()
        return f"{requests:,} requests and {tokens:,} tokens so far"

    # ------------------------------------------------------------ items that failed

    def succeeded(self) -> None:
        """An item was answered to its end."""
        with self._turn:
            self._in_a_row = 0

    def refused(self, why: str, hint: str = "") -> None:
        """The endpoint refused an item. One may be at fault, several are not: ModelError."""
        with self._turn:
            self._refusals += 1
            if self._refusals >= _REFUSALS and not self._answered:
                raise self.error(why, hint)

    def gave_up(self, error: GaveUp) -> None:
        """An item got no answer. ModelError where nothing ever was answered, or one item after another fails."""
        with self._turn:
            self._in_a_row += 1
            if not self._answered or self._in_a_row >= _GIVE_UP_AFTER:
                raise self.error(str(error)) from error

    # ------------------------------------------------------------ one request

    def ask(self, body: dict[str, Any], vote: int = 0) -> Reply:
        """The reply to one request, cached or paid for. Unable, Spent, Cancelled or GaveUp where there is none.

        vote: number of this request among those with the same body.
        """
        with suppress(NotKept):
            return self.kept(body, vote)
        key = request_key(str(self._config.base_url), body, vote)
        each = self._limits.timeout_s
        return with_retries(
            lambda left: self._send(body, key, min(each, left)),
            deadline_s=(each + 20) * (self._limits.retries + 1), retries=self._limits.retries, stop=self.stop,
        )  # fmt: skip

    def kept(self, body: dict[str, Any], vote: int = 0) -> Reply:
        """The cached reply to a request; NotKept where there is none."""
        kept = self._cache.answer(request_key(str(self._config.base_url), body, vote))
        if kept is None:
            raise NotKept
        with self._turn:
            self._answered += 1
        return Reply(kept["text"], kept["logprobs"], True)

    def _send(self, body: dict[str, Any], key: str, timeout_s: float) -> Reply:
        import openai

        reserved = most_tokens(body)
        self._reserve(reserved)
        refund = 0  # a request that timed out may have been paid for
        try:
            raw = self._client.chat.completions.with_raw_response.create(**body, timeout=timeout_s)
            reply, used = self._parse(raw.http_response.content, with_logprobs=bool(body.get("logprobs")))
            refund = reserved - used if used is not None else 0
            if reply.logprobs is None and body.get("logprobs"):
                raise Unable("no log-probs")
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
        """Count the request, or raise Spent; where only what is in flight stands in the way, wait for it."""
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
                    raise Spent
                self._turn.wait()
                if self.stop.is_set():
                    raise Cancelled
            self._in_flight += 1

    def _parse(self, content: bytes, *, with_logprobs: bool) -> tuple[Reply, int | None]:
        """(reply, tokens used) of a response's body; Temporary where it is only half there."""
        try:
            body = json.loads(content)
            (choice, *_) = body["choices"]
            message = choice["message"]
            text = _text_of(message.get("content") or "")
            tokens = (choice.get("logprobs") or {}).get("content") or []
            logprobs: dict[str, float] | None = None
            if tokens:
                logprobs = {}
                for entry in [tokens[0], *(tokens[0].get("top_logprobs") or [])]:
                    logprobs[entry["token"]] = float(entry["logprob"])
            ended = ("stop", "length") if with_logprobs else ("stop",)  # after one token every answer is cut
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
            return Unable(f"{describe_status(status)}: {said}")
        return self.error(describe_status(status) + ("" if status in (401, 403) else f": {said}"))

    def error(self, what: str, hint: str = "") -> ModelError:
        """That this is no endpoint for the model; hint: what else may help where it refuses what it is asked."""
        url, env, section = self._config.base_url, self._config.key_env, self._section
        remedy = "Check that it is running, and the address, which mostly ends in /v1"
        if "HTTP 401" in what or "HTTP 403" in what:
            remedy = f"Check the key in {env}" if env else f"Set {section}.key_env to the variable that holds its key"
        elif "HTTP 404" in what:
            remedy = f"Check the address, which mostly ends in /v1, and {section}.model, as the endpoint calls it"
        elif "HTTP 4" in what:
            remedy = f"Check {section}.model, and what the endpoint can do{hint}"
        return ModelError(
            f"{section}.base_url={url} does not answer as an endpoint for {self._config.model} ({what}): {self._lost}. "
            f"{remedy}."
        )

    def _scrub(self, text: str) -> str:
        """What a server said, without our key in it."""
        return text.replace(self._key, "…") if self._key else text


def _text_of(content: str | list[dict[str, Any]]) -> str:
    """A reply's text; of one in parts, as Mistral's thinking models send, that of its parts of text alone."""
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")


def most_tokens(body: dict[str, Any]) -> int:
    """The most that a request can take: a token is a byte at least."""
    asked = sum(len(message["content"].encode(errors="replace")) for message in body["messages"])
    return asked + _OVERHEAD_TOKENS + int(body["max_tokens"])


def check_key(config: AskedModelConfig, section: str) -> str | None:
    """The endpoint's key out of the environment; None where it needs none. ConfigError where it is not there."""
    if config.key_env is None:
        return None
    key = os.environ.get(config.key_env, "").strip()
    if not key:
        raise ConfigError(
            f"{section}.key_env={config.key_env}: there is no such variable in the environment, or it is empty, so the "
            f"endpoint would refuse every request. Set it: export {config.key_env}=…"
        )
    if not re.fullmatch(r"[!-~]+", key):  # HTTP clients quote such a header in their errors, and the key with it
        raise ConfigError(
            f"{section}.key_env={config.key_env}: what is in that variable has spaces, line breaks or letters outside "
            "of ASCII, characters that no key has, and could not be sent. Set it to the key alone."
        )
    return key


def _openai_client(config: AskedModelConfig, limits: LimitsConfig, key: str | None, section: str) -> Any:
    try:
        import httpx2
        import openai
    except ImportError as error:
        raise ConfigError(
            f"{section}.base_url={config.base_url}: asking an endpoint takes the package openai, which is not "
            "installed. Install it: pip install 'tether[judge]'. A local model directory needs none "
            f"({section}.base_url: null)."
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
