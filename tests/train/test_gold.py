"""Gold: it is asked on held-out prompts alone, decides what is best, and ends a run that it says got worse."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import tether
from resume import steady
from tether.cli import main
from tether.config import HeldOutConfig, RewardSourceConfig
from tether.config.reading import to_yaml
from tether.diagnose import dry_run, examine
from tether.errors import ConfigError, RewardError
from tether.reports.held_out import Evaluation, best_of, fit_law
from tether.reports.page import _gold_figure, _held_out_figures
from tether.train import ppo as ppo_module
from tether.train.gold import best_and_below
from tiny_ppo import PROMPTS, tiny_config

SOURCES = """
calls = []

def proxy(completion_ids):
    return [sum(ids) / len(ids) / 100 for ids in completion_ids]

def gold(completion_ids):
    calls.append(len(completion_ids))
    return [-s for s in proxy(completion_ids)]
"""
EVERY = {"every": 1, "count": 6, "samples": 4}


def config_of(folder, tiny_model, **evaluate):
    file = folder / "sources.py"
    file.write_text(SOURCES)
    prompts = [f"{i} {prompt}" for prompt in PROMPTS for i in range(2)]  # six may be held out
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    gold = [RewardSourceConfig(function=f"{file}:gold", name="people")]
    config = tiny_config(
        folder / "run", tiny_model(), ppo={"cycles": 12, "batch": 16, "responses_per_prompt": 2, "minibatch": 8},
        optim={"lr": 1e-2, "schedule": "constant"},
    )  # fmt: skip
    return replace(
        config, reward=[RewardSourceConfig(function=f"{file}:proxy")],
        evaluate=HeldOutConfig(**EVERY | {"gold": gold} | evaluate),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """The proxy is what gold is not: as one rises, the other falls, and two evaluations after its best the run ends."""
    return tether.ppo(config_of(tmp_path_factory.mktemp("gold"), tiny_model, stop_when_gold_falls=2))


def test_a_dry_run_gives_gold_no_weight(tiny_model, tmp_path):
    told = dry_run(config_of(tmp_path, tiny_model))
    assert f"reward proxy: {tmp_path}/sources.py:proxy, weight 1\n" in told
    assert f"gold people: {tmp_path}/sources.py:gold\n" in told


def test_the_run_ends_whole_when_gold_has_fallen(run, capsys):
    last = run.metrics[-1]["cycle"]
    assert 2 <= last < 12
    assert run.status["state"] == "finished"
    (event,) = [e for e in run.events if e["event"] == "gold_fell"]
    assert event["cycle"] == last
    assert f"This is the policy of the last cycle, {last}." in (run.final / "README.md").read_text()
    assert f" {last} of 12 cycles of 16 responses" in (run.final / "README.md").read_text()
    assert (run.path / "checkpoints" / f"cycle-{last:06d}").is_dir()
    (run.path / "c.yaml").write_text(to_yaml(run.config))
    assert main(["ppo", str(run.path / "c.yaml")]) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert run.metrics[-1]["cycle"] == last
    assert event["best"] == 0
    told = f"ended at cycle {last}, as gold has fallen since cycle 0: the model that it began from was better"
    assert told in examine(run)


def test_gold_is_a_metric_and_a_column_of_evaluations_and_best_goes_by_it(run):
    assert run.evaluations(0).to_pylist()[0]["gold/people"] == pytest.approx(-run.evaluations(0)["score"][0].as_py())
    assert "gold/people" not in run.rollouts(1).column_names
    gold = {m["cycle"]: m["eval/gold/people_mean"] for m in run.metrics}
    score = {m["cycle"]: m["eval/score_mean"] for m in run.metrics}
    assert run.best["cycle"] == max(gold, key=gold.get) != max(score, key=score.get)
    assert run.best["gold"] == gold[run.best["cycle"]]


def test_what_is_trained_is_bit_for_bit_what_it_is_without_gold(run, tiny_model, tmp_path):
    plain = tether.ppo(replace(run.config, run=str(tmp_path / "plain"), evaluate=HeldOutConfig(**EVERY),
                               ppo=replace(run.config.ppo, cycles=run.metrics[-1]["cycle"])))  # fmt: skip
    without = [{k: v for k, v in line.items() if "gold" not in k} for line in steady(run)]
    assert steady(plain) == without
    same_weights(plain, run)


def test_a_run_that_broke_off_between_evaluation_and_checkpoint_ends_as_the_whole_one(run, tmp_path, monkeypatch):
    config = replace(run.config, run=str(tmp_path / "again"))
    real, last = ppo_module.keep_best, run.metrics[-1]["cycle"]

    def breaks(directory, config, cycle, metrics, write_model):
        if cycle == last:
            raise RuntimeError("the power failed")
        real(directory, config, cycle, metrics, write_model)

    monkeypatch.setattr(ppo_module, "keep_best", breaks)
    with pytest.raises(RuntimeError):
        tether.ppo(config)
    monkeypatch.undo()
    again = tether.ppo(config)
    assert steady(again) == steady(run)
    same_weights(again, run)
    assert again.best == run.best


def test_an_evaluation_whose_gold_failed_is_made_up_for_when_the_run_goes_on(run, tmp_path, monkeypatch):
    """A service was down for a while: the run has every evaluation all the same, and ends where the whole one did."""
    config, real, calls = replace(run.config, run=str(tmp_path / "again")), ppo_module.Record.evaluation, []

    def fails(*args):
        calls.append(args)
        if len(calls) == 3:  # before the first cycle, of the first, of the second
            raise RewardError("gold does not answer")
        return real(*args)

    monkeypatch.setattr(ppo_module.Record, "evaluation", fails)
    with pytest.raises(RewardError):
        tether.ppo(config)
    assert tether.Run.open(tmp_path / "again").evaluation_cycles == [0, 1]
    again = tether.ppo(config)
    assert again.evaluation_cycles == run.evaluation_cycles
    assert steady(again) == steady(run)
    same_weights(again, run)
    assert again.best == run.best
    assert (again.path / "best" / "README.md").read_text().replace("again", "run") == (
        run.path / "best" / "README.md"
    ).read_text()


def same_weights(a, b):
    x, y = load_file(a.final / "model.safetensors"), load_file(b.final / "model.safetensors")
    assert x
    assert all(torch.equal(x[name], y[name]) for name in x.keys() | y.keys())


def by_prompt(**gold):
    return {int(cycle[1:]): dict(enumerate(values)) for cycle, values in gold.items()}


def test_an_evaluation_is_below_the_best_where_every_drawing_of_prompts_says_so():
    # Prompts differ by tens, and each loses a little: paired, that is no noise.
    assert best_and_below(by_prompt(c0=[0, 10, 20, 30], c1=[1, 11, 21, 31], c2=[0.9, 10.8, 20.9, 30.9])) == (1, 1)
    # One prompt gains as much as the others lose: the mean is lower, and nothing is known.
    assert best_and_below(by_prompt(c0=[0, 10, 20, 30], c1=[1, 11, 21, 31], c2=[0, 10, 20, 33.9])) == (1, 0)


def test_evaluations_below_the_best_are_counted_back_from_the_last_one():
    down, level = [0.0, 10.0, 20.0], [1.0, 11.0, 21.0]
    assert best_and_below(by_prompt(c0=level, c1=down, c2=down, c3=down)) == (0, 3)
    assert best_and_below(by_prompt(c0=level, c1=down, c2=[1.0, 11.0, 20.9], c3=down)) == (0, 1)
    assert best_and_below(by_prompt(c0=down, c1=down, c2=level)) == (2, 0)
    assert best_and_below({}) == (0, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"every": 0}, "evaluate.gold is given with evaluate.every=0"),
        ({"gold": [], "stop_when_gold_falls": 2}, "evaluate.stop_when_gold_falls=2 without evaluate.gold"),
        ({"stop_when_gold_falls": 0}, "evaluate.stop_when_gold_falls=0 is below 1"),
        ({"stop_when_gold_falls": 2, "count": 5}, "evaluate.stop_when_gold_falls=2 with 5 held-out prompts"),
        ({"gold": [RewardSourceConfig(function="FILE:proxy")]}, "evaluate.gold[0] is what reward[0] scores by"),
        ({"gold": [RewardSourceConfig(function="FILE:gold", weight=2.0)]}, "evaluate.gold[0].weight is set"),
        ({"gold": [RewardSourceConfig(function="FILE:gold")] * 2}, "evaluate.gold[1] is called 'gold' like one before"),
        ({"gold": [RewardSourceConfig()]}, "evaluate.gold[0] needs exactly one of function, model, models"),
    ],
)
def test_a_mistake_in_the_config_is_named(change, said, tiny_model, tmp_path):
    if "gold" in change:  # the same file, written in another way
        file = f"{tmp_path}/../{tmp_path.name}/sources.py"
        change = {**change, "gold": [replace(g, function=g.function and g.function.replace("FILE", file))
                                     for g in change["gold"]]}  # fmt: skip
    with pytest.raises(ConfigError) as error:
        tether.ppo(config_of(tmp_path, tiny_model, **change))
    assert said in str(error.value)


def test_a_member_of_the_ensemble_that_is_trained_on_is_no_gold(tiny_model, tmp_path):
    config = config_of(tmp_path, tiny_model, gold=[RewardSourceConfig(model="models/b/")])
    config = replace(config, reward=[RewardSourceConfig(models=["models/a", "models/b"])])
    with pytest.raises(ConfigError, match=r"evaluate.gold\[0\] is what reward\[0\] scores by"):
        tether.ppo(config)


def test_a_gold_function_may_not_change_while_a_run_goes_on(run, tmp_path, capsys):
    source = tmp_path.parent / "x"
    (run.path / "status.json").write_text(json.dumps(run.status | {"state": "stopped"}))
    other = replace(run.config.evaluate, gold=[replace(run.config.evaluate.gold[0], arguments={"x": 1})])
    source.write_text(to_yaml(replace(run.config, evaluate=other)))
    assert main(["ppo", str(source)]) == 2
    assert "its curves would mix two experiments" in capsys.readouterr().err


def test_the_report_draws_score_and_gold_over_distance_with_the_law(run, tmp_path):
    evaluations = [Evaluation.read(run, cycle) for cycle in run.evaluation_cycles]
    figure = next(f for f in _held_out_figures(run, evaluations) if f.title == "Score and gold over distance")
    score, gold, chosen = figure.plot["data"][:3]
    assert gold["y"] == pytest.approx([-s for s in score["y"]])  # as the two sources are
    assert gold["x"][1:] == pytest.approx([max(0.0, m["eval/kl_ref_mean"]) ** 0.5 for m in run.metrics])
    # Chosen by the proxy, gold of the best of n falls with n as far as the proxy's rises.
    assert chosen["y"] == pytest.approx([-score for _, _, score in best_of(evaluations[0])])
    assert "gold (people)" in figure.says
    assert "Score and gold over distance" in tether.report(run).read_text(encoding="utf-8")


def test_the_figure_tells_gaos_law_of_a_run_and_of_best_of_n():
    def at(cycle, distance, gold):
        row = {"score": distance, "kl": distance**2, "gold/people": gold}
        return Evaluation(cycle, {0: [row, row], 1: [row]})

    rows = [{"score": float(k), "kl": 0.0, "gold/people": float(k % 5)} for k in range(16)]
    distances = [0.5, 1.0, 1.5, 2.0, 3.0]
    run = [
        Evaluation(0, {0: rows}),
        *(at(c, d, 1.875 + d * (2 - 0.7 * math.log(d))) for c, d in enumerate(distances, 1)),
    ]
    figure = _gold_figure(run)  # 1.875: gold of the start model, the mean over its rows
    assert "this run, d(α − β·log d): α 2, β 0.7, R² 1." in figure.says
    assert "best of n, d(α − β·d): α" in figure.says
    assert [len(trace["x"]) for trace in figure.plot["data"]] == [6, 6, 5, 60, 60]


def test_a_law_is_fitted_to_four_points_or_more_and_drawn_from_the_start():
    distance = [0.0, 0.5, 1.0, 2.0, 3.0]
    gold = [0.1 + d * (2 - 0.5 * d) for d in distance]
    law = fit_law(distance, gold, 0.1, rl=False)
    assert (law.alpha, law.beta, law.r_squared) == pytest.approx((2, 0.5, 1))
    assert (law.distance[0], law.gold[0], law.distance[-1], law.gold[-1]) == pytest.approx((0, 0.1, 3, 1.6))
    assert fit_law(distance, gold, 0.1, rl=True).r_squared < 1
    assert fit_law(distance[:4], gold[:4], 0.1, rl=False) is None
