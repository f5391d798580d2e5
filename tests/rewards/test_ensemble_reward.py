"""An ensemble of reward models as one source: its members' own scores, lowered where they disagree."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import tether
from served import serve
from tether.cli import main
from tether.config import RewardShapingConfig, RewardSourceConfig
from tether.config.reading import to_yaml
from tether.data.tokenizer import load_tokenizer
from tether.diagnose import dry_run
from tether.errors import ConfigError, ModelError
from tether.models.reward_model import init_reward_model, load_reward_model, save_reward_model
from tether.rewards import build_reward
from tether.types import Completions, Prompt
from tiny_ppo import tiny_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def members(tiny_model, tiny_tokenizer, tmp_path_factory):
    """Three random reward models on one trunk, each with a normalization of its own."""
    folder, found = tmp_path_factory.mktemp("members"), []
    for seed in range(3):
        model = init_reward_model(
            str(tiny_model()), dtype=torch.float32, weights_dtype=torch.float32, device=CPU, seed=seed
        )
        model.mean, model.std = 0.1 * seed, 1.0 + seed
        save_reward_model(model, tiny_tokenizer, folder / f"member-{seed + 1}", stop_id=1)
        found.append(str(folder / f"member-{seed + 1}"))
    return found


def answers() -> Completions:
    prompts = [Prompt((5, 6), "ab", 0), Prompt((7,), "c", 1)]
    return Completions(prompts, [[8, 9, 1], [10]], [[0.0] * 3, [0.0]], [[0.0] * 3, [0.0]], ["stop", "length"])


def test_the_score_is_that_of_its_members_own_normalized_scores(members, tiny_tokenizer):
    rows = [[5, 6, 8, 9, 1], [7, 10]]
    each = torch.stack([load_reward_model(m, dtype=torch.float32, device=CPU).score(rows) for m in members]).double()
    for pessimism, want in (
        (0.0, each.mean(0)),
        (2.0, -(-4.0 * each).exp().mean(0).log() / 4.0),
    ):
        source = RewardSourceConfig(models=members, pessimism=pessimism, weight=3.0)
        scored = build_reward([source], RewardShapingConfig(), tiny_tokenizer, (1,), CPU).score(answers())
        assert_close(scored.scores, 3 * want)
        assert_close(torch.tensor(scored.parts["ensemble"], dtype=torch.float64), want)
        spread = torch.tensor(scored.disagreement["ensemble"], dtype=torch.float64)
        assert_close(spread, (each - each.mean(0)).square().mean(0).sqrt())


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (RewardSourceConfig(models=["a"]), "reward[0].models has 1 of the 2 or more that an ensemble needs"),
        (RewardSourceConfig(models=[]), "reward[0].models has 0 of the 2 or more"),
        (RewardSourceConfig(models=["x/a", "b", "x/../x/a/"]), "reward[0].models holds x/../x/a/ twice"),
        (RewardSourceConfig(models=["a", "b"], pessimism=-1.0), "reward[0].pessimism=-1.0 is below 0"),
        (RewardSourceConfig(model="a", pessimism=1.0), "reward[0].pessimism=1 without models"),
        (RewardSourceConfig(model="a", models=["b", "c"]), "has model and models"),
    ],
)
def test_a_mistake_in_the_config_is_named_before_anything_is_loaded(source, said, tmp_path, tiny_model):
    config = replace(tiny_config(tmp_path / "run", tiny_model()), reward=[source])
    with pytest.raises(ConfigError) as error:
        tether.ppo(config)
    assert said in str(error.value)
    assert not (tmp_path / "run").exists()


def test_members_that_read_a_text_differently_are_refused_without_weights(members, tiny_model, tmp_path):
    other = load_tokenizer(members[0])
    other.chat_template = "{{ messages[0].content }}"
    model = load_reward_model(members[1], dtype=torch.float32, device=CPU)
    save_reward_model(model, other, tmp_path / "other", stop_id=1)
    (tmp_path / "other" / "model.safetensors").write_bytes(b"")
    config = tiny_config(tmp_path / "run", tiny_model())
    config = replace(config, reward=[RewardSourceConfig(models=[members[0], str(tmp_path / "other")])])
    with pytest.raises(ModelError, match="has another tokenizer or chat template than"):
        dry_run(config)


@pytest.fixture(scope="module")
def run(members, tiny_model, tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("ppo") / "run", tiny_model(), checkpoint={"every": 1})
    return tether.ppo(replace(config, reward=[RewardSourceConfig(models=members, name="three")]))


def test_disagreement_is_a_metric_a_column_and_a_curve(run):
    rows = run.rollouts(4).to_pylist()
    mean = sum(row["disagreement/three"] for row in rows) / len(rows)
    assert run.metrics[-1]["reward/three_disagreement"] == pytest.approx(mean)
    assert mean > 0
    held_out = [row["disagreement/three"] for row in run.evaluations(4).to_pylist()]
    assert run.metrics[-1]["eval/reward/three_disagreement"] == pytest.approx(sum(held_out) / len(held_out))
    assert "Disagreement: three" in tether.report(run).read_text(encoding="utf-8")


def test_a_run_continues_only_on_the_members_that_it_began_with(run, members, tmp_path, capsys):
    (run.path / "status.json").write_text(json.dumps(run.status | {"state": "stopped"}))
    moved = replace(run.config, reward=[replace(run.config.reward[0], models=members[:2])])
    (tmp_path / "c.yaml").write_text(to_yaml(moved))
    assert main(["ppo", str(tmp_path / "c.yaml")]) == 2
    assert "reward[0].models" in capsys.readouterr().err


def test_the_studio_colors_responses_by_disagreement_and_shows_the_most_disputed_first(run):
    for served in serve(run.path.parent, run.path.parent / "labels.db"):
        client = served.client()
        name = re.search(r'<a href="/runs/(\w+)">run</a>', client.get("/runs").text)[1]
        page = client.get(f"/runs/{name}/rollouts/4?sort=disagreement").text
    shown = [int(level) for level in re.findall(r'<td class="n s-(\d)">', page)]
    assert len(shown) == 8
    assert shown == sorted(shown, reverse=True)
    assert shown[0] == 8


def test_the_directory_of_a_whole_ensemble_is_no_reward_model_and_its_members_are_named(members, tiny_model, tmp_path):
    for k, member in enumerate(members, 1):
        shutil.copytree(member, tmp_path / "rm" / "final" / f"member-{k}")
    for place in (tmp_path / "rm", tmp_path / "rm" / "final"):
        config = replace(tiny_config(tmp_path / "run", tiny_model()), reward=[RewardSourceConfig(model=str(place))])
        with pytest.raises(ModelError, match=r"list its members as `models: \[.*final/member-1, …\]`"):
            tether.ppo(config)
