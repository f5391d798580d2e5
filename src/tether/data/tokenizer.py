"""The tokenizer of a model: loading it, whether it fits the model, and where responses stop."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from tether.errors import ConfigError, ModelError, did_you_mean_final, did_you_mean_path, first_line


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer in a model directory or of a hub id."""
    local = is_directory(path, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises nearly anything here, ImportError and KeyError included
        remedy = (
            did_you_mean_final(path).strip()
            or "A tokenizer needs tokenizer.json (tokenizer.save_pretrained writes it): copy the one of its source."
            if local
            else f"Check the name and the network; offline, give a directory that holds the tokenizer.{_neighbor(path)}"
        )
        raise ModelError(f"{path}: its tokenizer cannot be loaded ({first_line(error)}). {remedy}") from error
    if not tokenizer.get_vocab():
        raise ModelError(
            f"{path}: its tokenizer knows no tokens, so every text would be empty. Copy tokenizer.json there."
        )
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise ModelError if the tokenizer can produce an id for which the model has no embedding.

    vocab_size: rows of the model's embedding. More rows than tokens is common (padding for speed) and harmless.
    """
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= vocab_size:
        raise ModelError(
            f"the tokenizer's {token!r} has id {highest}, but the model's {vocab_size} embeddings end at id "
            f"{vocab_size - 1}: a text with that token has no meaning to the model. Use the tokenizer that the model "
            f"was trained with, or give the model {highest + 1} embeddings (model.resize_token_embeddings)."
        )


def load_generation_config(path: str, revision: str | None = None) -> GenerationConfig | None:
    """The generation config of a model directory or hub id; None where it has none, as a classifier."""
    with suppress(OSError):
        return GenerationConfig.from_pretrained(path, revision=revision or "main")
    return None


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: Any | None, override: Sequence[int] | None
) -> tuple[int, ...]:
    """The tokens that end a response; training appends the first of them to its examples.

    override: `sampling.stop_token_ids`: None is every eos of generation_config, or the tokenizer's where that names
    none; a list replaces them; an empty one means that only the length ends a response.
    """
    vocabulary = set(tokenizer.get_vocab().values())
    if override is not None:
        for token in override:
            if token not in vocabulary:
                raise ConfigError(
                    f"sampling.stop_token_ids holds {token}, which is not a token of the tokenizer (ids 0 to "
                    f"{max(vocabulary)}): no response could ever stop at it. Remove it; null uses the model's own."
                )
        return tuple(dict.fromkeys(override))

    own = tokenizer.eos_token_id
    eos = getattr(generation_config, "eos_token_id", None)
    ids = own if eos is None else eos
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    for token in ids:
        if token not in vocabulary:
            raise ModelError(
                f"the model's generation_config names eos_token_id {token}, which is not a token of the tokenizer (ids "
                f"0 to {max(vocabulary)}): no response could ever stop at it. Use the tokenizer that the model was "
                "trained with, correct generation_config.json, or set sampling.stop_token_ids."
            )
    # Llama 3 lists <|end_of_text|> before the <|eot_id|> that ends a turn; the tokenizer's eos is the one to train.
    return tuple(sorted(dict.fromkeys(ids), key=lambda token: token != own))


def is_directory(path: str, revision: str | None = None) -> bool:
    """Whether a model is in a directory here, not on the hub; ModelError, at once, where it is in neither place."""
    if Path(path).is_file():
        raise ModelError(
            f"{path} is a file, where a model is a directory with config.json, *.safetensors and "
            "tokenizer.json. Name the directory."
        )
    if Path(path).is_dir():
        return True
    if looks_local(path):
        raise ModelError(
            f"{path} does not exist: there is no model to load.{did_you_mean_path(path)} Check the path; a model on "
            "the hub is named owner/name."
        )
    _ask_hub(path, revision or "main")
    return False


def _neighbor(name: str) -> str:
    """' Did you mean …?' for a bare name, which may be that of a directory here."""
    return "" if "/" in name else did_you_mean_path(name)


@cache  # answers alone: what was raised is asked again
def _ask_hub(name: str, revision: str) -> None:
    """ModelError where the hub cannot give a model, by one request: loading it would try again for a minute. Nothing is
    asked where a part of it is in the cache, and nothing is said where loading will say at once what is wrong."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return
    files = ("config.json", "tokenizer.json", "tokenizer_config.json")
    try:
        if not any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in files):
            HfApi().repo_info(name, revision=revision, timeout=5)
        return
    except HFValidationError:
        problem = "no model on the hub can have that name"
    except RepositoryNotFoundError:
        problem = "the hub has no such model that you may read"
    except HfHubHTTPError:
        return
    except Exception as error:
        problem = f"the hub does not answer ({first_line(error)})"
    raise ModelError(
        f"{name} is not a directory here, and {problem}.{_neighbor(name)} Check the path; a model on the hub is named "
        "owner/name."
    )


def looks_local(path: str) -> bool:
    """Whether a path that does not exist was meant as one: not `name` or `owner/name`, or a folder is called owner."""
    owner, _, name = path.partition("/")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.startswith("."):
        return True
    return bool(name) and Path(owner).is_dir()
