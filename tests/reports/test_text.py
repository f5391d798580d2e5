"""What hides or acts is shown by name; what people write stays as it is."""

import pytest

from tether.reports.text import visible


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("\x1b[31mred", "␛[31mred"),
        ("a\x00b\x07\x7f", "a␀b␇␡"),
        ("back\b\b\b\bfront\r", "back␈␈␈␈front␍"),
        ("\x9b31m", "⟨U+009B⟩31m"),
        ("abc\u202egpj.exe", "abc⟨U+202E⟩gpj.exe"),
        ("\u2066x\u2069", "⟨U+2066⟩x⟨U+2069⟩"),
        ("zero\u200bwidth\ufeff", "zero⟨U+200B⟩width⟨U+FEFF⟩"),
        ("\ud800 alone", "⟨U+D800⟩ alone"),
        ("tag\U000e0041", "tag⟨U+E0041⟩"),
        ("line\u2028para\u2029", "line⟨U+2028⟩para⟨U+2029⟩"),
    ],
)
def test_a_character_that_acts_or_hides_is_shown(hostile, shown):
    assert visible(hostile) == shown
    assert visible(hostile).encode("utf-8")


@pytest.mark.parametrize(
    "text",
    ["two\nlines\tand a tab", "naïve – “quotes” 東京 שלום مرحبا", "می\u200cخواهم", "👩\u200d👩\u200d👧", "e\u0301", ""],
)
def test_what_people_write_is_left_alone(text):
    assert visible(text) == text
