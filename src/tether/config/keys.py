"""The dotted keys of a config: type, bound, default and help of each, read from the dataclasses.

The command line, its help and the messages about wrong keys all speak of `ppo.kl.coef`; the dataclasses in sections and
in each command's file are the only place where such a key is written down. This module is the bridge.
"""

from __future__ import annotations

import ast
import inspect
import json
import math
import re
import reprlib
import sys
import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Section:
    """A part of a config: a frozen dataclass whose fields are its keys, the text under a field its help."""

    __pydantic_config__ = {"extra": "forbid", "strict": True, "allow_inf_nan": False}  # noqa: RUF012  pydantic's name

    def check(self, key: str) -> None:
        """Raise ConfigError where keys of this section contradict each other. key: where the section stands."""


@dataclass(frozen=True)
class Bound:
    """The range of a number, or of each in a list; what would go wrong outside of it, and what to do."""

    holds: Any  # a function of the number
    outside: str  # "below 1"
    why: str
    remedy: str

    def complaint(self, key: str, value: float) -> str | None:
        """The message where the value is out of range; None where it is not."""
        if self.holds(value):
            return None
        return f"{key}={value} is {self.outside}: {self.why}. {self.remedy.format(key=key)}"


def at_least(low: float, why: str) -> Bound:
    return Bound(lambda v: v >= low, f"below {low:g}", why, f"Set {{key}} to {low:g} or more.")


def positive(why: str) -> Bound:
    return Bound(lambda v: v > 0, "not above 0", why, "Set {key} to a positive number.")


def within(low: float, high: float, why: str, remedy: str = "Set {key} between 0 and 1.", *, ends: str = "[]") -> Bound:
    def holds(v: float) -> bool:
        return (low < v or (ends[0] == "[" and v == low)) and (v < high or (ends[1] == "]" and v == high))

    top = f"2^{math.log2(high):g}" if high > 1e6 else f"{high:g}"
    return Bound(holds, f"outside {ends[0]}{low:g}, {top}{ends[1]}", why, remedy)


@dataclass(frozen=True)
class Key:
    """One key of a config, as YAML and flags name it."""

    name: str  # dotted, "[]" after a list: ppo.kl.coef, reward[].function
    hint: Any  # its type
    default: Any  # MISSING where the user has to give one
    help: str  # the text under the field; for a section, the section's own


def keys(cls: type, prefix: str = "") -> Iterator[Key]:
    """Every key of `cls` in the order of its fields, each followed by the keys under it."""
    for f in fields(cls):
        hint = hints(cls)[f.name]
        default = f.default if f.default_factory is MISSING else f.default_factory()
        yield Key(prefix + f.name, hint, default, _help_of(cls, f.name) or _summary(hint))
        for member in members(hint):
            below = get_args(member)[0] if get_origin(member) is list else member
            if is_section(below):
                yield from keys(below, f"{prefix}{f.name}{'' if below is member else '[]'}.")


def leaves(section: Section, prefix: str = "") -> Iterator[tuple[str, Any, Bound | None]]:
    """(dotted key, value, bound) of every value; a section is a value too, and stands before those below it."""
    yield prefix.removesuffix("."), section, None
    cls: Any = type(section)
    for f in fields(section):
        key, value = prefix + f.name, getattr(section, f.name)
        bound = next((b for b in _metadata(cls, f.name) if isinstance(b, Bound)), None)
        items = [(f"{key}[{i}]", item) for i, item in enumerate(value)] if isinstance(value, list | tuple) else []
        for name, item in items or [(key, value)]:
            if isinstance(item, Section):
                yield from leaves(item, f"{name}.")
            else:
                yield name, item, bound


def hint_at(cls: type, name: str) -> Any | None:
    """Type of the dotted key `name`; None where there is no such key. Below a free mapping any key is right."""
    hint: Any = cls
    for part in re.findall(r"\[\d*\]|[^.\[\]]+", name):
        found = None
        for member in members(hint):
            if part[0] == "[":
                found = get_args(member)[0] if get_origin(member) in (list, tuple) else found
            elif is_section(member):
                found = hints(member).get(part, found)
            elif member is Any or get_origin(member) is dict:
                found = Any
        if found is None:
            return None
        hint = found
    return hint


def is_section(hint: Any) -> bool:
    """Whether a type is a part of a config."""
    return isinstance(hint, type) and issubclass(hint, Section)


def members(hint: Any) -> tuple[Any, ...]:
    """The members of a union; any other type is its own only member."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


@cache
def hints(cls: Any) -> dict[str, Any]:
    """Resolved types of a dataclass's fields, without their bounds."""
    return get_type_hints(cls)


@cache
def _metadata(cls: Any, name: str) -> tuple[Any, ...]:
    hint = get_type_hints(cls, include_extras=True)[name]
    return hint.__metadata__ if get_origin(hint) is Annotated else ()


def _help_of(cls: type, name: str) -> str | None:
    """The text under a field, in the class or in the one that it has the field from."""
    texts = (_field_help(base.__module__).get(base.__name__, {}).get(name) for base in cls.__mro__[:-1])
    return next((text for text in texts if text), None)


@cache
def _field_help(module: str) -> dict[str, dict[str, str]]:
    """The string under each field of each class of a module. Python drops these strings, read from source."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {}
            for statement, below in pairwise(node.body):
                match statement, below:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        found[node.name][name] = " ".join(text.split())
    return found


def describe(hint: Any) -> str:
    """A type in words: `float | None` is "a number or null"."""
    return " or ".join(_describe_one(member) for member in members(hint))


def _describe_one(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(str(value) for value in args)
    if origin in (list, tuple):
        return f"a list{f' of {len(args)}' if origin is tuple else ''} ({describe(args[0])} each)"
    if is_section(hint):
        names = list(hints(hint))
        return "a mapping {" + ", ".join(names[:4] + ["…"] * (len(names) > 4)) + "}"
    words = {type(None): "null", str: "text", bool: "true or false", int: "a whole number", float: "a number"}
    return words.get(hint, "a mapping")


def in_yaml(value: Any) -> str:
    """A value as YAML writes it on one line, shortened if it is long."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return reprlib.repr(list(value) if isinstance(value, tuple) else value)


def _summary(hint: Any) -> str:
    return " ".join((inspect.getdoc(hint) or "").split()) if is_section(hint) else ""
