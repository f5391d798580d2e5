"""The shape of the trainers: a loop that fits on a screen, and parts with types."""

import ast
from pathlib import Path

TRAIN = Path(__file__).parents[2] / "src" / "tether" / "train"


def test_the_loop_of_ppo_is_at_most_fifteen_lines():
    (loop,) = (n for n in ast.walk(ast.parse((TRAIN / "ppo.py").read_text())) if isinstance(n, ast.While))
    assert loop.body[-1].end_lineno - loop.body[0].lineno + 1 <= 15


def test_no_function_of_a_trainer_returns_just_anything():
    for file in TRAIN.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.returns:
                assert ast.unparse(node.returns) != "Any", f"{file.name}:{node.lineno} {node.name}"
