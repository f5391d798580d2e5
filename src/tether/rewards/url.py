"""Scores from another machine: `reward: [{url: "http://…/score", key_env: NAME}]`.

    POST {"prompts": […], "completions": […], "finish_reasons": […], "columns": {…}, …}  →  {"scores": [number or null]}

All rows of a cycle go in one request. What fails for a while is tried again until `timeout_s` is over; anything else
ends the run, saved: a failure that counted as 0 would punish a response for nothing. docs/serving.md is the protocol.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

from transformers import PreTrainedTokenizerBase

from tether.data.chat import encode_completion
from tether.data.text import completion_text
from tether.errors import ConfigError, RewardError, first_line
from tether.remote import GaveUp, Temporary, describe_status, temporary, with_retries
from tether.rewards.function import describe_row, read_scores, refuse_cut
from tether.rewards.model import tokens_hash
from tether.runs.files import to_plain
from tether.types import Completions, Prompt

if TYPE_CHECKING:
    import httpx2

_PROBES = ("Yes.", "No, I would rather not talk about it, and you know why!", "It is a fine day", "so so so so so so")
_ATTEMPTS = 3  # that at least fit into timeout_s, however long each takes
_LONGEST_ANSWER = 1_000_000  # bytes, and 100 more for each row
_SILENT_S = 2.0  # that a server may be away before the person is told
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class UrlReward:
    """One URL as a source of scores. tokenizer, stop_ids: the policy's."""

    remote = True

    def __init__(
        self,
        url: str,
        *,
        name: str,
        key_env: str | None,
        timeout_s: float,
        probe: bool,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
    ) -> None:
        self.url, self.name, self.timeout_s = url, name, timeout_s
        self._key_env, self._key = key_env, _key(key_env, name)
        self._probe, self._tokenizer, self._stop_ids = probe, tokenizer, stop_ids
        self._tokens = tokens_hash(tokenizer)
        self._client = _client(url, name)
        self._stop = threading.Event()

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise RewardError where the source cannot be asked about these prompts, or scores what differs alike."""
        refuse_cut(prompts, self.name)
        if not self._probe or not prompts:
            return
        stop = list(self._stop_ids[:1])
        ids = [[*encode_completion(self._tokenizer, text), *stop] for text in _PROBES]
        unused: list[list[float]] = [[] for _ in ids]
        probes = Completions([prompts[0]] * len(ids), ids, unused, unused, ["stop"] * len(ids))
        scores = self.score(probes)
        if len(set(scores)) == 1:
            raise RewardError(
                f"reward {self.name}: {self.url} scores {len(ids)} answers as different as {_PROBES[0]!r} and "
                f"{_PROBES[1]!r} all alike, {scores[0]}: nothing could be learned from it. Some servers apply a "
                "softmax to a reward model's one number, which is then always 1. Have it give the number itself; "
                "or, where equal scores are right for such answers, as of a verifier, set probe: false of this source."
            )

    def score(self, completions: Completions) -> list[float | None]:
        """B scores, by one request that is repeated while it fails in a way that may pass."""
        import httpx2

        deadline_s = self.timeout_s
        body = json.dumps(self._request(completions)).encode()
        headers = {"content-type": "application/json", "idempotency-key": uuid4().hex}
        if self._key is not None:
            headers["authorization"] = f"Bearer {self._key}"
        most_bytes = _LONGEST_ANSWER + 100 * len(completions)
        told = False

        def attempt(left_s: float) -> tuple[int, bytes]:
            nonlocal told
            if not told and deadline_s - left_s > _SILENT_S:
                told = True
                self._say_waiting(left_s)
            limit_s = min(left_s, deadline_s / _ATTEMPTS)
            until = time.monotonic() + limit_s
            content = bytearray()
            try:
                with self._client.stream("POST", self.url, content=body, headers=headers, timeout=limit_s) as response:
                    for chunk in response.iter_bytes():
                        content += chunk
                        if time.monotonic() > until:  # the client's own limit is between one byte and the next
                            raise Temporary(f"its answer did not end within {limit_s:.3g} s")
                        if len(content) > most_bytes:
                            raise self._unusable(f"answered with more than {most_bytes:,} bytes")
            except httpx2.TimeoutException as error:
                raise Temporary(f"no answer within {limit_s:.3g} s") from error
            except (httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.ProxyError) as error:
                raise Temporary(first_line(error)) from error
            except (httpx2.HTTPError, httpx2.InvalidURL, UnicodeError) as error:  # the last for http://a..b
                raise self._unusable(f"cannot be asked ({first_line(error)})") from error
            failure = temporary(response.status_code, response.headers, self._detail(content))
            if failure is not None:
                raise failure
            return response.status_code, bytes(content)

        try:
            status, content = with_retries(attempt, deadline_s=deadline_s, stop=self._stop)
        except GaveUp as error:
            raise RewardError(
                f"reward {self.name}: {self.url} does not answer ({error}): {len(completions)} responses, from "
                f"{describe_row(completions, 0)} on, have no scores. See whether the server runs, "
                "or raise timeout_s of this source; then run the same command again."
            ) from error
        if not 200 <= status < 300:
            raise self._refused(status, self._detail(content), completions)
        scores = self._scores(content, completions)
        try:
            return read_scores(scores, self.name, completions)
        except RewardError as error:  # it quotes the answer
            raise RewardError(self._without_key(str(error).encode()).decode()) from None

    def cancel(self) -> None:
        """End a `score` that is waiting in another thread."""
        self._stop.set()

    def _say_waiting(self, left_s: float) -> None:
        """To the person, once a request: a run that waits is not one that hangs."""
        with suppress(OSError):  # nobody may be reading
            print(f"reward {self.name}: {self.url} does not answer; asked again for {left_s:.0f} s more",
                  file=sys.stderr, flush=True)  # fmt: skip

    def _request(self, completions: Completions) -> dict[str, Any]:
        """The body. The ids are for a server whose tokenizer has the same hash: it tokenizes nothing again."""
        prompts = completions.prompts
        columns = sorted({column for prompt in prompts for column in prompt.columns})
        return {
            "prompts": [prompt.source for prompt in prompts],
            "completions": [completion_text(self._tokenizer, ids, self._stop_ids) for ids in completions.response_ids],
            "finish_reasons": completions.finish_reasons,
            "columns": {name: [to_plain(prompt.columns.get(name)) for prompt in prompts] for name in columns},
            "tokenizer": self._tokens,
            "prompt_ids": [list(prompt.ids) for prompt in prompts],
            "completion_ids": completions.response_ids,
        }

    def _scores(self, content: bytes, completions: Completions) -> Any:
        answer = _read_json(content)
        if not isinstance(answer, dict) or "scores" not in answer:
            raise self._unusable(
                f"answered {self._shown(content)!r} for {len(completions)} responses, from "
                f'{describe_row(completions, 0)} on, where {{"scores": [number or null, …]}} belongs'
            )
        return answer["scores"]

    def _refused(self, status: int, detail: str, completions: Completions) -> RewardError:
        said = f"answered {describe_status(status)}{f': {detail.rstrip(chr(46))}' if detail else ''}"
        remedy = "What it says is what to change; then run the same command again."
        if status in (401, 403):
            holds = f"what {self._key_env} holds" if self._key_env else "nothing: set key_env of this source"
            remedy = f"It wants another key than {holds}."
        elif status in (404, 405) or 300 <= status < 400:
            remedy = "Is it the whole address, such as http://127.0.0.1:8766/score?"
        return RewardError(
            f"reward {self.name}: {self.url} {said}. {len(completions)} responses, from {describe_row(completions, 0)} "
            f"on, have no scores. {remedy}"
        )

    def _unusable(self, what: str) -> RewardError:
        return RewardError(
            f"reward {self.name}: {self.url} {what}: these responses have no scores. Is it the address of a server of "
            "rewards? docs/serving.md says what one answers."
        )

    def _detail(self, content: bytes | bytearray) -> str:
        """What the server said of a failure."""
        answer = _read_json(content)
        return self._shown((str(answer.get("detail", "")) if isinstance(answer, dict) else "").encode() or content)

    def _shown(self, content: bytes | bytearray, longest: int = 300) -> str:
        """The beginning of a text of somebody else's, for a message: in printable characters."""
        text = self._without_key(content)[: 10 * longest].decode("utf-8", "replace")
        text = "".join(c if c.isprintable() else " " for c in text).strip()
        return text if len(text) <= longest else f"{text[: longest - 1]}…"

    def _without_key(self, content: bytes | bytearray) -> bytes:
        """What a server says may be shown: it must not say our key."""
        return bytes(content.replace(self._key.encode(), b"(the key)") if self._key else content)


