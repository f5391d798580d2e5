"""What examples/ holds works: every config loads, and the ones small enough are run."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import tether
from tether.config import check

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda p: str(p.relative_to(EXAMPLES)))
def test_the_config_is_valid(path):
    tether.load_config(path)


@pytest.mark.parametrize(("name", "gpus"), [("one_node", 8), ("four_nodes", 32), ("ray_pool", 8)])
def test_the_configs_for_a_cluster_give_every_gpu_rows_of_every_step(name, gpus):
    config = tether.load_config(EXAMPLES / "cluster" / f"{name}.yaml")
    check(config)
    for rows in (config.ppo.batch, config.ppo.minibatch, config.evaluate.count):
        assert rows % gpus == 0


def test_the_script_for_slurm_starts_a_command_that_torchrun_understands():
    script = EXAMPLES / "cluster" / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    command = text.partition("srun torchrun ")[2].replace("\\\n", " ").replace('"$SLURM_JOB_NUM_NODES"', "4")
    args = get_args_parser().parse_args(shlex.split(command.replace("-m tether", "--module tether")))
    assert (args.nnodes, args.nproc_per_node, args.max_restarts, args.training_script) == ("4", "8", 3, "tether")
    assert (EXAMPLES.parent / re.search(r"examples/cluster/\w+\.yaml", text)[0]).exists()


def test_the_example_for_a_gpu_dry_runs_up_to_the_model_that_is_not_here(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tether.cli", "ppo", "gpu_qwen_0.5b.yaml", "--dry-run", "--device", "cpu"],
        cwd=EXAMPLES, env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("tether: error: Qwen/Qwen2.5-0.5B-Instruct: its tokenizer cannot be loaded")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_stories_example_trains_from_the_command_line_and_what_it_sampled_is_replayed(stories260k, tmp_path):
    pytest.importorskip("vaderSentiment")
    flags = ["--model.policy", str(stories260k), "--run", str(tmp_path / "run"), "--ppo.cycles", "2"]
    flags += ["--ppo.batch", "16", "--ppo.minibatch", "8", "--ppo.epochs", "1"]
    flags += ["--evaluate.count", "4", "--evaluate.samples", "1", "--evaluate.every", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "tether.cli", "ppo", "ppo.yaml", *flags],
        cwd=EXAMPLES / "stories", env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = tether.Run(tmp_path / "run")
    assert [m["cycle"] for m in run.metrics] == [1, 2]
    assert (run.final / "model.safetensors").exists()

    flags = ["--model.policy", str(stories260k), "--run", str(tmp_path / "replay"), "--data.path", str(run.path)]
    done = subprocess.run(
        [sys.executable, "-m", "tether.cli", "qlearning", "replay.yaml", *flags, "--qlearning.batch", "8"],
        cwd=EXAMPLES / "qlearning", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    replay = tether.Run(tmp_path / "replay")
    assert [m["step"] for m in replay.metrics] == list(range(1, 9))  # two epochs of 32 answers
    assert len(replay.rollouts(8)) == 32
    assert (replay.final / "critic" / "value_head.safetensors").exists()

    flags = ["--model.policy", str(stories260k), "--run", str(tmp_path / "ilql"), "--data.path", str(run.path)]
    done = subprocess.run(
        [sys.executable, "-m", "tether.cli", "qlearning", "ilql.yaml", *flags, "--qlearning.batch", "8"],
        cwd=EXAMPLES / "qlearning", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ilql" / "final" / "ilql" / "heads.safetensors").exists()


@pytest.mark.slow
def test_the_polite_example_learns_from_the_command_line(stories260k, shared, tmp_path):
    flags = ["--model.policy", str(stories260k), "--run", str(tmp_path / "run"), "--data.limit", "240"]
    flags += ["--data.path", str(shared / "data" / "preferences" / "polite_style.jsonl.gz")]
    done = subprocess.run(
        [sys.executable, "-m", "tether.cli", "dpo", "dpo/polite.yaml", *flags],
        cwd=EXAMPLES, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Held-out accuracy" in done.stdout
    run = tether.Run(tmp_path / "run")
    assert run.metrics[0]["dpo/loss"] == pytest.approx(0.6931, abs=1e-4)
    assert (run.final / "model.safetensors").exists()


@pytest.mark.slow
def test_rounds_of_dpo_go_on_from_each_other_against_the_reference_of_the_start(stories260k, tmp_path):
    pytest.importorskip("vaderSentiment")
    done = subprocess.run(
        [sys.executable, "rounds/rounds.py", str(stories260k), "--to", str(tmp_path), "--prompts", "8",
         "--rounds", "2"],
        cwd=EXAMPLES, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"in the end: {tmp_path}/round-2/final scores" in done.stdout
    second = tether.Run(tmp_path / "round-2").config
    assert second.model.policy == str(tmp_path / "round-1" / "final")
    assert second.model.reference == str(stories260k)


@pytest.mark.slow
def test_the_loop_runs_from_samples_through_people_and_ppo_to_the_compare_page(stories260k, tmp_path):
    pytest.importorskip("vaderSentiment")
    done = subprocess.run(
        [sys.executable, "loop/loop.py", str(stories260k), "--to", str(tmp_path), "--prompts", "12", "--rounds", "2",
         "--cycles", "2"],
        cwd=EXAMPLES, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    labels = re.search(r"(\d+) of \1 labels \(100%\) on 24 items", done.stdout)
    assert labels
    assert f"{int(labels[1]) * 6} pairs by 2 annotators" in done.stderr  # four answers in order are 6 pairs
    assert "nothing found" in done.stdout
    assert done.stdout.count("on the left") == 2
    assert "They say the same of" in done.stdout


@pytest.mark.slow
def test_ai_feedback_runs_from_an_experts_verdicts_to_two_clerks(tmp_path):
    sizes = {"texts": 2, "verdicts": 500, "epochs": 1, "pairs": 60, "served": 8, "cycles": 2}
    flags = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    done = subprocess.run(
        [sys.executable, "ai_feedback/ai_feedback.py", "--to", str(tmp_path), *flags],
        cwd=EXAMPLES, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"[1-8] pairs labeled by judge:served", done.stdout)  # over HTTP
    result = json.loads((tmp_path / "result.json").read_text())
    assert {"judge:clerk", "people"} <= set(result["right"])
    assert set(result["start"]) == {"helpful", "harmless", "honest", "score", "better"}
    assert tether.Run(tmp_path / "reward-judge").config.data.labels.annotators == ["judge:clerk"]


def test_the_random_walks_are_those_of_the_benchmark(monkeypatch):
    # means of the data as trlX's own code gives them; the soft optimum, over uniform walks, from the graph alone
    monkeypatch.syspath_prepend(EXAMPLES / "random_walks")
    import walks

    for seed, mean in ((1000, 0.3515), (1002, 0.7902)):
        _, drawn = walks.world(seed)
        assert sum(walks.score_walk(walk, seed) for walk in drawn) / len(drawn) == pytest.approx(mean, abs=1e-4)
    edges, _ = walks.world()
    total = 0.0
    for start in range(1, 21):
        at, scores = {start: 1.0}, {}
        for nodes in range(2, 11):
            following: dict[int, float] = {}
            for node, chance in at.items():
                neighbors = [n for n in range(21) if edges[node, n]]
                for n in neighbors:
                    following[n] = following.get(n, 0.0) + chance / len(neighbors)
            scores[nodes] = following.pop(0, 0.0)
            at = following
        best = walks.shortest()[start]
        weighted = [((10 - n) / (10 - best), p) for n, p in scores.items()] + [(0.0, sum(at.values()))]
        share = [p * math.exp(score / 0.1) for score, p in weighted]
        total += sum(s * score for s, (score, _) in zip(share, weighted, strict=True)) / sum(share)
    assert total / 20 == pytest.approx(0.97487, abs=1e-5)
    assert walks.optimality(["b"], [[walks.NAMES.index("c")]]) == [0.0]  # it never arrives


def test_unseen_steps_break_off_from_logged_walks_and_leave_the_graph(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "random_walks")
    import walks

    edges, logged = walks.world()
    rows = walks.unseen(logged)
    assert len(rows) == len(logged)
    for walk, row in zip(logged, rows, strict=True):
        assert row[:-1] == walk[: len(row) - 1]
        assert not edges[row[-2], row[-1]]
        assert walks.score_walk(row) == 0.0
    assert len({tuple(row[-2:]) for row in rows}) > 250  # of the 369 pairs of nodes without an edge between them


@pytest.mark.slow
def test_every_route_of_the_random_walks_trains_from_the_command_line(tmp_path):
    here = tmp_path / "random_walks"
    shutil.copytree(EXAMPLES / "random_walks", here, ignore=shutil.ignore_patterns("*.jsonl", "tokenizer", "runs"))

    def call(*words):
        done = subprocess.run([sys.executable, *words], cwd=here, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    call("walks.py")
    call("-m", "tether.cli", "sft", "sft.yaml", "--sft.epochs", "1")
    for route in ("ppo", "group"):
        call("-m", "tether.cli", "ppo", f"{route}.yaml", "--ppo.cycles", "1", "--ppo.epochs", "1")
        (metrics,) = tether.Run(here / "runs" / route).metrics
        assert 0 < metrics["reward/score_mean"] < 1
    # 1000 walks, 100 at once; bellman's unseen steps are as many again
    for route, steps, beside in (("bellman", 20, "critic"), ("ilql", 10, "ilql")):
        call("-m", "tether.cli", "qlearning", f"{route}.yaml", "--qlearning.epochs", "1")
        run = tether.Run(here / "runs" / route)
        assert len(run.metrics) == steps
        assert (run.final / beside).is_dir()


@pytest.mark.slow
def test_a_judge_is_trained_on_verdicts_and_rewards_stories(stories260k, tmp_path):
    pytest.importorskip("vaderSentiment")
    here = tmp_path / "generative_reward"
    shutil.copytree(EXAMPLES / "stories", tmp_path / "stories")
    shutil.copytree(EXAMPLES / "generative_reward", here, ignore=shutil.ignore_patterns("*.jsonl", "runs"))

    def call(*words):
        done = subprocess.run([sys.executable, *words], cwd=here, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    tether_ = ("-m", "tether.cli")
    policy = ("--model.policy", str(stories260k))
    call(*tether_, "generate", str(stories260k), "--prompts", "../stories/prompts.jsonl", "--best-of", "3", "--pairs",
         "--reward", "../stories/sentiment.py:sentiment", "--max-new-tokens", "16", "--to", "pairs.jsonl")  # fmt: skip
    said = call("verdicts.py", "pairs.jsonl", "--to", "verdicts.jsonl")
    assert re.fullmatch(r"verdicts.jsonl: \d+ verdicts on \d+ pairs\n", said)
    rows = [json.loads(line) for line in (here / "verdicts.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in rows[:4]] == ["A", "B", "A", "B"]
    call(*tether_, "sft", "sft.yaml", *policy, "--data.limit", "96", "--sft.batch", "4", "--sft.epochs", "2",
         "--optim.lr", "3e-4")  # fmt: skip
    call(*tether_, "judge", "judge.yaml", "--data.limit", "5", "--device", "cpu")  # it names letters
    call(*tether_, "ppo", "ppo.yaml", *policy, "--ppo.cycles", "1", "--ppo.batch", "8", "--ppo.minibatch", "8",
         "--ppo.responses_per_prompt", "4", "--evaluate.every", "1", "--evaluate.count", "2", "--evaluate.samples", "2",
         "--sampling.max_new_tokens", "16")  # fmt: skip
    run = tether.Run(here / "runs" / "happier")
    (metrics,) = run.metrics
    assert metrics["reward/judge_mean"] == pytest.approx(0, abs=1e-9)
    assert metrics["reward/score_std"] > 0
    assert -1 <= metrics["eval/gold/sentiment_mean"] <= 1
