"""From a YAML file and dotted flags to a config; and back, as YAML that loads equal.

    file ──read_yaml──┐
                      ├── one tree of plain values ── pydantic ── dataclasses ── check
    flags ──_assign───┘

The YAML is that of YAML 1.2, as ruamel.yaml reads it: `1e-5` is a number, `no` and `12:30` are text, and a key given
twice is an error. What is wrong is said in one line that names the key, the value and what is expected.
"""

from __future__ import annotations

import difflib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, get_origin

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.emitter import Emitter
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import SafeRepresenter

from tether.config.judge import JudgeConfig
from tether.config.keys import describe, hint_at, hints, in_yaml, is_section, keys, members
from tether.config.kinds import KINDS
from tether.config.sections import RESERVED_NAMES, Config, check, not_finite
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


def load_judge(path: str | Path) -> JudgeConfig:
    """The judge of a file for `tether judge`, to score other answers than that: its `data` and `to` are not read."""
    tree = read_yaml(path) | {"data": {"path": "the answers of a run"}}
    tree.pop("to", None)
    try:
        config = _build(tree, "judge")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    assert isinstance(config, JudgeConfig)
    return config


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
    text = io.StringIO()
    _yaml().dump(asdict(config), text)
    return text.getvalue()


# ---------------------------------------------------------------- flags


def _scan(argv: Sequence[str]) -> tuple[str | None, list[tuple[str, str | None]], Options]:
    """Split the words into the file, (key, text) pairs and options; text is None where a flag has no value."""
    files: list[str] = []
    flags: list[tuple[str, str | None]] = []
    options: dict[str, bool] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in _OPTIONS:
            options[word[2:].replace("-", "_")] = True
        elif meant := _near_option(word):
            raise ConfigError(f"unknown flag {word}: did you mean {meant}?")
        elif word.startswith("--"):
            key, given, text = word[2:].partition("=")
            valued = given or (words and not words[0].startswith("--"))
            flags.append((key, text if given else words.pop(0) if valued else None))
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


def _assign(tree: dict[str, Any], key: str, text: str | None, kind: str) -> None:
    """Set `key` in the tree, replacing whatever was there.

    The text is read as YAML; where that is nothing for a key that takes text, it is text after all: --run 7 is "7".
    """
    cls = KINDS[kind].config
    names = re.sub(r"\[\d*\]", "", key).split(".")
    for depth in range(1, len(names)):
        around = ".".join(names[:depth])
        if any(get_origin(member) is list for member in members(hint_at(cls, around))):
            raise ConfigError(f"{key} is inside a list, and flags set lists whole. Write --{around} '[…, …]'.")
    hint = hint_at(cls, key)
    if hint is None or "[" in key:
        raise _unknown(key, kind)
    if text is None:
        raise ConfigError(f"--{key} has no value: nothing would be set. Write --{key} VALUE.")
    try:
        value = _yaml().load(text)
    except (YAMLError, ValueError, RecursionError):
        value = text  # no YAML: text, which its key takes or refuses
    shapes = {dict if is_section(member) else get_origin(member) or member for member in members(hint)}
    if str in shapes and type(value) not in shapes:
        value = text
    *parents, last = names
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    tree[last] = value


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
    from pydantic import ValidationError  # here, for help needs no parser: it takes a quarter of a second

    if kind not in KINDS:
        raise ConfigError(f"kind={kind!r} is not a kind of config. Set it to one of {', '.join(KINDS)}.")
    cls: Any = KINDS[kind].config
    _fill(tree, cls)
    try:  # as JSON, whose lists may become tuples and mappings dataclasses under strict types
        config: Config = _adapter(cls).validate_json(json.dumps(tree))
    except ValidationError as error:
        raise _first(error.errors(include_url=False, include_input=False), tree, kind) from None
    check(config, reward_given=reward_given)
    return config


