"""Fragments: what each token shows, adding up exactly to what people read."""

import time
from itertools import accumulate
from os.path import commonprefix

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tether.data.chat import encode_completion
from tether.data.text import completion_text, fragments

anything = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.differing_executors])


@anything
@given(data=st.data())
def test_fragments_join_to_the_completion_for_any_ids(any_tokenizer, data):
    vocabulary = len(any_tokenizer)
    ids = data.draw(st.lists(st.integers(0, vocabulary - 1), max_size=60))
    stops = data.draw(st.sets(st.integers(0, vocabulary - 1), max_size=2))
    # the oracle is the tokenizer itself: what it makes of the ids before the stop token
    body = ids[:-1] if ids and ids[-1] in stops else ids
    want = any_tokenizer.decode(body, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    got = fragments(any_tokenizer, ids, stops)
    assert len(got) == len(ids)
    assert "".join(got) == want == completion_text(any_tokenizer, ids, stops)


@anything
@given(text=st.text(max_size=40))
def test_a_fragment_ends_where_the_tokens_up_to_it_agree_with_the_whole(any_tokenizer, text):
    ids = encode_completion(any_tokenizer, text)
    decoded = [any_tokenizer.decode(ids[:i], skip_special_tokens=True) for i in range(len(ids) + 1)]  # the slow way
    agreed = [len(commonprefix([before, decoded[-1]])) for before in decoded]  # noqa: RUF071
    got = fragments(any_tokenizer, ids, [])
    assert [len("".join(got[:i])) for i in range(len(ids) + 1)] == list(accumulate(agreed, max))


@anything
@given(ids=st.lists(st.integers(0, 9), max_size=30))
def test_fragments_join_even_where_a_decoder_tidies_up_what_it_has_written(ids):
    # WordPiece takes back the space before "." and "'s", so that a token shows more or less than it does by itself
    pieces = ["[UNK]", "a", "##b", ".", "'", "s", "do", "not", "n", "##'t"]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert "".join(fragments(tokenizer, ids, [])) == tokenizer.decode(ids, skip_special_tokens=True)


def test_what_tokens_show_only_together_goes_to_the_last_of_them():
    backend = Tokenizer(models.BPE(vocab={"a": 0, "x": 1, "y": 2}, merges=[]))
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("xy", "xyz")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert fragments(tokenizer, [0, 1, 2], []) == ["a", "x", "yz"]


def test_the_last_byte_of_a_character_gets_it(tiny_tokenizer):
    ids = encode_completion(tiny_tokenizer, "aé🙂b")
    assert fragments(tiny_tokenizer, ids, []) == ["a", "", "é", "", "", "", "🙂", "b"]


def test_a_byte_that_is_no_character_shows_as_the_replacement_mark_at_its_own_place(tiny_tokenizer):
    lone = encode_completion(tiny_tokenizer, "é")[:1]
    a, b = encode_completion(tiny_tokenizer, "ab")
    assert fragments(tiny_tokenizer, [a, *lone, b], []) == ["a", "\ufffd", "b"]


def test_bytes_that_turn_out_wrong_later_take_their_character_back(spaced_tokenizer):
    byte = {b: spaced_tokenizer.convert_tokens_to_ids(f"<0x{b:02X}>") for b in (0xE2, 0x82, 0xAC, 0x80)}
    euro = [byte[0xE2], byte[0x82], byte[0xAC]]
    assert fragments(spaced_tokenizer, euro, []) == ["", "", "€"]
    # a decoder with byte fallback gives up on the whole run of bytes
    assert "".join(fragments(spaced_tokenizer, [*euro, byte[0x80]], [])) == "\ufffd" * 4


def test_a_space_belongs_to_the_token_that_opens_a_word_except_the_very_first(spaced_tokenizer):
    ids = encode_completion(spaced_tokenizer, "the a the")
    assert spaced_tokenizer.convert_ids_to_tokens(ids) == ["▁the", "▁a", "▁the"]
    assert fragments(spaced_tokenizer, ids, []) == ["the", " a", " the"]


def test_stop_and_special_tokens_show_nothing(tiny_tokenizer):
    a, b = encode_completion(tiny_tokenizer, "ab")
    assert fragments(tiny_tokenizer, [a, 0, b, 1], [1]) == ["a", "", "b", ""]
    assert fragments(tiny_tokenizer, [a, b], [b]) == ["a", ""]  # any token may be the stop
    assert fragments(tiny_tokenizer, [b, a], [b]) == ["b", "a"]  # but only where it ends the response
    assert fragments(tiny_tokenizer, [], [1]) == []


def test_a_response_of_ten_thousand_tokens_takes_no_square_of_its_length(tiny_tokenizer):
    def seconds(copies: int) -> float:
        ids = encode_completion(tiny_tokenizer, "A word, é and 🙂. " * copies)
        start = time.process_time()
        fragments(tiny_tokenizer, ids, [])
        return time.process_time() - start

    seconds(10)  # caches
    assert seconds(400) < 25 * seconds(40) + 0.05  # 10 times the tokens; a square would be 100 times the time


@pytest.mark.parametrize("stops", [[1], (1,), {1}, iter([1])])
def test_stop_ids_may_come_in_any_collection(tiny_tokenizer, stops):
    a = encode_completion(tiny_tokenizer, "a")
    assert completion_text(tiny_tokenizer, [*a, 1], stops) == "a"
