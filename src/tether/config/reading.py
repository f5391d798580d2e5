"""From a YAML file and dotted flags to a config; and back, as YAML that loads equal.

    file ──read_yaml──┐
                      ├── one tree of plain values ── _convert ── dataclasses ── check
    flags ──_assign───┘

The YAML is that of YAML 1.2: `1e-5` is a number, `no` and `12:30` are text, and a key given twice is an error. What is
wrong is said in one line that names the key, the value and what is expected.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from tether.config.keys import describe, hint_at, hints, in_yaml, is_section, keys, members, required
from tether.config.kinds import KINDS
from tether.config.sections import RESERVED_NAMES, Config, check
from tether.errors import ConfigError

# ---------------------------------------------------------------- the two doors and the way back


@dataclass(frozen=True)
class Options:
    """Flags that say what to do with a config and are no part of it."""

    dry_run: bool = False
    print_config: bool = False
    fresh: bool = False


def load_config(path: str | Path, kind: str | None = None) -> Config:
    """Read a config from a YAML file and check it.

    path: a file, or a run directory (its config.yaml).
    kind: the command that it is for (ppo, sft, …); None: told from the sections that the file has.

    An empty list of reward sources is accepted here, because `tether.ppo(config, reward=fn)` may fill it.
    """
    tree = read_yaml(path)
    return _build(tree, kind or _kind_of(tree, path), reward_given=True)


def parse_args(kind: str | None, argv: Sequence[str]) -> tuple[Config, Options]:
    """A config and options from the words after a command: a YAML file, `--key value` or `--key=value`, and options.

    Flags override the file wherever they stand; the last of two flags wins. A flag sets exactly its key: a list or a
    mapping is replaced whole. kind None: told from the file's sections.
    """
    file, flags, options = _scan(argv)
    tree = read_yaml(file) if file is not None else {}
    kind = kind or _kind_of(tree, file or "the command line")
    for key, text in flags:
        _assign(tree, key, text, kind)
    return _build(tree, kind), options


def to_yaml(config: Config) -> str:
    """The resolved config as YAML: every key, defaults and nulls included. It loads back equal."""
    return _dump(asdict(config))


# ---------------------------------------------------------------- flags


def _scan(argv: Sequence[str]) -> tuple[str | None, list[tuple[str, str]], Options]:
    """Split the words into the file, (key, text) pairs and options."""
    files: list[str] = []
    flags: list[tuple[str, str]] = []
    options: dict[str, bool] = {}
    words = iter(argv)
    for word in words:
        if word in _OPTIONS:
            options[word[2:].replace("-", "_")] = True
        elif meant := _near_option(word):
            raise ConfigError(f"unknown flag {word}: did you mean {meant}?")
        elif word.startswith("--") and "=" in word:
            key, _, text = word[2:].partition("=")
            flags.append((key, text))
        elif word.startswith("--"):
            text = next(words, "--")
            if text.startswith("--"):
                raise ConfigError(f"{word} has no value: nothing would be set. Write {word} VALUE.")
            flags.append((word[2:], text))
        elif word.startswith("-") and len(word) > 1:
            raise ConfigError(f"unknown flag {word}: keys are given as --section.key VALUE. See --help.")
        else:
            files.append(word)
    if len(files) > 1:
        raise ConfigError(
            f"two config files, {files[0]} and {files[1]}: give one, and the other's keys as --key VALUE."
        )
    return files[0] if files else None, flags, Options(**options)


_OPTIONS = ("--dry-run", "--print-config", "--fresh")


def _near_option(word: str) -> str | None:
    """The option that a flag was probably meant to be; None where it is a key."""
    name = word.partition("=")[0]
    if not name.startswith("--") or "." in name or any(hint_at(k.config, name[2:]) for k in KINDS.values()):
        return None
    known = {_squash(option): option for option in (*_OPTIONS, "--help")} | {"version": "tether --version"}
    near = difflib.get_close_matches(_squash(name), known, n=1, cutoff=0.75)
    return known[near[0]] if near else None


def _assign(tree: dict[str, Any], key: str, text: str, kind: str) -> None:
    """Set `key` in the tree, replacing whatever was there.

    The text is read as YAML; where that is nothing for a key that takes text, it is text after all: --run 7 is "7".
    """
    names = re.sub(r"\[\d*\]", "", key).split(".")
    for depth in range(1, len(names)):
        around = ".".join(names[:depth])
        if any(get_origin(member) is list for member in members(hint_at(KINDS[kind].config, around))):
            raise ConfigError(f"{key} is inside a list, and flags set lists whole. Write --{around} '[…, …]'.")
    hint = hint_at(KINDS[kind].config, key)
    if hint is None:
        raise _unknown(key, kind)
    value = _parse_yaml(text)
    if str in members(hint) and not any(_fits(value, member) for member in members(hint)):
        value = text
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    tree[last] = value


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text  # no YAML: text, which its key takes or refuses


# ---------------------------------------------------------------- a tree of plain values → dataclasses


def _kind_of(tree: dict[str, Any], where: str | Path) -> str:
    for kind in KINDS.values():
        if kind.section in tree:
            return kind.command
    *first, last = (kind.section for kind in KINDS.values())
    raise ConfigError(
        f"{where} has none of the sections {', '.join(first)} and {last}: it is unclear which command it is for. Add "
        "the section, empty if all its defaults are right (ppo: {}), or name the kind."
    )


def _build(tree: dict[str, Any], kind: str, *, reward_given: bool = False) -> Config:
    if kind not in KINDS:
        raise ConfigError(f"kind={kind!r} is not a kind of config. Set it to one of {', '.join(KINDS)}.")
    config: Config = _convert("", tree, KINDS[kind].config, kind)
    check(config, reward_given=reward_given)
    return config


def _convert(key: str, value: Any, hint: Any, kind: str) -> Any:
    """`value` as YAML gave it, turned into what `hint` says; ConfigError where it does not fit."""
    if value is None and is_section(hint):
        value = {}  # a section whose lines are all commented out
    member = next((m for m in members(hint) if _fits(value, m)), None)
    if member is None:
        raise _misfit(key, value, hint)
    if is_section(member):
        return _convert_section(key, value, member, kind)
    origin, args = get_origin(member), get_args(member)
    if origin is list:
        return [_convert(f"{key}[{i}]", item, args[0], kind) for i, item in enumerate(value)]
    if origin is tuple:
        return tuple(
            _convert(f"{key}[{i}]", item, arg, kind) for i, (item, arg) in enumerate(zip(value, args, strict=True))
        )
    return float(value) if member is float else value


def _convert_section(key: str, tree: dict[str, Any], cls: type, kind: str) -> Any:
    prefix = f"{key}." if key else ""
    types = hints(cls)
    for name in tree:
        if name not in types:
            raise _unknown(f"{prefix}{name}", kind)
    given = {name: _convert(prefix + name, value, types[name], kind) for name, value in tree.items()}
    missing = [
        name
        for f in fields(cls)
        if f.name not in given and f.default is MISSING and f.default_factory is MISSING
        for name in (required(types[f.name], f"{prefix}{f.name}.") if is_section(types[f.name]) else [prefix + f.name])
    ]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing, and no default would be right. "
            f"Add to the YAML file, or give {' '.join(f'--{name} …' for name in missing)}."
        )
    return cls(**given)


def _fits(value: Any, hint: Any) -> bool:
    """Whether the value has the shape of this one type; what a list or mapping holds is looked at later."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if is_section(hint) or origin is dict:
        return isinstance(value, dict)
    if origin is list:
        return isinstance(value, list)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if hint in (int, float) and isinstance(value, bool):
        return False  # Python's bool is an int; a config's is not
    if hint is float and isinstance(value, int):
        return abs(value) <= sys.float_info.max
    return isinstance(value, hint)


