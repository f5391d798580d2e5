"""Rows: what is written comes back, from every kind of file."""

import gzip
import json
import tempfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tether.config import DataConfig, PairsConfig, PromptsConfig
from tether.data.examples import load_examples
from tether.data.pairs import load_pairs
from tether.data.prompts import load_prompts
from tether.data.table import read_rows
from tether.errors import DataError

leaves = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8)
cells = leaves | st.lists(st.dictionaries(st.sampled_from(["role", "content"]), leaves), max_size=2)
rows = st.lists(st.dictionaries(st.text(max_size=6), cells, max_size=3), min_size=1, max_size=6)


@settings(deadline=None, max_examples=80)
@given(
    rows=rows,
    escaped=st.booleans(),
    newline=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    zipped=st.booleans(),
)
def test_json_lines_come_back_as_written(rows, escaped, newline, last, mark, zipped):
    text = newline.join(json.dumps(row, ensure_ascii=escaped) for row in rows) + (newline if last else "")
    content = mark + text.encode()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows.jsonl"
        path.write_bytes(gzip.compress(content) if zipped else content)
        assert read_rows(str(path)) == rows


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_what_unicode_calls_a_line_break_does_not_end_a_line(write, separator):
    # str.splitlines would; JSON allows them unescaped (from U+0020 on)
    row = {"prompt": f"one{separator}two"}
    line = json.dumps(row, ensure_ascii=separator < " ").encode()
    assert read_rows(write("a.jsonl", line + b"\n")) == [row]


def test_blank_lines_are_no_rows_but_count_as_lines(write):
    path = write("a.jsonl", b'\n{"prompt": "a"}\n\n  \n{"text": "b"}\n\n')
    with pytest.raises(DataError, match="line 5: there is no column 'prompt'"):
        read_rows(path, columns=["prompt"])


@settings(deadline=None, max_examples=25)
@given(texts=st.lists(st.text(max_size=12), min_size=1, max_size=8))
def test_parquet_comes_back_as_written(texts):
    rows = [{"prompt": text, "turns": [{"role": "user", "content": text}], "n": i} for i, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/rows.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
        assert read_rows(path) == rows
        assert read_rows(path, limit=2) == rows[:2]


def test_a_file_is_read_by_what_it_holds_whatever_its_name(write, tmp_path):
    rows = [{"prompt": "a"}]
    zipped = tmp_path / "zipped.jsonl"
    zipped.write_bytes(gzip.compress(b'{"prompt": "a"}\n'))
    assert read_rows(str(zipped)) == rows
    plain = tmp_path / "plain.gz"
    plain.write_bytes(b'{"prompt": "a"}\n')
    assert read_rows(str(plain)) == rows
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data")
    assert read_rows(str(tmp_path / "data")) == rows


def test_limit_takes_the_first_rows_and_reads_no_further(write):
    assert read_rows(write("a.jsonl", b'{"a": 1}\n{"a": 2}\nnot JSON\n'), limit=2) == [{"a": 1}, {"a": 2}]


def test_a_hub_data_set_gives_the_rows_of_its_split(monkeypatch):
    asked = []

    def load_dataset(path, split):  # the hub is out of reach here; the data set is a real one
        asked.append((path, split))
        return datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows("somebody/prompts", "test", limit=2) == [{"prompt": "a"}, {"prompt": "b"}]
    assert asked == [("somebody/prompts", "test")]


@pytest.mark.parametrize("what", ["prompts", "examples", "pairs"])
def test_split_and_limit_of_a_config_reach_the_reader(what, monkeypatch, tiny_tokenizer):
    row = {"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, split: asked.append(split) or datasets.Dataset.from_list([row] * 3)
    )
    where = {"path": "somebody/data", "split": "test", "limit": 2}
    if what == "prompts":
        rows = load_prompts(PromptsConfig(**where), tiny_tokenizer, context=None, max_new_tokens=8)
    else:
        rows = {"examples": load_examples, "pairs": load_pairs}[what](PairsConfig(**where), tiny_tokenizer, stop_id=1)
    assert ([r.row for r in rows], asked) == ([0, 1], ["test"])


MARKED = (
    "{% for m in messages %}<{{ m.role }}>{{ mark }}{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_chat_template_kwargs_reach_prompt_and_answer_of_examples_and_pairs(write, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", MARKED)
    user, yes, no = {"role": "user", "content": "Hi"}, *({"role": "assistant", "content": c} for c in ("Yo", "No"))
    path = write("a.jsonl", [{"prompt": [user], "completion": [yes], "chosen": [yes], "rejected": [no]}])
    marked = {"chat_template_kwargs": {"mark": "!"}}
    (pair,) = load_pairs(PairsConfig(path, **marked), tiny_tokenizer, stop_id=1)
    decoded = [tiny_tokenizer.decode(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]
    assert decoded == ["<user>!Hi<assistant>", "!Yo<eos>", "!No<eos>"]
    (example,) = load_examples(DataConfig(path, **marked), tiny_tokenizer, stop_id=1)
    (whole,) = load_examples(
        DataConfig(write("b.jsonl", [{"messages": [user, yes]}]), **marked), tiny_tokenizer, stop_id=1
    )
    assert tiny_tokenizer.decode(example.ids) == tiny_tokenizer.decode(whole.ids) == "<user>!Hi<assistant>!Yo<eos>"


@pytest.mark.parametrize("column", ["completion", "chosen", "rejected"])
def test_an_answer_that_the_template_refuses_is_named_with_its_column(write, tiny_tokenizer, monkeypatch, column):
    refusing = MARKED.replace("{{ mark }}", "{{ raise_exception('no') if m.content == 'bad' }}")
    monkeypatch.setattr(tiny_tokenizer, "chat_template", refusing)
    row = {"prompt": [{"role": "user", "content": "Hi"}], "completion": "a", "chosen": "b", "rejected": "c"}
    load = load_examples if column == "completion" else load_pairs
    with pytest.raises(DataError, match=f"line 1, column '{column}': the tokenizer's chat template refuses"):
        load(PairsConfig(write("a.jsonl", [row | {column: "bad"}])), tiny_tokenizer, stop_id=1)
