"""Sampling from models and comparing them; log-probs and greedy answers are checked against plain transformers."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import tether
from tether.cli import main
from tether.config import EvaluateConfig, PromptsConfig, SamplingConfig
from tether.errors import ConfigError, DataError, ModelError
from tether.reports.text import visible
from tether.runs import EvaluationDir
from tether.train.evaluate import _summed_logprobs
from tether.types import Rows

PROMPTS = ["Hello", "The sun", "A dog and"]


@pytest.fixture(scope="module")
def models(tiny_model) -> tuple[Path, Path]:
    return tiny_model("llama"), tiny_model("llama", seed=1)


@pytest.fixture
def prompts(tmp_path) -> PromptsConfig:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    return PromptsConfig(str(path))


def config(models, prompts, **changes) -> EvaluateConfig:
    return EvaluateConfig(
        [str(m) for m in models], prompts, **{"samples": 2, "sampling": SamplingConfig(max_new_tokens=6), **changes}
    )


def length(prompts, completions, completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


# ---------------------------------------------------------------- generate


def test_the_likeliest_token_alone_is_what_transformers_decodes_greedily(models, tiny_tokenizer):
    theirs = AutoModelForCausalLM.from_pretrained(models[0]).eval()
    for answer in tether.generate(models[0], PROMPTS, top_k=1, max_new_tokens=10):
        ids = tiny_tokenizer(answer.prompt, return_tensors="pt").input_ids
        want = theirs.generate(ids, do_sample=False, max_new_tokens=10)[0, ids.shape[1] :].tolist()
        assert answer.token_ids == want


def test_responses_stand_in_the_order_of_prompts_and_repeat_with_the_seed(models):
    first = tether.generate(models[0], PROMPTS, samples=2, seed=3)
    assert [g.prompt for g in first] == [p for p in PROMPTS for _ in range(2)]
    assert first == tether.generate(models[0], PROMPTS, samples=2, seed=3)
    other = tether.generate(models[0], PROMPTS, samples=2, seed=4)
    assert [g.token_ids for g in first] != [g.token_ids for g in other]


def test_a_response_does_not_depend_on_the_prompts_after_it(models):
    alone, together = (tether.generate(models[0], PROMPTS[:n], seed=5) for n in (1, 3))
    assert alone[0] == together[0]


def test_a_stop_token_ends_a_response_and_is_in_its_ids_but_not_in_its_text(models, tiny_tokenizer):
    every = list(range(2, len(tiny_tokenizer)))  # all but <pad> and <eos>
    (one,) = tether.generate(models[0], ["Hi"], stop_token_ids=every, seed=2)
    assert (len(one.token_ids), one.completion, one.finish_reason) == (1, "", "stop")
    (cut,) = tether.generate(models[0], ["Hi"], stop_token_ids=[], max_new_tokens=5)
    assert (len(cut.token_ids), cut.finish_reason) == (5, "length")


def test_chat_messages_go_through_the_template(models, tiny_tokenizer):
    chat = [{"role": "user", "content": "Hi"}]
    (answer,) = tether.generate(models[0], [chat], top_k=1, max_new_tokens=4)
    (same,) = tether.generate(models[0], ["<user>Hi<assistant>"], top_k=1, max_new_tokens=4)
    assert answer.prompt == chat
    assert answer.token_ids == same.token_ids


@pytest.fixture
def opinionated(tiny_model) -> Path:
    """A model that asks to be sampled in its own way, and whose chat template writes a system prompt of its own."""
    path = tiny_model("llama", seed=2)
    lm = AutoModelForCausalLM.from_pretrained(path)
    lm.generation_config.update(do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.1)
    lm.generation_config.save_pretrained(path)
    (path / "chat_template.jinja").write_text(
        "{% if messages[0].role != 'system' %}<system>Be kind{% endif %}{% for m in messages %}<{{ m.role }}>"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return path


def test_a_generation_config_is_not_followed_and_what_differs_is_said(opinionated, models, capsys):
    tether.generate(opinionated, ["Hi"], max_new_tokens=2)
    assert capsys.readouterr().err == (
        f"{opinionated}: its generation_config asks for temperature 0.7, top_k 50, top_p 0.9, repetition_penalty 1.1 "
        "(which Tether does not have); sampling at temperature 1, top_k 0, top_p 1. Set those to sample as "
        "transformers would.\n"
    )
    tether.generate(opinionated, ["Hi"], temperature=0.7, top_k=50, top_p=0.9, max_new_tokens=2)
    assert "asks for repetition_penalty 1.1 (which" in capsys.readouterr().err
    tether.generate(models[0], ["Hi"], max_new_tokens=2)
    assert capsys.readouterr().err == ""


def test_evaluate_says_of_every_model_what_its_generation_config_asks_for(opinionated, models, prompts, capsys):
    tether.evaluate(config([models[0], opinionated], prompts), reward=length)
    assert capsys.readouterr().err.count("generation_config asks for temperature 0.7") == 1


def test_a_templates_own_system_prompt_is_what_transformers_makes_of_the_same_messages(opinionated):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(opinionated)
    chat = [{"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "<system>Be kind<user>Hi<assistant>"
    lm = AutoModelForCausalLM.from_pretrained(opinionated).eval()
    want = lm.generate(ids, do_sample=False, repetition_penalty=1.0, max_new_tokens=6)[0, ids.shape[1] :].tolist()
    (answer,) = tether.generate(opinionated, [chat], top_k=1, max_new_tokens=6)
    assert answer.token_ids == want


def test_nothing_asked_is_nothing_answered(models):
    assert tether.generate(models[0], []) == []


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        (["Hi"], {"temperature": 0.0}, ConfigError, "temperature=0.0 is not above 0"),
        (["Hi"], {"samples": 0}, ConfigError, "samples=0 is below 1"),
        (["Hi"], {"dtype": "fp16"}, ConfigError, "dtype='fp16' is not a precision"),
        (["Hi"], {"device": "abacus"}, ConfigError, "device='abacus' is not a device"),
        (["Hi"], {"stop_token_ids": [999]}, ConfigError, "stop_token_ids holds 999"),
        (["Hi", ""], {}, DataError, r"the prompts given, row 1 .*is empty"),
        (["x" * 200], {}, DataError, r"the prompts given, row 0 .*has 200 tokens.*the model's context of 128"),
    ],
)
def test_what_cannot_be_sampled_is_named(models, prompts, options, error, message):
    with pytest.raises(error, match=message):
        tether.generate(models[0], prompts, **options)


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match="nothing does not exist"):
        tether.generate(tmp_path / "nothing", ["Hi"])


def test_the_command_prints_what_the_function_answers_and_no_control_characters(models, capsys):
    assert main(["generate", str(models[0]), "--prompt", "A\x1b[31m", "--samples", "2", "--seed", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("── A␛[31m\n")
    assert not {c for c in printed if ord(c) < 32} - {"\n", "\t"}
    assert len(printed.split("──")) == 2


def completions_printed(capsys, *argv) -> str:
    assert main(["generate", *map(str, argv), "--top-k", "1", "--max-new-tokens", "4", "--device", "cpu"]) == 0
    return capsys.readouterr().out.partition("\n")[2]


def test_the_command_asks_a_chat_model_through_its_template_unless_told_not_to(models, tmp_path, capsys):
    (chat,) = tether.generate(models[0], [[{"role": "user", "content": "Hi"}]], top_k=1, max_new_tokens=4)
    (bare,) = tether.generate(models[0], ["Hi"], top_k=1, max_new_tokens=4)
    assert completions_printed(capsys, models[0], "--prompt", "Hi") == f"{visible(chat.completion)}\n\n"
    assert completions_printed(capsys, models[0], "--prompt", "Hi", "--raw") == f"{visible(bare.completion)}\n\n"
    file = tmp_path / "prompts.jsonl"  # of a data set text stays text, as in training
    file.write_text('{"prompt": "Hi"}\n')
    assert completions_printed(capsys, models[0], "--prompts", file) == f"{visible(bare.completion)}\n\n"


def test_the_command_shows_a_conversation_as_who_said_what(models, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]}))
    assert main(["generate", str(models[0]), "--prompts", str(file), "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().out.startswith("── system: S\n   user: U\n")


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        ([], {"device": "auto", "dtype": "auto", "stop_token_ids": None, "trust_remote_code": False}),
        (
            ["--device", "cpu", "--dtype", "float32", "--stop-token-ids", "[5, 7]", "--trust-remote-code"],
            {"device": "cpu", "dtype": "float32", "stop_token_ids": [5, 7], "trust_remote_code": True},
        ),
        (["--stop-token-ids", "[]"], {"stop_token_ids": []}),
        (["--stop-token-ids", "5"], {"stop_token_ids": [5]}),
    ],
)
def test_the_command_passes_device_precision_and_stop_tokens_on(models, monkeypatch, flags, want):
    passed = {}
    monkeypatch.setattr(tether, "generate", lambda *args, **options: passed.update(options) or [])
    assert main(["generate", str(models[0]), "--prompt", "Hi", "--raw", *flags]) == 0
    assert want.items() <= passed.items()


def test_stop_tokens_that_are_no_ids_are_named(models, capsys):
    assert main(["generate", str(models[0]), "--prompt", "Hi", "--stop-token-ids", "<eos>"]) == 2
    assert "'<eos>' is not a list of token ids. Write e.g. '[2, 32000]'" in capsys.readouterr().err


def test_a_text_is_no_list_of_prompts_or_of_models(models, prompts):
    with pytest.raises(DataError, match="every letter would be a prompt"):
        tether.generate(models[0], "Once upon")
    with pytest.raises(ConfigError, match="every letter would be a model"):
        tether.evaluate(EvaluateConfig(str(models[0]), prompts))


# ---------------------------------------------------------------- evaluate


def summed(model, tokenizer, prompt: str, ids: list[int], temperature: float) -> float:
    """Log-probability of a response, from transformers' own logits."""
    before = tokenizer(prompt).input_ids
    logits = model(torch.tensor([[*before, *ids]])).logits[0, len(before) - 1 : -1] / temperature
    return logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].sum().item()


