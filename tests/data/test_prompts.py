"""Prompts: the ids that the sampler gets, and what reward functions will be told."""

import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tether.config import PromptsConfig
from tether.data.prompts import load_prompts
from tether.errors import ConfigError, DataError
from tether.types import Prompt


def load(path, tokenizer, context=None, max_new_tokens=8, **changes):
    return load_prompts(PromptsConfig(path, **changes), tokenizer, context=context, max_new_tokens=max_new_tokens)


def test_a_text_is_tokenized_with_the_tokenizers_own_special_tokens(write, tiny_tokenizer, spaced_tokenizer):
    path = write("a.jsonl", [{"prompt": "the a", "topic": "x"}, {"prompt": "b", "level": 2}])
    spaced = [1, *spaced_tokenizer.convert_tokens_to_ids(["▁the", "▁a"])]
    assert load(path, spaced_tokenizer)[0].ids == tuple(spaced)
    # a row without a column that others have gives None, so that reward functions see rectangular columns
    b = tiny_tokenizer.convert_tokens_to_ids("b")
    assert load(path, tiny_tokenizer)[1] == Prompt(ids=(b,), source="b", row=1, columns={"topic": None, "level": 2})


def test_messages_go_through_the_chat_template_up_to_the_assistants_turn(write, tiny_tokenizer):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    (prompt,) = load(write("a.jsonl", [{"prompt": messages}]), tiny_tokenizer)
    assert tiny_tokenizer.decode(prompt.ids) == "<system>Be kind.<user>Hi<assistant>"
    assert prompt.source == messages


def test_a_template_that_writes_bos_gets_no_second_one(write, spaced_tokenizer):
    spaced_tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    try:
        (prompt,) = load(write("a.jsonl", [{"prompt": [{"role": "user", "content": "a"}]}]), spaced_tokenizer)
    finally:
        spaced_tokenizer.chat_template = None
    assert prompt.ids.count(spaced_tokenizer.bos_token_id) == 1


def test_chat_template_kwargs_reach_the_template(write, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ messages[0].content }}{{ ' /think' if thinking }}")
    path = write("a.jsonl", [{"prompt": [{"role": "user", "content": "Hi"}]}])
    (prompt,) = load(path, tiny_tokenizer, chat_template_kwargs={"thinking": True})
    assert tiny_tokenizer.decode(prompt.ids) == "Hi /think"


def test_keys_that_parquet_fills_in_with_null_are_not_the_messages(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(
        tiny_tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}{{ '!' if 'name' in m }}{% endfor %}"
    )
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U", "name": "Ann"}]
    pq.write_table(pa.Table.from_pylist([{"prompt": messages}]), tmp_path / "a.parquet")
    (prompt,) = load(str(tmp_path / "a.parquet"), tiny_tokenizer)
    assert prompt.source == messages
    assert tiny_tokenizer.decode(prompt.ids) == "SU!"


def test_messages_may_call_tools_without_content_and_hold_parts(write, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{% for m in messages %}<{{ m.role }}>{% endfor %}")
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    messages = [{"role": "user", "content": [{"type": "text", "text": "1?"}]}, call, {"role": "tool", "content": "1"}]
    (prompt,) = load(write("a.jsonl", [{"prompt": messages}]), tiny_tokenizer)
    assert prompt.source == messages


def test_texts_and_messages_may_stand_in_one_file(write, tiny_tokenizer):
    rows = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}, {"prompt": "c"}]
    got = [tiny_tokenizer.decode(p.ids) for p in load(write("a.jsonl", rows), tiny_tokenizer)]
    assert got == ["a", "<user>b<assistant>", "c"]


def test_an_empty_prompt_is_legal_where_the_tokenizer_adds_a_token(write, tiny_tokenizer, spaced_tokenizer):
    path = write("a.jsonl", [{"prompt": "a"}, {"prompt": ""}])
    assert load(path, spaced_tokenizer)[1].ids == (spaced_tokenizer.bos_token_id,)
    with pytest.raises(DataError, match=r"line 2, column 'prompt': is empty and the tokenizer adds no token"):
        load(path, tiny_tokenizer)


