"""Several reward models of one run: each sees other pairs, none sees a held-out one, and a broken-off run goes on."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import tether
from resume import steady
from tether.config import CheckpointConfig, LogConfig, OptimConfig, PairsConfig, RewardConfig, RewardModelSection
from tether.config.sections import SFTModelConfig
from tether.data.pairs import Pair
from tether.data.split import resample, split_pairs
from tether.diagnose import dry_run
from tether.models.reward_model import load_reward_model
from tether.train import reward as reward_module
from tether.train.reward import reward_model

FILES = [f"member-{k}/model.safetensors" for k in (1, 2, 3)]


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory) -> RewardConfig:
    """Forty pairs with twenty prompts: the better answer holds more of one letter. Three members of six steps each."""
    folder = tmp_path_factory.mktemp("members")
    rows = [
        {"prompt": f"p{i // 2}", "chosen": "a" * (2 + i % 3) + "b", "rejected": "b" * (1 + i % 4)} for i in range(40)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RewardConfig(
        run=str(folder / "run"), model=SFTModelConfig(str(tiny_model())), data=PairsConfig(str(folder / "pairs.jsonl")),
        reward_model=RewardModelSection(batch=6, test_fraction=0.1, members=3), optim=OptimConfig(lr=3e-3),
        checkpoint=CheckpointConfig(every=4), log=LogConfig(tensorboard=False), device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(config):
    return reward_model(config)


def test_one_run_holds_every_member_and_the_report_tells_each_and_their_mean(run, config):
    assert [line["step"] for line in run.metrics] == list(range(1, 19))
    assert not (run.path / "members").exists()
    report = json.loads((run.path / "reward_report.json").read_text())
    assert len(report["members"]) == 3
    assert report["test_pairs"] == 4
    # The mean of the members' raw scores on the held-out pairs, by hand.
    models = [load_reward_model(str(run.final / f"member-{k}"), dtype=torch.float32, device=torch.device("cpu"))
              for k in (1, 2, 3)]  # fmt: skip
    pairs = reward_module.load_pairs(config.data, reward_module.load_model(
        config.model, device=torch.device("cpu"), seed=0)[2], stop_id=1)  # fmt: skip
    _, test = split_pairs(pairs, 0.1, config.seed)
    margins = torch.stack([
        (m.score([p.prompt_ids + p.chosen_ids for p in test]) - m.score([p.prompt_ids + p.rejected_ids for p in test]))
        * m.std
        for m in models
    ])  # fmt: skip
    assert report["accuracy"]["value"] == pytest.approx(float((margins.mean(0) > 0).double().mean()))
    alone = [float((m > 0).double().mean()) for m in margins]
    assert [member["value"] for member in report["members"]] == pytest.approx(alone)
    assert "Members alone" in tether.report(run).read_text(encoding="utf-8")
    assert "mean of 3 reward models" in (run.final / "README.md").read_text()
    assert "for each of 3 reward models" in dry_run(replace(config, run=str(run.path.parent / "dry")))


def test_members_differ(run):
    weights = [load_file(run.final / name)["score.weight"] for name in FILES]
    assert not any(torch.equal(weights[i], weights[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("at", [9, 12, "save", "gather", "tidy"])
def test_a_run_that_breaks_off_ends_with_the_same_bits(run, config, tmp_path, monkeypatch, at):
    """In the midst of the second member, as it begins the third, before a member is written, before final/ is, and
    after, when the place where the members stood until then is half removed."""
    calls, real_rmtree = Counter(), shutil.rmtree

    def breaks(name, when):
        real = getattr(reward_module, name)

        def counted(*args, **kwargs):
            calls[name] += 1
            if calls[name] == when:
                raise RuntimeError("the power failed")
            return real(*args, **kwargs)

        monkeypatch.setattr(reward_module, name, counted)

    def removes_half(members, **_):
        (members / FILES[0]).unlink()
        raise RuntimeError("the power failed")

    if at == "tidy":
        monkeypatch.setattr(reward_module.shutil, "rmtree", lambda folder, **how: (
            removes_half(folder) if folder.name == "members" and folder.exists() else real_rmtree(folder, **how)
        ))  # fmt: skip
    breaks(*{"save": ("save", 2), "gather": ("gather_members", 1), "tidy": ("save", 0)}.get(at, ("accumulate", at)))
    config = replace(config, run=str(tmp_path / "run"))
    with pytest.raises(RuntimeError):
        reward_model(config)
    monkeypatch.undo()
    again = reward_model(config)
    assert not (again.path / "members").exists()
    assert steady(again) == steady(run)
    for name in FILES:
        a, b = load_file(run.final / name), load_file(again.final / name)
        assert all(torch.equal(a[key], b[key]) for key in a.keys() | b.keys())
    assert (again.path / "reward_report.json").read_text() == (run.path / "reward_report.json").read_text()


def test_a_member_that_is_lost_is_trained_again(run, config):
    good = load_file(run.final / FILES[0])
    (run.final / FILES[0]).unlink()  # the tensors above are still in the file: it must not be emptied under them
    again = reward_model(config)
    assert all(torch.equal(t, load_file(again.final / FILES[0])[name]) for name, t in good.items())


def test_pairs_are_drawn_by_whole_prompts_and_groups_with_replacement():
    pairs = [Pair([i // 3], [1], [2], i, f"p{i // 3}", group="g" if i >= 24 else None) for i in range(30)]
    drawn = resample(pairs, 0)
    assert len(drawn) == 30
    assert drawn == resample(pairs, 0) != resample(pairs, 1)
    counts = Counter(pair.row for pair in drawn)
    whole = [{counts[r] for r in range(first, first + 3)} for first in range(0, 24, 3)]
    cut = sum(len(found) > 1 for found in [*whole, {counts[r] for r in range(24, 30)}])
    assert cut <= 1  # the last that was drawn
    assert max(counts.values()) > 1
    assert len(counts) < 30