def request_hashes(completions: Completions) -> list[bytes]:
    """Of each row, the hash of all that a source is told of it."""
    rows = zip(completions.prompts, completions.response_ids, completions.finish_reasons, strict=True)
    told = ([p.source, p.ids, ids, reason, to_plain(p.columns)] for p, ids, reason in rows)
    return [hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest() for row in told]


def _read_json(content: bytes | bytearray) -> Any:
    """None where it is not JSON."""
    with suppress(ValueError, RecursionError):  # the latter for a hundred thousand brackets
        return json.loads(content)
    return None


def _client(url: str, name: str) -> httpx2.Client:
    """What asks. A proxy of the environment is for other machines: it could not reach a server on this one, and the key
    would travel to it."""
    try:
        import httpx2
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed, so reward {name} cannot be asked: pip install 'tether[judge]'."
        ) from error
    try:
        return httpx2.Client(trust_env=urlsplit(url).hostname not in LOOPBACK)
    except (ImportError, OSError, ValueError, httpx2.InvalidURL) as error:
        raise ConfigError(
            f"reward {name} cannot be asked with this environment ({first_line(error)}): correct or unset HTTP_PROXY, "
            "HTTPS_PROXY, ALL_PROXY and SSL_CERT_FILE, whichever it is about, or name the server in NO_PROXY."
        ) from error


def _key(variable: str | None, name: str) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        what = "holds characters that no key has" if key else "is not set"
        raise ConfigError(
            f"key_env of reward {name}: the environment variable {variable} {what}, and the server answers nobody "
            f"without. Set it where you start the run: export {variable}=…"
        )
    return key