@cache
def _adapter(cls: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def _fill(tree: dict[str, Any], cls: type) -> None:
    """Write out what an absent section holds where it has keys that are required, and one with no line left."""
    for f in fields(cls):
        if is_section(section := hints(cls)[f.name]):
            if (f.name not in tree and f.default is MISSING and f.default_factory is MISSING) or (
                f.name in tree and tree[f.name] is None
            ):
                tree[f.name] = {}
            if isinstance(tree.get(f.name), dict):
                _fill(tree[f.name], section)


# ---------------------------------------------------------------- messages


def _first(errors: Sequence[Any], tree: dict[str, Any], kind: str) -> ConfigError:
    """The one of pydantic's complaints to tell: an unknown key, else a wrong value, else all keys that are missing."""
    if errors[0]["type"] == "json_invalid":  # half a character (\\ud800), or hundreds of brackets
        return ConfigError(
            f"the config for tether {kind} cannot be read ({errors[0]['msg']}). Check its texts and lists."
        )
    found = [(_locate(error["loc"], tree), error["type"]) for error in errors]
    if unknown := [key for (key, _), what in found if what == "unexpected_keyword_argument"]:
        return _unknown(unknown[0], kind)
    missing = [key for (key, value), what in found if what == "missing" and value is MISSING]
    wrong = [(at, what) for at, what in found if at[0] not in missing]
    for (key, value), what in wrong:
        if any(other.startswith(f"{key}{mark}") for other in [*missing, *(k for (k, _), _ in wrong)] for mark in ".["):
            continue  # the other type that it might be is the one that was meant
        return (
            not_finite(key, value)
            if what == "finite_number" and isinstance(value, float)
            else _misfit(key, value, hint_at(KINDS[kind].config, key))
        )
    return ConfigError(
        f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing, and no default would be right. "
        f"Add to the YAML file, or give {' '.join(f'--{name} …' for name in missing)}."
    )


def _locate(loc: Sequence[str | int], tree: Any) -> tuple[str, Any]:
    """The dotted key and the value in the tree of what pydantic complains of; MISSING where it is not there."""
    key, node = "", tree
    for part in loc:
        if isinstance(node, list) and isinstance(part, int) and part < len(node):
            key, node = f"{key}[{part}]", node[part]
        elif isinstance(node, dict) and part in node:
            key, node = f"{key}.{part}", node[part]
        elif isinstance(node, dict) and part == loc[-1]:
            key, node = f"{key}.{part}", MISSING
        # else: the name that pydantic gives the member of a union
    return key.removeprefix("."), node


# Numbers that have a second one beside them, where a pair would be written otherwise.
_ONE_SHAPE = {"ppo.clip": "ppo.clip_high", "ppo.lam": "ppo.critic_lam"}


def _misfit(key: str, value: Any, hint: Any) -> ConfigError:
    advice = ""
    if str in members(hint) and isinstance(value, (int, float)):
        advice = " Put it in quotes."
    if key in _ONE_SHAPE and isinstance(value, (list, dict)):
        low, high = [*(value if isinstance(value, list) else value.values()), "…", "…"][:2]
        advice = f" Write {key}: {low} and {_ONE_SHAPE[key]}: {high}."
    if key == "reward" and isinstance(value, str):
        name = value.rpartition(":")[2] if ":" in value else ""
        named = f", name: my_{name}" if name in RESERVED_NAMES else ""
        source = f"{{function: {value}{named}}}" if name else f"{{model: {value}}}"
        advice = f" Write reward: [{source}]; as a flag, --reward '[{source}]'."
    return ConfigError(f"{key}={in_yaml(value)}: expected {describe(hint)}.{advice}")


def _unknown(key: str, kind: str) -> ConfigError:
    """An unknown key, and the one that was probably meant."""
    others = [other.command for other in KINDS.values() if hint_at(other.config, key) is not None]
    if others:
        *first, last = others
        whose, those = f"{', '.join(first)} and {last}" if first else last, "one of those" if first else "that"
        return ConfigError(
            f"unknown key {key} for tether {kind}: it is one of tether {whose}. Drop it, or run {those}."
        )
    meant = " or ".join(_meant(key, [k.name for k in keys(KINDS[kind].config)]))
    if meant:
        return ConfigError(f"unknown key {key} for tether {kind}: did you mean {meant}?")
    return ConfigError(
        f"unknown key {key} for tether {kind}: nothing would read it. tether {kind} --help lists all keys."
    )


def _meant(key: str, known: Sequence[str]) -> list[str]:
    """The known keys that an unknown one may stand for, the surest rule first."""
    section, _, leaf = key.rpartition(".")
    beside = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    if near := difflib.get_close_matches(leaf, beside, n=1, cutoff=0.79):  # misspelled
        return [beside[near[0]]]
    words = sorted(re.split(r"[._]", key))
    if turned := [name for name in known if sorted(re.split(r"[._]", name)) == words]:  # ppo.lam.critic
        return turned
    if section in known and not beside:  # below a key that has none below it
        return [section]
    endings: dict[str, list[str]] = {}  # "pppklcoef", "klcoef" and "coef" all mean ppo.kl.coef
    for name in known:
        parts = name.split(".")
        for i in range(len(parts)):
            endings.setdefault(_squash(".".join(parts[i:])), []).append(name)
    if elsewhere := endings.get(_squash(leaf)):  # right, in the wrong section
        return sorted(elsewhere, key=lambda name: -difflib.SequenceMatcher(None, name, key).ratio())[:3]
    for attempt in (key, leaf):
        for match in difflib.get_close_matches(_squash(attempt), endings, n=1, cutoff=0.79):
            return [name for name in endings[match] if _squash(name) == match] or endings[match][:3]
    return []


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
        tree = _yaml().load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}" if mark else f"{path}"
        problem = "a tab indents here; use spaces" if "\\t" in str(error.problem) else error.problem
        raise ConfigError(f"{where}: not YAML: {problem}.") from None
    except ReaderError as error:
        at = text[: error.position].count("\n") + 1
        raise ConfigError(f"{path}, line {at}: not YAML: character #x{error.character:04x} is not allowed.") from None
    except (RecursionError, ValueError) as error:  # a thousand brackets, a number of a thousand digits
        raise ConfigError(f"{path} is not a config: {error}. Check its brackets and numbers.") from None
    if tree is None:
        raise ConfigError(f"{path} is empty: nothing says what to run. Write at least the keys without a default.")
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}, line 1: the file holds {in_yaml(tree)}, not keys. Write lines of the form key: value."
        )
    return tree


