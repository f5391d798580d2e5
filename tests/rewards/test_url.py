"""Rewards from a URL: what is sent, what is tried again, and what ends a run; against real servers on loopback."""

import threading
import time
from contextlib import suppress

import pytest
import torch

from served_rewards import TOKEN, Flapping, Scripted, listening, make_reward_model, serving
from tether.config import RewardShapingConfig, RewardSourceConfig
from tether.config.sections import check_names
from tether.errors import ConfigError, RewardError, RunError
from tether.rewards import build_reward
from tether.rewards.model import tokens_hash
from tether.runs.answers import KeptAnswers
from tether.types import Completions, Prompt

EOS = 1
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("REWARD_KEY", TOKEN)


def completions_of(tokenizer, texts, cut=(), **columns):
    ids = [tokenizer.encode(t) + ([] if i in cut else [EOS]) for i, t in enumerate(texts)]
    prompts = [
        Prompt(tuple(tokenizer.encode(f"p{i}")), f"p{i}", i + 10, {k: v[i] for k, v in columns.items()})
        for i in range(len(texts))
    ]
    floats = [[0.0] * len(row) for row in ids]
    return Completions(prompts, ids, floats, floats, ["length" if i in cut else "stop" for i in range(len(texts))])


def reward_of(tokenizer, *urls, kept=None, **keys):
    keys = {"key_env": "REWARD_KEY", "timeout_s": 6.0} | keys
    sources = [RewardSourceConfig(url=url, name=f"u{i}", **keys) for i, url in enumerate(urls)]
    return build_reward(sources, RewardShapingConfig(), tokenizer, (EOS,), CPU, kept=kept)


def test_what_a_server_is_told_of_each_row(tiny_tokenizer):
    server = Scripted({"scores": [1.0, None]})
    with listening(server) as url:
        batch = completions_of(tiny_tokenizer, ["good", "bad"], cut=(1,), when=["now", float("nan")])
        scored = reward_of(tiny_tokenizer, f"{url}/score", optional=True)
        with pytest.raises(RewardError, match="no reward source scored row 1"):
            scored.score(batch)
    (headers, body), *_ = server.asked
    assert headers["authorization"] == f"Bearer {TOKEN}"
    assert len(headers["idempotency-key"]) == 32
    assert body == {
        "prompts": ["p0", "p1"],
        "completions": ["good", "bad"],
        "finish_reasons": ["stop", "length"],
        "columns": {"when": ["now", None]},
        "tokenizer": tokens_hash(tiny_tokenizer),
        "prompt_ids": [list(p.ids) for p in batch.prompts],
        "completion_ids": batch.response_ids,
    }


def test_a_served_model_scores_as_the_same_model_here_also_through_faults(tiny_model, tiny_tokenizer, tmp_path):
    model = make_reward_model(tmp_path / "rm", tiny_model())
    here = build_reward([RewardSourceConfig(model=str(model))], RewardShapingConfig(), tiny_tokenizer, (EOS,), CPU)
    flapping = []

    def around(app):
        flapping.append(Flapping(app, busy=0.3, late=0.1, late_s=2.5, seed=10))
        return flapping[0]

    with serving(model, around=around) as url:
        there = reward_of(tiny_tokenizer, f"{url}/score", timeout_s=7.0)
        for i in range(12):
            batch = completions_of(tiny_tokenizer, [f"{i} {'x' * j}" for j in range(5)], cut=(i % 5,))
            assert there.score(batch).scores.tolist() == here.score(batch).scores.tolist()
    assert set(flapping[0].faults) == {"503", "late"}


def test_a_repeated_request_has_the_same_key_and_another_request_another(tiny_tokenizer):
    server = Scripted({"scores": [1.0]}, statuses=[503, 429, 200])
    with listening(server) as url:
        reward = reward_of(tiny_tokenizer, url)
        reward.score(completions_of(tiny_tokenizer, ["a"]))
        reward.score(completions_of(tiny_tokenizer, ["a"]))
    keys = [headers["idempotency-key"] for headers, _ in server.asked]
    assert len(keys) == 4
    assert len(set(keys[:3])) == 1
    assert keys[3] != keys[0]


