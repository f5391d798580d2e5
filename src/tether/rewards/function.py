"""Scores from a Python function: the user's own code, treated as such.

    def helpful(prompts, completions, completion_ids, **columns) -> list[float | None]

It is called once per cycle with all rows in order, may be async, and may answer None for a row it has no opinion on.
Whatever else it does (raise, hang, return one number too few, NaN) becomes a `RewardError` that names row or line.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedTokenizerBase

from tether.data.text import completion_text
from tether.errors import RewardError, TetherError, did_you_mean, did_you_mean_path
from tether.types import Completions, Prompt, Reward, Text

RewardFunction = Callable[..., Any]

_ARGUMENTS = ("prompts", "completions", "completion_ids")


@dataclass
class FunctionReward:
    """One Python function as a source of scores. tokenizer, stop_ids: the policy's. fixed: arguments of every call."""

    function: RewardFunction
    _: KW_ONLY
    name: str
    tokenizer: PreTrainedTokenizerBase
    stop_ids: Sequence[int]
    timeout_s: float = 60.0
    fixed: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._wanted, self._required = _parameters(self.function)
        self._required -= set(self.fixed)
        for name in self.fixed:
            if name in _ARGUMENTS or (self._wanted is not None and name not in self._wanted):
                takes = sorted((self._wanted or set()) - set(_ARGUMENTS))
                raise RewardError(
                    f"arguments of reward function {self.name} hold {name!r}, which "
                    f"{'every call sets' if name in _ARGUMENTS else 'it does not take'}, so it cannot be called."
                    f"{did_you_mean(name, takes)} It takes: {', '.join(takes) or 'none of its own'}."
                )

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise RewardError if the prompts' columns do not fill the parameters, before anything is sampled."""
        columns = {column for prompt in prompts for column in prompt.columns}
        for name in _ARGUMENTS:
            if name in columns:
                raise RewardError(
                    f"the prompts have a column {name!r}, which is also an argument of every reward function: "
                    f"{self.name} could be given only one of them. Rename the column."
                )
        for name in sorted(columns & set(self.fixed)):
            raise RewardError(
                f"the prompts have a column {name!r}, and arguments of {self.name} give it as well: it could be given "
                "only one of them. Rename the column, or leave the argument out."
            )
        for name in sorted(self._required - columns - set(_ARGUMENTS)):
            raise RewardError(
                f"reward function {self.name} needs {name!r}, but the prompts have no such column, so it cannot be "
                f"called.{did_you_mean(name, [*sorted(columns), *_ARGUMENTS])} Columns: "
                f"{', '.join(sorted(columns)) or 'none'}; always there: {', '.join(_ARGUMENTS)}. Add the column, set "
                "it in `arguments` of this source, or give the parameter a default."
            )

    def score(self, completions: Completions) -> list[float | None]:
        """One call with all B rows. Returns B finite scores, None where the function does not answer."""
        self.check(completions.prompts)
        columns = sorted({column for prompt in completions.prompts for column in prompt.columns})
        arguments: dict[str, Any] = {
            "prompts": [prompt.source for prompt in completions.prompts],
            "completions": read_answers(completions, self.tokenizer, self.stop_ids),
            "completion_ids": [list(ids) for ids in completions.response_ids],
            **{column: [prompt.columns.get(column) for prompt in completions.prompts] for column in columns},
        }
        if self._wanted is not None:
            arguments = {name: value for name, value in arguments.items() if name in self._wanted}
        return read_scores(self._call(arguments | self.fixed, len(completions)), self.name, completions)

    def _call(self, arguments: dict[str, Any], count: int) -> Any:
        """Call the function in a thread of its own: Python cannot stop a function, but we can stop waiting for it."""
        answer: list[Any] = []
        raised: list[BaseException] = []

        def run() -> None:
            try:
                result = self.function(**arguments)
                answer.append(asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result)
            except BaseException as error:  # sys.exit() too: it would end this thread without a word
                raised.append(error)

        thread = threading.Thread(target=run, name=f"reward {self.name}", daemon=True)  # daemon: never blocks the exit
        thread.start()
        thread.join(self.timeout_s)
        if raised:
            raise RewardError(
                f"reward function {self.name} raised {_describe(raised[0])} ({_where(raised[0], self.function)}): "
                "this cycle has no scores. Fix the function and run the same command again."
            ) from raised[0]
        if not answer:
            raise RewardError(
                f"reward function {self.name} did not answer within timeout_s={self.timeout_s:g} seconds for "
                f"{count} completions: this cycle has no scores. Make it faster, or "
                "raise timeout_s of this source."
            )
        return answer[0]


