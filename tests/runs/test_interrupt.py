"""Signals: real ones, sent to real processes."""

import os
import signal
import subprocess
import threading
import time

import pytest

from tether.train.signals import Signals, StopRequested

TRAINER = """
import sys, time
from tether.distributed.ranks import Ranks
from tether.train.signals import Signals, StopRequested

def user_code():
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            pass  # swallows what it can

with Signals() as signals:
    try:
        if sys.argv[1] == "droppable":
            with signals.droppable():
                print("ready")
                user_code()
        if sys.argv[1] == "one of two":
            signals.ranks = Ranks(0, 2)
        print("ready")
        while not signals.requested:
            time.sleep(0.01)
        print("phase finished")
        if sys.argv[1] == "one of two":
            user_code()
        with signals.droppable():
            print("never here")
    except StopRequested:
        if sys.argv[1] == "stuck":
            print("saving")
            user_code()
        print("saved")
        sys.exit(3)
"""


def started(start, phase: str) -> subprocess.Popen:
    process = start(TRAINER, phase)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_droppable_phase_stops_it_at_once(start, number):
    process = started(start, "droppable")
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert (out, process.returncode) == ("saved\n", 3)
    assert f"{number.name}: dropping this phase, then saving" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_elsewhere_lets_the_phase_finish_and_stops_before_the_next(start, number):
    process = started(start, "finish")
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert (out, process.returncode) == ("phase finished\nsaved\n", 3)
    assert f"{number.name}: finishing this phase, then saving" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_quits_at_once_without_saving(start, number):
    process = started(start, "stuck")
    process.send_signal(number)
    assert process.stdout.readline() == "phase finished\n"
    assert process.stdout.readline() == "saving\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert (out, process.returncode) == ("", -number)
    assert "again: quitting without saving" in err


def test_what_torchrun_passes_on_as_well_is_no_second_signal(start):
    process = started(start, "one of two")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "phase finished\n"
    process.send_signal(signal.SIGTERM)  # from torchrun, which the scheduler asked too
    time.sleep(1.1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=10)
    assert (out, process.returncode) == ("", -signal.SIGTERM)
    assert err.count("again: quitting without saving") == 1


def test_stop_requested_is_no_exception_that_user_code_would_swallow():
    assert not issubclass(StopRequested, Exception)


def test_code_that_swallows_everything_cannot_keep_the_phase_from_stopping():
    def stubborn() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except BaseException:
            pass

    with Signals() as signals, pytest.raises(StopRequested), signals.droppable():
        stubborn()


def test_a_library_that_raises_an_interrupt_of_its_own_stops_the_phase_all_the_same():
    def wait() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None  # as ray.get does

    with Signals() as signals, pytest.raises(StopRequested), signals.droppable():
        wait()
    with Signals() as signals, pytest.raises(KeyboardInterrupt) as nobody_asked, signals.droppable():
        raise KeyboardInterrupt
    assert nobody_asked.type is KeyboardInterrupt


def test_the_handlers_that_were_there_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Signals():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_in_another_thread_signals_are_left_to_the_main_thread():
    handlers = []

    def work() -> None:
        with Signals() as signals, signals.droppable():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]
