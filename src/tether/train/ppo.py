"""Proximal policy optimisation on a language model (Schulman et al. 2017; Ziegler et al. 2019).

    each cycle
      phase 1  sample completions, score them, value every token, turn both into advantages     tether.train.rollout
      phase 2  epochs × minibatches of the clipped objective                                    tether.train.update

The loop below is all of it. What a run needs besides (models, data, the run directory, signals, checkpoints) is set up
before the loop and put away after it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from tether.config import PPOConfig, check
from tether.data.prompts import load_prompts
from tether.data.tokenizer import check_vocabulary, load_tokenizer, stop_token_ids
from tether.errors import Interrupted, RewardError, TrainingError
from tether.math import next_kl_coef
from tether.models.export import save_model
from tether.models.loading import context_length, model_config, resolve_device
from tether.models.policy import Policy, Reference, build_policy
from tether.rewards import RewardSet, build_reward, function_file
from tether.runs import Run, RunDirectory, hash_files
from tether.runs.bounds import SAMPLER_GAP
from tether.samplers.local import LocalSampler
from tether.train import checkpoint
from tether.train.card import ppo_card
from tether.train.columns import table
from tether.train.deterministic import deterministic
from tether.train.log import Logger, say
from tether.train.optim import HELD_OUT, PROMPTS, Steps, build_optimizer, permutation
from tether.train.rollout import Experience, collect
from tether.train.signals import Signals, StopRequested
from tether.train.update import update
from tether.train.weights import restore_weights, save_weights
from tether.types import EVALUATE, TRAIN, Prompt, Sampling


def ppo(config: PPOConfig, *, reward: Callable[..., Any] | None = None, fresh: bool = False) -> Run:
    """Train a policy with PPO; returns the finished run.

    config: everything, see PPOConfig. reward: a reward function as one more source, in the signature
    f(prompts, completions, completion_ids, **columns) -> list[float | None]. fresh: move a run that is there aside.

    The same call continues a run that was stopped or killed, bit for bit. Raises TetherError's children; Interrupted
    after a signal, with everything saved.
    """
    check(config, reward_given=reward is not None)
    with (
        Signals() as signals,
        deterministic(config.deterministic),
        RunDirectory.open(config, command="ppo", fresh=fresh, inputs=_inputs(config)) as run,
    ):
        if run.finished:
            say(f"{run.path} is finished: nothing to do. --fresh moves it aside and begins anew.")
            return Run.open(run.path)
        job = prepare(config, reward)
        state = job.restore(run)
        with Logger(run, config.log, total=config.ppo.cycles) as log:
            for note in run.notes:
                log.note(note)
            for note in job.notes:
                run.event("fallback", what=note)
                log.note(note)
            if state.cycle == 0:
                try:
                    with signals.droppable():
                        job.evaluate(run, state, log)
                except StopRequested:
                    raise Interrupted("stopped before cycle 1; the same command begins again") from None

            while state.cycle < config.ppo.cycles:
                cycle = state.cycle + 1
                try:
                    with signals.droppable():
                        experience = job.collect(cycle, state.kl_coef, log)
                except RewardError:
                    job.save(run, state)
                    raise
                except StopRequested:
                    job.save(run, state)
                    raise Interrupted(f"stopped in cycle {cycle}; the same command continues from its start") from None

                done = job.update(run, experience, cycle, state.kl_coef, log)
                state = state.advance(config, experience)
                job.sampler.load_weights(job.policy.model)
                job.record(run, experience, cycle, done.new_logprobs)
                metrics = {**experience.metrics, **done.metrics, "memory/peak_mb": _peak_mb(job.device)}
                stop: RewardError | Interrupted | None = None
                try:
                    metrics |= job.evaluate(run, state, log)
                except RewardError as error:  # the cycle itself is done, and kept
                    stop = error
                log.write(cycle, metrics)
                if signals.requested and cycle < config.ppo.cycles:
                    stop = stop or Interrupted(f"stopped after cycle {cycle}; the same command continues")
                if stop or cycle % config.checkpoint.every == 0 or cycle == config.ppo.cycles:
                    job.save(run, state)
                if stop:
                    raise stop
            job.finish(run)
            log.note(f"done: {run.path / 'final'} is the policy of the last cycle")
    return Run.open(run.path)


@dataclass(frozen=True, slots=True)
class State:
    """What a cycle hands to the next, beside weights and moments. Every draw is counted, so there is no more."""

    cycle: int  # the last that is done
    kl_coef: float

    def advance(self, config: PPOConfig, experience: Experience) -> State:
        kl, coef = config.ppo.kl, self.kl_coef
        moves = self.cycle >= config.ppo.value_warmup_cycles  # until then the KL is 0, whatever β is
        if kl.target is not None and moves:
            measured = experience.metrics["kl/ref_mean"]
            assert measured is not None
            coef = next_kl_coef(coef, measured, target=kl.target, horizon=kl.horizon, responses=config.ppo.batch)
        return State(self.cycle + 1, coef)


@dataclass(frozen=True, slots=True)
class Job:
    """A PPO run's loaded parts, and the verbs of its loop."""

    config: PPOConfig
    device: torch.device
    tokenizer: Any
    policy: Policy
    reference: Reference
    sampler: LocalSampler
    reward: RewardSet
    steps: Steps
    prompts: list[Prompt]  # to train on
    held_out: list[Prompt]  # to evaluate on
    stop_ids: tuple[int, ...]
    notes: list[str]

    # ------------------------------------------------ the loop's verbs

    def collect(self, cycle: int, kl_coef: float, log: Logger) -> Experience:
        """Phase 1 on this cycle's prompts."""
        c = self.config
        return collect(
            self._prompts_of(cycle), self.sampler, self.reward, self.policy, self.reference,
            self.sampling(c.ppo.responses_per_prompt, TRAIN), c.ppo, kl_coef=kl_coef, cycle=cycle,
            progress=lambda what: log.phase(f"cycle {cycle}: {what}", cycle, c.ppo.cycles),
        )  # fmt: skip

    def update(self, run: RunDirectory, experience: Experience, cycle: int, kl_coef: float, log: Logger) -> Any:
        """Phase 2. A run that breaks here leaves the cycle's rollout behind, to look at."""
        c = self.config
        log.phase(f"cycle {cycle}: updating", cycle, c.ppo.cycles)
        gap = experience.metrics["check/sampler_gap"] or 0.0
        bound = SAMPLER_GAP["float32" if self.policy.model.dtype == torch.float32 else "bfloat16"]
        if gap > bound:
            run.event("alarm", cycle=cycle, what=f"sampler gap {gap:.2g} nats a token, above {bound}")
        try:
            done = update(
                self.policy, self.steps, experience.rollout, c.ppo,
                cycle=cycle, kl_coef=kl_coef, temperature=c.sampling.temperature, seed=c.seed,
            )  # fmt: skip
        except TrainingError:
            self._write(run, experience, cycle, None)
            raise
        for alarm in done.alarms:
            run.event("alarm", cycle=cycle, what=alarm)
            log.note(f"cycle {cycle}: {alarm}")
        return done

    def evaluate(self, run: RunDirectory, state: State, log: Logger) -> dict[str, float | None]:
        """Metrics eval/* on the held-out prompts, with the same draws every time: what differs is the policy."""
        c, cycle = self.config, state.cycle
        if not c.evaluate.every or (cycle % c.evaluate.every and cycle != c.ppo.cycles):
            return {}
        log.phase(f"cycle {cycle}: evaluating", cycle, c.ppo.cycles)
        experience = collect(
            self.held_out, self.sampler, self.reward, self.policy, self.reference,
            self.sampling(c.evaluate.samples, EVALUATE), c.ppo, kl_coef=state.kl_coef, cycle=0,
        )  # fmt: skip
        columns = table(
            experience, self.tokenizer, self.stop_ids, c.ppo, cycle=cycle, responses_per_prompt=c.evaluate.samples
        )
        run.write_evaluation(cycle, columns)
        m = experience.metrics
        sums = ("score_mean", "score_std", "score_min", "score_max", "total_mean")
        sources = [f"reward/{name}_mean" for name in experience.scored.parts]  # one may be called `length`
        return (
            {f"eval/{name}": m[f"reward/{name}"] for name in sums}
            | {f"eval/{name}": m[name] for name in sources}
            | {
                "eval/kl_ref_mean": m["kl/ref_mean"],
                "eval/length_mean": m["response/length_mean"],
                "eval/truncated_fraction": m["response/truncated_fraction"],
                "eval/explained_variance": m["value/explained_variance"],
            }
        )

    def record(self, run: RunDirectory, experience: Experience, cycle: int, new_logprobs: torch.Tensor) -> None:
        """The cycle's rollout file, when the config asks for one."""
        every = self.config.log.rollouts_every
        if every and (cycle % every == 0 or cycle == 1):
            self._write(run, experience, cycle, new_logprobs)

    def save(self, run: RunDirectory, state: State) -> None:
        """A checkpoint of everything that the next cycle depends on."""

        def write(directory: Path) -> None:
            save_weights(self.policy.lm, directory / "policy")
            self.tokenizer.save_pretrained(directory / "policy")
            self.policy.save_critic(directory / "critic")
            checkpoint.save_optimizer(
                self.steps.optimizer, self._named_parameters(), directory / "optimizer.safetensors"
            )

        state_dict = {"cycle": state.cycle, "kl_coef": state.kl_coef, "skipped": self.steps.skipped}
        checkpoint.save(run.path, f"cycle-{state.cycle:06d}", state_dict, write, keep=self.config.checkpoint.keep)

    def restore(self, run: RunDirectory) -> State:
        """Put back the newest intact checkpoint; the start of the run where there is none."""

        def passed_over(text: str) -> None:
            run.event("checkpoint_damaged", what=text)
            say(text)

        found = checkpoint.latest(run.path, passed_over)
        if found is None:
            run.cut_back(0)
            return State(0, self.config.ppo.kl.coef)
        directory, state = found
        restore_weights(self.policy.lm, directory / "policy")
        self.policy.load_critic(directory / "critic")
        self.steps.skipped = state["skipped"]
        checkpoint.load_optimizer(self.steps.optimizer, self._named_parameters(), directory / "optimizer.safetensors")
        self.sampler.load_weights(self.policy.model)
        run.cut_back(state["cycle"])
        return State(state["cycle"], state["kl_coef"])

    def finish(self, run: RunDirectory) -> None:
        """final/: the last policy as a plain Hugging Face directory, its critic beside it."""
        s = self.config.sampling
        save_model(
            self.policy.model, self.tokenizer, run.path / "final", card=ppo_card(Run(run.path), self.config),
            temperature=s.temperature, max_new_tokens=s.max_new_tokens, stop_ids=self.stop_ids,
        )  # fmt: skip
        self.policy.save_critic(run.path / "final" / "critic")

    # ------------------------------------------------ details

    def sampling(self, responses_per_prompt: int, stream: int) -> Sampling:
        s, seed = self.config.sampling, self.config.seed
        return Sampling(
            s.temperature, s.top_k, s.top_p, s.max_new_tokens, self.stop_ids, responses_per_prompt, seed, stream
        )

    def _prompts_of(self, cycle: int) -> list[Prompt]:
        """The cycle's prompts: shuffled passes over the data set, one after the other, without a cursor to save."""
        count, size = self.config.ppo.batch // self.config.ppo.responses_per_prompt, len(self.prompts)
        positions = range((cycle - 1) * count, cycle * count)
        return [self.prompts[_pass(i // size, size, self.config.seed)[i % size]] for i in positions]

    def _named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return self.policy.policy_parameters() + self.policy.critic_parameters()

    def _write(self, run: RunDirectory, experience: Experience, cycle: int, new_logprobs: torch.Tensor | None) -> None:
        ppo = self.config.ppo
        columns = table(
            experience, self.tokenizer, self.stop_ids, ppo,
            cycle=cycle, responses_per_prompt=ppo.responses_per_prompt, new_logprobs=new_logprobs,
        )  # fmt: skip
        run.write_rollouts(cycle, columns)


def prepare(config: PPOConfig, reward: Callable[..., Any] | None = None) -> Job:
    """Load and check all that a run needs, cheap things first: most mistakes are found before a model is loaded."""
    m = config.model
    device = resolve_device(config.device)
    tokenizer = load_tokenizer(m.policy, revision=m.revision, trust_remote_code=m.trust_remote_code)
    architecture = model_config(m.policy, revision=m.revision, trust_remote_code=m.trust_remote_code)
    check_vocabulary(tokenizer, architecture.get_text_config().vocab_size)
    prompts, held_out, note = _load_prompts(config, tokenizer, context_length(architecture))
    policy, reference, notes = build_policy(m, device=device, seed=config.seed)
    notes += [note] if note else []
    stop_ids = stop_token_ids(tokenizer, policy.model.plain.generation_config, config.sampling.stop_token_ids)
    scorer = build_reward(config.reward, config.reward_shaping, tokenizer, stop_ids, device, reward)
    scorer.check(prompts + held_out)
    sampler = LocalSampler(policy.model, slots=config.sampling.slots)
    notes += [sampler.note] if sampler.note else []
    optimizer = build_optimizer(
        config.optim, policy.policy_parameters(), policy.critic_parameters(),
        lora=m.lora is not None, critic_is_head=policy.critic is None,
    )  # fmt: skip
    p = config.ppo
    steps = Steps(optimizer, config.optim, p.cycles * p.epochs * p.batch // p.minibatch)
    return Job(config, device, tokenizer, policy, reference, sampler, scorer, steps, prompts, held_out, stop_ids, notes)


def _load_prompts(
    config: PPOConfig, tokenizer: Any, context: int | None
) -> tuple[list[Prompt], list[Prompt], str | None]:
    """(prompts to train on, prompts to evaluate on, a note)."""
    limit, e = config.sampling.max_new_tokens, config.evaluate
    prompts = load_prompts(config.prompts, tokenizer, context=context, max_new_tokens=limit)
    if e.prompts is None:
        return hold_out(prompts, e.count if e.every else 0, config.seed)
    other = replace(config.prompts, path=e.prompts, limit=None)
    return prompts, load_prompts(other, tokenizer, context=context, max_new_tokens=limit)[: e.count], None


@lru_cache(maxsize=2)  # a cycle may begin in one pass and end in the next
def _pass(number: int, size: int, seed: int) -> list[int]:
    """The order of one pass over the prompts."""
    return permutation(size, seed=seed, stream=PROMPTS, counter=(number,))


def hold_out(prompts: list[Prompt], count: int, seed: int) -> tuple[list[Prompt], list[Prompt], str | None]:
    """(prompts to train on, prompts to evaluate on, a note): never more than a quarter is held out.

    Rows with the same prompt stand or fall together: one of them is evaluated on, or all are trained on.
    """
    if count == 0:
        return prompts, [], None
    first: dict[tuple[int, ...], Prompt] = {}
    for p in prompts:
        first.setdefault(p.ids, p)
    distinct = list(first.values())
    if len(distinct) < 4:
        return prompts, prompts, f"only {len(distinct)} prompts: evaluation uses the ones that are trained on"
    chosen = permutation(len(distinct), seed=seed, stream=HELD_OUT)[: min(count, len(distinct) // 4)]
    held_out = [distinct[i] for i in sorted(chosen)]
    taken = {p.ids for p in held_out}
    train = [p for p in prompts if p.ids not in taken]
    notes = [] if len(held_out) == count else [f"only {len(distinct)} prompts: {len(taken)} are held out, not {count}"]
    if repeats := len(prompts) - len(train) - len(held_out):
        notes.append(f"{repeats} rows repeat a held-out prompt: not trained on")
    return train, held_out, "; ".join(notes) or None


def _inputs(config: PPOConfig) -> dict[str, str]:
    """Hashes of what the run reads: it continues only on the same, but for reward functions, whose change is noted."""
    m = config.model
    paths = {"model.reference": m.reference, "prompts.path": config.prompts.path,
             "evaluate.prompts": config.evaluate.prompts,
             "model.critic": m.critic if m.critic not in ("shared", "separate") else None,
             **{f"reward[{i}].model": s.model for i, s in enumerate(config.reward)},
             **{f"reward[{i}].function": function_file(s.function) for i, s in enumerate(config.reward)
                if s.function is not None}}  # fmt: skip
    hashes = {key: hash_files(path) for key, path in paths.items() if path is not None}
    return {"model.policy": hash_files(m.policy, m.revision)} | hashes


def _peak_mb(device: torch.device) -> float:
    """MiB: on a GPU what torch had allocated at most, on a CPU the largest resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")  # Linux: a process inherits ru_maxrss from the one that started it, but not this
    if found := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text() if status.exists() else "", re.MULTILINE):
        return int(found[1]) / 2**10
    import resource  # not on every system

    unit = 2**20 if sys.platform == "darwin" else 2**10  # there in bytes, elsewhere in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
