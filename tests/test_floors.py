"""The house stands: imports go down a floor, or sideways without a circle, wherever in a file they are written."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "tether"

FLOORS = [
    {"background", "errors", "config", "types", "statistics", "remote"},
    {"math"},
    {"models", "data", "distributed", "feedback", "runs"},
    {"samplers", "rewards"},
    {
        "train",
        "diagnose",
        "feedback.items",
        "feedback.judge",
        "feedback.probe",
        "feedback.progress",
        "feedback.revise",
        "feedback.reviser",
        "feedback.uncertain",
    },
    {"studio", "reports", "demo", "serving", "cli", "__main__"},
]
WITH_SHAPES = ("torch", "jaxtyping")  # jaxtyping for annotations only: production does not load it (test_shapes.py)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def floor_of(module: str) -> int | None:
    """The floor of a module below `tether`: its own, where it has one, or its room's."""
    parts = module.split(".")
    return FLOOR_OF.get(".".join(parts[:2]), FLOOR_OF.get(parts[0]))


def modules(source: Path) -> dict[str, Path]:
    """Every module below `source` by its dotted name; the package itself, which may name anything, is left out."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found.pop("tether", None)
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules that a file names in an import, at its top or inside a function; our own with their full name."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base


def complaints(source: Path) -> list[str]:
    """What is wrong with the house, one line each."""
    known = modules(source)
    found = []
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        room = name.split(".")[1]
        floor = floor_of(name.removeprefix("tether."))
        if floor is None:
            found.append(f"{name} has no floor: add it to FLOORS")
            continue
        graph[name] = set()
        for target in imports(name, path, known):
            top, *rest = target.split(".")
            if top != "tether":
                if floor == 0 and top not in {
                    *sys.stdlib_module_names,
                    "pydantic",
                    "ruamel",
                    *(WITH_SHAPES if room == "types" else []),
                }:
                    found.append(f"{name} imports {target}: floor 0 is pydantic, ruamel.yaml and the standard library")
                if floor == 1 and top not in {*sys.stdlib_module_names, *WITH_SHAPES}:
                    found.append(f"{name} imports {target}: floor 1 is torch and the standard library")
            elif not rest:
                if floor < 5:
                    found.append(f"{name} imports tether, which names every floor")
            elif (floor_of(".".join(rest)) if floor_of(".".join(rest)) is not None else 9) > floor:
                found.append(f"{name} on floor {floor} imports {target} above it")
            elif floor == 1 and rest[0] not in ("math", "errors"):
                found.append(f"{name} imports {target}: arithmetic knows no config")
            elif target != name:
                graph[name].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("a circle: " + " → ".join(error.args[1]))
    return found


def test_imports_go_down_or_sideways_without_a_circle():
    assert complaints(SOURCE) == []


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"models/policy.py": "from tether.train.ppo import ppo", "train/ppo.py": ""}, "above it"),
        ({"models/policy.py": "def f():\n    import tether.samplers", "samplers/__init__.py": ""}, "above it"),
        ({"feedback/store.py": "from tether.feedback.items import label", "feedback/items.py": ""}, "above it"),
        ({"runs/reader.py": "from ..cli import main", "cli.py": ""}, "above it"),
        ({"train/sft.py": "import tether"}, "names every floor"),
        ({"math/kl.py": "from tether.config import check", "config.py": ""}, "arithmetic knows no config"),
        ({"math/kl.py": "import numpy"}, "floor 1 is torch"),
        ({"config.py": "def f():\n    import torch"}, "floor 0 is pydantic"),
        ({"data.py": "import tether.runs", "runs.py": "from tether import data"}, "a circle"),
        ({"math/__init__.py": "from tether.math.kl import k1", "math/kl.py": "from tether.math import k2"}, "a circle"),
        ({"attic.py": ""}, "has no floor"),
    ],
)
def test_a_house_with_one_wrong_import_is_refused(tmp_path, files, complaint):
    for name, text in files.items():
        path = tmp_path / "tether" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert [line for line in complaints(tmp_path / "tether") if complaint in line]


@pytest.mark.parametrize(
    "statement",
    [
        "import tether; tether.load_config; tether.PPOConfig; tether.ConfigError; tether.__version__",
        "import tether.config, tether.config.keys, tether.config.reading, tether.errors",
        "import tether.cli; tether.cli.main(['--help'])",
        "import tether.cli; tether.cli.main(['ppo', '--help'])",
        "import tether.cli; tether.cli.main(['evaluate', '--help'])",
        "import tether.feedback.store, tether.feedback.agreement, tether.statistics",
    ],
)
def test_import_and_help_load_no_torch(statement):
    code = f"{statement}\nimport sys\nassert not {{'torch', 'transformers', 'numpy'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


def test_no_module_is_named_like_a_public_function():
    # importing a module puts it into its package under its name: it would take the function's place
    import tether

    assert not {name for name in tether._HOME if (SOURCE / name).exists() or (SOURCE / f"{name}.py").exists()}


def test_public_names_are_typed_and_listed():
    import tether

    listed = set(tether._HOME) | {"__version__"}
    assert set(tether.__all__) == listed == set(dir(tether))


def test_the_architecture_page_names_every_file_and_no_other():
    page = (SOURCE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([a-z_/]+\.py)` \|", page, re.M))
    files = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py") if path.name != "__init__.py"}
    assert listed == files
    floors = {
        int(n): set(re.findall(r"`([a-z_/]+?)(?:/|\.py)`", rooms))
        for n, rooms in re.findall(r"^\| (\d) \| (.*?) \|", page, re.M)
    }
    assert floors == {n: {room.replace(".", "/") for room in rooms} for n, rooms in enumerate(FLOORS)}
