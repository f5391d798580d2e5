"""Proximal policy optimization on a language model (Schulman et al. 2017; Ziegler et al. 2019).

    each cycle
      phase 1  sample completions, score them, value every token, turn both into advantages     tether.train.rollout
      phase 2  epochs × minibatches of the clipped objective                                    tether.train.update
               and beside it, with ppo.ahead, the next cycle's completions                      tether.train.ahead

The loop below is all of it. What a run needs besides (models, data, the run directory) is set up before the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from tether.config import PPOConfig, PPOSection, RewardShapingConfig, check, model_paths
from tether.data.tokenizer import check_vocabulary, load_tokenizer, stop_token_ids
from tether.distributed.ranks import Ranks, local_device
from tether.distributed.shard import lay_out, shards
from tether.errors import ConfigError
from tether.math import hold_kl, kl_error, next_kl_coef
from tether.models.export import save_model
from tether.models.loading import context_length, model_config, resolve_device
from tether.models.policy import build_policy
from tether.rewards import build_reward, function_file
from tether.rewards.judge import judge_hash
from tether.runs import Run, RunDirectory, answers, hash_files
from tether.samplers import build_sampler
from tether.samplers.pool import check_pool
from tether.samplers.vllm import Room, check_vllm
from tether.train.ahead import Ahead, AheadSampler
from tether.train.best import keep_best
from tether.train.card import ppo_card
from tether.train.columns import Record
from tether.train.contexts import check_contexts
from tether.train.gold import fallen_below
from tether.train.held_out import PromptSets, load_prompt_sets
from tether.train.log import Logger, say
from tether.train.optim import PROMPTS, ScheduledOptimizer, build_optimizer, permutation
from tether.train.preamble import check_parts, open_run
from tether.train.rollout import Experience, Metrics, collect, sample
from tether.train.state import TrainingState
from tether.train.update import update
from tether.types import EVALUATE, TRAIN, Completions, LogSink, Prompt, Reward, Sampler, Sampling


def ppo(
    config: PPOConfig, *, reward: Callable[..., Any] | Reward | None = None, sampler: Sampler | None = None,
    sinks: Sequence[LogSink] = (), fresh: bool = False,
) -> Run:  # fmt: skip
    """Train a policy with PPO; returns the finished run.

    config   everything, see PPOConfig.
    reward   one more source: a function f(prompts, completions, completion_ids, **columns) -> list[float | None], or
             an object with the methods of `tether.types.Reward`.
    sampler  draws the responses instead of `sampling.engine`; see `tether.types.Sampler`.
    sinks    get every cycle's metrics; see `tether.types.LogSink`.
    fresh    move a run that is there aside.

    The same call continues a run that was stopped or killed, bit for bit. Raises TetherError's children; Interrupted
    after a signal, with everything saved.
    """
    check(config, reward_given=reward is not None)
    check_parts(reward, sampler, sinks)
    m, s, p, device = config.model, config.sampling, config.ppo, local_device(resolve_device(config.device))
    with (
        open_run(config, command="ppo", fresh=fresh, inputs=input_hashes(config)) as (run, signals, ranks),
        ExitStack() as opened,
    ):
        if run.finished:
            return Run.open(run.path)
        # Cheap things first: most mistakes are found before a model is loaded.
        tokenizer = load_tokenizer(m.policy, revision=m.revision, trust_remote_code=m.trust_remote_code)
        architecture = model_config(m.policy, revision=m.revision, trust_remote_code=m.trust_remote_code)
        check_vocabulary(tokenizer, architecture.get_text_config().vocab_size)
        sets = load_prompt_sets(config, tokenizer, context_length(architecture))
        check_contexts(config, sets.train + sets.held_out, tokenizer)
        if s.engine == "vllm" and sampler is None:
            check_vllm(s, architecture)
        if s.engine == "pool" and sampler is None:
            check_pool(s.pool, ranks)
        policy, reference, notes = build_policy(m, device=device, seed=config.seed, with_critic=p.has_critic)
        stop_ids = stop_token_ids(tokenizer, policy.model.hf_model.generation_config, s.stop_token_ids)
        kept: Path | None = run.path / answers.NAME
        sources, golden, given = config.reward, config.evaluate.gold, reward
        if ranks.rank > 0:  # the first scores for all but by reward models
            sources, golden = ([s for s in x if model_paths(s)] for x in (sources, golden))
            given = kept = None
        rewards = build_reward(sources, config.reward_shaping, tokenizer, stop_ids, device, given, kept)
        with signals.droppable():  # a server is waited for
            rewards.check(sets.train + sets.held_out)
            gold = build_reward(golden, RewardShapingConfig(), tokenizer, stop_ids, device, kept=kept)
            gold.check(sets.held_out)
        sharded = shards(config.distributed.shard, policy, ranks)
        engine, fallbacks = (sampler, []) if sampler is not None else build_sampler(
            policy.model, s, copied=sharded, beside=bool(p.ahead), room=engine_room(config, sets, run, ranks),
            ranks=ranks, opened=opened, restarted=partial(_note_restart, run),
        )  # fmt: skip
        if sharded and sampler is not None:
            raise ConfigError(
                "a sampler was passed from Python, and distributed.shard cuts the weights into parts: it would find no "
                "whole weight to load. Set distributed.shard to replicate."
            )
        layout = lay_out(policy, reference, ranks, sharded=sharded)  # from here on, copies of the models cannot be made
        optimizer = build_optimizer(
            config.optim, policy.policy_parameters(), policy.critic_parameters(),
            lora=m.lora is not None, critic_is_head=policy.critic is None,
        )  # fmt: skip
        steps = ScheduledOptimizer(optimizer, config.optim, p.steps, ranks)
        state = TrainingState(run, layout.parts(), steps, tokenizer, kl_coef=p.kl.coef, ranks=ranks, layout=layout)
        asked = partial(_prompts_of, prompts=sets.train, config=config)
        state.requests = lambda cycle: [prompt for prompt in asked(cycle) for _ in range(p.responses_per_prompt)]
        state.restore()
        engine.load_weights(policy.model, version=state.done)
        parts = engine, rewards, policy, reference
        limits = s.temperature, s.top_k, s.top_p, s.max_new_tokens, stop_ids
        train = Sampling(*limits, p.responses_per_prompt, config.seed, TRAIN)
        test = Sampling(*limits, config.evaluate.samples, config.seed, EVALUATE)
        record = Record(run, config, tokenizer, stop_ids)

        def evaluate(metrics: Metrics) -> Metrics:
            """`metrics` of the cycle, and those on the held-out prompts where it is to be evaluated. The draws are the
            same every time: what differs is the policy."""
            if not config.evaluate.every or (state.done % config.evaluate.every and state.done != p.cycles):
                return metrics
            with signals.droppable():
                experience = collect(sets.held_out, *parts, test, p, kl_coef=lambda *_: state.kl_coef, cycle=0,
                                     phase=f"evaluation-{state.done:06d}", ranks=ranks,
                                     progress=lambda phase: log.phase(f"evaluating, {phase}"))  # fmt: skip
                phase, golds = f"gold-{state.done:06d}", dict[str, list[float | None]]()
                if config.evaluate.gold:
                    golds = gold.score(experience.completions, phase, ranks=ranks).parts
            record.evaluation(experience, state.done, golds)
            if p.ahead:  # of what was sampled by an earlier policy the sampler cannot be checked
                log.alarms(state.done, experience.alarms)
            metrics = metrics | experience.evaluation_metrics(golds)
            if state.done:
                layout.gather()
                if not run.follows:
                    keep_best(run, config, state.done, metrics, write_model)
            return metrics

        def last_line() -> Metrics:
            return ranks.first(lambda: run.metrics()[-1])

        def fallen() -> int | None:
            return ranks.first(lambda: fallen_below(run.path, config, state.done))

        def write_model(directory: Path, card: str, add: Callable[[Path], object] = lambda directory: None) -> None:
            """A plain Hugging Face directory with the critic beside it. add: writes what else belongs there."""

            whole = layout.whole
            assert whole is not None  # rank 0 writes

            def beside(directory: Path) -> None:
                whole.save_critic(directory / "critic")
                add(directory)

            save_model(whole.model, tokenizer, directory, card=card, temperature=s.temperature,
                       max_new_tokens=s.max_new_tokens, stop_ids=stop_ids, add=beside)  # fmt: skip

        sets.record(run)
        with (
            Logger(run, config.log, total=p.cycles, sinks=sinks) as log,
            AheadSampler(engine, train, ranks, log.phase) as thread,  # left last: first all is saved
            state.saved_when_stopped(),
        ):
            for text in [*notes, *([sets.note] if sets.note else []), *fallbacks]:
                log.fallback(text)
            if state.done == 0:
                evaluate({})
            elif "eval/score_mean" not in (line := last_line()) and (evaluated := evaluate(line)) is not line:
                log.rewrite(state.done, evaluated)  # its evaluation was dropped, or a reward failed in it

            def sampled_ahead(cycle: int) -> AbstractContextManager[Ahead]:
                signals.stop_if_requested()  # else what nobody needs would be waited for
                return thread.beside(asked(cycle) if p.ahead and cycle <= p.cycles else [], cycle)

            def experienced(cycle: int) -> Experience:
                """Phase 1 on what was sampled ahead, or is now."""
                with signals.droppable():
                    experience = collect(asked(cycle), *parts, train, p, kl_coef=partial(_kl_coef, state, p),
                                         cycle=cycle, drawn=state.ahead or first, lagged=state.ahead is not None,
                                         **shared)  # fmt: skip
                log.alarms(cycle, experience.alarms)
                return experience

            shared: dict[str, Any] = {"progress": log.phase, "ranks": ranks}
            first: Completions | None = None  # of the cycle before which there is none to sample it beside
            if p.ahead and state.ahead is None and state.done < p.cycles:
                with signals.droppable():
                    log.phase("sampling")
                    first = sample(asked(state.done + 1), engine, train, cycle=state.done + 1, ranks=ranks)
            while state.done < p.cycles and fallen() is None:
                cycle = state.done + 1
                with sampled_ahead(cycle + 1) as ahead:
                    experience = experienced(cycle)
                    with record.left_behind(experience, cycle):
                        done = update(policy, steps, experience.rollout, p, cycle=cycle, kl_coef=experience.kl_coef,
                                      temperature=s.temperature, seed=config.seed, **shared)  # fmt: skip
                log.alarms(cycle, done.alarms)
                state.kl_coef, state.kl_error = _kept_of_kl(experience, p, state)
                state.done, state.ahead = cycle, ahead.completions
                record.rollouts(experience, cycle, done.new_logprobs)
                with log.writing(cycle, experience.metrics | done.metrics | ahead.metrics) as metrics:
                    engine.load_weights(policy.model, version=cycle)
                    metrics |= evaluate(metrics)
                state.save_if_due(p.cycles)

            if state.done < p.cycles:
                state.save()
                fell = fallen()
                run.event("gold_fell", cycle=state.done, best=fell)
                log.note(f"cycle {state.done}: gold has fallen since cycle {fell}, so the run ends here")
            layout.gather()
            if not run.follows:
                ended = Run(run.path)
                card = ppo_card(run.path.name, ended.metrics, config, f"the last cycle, {state.done}", ended.best)
                write_model(run.path / "final", card)
            log.note(f"done: {run.path / 'final'} is the policy of the last cycle")
    return Run.open(run.path)


def engine_room(config: PPOConfig, sets: PromptSets, run: RunDirectory, ranks: Ranks) -> Room:
    """What a rank's engine with a process of its own is asked at most, and where it may write."""
    p, e = config.ppo, config.evaluate
    longest = max(len(prompt.ids) for prompt in [*sets.train, *sets.held_out])
    responses = -(-p.batch // p.responses_per_prompt // ranks.size) * p.responses_per_prompt
    if e.every:
        responses = max(responses, -(-len(sets.held_out) // ranks.size) * e.samples)
    tokens = longest + config.sampling.max_new_tokens
    return Room(run.path / "vllm", responses, tokens, config.model.trust_remote_code, ranks)


def _note_restart(run: RunDirectory, why: str) -> None:
    run.event("engine_restarted", why=why)
    say(why)


def _kl_coef(state: TrainingState, ppo: PPOSection, scores: Tensor, log_ratio_sums: Tensor) -> float:
    """β of the cycle that was just sampled. While the value warm-up freezes the policy it stays: the KL is 0 then."""
    if ppo.kl.target is None or ppo.kl.horizon is not None or state.done < ppo.value_warmup_cycles:
        return state.kl_coef
    spread = log_ratio_sums.std(correction=0)
    if spread == 0:  # the first cycle: no response has left the reference
        return state.kl_coef
    error = kl_error(float(log_ratio_sums.mean()), target=ppo.kl.target)
    even = float(scores.std(correction=0) / spread.cpu()) if ppo.kl.place == "reward" else None
    return hold_kl(state.kl_coef, error, state.kl_error, even=even)


def _kept_of_kl(experience: Experience, ppo: PPOSection, state: TrainingState) -> tuple[float, float]:
    """What the next cycle's β depends on: β, and the error that `hold_kl` remembers."""
    kl, coef, measured = ppo.kl, experience.kl_coef, experience.metrics["kl/ref_mean"]
    assert measured is not None
    if kl.target is None or state.done < ppo.value_warmup_cycles:
        return coef, state.kl_error
    if kl.horizon is None:
        return coef, kl_error(measured, target=kl.target)
    return next_kl_coef(coef, measured, target=kl.target, horizon=kl.horizon, responses=ppo.batch), state.kl_error


def _prompts_of(cycle: int, prompts: list[Prompt], config: PPOConfig) -> list[Prompt]:
    """The cycle's prompts: shuffled passes over the data set, one after the other, without a cursor to save."""
    count, size = config.ppo.batch // config.ppo.responses_per_prompt, len(prompts)
    positions = range((cycle - 1) * count, cycle * count)
    return [prompts[_pass(i // size, size, config.seed)[i % size]] for i in positions]


@lru_cache(maxsize=2)  # a cycle may begin in one pass and end in the next
def _pass(number: int, size: int, seed: int) -> list[int]:
    return permutation(size, seed=seed, stream=PROMPTS, counter=(number,))


def input_hashes(config: PPOConfig) -> dict[str, str]:
    """Hashes of what the run reads: it continues only on the same, but for reward functions, whose change is noted."""
    m = config.model
    paths = {"model.reference": m.reference,
             "model.critic": m.critic if m.critic not in ("shared", "separate") else None}  # fmt: skip
    for key, sources in (("reward", config.reward), ("evaluate.gold", config.evaluate.gold)):
        for i, s in enumerate(sources):
            paths[f"{key}[{i}].model"] = s.model
            paths |= {f"{key}[{i}].models[{k}]": path for k, path in enumerate(s.models or [])}
            paths[f"{key}[{i}].function"] = function_file(s.function) if s.function is not None else None
    data = {"prompts.path": config.prompts.path, "evaluate.prompts": config.evaluate.prompts}
    hashes = {key: hash_files(path) for key, path in paths.items() if path is not None}
    for key, sources in (("reward", config.reward), ("evaluate.gold", config.evaluate.gold)):
        hashes |= {f"{key}[{i}].judge": judge_hash(s.judge) for i, s in enumerate(sources) if s.judge is not None}
    hashes |= {key: hash_files(path, kind="dataset") for key, path in data.items() if path is not None}
    return {"model.policy": hash_files(m.policy, m.revision)} | hashes