# ---------------------------------------------------------------- messages


def _misfit(key: str, value: Any, hint: Any) -> ConfigError:
    advice = ""
    if str in members(hint) and isinstance(value, (int, float)):
        advice = " Put it in quotes."
    if key == "reward" and isinstance(value, str):
        advice = f" Write reward: [{_as_source(value)}]; as a flag, --reward '[{_as_source(value)}]'."
    return ConfigError(f"{key}={in_yaml(value)}: expected {describe(hint)}.{advice}")


def _as_source(text: str) -> str:
    """An entry of `reward` for what was given in place of the list."""
    name = text.rpartition(":")[2] if ":" in text else ""
    named = f", name: my_{name}" if name in RESERVED_NAMES else ""
    return f"{{function: {text}{named}}}" if name else f"{{model: {text}}}"


def _unknown(key: str, kind: str) -> ConfigError:
    """An unknown key, and the one that was probably meant."""
    for other in KINDS.values():
        if hint_at(other.config, key) is not None:
            return ConfigError(
                f"unknown key {key} for tether {kind}: it is one of tether {other.command}. Drop it, or run that."
            )
    endings: dict[str, list[str]] = {}  # "pppklcoef", "klcoef" and "coef" all mean ppo.kl.coef
    for known in keys(KINDS[kind].config):
        parts = known.name.split(".")
        for i in range(len(parts)):
            endings.setdefault(_squash(".".join(parts[i:])), []).append(known.name)
    section, _, leaf = key.rpartition(".")
    beside = {
        k.name.rpartition(".")[2]: k.name for k in keys(KINDS[kind].config) if k.name.rpartition(".")[0] == section
    }
    for match in difflib.get_close_matches(leaf, beside, n=1, cutoff=0.79):  # misspelt
        return ConfigError(f"unknown key {key} for tether {kind}: did you mean {beside[match]}?")
    words = sorted(re.split(r"[._]", key))
    if swapped := [k.name for k in keys(KINDS[kind].config) if sorted(re.split(r"[._]", k.name)) == words]:
        return ConfigError(f"unknown key {key} for tether {kind}: did you mean {' or '.join(swapped)}?")
    if section and hint_at(KINDS[kind].config, section) is not None and not beside:  # below a key that has none below
        return ConfigError(f"unknown key {key} for tether {kind}: did you mean {section}?")
    if elsewhere := endings.get(_squash(leaf)):  # right, in the wrong section
        near = sorted(elsewhere, key=lambda name: -difflib.SequenceMatcher(None, name, key).ratio())[:3]
        return ConfigError(f"unknown key {key} for tether {kind}: did you mean {' or '.join(near)}?")
    for attempt in (key, leaf):
        for match in difflib.get_close_matches(_squash(attempt), endings, n=1, cutoff=0.79):
            meant = [name for name in endings[match] if _squash(name) == match] or endings[match][:3]
            return ConfigError(f"unknown key {key} for tether {kind}: did you mean {' or '.join(meant)}?")
    return ConfigError(
        f"unknown key {key} for tether {kind}: nothing would read it. tether {kind} --help lists all keys."
    )


