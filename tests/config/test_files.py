"""YAML files, right and wrong: what cannot be read is named with its file and line, before anything is loaded."""

import os

import pytest

from tether.config import EvaluateConfig, PPOConfig, RewardConfig, SFTConfig
from tether.config.reading import load_config
from tether.errors import ConfigError

HEAD = "run: r\nmodel: {policy: m}\n"
PPO = HEAD + "prompts: {path: p}\nreward: [{function: f.py:f}]\n"


def load(tmp_path, text, kind=None):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, kind)


@pytest.mark.parametrize(
    ("text", "cls"),
    [
        (PPO + "ppo: {}", PPOConfig),
        (HEAD + "data: {path: d}\nsft: {}", SFTConfig),
        (HEAD + "data: {path: d}\nreward_model: {}", RewardConfig),
        ("models: [a, b]\nprompts: {path: p}\nreward: [{model: m}]", EvaluateConfig),
    ],
)
def test_the_kind_is_told_from_the_sections(tmp_path, text, cls):
    assert type(load(tmp_path, text)) is cls


def test_without_a_telling_section_the_kind_has_to_be_named(tmp_path):
    assert load(tmp_path, PPO, "ppo").run == "r"
    with pytest.raises(
        ConfigError,
        match=r"none of the sections sft, reward_model, ppo, dpo, qlearning, models, judge and revise.*Add the section",
    ):
        load(tmp_path, PPO)


def test_an_unknown_kind_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"kind='grpo' is not a kind of config"):
        load(tmp_path, PPO, "grpo")


def test_a_section_with_every_line_commented_out_is_its_defaults(tmp_path):
    assert load(tmp_path, PPO + "ppo:\n  # cycles: 3\n").ppo.cycles == 200


def test_a_run_directory_stands_for_its_config(tmp_path):
    (tmp_path / "config.yaml").write_text(PPO + "ppo: {cycles: 7}")
    assert load_config(tmp_path).ppo.cycles == 7


def test_reward_sources_may_be_left_to_python(tmp_path):
    assert load(tmp_path, HEAD + "prompts: {path: p}\nppo: {}").reward == []


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("2E3", 2000.0), ("1.e-3", 1e-3), (".5", 0.5), ("3", 3.0), ("1.0e-05", 1e-5), ("+1e+2", 100.0)],
)
def test_numbers_are_numbers_however_they_are_written(tmp_path, text, value):
    lr = load(tmp_path, PPO + f"optim: {{lr: {text}}}", "ppo").optim.lr
    assert lr == value
    assert type(lr) is float


@pytest.mark.parametrize("word", ["no", "on", "yes", "12:30:45", "2020-01-01", "2020-01-01T10:00"])
def test_words_that_only_yaml_1_1_takes_for_something_else_are_text(tmp_path, word):
    assert load(tmp_path, PPO.replace("run: r", f"run: {word}"), "ppo").run == word


def test_anchors_and_merges_work(tmp_path):
    text = HEAD + "prompts: &p {path: p}\nppo: {}\nreward:\n  - &one {function: f.py:f}\n  - {<<: *one, name: two}\n"
    assert [source.name for source in load(tmp_path, text).reward] == [None, "two"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: [a\nb: c", r"c\.yaml, line 2: not YAML"),
        ("run: r\n\tseed: 1", r"c\.yaml, line 2: not YAML: a tab indents here; use spaces"),
        ("run: r\nseed: 1\nrun: s", r"c\.yaml, line 3: not YAML: key run is given twice"),
        ("run: r\nppo:\n  kl: {coef: 1, coef: 2}", r"c\.yaml, line 3: not YAML: key coef is given twice"),
        ("? [a, b]\n: c", r"line 1: not YAML: a key must be a plain word"),
        ("run: r\n---\nrun: s", r"line 2: not YAML: "),
        ("run: !!python/object/apply:os.getcwd []", r"line 1: not YAML: could not determine a constructor"),
        ("run: 'r", r"line 1: not YAML: found unexpected end of stream"),
        ("run: *nobody", r"line 1: not YAML: found undefined alias"),
        ("run: a: b", r"line 1: not YAML: mapping values are not allowed here"),
        (b"run: r\nseed: \xff\xfe", r"c\.yaml, line 2: not UTF-8.*Save the file as UTF-8"),
        ("run: r\nseed: \x00", r"line 2: not YAML: character #x0000"),
        ("", r"c\.yaml is empty"),
        ("# only a comment\n", r"c\.yaml is empty"),
        ("- run\n- seed", r"line 1: the file holds \['run', 'seed'\], not keys"),
        ("just words", r"line 1: the file holds 'just words', not keys"),
        ("[" * 5000, r"c\.yaml is not a config"),
        ("seed: 1" + "0" * 5000, r"c\.yaml is not a config"),
    ],
)
def test_a_file_that_is_no_config_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, text, "ppo")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ['"\\ud800"', "[" * 300 + "]" * 300])
def test_a_text_or_a_list_that_no_json_holds_is_one_message(tmp_path, text):
    with pytest.raises(ConfigError, match=r"^the config for tether ppo cannot be read") as caught:
        load(tmp_path, PPO.replace("{path: p}", f"{{path: p, chat_template_kwargs: {{x: {text}}}}}"), "ppo")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("word", ["0x1f", "010", "1_0.5", "1e5"])
def test_a_number_where_text_belongs_is_told_to_be_quoted(tmp_path, word):
    with pytest.raises(ConfigError, match=r"^run=.*: expected text\. Put it in quotes\."):
        load(tmp_path, PPO.replace("run: r", f"run: {word}"), "ppo")
    assert load(tmp_path, PPO.replace("run: r", f"run: '{word}'"), "ppo").run == word


def test_missing_files_and_directories_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist.*relative to"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match=r"is a directory, and not one of a run"):
        load_config(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_an_unreadable_file_is_named(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(PPO)
    path.chmod(0)
    with pytest.raises(ConfigError, match=r"c\.yaml cannot be read: Permission denied"):
        load_config(path)
