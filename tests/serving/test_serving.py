"""`tether serve`: its scores are those of the same reward model in the run, and nobody gets one without the token."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from served_rewards import TOKEN, make_reward_model, serving, serving_process
from tether.cli import main
from tether.config import RewardShapingConfig, RewardSourceConfig
from tether.data.tokenizer import load_tokenizer
from tether.rewards import build_reward
from tether.rewards.model import same_tokens, tokens_hash
from tether.serving.scoring import ServedModel
from tether.types import Completions, Prompt

AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
EOS = 1


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    return make_reward_model(tmp_path_factory.mktemp("served") / "rm", tiny_model())


@pytest.fixture(scope="module")
def server(model):
    with (
        serving(model, most_rows=8, most_bytes=20_000) as url,
        httpx2.Client(base_url=url, headers=AUTHORIZED, timeout=30) as client,
    ):
        yield client


def ask(server, prompts=("p",), completions=("c",), **rest):
    return server.post("/score", json={"prompts": list(prompts), "completions": list(completions), **rest})


def local(model, prompts, ids, reasons=None):
    """The scores of the same model as a source in a run."""
    tokenizer = load_tokenizer(str(model))
    source = RewardSourceConfig(model=str(model))
    reward = build_reward([source], RewardShapingConfig(), tokenizer, (EOS,), torch.device("cpu"))
    floats = [[0.0] * len(row) for row in ids]
    rows = [Prompt(tuple(p), "", i) for i, p in enumerate(prompts)]
    return reward.score(Completions(rows, ids, floats, floats, reasons or ["stop"] * len(ids))).scores.tolist()


def test_texts_get_the_scores_of_the_local_model_and_only_an_answer_that_stopped_its_stop_token(server, model):
    encode = load_tokenizer(str(model)).encode
    prompts, answers, reasons = ["once", "ü, why?"], [" upon", " a time"], ["stop", "length"]
    ids = [[*encode(answers[0]), EOS], encode(answers[1])]
    want = local(model, [encode(p) for p in prompts], ids, reasons)
    got = ask(server, prompts, answers, finish_reasons=reasons)
    assert got.json() == {"scores": want}
    assert ask(server, prompts, answers).json()["scores"][1] != want[1]  # taken to have stopped


def test_messages_are_written_in_the_models_chat_template(server, model):
    tokenizer = load_tokenizer(str(model))
    message = [{"role": "user", "content": "hello"}]
    prompt = tokenizer.apply_chat_template(message, tokenize=True, add_generation_prompt=True)["input_ids"]
    want = local(model, [prompt], [[*tokenizer.encode("hi"), EOS]])
    assert ask(server, [message], ["hi"]).json()["scores"] == want


def test_ids_of_the_same_tokenizer_are_scored_as_they_are(server, model):
    # No text has these ids: a pad in the middle, a stop token in the prompt.
    ids = {"prompt_ids": [[5, EOS, 7], [9]], "completion_ids": [[8, 0, 9], [3, EOS]]}
    want = local(model, ids["prompt_ids"], ids["completion_ids"])
    got = ask(server, ["x", "y"], ["a", "b"], tokenizer=tokens_hash(load_tokenizer(str(model))), **ids)
    assert got.json()["scores"] == want


def test_ids_of_another_tokenizer_are_not(server):
    ids = {"prompt_ids": [[5, 7]], "completion_ids": [[8, 0, 9]]}
    plain = ask(server, ["x"], ["a"]).json()
    assert ask(server, ["x"], ["a"], tokenizer="0" * 64, **ids).json() == plain


def test_hashes_are_equal_where_ids_mean_the_same_and_only_there(model, tiny_tokenizer):
    same, other = load_tokenizer(str(model)), load_tokenizer(str(model))
    other.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    shuffled = PreTrainedTokenizerFast(tokenizer_object=same.backend_tokenizer)  # no chat template
    for tokenizer in (same, other, shuffled):
        assert (tokens_hash(tokenizer) == tokens_hash(tiny_tokenizer)) == same_tokens(tokenizer, tiny_tokenizer)
    assert same_tokens(same, tiny_tokenizer)
    assert not same_tokens(other, tiny_tokenizer)


def test_health_says_what_is_served(server, model):
    health = server.get("/health").json()
    assert health["name"] == "rm"
    assert health["normalization"] == {"mean": 0.5, "std": 2.0}
    assert health["tokenizer"] == tokens_hash(load_tokenizer(str(model)))
    assert health["limits"]["most_rows"] == 8


@pytest.mark.parametrize("header", [None, "", "Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", TOKEN, "Bearer ä"])
@pytest.mark.parametrize(("method", "path"), [("POST", "/score"), ("GET", "/health"), ("GET", "/docs"), ("GET", "/")])
def test_without_the_token_nothing_is_answered(server, header, method, path):
    headers = {} if header is None else {"Authorization": header.encode()}
    answer = httpx2.request(method, str(server.base_url).rstrip("/") + path, headers=headers)
    assert answer.status_code == 401
    assert TOKEN not in answer.text


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"prompts": ["a"]}, "completions: Field required"),
        ({"prompts": ["a"], "completions": [1]}, "completions.0: Input should be a valid string"),
        ({"prompts": ["a"], "completions": []}, "completions has 0 rows and prompts 1"),
        ({"prompts": [], "completions": []}, "prompts has 0 rows: this server takes 1 to 8"),
        ({"prompts": ["a"] * 9, "completions": ["a"] * 9}, "prompts has 9 rows: this server takes 1 to 8"),
        ({"prompts": ["a"], "completions": ["b"], "finish_reasons": ["eos"]}, "finish_reasons.0"),
        ({"prompts": ["a"], "completions": ["b"], "columns": {"k": []}}, "k has 0 rows"),
        ({"prompts": ["a", 3], "completions": ["b", "c"]}, "row 1: the prompt is the number 3"),
        ({"prompts": ["a"], "completions": ["b\udc80"]}, "Invalid JSON"),
        ({"prompts": [[{"role": "assistant", "content": "b"}]], "completions": ["c"]}, "nothing left to answer"),
        ({"prompts": ["a"], "completions": ["b" * 200]}, "has positions for 128 tokens"),
        ({"prompts": [""], "completions": [""], "finish_reasons": ["length"]}, "there is no token"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_scored_is_answered_with_what_is_wrong(server, body, complaint):
    answer = server.post("/score", content=json.dumps(body))  # ASCII: half a character travels as an escape
    assert answer.status_code == 422, answer.text
    assert complaint in answer.json()["detail"]


def test_an_id_that_the_model_does_not_have_is_named(server, model):
    own = tokens_hash(load_tokenizer(str(model)))
    answer = ask(server, tokenizer=own, prompt_ids=[[3]], completion_ids=[[10**6]])
    assert answer.status_code == 422
    assert "row 0 holds the id 1000000" in answer.json()["detail"]


def test_what_is_not_json_and_what_is_too_long_are_refused(server):
    assert server.post("/score", content=b"{'half").status_code == 422
    assert server.post("/score", content=b"x" * 20_001).status_code == 413

    def unannounced():
        for _ in range(30):
            yield b"x" * 1000

    assert server.post("/score", content=unannounced()).status_code == 413


class Slow(ServedModel):
    """Takes its time, and remembers how often it was asked."""

    seconds, calls = 0.4, 0

    def score(self, asked):
        self.calls += 1
        time.sleep(self.seconds)
        return super().score(asked)


def at_once(count, call):
    """What `count` calls return that are made at the same time."""
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(call, range(count)))


def test_a_request_that_comes_twice_is_computed_once(model):
    slow = Slow(str(model), dtype="auto", device="cpu")
    with serving(slow) as url, httpx2.Client(base_url=url, headers=AUTHORIZED, timeout=30) as client:

        def post(completion, key):
            body = {"prompts": ["a"], "completions": [completion]}
            return client.post("/score", json=body, headers={"Idempotency-Key": key} if key else {})

        together = at_once(3, lambda _: post("b", "k"))
        assert {a.text for a in [*together, post("b", "k")]} == {together[0].text}
        assert slow.calls == 1
        assert post("b", "other").text == post("b", None).text == together[0].text
        assert slow.calls == 3
        assert post("c", "k").status_code == 422


def test_a_request_that_failed_is_tried_again_under_its_key(model):
    class Failing(Slow):
        def score(self, asked):
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("out of memory")
            return [1.0]

    failing = Failing(str(model), dtype="auto", device="cpu")
    with serving(failing) as url, httpx2.Client(base_url=url, headers=AUTHORIZED | {"Idempotency-Key": "k"}) as client:
        failed = ask(client)
        assert (failed.status_code, "RuntimeError" in failed.text) == (500, True)
        assert ask(client).json() == {"scores": [1.0]}


def test_more_requests_than_may_wait_are_sent_away_for_a_second(model):
    slow = Slow(str(model), dtype="auto", device="cpu")
    with serving(slow, most_waiting=2) as url, httpx2.Client(base_url=url, headers=AUTHORIZED, timeout=30) as client:
        answers = at_once(4, lambda i: ask(client, completions=[f"c{i}"]))
    assert sorted(a.status_code for a in answers) == [200, 200, 503, 503]
    assert {a.headers["retry-after"] for a in answers if a.status_code == 503} == {"1"}


# ---------------------------------------------------------------- the command


def test_the_command_serves_and_stops_when_what_was_asked_is_answered(model):
    with serving_process(model) as (process, url):
        answer = httpx2.post(url, json={"prompts": ["a"], "completions": ["b"]}, headers=AUTHORIZED, timeout=30)
        assert len(answer.json()["scores"]) == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_a_token_is_made_and_printed_where_none_is_given(model):
    process = subprocess.Popen(
        [sys.executable, "-m", "tether", "serve", str(model), "--port", "0"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        url, token = process.stdout.readline().split()[-1], process.stdout.readline().split()[-1]
        assert len(token) >= 32
        health = url.replace("/score", "/health")
        assert httpx2.get(health).status_code == 401
        assert httpx2.get(health, headers={"Authorization": f"Bearer {token}"}).status_code == 200
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("value", [None, "short", "x" * 19, "spaces are no good in a token", "ä" * 30])
def test_a_token_that_could_be_guessed_is_refused(value, monkeypatch, capsys, model):
    monkeypatch.delenv("T", raising=False)
    if value is not None:
        monkeypatch.setenv("T", value)
    assert main(["serve", str(model), "--token-env", "T"]) == 2
    error = capsys.readouterr().err
    assert "--token-env T" in error
    assert value is None or value not in error


def test_a_language_model_and_a_directory_that_is_not_there_are_refused(tiny_model, tmp_path, capsys):
    assert main(["serve", str(tiny_model()), "--port", "0"]) == 2
    assert "reward model" in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "nowhere"), "--port", "0"]) == 2
    assert "nowhere" in capsys.readouterr().err
