"""An OpenAI-compatible endpoint on loopback: judges by a known rule, likes the first place, and fails on a schedule."""

import json
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BIAS = 2.0  # logits for whatever is shown first
REFUSAL = "I cannot compare these."


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


class ScriptedJudge(ThreadingHTTPServer):
    """An answer's worth stands in it, as `worth 1.5`; P(A) = σ(worth of A − worth of B + BIAS).

    fault: of the number of a request, from 0: a status, "hang", "half", "refuse", "cut", "html", or None.
    forms: which it can give; others are answered 400, log-probs by leaving them out.
    """

    daemon_threads = True
    fault: Callable[[int], Any] = staticmethod(lambda n: None)
    forms: tuple[str, ...] = ("logprobs", "json", "text")
    delay_s = 0.0
    mass = 0.9  # of the letters
    write: Callable[[dict[str, Any]], str] | None = None  # of a request's body: what it replies, where it is no judge
    key: str | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.turn = threading.Lock()
        self.empty: dict[str, float] = {}  # worth of answers that do not say theirs
        self.asked: list[dict[str, Any]] = []  # bodies, in order
        self.answered: Counter[str] = Counter()  # whole answers by body
        self.headers: list[dict[str, str]] = []
        self.flying = self.most = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer is two writes, of which the second would wait for 40 ms
    server: ScriptedJudge

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        judge = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with judge.turn:
            number = len(judge.asked)
            judge.asked.append(body)
            judge.headers.append(dict(self.headers))
            judge.flying += 1
            judge.most = max(judge.most, judge.flying)
        try:
            self._answer(judge, body, number)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with judge.turn:
                judge.flying -= 1

    def _answer(self, judge: ScriptedJudge, body: dict[str, Any], number: int) -> None:
        time.sleep(judge.delay_s)
        form = "logprobs" if body.get("logprobs") else "json" if "response_format" in body else "text"
        fault = judge.fault(number)
        if self.path != "/v1/chat/completions":
            return self._send(404, {"error": {"message": "no such page"}})
        if judge.key and self.headers.get("authorization") != f"Bearer {judge.key}":
            return self._send(401, {"error": {"message": f"bad key {self.headers.get('authorization')}"}})
        if form not in judge.forms and form != "logprobs":
            return self._send(400, {"error": {"message": f"{form} is not supported"}})
        if isinstance(fault, int):
            return self._send(fault, {"error": {"message": "try later"}})
        if fault == "hang":
            time.sleep(1.0)
        reply = self._reply(judge, body, form, number)
        if fault == "html":
            return self._raw(200, b"<html>Welcome</html>")
        if fault == "half":
            whole = json.dumps(reply).encode()
            return self._raw(200, whole[: len(whole) // 2])
        if fault == "refuse":
            reply["choices"][0] |= {"message": {"role": "assistant", "content": REFUSAL}, "finish_reason": "stop"}
            if form == "logprobs":
                reply["choices"][0]["logprobs"] = _logprobs({"I": 0.97, "A": 0.01, "B": 0.005})
        elif fault == "cut" and form != "logprobs":
            reply["choices"][0]["finish_reason"] = "length"
        elif fault is None:
            with judge.turn:
                judge.answered[json.dumps(body, sort_keys=True)] += 1
        return self._send(200, reply)

    def _reply(self, judge: ScriptedJudge, body: dict[str, Any], form: str, number: int) -> dict[str, Any]:
        if judge.write is not None:
            choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
            choice["message"] = {"role": "assistant", "content": judge.write(body)}
            return _completion(body, choice)
        asked = body["messages"][-1]["content"]
        a, b = (
            float(stated[1]) if (stated := re.match(r"worth (-?[\d.]+)", answer)) else judge.empty[answer.strip()]
            for answer in re.findall(r"\[Answer [AB]\]\n(.*)", asked)
        )
        p = sigmoid(a - b + BIAS)
        choice = {"index": 0, "finish_reason": "stop"}
        if form == "logprobs":
            choice["finish_reason"] = "length"
            m = judge.mass
            spread = {"A": 0.75 * m * p, " A": 0.25 * m * p, "B": 0.5 * m * (1 - p), " B": 0.5 * m * (1 - p)}
            if form in judge.forms:
                choice["logprobs"] = _logprobs(spread | {"The": 1 - m})
            text = "A"
        else:
            draw = int(sha256(f"{number}".encode()).hexdigest()[:8], 16) / 2**32
            letter = "A" if (draw < p if body["temperature"] else p > 0.5) else "B"
            reasons = {"reasoning": "It is worth more.", "verdict": letter}
            text = json.dumps(reasons) if form == "json" else f"One says VERDICT: B, but no.\n**VERDICT:** {letter}."
        choice["message"] = {"role": "assistant", "content": text}
        return _completion(body, choice)

    def _send(self, status: int, body: dict[str, Any]) -> None:
        self._raw(status, json.dumps(body).encode())

    def _raw(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _completion(body: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
    return {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice],
            "usage": {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}}  # fmt: skip


def _logprobs(p: dict[str, float]) -> dict[str, Any]:
    top = [{"token": token, "logprob": math.log(x), "bytes": None} for token, x in p.items()]
    return {"content": [top[0] | {"top_logprobs": top}]}


@contextmanager
def scripted_judge() -> Iterator[ScriptedJudge]:
    server = ScriptedJudge()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
