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
                    f"sampling.stop_token_ids holds {token}, which is no token of the tokenizer (ids 0 to "
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
                f"the model's generation_config names eos_token_id {token}, which is no token of the tokenizer (ids 0 "
                f"to {max(vocabulary)}): no response could ever stop at it. Use the tokenizer that the model was "
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
    if problem := _hub_problem(path, revision or "main"):
        raise ModelError(
            f"{path} is not a directory here, and {problem}.{_neighbor(path)} Check the path; a model on the hub is "
            "named owner/name."
        )
    return False


def _neighbor(name: str) -> str:
    """' Did you mean …?' for a bare name, which may be that of a directory here."""
    return "" if "/" in name else did_you_mean_path(name)


@cache
def _hub_problem(name: str, revision: str) -> str | None:
    """Why the hub cannot give a model, by one request: loading it would try again for a minute. None where it can,
    where the model is in the cache, and where loading will say at once what is wrong."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return None
    try:
        HfApi().repo_info(name, revision=revision, timeout=5)
    except RepositoryNotFoundError:
        return "the hub has no such model that you may read"
    except HfHubHTTPError:
        return None
    except Exception as error:
        return f"the hub does not answer ({first_line(error)})"
    return None


def looks_local(path: str) -> bool:
    """Whether a path that does not exist was meant as one: not `name` or `owner/name`, or a folder is called owner."""
    owner, _, name = path.partition("/")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.startswith("."):
        return True
    return bool(name) and Path(owner).is_dir()
