"""The whole story, told small: every step on a model too small to learn much, but with the real trainers."""

import json
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tether.demo import main, story
from tether.demo.judge import Verdict
from tether.demo.recipe import ARCHITECTURE, ppo_config, reward_config, sft_config
from tether.demo.show import repeats, win_rate
from tether.errors import RunError


@pytest.fixture
def small(monkeypatch):
    """A few steps of everything: texts enough for one optimiser step or two."""
    monkeypatch.setattr(story, "TEXTS_PER_PROMPT", 1)
    monkeypatch.setattr(story, "ANSWERS_PER_PROMPT", 2)
    monkeypatch.setattr(story, "SAMPLES", 1)

    def small_sft(to, seed):
        config = sft_config(to, seed)
        init = ARCHITECTURE | {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        policy = replace(config.model.policy, init=init | {"num_key_value_heads": 2})
        config = replace(config, model=replace(config.model, policy=policy), optim=replace(config.optim, warmup=0))
        return replace(config, sft=replace(config.sft, epochs=1, batch=100))

    def small_reward(to, seed):
        config = reward_config(to, seed)
        section = replace(config.reward_model, epochs=1, batch=100)
        return replace(config, reward_model=section, optim=replace(config.optim, warmup=0))

    def small_ppo(to, seed):
        config = ppo_config(to, seed)
        section = replace(config.ppo, cycles=2, batch=8, minibatch=4, epochs=1)
        optim = replace(config.optim, warmup=0)
        return replace(config, ppo=section, optim=optim, evaluate=replace(config.evaluate, every=1, samples=1))

    monkeypatch.setattr(story, "sft_config", small_sft)
    monkeypatch.setattr(story, "reward_config", small_reward)
    monkeypatch.setattr(story, "ppo_config", small_ppo)


@pytest.mark.slow
def test_the_story_is_told_to_its_end_and_told_again_at_no_cost(small, tmp_path, capsys):
    main(tmp_path, seed=0)
    told = capsys.readouterr().out
    for words in ("noise ceiling", "KL spent", "hidden judge", "before:", "after:", "helpful"):
        assert words in told

    final = tmp_path / "ppo" / "final"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    ids = tokenizer("Visitor: Where is the bakery?\nClerk:", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=5, min_new_tokens=1).shape[1] > ids["input_ids"].shape[1]

    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert pairs
    assert all(set(row) == {"prompt", "chosen", "rejected", "annotator", "group"} for row in pairs)
    assert all(row["chosen"] != row["rejected"] for row in pairs)

    weights, result = (final / "model.safetensors").stat(), (tmp_path / "result.json").read_text()
    main(tmp_path, seed=0)
    assert "finished" in capsys.readouterr().out
    assert (final / "model.safetensors").stat().st_mtime_ns == weights.st_mtime_ns
    assert (tmp_path / "result.json").read_text() == result


def test_another_town_does_not_move_into_the_same_directory(tmp_path):
    story.Story(tmp_path, 0)
    with pytest.raises(RunError, match="story of seed 0, not of seed 1"):
        story.Story(tmp_path, 1)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    def half():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        story.once(tmp_path / "rows.jsonl", half)
    assert story.once(tmp_path / "rows.jsonl", lambda: [{"a": 1}]) == [{"a": 1}]
    assert story.once(tmp_path / "rows.jsonl", half) == [{"a": 1}]


def test_a_win_is_a_higher_mean_and_a_tie_half_a_win():
    good, bad = Verdict(1, 1, 1, {}), Verdict(0, 1, 1, {})
    before = [[bad, bad], [good, bad], [good, good], [good, good]]
    after = [[good, bad], [bad, good], [bad, bad], [bad, good]]
    assert win_rate(before, after) == (1 + 0.5 + 0 + 0) / 4


def test_a_file_where_the_story_should_go_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file cannot be made a directory \(File exists\).*--to"):
        main(tmp_path / "file", seed=0)


def test_an_answer_repeats_itself_when_it_says_a_sentence_twice():
    answers = [["Happy to help! Happy to help!", "Happy to help! Have a good evening!"], ["Ask. Tell. Ask.", ""]]
    assert repeats(answers) == 0.5


def test_vllm_serves_the_heads_of_the_demos_model():
    served = {32, 64, 80, 96, 112, 128, 160, 192, 224, 256}  # get_supported_head_sizes of its CPU backend
    assert ARCHITECTURE["hidden_size"] // ARCHITECTURE["num_attention_heads"] in served
