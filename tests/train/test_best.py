"""best/: the best evaluated policy is there for whoever is sent to it, whatever becomes of the checkpoints."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tether
from tether.cli import main
from tether.diagnose.alarms import alarms
from tether.train import ppo as ppo_module
from tiny_ppo import id_score, tiny_config


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory) -> tether.Run:
    """Six evaluations, the second of them the best by far; of the checkpoints only the last two are left."""
    scores = iter([1.0, 1.0, 9.0, 2.0, 3.0, 4.0, 5.0])
    trained = {}

    with pytest.MonkeyPatch.context() as patch:
        real, build, policies = ppo_module.keep_best, ppo_module.build_policy, []
        next(scores)  # of the start, which is never kept

        def kept(*args, **kwargs):
            built = build(*args, **kwargs)
            policies.append(built[0])
            return built

        def keep_best(run, config, cycle, metrics, write_model):
            metrics["eval/score_mean"] = next(scores)
            if cycle == 2:
                trained.update({k: v.clone() for k, v in policies[0].model.hf_model.state_dict().items()})
            real(run, config, cycle, metrics, write_model)

        patch.setattr(ppo_module, "build_policy", kept)
        patch.setattr(ppo_module, "keep_best", keep_best)
        folder = tmp_path_factory.mktemp("best")
        config = tiny_config(
            folder / "run", tiny_model(), ppo={"cycles": 6}, evaluate={"every": 1, "count": 3, "samples": 1},
            checkpoint={"every": 1, "keep": 2},
        )  # fmt: skip
        done = tether.ppo(config, reward=id_score)
    torch.save(trained, folder / "cycle-2.pt")
    return done


def test_it_holds_the_policy_of_its_cycle_after_the_checkpoint_of_that_cycle_is_gone(run):
    assert not (run.path / "checkpoints" / "cycle-000002").exists()
    assert run.best == {"cycle": 2, "score": 9.0}
    want = torch.load(run.path.parent / "cycle-2.pt", weights_only=True)
    got = load_file(run.path / "best" / "model.safetensors")
    assert got
    assert all(torch.equal(got[name], want[name]) for name in got)
    last = load_file(run.final / "model.safetensors")
    assert any(not torch.equal(got[name], last[name]) for name in got)


def test_card_report_and_alarm_send_nobody_where_nothing_is(run):
    card = (run.final / "README.md").read_text()
    assert "Best on the held-out prompts: cycle 2 (score 9), kept in the run's `best/`" in card
    assert (
        "This is the policy of cycle 2, the best on held-out prompts." in (run.path / "best" / "README.md").read_text()
    )
    assert "The best policy, of cycle 2, is kept in best/." in tether.report(run).read_text(encoding="utf-8")
    falling = [{"cycle": c, "reward/score_mean": s, "reward/score_std": 0.1} for c, s in enumerate(there_and_back(), 1)]
    for events, said in ((run.events, "best/ holds the policy of cycle 2"), ([], "with evaluate.every above 0")):
        found = alarms("ppo", run.config, falling, events, run.status, now=None, reward_report=None)
        remedy = next(alarm.remedy for alarm in found if alarm.rule == "score-falling")
        assert said in remedy
        assert "checkpoint" not in remedy


def there_and_back() -> list[float]:
    return [min(c, 200 - c) / 100 for c in range(200)]


def test_export_copies_it_when_asked(run, tmp_path, capsys):
    assert main(["export", str(run.path), "--best", "--to", str(tmp_path / "copy")]) == 0
    got, want = (load_file(path / "model.safetensors") for path in (tmp_path / "copy", run.path / "best"))
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert not Path(tmp_path / "copy" / "critic").exists()


def test_a_run_that_was_never_evaluated_has_none_and_export_says_so(tiny_model, tmp_path, capsys):
    config = tiny_config(tmp_path / "run", tiny_model(), ppo={"cycles": 1}, evaluate={"every": 0})
    run = tether.ppo(config, reward=id_score)
    assert run.best is None
    assert main(["export", str(run.path), "--best", "--to", str(tmp_path / "copy")]) == 2
    assert "has no best/ model" in capsys.readouterr().err