def _squash(key: str) -> str:
    return re.sub(r"\[\d*\]|[._-]", "", key).lower()


# ---------------------------------------------------------------- YAML


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; for a run directory, in its config.yaml."""
    path = Path(path)
    if (path / "config.yaml").is_file():
        path /= "config.yaml"
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist. Check the path: it is relative to {Path.cwd()}.") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory, and not one of a run. Name the YAML file in it.") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}, line {line}: not UTF-8, so its text would be garbled. Save the file as UTF-8."
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from None
    try:
        tree = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}" if mark else f"{path}"
        problem = "a tab indents here; use spaces" if "\\t" in str(error.problem) else error.problem
        raise ConfigError(f"{where}: not YAML: {problem}.") from None
    except yaml.reader.ReaderError as error:
        at = text[: error.position].count("\n") + 1
        raise ConfigError(f"{path}, line {at}: not YAML: character #x{error.character:04x} is not allowed.") from None
    except (RecursionError, ValueError) as error:  # a thousand brackets, a number of a thousand digits
        raise ConfigError(f"{path} is no config: {error}. Check its brackets and numbers.") from None
    if tree is None:
        raise ConfigError(f"{path} is empty: nothing says what to run. Write at least the keys without a default.")
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}, line 1: the file holds {in_yaml(tree)}, not keys. Write lines of the form key: value."
        )
    return tree


_PLAIN = (  # which unquoted words are not text: YAML 1.2's core schema, with _ allowed inside whole numbers
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("tag:yaml.org,2002:merge", r"<<", ["<"]),
)


class _Loader(yaml.SafeLoader):
    """PyYAML reads YAML 1.1 (1e-5 is text, no is false) and lets a second key win silently; this one does neither."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=key.start_mark)
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
            key.tag = "tag:yaml.org,2002:str"  # 1, true and null are names here
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read back as text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def analyze_scalar(self, scalar: str) -> Any:
        analysis = super().analyze_scalar(scalar)
        if any(separator in scalar for separator in "\x85\u2028\u2029"):
            # YAML's other line breaks: unescaped, a reader folds them into a space. Double quotes escape them.
            analysis.allow_flow_plain = analysis.allow_block_plain = False
            analysis.allow_single_quoted = analysis.allow_block = False
        return analysis


for _tag, _pattern, _first in _PLAIN:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)


def _dump(tree: dict[str, Any]) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