@dataclass
class ObjectReward:
    """Somebody's own object with the methods of `Reward`: what it does wrong becomes a RewardError that names it."""

    reward: Reward
    name: str

    def check(self, prompts: Sequence[Prompt]) -> None:
        with self._blamed():
            self.reward.check(prompts)

    def score(self, completions: Completions) -> list[float | None]:
        with self._blamed():
            answer = self.reward.score(completions)
        return read_scores(answer, self.name, completions)

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        try:
            yield
        except TetherError:
            raise
        except Exception as error:
            raise RewardError(
                f"reward {self.name} raised {_describe(error)} ({_where(error, None)}): this cycle has no scores. Fix "
                "it and run the same command again."
            ) from error


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


# ---------------------------------------------------------------- what the function takes and returns


def _parameters(function: RewardFunction) -> tuple[set[str] | None, set[str]]:
    """(names it takes, or None for any; names it cannot do without)."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return None, set()
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = {p.name for p in by_name if p.default is p.empty}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return None if takes_any else {p.name for p in by_name}, required


def read_scores(answer: Any, name: str, completions: Completions) -> list[float | None]:
    """B finite floats or None, from a list, tuple or one-dimensional array; RewardError names the first wrong row.

    Python, numpy and torch numbers are all numbers; True and False count as 1 and 0.
    """
    if hasattr(answer, "tolist"):  # numpy and torch, of any dtype and device
        answer = answer.tolist()
    if not isinstance(answer, (list, tuple)):
        raise RewardError(
            f"reward {name} returned {_quote(answer)} ({type(answer).__name__}), not a list: it is unclear which score "
            f"belongs to which completion. Return a list of {len(completions)} numbers, one per completion in order."
        )
    if len(answer) != len(completions):
        row = min(len(answer), len(completions))
        what = f"row {row} has no score" if len(answer) < len(completions) else f"row {row} does not exist"
        raise RewardError(
            f"reward {name} returned {len(answer)} scores for {len(completions)} completions: {what}, and the others "
            "may be shifted. Return one per completion, in order; None where there is none."
        )
    return [_read_score(value, name, completions, row) for row, value in enumerate(answer)]


def _read_score(value: Any, name: str, completions: Completions, row: int) -> float | None:
    if value is None:
        return None
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Real):
        raise RewardError(
            f"reward {name} returned {_quote(value)} ({type(value).__name__}) for {describe_row(completions, row)}: a "
            "score is one number. Return a float, or None for no score."
        )
    try:
        score = float(value)
    except OverflowError:
        score = math.inf
    if not math.isfinite(score):
        raise RewardError(
            f"reward {name} returned {value} for {describe_row(completions, row)}: one such score would make every "
            "weight NaN. Return a finite number, or None for no score."
        )
    return score


def read_answers(completions: Completions, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> list[Text]:
    """B texts without the stop token; as the assistant's message where the prompt is messages."""
    texts = [completion_text(tokenizer, ids, stop_ids) for ids in completions.response_ids]
    return [
        text if isinstance(prompt.source, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(completions.prompts, texts, strict=True)
    ]


def refuse_cut(prompts: Sequence[Prompt], name: str) -> None:
    """Raise RewardError where a source, which gets whole prompts, would get more of one than the policy saw."""
    for prompt in prompts:
        if prompt.cut:
            raise RewardError(
                f"the prompt in row {prompt.row} of the data is too long and was cut, and reward {name} would be sent "
                "all of it: it would judge what the policy never saw. Set prompts.overlong: drop, or raise "
                "prompts.max_tokens."
            )


def describe_row(completions: Completions, row: int) -> str:
    """`row 3 (row 17 of the data, 'Once upon a …')`: enough to find it."""
    prompt = completions.prompts[row]
    return f"row {row} (row {prompt.row} of the data, {_quote(prompt.source)})"


def _quote(value: Any, longest: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


# ---------------------------------------------------------------- where the function comes from


def load_function(spec: str) -> RewardFunction:
    """The function that `FILE.py:NAME` or `package.module:NAME` names; it can import the modules beside its file."""
    source, _, name = spec.rpartition(":")
    module = _load_file(Path(source), spec) if source.endswith(".py") else _load_module(source, spec)
    function: Callable[..., Any] | None = getattr(module, name, None)
    if callable(function):
        return function
    names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
    if hasattr(module, name):
        problem = f"{name} in {source} is {_quote(function)}, not a function."
    else:
        problem = f"{source} has no function {name!r}.{did_you_mean(name, names)}"
    raise RewardError(f"reward function {spec}: {problem} It has: {', '.join(sorted(names)) or 'no functions'}.")


def function_file(spec: str) -> str | None:
    """The file that `spec` names, the module's in the working directory included; None for an installed module."""
    source, _, _ = spec.rpartition(":")
    file = Path(source if source.endswith(".py") else f"{source.replace('.', '/')}.py")
    return str(file) if file.is_file() else None


def _load_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        raise RewardError(
            f"reward function {spec}: there is no file {path}. Relative paths are against the working directory, "
            f"{Path.cwd()}.{did_you_mean_path(str(path))}"
        )
    path = path.resolve()
    # A name of its own, so that my_rewards.py neither hides an installed module nor another directory's my_rewards.py,
    # nor what it was itself before it was changed.
    unique = f"{path.stem}_{hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:8]}"
    if unique in sys.modules:
        return sys.modules[unique]
    module_spec = importlib.util.spec_from_file_location(unique, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[unique] = module  # before it runs: dataclasses and pickle look their module up by name
    _importable(path.parent)
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # sys.exit() would end the run as if it were done
        del sys.modules[unique]
        raise _failed_import(spec, error, str(path)) from error
    return module


def _load_module(name: str, spec: str) -> ModuleType:
    _importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _failed_import(spec, error, name) from error  # found, but something that it imports is not
        raise RewardError(
            f"reward function {spec}: there is no module {error.name!r} in the working directory or installed. For a "
            "file, write its path with .py: rewards/mine.py:NAME."
        ) from error
    except (Exception, SystemExit) as error:
        raise _failed_import(spec, error, name) from error


def _importable(directory: Path) -> None:
    """At the end of the path: a file of the user's must not hide an installed package."""
    if str(directory) not in sys.path:
        sys.path.append(str(directory))


def _failed_import(spec: str, error: BaseException, source: str) -> RewardError:
    where = f"{error.filename}:{error.lineno}" if isinstance(error, SyntaxError) else _where(error, None)
    return RewardError(
        f"reward function {spec}: loading {source} raised {_describe(error)} ({where}): nothing could score the "
        "responses. Fix that line."
    )


def _describe(error: BaseException) -> str:
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _where(error: BaseException, function: RewardFunction | None) -> str:
    """FILE:LINE of the innermost line of the user's own code, so not of a library that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    code = getattr(inspect.unwrap(function), "__code__", None) if function is not None else None
    own = [f for f in frames if code is not None and f.filename == code.co_filename]
    library = ("<frozen", sys.base_prefix)
    outside = [
        f
        for f in frames
        if f.filename != __file__ and "site-packages" not in f.filename and not f.filename.startswith(library)
    ]
    frame = (own or outside or list(frames))[-1]
    return f"{frame.filename}:{frame.lineno}"
