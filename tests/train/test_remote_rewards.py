"""PPO with rewards from other machines: the same metrics as with the model here, whatever the network does, and after
any kill the bits of a run that was left alone, also where the server's answers are random."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

import tether
from resume import steady
from served_rewards import TOKEN, Flapping, Scripted, listening, make_reward_model, serving, serving_process
from tether.cli import main
from tether.config import PPOSection, RewardShapingConfig, RewardSourceConfig
from tether.config.reading import to_yaml
from tether.errors import Interrupted, RewardError
from tether.models.policy import Policy, Reference
from tether.rewards import build_reward
from tether.runs import Run
from tether.samplers.local import LocalSampler
from tether.train.rollout import collect
from tether.types import Sampling
from tiny import language_model, prompts_of
from tiny_ppo import tiny_config

STOPS = 39  # of tiny_ppo's stop tokens


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("REWARD_KEY", TOKEN)


@pytest.fixture(scope="module")
def policy(tiny_model) -> Path:
    return tiny_model()


@pytest.fixture(scope="module")
def reward_model(policy, tmp_path_factory) -> Path:
    return make_reward_model(tmp_path_factory.mktemp("rm") / "rm", policy, stop_id=STOPS, seed=3)


@pytest.fixture(scope="module")
def local(policy, reward_model, tmp_path_factory) -> Run:
    """The run with the reward model in its own process."""
    source = RewardSourceConfig(model=str(reward_model), name="rm")
    return tether.ppo(config_of(tmp_path_factory.mktemp("local") / "run", policy, source))


def config_of(run: Path, policy: Path, *sources: RewardSourceConfig):
    from dataclasses import replace

    return replace(tiny_config(run, policy), reward=list(sources))


def remote(url: str, **keys) -> RewardSourceConfig:
    return RewardSourceConfig(**{"url": url, "name": "rm", "key_env": "REWARD_KEY", "timeout_s": 6.0} | keys)


def same(a: Run, b: Run) -> bool:
    weights = (load_file(run.final / "model.safetensors") for run in (a, b))
    first, second = weights
    return steady(a) == steady(b) and all((first[name] == second[name]).all() for name in first)


def holds_key(run: Run) -> list[Path]:
    return [file for file in run.path.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]


def test_through_a_flapping_server_the_metrics_are_those_of_the_model_here(policy, reward_model, local, tmp_path):
    flapping = []

    def around(app):
        flapping.append(Flapping(app, busy=0.3, late=0.1, late_s=2.5, seed=10))
        return flapping[0]

    with serving(reward_model, around=around) as url:
        run = tether.ppo(config_of(tmp_path / "run", policy, remote(f"{url}/score", timeout_s=7.0)))
    assert set(flapping[0].faults) == {"503", "late"}
    assert same(run, local)
    assert holds_key(run) == []
    assert (run.path / "rewards.db").exists()
    assert not (local.path / "rewards.db").exists()


def test_a_server_is_asked_before_log_probs_and_values_are_computed(tiny_tokenizer):
    asked, policy = threading.Event(), Policy(language_model())
    policy.register_forward_pre_hook(lambda *_: None if asked.wait(20) else pytest.fail("nobody was asked"))

    def answer(body):
        asked.set()
        return [2.0] * len(body["prompts"])

    with listening(Scripted(answer)) as url:
        rewards = build_reward(
            [remote(url, probe=False)], RewardShapingConfig(), tiny_tokenizer, (STOPS,), torch.device("cpu")
        )
        experience = collect(
            prompts_of([3, 5]), LocalSampler(policy.model), rewards, policy, Reference(policy, policy),
            Sampling(max_new_tokens=6), PPOSection(), kl_coef=lambda *_: 0.1, cycle=1,
        )  # fmt: skip
    assert experience.scored.scores.tolist() == [2.0, 2.0]


@pytest.mark.slow
def test_a_server_that_is_killed_and_started_again_is_waited_for(policy, reward_model, local, tmp_path):
    with serving_process(reward_model) as (process, url):

        class KillsTheServer:
            def write(self, step, metrics):
                if step == 2:
                    process.kill()
                    process.wait()
                    threading.Thread(target=start_again, daemon=True).start()

        ended = threading.Event()

        def start_again():
            with serving_process(reward_model, port=int(url.split(":")[2].split("/")[0])):
                ended.wait(300)

        try:
            config = config_of(tmp_path / "run", policy, remote(url, timeout_s=240.0))
            run = tether.ppo(config, sinks=[KillsTheServer()])
        finally:
            ended.set()
    assert process.poll() is not None
    assert same(run, local)


class RandomServer(Scripted):
    """Answers the same question differently each time. It may kill who asks, before it has answered `kill_at` - 1."""

    def __init__(self, kill_at: int = 0) -> None:
        self.kill_at, self.client, self.times = kill_at, 0, {}
        super().__init__(self.draw)

    def draw(self, body):
        if self.client and len(self.asked) == self.kill_at:
            os.kill(self.client, signal.SIGKILL)
            return []
        told = json.dumps(body, sort_keys=True)
        self.times[told] = self.times.get(told, 0) + 1
        draws = Random(f"{told} {self.times[told]}")
        return [draws.gauss(0, 1) for _ in body["prompts"]]


@pytest.fixture(scope="module")
def whole(policy, tmp_path_factory) -> Run:
    """The run with a random server that nothing happened to."""
    os.environ["REWARD_KEY"] = TOKEN
    with listening(RandomServer()) as url:
        return tether.ppo(config_of(tmp_path_factory.mktemp("whole") / "run", policy, remote(url)))


# probe, evaluation, cycles 1 and 2, evaluation, (checkpoint), cycles 3 and 4, evaluation
@pytest.mark.parametrize("kill_at", [3, 5, 7, 8])
def test_killed_and_continued_a_run_learns_from_the_answers_that_it_had(policy, whole, tmp_path, kill_at):
    server = RandomServer(kill_at)
    with listening(server) as url:
        config = config_of(tmp_path / "run", policy, remote(url))
        child = os.fork()
        if child == 0:
            try:
                tether.ppo(config)
            finally:
                os._exit(1)
        server.client = child
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        server.client = 0
        answered = sum(server.times.values())
        run = tether.ppo(config)
    assert answered == kill_at - 1
    assert same(run, whole)
    asked_once = [n for n in server.times.values() if n == 1]
    assert len(asked_once) == len(server.times) - 1  # all but the probes


def test_a_server_that_moved_is_found_by_its_new_address_and_the_answers_are_kept(policy, whole, tmp_path):
    server = RandomServer()
    with listening(server) as url:
        refusing = Scripted({"detail": "closed for today"}, statuses=[400])

        async def until_cycle_3(scope, receive, send):
            await (server if len(server.asked) < 6 else refusing)(scope, receive, send)

        with (
            listening(until_cycle_3) as first,
            pytest.raises(RewardError, match=r"closed for today\. 8 responses, from row 0"),
        ):
            tether.ppo(config_of(tmp_path / "run", policy, remote(first)))
        assert Run.open(tmp_path / "run").status["state"] == "failed"
        run = tether.ppo(config_of(tmp_path / "run", policy, remote(url)))
    assert same(run, whole)
    assert [e["key"] for e in run.events if e["event"] == "config_changed"] == ["reward[0].url"]


def test_a_signal_ends_the_waiting_for_a_server_that_is_away_and_the_run_goes_on_later(policy, whole, tmp_path):
    server = RandomServer()
    away = Scripted({"detail": "away"}, statuses=[503] * 1000)

    async def away_from_cycle_3_on(scope, receive, send):
        if len(server.asked) < 5 or not away.statuses:
            await server(scope, receive, send)
            return
        await away(scope, receive, send)
        if len(away.asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with listening(away_from_cycle_3_on) as url:
        config = config_of(tmp_path / "run", policy, remote(url, timeout_s=300.0))
        began = time.monotonic()
        with pytest.raises(Interrupted, match="stopped after cycle 2, saved"):
            tether.ppo(config)
        assert time.monotonic() - began < 60
        away.statuses.clear()
        assert same(tether.ppo(config), whole)


def test_a_signal_ends_the_waiting_for_a_server_before_the_run(policy, whole, tmp_path, capsys):
    server, away = RandomServer(), Scripted({"detail": "away"}, statuses=[503] * 1000)

    async def away_at_first(scope, receive, send):
        await (away if away.statuses else server)(scope, receive, send)
        if len(away.asked) == 2 and away.statuses:
            os.kill(os.getpid(), signal.SIGINT)

    with listening(away_at_first) as url:
        config = config_of(tmp_path / "run", policy, remote(url, timeout_s=120.0))
        (tmp_path / "c.yaml").write_text(to_yaml(config))
        began = time.monotonic()
        assert main(["ppo", str(tmp_path / "c.yaml")]) == 3
        assert time.monotonic() - began < 60
        assert "stopped before it went on; the same command continues" in capsys.readouterr().err
        assert Run.open(tmp_path / "run").status["state"] == "stopped"
        away.statuses.clear()
        assert same(tether.ppo(config), whole)


def test_after_another_config_of_a_run_that_came_to_nothing_no_old_answer_counts(policy, tmp_path):
    broken = Scripted(lambda body: [float(len(c)) for c in body["completions"]])

    async def breaks_in_cycle_1(scope, receive, send):
        await (broken if len(broken.asked) < 2 else Scripted({"scores": []}))(scope, receive, send)

    with listening(breaks_in_cycle_1) as url, pytest.raises(RewardError, match="returned 0 scores"):
        tether.ppo(config_of(tmp_path / "run", policy, remote(url)))
    assert (tmp_path / "run" / "rewards.db").exists()
    other = Scripted(lambda body: [-float(len(c)) for c in body["completions"]])
    with listening(other) as url:
        run = tether.ppo(config_of(tmp_path / "run", policy, remote(url)))
    assert len(other.asked) == 8  # probe, three evaluations, four cycles
    assert all(line["reward/score_mean"] <= 0 for line in run.metrics)


def test_a_dry_run_asks_the_server_and_names_a_wrong_key(policy, reward_model, tmp_path, capsys, monkeypatch):
    with serving(reward_model) as url:
        config = config_of(tmp_path / "run", policy, remote(f"{url}/score"))
        (tmp_path / "c.yaml").write_text(to_yaml(config))
        assert main(["ppo", str(tmp_path / "c.yaml"), "--dry-run"]) == 0
        assert f"reward rm: {url}/score, weight 1; it answers" in capsys.readouterr().out
        monkeypatch.setenv("REWARD_KEY", "some-other-key-entirely")
        assert main(["ppo", str(tmp_path / "c.yaml"), "--dry-run"]) == 2
        error = capsys.readouterr().err
        assert "HTTP 401" in error
        assert "some-other-key" not in error
        monkeypatch.delenv("REWARD_KEY")
        assert main(["ppo", str(tmp_path / "c.yaml")]) == 2
        assert "environment variable REWARD_KEY is not set" in capsys.readouterr().err


def test_a_signal_ends_the_waiting_in_an_evaluation_too_and_it_is_done_later(policy, whole, tmp_path):
    server, away = RandomServer(), Scripted({"detail": "away"}, statuses=[503] * 1000)

    async def away_in_the_second_evaluation(scope, receive, send):
        if len(server.asked) < 4 or not away.statuses:
            await server(scope, receive, send)
            return
        await away(scope, receive, send)
        if len(away.asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with listening(away_in_the_second_evaluation) as url:
        config = config_of(tmp_path / "run", policy, remote(url, timeout_s=30.0))
        with pytest.raises(Interrupted, match="stopped after cycle 2, saved"):
            tether.ppo(config)
        away.statuses.clear()
        assert same(tether.ppo(config), whole)


@pytest.mark.parametrize("evaluation", [2, 3])
def test_an_evaluation_that_a_server_refused_is_done_when_the_run_goes_on(policy, whole, tmp_path, evaluation):
    server, refusing = RandomServer(), Scripted({"detail": "closed"}, statuses=[400])
    last = {2: 4, 3: 7}[evaluation]  # requests before it: probe, evaluation, cycles 1 and 2, evaluation, cycles 3 and 4

    async def refuses_once(scope, receive, send):
        await (refusing if len(server.asked) == last and refusing.statuses else server)(scope, receive, send)

    with listening(refuses_once) as url:
        config = config_of(tmp_path / "run", policy, remote(url))
        with pytest.raises(RewardError, match="closed"):
            tether.ppo(config)
        run = tether.ppo(config)
    assert same(run, whole)
    assert (run.best["cycle"], run.best["score"]) == (whole.best["cycle"], whole.best["score"])
    cards = [(r.path / "best" / "README.md").read_text() for r in (run, whole)]
    assert cards[0].count("|") == cards[1].count("|")  # no cycle twice in its tables
