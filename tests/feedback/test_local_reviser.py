"""Revisions by a real model directory in this process: what transformers would write, and the same however it ends."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tether
from tether.cli import main
from tether.config import ReviseConfig, RevisedDataConfig, RevisedSamplingConfig, ReviseSection
from tether.errors import RunError
from tether.feedback.chains import Chain, NoChain, read_chains
from tether.feedback.reviser import LocalReviser

END = 426  # the full stop of stories260K, which seldom ends a text of its own
PROMPTS = ["Once upon a time", "The cat", "Tom had a big red", "One day, a girl", "It was"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.txt").write_text("Be kind.\nBe brief.\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    return tmp_path


def config(model, to="out.jsonl", *, limit=None, seed=0, rounds=1, temperature=1.0, most=60, stops=(END, 1)):
    return ReviseConfig(
        ReviseSection(str(model), constitution="rules.txt", rounds=rounds),
        RevisedDataConfig("p.jsonl", limit),
        to,
        RevisedSamplingConfig(temperature=temperature, max_new_tokens=most, stop_token_ids=list(stops)),
        seed=seed,
        device="cpu",
        dtype="float32",
    )


def rows(path="out.jsonl"):
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def test_each_step_is_what_transformers_writes_greedily_after_the_same_text(stories260k, place):
    done = tether.revise(config(stories260k, temperature=1e-4, rounds=2, limit=2, most=60))
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    model = AutoModelForCausalLM.from_pretrained(stories260k).eval()

    def greedy(text):
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            found = model.generate(ids, do_sample=False, max_new_tokens=60, eos_token_id=[END, 1], pad_token_id=0)
        return found[0, ids.shape[1] :]

    assert done.rows + done.failed.total() == 2
    assert done.rows > 0
    for row in rows():
        first, *others = row["chain"]
        assert first["text"].strip() in tokenizer.decode(greedy(row["prompt"]))
        answer = first["text"]
        for critique, revision in zip(others[::2], others[1::2], strict=True):
            shown = f"Principle: {critique['principle']}\n\n[Prompt]\n{row['prompt']}\n\n[Answer]\n{answer.strip()}\n\n"
            system, asked = _question(shown, critique="")
            assert critique["text"] == _said(tokenizer, greedy(f"{system}\n\n{asked}\n\nCritique:"))
            system, asked = _question(f"{shown}[Critique]\n{critique['text']}\n\n", critique=critique["text"])
            assert revision["text"].strip() == _said(tokenizer, greedy(f"{system}\n\n{asked}\n\nRewritten answer:"))
            answer = revision["text"]
        assert row["completion"] == answer


def _question(shown, *, critique):
    """As docs/revise.md has it."""
    page = (Path(__file__).parents[2] / "docs" / "revise.md").read_text()
    blocks = [block.partition("```")[0] for block in page.split("```text\n")[1:]]
    system, ending = (" ".join(part.split()) for part in blocks[bool(critique)].split("…"))
    return system, shown + ending


def _said(tokenizer, ids):
    ids = ids.tolist()
    return tokenizer.decode(ids[:-1] if ids[-1] in (END, 1) else ids, skip_special_tokens=True).strip()


def test_rows_follow_from_the_seed_and_the_prompt_alone(stories260k, place):
    tether.revise(config(stories260k))
    whole = rows()
    assert len(whole) >= 3
    tether.revise(config(stories260k, "again.jsonl", limit=2))
    tether.revise(config(stories260k, "again.jsonl"))
    assert rows("again.jsonl") == whole
    tether.revise(config(stories260k, "other.jsonl", seed=1))
    assert {r["completion"] for r in rows("other.jsonl")}.isdisjoint(r["completion"] for r in whole)


def test_a_rerun_writes_nothing_and_what_gave_no_row_is_said(stories260k, place):
    first = tether.revise(config(stories260k, most=30))
    assert 0 < first.rows < 5
    assert first.rows + first.failed.total() == 5
    assert set(first.failed) <= {f"a {what} was cut, filtered or refused" for what in ("critique", "revision")} | {
        "a first answer was cut, filtered or refused"
    }
    written = Path("out.jsonl").read_bytes()
    again = tether.revise(config(stories260k, most=30))
    assert (again.rows, again.before, again.failed) == (0, first.rows, first.failed)
    assert Path("out.jsonl").read_bytes() == written


def test_rows_of_a_model_that_was_trained_on_since_are_not_mixed_with_those_of_before(stories260k, place):
    model = place / "model"
    shutil.copytree(stories260k, model)
    assert tether.revise(config(model, limit=2)).rows
    trained = AutoModelForCausalLM.from_pretrained(model)
    torch.nn.init.zeros_(trained.lm_head.weight)
    trained.save_pretrained(model)
    with pytest.raises(RunError, match=r"out.jsonl holds rows made with weights 'sha256:"):
        tether.revise(config(model))


def test_a_stop_by_signal_and_the_same_command_again_give_the_same_file(stories260k, place):
    many = [{"prompt": f"{PROMPTS[i % 5]} {i}"} for i in range(70)]  # two batches
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    tether.revise(config(stories260k, "whole.jsonl", most=40))
    flags = ["revise", "--revise.model", str(stories260k), "--revise.constitution", "rules.txt", "--data.path",
             "p.jsonl", "--to", "out.jsonl", "--sampling.max_new_tokens", "40", "--sampling.stop_token_ids",
             f"[{END}, 1]", "--device", "cpu", "--dtype", "float32"]  # fmt: skip

    def stop():
        while not Path("out.jsonl").exists() or not Path("out.jsonl").stat().st_size:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)  # in the second batch

    threading.Thread(target=stop).start()
    assert main(flags) == 3
    assert 0 < len(rows()) < len(rows("whole.jsonl"))
    assert main(flags) == 0
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def test_a_question_without_room_for_its_reply_gives_no_row(stories260k, place, capsys):
    Path("rules.txt").write_text("Be kind to everybody. " * 40)
    assert main(["revise", "--revise.model", str(stories260k), "--revise.constitution", "rules.txt", "--data.path",
                 "p.jsonl", "--sampling.max_new_tokens", "60", "--sampling.stop_token_ids", f"[{END}]",
                 "--device", "cpu"]) == 2  # fmt: skip
    assert "the question for a critique leaves no room for it in 512 tokens" in capsys.readouterr().err


def test_a_chat_model_is_asked_through_its_template(tiny_model, tiny_tokenizer, place):
    reviser = LocalReviser(config(tiny_model("gpt2", n_positions=2048), stops=(1,)))
    chain = Chain("chain-0", 0, [{"role": "user", "content": "Hey"}], ("Be kind.",), given=False)

    def rendered():
        return tiny_tokenizer.apply_chat_template(chain.question(), tokenize=False, add_generation_prompt=True)

    assert tiny_tokenizer.decode(reviser.encode(chain)) == rendered()
    assert chain.take("Go.", whole=True) is None
    assert [m["role"] for m in chain.question()] == ["system", "user"]
    assert tiny_tokenizer.decode(reviser.encode(chain)) == rendered()
    assert "[Answer]\nGo.\n\n" in rendered()


def test_whoever_waits_is_told_which_step_is_written(stories260k, place):
    reviser = LocalReviser(config(stories260k))
    chains = list(read_chains("p.jsonl", 3, ("Be kind.",), rounds=1, seed=0))
    said, outcomes = {}, []
    for outcome in reviser.revise(chains):
        said.setdefault(reviser.now(), len(said))
        outcomes += [outcome] if outcome is not None else []
    assert next(iter(said)) == "writing 3 answers, step 1 of 3"
    assert [text.partition(", ")[2] for text in said] == [f"step {i} of 3" for i in (1, 2, 3)]
    assert [outcome.number for outcome in outcomes] == [0, 1, 2]
    assert all(isinstance(outcome, NoChain) or outcome.done for outcome in outcomes)


def test_every_step_has_draws_of_its_own(tiny_model, place):
    path = tiny_model("gpt2", n_positions=2048, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(path)
    torch.nn.init.zeros_(model.lm_head.weight)  # every token as likely as any other: a reply is its draws alone
    model.save_pretrained(path)
    tether.revise(config(path, limit=2, rounds=2, most=200, stops=range(220, 258)))
    for row in rows():
        texts = [step["text"].strip() for step in row["chain"]]
        assert len({text[:2] for text in texts}) == len(texts) == 5
