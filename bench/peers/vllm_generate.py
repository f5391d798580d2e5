"""vLLM on the CPU, sampling a fixed number of tokens: told on standard input when (see bench/peer.py)."""

import json
import sys


def main() -> None:
    job = json.loads(sys.argv[1])
    from vllm import LLM, SamplingParams

    width = max(map(len, job["prompts"])) + job["new"]
    llm = LLM(
        model=job["model"],
        max_model_len=width,
        max_num_seqs=len(job["prompts"]),
        enable_prefix_caching=False,
        gpu_memory_utilization=0.3,
    )  # of a CPU: its memory
    sampling = SamplingParams(temperature=1.0, max_tokens=job["new"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    print("@ready 0", flush=True)
    for _ in sys.stdin:
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        print(f"@done {sum(len(o.outputs[0].token_ids) for o in outputs)}", flush=True)


if __name__ == "__main__":
    main()
