"""Try it: one prompt, answered by the model a run began with and by the one it ended with, as they write.

Both answers are drawn with the same random numbers, so what differs is what was learned. Only reward models score here:
a reward function is a program, and a page does not run programs.

The machine may be busy training: models run on the CPU unless the studio was started with another device, on that only
while no run below the folder trains, and they leave memory when nobody asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncIterator, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, StreamingResponse

from tether.config import ModelConfig, PPOConfig, PromptsConfig, RewardSourceConfig, model_paths
from tether.errors import DataError, RunError, TetherError, first_line
from tether.reports.html import safe_json
from tether.reports.text import visible
from tether.runs import Run
from tether.studio.shared import Studio

_LONGEST_PROMPT = 20_000  # characters
_MOST_TOKENS = 512
_MOST_RUNS = 100  # to choose from
Seed = Annotated[int, Query(ge=0, lt=2**31)]
IDLE_S = 300.0  # seconds without a question after which models leave memory


def routes(studio: Studio) -> APIRouter:
    """The pages."""
    router = APIRouter()
    cache = ModelCache()

    @router.get("/try")
    def page(request: Request, run: str = "", prompt: str = "", seed: Seed = 0) -> HTMLResponse:
        choices = [(i, studio.runs.name(found)) for i, found in _finished(studio)]
        device, training = choose_device(studio)
        answers: dict[str, Any] = {}
        if run and prompt:  # without scripts; the page's own asks for /try/stream
            for part in write(cache, studio.runs.open(run), prompt.replace("\r\n", "\n"), seed, device):
                answers[part["side"]] = answers.get(part["side"], {}) | {k: v for k, v in part.items() if v is not None}
        return studio.page(request, "try.html.j2", choices=choices, run=run, prompt=prompt, seed=seed, answers=answers,
                           device=device, training=training)  # fmt: skip

    @router.get("/try/stream")
    async def stream(run: str, prompt: str, seed: Seed = 0) -> StreamingResponse:
        found = await asyncio.to_thread(studio.runs.open, run)
        device, _ = await asyncio.to_thread(choose_device, studio)
        parts = write(cache, found, prompt.replace("\r\n", "\n"), seed, device)
        return StreamingResponse(_events(parts), media_type="text/event-stream")

    return router


def _finished(studio: Studio) -> list[tuple[str, Run]]:
    """Runs with a final model to set beside its start, by path; a damaged one is passed over."""
    found = []
    for run_id in studio.runs.all():
        with contextlib.suppress(RunError):
            run = studio.runs.open(run_id)
            if (run.final / "config.json").exists() and run.kind.tried:
                found.append((run_id, run))
    return found[:_MOST_RUNS]


def choose_device(studio: Studio) -> tuple[str, str | None]:
    """(the device to answer on, the name of the run because of which it is not the one that was asked for).

    A run that trains, or was killed and may be continued any moment, needs the memory of the GPU for itself.
    """
    if studio.device != "cpu":
        for run_id in studio.runs.all():
            with contextlib.suppress(RunError):
                run = studio.runs.open(run_id)
                if run.status.get("state") == "running":
                    return "cpu", studio.runs.name(run)
    return studio.device, None


async def _events(parts: Generator[dict[str, Any], None, None]) -> AsyncIterator[str]:
    """Server-sent events of `write`, as it writes.

    One thread of its own writes from beginning to end: torch's modes belong to a thread. It ends when nobody listens.
    """
    loop, events = asyncio.get_running_loop(), asyncio.Queue[str | None]()
    disconnected = threading.Event()

    def answer() -> None:
        def put(event: str | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            for part in parts:
                if disconnected.is_set():
                    return
                put(f"data: {safe_json(part)}\n\n")
        except Exception as error:  # out of memory, a model that does not run here: the page says which
            text = str(error) if isinstance(error, TetherError) else f"{type(error).__name__}: {first_line(error)}"
            put(f"event: refused\ndata: {safe_json(visible(text))}\n\n")
        finally:
            parts.close()  # in this thread: models leave memory, and the next question may come
            put(None)

    threading.Thread(target=answer, name="try", daemon=True).start()
    try:
        while (event := await events.get()) is not None:
            yield event
        yield "event: done\ndata: {}\n\n"
    finally:
        disconnected.set()


def write(cache: ModelCache, run: Run, prompt: str, seed: int, device: str) -> Generator[dict[str, Any], None, None]:
    """What each side has written so far, after every token.

    side: before or after. text: all of it so far. value: the critic's estimate before that token; None before, which
    has no critic. score: once it is done, of the run's reward models; None if it has none. done.

    To be run in one thread from beginning to end.
    """
    if len(prompt) > _LONGEST_PROMPT:
        raise DataError(f"the prompt has {len(prompt):,} characters, more than {_LONGEST_PROMPT:,}. Shorten it.")
    if not prompt:
        raise DataError("the prompt is empty: there is nothing to answer. Write one.")
    if not (run.final / "config.json").exists():
        raise RunError(f"{run.path.name} has no final model yet: there is nothing to compare. Choose a finished run.")
    with cache.models(run, device) as models:
        for side in ("before", "after"):
            yield from models.write(side, prompt, seed)


class ModelCache:
    """The models of the run that was asked last, for one answer at a time; those on the CPU stay for a while."""

    def __init__(self) -> None:
        self._in_use = threading.Lock()
        self._key: tuple[object, ...] | None = None
        self._models: Models | None = None
        self._timer: threading.Timer | None = None

    @contextlib.contextmanager
    def models(self, run: Run, device: str) -> Iterator[Models]:
        """A finished run's models; RunError while they answer somebody else."""
        if not self._in_use.acquire(blocking=False):
            raise RunError("another answer is being written: one at a time, since they share this machine. "
                           "Ask again soon.")  # fmt: skip
        try:
            if self._timer is not None:
                self._timer.cancel()
            key = (run.path, (run.final / "config.json").stat().st_mtime_ns, device)
            if self._models is None or key != self._key:
                self._drop()  # before others are loaded: there may not be room for both
                self._models, self._key = _load(run, device), key
            yield self._models
        finally:
            if device != "cpu":
                self._drop()  # a run may begin to train at any time
            else:
                self._timer = threading.Timer(IDLE_S, self._expire)
                self._timer.daemon = True
                self._timer.start()
            self._in_use.release()

    def _expire(self) -> None:
        if self._in_use.acquire(blocking=False):  # else somebody asks at this moment, and starts another timer
            self._drop()
            self._in_use.release()

    def _drop(self) -> None:
        if self._models is None:
            return
        import torch

        self._models = self._key = None
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Models:
    """A run's first and last model, its critic, and its reward models."""

    config: PPOConfig
    tokenizer: Any
    policy: Any  # Policy, the last one
    samplers: dict[str, Any]  # side -> LocalSampler
    stops: dict[str, tuple[int, ...]]  # side -> the tokens that end its answers
    rewards: Any  # RewardSet, or None

    def write(self, side: str, prompt: str, seed: int) -> Iterator[dict[str, Any]]:
        """See `write`."""
        import torch

        from tether.data.prompts import prompts_of
        from tether.data.table import Table
        from tether.data.text import completion_text
        from tether.models.loading import context_length
        from tether.types import GENERATE, Sampling

        s, tokenizer, sampler = self.config.sampling, self.tokenizer, self.samplers[side]
        limit = min(s.max_new_tokens, _MOST_TOKENS)
        asked: Any = [{"role": "user", "content": prompt}] if tokenizer.chat_template else prompt
        anywhere = PromptsConfig("the prompt", max_tokens=10**9)
        table, context = Table("the prompt", [{"prompt": asked}]), context_length(sampler.model.config)
        (encoded,) = prompts_of(table, anywhere, tokenizer, max_new_tokens=limit, context=context)
        stops = self.stops[side]
        sampling = Sampling(s.temperature, s.top_k, s.top_p, limit, stops, 1, seed, GENERATE)
        with torch.no_grad():
            for count, batch in enumerate(sampler.steps([encoded], sampling, cycle=0), start=1):
                ids = batch.ids[0, :count].tolist()
                value = self._value(batch.hidden, encoded.ids, ids[:-1]) if side == "after" else None
                text = visible(completion_text(tokenizer, ids, stops))
                yield {"side": side, "text": text, "value": value, "score": None, "done": False}
            score = float(self.rewards.score(batch.completions()).scores[0]) if self.rewards else None
        yield {"side": side, "text": text, "value": None, "score": score, "done": True}

    def _value(self, hidden: Any, prompt: tuple[int, ...], ids: list[int]) -> float | None:
        """V before the next token: off the policy's own hidden state, or by a critic of its own, off the whole text."""
        from tether.models.policy import read_values
        from tether.types import Rows

        policy = self.policy
        if policy.critic is not None:
            return float(policy.critic(Rows.of([prompt], [[*ids, 0]]).to(policy.model.device))[-1])
        return None if policy.model.use_full_logits else float(read_values(policy.value_head, hidden)[0])


