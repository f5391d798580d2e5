"""Every kind of bad input, and what its message says: where, what is wrong, what to write instead."""

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tether.config import DataConfig, PairsConfig, PromptsConfig, ScoredConfig
from tether.data.examples import load_examples
from tether.data.pairs import load_pairs
from tether.data.prompts import load_prompts
from tether.data.scored import load_scored
from tether.errors import DataError, ModelError


@dataclass
class Bad:
    """A file to make in a directory, how to load it, and what the message must say."""

    content: bytes | list[object] | Callable[[Path], object]
    says: list[str]
    load: str = "prompts"
    name: str = "data.jsonl"

    def make(self, directory: Path) -> str:
        path = directory / self.name
        if isinstance(self.content, bytes):
            path.write_bytes(self.content)
        elif isinstance(self.content, list):
            path.write_text("".join(json.dumps(row) + "\n" for row in self.content))
        else:
            self.content(path)
        return str(path)


def table(column: str, *values: object) -> list[object]:
    return [{column: value} for value in values]


ROW = b'{"prompt": "a"}\n'
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
ZIPPED = gzip.compress(os.urandom(64).hex().encode() * 400)

BAD = {
    # the file
    "missing, with a neighbor": Bad(
        lambda path: path.with_name("date.jsonl").write_bytes(ROW),
        ["data.jsonl does not exist", "Did you mean 'date.jsonl'?", "working directory"],
    ),
    "missing, with its folder": Bad(
        lambda path: None, ["does not exist", "The path breaks off after"], name="no/a.jsonl"
    ),
    "a directory": Bad(
        lambda path: (path.mkdir(), (path / "train.parquet").write_bytes(b"")),
        ["is a directory (it holds train.parquet)", "Name a .jsonl"],
        name="data",
    ),
    "empty": Bad(b"", ["has no rows"]),
    "only blank lines": Bad(b"\n  \n\r\n", ["has no rows"]),
    "no rows in Parquet": Bad(
        lambda path: pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path),
        ["has no rows"],
        name="a.parquet",
    ),
    "not UTF-8": Bad(
        ROW + '{"prompt": "café"}\n'.encode("latin-1"),
        ["data.jsonl, line 2 is not UTF-8", "0xe9 as its byte 16", "iconv -f LATIN1"],
    ),
    "UTF-16": Bad('{"prompt": "a"}\n'.encode("utf-16"), ["is UTF-16, where JSON is UTF-8", "iconv -f UTF-16"]),
    "gzip cut off": Bad(
        ZIPPED[: len(ZIPPED) // 2], ["gzip stream breaks off or is damaged", "again"], name="a.jsonl.gz"
    ),
    "gzip damaged": Bad(
        ZIPPED[:40] + bytes(40) + ZIPPED[80:], ["gzip stream breaks off or is damaged"], name="a.jsonl.gz"
    ),
    "Parquet by name only": Bad(ROW, ["is not Parquet: it begins with b'{\"pr'", "rename it"], name="a.parquet"),
    "Parquet cut off": Bad(
        lambda path: (
            pq.write_table(pa.table({"prompt": ["a"] * 100}), path),
            path.write_bytes(path.read_bytes()[:-20]),
        ),
        ["is damaged or only half written Parquet"],
        name="a.parquet",
    ),
    # the line
    "not JSON": Bad(
        ROW + b"{'prompt': 'a'}\n" + ROW, ["data.jsonl, line 2 is not JSON", "at character 2", 'like {"prompt":']
    ),
    "half a last line": Bad(
        ROW * 2 + b'{"prompt": "Once up', ["line 3, the last, is not whole JSON", "was its writer interrupted?"]
    ),
    "CSV": Bad(b"prompt,answer\na,b\n", ["line 1 is not JSON", "Write one JSON object a line"], name="data.csv"),
    "a JSON list in one line": Bad(b'[{"prompt": "a"}]', ["line 1 is a list, where a row is an object", "jq -c .[]"]),
    "a JSON list over lines": Bad(b'[\n{"prompt": "a"}\n]\n', ["line 1 is only '['", "one JSON document", "jq -c .[]"]),
    "a JSON object over lines": Bad(b'{\n"prompt": "a"\n}\n', ["line 1 is only '{'", "one JSON document", "jq -c ."]),
    "a key twice": Bad(
        ROW + b'{"prompt": "a", "n": 1, "prompt": "b"}\n', ["line 2 is not JSON (key 'prompt' is given twice)"]
    ),
    "a key twice inside a message": Bad(
        b'{"prompt": [{"role": "user", "content": "a", "content": "b"}]}\n', ["key 'content' is given twice"]
    ),
    "a bare text": Bad(b'"Once"\n', ["line 1 is the text 'Once', where a row is an object"]),
    "a bare number": Bad(ROW + b"12\n", ["line 2 is the number 12"]),
    "a byte order mark in the middle": Bad(ROW + b"\xef\xbb\xbf" + ROW, ["data.jsonl, line 2 is not JSON"]),
    # the column
    "misspelled column": Bad(
        [{"promt": "a", "n": 1}],
        ["line 1: there is no column 'prompt', only 'promt', 'n'", "Did you mean 'promt'?", 'Write {"prompt": "…"}'],
    ),
    "a column missing later": Bad([{"prompt": "a"}, {"text": "b"}], ["line 2: there is no column 'prompt'"]),
    "an empty object": Bad([{}], ["there is no column 'prompt', only none at all"]),
    "a Parquet row": Bad(
        lambda path: pq.write_table(pa.table({"prompt": ["a", None]}), path),
        ["a.parquet, row 1 (from 0), column 'prompt': is null"],
        name="a.parquet",
    ),
    "nothing to imitate": Bad(
        [{"prompt": "a", "completions": "b"}],
        ["none of them to imitate", "Did you mean 'completions'?", '{"prompt": "…", "completion": "…"}'],
        load="examples",
    ),
    "a pair without rejected": Bad(
        [{"prompt": "a", "chosen": "b", "reject": "c"}],
        ["line 1: there is no column 'rejected'", "Did you mean 'reject'?"],
        load="pairs",
    ),
    # the cell
    "a number": Bad(table("prompt", "a", 3.5), ["line 2, column 'prompt': is the number 3.5", "Write"]),
    "null": Bad(table("prompt", None), ["column 'prompt': is null, where a text or a list of messages belongs"]),
    "true": Bad(table("prompt", True), ["column 'prompt': is true"]),
    "an object": Bad(table("prompt", USER), ["column 'prompt': is an object", '[{"role": "user"']),
    "empty without bos": Bad(table("prompt", "a", ""), ["line 2, column 'prompt': is empty and the tokenizer adds no"]),
    "half a character": Bad(
        b'{"prompt": "a\\ud83d"}\n', ["line 1, column 'prompt': holds '\\ud83d', half a character"]
    ),
    "half a character in a message": Bad(
        b'{"prompt": [{"role": "user", "content": "a\\ud83d"}]}\n',
        ["column 'prompt': holds '\\ud83d', half a character"],
    ),
    "no messages": Bad(table("prompt", []), ["column 'prompt': is an empty list", '[{"role": "user"']),
    "a message that is text": Bad(table("prompt", ["Hi"]), ["message 0 is the text 'Hi'", '{"role": "user"']),
    "a message without role": Bad(
        table("prompt", [{"rôle": "user", "content": "Hi"}]), ["message 0 has no 'role'", "Did you mean 'rôle'?"]
    ),
    "a message without content": Bad(table("prompt", [{"role": "user"}]), ["message 0: its 'content' is null"]),
    "a prompt that is answered": Bad(
        table("prompt", [USER, ASSISTANT]), ["ends with the assistant's message", "Remove that message"]
    ),
    "a role that the template refuses": Bad(
        table("prompt", [USER], [{"role": "narrator", "content": "Hi"}]),
        ["line 2, column 'prompt': the tokenizer's chat template refuses these messages (who is narrator?)"],
    ),
    "messages that are text": Bad(
        table("messages", "Hi"), ["column 'messages': is the text 'Hi', where a list of messages"], load="examples"
    ),
    "nobody answers": Bad(
        table("messages", [USER]), ["column 'messages': no message is the assistant's"], load="examples"
    ),
    "the assistant begins": Bad(
        table("messages", [ASSISTANT]), ["the assistant speaks first", "Begin with the user's"], load="examples"
    ),
    "a completion that is a number": Bad(
        [{"prompt": "a", "completion": 1}], ["column 'completion': is the number 1"], load="examples"
    ),
    "a completion of messages after a text": Bad(
        [{"prompt": "a", "completion": [ASSISTANT]}],
        ["column 'completion': is a list, where a text belongs"],
        load="examples",
    ),
    "a completion by the user": Bad(
        [{"prompt": [USER], "completion": [USER]}],
        ["column 'completion': is 1 messages by user, where one answer of the assistant belongs"],
        load="examples",
    ),
    "a completion of two messages": Bad(
        [{"prompt": [USER], "completion": [ASSISTANT, USER]}],
        ["column 'completion': is 2 messages by assistant, user, where one answer of the assistant belongs"],
        load="examples",
    ),
    "a text that is null": Bad(table("text", "a", None), ["line 2, column 'text': is null"], load="examples"),
    # the pair
    "chosen equals rejected": Bad(
        [{"prompt": "a", "chosen": "b", "rejected": "b"}],
        ["line 1, column 'rejected': equals chosen, so there is nothing to prefer. Remove the row."],
        load="pairs",
    ),
    "transcripts that share nothing": Bad(
        [{"chosen": "Human: a", "rejected": "Human: b"}],
        ["column 'chosen': chosen and rejected share only 'Human: '", "Add a column 'prompt'"],
        load="pairs",
    ),
    "conversations that share nothing": Bad(
        [{"chosen": [USER, ASSISTANT], "rejected": [{"role": "user", "content": "Ho"}, ASSISTANT]}],
        ["column 'rejected': shares no message with chosen", "Begin both with the same messages"],
        load="pairs",
    ),
    "answers without a question": Bad(
        [{"chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "No"}]}],
        ["column 'prompt': is null, where a text or a list of messages belongs"],
        load="pairs",
    ),
    "text against messages": Bad(
        [{"prompt": "a", "chosen": "b", "rejected": [ASSISTANT]}],
        ["column 'rejected': is a list, but chosen is the text 'b'", "Write both in the same form"],
        load="pairs",
    ),
    # scored answers
    "no score": Bad(
        [{"prompt": "a", "completion": "b", "reward": 1}],
        ["line 1: there is no column 'score', only", '{"prompt": "…", "completion": "…", "score": 0.5}'],
        load="scored",
    ),
    "a score of null": Bad(
        [{"prompt": "a", "completion": "b", "score": 1}, {"prompt": "a", "completion": "b", "score": None}],
        ["line 2, column 'score': is null, where every answer needs a number", "Score it, or remove the row"],
        load="scored",
    ),
    "a score in words": Bad(
        [{"prompt": "a", "completion": "b", "score": "good"}], ["column 'score': is the text 'good'"], load="scored"
    ),
    "a score of NaN": Bad(
        b'{"prompt": "a", "completion": "b", "score": NaN}\n', ["column 'score': is the number nan"], load="scored"
    ),
    "a score of true": Bad(
        [{"prompt": "a", "completion": "b", "score": True}], ["column 'score': is true"], load="scored"
    ),
    "nothing answered, and cut": Bad(
        [{"prompt": "a", "completion": "", "score": 1, "finish_reason": "length"}],
        ["column 'completion': is empty and no stop token follows"],
        load="scored",
    ),
    "another end": Bad(
        [{"prompt": "a", "completion": "b", "score": 1, "finish_reason": "eos"}],
        ["column 'finish_reason': is the text 'eos'", "Write stop or length"],
        load="scored",
    ),
    # the length
    "too long": Bad(table("prompt", "a", "b" * 30), ["line 2, column 'prompt': has 30 tokens", "cut_left or drop"]),
}


def load(path: str, what: str, tokenizer):
    if what == "prompts":
        return load_prompts(PromptsConfig(path, max_tokens=20), tokenizer, context=None, max_new_tokens=8)
    if what == "examples":
        return load_examples(DataConfig(path), tokenizer, stop_id=1)
    if what == "scored":
        return load_scored(ScoredConfig(path), tokenizer, stop_id=1)
    return load_pairs(PairsConfig(path), tokenizer, stop_id=1)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_data_is_named_with_its_place_and_its_remedy(tmp_path, tiny_tokenizer, monkeypatch, bad):
    monkeypatch.setattr(
        tiny_tokenizer,
        "chat_template",
        "{% for m in messages %}{% if m.role == 'narrator' %}{{ raise_exception('who is narrator?') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    )
    path = bad.make(tmp_path)
    with pytest.raises(DataError) as error:
        load(path, bad.load, tiny_tokenizer)
    for part in [path, *bad.says]:
        assert part in str(error.value)


@pytest.mark.parametrize("what", ["prompts", "examples", "pairs", "scored"])
def test_messages_need_a_chat_template(tmp_path, spaced_tokenizer, what):
    row = {"prompt": [USER], "completion": [ASSISTANT], "chosen": "a", "rejected": "b", "score": 1}
    path = Bad([row], []).make(tmp_path)
    with pytest.raises(
        ModelError, match=r"has no chat template, so it is unknown how messages become text. Write plain"
    ):
        load(path, what, spaced_tokenizer)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_says_so(write, tiny_tokenizer):
    path = write("a.jsonl", [{"prompt": "a"}])
    Path(path).chmod(0)
    with pytest.raises(DataError, match=r"cannot be read .Permission denied"):
        load(path, "prompts", tiny_tokenizer)


def test_a_file_that_the_system_refuses_to_read_says_why(tiny_tokenizer):
    # the memory of a process, from its beginning, where nothing is mapped: an I/O error that root gets too
    with pytest.raises(DataError, match=r"/proc/self/mem cannot be read \(Input/output error\)"):
        load("/proc/self/mem", "prompts", tiny_tokenizer)


@pytest.mark.parametrize("path", ["somebody/prompts", "imdb"])
def test_a_hub_data_set_out_of_reach_says_what_works_offline(path, tiny_tokenizer, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        load(path, "prompts", tiny_tokenizer)
    assert f"{path} is not a file here, and the hub gave no data set of that name with a split 'train'" in str(
        error.value
    )
    assert "offline, give a .jsonl or .parquet file" in str(error.value)


@pytest.mark.parametrize("path", ["./prompts", "/no/prompts", "a/b/c", "prompts.jsonl", "here/prompts", "my prompts"])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(path, tiny_tokenizer, monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        load(path, "prompts", tiny_tokenizer)
