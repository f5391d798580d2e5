"""Try it: one prompt, answered by the model a run began with and by the one it ended with, as they write.

Both answers are drawn with the same random numbers, so what differs is what was learned. Only reward models score here:
a reward function is a program, and a page does not run programs.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, StreamingResponse

from tether.config import ModelConfig, PPOConfig, PromptsConfig, RewardSourceConfig
from tether.errors import DataError, RunError, TetherError, first_line
from tether.reports.text import visible
from tether.runs import Run
from tether.studio.shared import Studio
from tether.studio.tokens import safe_json

_LONGEST_PROMPT = 20_000  # characters
_MOST_TOKENS = 512
_MOST_RUNS = 100  # to choose from
Seed = Annotated[int, Query(ge=0, lt=2**31)]
_busy = threading.Lock()  # one answer at a time: the machine is a person's own


def routes(studio: Studio) -> APIRouter:
    """The pages."""
    router = APIRouter()

    @router.get("/try")
    def page(request: Request, run: str = "", prompt: str = "", seed: Seed = 0) -> HTMLResponse:
        choices = [(i, studio.runs.name(found)) for i, found in _finished(studio)]
        answers: dict[str, Any] = {}
        if run and prompt:  # without scripts; the page's own asks for /try/stream
            for said in write(studio.runs.open(run), prompt.replace("\r\n", "\n"), seed):
                answers[said["side"]] = answers.get(said["side"], {}) | {k: v for k, v in said.items() if v is not None}
        return studio.page(request, "try.html.j2", choices=choices, run=run, prompt=prompt, seed=seed, answers=answers)

    @router.get("/try/stream")
    async def stream(run: str, prompt: str, seed: Seed = 0) -> StreamingResponse:
        found = await asyncio.to_thread(studio.runs.open, run)
        return StreamingResponse(_events(found, prompt.replace("\r\n", "\n"), seed), media_type="text/event-stream")

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


async def _events(run: Run, prompt: str, seed: int) -> AsyncIterator[str]:
    """Server-sent events: what is written, as it is written.

    One thread of its own writes from beginning to end: torch's modes belong to a thread. It ends when nobody listens.
    """
    loop, said = asyncio.get_running_loop(), asyncio.Queue[str | None]()
    left = threading.Event()

    def answer() -> None:
        def put(event: str | None) -> None:
            loop.call_soon_threadsafe(said.put_nowait, event)

        try:
            for so_far in write(run, prompt, seed):
                if left.is_set():
                    return
                put(f"data: {safe_json(so_far)}\n\n")
        except Exception as error:  # out of memory, a model that does not run here: the page says which
            text = str(error) if isinstance(error, TetherError) else f"{type(error).__name__}: {first_line(error)}"
            put(f"event: refused\ndata: {safe_json(visible(text))}\n\n")
        finally:
            put(None)

    threading.Thread(target=answer, name="try", daemon=True).start()
    try:
        while (event := await said.get()) is not None:
            yield event
        yield "event: done\ndata: {}\n\n"
    finally:
        left.set()


def write(run: Run, prompt: str, seed: int) -> Iterator[dict[str, Any]]:
    """What each side has written so far, after every token.

    side: before or after. text: all of it so far. value: the critic's estimate before that token; None before, which
    has no critic. score: once it is done, of the run's reward models; None if it has none. done.

    To be run in one thread from beginning to end.
    """
    if len(prompt) > _LONGEST_PROMPT:
        raise DataError(f"the prompt has {len(prompt):,} characters, more than {_LONGEST_PROMPT:,}. Shorten it.")
    if not prompt:
        raise DataError("the prompt is empty: there is nothing to answer. Write one.")
    final = run.final / "config.json"
    if not final.exists():
        raise RunError(f"{run.path.name} has no final model yet: there is nothing to compare. Choose a finished run.")
    if not _busy.acquire(blocking=False):
        raise RunError("another answer is being written: one at a time, since they share this machine. Ask again soon.")
    try:
        models = _load(str(run.path), final.stat().st_mtime_ns)
        for side in ("before", "after"):
            yield from models.write(side, prompt, seed)
    finally:
        _busy.release()


@dataclass(frozen=True)
class Models:
    """A run's first and last model, its critic, and its reward models."""

    config: PPOConfig
    tokenizer: Any
    policy: Any  # Policy, the last one
    start: Any  # LanguageModel
    rewards: Any  # RewardSet, or None
    cached: bool  # whether they decode through the slot cache

    def write(self, side: str, prompt: str, seed: int) -> Iterator[dict[str, Any]]:
        """See `write`."""
        import torch

        from tether.data.prompts import prompts_of
        from tether.data.table import Table
        from tether.data.text import completion_text
        from tether.data.tokenizer import stop_token_ids
        from tether.models.loading import context_length
        from tether.samplers.draw import draw
        from tether.samplers.local import Recompute
        from tether.samplers.slots import SlotCache
        from tether.samplers.uniforms import uniforms
        from tether.types import GENERATE, Completions

        sampling, tokenizer = self.config.sampling, self.tokenizer
        limit = min(sampling.max_new_tokens, _MOST_TOKENS)
        asked: Any = [{"role": "user", "content": prompt}] if tokenizer.chat_template else prompt
        anywhere = PromptsConfig("the prompt", max_tokens=10**9)
        table, context = Table("the prompt", [{"prompt": asked}]), context_length(self.start.plain.config)
        (encoded,) = prompts_of(table, anywhere, tokenizer, max_new_tokens=limit, context=context)
        model = self.policy.model if side == "after" else self.start
        stops = stop_token_ids(tokenizer, model.plain.generation_config, sampling.stop_token_ids)
        kind = SlotCache if self.cached else Recompute
        chance = torch.from_numpy(uniforms(seed, GENERATE, 0, 0, limit))
        ids: list[int] = []
        text = ""
        with torch.inference_mode(), model.autocast():
            decoder = kind(model, slots=1, width=len(encoded.ids) + limit)
            one = torch.zeros(1, dtype=torch.long, device=model.device)
            hidden = decoder.admit(torch.tensor([encoded.ids], device=model.device), one + len(encoded.ids), 0, one)
            for t in range(limit):
                logits = hidden if model.full else model.output_head().logits(hidden)
                value = self._value(hidden, encoded.ids, ids) if side == "after" else None
                drawn = draw(logits, chance[t : t + 1].to(model.device), temperature=sampling.temperature,
                             top_k=sampling.top_k, top_p=sampling.top_p)  # fmt: skip
                ids.append(int(drawn.tokens[0]))
                text = completion_text(tokenizer, ids, stops)
                yield {"side": side, "text": visible(text), "value": value, "score": None, "done": False}
                if ids[-1] in stops or t == limit - 1:
                    break
                hidden = decoder.step(drawn.tokens)
            reason = "stop" if ids[-1] in stops else "length"
            done = Completions([encoded], [ids], [[0.0] * len(ids)], [[0.0] * len(ids)], [reason])
            score = float(self.rewards.score(done).scores[0]) if self.rewards else None
        yield {"side": side, "text": visible(text), "value": None, "score": score, "done": True}

    def _value(self, hidden: Any, prompt: tuple[int, ...], ids: list[int]) -> float | None:
        """V before the next token: off the policy's own hidden state, or by a critic of its own, off the whole text."""
        from tether.models.policy import read_values
        from tether.types import Rows

        policy = self.policy
        if policy.critic is not None:
            return float(policy.critic(Rows.of([prompt], [[*ids, 0]]).to(policy.model.device))[-1])
        return None if policy.model.full else float(read_values(policy.value_head, hidden)[0])


