"""Reward functions are other people's code: what they are given, and what happens when they misbehave."""

import asyncio
import time
from fractions import Fraction

import numpy as np
import pytest
import torch

from tether.errors import RewardError
from tether.rewards import FunctionReward, load_function
from tether.types import Completions, Prompt

EOS = 1


@pytest.fixture
def answers(tiny_tokenizer):
    """answers("yes", "no"): completions with these texts, each ending with a stop token, to the prompts p0, p1, …"""

    def make(*texts, columns=None, chat=False, cut=()):
        columns = columns or [{} for _ in texts]
        source = [[{"role": "user", "content": f"p{i}"}] if chat else f"p{i}" for i in range(len(texts))]
        prompts = [Prompt((5, 6), source[i], 10 + i, columns[i]) for i in range(len(texts))]
        ids = [tiny_tokenizer.encode(t) + ([] if i in cut else [EOS]) for i, t in enumerate(texts)]
        reasons = ["length" if i in cut else "stop" for i in range(len(texts))]
        floats = [[0.0] * len(row) for row in ids]
        return Completions(prompts, ids, floats, floats, reasons)

    return make


@pytest.fixture
def source(tiny_tokenizer):
    def make(function, timeout_s=60.0):
        return FunctionReward(function, name="f", tokenizer=tiny_tokenizer, stop_ids=(EOS,), timeout_s=timeout_s)

    return make


# ---------------------------------------------------------------- what the function is given


def test_a_function_is_called_once_with_every_row_in_order(answers, source, tiny_tokenizer):
    calls = []

    def f(prompts, completions, completion_ids, **columns):
        calls.append((prompts, completions, completion_ids, columns))
        return [float(len(c)) for c in completions]

    batch = answers("yes", "", "maybe", columns=[{"label": 3}, {"label": 4}, {"label": 5}], cut=(2,))
    assert source(f).score(batch) == [3.0, 0.0, 5.0]
    maybe = tiny_tokenizer.encode("maybe")
    yes = [*tiny_tokenizer.encode("yes"), EOS]
    assert calls == [(["p0", "p1", "p2"], ["yes", "", "maybe"], [yes, [EOS], maybe], {"label": [3, 4, 5]})]


def test_a_chat_prompt_gets_its_completion_as_a_message(answers, source):
    seen = []
    source(lambda prompts, completions: seen.extend([prompts, completions]) or [0.0]).score(answers("hi", chat=True))
    assert seen == [[[{"role": "user", "content": "p0"}]], [[{"role": "assistant", "content": "hi"}]]]


def test_special_tokens_are_not_in_the_text_but_in_the_ids(answers, source, tiny_tokenizer):
    batch = answers("ab")
    batch.response_ids[0].insert(1, tiny_tokenizer.pad_token_id)
    got = []
    source(lambda completions, completion_ids: got.extend([completions[0], completion_ids[0]]) or [0.0]).score(batch)
    assert got[0] == "ab"
    assert got[1] == batch.response_ids[0]
    assert len(got[1]) == 4


def test_a_function_without_kwargs_gets_only_the_columns_it_names(answers, source):
    def f(completions, *, label, unused=None):
        return [float(x) for x in label]

    assert source(f).score(answers("a", "b", columns=[{"label": 1, "other": 2}, {"label": 7, "other": 2}])) == [
        1.0,
        7.0,
    ]


def test_a_row_without_a_column_that_others_have_gets_none(answers, source):
    def f(completions, label):
        return [0.5 if x is None else x for x in label]

    assert source(f).score(answers("a", "b", columns=[{"label": 1.0}, {}])) == [1.0, 0.5]


def test_a_missing_column_is_named_with_what_is_near(answers, source):
    def f(completions, lable):
        return [0.0]

    with pytest.raises(RewardError, match=r"needs 'lable'.*Did you mean 'label'\?"):
        source(f).score(answers("a", columns=[{"label": 1}]))


def test_a_column_cannot_be_called_like_an_argument(answers, source):
    with pytest.raises(RewardError, match="a column 'completions'"):
        source(lambda completions: [0.0]).score(answers("a", columns=[{"completions": "x"}]))


# ---------------------------------------------------------------- what it may answer


def test_an_async_function_is_awaited(answers, source):
    async def f(completions, **_):
        return await asyncio.gather(*(one(c) for c in completions))

    async def one(text):
        await asyncio.sleep(0)
        return len(text) / 2

    assert source(f).score(answers("ab", "abcd")) == [1.0, 2.0]


@pytest.mark.parametrize(
    "answer",
    [
        [1, 0],
        (1.0, 0.0),
        [True, False],
        np.array([1.0, 0.0], dtype=np.float16),
        [np.float32(1), np.int64(0)],
        [np.bool_(True), np.bool_(False)],
        torch.tensor([1.0, 0.0], dtype=torch.bfloat16),
        [torch.tensor(1.0, requires_grad=True), torch.tensor(0)],
        [Fraction(1), Fraction(0)],
    ],
    ids=repr,
)
def test_numbers_of_every_kind_are_scores(answers, source, answer):
    assert source(lambda completions: answer).score(answers("a", "b")) == [1.0, 0.0]