# ---------------------------------------------------------------- what ends a run


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ({"scores": ["1.5", 2]}, r"returned '1.5' \(str\) for row 0 \(row 10 of the data, 'p0'\)"),
        ({"scores": [1, float("nan")]}, "returned nan for row 1"),
        ({"scores": [1, float("inf")]}, "returned inf for row 1"),
        ({"scores": [1]}, "returned 1 scores for 2 completions: row 1 has no score"),
        ({"scores": [1, 2, 3]}, "returned 3 scores for 2 completions"),
        ({"scores": 1}, "not a list"),
        ({"scores": [1, [2]]}, "for row 1"),
        ({"score": [1, 2]}, r"answered '\{\"score\": \[1, 2\]\}' for 2 responses, from row 0"),
        ([1, 2], "where .* belongs"),
        (b'{"scores": [1, 2', "where .* belongs"),
        (b"<html>\x1b[2J hello", "where .* belongs"),
        (b'{"scores": [' + b"1" * 2_000_000, "more than 1,000,200 bytes"),
        (b'{"scores": ' + b"[" * 200_000, "where .* belongs"),
    ],
)
def test_an_answer_that_holds_no_scores_is_an_error_that_names_the_row(tiny_tokenizer, answer, complaint):
    server = Scripted(answer)
    with listening(server) as url, pytest.raises(RewardError, match=complaint) as error:
        reward_of(tiny_tokenizer, url).score(completions_of(tiny_tokenizer, ["a", "b"]))
    assert len(server.asked) == 1  # never asked again
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(400, "What it says"), (401, "what REWARD_KEY holds"), (404, "whole address"), (307, "whole address"),
     (422, "What it says")],
)  # fmt: skip
def test_a_refusal_is_not_tried_again_and_says_what_the_server_said(tiny_tokenizer, status, remedy):
    server = Scripted({"detail": f"row 1 is odd, and your key is {TOKEN}"}, statuses=[status])
    with listening(server) as url, pytest.raises(RewardError, match=f"HTTP {status}.*row 1 is odd.*{remedy}") as error:
        reward_of(tiny_tokenizer, url).score(completions_of(tiny_tokenizer, ["a", "b"]))
    assert len(server.asked) == 1
    assert TOKEN not in str(error.value)


def test_a_server_that_stays_away_ends_it_within_the_deadline_and_says_how_often_it_was_tried(tiny_tokenizer):
    server = Scripted({"detail": f"busy, {TOKEN}"}, statuses=[503] * 1000)
    began = time.monotonic()
    with listening(server) as url, pytest.raises(RewardError, match=r"HTTP 503 .*busy.*tried \d+ times") as error:
        reward_of(tiny_tokenizer, url, timeout_s=1.5).score(completions_of(tiny_tokenizer, ["a"]))
    assert time.monotonic() - began < 5
    assert len(server.asked) >= 2
    assert TOKEN not in str(error.value)


def test_an_answer_that_trickles_in_is_not_waited_for(tiny_tokenizer):
    server = Scripted({"scores": [1.0]}, drip_s=0.2)
    with (
        listening(server) as url,
        pytest.raises(RewardError, match=r"within 0\.\d+ s; tried"),
    ):  # the last attempt has what is left
        reward_of(tiny_tokenizer, url, timeout_s=1.5).score(completions_of(tiny_tokenizer, ["a"]))


