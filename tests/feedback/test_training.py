"""`tether reward` reads the store directly, and a run keeps reading what it began with."""

from dataclasses import replace

import pytest

import tether
from labeled import pairs
from tether.config import (
    DataConfig,
    DPOConfig,
    DPOSection,
    LabelsConfig,
    LogConfig,
    OptimConfig,
    PairsConfig,
    ReferencedModelConfig,
    RewardConfig,
    RewardModelSection,
    SFTModelConfig,
)
from tether.config.reading import load_config, to_yaml
from tether.data.pairs import load_pairs
from tether.data.snapshot import pin_labels
from tether.data.table import read_rows
from tether.errors import ConfigError, DataError, RunError, StoreError
from tether.feedback.records import Answer, Item
from tether.feedback.store import Store


@pytest.fixture
def labeled(store, say):
    """Four labels by Ada, one tie and one skip by Bo, under guidelines 1; then two more by Cy under guidelines 2."""
    store.add_guidelines("one")
    store.add_items(pairs(20), overlap=0)
    for choice in "aabb":
        say("Ada", choice)
    say("Bo", "both_bad")
    say("Bo", "skip", reason="?")
    store.add_guidelines("two")
    say("Cy"), say("Cy")
    return store


def config(store, **labels) -> PairsConfig:
    return PairsConfig(str(store.path), labels=LabelsConfig(**labels))


def test_labels_are_pairs_and_what_is_left_out_is_counted(labeled, tiny_tokenizer, capsys):
    found = load_pairs(config(labeled), tiny_tokenizer, stop_id=1)
    assert len(found) == 7
    assert [pair.probability for pair in found] == [1, 1, 1, 1, 0.5, 1, 1]
    rows = labeled.preference_rows()
    assert [tiny_tokenizer.decode(p.chosen_ids[:-1]) for p in found] == [row["chosen"] for row in rows]
    assert capsys.readouterr().err == f"{labeled.path}: 7 pairs by 3 annotators, of them 1 ties; left out: 1 skips\n"
    assert read_rows(str(labeled.path), columns=["chosen"]) == rows
    assert len(load_pairs(PairsConfig(str(labeled.path), limit=2), tiny_tokenizer, stop_id=1)) == 2


def test_an_answer_that_was_cut_is_trained_on_without_a_stop_token(store, say, tiny_tokenizer):
    store.add_items([Item("q", (Answer("whole"), Answer("cut o", finish_reason="length")))])
    say("Ada", "a")
    (pair,) = load_pairs(config(store), tiny_tokenizer, stop_id=1)
    assert [tiny_tokenizer.decode(ids) for ids in (pair.chosen_ids, pair.rejected_ids)] == ["whole<eos>", "cut o"]


@pytest.mark.parametrize(
    ("labels", "count"),
    [({"annotators": ["Ada"]}, 4), ({"guideline": 2}, 2), ({"since": "2026-09-21"}, 7), ({"until": "2026-09-21"}, 7)],
)
def test_filters_of_the_config_pick_labels(labeled, tiny_tokenizer, labels, count):
    assert len(load_pairs(config(labeled, **labels), tiny_tokenizer, stop_id=1)) == count


def test_filters_that_leave_nothing_or_mean_nothing_are_said(labeled, tiny_tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"no label by which one answer is better than another under data.labels"):
        load_pairs(config(labeled, since="2030-01-01"), tiny_tokenizer, stop_id=1)
    with pytest.raises(StoreError, match="nobody named 'Dov'"):
        load_pairs(config(labeled, annotators=["Dov"]), tiny_tokenizer, stop_id=1)
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "p", "chosen": "x", "rejected": "y"}\n')
    with pytest.raises(ConfigError, match="is not a store of labels"):
        load_pairs(PairsConfig(str(file), labels=LabelsConfig(guideline=1)), tiny_tokenizer, stop_id=1)
    with pytest.raises(DataError, match="does not exist"):
        load_pairs(PairsConfig(str(tmp_path / "missing.db")), tiny_tokenizer, stop_id=1)


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [
        ({"annotators": []}, "data.labels.annotators is empty"),
        ({"since": "yesterday"}, "data.labels.since='yesterday'"),
        ({"until": "2026-13-01"}, "data.labels.until='2026-13-01'"),
        ({"guideline": 0}, "data.labels.guideline=0"),
    ],
)
def test_a_filter_that_cannot_be_meant_is_refused_before_anything_is_read(labels, complaint):
    from tether.config import check

    with pytest.raises(ConfigError, match=complaint):
        check(RewardConfig("r", SFTModelConfig("m"), PairsConfig("d", labels=LabelsConfig(**labels))))


