"""Values out of range and keys that contradict each other: each is refused before a model is loaded, and says why."""

import pytest

import tether
from tether.config import check
from tether.config.reading import parse_args
from tether.errors import ConfigError

LEAST = {
    "ppo": ["--run", "r", "--model.policy", "m", "--prompts.path", "p", "--reward", "[{function: a.py:f}]"],
    "sft": ["--run", "r", "--model.policy", "m", "--data.path", "d"],
    "reward": ["--run", "r", "--model.policy", "m", "--data.path", "d"],
    "dpo": ["--run", "r", "--model.policy", "m", "--data.path", "d"],
    "qlearning": ["--run", "r", "--model.policy", "m", "--data.path", "d"],
    "evaluate": ["--models", "[m]", "--prompts.path", "p", "--reward", "[{function: a.py:f}]"],
}

BAD = [  # kind, flags, the message's start, what it tells to do
    (
        "ppo",
        "--ppo.minibatch 24",
        "ppo.minibatch=24 does not divide ppo.batch=64: the last 16 responses",
        "divisor of 64",
    ),
    ("ppo", "--ppo.responses_per_prompt 3", "ppo.responses_per_prompt=3 does not divide ppo.batch=64", "divisor of 64"),
    ("ppo", "--ppo.cycles 0", "ppo.cycles=0 is below 1: nothing would be trained", "1 or more"),
    ("ppo", "--ppo.batch -4", "ppo.batch=-4 is below 1", "1 or more"),
    ("ppo", "--ppo.epochs 0", "ppo.epochs=0 is below 1", "1 or more"),
    ("ppo", "--ppo.minibatch 0", "ppo.minibatch=0 is below 1", "1 or more"),
    ("ppo", "--ppo.microbatch_tokens 0", "ppo.microbatch_tokens=0 is below 1", "1 or more"),
    ("ppo", "--ppo.gamma 1.1", "ppo.gamma=1.1 is outside [0, 1]", "between 0 and 1"),
    ("ppo", "--ppo.lam 1.5", "ppo.lam=1.5 is outside [0, 1]", "between 0 and 1"),
    ("ppo", "--ppo.critic_lam -0.1", "ppo.critic_lam=-0.1 is outside [0, 1]", "between 0 and 1"),
    ("ppo", "--ppo.clip 0", "ppo.clip=0.0 is not above 0: every ratio would be clipped", "positive"),
    ("ppo", "--ppo.clip_high -1", "ppo.clip_high=-1.0 is not above 0", "positive"),
    ("ppo", "--ppo.clip 1.0", "ppo.clip=1.0: the lower ratio bound 1 - 1.0 is not above 0", "below 1"),
    ("ppo", "--ppo.value_clip 0", "ppo.value_clip=0.0 is not above 0", "null turns the clip off"),
    ("ppo", "--ppo.value_coef -1", "ppo.value_coef=-1.0 is below 0", "0 or more"),
    ("ppo", "--ppo.entropy_coef -1", "ppo.entropy_coef=-1.0 is below 0", "0 or more"),
    ("ppo", "--ppo.kl.coef -0.1", "ppo.kl.coef=-0.1 is below 0", "0 or more"),
    ("ppo", "--ppo.kl.target 0", "ppo.kl.target=0.0 is not above 0", "positive"),
    ("ppo", "--ppo.kl.target 6 --ppo.kl.coef 0", "ppo.kl.coef=0.0 is not above 0: an adaptive β", "positive"),
    ("ppo", "--ppo.kl.horizon 0", "ppo.kl.horizon=0.0 is not above 0", "positive"),
    ("ppo", "--ppo.kl.target 6 --ppo.kl.horizon 12", "ppo.kl.horizon=12 is too short for ppo.batch=64", "above 12.8"),
    ("ppo", "--ppo.advantage group", "ppo.responses_per_prompt=1 with ppo.advantage=group", "to 2 or more"),
    ("ppo", "--ppo.group_std true", "ppo.group_std=true with ppo.advantage=gae", "advantage to group"),
    ("ppo", "--ppo.advantage batch --ppo.lam 1", "ppo.lam=1.0 with ppo.advantage=batch", "Leave it out"),
    ("ppo", "--ppo.advantage batch --ppo.value_warmup_cycles 1", "ppo.value_warmup_cycles=1 with", "Leave it out"),
    ("ppo", "--ppo.advantage batch --model.critic separate", "model.critic=separate with", "Leave model.critic out"),
    ("ppo", "--ppo.stop_epoch_at_kl 0", "ppo.stop_epoch_at_kl=0.0 is not above 0", "null turns it off"),
    ("ppo", "--ppo.value_warmup_cycles 200", "ppo.value_warmup_cycles=200 is not below ppo.cycles=200", "fewer"),
    (
        "ppo",
        "--sampling.temperature 0",
        "sampling.temperature=0.0 is not above 0: logits are divided by it",
        "positive",
    ),
    ("ppo", "--sampling.vllm.python p", "sampling.vllm is set with sampling.engine=local", "engine to vllm"),
    ("ppo", "--sampling.pool.workers 3", "sampling.pool is set with sampling.engine=local", "engine to pool"),
    ("ppo", "--sampling.engine pool --sampling.pool.workers 0", "sampling.pool.workers=0 is below 1", "1 or more"),
    ("ppo", "--sampling.engine pool --sampling.pool.gpus 2", "sampling.pool.gpus=2.0 is outside [0, 1]", "Set 0"),
    ("ppo", "--sampling.engine pool --sampling.pool.address here", "sampling.pool.address=here is no", "HOST:PORT"),
    (
        "ppo",
        "--sampling.engine vllm --sampling.temperature 0.7 --sampling.top_p 0.9",
        "sampling.temperature=0.7 with sampling.top_k=0 and sampling.top_p=0.9",
        "temperature to 1",
    ),
    (
        "ppo",
        "--sampling.engine vllm --sampling.vllm.arguments {dtype:\thalf}",
        "sampling.vllm.arguments holds dtype, which the run sets itself",
        "set sampling.vllm.dtype",
    ),
    ("evaluate", "--sampling.engine vllm", "sampling.engine=vllm, but tether evaluate samples in its own", "Leave"),
    ("ppo", "--sampling.top_k -1", "sampling.top_k=-1 is below 0", "0 or more"),
    ("ppo", "--sampling.top_p 0", "sampling.top_p=0.0 is outside (0, 1]", "1 to keep all"),
    (
        "ppo",
        "--sampling.max_new_tokens 0",
        "sampling.max_new_tokens=0 is below 1: responses would be empty",
        "1 or more",
    ),
    ("ppo", "--sampling.slots 0", "sampling.slots=0 is below 1", "auto chooses"),
    ("ppo", "--sampling.stop_token_ids [3,-1]", "sampling.stop_token_ids=-1 is below 0", "0 or more"),
    ("ppo", "--prompts.max_tokens 0", "prompts.max_tokens=0 is below 1", "1 or more"),
    ("ppo", "--prompts.limit 0", "prompts.limit=0 is below 1", "null uses all"),
    ("ppo", "--model.lora.rank 0", "model.lora.rank=0 is below 1", "lora: null trains every weight"),
    ("ppo", "--model.lora.alpha 0", "model.lora.alpha=0.0 is not above 0", "positive"),
    ("ppo", "--reward []", "reward is empty: nothing would score the responses", "Add {function: FILE.py:NAME}"),
    (
        "ppo",
        "--reward [{}]",
        "reward[0] needs exactly one of function, model, models, url, judge, and has none",
        "Add one",
    ),
    (
        "ppo",
        "--reward [{function:\ta.py:f,\tmodel:\tm}]",
        "reward[0] needs exactly one of function, model, models, url, judge, and has function and model",
        "drop one",
    ),
    ("ppo", "--reward [{function:\ta.py}]", "reward[0].function='a.py' does not name a function", "FILE.py:NAME"),
    (
        "ppo",
        "--reward [{model:\ta/x},{model:\tb/x}]",
        "reward[1] is called 'x' like one before it",
        "Set reward[1].name",
    ),
    ("ppo", "--reward [{function:\ta.py:score}]", "reward[0] is called 'score', as the metric", "Set reward[0].name"),
    ("ppo", "--reward [{model:\tm,\ttimeout_s:\t0}]", "reward[0].timeout_s=0.0 is not above 0", "positive"),
    ("ppo", "--reward [{model:\tm,\tweight:\t.nan}]", "reward[0].weight=nan is not a finite number", "Set a number"),
    ("ppo", "--reward_shaping.clip 0", "reward_shaping.clip=0.0 is not above 0", "null turns it off"),
    ("ppo", "--reward_shaping.missing_eos {}", "reward_shaping.missing_eos needs exactly one of", "Write {set: -1.0}"),
    ("ppo", "--optim.lr 0", "optim.lr=0.0 is not above 0: nothing would be learned", "positive"),
    ("ppo", "--optim.lr .inf", "optim.lr=inf is not a finite number", "Set a number"),
    ("ppo", "--optim.betas [0.9,1.0]", "optim.betas=(0.9, 1.0): 1.0 is outside [0, 1)", "decay"),
    ("ppo", "--optim.eps 0", "optim.eps=0.0 is not above 0", "positive"),
    ("ppo", "--optim.weight_decay -1", "optim.weight_decay=-1.0 is below 0", "0 or more"),
    ("ppo", "--optim.max_grad_norm 0", "optim.max_grad_norm=0.0 is not above 0", "positive"),
    ("ppo", "--optim.warmup 3200", "optim.warmup=3200 is not below the run's 3200 optimizer steps", "shorter"),
    ("ppo", "--checkpoint.keep 1", "checkpoint.keep=1 is below 2", "2 or more"),
    ("ppo", "--checkpoint.every 0", "checkpoint.every=0 is below 1: the run could not be resumed", "1 or more"),
    ("ppo", "--evaluate.count 0", "evaluate.count=0 is below 1", "evaluate.every 0 turns it off"),
    ("ppo", "--log.rollouts_every -1", "log.rollouts_every=-1 is below 0", "0 or more"),
    ("ppo", "--device meta", "device='meta' is not a device that anything can be computed on", "Set one of auto, cpu"),
    ("evaluate", "--reward [{model:\tm,arguments:\t{a:\t1}}]", "reward[0].arguments is given with a model", "Leave it"),
    ("evaluate", "--device abacus", "device='abacus' is not a device", "Set one of auto, cpu"),
    ("ppo", "--seed -1", "seed=-1 is outside [0, 2^63)", "Set e.g. 0"),
    ("ppo", "--run=", "run is empty: it would name nothing", "Give it a value"),
    ("sft", "--sft.epochs 0", "sft.epochs=0 is below 1", "1 or more"),
    ("sft", "--sft.batch 0", "sft.batch=0 is below 1", "1 or more"),
    ("sft", "--data.max_tokens 1", "data.max_tokens=1 is below 2: no example would fit", "2 or more"),
    ("sft", "--model.policy {init:\t{},tokenizer:\tt}", "model.policy.init has no model_type", "model_type: llama"),
    (
        "reward",
        "--reward_model.test_fraction 1",
        "reward_model.test_fraction=1.0 is outside [0, 1)",
        "Set e.g. 0.1",
    ),
    ("reward", "--reward_model.center -1", "reward_model.center=-1.0 is below 0", "0 or more"),
    ("dpo", "--dpo.beta 0", "dpo.beta=0.0 is not above 0: no preference could move the policy", "positive"),
    ("dpo", "--dpo.beta -1", "dpo.beta=-1.0 is not above 0", "positive"),
    ("dpo", "--dpo.flipped 0.5", "dpo.flipped=0.5 is outside [0, 0.5)", "below 0.5"),
    ("dpo", "--dpo.smoothing -0.1", "dpo.smoothing=-0.1 is outside [0, 0.5)", "below 0.5"),
    ("dpo", "--dpo.test_fraction 1", "dpo.test_fraction=1.0 is outside [0, 1)", "Set e.g. 0.1"),
    ("dpo", "--dpo.nll -1", "dpo.nll=-1.0 is below 0", "0 or more"),
    ("dpo", "--dpo.gamma 0.5", "dpo.gamma=0.5 with dpo.loss=sigmoid, which does not read it", "dpo.loss to simpo"),
    ("dpo", "--dpo.loss orpo --dpo.nll 1", "dpo.nll=1.0 with dpo.loss=orpo, which does not read it", "Leave it out"),
    ("dpo", "--dpo.loss simpo --dpo.average true", "dpo.average=true with dpo.loss=simpo", "Leave it out"),
    ("dpo", "--dpo.flipped 0.1 --dpo.smoothing 0.1", "dpo.flipped=0.1 and dpo.smoothing=0.1 pull", "Keep one"),
    ("dpo", "--dpo.loss simpo --model.reference r", "model.reference=r with dpo.loss=simpo", "Leave it out"),
    ("dpo", "--optim.critic_lr 1", "optim.critic_lr=1.0 with dpo.loss=sigmoid", "Leave it out"),
    ("qlearning", "--qlearning.beta 0", "qlearning.beta=0.0 is not above 0: without a KL", "positive"),
    ("qlearning", "--qlearning.lam 1.1", "qlearning.lam=1.1 is outside [0, 1]", "between 0 and 1"),
    ("qlearning", "--qlearning.ilql.tau 1", "qlearning.ilql.tau=1.0 is outside (0, 1)", "0.7 to 0.9"),
    ("qlearning", "--qlearning.ilql.tau 0", "qlearning.ilql.tau=0.0 is outside (0, 1)", "0.7 to 0.9"),
    ("qlearning", "--qlearning.ilql.gamma 1.1", "qlearning.ilql.gamma=1.1 is outside [0, 1]", "between 0 and 1"),
    ("qlearning", "--qlearning.ilql.polyak 0", "qlearning.ilql.polyak=0.0 is outside (0, 1]", "above 0"),
    ("qlearning", "--qlearning.ilql.sync_every 0", "qlearning.ilql.sync_every=0 is below 1", "1 or more"),
    ("qlearning", "--qlearning.ilql.strength -1", "qlearning.ilql.strength=-1.0 is below 0", "0 or more"),
    (
        "qlearning",
        "--qlearning.ilql.tau 0.9",
        "qlearning.ilql.tau=0.9 with qlearning.loss=bellman, which does not read it",
        "set qlearning.loss to ilql",
    ),
    (
        "qlearning",
        "--qlearning.loss ilql --qlearning.beta 0.5",
        "qlearning.beta=0.5 with qlearning.loss=ilql, which does not read it",
        "set qlearning.loss to bellman",
    ),
    (
        "qlearning",
        "--qlearning.loss ilql --qlearning.lam 0.5",
        "qlearning.lam=0.5 with qlearning.loss=ilql",
        "Leave it",
    ),
    (
        "qlearning",
        "--qlearning.loss ilql --model.reference r",
        "model.reference=r with qlearning.loss=ilql, which has no reference",
        "set qlearning.loss to bellman",
    ),
    (
        "qlearning",
        "--qlearning.loss ilql --model.critic separate",
        "model.critic=separate with qlearning.loss=ilql, whose critic is its own head V",
        "Leave it out",
    ),
    ("qlearning", "--qlearning.batch 0", "qlearning.batch=0 is below 1", "1 or more"),
    ("qlearning", "--data.path []", "data.path is an empty list", "Name a file or run"),
    ("qlearning", "--data.path [a,\tb,\ta]", "data.path names a twice", "qlearning.epochs"),
    ("evaluate", "--models []", "models is empty: there is nothing to evaluate", "List at least one"),
    ("evaluate", "--samples 0", "samples=0 is below 1", "1 or more"),
    ("evaluate", "--best_of [0]", "best_of=0 is below 1: there would be no answer to choose", "1 or more"),
    ("evaluate", "--best_of [1,16,32]", "best_of holds 16, but there are samples=8", "Set samples to 32 or more"),
]