@torch.no_grad()
def test_kl_is_the_log_ratio_of_the_models_own_samples(models, prompts, tiny_tokenizer):
    seen = []

    def record(prompts, completions, completion_ids, **columns):
        seen.append(list(zip(prompts, completion_ids, strict=True)))
        return [0.0] * len(prompts)

    sampling = SamplingConfig(max_new_tokens=6, temperature=0.7)
    found = tether.evaluate(config(models, prompts, sampling=sampling), reward=record)
    ours, base = (AutoModelForCausalLM.from_pretrained(m).eval() for m in (models[1], models[0]))
    ratios = [
        summed(ours, tiny_tokenizer, p, ids, 0.7) - summed(base, tiny_tokenizer, p, ids, 0.7) for p, ids in seen[1]
    ]
    assert found.results[1].kl.mean == pytest.approx(sum(ratios) / len(ratios), abs=1e-4)
    assert found.results[0].kl == (0.0, 0.0, 0.0)


class _OnMetal(torch.Tensor):
    """A tensor on a device that has no float64, as Apple's GPUs; `.cpu()` brings it home."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        found = super().__torch_function__(func, types, args, kwargs or {})
        if func is torch.Tensor.cpu:
            return found.as_subclass(torch.Tensor)
        if isinstance(found, torch.Tensor) and found.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return found


def test_log_probabilities_are_summed_in_double_precision_where_the_device_has_none():
    class Model:
        device = torch.device("cpu")

        def response_logprobs(self, rows, *, temperature, entropy):
            return torch.full((int(rows.response_lengths.sum()),), -0.1).as_subclass(_OnMetal), None, None

    rows = Rows.of([[1], [1, 2]], [[3, 4, 5], [6]])
    assert _summed_logprobs(Model(), rows, 1.0).tolist() == pytest.approx([-0.3, -0.1], rel=1e-6)


def test_a_win_is_a_higher_mean_over_a_prompts_samples_and_ties_count_half(models, prompts):
    given = iter([[0, 2, 1, 1, 5, 5], [3, 0, 1, 1, 5, 4]])  # means 1 1 5 against 1.5 1 4.5: win, tie, loss

    def scripted(prompts, completions, completion_ids, **columns):
        return [float(s) for s in next(given)]

    base, other = tether.evaluate(config(models, prompts), reward=scripted).results
    assert base.win_rate is None
    assert other.win_rate.mean == pytest.approx((1 + 0.5 + 0) / 3)
    assert (base.score.mean, other.score.mean) == (pytest.approx(7 / 3), pytest.approx(7 / 3))
    assert other.score.low < other.score.mean < other.score.high


def test_the_baseline_may_stand_anywhere_and_is_evaluated_once(models, prompts):
    start = str(models[0])
    last = tether.evaluate(config((models[1], models[0]), prompts, baseline=start), reward=length)
    outside = tether.evaluate(config((models[1],), prompts, baseline=start), reward=length)
    assert [r.model for r in last.results] == [start, str(models[1])]
    assert last == outside


def test_the_same_model_twice_draws_the_same_answers(models, tmp_path, prompts):
    copy = tmp_path / "copy"
    copy.symlink_to(models[0])
    base, same = tether.evaluate(config((models[0], copy), prompts), reward=length).results
    assert (same.score, same.kl.mean, same.win_rate.mean) == (base.score, 0.0, 0.5)


def test_another_vocabulary_has_no_kl_and_says_so(models, prompts, tmp_path):
    other = tmp_path / "other"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(models[1])
    tokenizer.add_tokens(["\U0001f600"])
    model = AutoModelForCausalLM.from_pretrained(models[1])
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    run = str(tmp_path / "out")
    found = tether.evaluate(config((models[0], other), prompts, run=run), reward=length)
    assert found.results[1].kl is None
    kl = [EvaluationDir(run).answers(i)["kl"].to_pylist() for i in (0, 1)]
    assert set(kl[1]) == {None}
    assert kl[0] == [0.0] * len(kl[0])  # of the baseline to itself
    assert "vocabulary is not the baseline's" in str(found)
    assert found.results[1].win_rate is not None


def test_prompts_too_long_for_one_model_are_left_out_for_all(tiny_model, models, tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ["short", "x" * 40, "also short"]))
    small = tiny_model("gpt2", n_positions=32)
    found = tether.evaluate(config((models[0], small), PromptsConfig(str(path), overlong="drop")), reward=length)
    assert found.prompts == 2
    assert "1 prompts are too long for one of the models" in capsys.readouterr().err


def test_the_table_and_the_file_say_the_same(models, prompts, tmp_path):
    found = tether.evaluate(config(models, prompts, run=str(tmp_path / "out")), reward=length)
    saved = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert saved["baseline"] == str(models[0])
    assert saved["config"]["samples"] == 2
    for result, row in zip(found.results, saved["results"], strict=True):
        assert tuple(row["score"]) == result.score
        assert f"{result.score.mean:.3f}" in str(found)


def test_best_of_n_is_what_choosing_among_the_baselines_answers_gives(models, prompts, tmp_path):
    found = tether.evaluate(config(models, prompts, samples=4, run=str(tmp_path / "out")), reward=length)
    rows = EvaluationDir(tmp_path / "out").answers(0).to_pylist()
    scores = [[row["score"] for row in rows[i : i + 4]] for i in range(0, len(rows), 4)]
    for best in found.best_of:  # every choice of n of the 4 answers to each prompt
        chosen = [max(choice) for row in scores for choice in itertools.combinations(row, best.n)]
        assert best.score.mean == pytest.approx(sum(chosen) / len(chosen))
        assert 0 <= best.kl.mean <= best.kl_bound + 1e-12
    assert [best.n for best in found.best_of] == [1, 2, 4]
    assert found.best_of[0].score == found.results[0].score
    (line,) = (line for line in str(found).splitlines() if line.startswith("best of 4, baseline"))
    assert line.split()[4] == f"{found.best_of[2].score.mean:.3f}"
    saved = json.loads((tmp_path / "out" / "evaluation.json").read_text())["best_of"]
    assert [tuple(row["score"]) for row in saved] == [best.score for best in found.best_of]


def test_the_sizes_of_best_of_n_can_be_chosen(models, prompts):
    found = tether.evaluate(config(models[:1], prompts, samples=5, best_of=[5, 3]), reward=length)
    assert [best.n for best in found.best_of] == [3, 5]
    found = tether.evaluate(config(models[:1], prompts, best_of=[]), reward=length)
    assert found.best_of == []
    assert "best of" not in str(found)


def test_the_answers_are_kept_beside_the_results_and_give_the_same_means(models, prompts, tmp_path):
    found = tether.evaluate(config(models, prompts, run=str(tmp_path / "out")), reward=length)
    there = EvaluationDir(tmp_path / "out")
    assert there.models == [str(m) for m in models]
    for index, result in enumerate(found.results):
        rows = there.answers(index).to_pylist()
        assert [row["prompt"] for row in rows] == [p for p in PROMPTS for _ in range(2)]
        assert [row["response_index"] for row in rows] == [0, 1] * len(PROMPTS)
        assert [row["score"] for row in rows] == [row["length"] for row in rows]
        assert sum(row["score"] for row in rows) / len(rows) == pytest.approx(result.score.mean)
        assert sum(row["kl"] for row in rows) / len(rows) == pytest.approx(result.kl.mean)
    tether.evaluate(config(models[:1], prompts, run=str(tmp_path / "out")), reward=length)  # again, of fewer
    assert there.models == [str(models[0])]
    with pytest.raises(tether.RunError, match=r"model-01.parquet does not exist"):
        there.answers(1)


@pytest.mark.parametrize("content", [None, "", "[]", '{"results": [3]}', '{"results": 3}', "{}"])
def test_a_damaged_evaluation_says_so(content, tmp_path):
    if content is not None:
        (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(tether.RunError, match=r"evaluation.json cannot be read .* Run tether evaluate again"):
        _ = EvaluationDir(tmp_path).models


def test_a_place_that_cannot_be_written_is_named(models, prompts, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(tether.RunError, match=r"run=.*file cannot be written .* the results would be in no file"):
        tether.evaluate(config(models[:1], prompts, run=str(tmp_path / "file")), reward=length)


def test_results_that_cannot_be_written_in_the_end_are_printed_at_least(models, prompts, tmp_path, capsys):
    (tmp_path / "answers").write_text("in the way")
    with pytest.raises(tether.RunError, match="the results above are in no file"):
        tether.evaluate(config(models[:1], prompts, run=str(tmp_path)), reward=length)
    assert "(baseline)" in capsys.readouterr().out


@pytest.mark.parametrize("truncation", [{"top_k": 5}, {"top_p": 0.9}])
def test_a_log_ratio_over_truncated_samples_is_not_passed_off_as_the_kl(models, prompts, truncation):
    exact = tether.evaluate(config(models, prompts), reward=length)
    assert exact.results[1].note is None
    sampling = SamplingConfig(max_new_tokens=6, **truncation)
    got = tether.evaluate(config(models, prompts, sampling=sampling), reward=length)
    assert "over truncated samples, which is not the KL" in got.results[1].note
    assert got.results[0].note is None
    assert str(got).count("over truncated samples") == 1
