"""What runs in vLLM's own environment: a model in `vllm.LLM`, asked and answered through pipes.

    PYTHON vllm_worker.py        with the Python that has vLLM; nothing of tether is imported here

One JSON object a line: requests on standard input, one answer to each on what was standard output. Whatever vLLM
prints goes to standard error, a log file. When standard input closes, because the process that asks has ended however
it ended, this process ends at once, with all that it started.

The scheduler runs in this process too (VLLM_ENABLE_V1_MULTIPROCESSING=0): requests come all at once and in one order,
so the same requests always meet the same batches, and give the same bits.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whoever prints, prints into the log
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    engine: Any = None
    while True:
        request = requests.get()
        try:
            if request["do"] == "start":
                engine = Engine(request["arguments"])
                answer = engine.facts()
            elif request["do"] == "load":
                engine.load(request["path"])
                answer = {}
            else:
                answer = engine.generate(request["rows"], request["salt"])
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _read(requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Hand on what is asked; at its end, end this process and those that it started."""
    for line in sys.stdin:
        requests.put(json.loads(line))
    os.killpg(os.getpgid(0), signal.SIGKILL)  # a group of its own, see tether.samplers.vllm_process


class Engine:
    """vLLM with one model, whose weights change."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        self.llm = LLM(**arguments)

    def facts(self) -> dict[str, Any]:
        """What the other side must know, and what it must be."""
        import vllm

        config = self.llm.llm_engine.vllm_config
        model = config.model_config
        return {
            "version": vllm.__version__,
            "vocabulary": model.get_vocab_size(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "longest": model.max_model_len,
            "block": config.cache_config.block_size,
            "cached": bool(config.cache_config.enable_prefix_caching),
        }

    def load(self, path: str) -> None:
        """Take the weights of a directory. Its path must be new: what was read from an old one may be kept."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": path})

    def generate(self, rows: list[dict[str, Any]], salt: str) -> dict[str, Any]:
        """Of each row its tokens and their log-probs, or, of one that is only to be scored, the prompt's.

        rows: prompt (ids), and what `SamplingParams` takes. salt: what was cached under another is not read.
        """
        from vllm import SamplingParams

        prompts: Any = [{"prompt_token_ids": row.pop("prompt"), "cache_salt": salt} for row in rows]
        params = [SamplingParams(**row, logprobs=0, flat_logprobs=True, detokenize=False) for row in rows]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        found: dict[str, Any] = {"ids": [], "logprobs": [], "prompt_logprobs": []}
        for output in outputs:
            (sampled,) = output.outputs
            found["ids"].append(list(sampled.token_ids))
            found["logprobs"].append(list(sampled.logprobs.logprobs))
            scored = output.prompt_logprobs  # of each token of the prompt but the first
            found["prompt_logprobs"].append(None if scored is None else list(scored.logprobs))
        return found


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # where Python looks first: our modules are not vLLM's
    main()