@pytest.mark.parametrize(("kind", "flags", "says", "advises"), BAD, ids=[f"{kind} {flags}" for kind, flags, *_ in BAD])
def test_a_bad_config_is_refused_with_the_value_the_reason_and_the_remedy(kind, flags, says, advises):
    argv = [word.replace("\t", " ") for word in flags.split(" ")]
    with pytest.raises(ConfigError) as caught:
        parse_args(kind, LEAST[kind] + argv)
    message = str(caught.value)
    assert message.startswith(says)
    assert advises in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("kind", LEAST)
def test_the_least_config_is_accepted(kind):
    check(parse_args(kind, LEAST[kind])[0])


@pytest.mark.parametrize(
    "flags",
    [
        "--ppo.gamma 0 --ppo.lam 1",
        "--ppo.clip 0.2 --ppo.clip_high 1.5 --ppo.value_clip null",
        "--ppo.kl.coef 0",
        "--ppo.minibatch 64 --ppo.responses_per_prompt 64",
        "--sampling.top_p 1 --sampling.top_k 0 --sampling.stop_token_ids []",
        "--optim.warmup 3199",
        "--evaluate.every 0 --log.rollouts_every 0",
    ],
)
def test_values_at_the_edge_are_accepted(flags):
    parse_args("ppo", LEAST["ppo"] + flags.split())


def test_a_path_in_place_of_a_config_is_answered_with_load_config():
    with pytest.raises(ConfigError, match=r"config is str 'ppo.yaml'.*tether\.load_config"):
        tether.ppo("ppo.yaml")
