"""Try it takes nothing from a training run, and gives back what it took."""

import gc
import json
import re
import shutil
import time
import weakref

import pytest

from served import serve
from tether.studio import playground


@pytest.fixture
def devices(monkeypatch):
    """The devices that models were to be loaded on; they are loaded on the CPU: this machine may have no GPU."""
    asked = []
    load = playground._load

    def recorded(run, device):
        asked.append(device)
        return load(run, "cpu")

    monkeypatch.setattr(playground, "_load", recorded)
    return asked


def ask(studio) -> str:
    client = studio.client()
    runs = dict(map(reversed, re.findall(r'<option value="(\w+)"[^>]*>([^<]*)</option>', client.get("/try").text)))
    answer = client.get("/try/stream", params={"run": runs["first"], "prompt": "once"})
    assert "event: done" in answer.text
    assert "event: refused" not in answer.text
    return client.get("/try").text


def test_it_answers_on_the_cpu_unless_told_otherwise(studio, devices):
    assert "on the CPU" in ask(studio)
    assert devices == ["cpu"]


def test_a_gpu_that_was_asked_for_is_used_only_while_no_run_trains(trained, tmp_path, devices):
    root = tmp_path / "runs"
    shutil.copytree(trained, root)
    status = root / "second" / "status.json"
    finished = status.read_text()
    for studio in serve(root, tmp_path / "p.db", device="cuda"):
        ask(studio)
        # long without a heartbeat: it may be at work on something slow, and its memory is there still
        status.write_text(json.dumps(json.loads(finished) | {"state": "running", "heartbeat": "2020-01-01T00:00:00Z"}))
        assert "second is training" in ask(studio)
        status.write_text(finished)
        ask(studio)
    assert devices == ["cuda", "cpu", "cuda"]


def loaded(monkeypatch) -> list[weakref.ref]:
    """References to every model that is loaded from now on."""
    found = []
    load = playground._load

    def remembered(run, device):
        models = load(run, "cpu")
        found.append(weakref.ref(models.policy))
        return models

    monkeypatch.setattr(playground, "_load", remembered)
    return found


def test_models_are_kept_while_they_are_asked_and_dropped_when_idle(studio, monkeypatch):
    monkeypatch.setattr(playground, "IDLE_S", 1.0)
    models = loaded(monkeypatch)
    ask(studio)
    ask(studio)
    (policy,) = models  # loaded once
    end = time.monotonic() + 20
    while policy() is not None and time.monotonic() < end:
        time.sleep(0.05)
    gc.collect()
    assert policy() is None


def test_on_a_gpu_nothing_stays_after_an_answer(trained, tmp_path, monkeypatch):
    models = loaded(monkeypatch)
    for studio in serve(trained, tmp_path / "p.db", device="cuda"):
        ask(studio)
        (policy,) = models
        end = time.monotonic() + 20
        while policy() is not None and time.monotonic() < end:
            time.sleep(0.05)
        assert policy() is None