def test_filters_survive_yaml_and_a_config_without_them_loads_back_equal(tmp_path):
    for data in (DataConfig("d"), PairsConfig("d", labels=LabelsConfig(["Ada"], "2026-10-01", None, 2))):
        written = RewardConfig("r", SFTModelConfig("m"), data)
        (tmp_path / "c.yaml").write_text(to_yaml(written))
        assert load_config(tmp_path / "c.yaml") == written


def test_what_a_run_read_stays_the_same_whatever_is_labeled_since(labeled, say, tiny_tokenizer):
    data = config(labeled)
    pinned = pin_labels(data, {})
    before = load_pairs(data, tiny_tokenizer, stop_id=1, pinned=pinned)
    say("Ada")
    labeled.undo("Cy", key="u")
    assert pin_labels(data, {"data.path": pinned}) == pinned
    assert load_pairs(data, tiny_tokenizer, stop_id=1, pinned=pinned) == before
    assert pin_labels(data, {}) != pinned
    assert pin_labels(PairsConfig("pairs.jsonl"), {}) is None


def test_a_run_goes_on_while_people_label_and_refuses_another_store(tmp_path, tiny_model, capsys):
    path = tmp_path / "preferences.db"
    fill(path, 24, "!", "?")
    config = RewardConfig(
        str(tmp_path / "run"),
        SFTModelConfig(str(tiny_model())),
        PairsConfig(str(path)),
        reward_model=RewardModelSection(batch=8, test_fraction=0.25),
        optim=OptimConfig(lr=1e-3),
        log=LogConfig(tensorboard=False),
    )
    run = tether.reward_model(config)
    assert "24 pairs by 1 annotators" in capsys.readouterr().err
    assert run.environment["inputs"]["data.path"].startswith("labels up to event 24, sha256:")
    fill(path, 30, "!", "?")
    tether.reward_model(config)
    assert "is finished: nothing to do" in capsys.readouterr().out
    with pytest.raises(RunError, match=r"data.labels.annotators was"):
        tether.reward_model(replace(config, data=PairsConfig(str(path), labels=LabelsConfig(["Ada"]))))
    path.unlink()
    fill(path, 30, "?", "!")
    with pytest.raises(RunError, match=r"data.path has other content"):
        tether.reward_model(config)


def test_dpo_reads_the_same_labels(tmp_path, tiny_model):
    path = tmp_path / "preferences.db"
    fill(path, 24, "!", "?")
    config = DPOConfig(
        str(tmp_path / "run"), ReferencedModelConfig(str(tiny_model())), PairsConfig(str(path)),
        dpo=DPOSection(batch=8, test_fraction=0.25), log=LogConfig(tensorboard=False),
    )  # fmt: skip
    run = tether.dpo(config)
    assert run.environment["inputs"]["data.path"].startswith("labels up to event 24, sha256:")
    fill(path, 30, "!", "?")
    assert tether.dpo(config).metrics == run.metrics
    with pytest.raises(RunError, match=r"data.labels.annotators was"):
        tether.dpo(replace(config, data=PairsConfig(str(path), labels=LabelsConfig(["Ada"]))))


def fill(path, count, better, worse):
    """Label up to `count` pairs in the store at `path`."""
    with Store(path, gold_fraction=0, repeat_fraction=0) as store:
        store.add_annotator("Ada")
        store.add_items([Item(f"{i}:", (Answer(better), Answer(worse))) for i in range(count)], overlap=0)
        while task := store.next_task("Ada"):
            store.record("Ada", task.item, key=str(task.item), choice="a")