def test_none_means_no_answer(answers, source):
    assert source(lambda completions: [None, 2.0]).score(answers("a", "b")) == [None, 2.0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, r"returned None \(NoneType\), not a list"),
        (0.5, "not a list"),
        ("good", "not a list"),
        ({"score": [1, 2]}, "not a list"),
        ([1.0], r"1 scores for 2 completions: row 1 has no score"),
        ([1.0, 2.0, 3.0], "3 scores for 2 completions: row 2 does not exist"),
        ([1.0, "2"], r"'2' \(str\) for row 1 \(row 11 of the data, 'p1'\)"),
        ([1.0, [2.0]], r"\[2.0\] \(list\) for row 1"),
        ([1.0, 1j], r"1j \(complex\) for row 1"),
        (np.ones((2, 1)), "row 0"),
        ([float("nan"), 1.0], "nan for row 0"),
        ([1.0, float("inf")], "inf for row 1"),
        ([1.0, torch.tensor(float("nan"))], "nan for row 1"),
        ([1.0, 10**400], "for row 1"),
    ],
    ids=lambda x: repr(x)[:30],
)
def test_what_is_not_a_list_of_finite_numbers_is_refused_with_the_row(answers, source, answer, message):
    with pytest.raises(RewardError, match=message):
        source(lambda completions: answer).score(answers("a", "b"))


# ---------------------------------------------------------------- what else can go wrong


def test_an_exception_is_reported_with_the_line_of_the_users_own_code(answers, source, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import json\n\ndef f(completions):\n    return inner(completions)\n\ndef inner(x):\n    json.loads('{')\n"
    )
    with pytest.raises(RewardError, match=r"raised JSONDecodeError: .*mine\.py:7\)") as caught:
        source(load_function(f"{file}:f")).score(answers("a"))
    assert "Traceback" not in str(caught.value)


def test_sys_exit_in_a_function_is_an_error_and_not_silence(answers, source):
    def f(completions):
        raise SystemExit(3)

    with pytest.raises(RewardError, match="raised SystemExit: 3"):
        source(f).score(answers("a"))


def test_an_async_exception_is_reported(answers, source):
    async def f(completions):
        await asyncio.sleep(0)
        raise ConnectionError("judge is down")

    with pytest.raises(RewardError, match=r"raised ConnectionError: judge is down \(.*test_function_reward\.py:\d+\)"):
        source(f).score(answers("a"))


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_function_that_hangs_is_not_waited_for(answers, source, kind):
    def sync(completions):
        time.sleep(30)

    async def asynchronous(completions):
        await asyncio.sleep(30)

    began = time.monotonic()
    with pytest.raises(RewardError, match=r"timeout_s=0\.2 seconds for 1 completions"):
        source(sync if kind == "sync" else asynchronous, timeout_s=0.2).score(answers("a"))
    assert time.monotonic() - began < 5


# ---------------------------------------------------------------- finding it


def test_a_function_is_found_in_a_file_and_can_import_what_lies_beside_it(tmp_path):
    (tmp_path / "beside_it_42.py").write_text("BONUS = 2.0\n")
    (tmp_path / "mine.py").write_text("from beside_it_42 import BONUS\n\ndef f(completions):\n    return [BONUS]\n")
    assert load_function(f"{tmp_path}/mine.py:f")([""]) == [2.0]


def test_a_function_is_found_in_a_package():
    assert load_function("os.path:basename")("a/b") == "b"


def test_two_files_of_one_name_do_not_hide_each_other(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(f"def f(completions):\n    return [{name!r}]\n")
    assert [load_function(f"{tmp_path}/{name}/mine.py:f")([""]) for name in ("one", "two")] == [["one"], ["two"]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{dir}/mine.py:helpfull", r"has no function 'helpfull'\. Did you mean 'helpful'\?"),
        ("{dir}/mine.py:zzz", r"has no function 'zzz'. It has: harmless, helpful"),
        ("{dir}/mine.py:WEIGHT", r"WEIGHT in .*mine.py is 3, not a function"),
        ("{dir}/mien.py:helpful", r"there is no file .*mien\.py.*Did you mean 'mine\.py'"),
        ("{dir}/broken.py:f", r"raised SyntaxError: .*broken\.py:2\)"),
        ("{dir}/raising.py:f", r"raised ZeroDivisionError: .*raising\.py:3\)"),
        ("no_such_package_x.rewards:f", "there is no module 'no_such_package_x'"),
        ("{dir}/imports.py:f", r"raised ModuleNotFoundError: No module named 'no_such_package_x' \(.*imports\.py:1\)"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_explained(tmp_path, spec, message):
    (tmp_path / "mine.py").write_text("WEIGHT = 3\n\ndef helpful(completions): ...\n\ndef harmless(completions): ...\n")
    (tmp_path / "broken.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "raising.py").write_text("def g():\n    pass\n1 / 0\n")
    (tmp_path / "imports.py").write_text("import no_such_package_x\n")
    with pytest.raises(RewardError, match=message):
        load_function(spec.format(dir=tmp_path))


@pytest.mark.parametrize("leave", ["sys.exit(0)", "argparse.ArgumentParser().parse_args(['--no-such-flag'])"])
@pytest.mark.parametrize("as_module", [False, True])
def test_a_file_that_leaves_python_when_it_is_loaded_is_named_and_does_not_end_the_run(
    tmp_path, monkeypatch, leave, as_module
):
    name = f"leaving_{len(leave)}"
    (tmp_path / f"{name}.py").write_text(f"import argparse, sys\ndef f(completions): ...\n{leave}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match=rf"{name}.* raised SystemExit: [02] \(.*{name}\.py:3\)"):
        load_function(f"{name}:f" if as_module else f"{tmp_path}/{name}.py:f")