class _Constructor(SafeConstructor):
    """Keys are plain words, each given once."""

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[str, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                raise MarkedYAMLError(problem="a key must be a plain word", problem_mark=key.start_mark)
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise MarkedYAMLError(problem=f"key {key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
            key.tag = "tag:yaml.org,2002:str"  # 1, true and null are names here
        return super().construct_mapping(node, deep)  # type: ignore[no-any-return]


class _Emitter(Emitter):
    """Quotes a text with the line break of YAML 1.1, which would be read as a space."""

    def analyze_scalar(self, scalar: str) -> Any:
        analysis = super().analyze_scalar(scalar)
        if "\x85" in scalar:
            analysis.allow_flow_plain = analysis.allow_block_plain = False
            analysis.allow_single_quoted = analysis.allow_block = False
        return analysis


class _Representer(SafeRepresenter):
    """Writes no anchors, and 1.0e-05 for 1e-05, which readers of YAML 1.1 would take for text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_float(self, data: float) -> ScalarNode:
        node = super().represent_float(data)
        if "." not in node.value:
            node.value = node.value.replace("e", ".0e")
        return node


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)  # a date is text
_Representer.add_representer(float, _Representer.represent_float)


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor, yaml.Representer, yaml.Emitter = _Constructor, _Representer, _Emitter
    yaml.default_flow_style, yaml.width = False, 120
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml
