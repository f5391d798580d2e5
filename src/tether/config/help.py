"""`--help` of the commands that take a config: every key with its type, default and reason."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import MISSING

from tether.config.keys import Key, describe, in_yaml, is_section, keys
from tether.config.kinds import KINDS

_OPTIONS = """\
  --dry-run       check everything, print config, data and plan (a trainer's: memory too), and do nothing
  --print-config  print the resolved config, every key, and stop
  --fresh         start over: the old run directory is moved to RUN.old-N, never deleted"""


def help_text(command: str) -> str:
    """The whole help of one command, as wide as the terminal, 100 columns at most."""
    kind = KINDS[command]
    width = min(100, shutil.get_terminal_size().columns)
    blocks = [
        f"usage: tether {kind.command} [C.yaml] [--key VALUE …] [options]\n\n{kind.purpose}",
        f"options\n{_OPTIONS}",
        "keys: in the YAML file, or as --key VALUE before or after it. Flags override the file;\n"
        "lists and mappings are replaced whole, e.g. --reward '[{function: my_rewards.py:helpful}]'",
        *(_entry(key, width) for key in keys(kind.config)),
    ]
    return "\n\n".join(blocks)


def _entry(key: Key, width: int) -> str:
    if is_section(key.hint):  # a section: its keys follow
        return textwrap.fill(f"{key.name}: {key.help}", width)
    default = "required" if key.default is MISSING else f"default {_plain(key.default)}"
    head = f"  {key.name}  ({describe(key.hint)}; {default})"
    return head + "\n" + textwrap.fill(key.help, width, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else in_yaml(value)