def test_the_right_model_behind_a_wrong_token_is_an_error_without_either(
    tiny_model, tiny_tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("REWARD_KEY", "another-token-of-somebody-else")
    model = make_reward_model(tmp_path / "rm", tiny_model())
    wrong = pytest.raises(RewardError, match=r"HTTP 401 Unauthorized.*REWARD_KEY")
    with serving(model) as url, wrong as error:
        reward_of(tiny_tokenizer, f"{url}/score").check([Prompt((5,), "p", 0)])
    assert "another-token" not in str(error.value)


@pytest.mark.parametrize("key", ["1", "s", "null", "-"])
def test_a_key_that_is_also_a_piece_of_the_answer_changes_no_score(tiny_tokenizer, monkeypatch, key):
    monkeypatch.setenv("REWARD_KEY", key)
    server = Scripted({"scores": [1.25, -11.0, None]})
    with listening(server) as url:
        batch = completions_of(tiny_tokenizer, ["a", "b", "c"])
        assert reward_of(tiny_tokenizer, url).sources["u0"][0].score(batch) == [1.25, -11.0, None]


@pytest.mark.parametrize("quoted", [TOKEN, "".join(f"\\u{ord(c):04x}" for c in TOKEN)])
def test_a_server_that_answers_with_the_key_puts_it_into_no_error(tiny_tokenizer, quoted):
    server = Scripted(f'{{"scores": ["{quoted}"]}}'.encode())
    with (
        listening(server) as url,
        pytest.raises(RewardError, match=r"returned '\(the key\)' \(str\) for row 0") as error,
    ):
        reward_of(tiny_tokenizer, url).score(completions_of(tiny_tokenizer, ["a"]))
    assert error.value.__cause__ is None  # a traceback shows causes


def test_a_proxy_of_the_environment_is_not_asked_for_a_server_on_this_machine(tiny_tokenizer, monkeypatch):
    proxy, server = Scripted({"scores": [9.0]}), Scripted({"scores": [1.0]})
    with listening(proxy) as between, listening(server) as url:
        monkeypatch.setenv("HTTP_PROXY", between)
        monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
        scored = reward_of(tiny_tokenizer, url).score(completions_of(tiny_tokenizer, ["a"]))
    assert scored.scores.tolist() == [1.0]
    assert proxy.asked == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [("ALL_PROXY", "socks5://127.0.0.1:9"), ("HTTP_PROXY", "ftp://p"), ("SSL_CERT_FILE", "/nowhere/ca.pem")],
)
def test_an_environment_that_no_client_works_in_is_an_error_that_names_the_variables(
    tiny_tokenizer, monkeypatch, variable, value
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"reward u0 cannot be asked with this environment .*{variable}"):
        reward_of(tiny_tokenizer, "http://rewards.example/score")


def test_an_address_that_no_machine_can_have_is_an_error(tiny_tokenizer):
    with pytest.raises(RewardError, match=r"http://a\.\.b/score cannot be asked"):
        reward_of(tiny_tokenizer, "http://a..b/score").score(completions_of(tiny_tokenizer, ["a"]))


def test_a_server_that_is_waited_for_is_said_once_on_the_screen(tiny_tokenizer, capfd):
    away, quick = Scripted({}, statuses=[503] * 1000), Scripted({"scores": [1.0]}, statuses=[503])
    with listening(quick) as url:
        reward_of(tiny_tokenizer, url).score(completions_of(tiny_tokenizer, ["a"]))
    assert capfd.readouterr().err == ""  # for a moment alone
    with listening(away) as url:
        with pytest.raises(RewardError, match=r"or raise timeout_s"):
            reward_of(tiny_tokenizer, url, timeout_s=5.0).score(completions_of(tiny_tokenizer, ["a"]))
        said = f"reward u0: {url} does not answer; asked again for "
    assert [line.startswith(said) for line in capfd.readouterr().err.splitlines()] == [True]


# ---------------------------------------------------------------- before the run


def test_a_server_that_is_not_there_before_the_run_is_waited_for_as_long_as_in_it(tiny_tokenizer):
    reward = reward_of(tiny_tokenizer, "http://127.0.0.1:9/score", timeout_s=1.0)
    with pytest.raises(RewardError, match="See whether the server runs, or raise timeout_s of this source"):
        reward.check([Prompt((5,), "p", 0)])


def test_a_server_whose_first_answer_takes_long_passes_the_check(tiny_tokenizer):
    asked = []

    def slowly(body):  # as one that loads its model when it is first asked
        asked.append(body)
        time.sleep(7.5)  # more than a third of 20 s
        return [float(len(text)) for text in body["completions"]]

    with listening(Scripted(slowly, threaded=True)) as url:
        reward_of(tiny_tokenizer, f"{url}/score", timeout_s=60.0).check([Prompt((5,), "p", 0)])
    assert len(asked) == 1


