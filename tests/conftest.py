"""What every test may ask for: a tokenizer and models made here, and real ones where the machine has them."""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from jaxtyping import install_import_hook
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other

# Shapes are checked at every call while tests run (tests/test_shapes.py). Production never imports what they are
# written with: the modules name it under TYPE_CHECKING, which is true while these two are loaded, so that the checker
# finds the names. What they import, or what checks them, is loaded before, as it is for everybody.
for _name in ("beartype", "tether.errors"):
    import_module(_name)
_checker = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"  # an int is a float, as for mypy
with install_import_hook(["tether.types", "tether.math"], _checker), patch("typing.TYPE_CHECKING", True):
    for _name in ("tether.types", "tether.math"):
        import_module(_name)

SHARED = Path(os.environ.get("TETHER_SHARED", Path(__file__).parents[2] / "shared"))

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

# Every architecture that Tether is tried on, as small as it goes. Each has what makes it peculiar: grouped KV heads,
# sliding windows, logits scaled or capped, absolute positions, tied embeddings.
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_MIXED = ["sliding_attention", "full_attention"]
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA | {"tie_word_embeddings": True},
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 8},
    "mistral": _LLAMA | {"sliding_window": 8},
    "gemma2": _LLAMA
    | {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 0.5},
    "gemma3_text": _LLAMA | {"head_dim": 8, "sliding_window": 8, "layer_types": _MIXED},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"},
    "granite": _LLAMA | {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "cohere": _LLAMA | {"logit_scale": 0.25},
    "cohere2": _LLAMA | {"logit_scale": 0.25, "sliding_window": 8, "layer_types": _MIXED},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--learning-seed", type=int, default=0, help="seed of the tests marked `learning` (tests/measure.py)"
    )


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Of the model and of the run, in tests that ask for learning: their margins were measured over several."""
    return request.config.getoption("--learning-seed")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory of real models and data; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real models and data in {SHARED}; set TETHER_SHARED to where they are")
    return SHARED


@pytest.fixture(scope="session")
def stories260k(shared: Path) -> Path:
    """A real pretrained Llama of 260,000 weights."""
    return shared / "models" / "stories260K"


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; <pad> is 0, <eos> 1. Has a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Path]:
    """tiny_model("gpt2", seed=1, n_layer=3): the directory of a random model of that kind, tokenizer included."""

    def make(architecture: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
        settings = {"vocab_size": len(tiny_tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
        config = AutoConfig.for_model(architecture, **settings | ARCHITECTURES.get(architecture, {}) | changes)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        directory = tmp_path_factory.mktemp(architecture)
        model.save_pretrained(directory)
        tiny_tokenizer.save_pretrained(directory)
        return directory

    return make
