"""Flags: which wins, what may be written, and what is said about a wrong one."""

import pytest

from tether.config import LoraConfig, RewardSourceConfig
from tether.config.reading import Options, parse_args
from tether.errors import ConfigError

FILE = """
run: r
model: {policy: m}
prompts: {path: p}
reward: [{function: a.py:f}, {model: judge, weight: 2}]
ppo: {kl: {coef: 0.5, horizon: 7}}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(FILE)
    return str(path)


def ppo(*argv):
    return parse_args("ppo", argv)[0]


def test_overrides_win_before_and_after_the_file(file):
    assert ppo(file).ppo.kl.coef == 0.5
    assert ppo(file, "--ppo.kl.coef", "0.02").ppo.kl.coef == 0.02
    assert ppo("--ppo.kl.coef", "0.02", file).ppo.kl.coef == 0.02
    assert ppo("--ppo.kl.coef=0.02", file).ppo.kl.coef == 0.02
    assert ppo("--ppo.kl.coef", "0.02", file).ppo.kl.horizon == 7.0  # what no flag names stays


def test_a_key_below_a_value_of_the_file_takes_its_place(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(FILE.replace("policy: m", "policy: m, lora: null"))
    config = ppo(str(path), "--model.lora.rank", "8")
    assert config.model.lora == LoraConfig(rank=8)


def test_the_last_of_two_flags_wins(file):
    assert ppo("--seed", "1", file, "--seed", "2").seed == 2


def test_lists_and_mappings_are_replaced_whole(file):
    config = ppo(file, "--reward", "[{function: b.py:g}]", "--ppo.kl", "{coef: 0.1}")
    assert config.reward == [RewardSourceConfig(function="b.py:g")]
    assert (config.ppo.kl.coef, config.ppo.kl.horizon) == (0.1, None)


def test_a_file_is_not_needed():
    config = ppo("--run", "r", "--model.policy=m", "--prompts.path", "p", "--reward", "[{model: j}]")
    assert (config.run, config.model.policy, config.ppo.cycles) == ("r", "m", 200)


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("model.lora.rank", "8", 8),
        ("model.lora", "{rank: 8}", LoraConfig(rank=8)),
        ("model.lora", "null", None),
        ("ppo.lam", "0.9", 0.9),
        ("ppo.critic_lam", "1", 1.0),
        ("ppo.critic_lam", "null", None),
        ("ppo.clip_high", "0.28", 0.28),
        ("ppo.value_clip", "null", None),
        ("optim.betas", "[0.8, 0.9]", (0.8, 0.9)),
        ("optim.lr", "1e-5", 1e-5),
        ("model.gradient_checkpointing", "true", True),
        ("model.gradient_checkpointing", "auto", "auto"),
        ("sampling.slots", "4", 4),
        ("sampling.stop_token_ids", "[]", []),
        ("reward_shaping.missing_eos.set", "-1", -1.0),
        ("reward_shaping.missing_eos.set", "-1e-3", -0.001),
        ("run", "7", "7"),
        ("run", "true", "true"),
        ("run", "{", "{"),
        ("model.revision", "1e5", "1e5"),
        ("model.revision", "null", None),
        ("prompts.chat_template_kwargs.enable_thinking", "false", None),
    ],
)
def test_a_flag_is_read_by_the_type_of_its_key(file, flag, text, value):
    got = ppo(file, f"--{flag}", text)
    if "kwargs" in flag:
        assert got.prompts.chat_template_kwargs == {"enable_thinking": False}
        return
    for name in flag.split("."):
        got = getattr(got, name)
    assert got == value
    assert type(got) is type(value)


def test_a_model_from_scratch_key_by_key():
    argv = [
        "--run",
        "r",
        "--data.path",
        "d",
        "--model.policy.init.model_type",
        "llama",
        "--model.policy.tokenizer",
        "t",
    ]
    policy = parse_args("sft", argv)[0].model.policy
    assert (policy.init, policy.tokenizer) == ({"model_type": "llama"}, "t")


def test_options_are_no_keys(file):
    assert parse_args("ppo", [file])[1] == Options()
    assert parse_args("ppo", ["--dry-run", file, "--fresh"])[1] == Options(dry_run=True, fresh=True)
    assert parse_args("ppo", [file, "--print-config"])[1] == Options(print_config=True)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("ppo.kl.coeff", "ppo.kl.coef"),
        ("ppo.kl_coef", "ppo.kl.coef"),
        ("kl_coef", "ppo.kl.coef"),
        ("lr", "optim.lr"),
        ("ppo.lr", "optim.lr"),  # the right name in the wrong section, though ppo.kl is spelled more alike
        ("ppo.kl.targets", "ppo.kl.target"),  # not model.lora.targets: misspelled where it stands
        ("modle.dtype", "model.dtype or reward[].dtype or sampling.vllm.dtype"),
        ("learning.rate", None),
        ("ppo.value-clip", "ppo.value_clip"),
        ("PPO.Cycles", "ppo.cycles"),
        ("cycles", "ppo.cycles"),
        ("model.lora.rnk", "model.lora.rank"),
        ("ppo.lam.critic", "ppo.critic_lam"),  # the same words in another order
        ("ppo.lam.actor", "ppo.lam"),
        ("ppo.clip.high", "ppo.clip_high"),
        ("sampling.temprature", "sampling.temperature"),
        ("promts.path", "prompts.path"),
        ("ppo.cycles.x", "ppo.cycles"),
        ("zzz", None),
    ],
)
def test_an_unknown_flag_is_told_what_was_meant(file, wrong, meant):
    with pytest.raises(ConfigError) as caught:
        ppo(file, f"--{wrong}", "1")
    said = f"unknown key {wrong} for tether ppo: did you mean {meant}?" if meant else "--help lists all keys"
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("--dryrun", "--dry-run"),
        ("--dry_run", "--dry-run"),
        ("--dry-run=true", "--dry-run"),
        ("--frsh", "--fresh"),
        ("--print_config", "--print-config"),
        ("--hlep", "--help"),
        ("--verison", "tether --version"),
    ],
)
def test_a_misspelled_option_is_told_what_was_meant_and_asked_for_no_value(file, wrong, meant):
    for argv in ([wrong, file], [file, wrong]):
        with pytest.raises(ConfigError) as caught:
            ppo(*argv)
        assert str(caught.value) == f"unknown flag {wrong}: did you mean {meant}?"


@pytest.mark.parametrize("given", ["rewards.py:helpful", "rewards.py:score", "models/judge"])
def test_a_bare_reward_is_told_a_list_that_is_accepted(file, given):
    with pytest.raises(ConfigError) as caught:
        ppo(file, "--reward", given)
    advice = str(caught.value).rpartition("--reward '")[2].removesuffix("'.")
    (source,) = ppo(file, "--reward", advice).reward
    assert given in (source.function, source.model)


def test_a_key_of_several_commands_names_them_all(file):
    with pytest.raises(
        ConfigError,
        match=r"unknown key data\.path .*one of tether sft, reward, dpo, qlearning, judge and revise\. Drop it",
    ):
        ppo(file, "--data.path", "d")


def test_an_unknown_flag_is_unknown_with_or_without_a_value(file):
    for argv in (["--nope"], ["--nope", "3"], ["--nope", "--fresh"], ["--nope=3"]):
        with pytest.raises(ConfigError, match="unknown key nope for tether ppo"):
            ppo(file, *argv)


def test_a_key_of_another_command_is_told_apart(file):
    with pytest.raises(ConfigError, match=r"unknown key sft\.epochs for tether ppo: it is one of tether sft"):
        ppo(file, "--sft.epochs", "2")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seed"], "--seed has no value"),
        (["--seed", "--fresh"], "--seed has no value"),
        (["-s", "3"], "unknown flag -s"),
        (["other.yaml"], "two config files"),
        (["--reward[0].weight", "2"], r"inside a list, and flags set lists whole. Write --reward '\[…, …\]'"),
        (["--reward.weight", "2"], "inside a list"),
    ],
)
def test_words_that_make_no_flag(file, argv, message):
    with pytest.raises(ConfigError, match=message):
        ppo(file, *argv)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("reward: [{function: a.py:f, wieght: 2}]", r"reward\[0\]\.wieght.*did you mean reward\[\]\.weight"),
        ("reward: [{model: j}, {func: f}]", r"unknown key reward\[1\]\.func "),
        ("ppo: {kl: {coeff: 1}}", r"ppo\.kl\.coeff.*did you mean ppo\.kl\.coef\?"),
        ("model: {policy: m, lora: {r: 8}}", r"unknown key model\.lora\.r "),
        ("modle: {policy: m}", r"modle.*did you mean model\?"),
        ("1: 2", r"unknown key 1 "),
        ("sft: {}", r"unknown key sft for tether ppo: it is one of tether sft"),
    ],
)
def test_unknown_keys_in_the_file_at_any_depth(tmp_path, text, meant):
    path = tmp_path / "c.yaml"
    key = text.partition(":")[0]
    path.write_text("\n".join(line for line in FILE.splitlines() if not line.startswith(key)) + "\n" + text)
    with pytest.raises(ConfigError, match=meant):
        ppo(str(path))


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("ppo.cycles", "many", "ppo.cycles='many': expected a whole number."),
        ("ppo.cycles", "2.5", "ppo.cycles=2.5: expected a whole number."),
        ("ppo.cycles", "'3'", "ppo.cycles='3': expected a whole number."),
        ("ppo.cycles", "null", "ppo.cycles=null: expected a whole number."),
        ("seed", "true", "seed=true: expected a whole number."),
        ("ppo.gamma", "one", "ppo.gamma='one': expected a number."),
        ("ppo.gamma", "false", "ppo.gamma=false: expected a number."),
        ("ppo.group_std", "1", "ppo.group_std=1: expected true or false."),
        ("ppo.group_std", "yes", "ppo.group_std='yes': expected true or false."),
        ("ppo.kl.place", "both", "ppo.kl.place='both': expected reward or loss."),
        ("ppo.lam", "high", "ppo.lam='high': expected a number."),
        ("ppo.critic_lam", "high", "ppo.critic_lam='high': expected a number or null."),
        (
            "ppo.clip",
            "[0.2, 0.28]",
            "ppo.clip=[0.2, 0.28]: expected a number. Write ppo.clip: 0.2 and ppo.clip_high: 0.28.",
        ),
        (
            "ppo.lam",
            "{actor: 0.9, critic: 1.0}",
            "ppo.lam={'actor': 0.9, 'critic': 1.0}: expected a number. Write ppo.lam: 0.9 and ppo.critic_lam: 1.0.",
        ),
        ("optim.betas", "[0.9, a]", "optim.betas[1]='a': expected a number."),
        ("optim.betas", "[0.9]", "optim.betas=[0.9]: expected a list of 2 (a number each)."),
        ("optim.lr", "fast", "optim.lr='fast': expected a number or null."),
        ("model.lora.rank", "x", "model.lora.rank='x': expected a whole number."),
        ("ppo.gamma", "1" + "0" * 400, "ppo.gamma=100000000000000000...0000000000000000000: expected a number."),
        ("ppo", "3", "ppo=3: expected a mapping {cycles, batch, responses_per_prompt, epochs, …}."),
        (
            "reward",
            "a.py:f",
            "reward='a.py:f': expected a list (a mapping {function, model, models, pessimism, …} each). "
            "Write reward: [{function: a.py:f}]; as a flag, --reward '[{function: a.py:f}]'.",
        ),
        ("reward", "[{function: 3}]", "reward[0].function=3: expected text or null. Put it in quotes."),
        ("sampling.stop_token_ids", "2", "sampling.stop_token_ids=2: expected a list (a whole number each) or null."),
        ("prompts.chat_template_kwargs", "3", "prompts.chat_template_kwargs=3: expected a mapping."),
    ],
)
def test_a_wrong_type_is_one_line_with_key_value_and_what_is_expected(file, key, text, message):
    with pytest.raises(ConfigError) as caught:
        ppo(file, f"--{key}", text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run: 7", "run=7: expected text. Put it in quotes."),
        ("run: [r]", "run=['r']: expected text."),
        ("run: {a: b}", "run={'a': 'b'}: expected text."),
        ("run: null", "run=null: expected text."),
    ],
)
def test_in_the_file_text_has_to_be_text(tmp_path, line, message):
    path = tmp_path / "c.yaml"
    path.write_text(FILE.replace("run: r", line))
    with pytest.raises(ConfigError) as caught:
        ppo(str(path))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("argv", "missing"),
    [
        ([], "run and model.policy and prompts.path are missing"),
        (["--run", "r", "--model.policy", "m"], "prompts.path is missing"),
        (["--run", "r", "--model.dtype", "auto", "--prompts.path", "p"], "model.policy is missing"),
    ],
)
def test_missing_keys_are_named(argv, missing):
    with pytest.raises(ConfigError, match=missing):
        ppo(*argv)