OVERLONG = [{"prompt": "abc"}, {"prompt": "abcdefg"}, {"prompt": "xyz"}]  # one token a letter; 4 fit


def test_overlong_error_names_the_first_and_counts_the_rest(write, tiny_tokenizer):
    with pytest.raises(DataError) as error:
        load(write("a.jsonl", OVERLONG), tiny_tokenizer, max_tokens=4)
    assert "line 2, column 'prompt': has 7 tokens; 1 of 3 rows are longer than 4 tokens" in str(error.value)
    assert "(prompts.max_tokens=4)" in str(error.value)
    assert "set prompts.overlong to cut_left or drop" in str(error.value)


def test_cut_left_keeps_the_end_and_says_so(write, tiny_tokenizer, capsys):
    prompts = load(write("a.jsonl", OVERLONG), tiny_tokenizer, max_tokens=4, overlong="cut_left")
    assert [tiny_tokenizer.decode(p.ids) for p in prompts] == ["abc", "defg", "xyz"]
    assert [(p.source, p.cut) for p in prompts] == [("abc", False), ("abcdefg", True), ("xyz", False)]
    assert "1 of 3 rows are longer than 4 tokens (prompts.max_tokens=4): cut on the left" in capsys.readouterr().err


def test_cut_left_keeps_bos_in_front(write, spaced_tokenizer):
    (prompt,) = load(write("a.jsonl", [{"prompt": "xyz" * 5}]), spaced_tokenizer, max_tokens=4, overlong="cut_left")
    assert prompt.ids == (1, *spaced_tokenizer.convert_tokens_to_ids(["x", "y", "z"]))


def test_a_prompt_cut_to_one_token_keeps_its_last_and_no_bos(write, spaced_tokenizer):
    (prompt,) = load(write("a.jsonl", [{"prompt": "xyz"}]), spaced_tokenizer, max_tokens=1, overlong="cut_left")
    assert spaced_tokenizer.convert_ids_to_tokens(prompt.ids) == ["z"]


def test_drop_counts_what_it_drops_and_keeps_row_numbers(write, tiny_tokenizer, capsys):
    prompts = load(write("a.jsonl", OVERLONG), tiny_tokenizer, max_tokens=4, overlong="drop")
    assert [p.row for p in prompts] == [0, 2]
    assert "1 of 3 rows are longer than 4 tokens (prompts.max_tokens=4): dropped" in capsys.readouterr().err
    with pytest.raises(DataError, match="nothing would be left"):
        load(write("b.jsonl", OVERLONG), tiny_tokenizer, max_tokens=2, overlong="drop")


def test_a_prompt_leaves_room_for_its_response_in_the_models_context(write, tiny_tokenizer):
    path = write("a.jsonl", OVERLONG)
    assert len(load(path, tiny_tokenizer, context=15, max_new_tokens=8)) == 3
    with pytest.raises(DataError, match=r"the model's context of 14 less sampling.max_new_tokens=8"):
        load(path, tiny_tokenizer, context=14, max_new_tokens=8)
    with pytest.raises(ConfigError, match=r"sampling.max_new_tokens=14 leaves no room"):
        load(path, tiny_tokenizer, context=14, max_new_tokens=14)


def test_ten_thousand_prompts_load_at_once_and_in_order(write, tiny_tokenizer):
    path = write("a.jsonl", [{"prompt": f"Question {i}?", "topic": i % 7} for i in range(10_000)])
    start = time.process_time()
    prompts = load(path, tiny_tokenizer)
    assert time.process_time() - start < 5  # about half a second on an idle core
    assert [tiny_tokenizer.decode(prompts[i].ids) for i in (0, 4095, 4096, 9999)] == [
        f"Question {i}?" for i in (0, 4095, 4096, 9999)
    ]