@lru_cache(maxsize=2)
def _load(path: str, stamp: int) -> Models:
    from tether.data.tokenizer import load_tokenizer, stop_token_ids
    from tether.models.loading import load_causal_lm, resolve_device
    from tether.models.policy import LanguageModel, build_policy
    from tether.rewards import build_reward
    from tether.samplers.local import LocalSampler

    run = Run(path)
    config = run.config
    if not isinstance(config, PPOConfig):
        raise RunError(f"{path} is not a run of tether ppo: it has no critic. Choose one that is.")
    home = Path(run.environment.get("directory") or Path.cwd())
    start = _placed(config.model.policy, home)
    critic = run.final / "critic"
    separate = (critic / "config.json").exists()
    device = resolve_device("auto")
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
    stops = stop_token_ids(tokenizer, policy.model.plain.generation_config, config.sampling.stop_token_ids)
    sources: list[RewardSourceConfig] = [
        replace(s, model=_placed(s.model, home)) for s in config.reward if s.model is not None
    ]
    rewards = build_reward(sources, config.reward_shaping, tokenizer, stops, device) if sources else None
    return Models(config, tokenizer, policy.eval().requires_grad_(False), before, rewards, LocalSampler(before).cached)


def _placed(path: str, home: Path) -> str:
    """A model's path as it was meant where the run was started; a hub id stays one."""
    return str(home / path) if (home / path).exists() else path
