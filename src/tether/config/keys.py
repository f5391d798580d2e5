"""The dotted keys of a config: type, default and help of each, read from the dataclasses.

The command line, its help and the messages about wrong keys all speak of `ppo.kl.coef`; the dataclasses in
`tether.config.sections` are the only place where such a key is written down. This module is the bridge.
"""

from __future__ import annotations

import ast
import inspect
import json
import reprlib
import sys
import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints


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
            if is_section(member):
                yield from keys(member, f"{prefix}{f.name}.")
            elif get_origin(member) is list and is_section(get_args(member)[0]):
                yield from keys(get_args(member)[0], f"{prefix}{f.name}[].")


def hint_at(cls: type, name: str) -> Any | None:
    """Type of the dotted key `name`; None where there is no such key. Below a free mapping any key is right."""
    hint: Any = cls
    for part in name.split("."):
        found = None
        for member in members(hint):
            if is_section(member):
                found = hints(member).get(part, found)
            elif member is Any or get_origin(member) is dict:
                found = Any
        if found is None:
            return None
        hint = found
    return hint


def required(cls: type, prefix: str = "") -> list[str]:
    """Dotted keys below `cls` that have no default."""
    names = []
    for f in fields(cls):
        if f.default is MISSING and f.default_factory is MISSING:
            hint = hints(cls)[f.name]
            name = prefix + f.name
            names += required(hint, f"{name}.") if is_section(hint) else [name]
    return names


def is_section(hint: Any) -> TypeGuard[type]:
    """Whether a type is one of the config's dataclasses."""
    return isinstance(hint, type) and is_dataclass(hint)


def members(hint: Any) -> tuple[Any, ...]:
    """The members of a union; any other type is its own only member."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


@cache
def hints(cls: type) -> dict[str, Any]:
    """Resolved types of a dataclass's fields."""
    return get_type_hints(cls)


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
    if hint is type(None):
        return "null"
    if origin is Literal:
        return " or ".join(str(value) for value in args)
    if origin is list:
        return f"a list ({describe(args[0])} each)"
    if origin is tuple:
        return f"a list of {len(args)} ({describe(args[0])} each)"
    if is_section(hint):
        names = [f.name for f in fields(hint)]
        return "a mapping {" + ", ".join(names[:4] + ["…"] * (len(names) > 4)) + "}"
    if origin is dict:
        return "a mapping"
    return {str: "text", bool: "true or false", int: "a whole number", float: "a number"}[hint]


def in_yaml(value: Any) -> str:
    """A value as YAML writes it on one line, shortened if it is long."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return reprlib.repr(list(value) if isinstance(value, tuple) else value)


def _summary(hint: Any) -> str:
    return " ".join((inspect.getdoc(hint) or "").split()) if is_section(hint) else ""