def test_a_source_that_scores_different_answers_alike_is_refused_unless_it_may(tiny_tokenizer):
    with listening(Scripted(lambda body: [1.0] * len(body["prompts"]))) as url:
        with pytest.raises(RewardError, match=r"all alike, 1.0: .*probe: false"):
            reward_of(tiny_tokenizer, url).check([Prompt((5,), "p", 0)])
        reward_of(tiny_tokenizer, url, probe=False).check([Prompt((5,), "p", 0)])


def test_a_source_that_tells_answers_apart_is_accepted(tiny_tokenizer):
    server = Scripted(lambda body: [len(c) for c in body["completions"]])
    with listening(server) as url:
        reward_of(tiny_tokenizer, url).check([Prompt((5,), "p", 3, {"k": 1}), Prompt((6,), "q", 4, {"k": 2})])
    ((_, body),) = server.asked
    assert body["prompts"] == ["p"] * 4
    assert body["columns"] == {"k": [1] * 4}
    assert len(set(body["completions"])) == 4


def test_a_prompt_that_was_cut_is_refused(tiny_tokenizer):
    with pytest.raises(RewardError, match="row 4 of the data is too long and was cut"):
        reward_of(tiny_tokenizer, "http://127.0.0.1:9/score").check([Prompt((5,), "p", 4, cut=True)])


@pytest.mark.parametrize("value", [None, "", "two\nlines", " padded ", "ключ"])
def test_a_key_that_is_not_in_the_environment_is_an_error_that_shows_no_key(tiny_tokenizer, monkeypatch, value):
    monkeypatch.delenv("REWARD_KEY")
    if value is not None:
        monkeypatch.setenv("REWARD_KEY", value)
    with pytest.raises(ConfigError, match="environment variable REWARD_KEY") as error:
        reward_of(tiny_tokenizer, "http://127.0.0.1:9/score")
    assert not value or value not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"url": "127.0.0.1:8766/score"}, "is not the address of a server"),
        ({"url": "ftp://h/score"}, "is not the address of a server"),
        ({"url": "http:///score"}, "is not the address of a server"),
        ({"url": "http://h:port/score"}, "is not the address of a server"),
        ({"url": "http://h/a b"}, "is not the address of a server"),
        ({"url": "http://me:hunter2@h/score"}, "name or password before @"),
        ({"url": "http://h/score", "model": "rm"}, "exactly one of function, model, models, url"),
        ({"url": "http://h/score", "arguments": {"a": 1}}, "given with a url"),
        ({"url": "http://h/score", "key_env": "sk-proj-hunter2"}, "not the name of an environment variable"),
        ({"model": "rm", "key_env": "KEY"}, "key_env is for a url"),
        ({"function": "a.py:f", "probe": False}, "probe is for a url"),
    ],
)
def test_keys_that_contradict_each_other_are_refused_and_no_secret_is_repeated(keys, complaint):
    with pytest.raises(ConfigError, match=complaint) as error:
        RewardSourceConfig(**keys).check("reward[0]")
    assert "hunter2" not in str(error.value)


def test_two_urls_need_names():
    sources = [RewardSourceConfig(url="http://a/score"), RewardSourceConfig(url="http://b/score")]
    with pytest.raises(ConfigError, match=r"reward\[1\] is called 'url' like one before it"):
        check_names(sources)


# ---------------------------------------------------------------- several, and what is kept


def test_servers_are_asked_at_the_same_time_and_answer_in_the_configs_order(tiny_tokenizer):
    meet = threading.Barrier(2, timeout=20)  # neither answers before the other was asked

    def answering(score):
        def answer(body):
            meet.wait()
            return [score] * len(body["prompts"])

        return Scripted(answer, threaded=True)

    with listening(answering(2.0)) as a, listening(answering(3.0)) as b:
        scored = reward_of(tiny_tokenizer, a, b).score(completions_of(tiny_tokenizer, ["x"]))
    assert list(scored.parts.items()) == [("u0", [2.0]), ("u1", [3.0])]
    assert scored.scores.tolist() == [5.0]


