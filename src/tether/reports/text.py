"""Text that nobody vouches for, made safe to look at.

Escaping keeps markup from acting. It does not keep text from lying: an escape sequence, an override of the writing
direction or an invisible character would still be there, unseen. `visible` shows each by its name.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Any

_SHAPING = {"\u200c", "\u200d"}  # (non-)joiners: Persian, Hindi and family emoji are not spelled right without them
_KEPT = {"\n", "\t"} | _SHAPING
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, formats, surrogates, line and paragraph separators


def visible(text: Any) -> str:
    """`text` with every character shown that would act or hide instead of show: ESC is ␛, an RLO is ⟨U+202E⟩.

    The result can be encoded in UTF-8 and holds no control but newline and tab.
    """
    plain = str(text)
    if plain.replace("\n", "").replace("\t", "").isprintable():  # nearly always, and a hundred times as fast
        return plain
    return "".join(_shown(c) for c in plain)


def _shown(c: str) -> str:
    if c.isprintable() or c in _KEPT or unicodedata.category(c) not in _HIDDEN:
        return c
    code = ord(c)
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's own pictures of the controls
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def prompt_text(prompt: str) -> str:
    """A prompt as a person reads it: chat messages, which tables hold as JSON, as role and content."""
    if not prompt.startswith("[{"):
        return prompt
    try:
        messages = json.loads(prompt)
        return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)
    except (ValueError, KeyError, TypeError):
        return prompt  # text that only looks like messages
