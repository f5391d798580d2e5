"""What --print-config prints loads back as the very same config, whatever is in it."""

import string
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tether.config import (
    Config,
    DataConfig,
    DPOConfig,
    DPOSection,
    EvaluateConfig,
    ILQLSection,
    InitModelConfig,
    JudgeConfig,
    JudgedConfig,
    JudgeSection,
    KLConfig,
    LimitsConfig,
    LogConfig,
    LoraConfig,
    MissingEosConfig,
    ModelConfig,
    OptimConfig,
    PairsConfig,
    PPOConfig,
    PPOSection,
    PromptsConfig,
    QLearningConfig,
    QLearningSection,
    ReferencedModelConfig,
    RewardShapingConfig,
    RewardSourceConfig,
    SamplingConfig,
    ScoredConfig,
    SFTConfig,
    SFTModelConfig,
    WandbConfig,
)
from tether.config.reading import load_config, to_yaml
from tether.config.sections import longest_name

text = st.one_of(
    st.text(st.characters(codec="utf-8"), min_size=1),
    st.text(string.digits + "+-.eE_xob:~# ,[]{}'\"\n\t&*!|>%@`=<?", min_size=1),
    st.sampled_from(
        ["null", "~", "true", "No", "1e-5", "1_000", "0o7", ".inf", "<<", "=", "2020-01-01", "- a", "a: b"]
    ),
).filter(lambda text: longest_name(text) <= 255)
above_zero = st.floats(1e-30, 1e30)
maybe = lambda strategy: st.none() | strategy  # noqa: E731
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
mapping = st.dictionaries(text, plain, max_size=4)
lora = maybe(
    st.builds(LoraConfig, rank=st.integers(1, 99), alpha=above_zero, targets=text | st.lists(text, max_size=3))
)
init = st.builds(InitModelConfig, init=mapping.map(lambda keys: keys | {"model_type": "llama"}), tokenizer=text)
optim = st.builds(
    OptimConfig,
    lr=maybe(above_zero),
    schedule=st.sampled_from(["linear", "constant", "cosine"]),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    eps=above_zero,
)
ppo_configs = st.builds(
    PPOConfig,
    run=text,
    model=st.builds(ModelConfig, policy=text, critic=text, reference=maybe(text), lora=lora, revision=maybe(text),
                    gradient_checkpointing=st.sampled_from(["auto", True, False])),
    prompts=st.builds(PromptsConfig, path=text, chat_template_kwargs=mapping),
    reward=st.lists(st.builds(RewardSourceConfig, model=text, name=text, weight=above_zero), min_size=1, max_size=3,
                    unique_by=lambda source: source.name),
    reward_shaping=st.builds(RewardShapingConfig, clip=maybe(above_zero),
                             missing_eos=maybe(st.builds(MissingEosConfig, set=st.floats(-9, 9)))),
    seed=st.integers(0, 2**32),
    sampling=st.builds(SamplingConfig, stop_token_ids=maybe(st.lists(st.integers(0, 10**6), max_size=3)),
                       slots=st.just("auto") | st.integers(1, 99)),
    ppo=st.builds(PPOSection, lam=st.floats(0, 1), critic_lam=maybe(st.floats(0, 1)),
                  clip=st.floats(0.01, 0.99), clip_high=maybe(above_zero),
                  kl=st.builds(KLConfig, coef=above_zero, target=maybe(above_zero)), value_clip=maybe(above_zero)),
    optim=optim,
    log=st.builds(LogConfig, wandb=maybe(st.builds(WandbConfig, project=text))),
)  # fmt: skip
sft_configs = st.builds(
    SFTConfig,
    run=text,
    model=st.builds(SFTModelConfig, policy=text | init, lora=lora),
    data=st.builds(DataConfig, path=text, chat_template_kwargs=mapping),
    optim=optim,
)
dpo_configs = st.builds(
    DPOConfig,
    run=text,
    model=st.builds(ReferencedModelConfig, policy=text, reference=maybe(text), lora=lora),
    data=st.builds(PairsConfig, path=text),
    dpo=st.builds(DPOSection, beta=above_zero, nll=maybe(above_zero).map(lambda x: x or 0.0)),
    optim=st.builds(OptimConfig, lr=maybe(above_zero)),
)
qlearning_configs = st.builds(
    QLearningConfig,
    run=text,
    model=st.builds(ModelConfig, policy=text, critic=text, reference=maybe(text), lora=lora),
    data=st.builds(ScoredConfig, path=text | st.lists(text, min_size=1, max_size=3, unique=True)),
    qlearning=st.builds(QLearningSection, beta=above_zero, lam=st.floats(0, 1)),
    optim=optim,
) | st.builds(
    QLearningConfig,
    run=text,
    model=st.builds(ModelConfig, policy=text, lora=lora),
    data=st.builds(ScoredConfig, path=text),
    qlearning=st.builds(
        QLearningSection, loss=st.just("ilql"),
        ilql=st.builds(ILQLSection, tau=st.floats(0.1, 0.9), strength=above_zero, top_k=st.integers(0, 50)),
    ),
)  # fmt: skip
evaluate_configs = st.builds(
    EvaluateConfig,
    models=st.lists(text, min_size=1, max_size=3),
    prompts=st.builds(PromptsConfig, path=text),
    reward=st.just([RewardSourceConfig(function="a.py:f")]),
    baseline=maybe(text),
)
judge_configs = st.builds(
    JudgeConfig,
    judge=st.builds(JudgeSection, model=text, constitution=text, votes=st.integers(1, 9)),
    data=st.builds(JudgedConfig, path=text),
    limits=st.builds(LimitsConfig, tokens=maybe(st.integers(1, 10**9)), timeout_s=above_zero),
    to=maybe(text),
)


@settings(max_examples=150, deadline=None)
@given(config=ppo_configs | sft_configs | dpo_configs | qlearning_configs | evaluate_configs | judge_configs)
def test_a_printed_config_loads_back_equal(tmp_path_factory, config: Config):
    path = tmp_path_factory.mktemp("roundtrip", numbered=True) / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize("separator", ["\x85", "\u2028", "\u2029", "\n", "\r", "\r\n"])
def test_every_kind_of_line_break_in_a_text_is_kept(tmp_path, separator):
    config = PPOConfig(
        run="r", model=ModelConfig("m", revision=f"a{separator}b"),
        prompts=PromptsConfig("p", chat_template_kwargs={f"k{separator}": [separator, {"x": f"{separator} y"}]}),
    )  # fmt: skip
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path).model == config.model
    assert load_config(path).prompts == config.prompts


def test_two_configs_that_differ_print_differently():
    config = PPOConfig(run="r", model=ModelConfig("m"), prompts=PromptsConfig("p"))
    assert to_yaml(config) != to_yaml(replace(config, seed=1))