def _load(run: Run, device_name: str) -> Models:
    from tether.data.tokenizer import load_tokenizer, stop_token_ids
    from tether.models.language_model import LanguageModel
    from tether.models.loading import load_causal_lm, resolve_device
    from tether.models.policy import build_policy
    from tether.rewards import build_reward
    from tether.samplers.local import LocalSampler

    config = run.config
    if not isinstance(config, PPOConfig):
        raise RunError(f"{run.path} is not a run of tether ppo: it has no critic. Choose one that is.")
    home = Path(run.environment.get("directory") or Path.cwd())
    start = _placed(config.model.policy, home)
    critic = run.final / "critic"
    separate = (critic / "config.json").exists()
    device = resolve_device(device_name)
    where: dict[str, Any] = {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}
    policy, _, _ = build_policy(
        ModelConfig(
            policy=str(run.final), critic=str(critic) if separate else "shared",
            dtype=config.model.dtype, trust_remote_code=config.model.trust_remote_code,
        ),
        device=device, seed=0,
    )  # fmt: skip
    if not separate and critic.exists():
        policy.load_critic(critic)
    dtype = policy.model.dtype
    before = LanguageModel(
        load_causal_lm(start, dtype=dtype, device=device, **where).eval().requires_grad_(False), dtype
    )
    before.check_head()
    tokenizer = load_tokenizer(str(run.final), trust_remote_code=config.model.trust_remote_code)
    models = {"before": before, "after": policy.eval().requires_grad_(False).model}
    stops = {
        side: stop_token_ids(tokenizer, model.hf_model.generation_config, config.sampling.stop_token_ids)
        for side, model in models.items()
    }
    samplers = {side: LocalSampler(model, slots=1) for side, model in models.items()}
    sources: list[RewardSourceConfig] = [
        replace(
            s, model=s.model and _placed(s.model, home), models=s.models and [_placed(path, home) for path in s.models]
        )
        for s in config.reward
        if model_paths(s)
    ]
    rewards = build_reward(sources, config.reward_shaping, tokenizer, stops["after"], device) if sources else None
    return Models(config, tokenizer, policy, samplers, stops, rewards)


def _placed(path: str, home: Path) -> str:
    """A model's path as it was meant where the run was started; a hub id stays one."""
    return str(home / path) if (home / path).exists() else path
