"""A judge behind a server that many people run: `transformers serve`, with a tiny model that was taught to judge."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest
from transformers import AutoTokenizer

import tether
from tether.cli import main
from tether.config import DataConfig, InitModelConfig, OptimConfig, SFTConfig, SFTModelConfig, SFTSection
from tether.demo.tokenizer import build_tokenizer
from tether.feedback.records import Filters
from tether.feedback.store import Store
from tether.feedback.verdict import question

PRINCIPLE = "Choose the kind answer."
KIND, RUDE = ["bless you", "thank you"], ["go away", "be quiet"]
PROMPTS = ["red", "green", "blue", "white"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"
TINY = {
    "model_type": "llama", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A model that ends its answer with a verdict, as it is asked to in words."""
    to = tmp_path_factory.mktemp("judge")
    gap = "\0"
    asked = [m["content"] for m in question(PRINCIPLE, gap, gap, gap, "text")]
    build_tokenizer([*PROMPTS, *KIND, *RUDE, "One is kind.\nVERDICT: A", "One is kind.\nVERDICT: B"] * 20, to / "tok")
    tokenizer = AutoTokenizer.from_pretrained(to / "tok")
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens([piece for text in asked for piece in text.split(gap) if piece])  # one token each
    tokenizer.save_pretrained(to / "tok")
    rows = [
        {"prompt": question(PRINCIPLE, prompt, *pair, "text"),
         "completion": [{"role": "assistant", "content": f"One is kind.\nVERDICT: {letter}"}]}
        for prompt in PROMPTS for kind in KIND for rude in RUDE
        for pair, letter in (((kind, rude), "A"), ((rude, kind), "B"))
    ]  # fmt: skip
    (to / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tether.sft(SFTConfig(
        run=str(to / "run"), model=SFTModelConfig(InitModelConfig(TINY, str(to / "tok"))), device="cpu",
        data=DataConfig(str(to / "rows.jsonl")), sft=SFTSection(epochs=40, batch=16), optim=OptimConfig(lr=1e-2),
    ))  # fmt: skip
    return to / "run" / "final"


@pytest.fixture(scope="module")
def url(judge, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(judge), "--device", "cpu"]
    with log.open("w") as out:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=out, stderr=out,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        try:
            until = time.monotonic() + 120
            while not _is_up(f"http://127.0.0.1:{port}/health"):
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait()


def _is_up(url):
    try:
        return httpx2.get(url, timeout=2).is_success
    except httpx2.HTTPError:
        return False


@pytest.mark.slow
def test_a_server_that_gives_neither_logprobs_nor_json_is_asked_in_words(judge, url, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("rules.txt").write_text(PRINCIPLE)
    rows = [{"prompt": p, "a": a, "b": b} for p in PROMPTS for a, b in ((KIND[0], RUDE[0]), (RUDE[1], KIND[1]))]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["judge", "--judge.model", str(judge), "--judge.base_url", url, "--judge.constitution", "rules.txt",
               "--judge.name", "tiny", "--data.path", "pairs.jsonl"]  # fmt: skip
    assert main(command) == 0
    assert "8 pairs labeled by judge:tiny" in capsys.readouterr().out
    with Store("preferences.db", create=False) as store:
        labels = list(store.labels(Filters(judges=True)))
        found = {tuple(answer.text for answer in store.item(x.item).answers): x for x in labels}
        events = list(store.events())
    assert all(found[a, b].choice == ("a" if a in KIND else "b") for a, b in found)
    # one vote an order is (1 + ½)/2 = .75, and both orders say the same
    assert all(x.probability == pytest.approx(0.75 if x.choice == "a" else 0.25) for x in labels)
    replies = [answer["reply"] for event in events for answer in event["answers"]]
    assert {answer["form"] for event in events for answer in event["answers"]} == {"text"}
    assert set(replies) == {"One is kind.\nVERDICT: A", "One is kind.\nVERDICT: B"}

    assert main([*command, "--limits.requests", "1"]) == 0  # all is labeled: nothing is asked
    assert "0 pairs labeled by judge:tiny; 8 were labeled before" in capsys.readouterr().out
