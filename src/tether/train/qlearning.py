"""Q-learning on scored answers, whoever wrote them: the squared soft-Bellman residual, or implicit Q-learning.

Nothing is sampled: answers come from a file or from other runs. Which answers a step sees follows from (seed, epoch)
alone: a run that is continued ends with the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from tether.config import QLearningConfig, check, check_warmup
from tether.data.scored import all_stop_ids, is_run, load_scored
from tether.data.tokenizer import check_vocabulary, load_tokenizer, stop_token_ids
from tether.distributed.ranks import local_device, need_replicas
from tether.models.export import save_model
from tether.models.loading import context_length, model_config, resolve_device
from tether.models.policy import load_policy
from tether.runs import Run, RunDirectory, hash_files
from tether.train.bellman import Bellman
from tether.train.card import qlearning_card
from tether.train.columns import rollout_columns
from tether.train.ilql import ImplicitQ
from tether.train.optim import ScheduledOptimizer, build_optimizer, shuffled_batches
from tether.train.preamble import check_parts, open_run
from tether.train.rollout import Experience
from tether.train.state import TrainingState
from tether.types import LogSink

_SHOWN = 256  # answers that the run keeps with every number of every token, to inspect


class Objective(Protocol):
    """What a loss of `tether qlearning` brings to the loop. Answers go by their number in the data."""

    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds beside the policy's own parts, by name."""

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Trained weights beside the policy's, by name: at the critic's learning rate."""

    def prepare(self, run: RunDirectory, inputs: Mapping[str, str]) -> None:
        """Called once, before a checkpoint is put back; inputs: hashes of what the run reads."""

    def accumulate(self, batch: list[int]) -> dict[str, float | None]:
        """Add one optimizer step's gradients, microbatch by microbatch; no step. Returns its metrics."""

    def after_step(self, step: int) -> None:
        """Called with the number of steps done, after each and before it is saved."""

    def inspect(self, which: Sequence[int]) -> tuple[Experience, Tensor | None]:
        """These answers as a cycle of PPO would have found them, and min Q̄ [B, R] of every token where there is one."""

    def save(self, final: Path) -> None:
        """Write what belongs beside the model in `final/`."""


def qlearning(config: QLearningConfig, *, sinks: Sequence[LogSink] = (), fresh: bool = False) -> Run:
    """Train, or continue the run in `config.run`; returns it, with the policy and its V (or heads) in `.final`.

    sinks: get every step's metrics; see `tether.types.LogSink`. fresh: move a run that is there aside first.
    """
    check(config)
    check_parts(None, None, sinks)
    need_replicas(config.distributed.shard, "qlearning")
    m, section, inputs = config.model, config.qlearning, input_hashes(config)
    with open_run(config, command="qlearning", fresh=fresh, inputs=inputs) as (run, signals, ranks):
        if run.finished:
            return Run.open(run.path)
        tokenizer = load_tokenizer(m.policy, revision=m.revision, trust_remote_code=m.trust_remote_code)
        architecture = model_config(m.policy, revision=m.revision, trust_remote_code=m.trust_remote_code)
        vocab_size = architecture.get_text_config().vocab_size
        check_vocabulary(tokenizer, vocab_size)
        device = local_device(resolve_device(config.device))
        policy, notes = load_policy(m, device=device, seed=config.seed, with_critic=not config.has_heads)
        stop_ids = stop_token_ids(tokenizer, policy.model.hf_model.generation_config, None)
        stop_id, context = next(iter(stop_ids), None), context_length(architecture)
        answers = load_scored(config.data, tokenizer, stop_id=stop_id, context=context, vocab_size=vocab_size)
        stop_ids = all_stop_ids(stop_ids, answers)
        plan = shuffled_batches(len(answers), batch=section.batch, epochs=section.epochs, seed=config.seed)
        check_warmup(config.optim, len(plan))
        objective: Objective = (ImplicitQ if config.has_heads else Bellman)(policy, answers, config, ranks)
        optimizer = build_optimizer(
            config.optim, policy.policy_parameters(), objective.parameters(),
            lora=m.lora is not None, critic_is_head=policy.critic is None,
        )  # fmt: skip
        parts = policy.parts() | objective.parts()
        steps = ScheduledOptimizer(optimizer, config.optim, len(plan), ranks)
        state = TrainingState(run, parts, steps, tokenizer, ranks=ranks)
        with state.saved_when_stopped(), signals.droppable():
            objective.prepare(run, inputs)
        state.run_steps(plan, objective.accumulate, signals, sinks, notes, after_step=objective.after_step)
        if run.follows:
            return Run.open(run.path)
        if config.log.rollouts_every:
            seen, min_q = objective.inspect(range(0, len(answers), -(-len(answers) // _SHOWN)))
            columns = rollout_columns(
                seen, tokenizer, stop_ids, config.as_ppo, cycle=len(plan), responses_per_prompt=1, min_q=min_q
            )
            run.write_rollouts(len(plan), columns)
        card = qlearning_card(Run(run.path), config)
        save_model(policy.model, tokenizer, run.path / "final", card=card, stop_ids=stop_ids, add=objective.save)
    return Run.open(run.path)


def input_hashes(config: QLearningConfig) -> dict[str, str]:
    """Hashes of what the run reads, by config key: it continues only on the same."""
    m, data = config.model, config.data
    beside = {"model.reference": m.reference, "model.critic": None if m.critic in ("shared", "separate") else m.critic}
    hashes = {key: hash_files(path) for key, path in beside.items() if path is not None}
    for i, path in enumerate(data.paths):
        key = "data.path" if isinstance(data.path, str) else f"data.path[{i}]"
        hashes[key] = hash_files(f"{path}/rollouts" if is_run(path) else path, kind="dataset")
    return {"model.policy": hash_files(m.policy, m.revision)} | hashes
