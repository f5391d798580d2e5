"""A trained model as a plain Hugging Face directory: what `transformers` and vLLM load, checked by loading it."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from tether.errors import ModelError, RunError
from tether.models.ilql import FOLDER as ILQL
from tether.models.language_model import LanguageModel
from tether.models.loading import head_size, without_dropout
from tether.runs import Run
from tether.runs.files import SUMS, damage, replacing_directory, wrap_os_errors, write_sums


def save_model(
    model: LanguageModel, tokenizer: PreTrainedTokenizerBase, directory: Path, *,
    card: str, temperature: float | None = None, max_new_tokens: int | None = None, stop_ids: tuple[int, ...] = (),
    add: Callable[[Path], None] = lambda directory: None,
) -> None:  # fmt: skip
    """Write weights (adapters merged), tokenizer, generation_config and model card, then reload and compare.

    add: writes what else belongs in the directory. The generation config samples as training did. A directory appears
    whole or not at all, with the checksums of its files. Raises ModelError when the reloaded model's logits differ.
    """
    hf_model = merged(model)
    before, generation = hf_model.generation_config, copy.deepcopy(hf_model.generation_config)
    if temperature is not None:
        generation.update(do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens)
        generation.max_length = None  # its default would speak against max_new_tokens
    if stop_ids:
        generation.eos_token_id = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
    with wrap_os_errors(directory), replacing_directory(directory) as partial:
        hf_model.generation_config = generation
        try:
            hf_model.save_pretrained(partial)
        finally:
            hf_model.generation_config = before
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        add(partial)
        check_reload(hf_model, partial)
        write_sums(partial)


def merged(model: LanguageModel) -> Any:
    """The transformers model without adapters: under LoRA a merged copy in float32 on the CPU, else the model itself.

    A GPU that was large enough to train adapters may have no room for the whole model twice in float32.
    """
    if not hasattr(model.lm, "merge_and_unload"):
        return model.hf_model
    copies: dict[int, Any] = {id(b): b.to("cpu", copy=True) for b in model.lm.buffers()}
    for p in model.lm.parameters():  # deepcopy takes these instead of copying where the weights are
        copies[id(p)] = torch.nn.Parameter(p.detach().to("cpu", torch.float32, copy=True), requires_grad=False)
    return copy.deepcopy(model.lm, copies).merge_and_unload()


@torch.no_grad()
def save_for_engine(model: LanguageModel, directory: Path, dtype: torch.dtype) -> None:
    """Weights in `dtype`, adapters merged, and the config, for an engine that samples beside the trainer.

    A head that shares the embeddings' matrix is written as one of its own: vLLM 0.32 on a CPU packs a shared one for
    its kernels when it starts, and misses it when it loads again.
    """
    hf_model = merged(model)
    with wrap_os_errors(directory):
        state = {name: _narrow(tensor, dtype) for name, tensor in hf_model.state_dict().items()}
        head = hf_model.get_output_embeddings()
        name = next((name for name, module in hf_model.named_modules() if module is head), None)
        if untied := f"{name}.weight" in state:
            state[f"{name}.weight"] = state[f"{name}.weight"].clone()
        hf_model.save_pretrained(directory, state_dict=state)
        config = copy.deepcopy(hf_model.config)
        if untied:
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        config.save_pretrained(directory)


def _narrow(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)


@torch.no_grad()
def check_reload(hf_model: Any, directory: Path) -> None:
    """Raise ModelError unless `directory`, loaded by transformers, has the weights of `hf_model` and gives its logits.

    It is loaded on the CPU: the device that trained the model may not hold it twice, and rounds logits in another way.
    """
    own_code = not type(hf_model).__module__.startswith("transformers.models")  # trusted once, when it was loaded
    loader: Any = type(hf_model) if own_code else AutoModelForCausalLM
    again = without_dropout(loader.from_pretrained(directory, dtype=hf_model.dtype))
    want, got = hf_model.state_dict(), again.state_dict()
    for name in sorted(want.keys() | got.keys()):
        if name not in want or name not in got or not torch.equal(want[name].cpu(), got[name]):
            raise ModelError(f"{directory}: {name} is not what was trained: it must not be used.")
    tokens = torch.arange(8)[None] * 7919 % hf_model.config.get_text_config().vocab_size
    a, b = (m(input_ids=tokens.to(m.device), use_cache=False).logits.float().cpu() for m in (hf_model, again))
    gap, allowed = (a - b).abs().max().item(), (1e-4 if hf_model.dtype == torch.float32 else 2e-2)
    if not gap <= allowed * max(1.0, a.abs().max().item()):
        raise ModelError(f"{directory} gives other logits than the trained model (by {gap:.2g}): it must not be used.")


def export(run: str | Path | Run, to: str | Path, *, best: bool = False) -> Path:
    """Copy a finished run's final model to `to`, and check that it loads as it was.

    best: the best evaluated policy of a PPO run instead. Raises RunError where there is none, or `to` is not empty.
    """
    run = Run.open(run) if not isinstance(run, Run) else run
    to = Path(to)
    source = run.path / "best" if best else run.final
    if not source.is_dir():
        state = run.status["state"]
        raise RunError(
            f"{run.path} is {state} and has no {source.name}/ model: there is nothing to export. "
            + (
                "tether ppo writes best/ where evaluate.every is above 0: leave out --best."
                if best
                else "Run the same command again to finish it, or point at a checkpoint's policy directory."
            )
        )
    if damaged := damage(source):
        raise RunError(
            f"{source} is damaged ({damaged}): a copy would be too. Run the same command again: it writes the model "
            "from the last checkpoint."
        )
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunError(f"{to} exists and is not empty: its files would mix with the model's. Name a new directory.")
    with replacing_directory(to.absolute()) as partial:
        unwanted = shutil.ignore_patterns("critic", ILQL, "best.json", SUMS)
        shutil.copytree(source, partial, dirs_exist_ok=True, ignore=unwanted)
        if run.kind.final == "language model":
            model = without_dropout(AutoModelForCausalLM.from_pretrained(source))
            check_reload(model, partial)
            if note := vllm_note(model.config):
                print(note, file=sys.stderr)
            if (source / ILQL).is_dir():
                with (partial / "README.md").open("a", encoding="utf-8") as card:
                    card.write("\nThis copy was exported without `ilql/`: it is the language model alone.\n")
                print(
                    f"{to} is the language model alone, which imitates the data: the Q-learning heads that steer it in "
                    f"{source} (ilql/) are known to Tether's own sampler only",
                    file=sys.stderr,
                )
        write_sums(partial)
    return to


# vLLM's list for attention on a CPU (512 in newer versions only): 0.32 refused heads of 24 there and served 32.
# FlashAttention, its usual choice on GPUs, takes multiples of 8 up to 256.
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def vllm_note(config: Any) -> str | None:
    """What to know before serving a model of this transformers config with vLLM; None where its head size is served."""
    size = head_size(config.get_text_config())
    places = [] if size in CPU_HEADS else ["on a CPU, where heads have " + ", ".join(map(str, CPU_HEADS))]
    if size % 8 or size > 256:
        places.append("with FlashAttention on a GPU, where heads have a multiple of 8 up to 256")
    if not places:
        return None
    return (
        f"attention heads have {size} dimensions: vLLM refuses such a model {'; and '.join(places)}. transformers runs "
        "it anywhere; to serve it with vLLM, begin with a model that has another head size."
    )
