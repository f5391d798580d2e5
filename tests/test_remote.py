"""Calls that are tried again: which failures, how often, for how long."""

import os
import signal
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random

import httpx2
import openai
import pytest

from tether.errors import first_line
from tether.remote import Cancelled, GaveUp, Temporary, temporary, with_retries
from tether.train.signals import Signals, StopRequested


class Failing:
    """Raises what it is given, one at a call, then answers; remembers what time it was given."""

    def __init__(self, *failures: BaseException) -> None:
        self.failures, self.left, self.at = list(failures), [], []

    def __call__(self, left_s: float) -> str:
        self.left.append(left_s)
        self.at.append(time.monotonic())
        if self.failures:
            raise self.failures.pop(0)
        return "answered"


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529, 599])
def test_timeouts_too_many_requests_and_server_errors_may_pass(status):
    assert isinstance(temporary(status, {}), Temporary)


@pytest.mark.parametrize("status", [200, 307, 400, 401, 404, 409, 413, 600])
def test_no_other_status_may_pass(status):
    assert temporary(status, {}) is None


def test_a_failure_that_passes_is_tried_again_and_its_answer_returned():
    call = Failing(Temporary("down"), Temporary("down"))
    assert with_retries(call, deadline_s=10, random=Random(1)) == "answered"
    assert len(call.at) == 3
    assert 10 >= call.left[0] > 9.9
    assert call.left == sorted(call.left, reverse=True)


def test_what_is_not_temporary_passes_through_at_the_first_attempt():
    call = Failing(ValueError("half JSON"), Temporary("down"))
    with pytest.raises(ValueError, match="half JSON"):
        with_retries(call, deadline_s=10)
    assert len(call.at) == 1


def test_after_so_many_retries_it_gives_up_and_says_how_often_and_how_long():
    call = Failing(*[Temporary("HTTP 503 Service Unavailable: busy.") for _ in range(9)])
    with pytest.raises(GaveUp, match=r"^HTTP 503 Service Unavailable: busy; tried 3 times in \d\.\d s$") as gave_up:
        with_retries(call, deadline_s=60, retries=2, random=Random(0))
    assert gave_up.value.attempts == len(call.at) == 3
    assert isinstance(gave_up.value.__cause__, Temporary)


def test_no_retries_is_one_attempt():
    with pytest.raises(GaveUp, match="down; tried once in"):
        with_retries(Failing(Temporary("down")), deadline_s=60, retries=0)


def test_the_deadline_is_kept_however_many_retries_are_left():
    began = time.monotonic()
    call = Failing(*[Temporary("down") for _ in range(1000)])
    with pytest.raises(GaveUp):
        with_retries(call, deadline_s=1.0)
    assert time.monotonic() - began < 1.0
    assert 2 <= len(call.at) < 50


def test_the_server_is_given_the_time_that_it_asks_for():
    call = Failing(Temporary("slow down", retry_after=0.6))
    with_retries(call, deadline_s=10)
    assert call.at[1] - call.at[0] >= 0.6


def test_a_server_that_asks_for_more_time_than_is_left_is_not_waited_for():
    began = time.monotonic()
    with pytest.raises(GaveUp, match="slow down; tried once"):
        with_retries(Failing(Temporary("slow down", retry_after=30)), deadline_s=5)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("text", "seconds"), [("7", 7), ("0", 0), ("1.5", 1.5), ("soon", None), ("-3", None), ("nan", None)]
)
def test_seconds_to_wait_are_read_off_the_header(text, seconds):
    assert temporary(429, {"retry-after": text}).retry_after == seconds


def test_a_date_to_wait_for_is_read_off_the_header():
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert 98 < temporary(503, {"retry-after": date}).retry_after <= 100
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=100), usegmt=True)
    assert temporary(503, {"retry-after": past}).retry_after is None


def test_another_thread_ends_a_wait():
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    began = time.monotonic()
    with pytest.raises(Cancelled):
        with_retries(Failing(Temporary("slow down", retry_after=20)), deadline_s=60, stop=stop)
    assert time.monotonic() - began < 5


def test_a_signal_ends_a_wait_in_the_phase_of_a_run_that_can_be_dropped():
    began = time.monotonic()
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(StopRequested), Signals() as signals, signals.droppable():
        with_retries(Failing(Temporary("slow down", retry_after=20)), deadline_s=60)
    assert time.monotonic() - began < 5


# ---------------------------------------------------------------- with the clients that it is for


@pytest.fixture
def server():
    """503, then 429, then an answer; counts what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        asked = 0

        def do_POST(self):
            Handler.asked += 1
            self.rfile.read(int(self.headers["content-length"]))
            status = {1: 503, 2: 429}.get(Handler.asked, 200)
            body = b'{"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": []}'
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            if status == 429:
                self.send_header("Retry-After", "0.3")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}", Handler
        served.shutdown()


def test_an_httpx2_client_is_retried(server):
    url, handler = server
    client = httpx2.Client()

    def ask(left_s):
        response = client.post(url, json={}, timeout=left_s)
        if (failure := temporary(response.status_code, response.headers)) is not None:
            raise failure
        return response.json()

    began = time.monotonic()
    assert with_retries(ask, deadline_s=20)["id"] == "1"
    assert handler.asked == 3
    assert time.monotonic() - began >= 0.3


def test_an_openai_client_without_retries_of_its_own_is_retried(server):
    url, handler = server
    client = openai.OpenAI(base_url=url, api_key="k", max_retries=0)

    def ask(left_s):
        try:
            return client.chat.completions.create(model="m", messages=[], timeout=left_s)
        except openai.APIStatusError as error:
            if (failure := temporary(error.status_code, error.response.headers)) is not None:
                raise failure from error
            raise

    assert with_retries(ask, deadline_s=20).id == "1"
    assert handler.asked == 3


def test_a_refused_connection_is_tried_until_somebody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"

    def ask(left_s):
        try:
            return httpx2.get(url, timeout=left_s)
        except httpx2.TransportError as error:
            raise Temporary(first_line(error)) from error

    with pytest.raises(GaveUp, match=r"[Cc]onnection refused; tried 3 times"):
        with_retries(ask, deadline_s=20, retries=2)
