"""Policies of every kind, and three optimizer steps on them: on one process or on several."""

import copy
from typing import Any

import torch
from torch import Tensor

from tether.config import LoraConfig, OptimConfig, PPOSection, RewardShapingConfig, RewardSourceConfig
from tether.data.tokenizer import load_tokenizer
from tether.distributed.ranks import Ranks
from tether.distributed.shard import lay_out, whole
from tether.errors import RewardError
from tether.models.language_model import LanguageModel
from tether.models.loading import add_lora, checkpoint_activations
from tether.models.policy import Policy, Reference, SeparateCritic
from tether.rewards import build_reward
from tether.train.optim import ScheduledOptimizer, build_optimizer
from tether.train.update import accumulate
from tether.types import Completions, Prompt, Rollout
from tiny import ragged_rows, randomize, transformer

KINDS: dict[str, dict[str, Any]] = {
    "tied": {"tied": True},
    "untied": {},
    "adapters": {"lora": True},
    "separate critic": {"separate": True},
    "group": {"advantage": "group"},
    "checkpointed activations": {"tied": True, "checkpointed": True},
}
LAYOUTS = [*((kind, "full") for kind in KINDS), ("tied", "replicate"), ("adapters", "replicate")]


def build(*, tied: bool = False, lora: bool = False, separate: bool = False, checkpointed: bool = False,
          advantage: str = "gae") -> Policy:  # fmt: skip
    lm = transformer("llama", tie_word_embeddings=tied)
    critic = SeparateCritic(copy.deepcopy(lm.base_model), torch.nn.Linear(32, 1), torch.float32) if separate else None
    if lora:
        lm = add_lora(lm, LoraConfig(rank=2), seed=0)
        for name, parameter in lm.named_parameters():
            if "lora_" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    if checkpointed:
        checkpoint_activations(lm)
    policy = Policy(LanguageModel(lm, torch.float32), critic, value_head=advantage == "gae")
    if policy.has_critic:
        randomize(critic.head if critic else policy.value_head)
    return policy.train()


def rollout(critic: bool) -> Rollout:
    rows = ragged_rows((5, 1, 12, 3, 7), (6, 14, 3, 1, 9))
    generator = torch.Generator().manual_seed(3)
    old, ref, values, rewards, advantages, returns = (
        torch.randn(rows.response_mask.shape, generator=generator) * rows.response_mask for _ in range(6)
    )
    return Rollout(rows, old - 3, ref - 3, values if critic else None, rewards, advantages, returns if critic else None)


def gradients(kind: str, ranks: Ranks, shard: str) -> dict[str, Tensor]:
    """The gradient of a minibatch by weight, its metrics and log-probs, and every weight after three steps."""
    settings = KINDS[kind]
    policy = build(**settings)
    reference = Reference(policy, Policy(LanguageModel(transformer("llama", seed=1), torch.float32), value_head=False))
    lay_out(policy, reference, ranks, sharded=shard == "full" and ranks.size > 1)
    batch = rollout(policy.has_critic)
    ppo = PPOSection(microbatch_tokens=16, advantage=settings.get("advantage", "gae"), responses_per_prompt=5)
    optim = OptimConfig(lr=1e-3, schedule="constant", max_grad_norm=0.5)
    named = [(n, p) for n, p in policy.named_parameters() if p.requires_grad]
    steps = ScheduledOptimizer(build_optimizer(optim, named, lora=False), optim, 3, ranks)
    found: dict[str, Tensor] = {}
    for step in range(3):
        if step == 1:  # forward passes alone, between steps: the weights of the last step must not linger
            found["reference"] = reference.logprobs(batch.rows, temperature=0.7)
            found["adapter off"] = policy.reference_logprobs(batch.rows, temperature=0.7)
        metrics, logprobs = accumulate(policy, batch, ppo, kl_coef=0.3, temperature=0.7, ranks=ranks)
        if step == 0:
            copies = [p.grad.clone() for _, p in named if not hasattr(p, "full_tensor")]
            ranks.sum_gradients([p for _, p in named])
            found["gradient"] = torch.cat([whole(p.grad).flatten() for _, p in named])
            for (_, p), before in zip([x for x in named if not hasattr(x[1], "full_tensor")], copies, strict=True):
                p.grad.copy_(before)
        found[f"log-probs {step}"] = logprobs
        found[f"metrics {step}"] = torch.tensor([metrics[name] for name in sorted(metrics)])
        steps.step(step)
    states = [steps.optimizer.state[p][key] for _, p in named for key in ("exp_avg", "exp_avg_sq")]
    held = sum(getattr(x, "to_local", lambda x=x: x)().numel() for x in [*(p for _, p in named), *states])
    found["share"] = torch.tensor(held / sum(x.numel() for x in [*(p for _, p in named), *states]))
    return found | {"weights after three steps": torch.cat([whole(p.detach()).flatten() for _, p in named])}


def scores(policy: str, models: list[str], ranks: Ranks) -> dict[str, Any]:
    """What a reward model and an ensemble say of nine responses, how many of them this rank scored, and what is said of
    one that is too long."""
    one = RewardSourceConfig(model=models[0], name="one", dtype="float32")
    several = RewardSourceConfig(models=models, name="several", dtype="float32", weight=0.5)
    tokenizer = load_tokenizer(policy)
    rewards = build_reward([several, one], RewardShapingConfig(), tokenizer, [1], torch.device("cpu"))
    asked, model = [], rewards.sources["one"][0].model
    plain = model.score
    model.score = lambda rows: (asked.append(len(rows)), plain(rows))[1]
    lengths = [5, 21, 2, 17, 9, 13, 3, 8, 30]
    ids = torch.randint(2, 200, (len(lengths), 40), generator=torch.Generator().manual_seed(0)).tolist()
    responses = [row[:n] for row, n in zip(ids, lengths, strict=True)]
    prompts = [Prompt((65, 66, 67), "ABC", i) for i in range(len(lengths))]

    def of(responses):
        nothing = [[0.0] * len(r) for r in responses]
        return rewards.score(
            Completions(prompts, responses, nothing, nothing, ["length"] * len(responses)), ranks=ranks
        )

    scored, rows = of(responses), sum(asked)
    try:
        said = of([*responses[:7], [5] * 100_000, responses[8]])
    except RewardError as error:
        said = str(error)
    return {"scores": scored.scores, "parts": scored.parts, "members": scored.members, "rows": rows, "said": said}