def test_a_server_is_asked_while_something_else_is_computed(tiny_tokenizer):
    asked = threading.Event()

    def answer(body):
        asked.set()
        return [2.0] * len(body["prompts"])

    with (
        listening(Scripted(answer)) as url,
        reward_of(tiny_tokenizer, url).asking(completions_of(tiny_tokenizer, ["x"])) as answers,
    ):
        assert asked.wait(20)
        assert answers().scores.tolist() == [2.0]


def test_a_server_is_asked_no_more_once_what_is_computed_beside_it_has_failed(tiny_tokenizer):
    with listening(Scripted({}, statuses=[503] * 1000)) as url:
        reward = reward_of(tiny_tokenizer, url, timeout_s=600.0)
        with suppress(FloatingPointError), reward.asking(completions_of(tiny_tokenizer, ["x"])):
            (asking,) = [t for t in threading.enumerate() if t.name == "reward"]
            raise FloatingPointError
        asking.join(10)
        assert not asking.is_alive()


@pytest.mark.parametrize("broken_first", [True, False])
def test_where_one_source_fails_the_others_are_not_waited_for(tiny_tokenizer, broken_first):
    busy, broken = Scripted({}, statuses=[503] * 1000), Scripted({"scores": []})
    began = time.monotonic()
    with listening(busy) as a, listening(broken) as b, pytest.raises(RewardError, match="returned 0 scores"):
        reward_of(tiny_tokenizer, *((b, a) if broken_first else (a, b)), timeout_s=30.0).score(
            completions_of(tiny_tokenizer, ["x"])
        )
    assert time.monotonic() - began < 10


def test_kept_answers_stand_in_for_the_same_requests_of_the_same_phase_alone(tiny_tokenizer, tmp_path):
    server = Scripted(lambda body: [torch.rand(()).item() for _ in body["prompts"]])
    batch, other = (completions_of(tiny_tokenizer, texts) for texts in (["a", "b", "a"], ["a", "c", "a"]))
    with listening(server) as url:
        kept = tmp_path / "rewards.db"
        first = reward_of(tiny_tokenizer, url, kept=kept).score(batch, "cycle-000001")
        again = reward_of(tiny_tokenizer, url, kept=kept)  # as another process would
        assert again.score(batch, "cycle-000001").parts == first.parts
        assert len(server.asked) == 1
        assert again.score(batch, "cycle-000002").parts != first.parts
        assert again.score(batch, "evaluation-000001").parts != first.parts
        assert again.score(other, "cycle-000001").parts != first.parts
        assert again.score(batch).parts != first.parts
        assert len(server.asked) == 5
    assert TOKEN.encode() not in kept.read_bytes()


def test_an_answer_that_ends_the_run_is_not_kept_to_end_it_again(tiny_tokenizer, tmp_path):
    server, batch = Scripted({"scores": [None]}), completions_of(tiny_tokenizer, ["a"])
    with listening(server) as url:
        reward = reward_of(tiny_tokenizer, url, kept=tmp_path / "rewards.db")
        with pytest.raises(RewardError, match="no reward source scored row 0"):
            reward.score(batch, "cycle-000001")
        server.answer = {"scores": [2.0]}  # somebody fixed it
        assert reward.score(batch, "cycle-000001").scores.tolist() == [2.0]


def test_a_score_comes_back_from_the_file_with_every_bit_and_none_as_none(tmp_path):
    kept = KeptAnswers(tmp_path / "rewards.db")
    scores = [0.1, -1e-300, None, 1 / 3, 3.0, 1e300, 5e-324]
    requests = [bytes([i]) * 32 for i in range(len(scores))]
    kept.write("cycle-000001", "u", requests, scores)
    assert kept.read("cycle-000001", "u", requests) == scores
    assert kept.read("cycle-000001", "u", requests[:-1]) is None
    assert kept.read("cycle-000001", "v", requests) is None


def test_a_damaged_file_of_answers_is_named(tmp_path):
    file = tmp_path / "rewards.db"
    file.write_bytes(b"not a database" * 100)
    with pytest.raises(RunError, match=r"rewards.db cannot be used .*move it away"):
        KeptAnswers(file).read("cycle-000001", "u", [b""])
