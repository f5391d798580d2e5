"""Q-learning on scored answers, whoever wrote them: the squared soft-Bellman residual, or implicit Q-learning.

Nothing is sampled: answers come from a file or from other runs. Under `bellman` the log-probs of the policy are the
advantages, its value head is V; what is minimized, and why its minimum is PPO's optimum, is in `tether.math.bellman`.
What is particular to `ilql` is in `tether.train.ilql`. Which answers a step sees follows from (seed, epoch) alone: a
run that is continued ends with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tether.config import QLearningConfig, QLearningSection, check, check_warmup
from tether.data.scored import ScoredResponse, all_stop_ids, is_run, load_scored, scored_microbatches
from tether.data.tokenizer import check_vocabulary, load_tokenizer, stop_token_ids
from tether.math import bellman_loss, explained_variance, gae, grouped_std, place_rewards
from tether.models.export import save_model
from tether.models.loading import context_length, model_config, resolve_device
from tether.models.policy import Policy, load_policy
from tether.rewards import ScoredBatch
from tether.runs import Run, hash_files
from tether.train import ilql
from tether.train.card import qlearning_card
from tether.train.columns import rollout_columns
from tether.train.optim import ScheduledOptimizer, build_optimizer, shuffled_batches
from tether.train.preamble import check_parts, open_run
from tether.train.reference import reference_logprobs
from tether.train.rollout import Experience
from tether.train.state import TrainingState
from tether.types import Completions, LogSink, Rollout

_SHOWN = 256  # answers that the run keeps with every number of every token, to inspect


def qlearning(config: QLearningConfig, *, sinks: Sequence[LogSink] = (), fresh: bool = False) -> Run:
    """Train, or continue the run in `config.run`; returns it, with the policy and its V (or heads) in `.final`.

    sinks: get every step's metrics; see `tether.types.LogSink`. fresh: move a run that is there aside first.
    """
    check(config)
    check_parts(None, None, sinks)
    m, section, inputs = config.model, config.qlearning, input_hashes(config)
    with open_run(config, command="qlearning", fresh=fresh, inputs=inputs) as (run, signals):
        if run.finished:
            return Run.open(run.path)
        tokenizer = load_tokenizer(m.policy, revision=m.revision, trust_remote_code=m.trust_remote_code)
        architecture = model_config(m.policy, revision=m.revision, trust_remote_code=m.trust_remote_code)
        vocab_size = architecture.get_text_config().vocab_size
        check_vocabulary(tokenizer, vocab_size)
        device = resolve_device(config.device)
        policy, notes = load_policy(m, device=device, seed=config.seed, with_critic=not config.has_heads)
        stop_ids = stop_token_ids(tokenizer, policy.model.hf_model.generation_config, None)
        stop_id, context = next(iter(stop_ids), None), context_length(architecture)
        answers = load_scored(config.data, tokenizer, stop_id=stop_id, context=context, vocab_size=vocab_size)
        stop_ids = all_stop_ids(stop_ids, answers)
        plan = shuffled_batches(len(answers), batch=section.batch, epochs=section.epochs, seed=config.seed)
        check_warmup(config.optim, len(plan))
        heads = ilql.build_heads(policy, seed=config.seed) if config.has_heads else None
        optimizer = build_optimizer(
            config.optim, policy.policy_parameters(), heads.trained() if heads else policy.critic_parameters(),
            lora=m.lora is not None, critic_is_head=policy.critic is None,
        )  # fmt: skip
        parts = policy.parts() | ({"ilql": heads} if heads else {})
        state = TrainingState(run, parts, ScheduledOptimizer(optimizer, config.optim, len(plan)), tokenizer)
        references = list[Tensor]()
        if not heads:
            with state.saved_when_stopped(), signals.droppable():
                references = reference_logprobs(
                    run, policy.model, m, [(a.prompt.ids, a.response_ids) for a in answers], inputs,
                    microbatch_tokens=section.microbatch_tokens,
                )  # fmt: skip

        def learn(batch: list[int]) -> dict[str, float | None]:
            chosen = [answers[i] for i in batch]
            if heads:
                return ilql.accumulate(policy, heads, chosen, section)
            return accumulate(policy, chosen, [references[i] for i in batch], section)

        def sync(step: int) -> None:
            if heads and step % section.ilql.sync_every == 0:
                heads.sync(section.ilql.polyak)

        state.run_steps(plan, learn, signals, sinks, notes, after_step=sync)
        if config.log.rollouts_every:
            shown = range(0, len(answers), -(-len(answers) // _SHOWN))
            chosen, ppo = [answers[i] for i in shown], config.as_ppo
            if heads:
                seen, q = ilql.inspect_answers(policy, heads, chosen, section, as_completions(chosen))
            else:
                seen, q = inspect_answers(policy, chosen, [references[i] for i in shown], section), None
            columns = rollout_columns(
                seen, tokenizer, stop_ids, ppo, cycle=len(plan), responses_per_prompt=1, min_q=q
            )  # fmt: skip
            run.write_rollouts(len(plan), columns)
        save_model(
            policy.model, tokenizer, run.path / "final", card=qlearning_card(Run(run.path), config), stop_ids=stop_ids,
            add=ilql.save_heads(heads, section) if heads else lambda final: policy.save_critic(final / "critic"),
        )  # fmt: skip
    return Run.open(run.path)


def accumulate(
    policy: Policy, answers: Sequence[ScoredResponse], references: Sequence[Tensor], section: QLearningSection
) -> dict[str, float | None]:
    """Add one optimizer step's gradients to the policy's, microbatch by microbatch; no step. Returns its metrics.

    references: the reference's log-prob of every token of each answer.
    """
    tokens = sum(len(answer.response_ids) for answer in answers)
    losses, residuals, values = list[Tensor](), list[Tensor](), list[Tensor]()  # each [] or [N] of a microbatch
    log_ratio_sums = torch.zeros(len(answers), device=policy.model.device)
    for index, rows, scores in scored_microbatches(answers, section.microbatch_tokens, policy.model.device):
        mask, ref = rows.response_mask, _padded(references, index).to(policy.model.device)
        output = policy(rows, temperature=1.0, entropy=False)
        assert output.values is not None
        loss, residual = bellman_loss(
            output.logprobs, ref, output.values, scores, mask,
            kl_coef=section.beta, lam=section.lam, denominator=tokens,
        )  # fmt: skip
        loss.backward()
        losses.append(loss.detach())
        residuals.append(residual.detach()[mask])
        values.append(output.values.detach()[mask])
        log_ratio_sums[index] = (output.logprobs.detach() - ref).sum(1)  # both are 0 outside the mask
    residual, value, log_ratios = torch.cat(residuals), torch.cat(values), log_ratio_sums.cpu()
    scores = torch.tensor([answer.score for answer in answers])
    every = torch.ones_like(value, dtype=torch.bool)[None]
    g = scores - section.beta * log_ratios
    return {
        "qlearning/loss": float(torch.stack(losses).sum()),
        "qlearning/residual": float(residual.square().mean().sqrt()),
        "qlearning/g_std": grouped_std(g, [answer.prompt.row for answer in answers]),
        "qlearning/log_ratio": float(log_ratios.mean()),
        "value/mean": float(value.mean()),
        "value/explained_variance": explained_variance(value[None], (value + residual)[None], every),
        "tokens/trained": float(tokens),
    }


def _padded(references: Sequence[Tensor], index: Tensor) -> Tensor:
    """[B, R] of the answers at `index`, 0 outside the mask."""
    return pad_sequence([references[i] for i in index.tolist()], batch_first=True)


def as_completions(answers: Sequence[ScoredResponse]) -> Completions:
    """Answers of the data as if they had been sampled; with which probability is not known."""
    return Completions(
        prompts=[a.prompt for a in answers],
        response_ids=[a.response_ids for a in answers],
        sampler_logprobs=[[math.nan] * len(a.response_ids) for a in answers],
        truncated_mass=[[math.nan] * len(a.response_ids) for a in answers],
        finish_reasons=[a.finish_reason for a in answers],
    )


@torch.no_grad()
def inspect_answers(
    policy: Policy, answers: Sequence[ScoredResponse], references: Sequence[Tensor], section: QLearningSection
) -> Experience:
    """What the policy and V make of every token of these answers, as a cycle of PPO would have found it."""
    completions = as_completions(answers)
    rows = completions.rows()
    mask = rows.response_mask
    new, entropy, values = (torch.zeros(mask.shape) for _ in range(3))
    for index, part, _ in scored_microbatches(answers, section.microbatch_tokens, policy.model.device):
        output, width = policy(part, temperature=1.0), part.response_mask.shape[1]
        assert output.values is not None
        for whole, found in ((new, output.logprobs), (entropy, output.entropy), (values, output.values)):
            whole[index, :width] = found.cpu()
    ref = pad_sequence(list(references), batch_first=True)
    scores = torch.tensor([a.score for a in answers])
    rewards = place_rewards(scores, new, ref, mask, kl_coef=section.beta)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=section.lam)
    rollout = Rollout(rows, new, ref, values, rewards, advantages, returns)
    return Experience(completions, ScoredBatch(scores, {}), rollout, advantages, entropy, section.beta, {}, [])


def input_hashes(config: QLearningConfig) -> dict[str, str]:
    """Hashes of what the run reads, by config key: it continues only on the same."""
    m, data = config.model, config.data
    beside = {"model.reference": m.reference, "model.critic": None if m.critic in ("shared", "separate") else m.critic}
    hashes = {key: hash_files(path) for key, path in beside.items() if path is not None}
    for i, path in enumerate(data.paths):
        key = "data.path" if isinstance(data.path, str) else f"data.path[{i}]"
        hashes[key] = hash_files(f"{path}/rollouts" if is_run(path) else path, kind="dataset")
    return {"model.policy": hash_files(m.policy, m.revision)} | hashes
