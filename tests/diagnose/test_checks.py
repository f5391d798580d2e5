"""--dry-run and doctor: what they say of runs that are right, and that they raise what the run would."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import tether
from tether.cli import main
from tether.config import (
    DataConfig,
    DPOConfig,
    DPOSection,
    EvaluateConfig,
    HeldOutConfig,
    ILQLSection,
    InitModelConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    PPOSection,
    PromptsConfig,
    QLearningConfig,
    QLearningSection,
    ReferencedModelConfig,
    RewardConfig,
    RewardModelSection,
    RewardSourceConfig,
    SamplingConfig,
    ScoredConfig,
    SFTConfig,
    SFTModelConfig,
    SFTSection,
)
from tether.config.reading import to_yaml
from tether.diagnose import Memory, Part, doctor, dry_run
from tether.diagnose.checks import idle, verdict
from tether.runs import RunDirectory
from tether.samplers.local import LocalSampler
from tether.train.ppo import input_hashes
from tiny_ppo import id_score, tiny_config

EXAMPLES = Path(__file__).parents[2] / "examples"


def lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def ppo(tiny_model, tmp_path) -> PPOConfig:
    (tmp_path / "rewards.py").write_text("def terse(prompts, completions, completion_ids, mood):\n    return []\n")
    prompts = [{"prompt": f"Hi {i}", "mood": "good"} for i in range(10)] + [{"prompt": "x" * 70, "mood": "long"}]
    return PPOConfig(
        run=str(tmp_path / "run"),
        model=ModelConfig(str(tiny_model("llama"))),
        prompts=PromptsConfig(lines(tmp_path / "prompts.jsonl", prompts), max_tokens=64, overlong="drop"),
        reward=[RewardSourceConfig(function=f"{tmp_path / 'rewards.py'}:terse")],
        ppo=PPOSection(cycles=5, batch=8, minibatch=4, epochs=3),
        sampling=SamplingConfig(max_new_tokens=12),
        evaluate=HeldOutConfig(count=2),
    )


def test_a_ppo_dry_run_says_everything_and_touches_nothing(ppo):
    text = dry_run(ppo)
    assert "10 prompts, 4 to 4 tokens" in text
    assert "1 of 11 rows dropped" in text
    assert "8 prompts to train on, 2 to evaluate on" in text
    assert "30 optimizer steps of 4" in text  # 5 cycles · 3 epochs · 8/4
    assert "stop tokens: 1 '<eos>'" in text
    assert "reward terse:" in text
    for part in ("Python and libraries", "peak", "fits: needs"):
        assert part in text
    for line in to_yaml(ppo).splitlines():
        assert f"  {line}" in text
    assert not Path(ppo.run).exists()


def test_the_rendered_prompt_is_masked_and_the_response_counts(ppo):
    text = dry_run(ppo)
    shown = text.partition("one row, token by token")[2].partition("plan")[0]
    assert [line.split()[0] for line in shown.splitlines()[2:] if line] == ["0", "0", "0", "0", "1"]
    assert "'H'" in shown
    assert "up to 12 sampled tokens, the last of them '<eos>'" in shown


def test_an_sft_dry_run_counts_what_is_trained_and_the_steps(tiny_model, tmp_path):
    rows = [{"prompt": "ab", "completion": "cd"} for _ in range(7)]
    config = SFTConfig(
        str(tmp_path / "run"), SFTModelConfig(str(tiny_model("llama"))),
        DataConfig(lines(tmp_path / "d.jsonl", rows), max_tokens=32), sft=SFTSection(epochs=2, batch=3),
    )  # fmt: skip
    text = dry_run(config)
    assert "7 examples, 5 to 5 tokens" in text  # two, two and the stop token
    assert "21 of 35 tokens are trained" in text
    assert "6 optimizer steps" in text  # ⌈7/3⌉ an epoch
    masked = [line.split()[0] for line in text.partition("row 0")[2].splitlines()[1:6]]
    assert masked == ["0", "0", "1", "1", "1"]


def test_a_reward_dry_run_splits_the_pairs_and_marks_where_the_score_is_read(tiny_model, tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(20)]
    config = RewardConfig(
        str(tmp_path / "run"), SFTModelConfig(str(tiny_model("llama"))),
        DataConfig(lines(tmp_path / "d.jsonl", rows), max_tokens=32),
        reward_model=RewardModelSection(batch=5, test_fraction=0.25),
    )  # fmt: skip
    text = dry_run(config)
    assert "15 pairs to train on, 5 held out" in text
    assert "3 optimizer steps" in text
    chosen = text.partition(", chosen")[2].partition(", rejected")[0]
    assert [line.split()[0] for line in chosen.splitlines()[1:] if "'" in line][-2:] == ["0", "1"]


def test_a_q_learning_dry_run_tells_answers_prompts_and_scores(tiny_model, tmp_path):
    rows = [{"prompt": f"q{i % 3}", "completion": "yes"[: i % 4], "score": i} for i in range(10)]
    config = QLearningConfig(
        str(tmp_path / "run"), ModelConfig(str(tiny_model("llama"))),
        ScoredConfig(lines(tmp_path / "d.jsonl", rows), max_tokens=32), qlearning=QLearningSection(epochs=2, batch=4),
    )  # fmt: skip
    text = dry_run(config)
    assert "10 answers to 3 prompts, 3 to 6 tokens" in text  # two, up to three, and the stop token
    assert "scores 0 to 9, mean 4.5" in text
    assert "6 optimizer steps" in text  # ⌈10/4⌉ an epoch
    masked = [line.split()[0] for line in text.partition("the first answer, score 0")[2].splitlines()[1:4]]
    assert masked == ["0", "0", "1"]
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(tether.DataError, match="no column 'score'"):
        dry_run(config)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"cql": 0.0}, True), ({"cql": 0.0, "top_k": 0}, True), ({"cql": 0.0, "top_k": 1}, False), ({}, False)],
)
def test_a_dry_run_says_where_a_token_may_be_chosen_for_an_unlearned_q(tiny_model, tmp_path, settings, said):
    rows = [{"prompt": "It is", "completion": " new", "score": s} for s in (0, 1)]
    config = QLearningConfig(
        str(tmp_path / "run"), ModelConfig(str(tiny_model("llama"))), ScoredConfig(lines(tmp_path / "d.jsonl", rows)),
        qlearning=QLearningSection(loss="ilql", ilql=ILQLSection(**settings)),
    )  # fmt: skip
    assert ("never holds is whatever the heads began with" in dry_run(config)) is said


def test_a_q_learning_dry_run_tells_the_stop_tokens_of_the_runs_that_it_reads(tiny_model, tmp_path):
    model = tiny_model()
    cycles = {"ppo": {"cycles": 1, "batch": 8, "minibatch": 8}, "evaluate": {"every": 0}}
    sampled = tether.ppo(tiny_config(tmp_path / "ppo", model, **cycles), reward=id_score)
    rows = sampled.rollouts(1).to_pylist()
    ended = min(row["token_id"][-1] for row in rows if row["finish_reason"] == "stop")
    text = dry_run(QLearningConfig(str(tmp_path / "run"), ModelConfig(str(model)), ScoredConfig(str(sampled.path))))
    assert "stop tokens: 1 '<eos>'" in text
    assert f"stop tokens of the runs that are read, besides: {ended} " in text


def test_what_the_run_would_refuse_the_dry_run_refuses(ppo, tmp_path):
    with pytest.raises(tether.ConfigError, match="does not divide"):
        dry_run(replace(ppo, ppo=replace(ppo.ppo, minibatch=3)))
    with pytest.raises(tether.DataError, match="has 70 tokens"):
        dry_run(replace(ppo, prompts=replace(ppo.prompts, overlong="error")))
    with pytest.raises(tether.ModelError, match="nowhere"):
        dry_run(replace(ppo, model=ModelConfig(str(tmp_path / "nowhere"))))
    with pytest.raises(tether.RewardError):
        dry_run(replace(ppo, reward=[RewardSourceConfig(function=f"{tmp_path / 'rewards.py'}:missing")]))
    (tmp_path / "other.py").write_text("def picky(prompts, completions, completion_ids, color):\n    return []\n")
    with pytest.raises(tether.RewardError, match="color"):
        dry_run(replace(ppo, reward=[RewardSourceConfig(function=f"{tmp_path / 'other.py'}:picky")]))


def test_doctor_describes_the_machine_and_with_a_config_whether_it_fits(ppo):
    alone = doctor()
    for word in ("processor", "memory", "GPU", "disk", "torch", "cores usable", "bfloat16"):
        assert word in alone
    assert "\nplan" not in alone
    text = doctor(ppo)
    assert text.startswith("machine")
    assert "fits: needs" in text
    assert "8 prompts to train on" in text


def test_doctor_tells_of_several_processes_what_each_takes(ppo, tmp_path, capsys):
    path = tmp_path / "ppo.yaml"
    path.write_text(to_yaml(ppo))
    assert main(["doctor", str(path), "--ranks", "3", "--distributed.shard", "full", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "memory on cpu of each of 3 processes, distributed.shard=full, predicted" in text
    assert "3 processes on one machine need" in text
    assert "with distributed.shard=replicate" in text
    for argv in (["--ranks", "0"], ["--ranks", "two"]):
        assert main(["doctor", str(path), *argv]) == 2
    assert main(["doctor", "--ranks", "2"]) == 2


def test_a_step_with_fewer_rows_than_processes_is_told(ppo):
    assert idle(ppo, 4) == ""  # a minibatch of 4
    assert "ppo.minibatch=4 on 6 processes: in every step 2 of them have no row" in idle(ppo, 6)


def test_doctor_wants_a_run_that_trains():
    with pytest.raises(tether.ConfigError, match="runs that train"):
        doctor(EvaluateConfig(["a"], PromptsConfig("p")))


@pytest.mark.parametrize(
    ("part", "knob"),
    [
        ("activations", "microbatch_tokens"),
        ("key-value cache", "sampling.slots"),
        ("optimizer", "model.lora"),
        ("weights", "smaller model"),
    ],
)
def test_what_does_not_fit_names_the_knob_of_the_largest_part(part, knob):
    memory = Memory("cpu", [Part("Python and libraries", 10), Part(part, 1000)])
    assert verdict(memory, 2000).startswith("fits")
    assert verdict(memory, 500).startswith("does not fit")
    assert knob in verdict(memory, 500)


def test_the_command_line_reaches_both(ppo, tmp_path, capsys):
    path = tmp_path / "ppo.yaml"
    path.write_text(to_yaml(ppo))
    assert main(["ppo", str(path), "--dry-run"]) == 0
    assert "30 optimizer steps" in capsys.readouterr().out
    assert main(["doctor", str(path)]) == 0
    assert "fits: needs" in capsys.readouterr().out


def test_the_example_for_a_gpu_is_a_valid_config():
    config = tether.load_config(EXAMPLES / "gpu_qwen_0.5b.yaml")
    assert isinstance(config, PPOConfig)
    assert config.model.policy == "Qwen/Qwen2.5-0.5B-Instruct"


def test_a_dry_run_refuses_a_directory_that_the_run_could_not_use_and_makes_none(ppo, tmp_path):
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        with pytest.raises(tether.RunError, match="file is a file, and a run needs a directory"):
            dry_run(replace(ppo, run=str(tmp_path / name)))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    with pytest.raises(tether.RunError, match=r"not empty and not a run directory \(it holds thesis.tex"):
        dry_run(replace(ppo, run=str(tmp_path / "thesis")))


def begun(ppo: PPOConfig) -> Path:
    """A run that was stopped after its first cycle."""
    run = RunDirectory.open(ppo, command="ppo", inputs=input_hashes(ppo))
    run.append_metrics({"cycle": 1})
    run.__exit__(tether.Interrupted, tether.Interrupted("by SIGTERM"), None)
    return run.path


def test_a_dry_run_goes_by_the_resume_rules_of_the_run_and_leaves_it_alone(ppo, tmp_path):
    path = begun(ppo)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    dry_run(ppo)
    with pytest.raises(tether.RunError, match=r"ppo\.epochs was 3 when the run"):
        dry_run(replace(ppo, ppo=replace(ppo.ppo, epochs=2)))
    dry_run(replace(ppo, ppo=replace(ppo.ppo, epochs=2)), fresh=True)
    with Path(ppo.prompts.path).open("a") as file:
        file.write('{"prompt": "one more", "mood": "new"}\n')
    with pytest.raises(tether.RunError, match=r"prompts\.path has other content than when the run"):
        dry_run(ppo)
    dry_run(ppo, fresh=True)
    assert before == {file.name: file.read_bytes() for file in path.iterdir()}
    (path / "status.json").write_text('{"schema": 1, "kind": "sft", "state": "stopped"}')
    with pytest.raises(tether.RunError, match="holds a run of `tether sft`, but this is `tether ppo`"):
        dry_run(ppo)
    (path / "status.json").write_text('{"schema": 7, "kind": "ppo", "state": "stopped"}')
    with pytest.raises(tether.RunError, match="has schema 7"):
        dry_run(ppo)


@pytest.fixture
def evaluation(ppo) -> EvaluateConfig:
    return EvaluateConfig(
        [ppo.model.policy], ppo.prompts, ppo.reward, run=f"{ppo.run}-evaluation", samples=3, sampling=ppo.sampling
    )


def test_a_dry_evaluation_checks_everything_samples_nothing_and_makes_no_file(evaluation, tmp_path, monkeypatch):
    monkeypatch.setattr(LocalSampler, "generate", lambda *args, **kwargs: pytest.fail("sampled"))
    (tmp_path / "c.yaml").write_text(to_yaml(evaluation))
    assert main(["evaluate", str(tmp_path / "c.yaml"), "--dry-run"]) == 0
    text = dry_run(evaluation)
    assert "10 prompts, 3 responses to each, 1 models: 30 responses" in text
    assert "reward terse:" in text
    assert not Path(evaluation.run).exists()
    assert main(["evaluate", str(tmp_path / "c.yaml"), "--dry-run", "--reward", "[{function: 'none.py:f'}]"]) == 2
    assert main(["evaluate", str(tmp_path / "c.yaml"), "--dry-run", "--run", str(tmp_path / "c.yaml" / "x")]) == 2


def test_a_dry_run_calls_no_function_without_the_arguments_that_it_needs(evaluation):
    overlong = RewardSourceConfig("tether.rewards.overlong:overlong", arguments={"longest": 12, "buffer": 4})
    assert "reward overlong:" in dry_run(replace(evaluation, reward=[overlong]))
    with pytest.raises(tether.RewardError, match="reward function overlong needs 'buffer'"):
        dry_run(replace(evaluation, reward=[replace(overlong, arguments={"longest": 12})]))


def test_a_fresh_evaluation_moves_the_old_one_aside(evaluation, tmp_path):
    (tmp_path / "fine.py").write_text("def f(completions):\n    return [1.0] * len(completions)\n")
    config = replace(evaluation, reward=[RewardSourceConfig(function=f"{tmp_path / 'fine.py'}:f")])
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert main(["evaluate", str(tmp_path / "c.yaml")]) == 0
    old = (Path(config.run) / "evaluation.json").read_text()
    assert main(["evaluate", str(tmp_path / "c.yaml"), "--fresh", "--samples", "1"]) == 0
    assert Path(f"{config.run}.old-1", "evaluation.json").read_text() == old
    assert (Path(config.run) / "evaluation.json").read_text() != old


def test_a_dry_run_refuses_the_finished_run_that_could_not_write_its_model_again(ppo):
    path = begun(ppo)
    status = path / "status.json"
    status.write_text(status.read_text().replace("stopped", "finished"))
    with pytest.raises(tether.RunError, match="every checkpoint is gone"):
        dry_run(ppo)


def from_scratch(init, tokenizer, tmp_path, text="abc") -> SFTConfig:
    data = DataConfig(lines(tmp_path / "d.jsonl", [{"text": text}] * 5), max_tokens=200)
    return SFTConfig(str(tmp_path / "run"), SFTModelConfig(InitModelConfig(init, str(tokenizer))), data)


@pytest.mark.parametrize(
    "init",
    [{"model_type": "lama"}, {}, {"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}],
    ids=["unknown", "none", "heads that do not divide"],
)
def test_a_model_from_scratch_that_cannot_be_built_is_refused_by_the_dry_run_too(init, tiny_model, tmp_path):
    with pytest.raises(tether.ConfigError, match=r"model\.policy\.init"):
        dry_run(from_scratch(init, tiny_model(), tmp_path))


def test_a_model_from_scratch_has_the_context_of_the_config_that_is_built(tiny_model, tmp_path):
    init = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 32}  # its own name for it
    assert "context: 32 tokens" in dry_run(from_scratch(init, tiny_model(), tmp_path))
    with pytest.raises(tether.DataError, match="the model's context of 32"):
        dry_run(from_scratch(init, tiny_model(), tmp_path, text="x" * 40))


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_a_warm_up_as_long_as_the_run_is_refused_by_every_trainer_and_its_dry_run(kind, tiny_model, tmp_path):
    rows = [{"prompt": f"q{i}", "completion": "yes", "chosen": "yes", "rejected": "no"} for i in range(20)]
    parts = str(tmp_path / "run"), SFTModelConfig(str(tiny_model())), DataConfig(lines(tmp_path / "d.jsonl", rows))
    optim = OptimConfig(warmup=4)
    if kind == "sft":
        config, train = SFTConfig(*parts, sft=SFTSection(batch=5), optim=optim), tether.sft
    elif kind == "dpo":
        run, _, data = parts
        section, model = DPOSection(batch=4, test_fraction=0.2), ReferencedModelConfig(parts[1].policy)
        config, train = DPOConfig(run, model, data, dpo=section, optim=optim), tether.dpo
    else:
        section = RewardModelSection(batch=4, test_fraction=0.2)
        config, train = RewardConfig(*parts, reward_model=section, optim=optim), tether.reward_model
    for command in (dry_run, train):
        with pytest.raises(tether.ConfigError, match=r"optim\.warmup=4 is not below the run's 4 optimizer steps"):
            command(config)
