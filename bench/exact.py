"""Does PPO reach the optimum that can be written down?

For the KL-regularized objective the best policy is known: π*(y|x) ∝ ref(y|x)·e^(score(y)/β). With a small vocabulary
and length every response can be enumerated, so KL(π‖π*), and the value V* of every prefix, are exact. Each task is
trained by `tether.ppo` as a user would call it, on a two-layer transformer; nothing here knows how PPO works.

    python bench/exact.py                       every task, 5 seeds, table and docs/exact.svg
    python bench/exact.py --tasks E2 --seeds 0  one
    python bench/exact.py --routes bellman      Q-learning, from answers that nobody's policy wrote
    python bench/exact.py --routes gae group dpo bellman    and how far they are from one another

Needs about half a minute a run on one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: a second thread would only wait for the first
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import tether
from chart import Line, draw
from tether.config import (  # fmt: skip
    CheckpointConfig,
    DPOConfig,
    DPOSection,
    HeldOutConfig,
    KLConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    PairsConfig,
    PPOConfig,
    PPOSection,
    PromptsConfig,
    QLearningConfig,
    QLearningSection,
    ReferencedModelConfig,
    SamplingConfig,
    ScoredConfig,
)
from tether.math import optimality_gap_logmeanexp
from tether.models.language_model import LanguageModel
from tether.models.loading import load_causal_lm
from tether.models.policy import Policy
from tether.samplers.local import LocalSampler
from tether.types import GENERATE, Prompt, Rows, Sampling

CPU = torch.device("cpu")
ROUTES = ["gae", "ahead", "group", "constant", "dpo", "bellman"]
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """A prompt-response world small enough to enumerate. Symbols are ids from 0 on; `stop` may be one of them."""

    name: str
    about: str
    symbols: int
    length: int  # longest response
    stop: int | None
    beta: float
    prompts: tuple[int, ...]  # each a single symbol
    score: Callable[[int, Ids], float]  # (prompt, response) -> score
    reference: str  # "uniform", "bandit" (softmax(-0.3 k)) or "random" (a random transformer)
    cycles: int  # of 256 responses
    known: tuple[float, float] | None = None  # (E score, KL) of π*, where published

    def responses(self) -> list[Ids]:
        """Every response that can be sampled: up to the first stop, or the length limit."""
        found: list[Ids] = []
        others = [s for s in range(self.symbols) if s != self.stop]
        if self.stop is not None:
            found = [(*y, self.stop) for n in range(self.length) for y in itertools.product(others, repeat=n)]
        return found + list(itertools.product(others, repeat=self.length))


def _balanced(_: int, y: Ids) -> float:
    return float(y.count(0) == y.count(1))


def _right_length(_: int, y: Ids) -> float:
    return 1.0 - abs(len(y) - 3) / 2 if y[-1] == 3 else -1.0


def _echo(prompt: int, y: Ids) -> float:
    return 0.6 * y.count(prompt) - 0.25 * len(y) if y[-1] == 3 else -1.0


TASKS = {
    task.name: task
    for task in (
        Task("E1 β=1", "bandit of 8 arms, r = sin k",
             8, 1, None, 1.0, (0,), lambda _, y: math.sin(y[0]), "bandit", 60, (0.522140, 0.140748)),
        Task("E1 β=.5", "the same, looser leash",
             8, 1, None, 0.5, (0,), lambda _, y: math.sin(y[0]), "bandit", 60, (0.700780, 0.399364)),
        Task("E2", "6 of 3 symbols, 1 if as many 0 as 1",
             3, 6, None, 0.5, (0,), _balanced, "uniform", 200, (0.639232, 0.473890)),
        Task("E3 length", "stop at the third token; never stopping scores -1",
             4, 5, 3, 0.5, (0,), _right_length, "random", 150),
        Task("E3 echo", "two prompts: repeat the prompt's symbol, length costs, stop",
             4, 5, 3, 0.5, (0, 1), _echo, "random", 250),
    )
}  # fmt: skip

# ---------------------------------------------------------------- the optimum, by enumeration


@dataclass(frozen=True)
class Exact:
    """One model against the optimum, over every response to every prompt."""

    kl_to_optimum: float  # KL(π‖π*), nats, mean over prompts
    score: float  # E score under π
    kl_to_reference: float  # KL(π‖ref), nats
    value_rmse: float | None  # critic against V*, weighted by visits under π
    logprobs: list[list[float]]  # of every response to every prompt under π


def response_logprobs(model: LanguageModel, prompt: int, responses: Sequence[Ids]) -> torch.Tensor:
    """[n] log-probability of every response, float64: plain log-softmax of the model's own logits."""
    rows = Rows.of([(prompt,)] * len(responses), responses)
    with torch.no_grad():
        logits = model.hf_model(input_ids=rows.tokens, use_cache=False).logits.double()
    logprobs = logits.log_softmax(-1)[:, :-1].gather(-1, rows.tokens[:, 1:, None]).squeeze(-1)
    return (logprobs * rows.response_mask).sum(1)


def compare(task: Task, policy: LanguageModel, reference: LanguageModel, values: Callable[[Rows], Any] | None) -> Exact:
    responses = task.responses()
    totals, logprobs = [0.0, 0.0, 0.0, 0.0], list[list[float]]()
    for prompt in task.prompts:
        score = torch.tensor([task.score(prompt, y) for y in responses], dtype=torch.float64)
        ref, pi = (response_logprobs(m, prompt, responses) for m in (reference, policy))
        best = ref + score / task.beta
        best = best - best.logsumexp(0)
        p = pi.exp()
        assert abs(float(p.sum()) - 1) < 1e-4, "the enumeration missed a response"
        logprobs.append(pi.tolist())
        totals[0] += float((p * (pi - best)).sum())
        totals[1] += float((p * score).sum())
        totals[2] += float((p * (pi - ref)).sum())
        totals[3] += _value_error(task, prompt, responses, ref, p, score, values) if values else 0.0
    n = len(task.prompts)
    rmse = math.sqrt(totals[3] / n) if values else None
    return Exact(totals[0] / n, totals[1] / n, totals[2] / n, rmse, logprobs)


def _value_error(task: Task, prompt: int, responses: list[Ids], ref: Any, p: Any, score: Any, values: Any) -> float:
    """Mean squared error of V against V*(s) = β·log Σ ref(y|s)·e^(score/β), over the prefixes s that π visits."""
    rows = Rows.of([(prompt,)] * len(responses), responses)
    with torch.no_grad():
        said = values(rows)
    error = visits = 0.0
    for t in range(task.length):
        groups: dict[Ids, list[int]] = {}
        for i, y in enumerate(responses):
            if len(y) > t:
                groups.setdefault(y[:t], []).append(i)
        for members in groups.values():
            index = torch.tensor(members)
            below = ref[index] - ref[index].logsumexp(0)  # ref of the rest, given the prefix
            best = task.beta * float((below + score[index] / task.beta).logsumexp(0))
            weight = float(p[index].sum())
            error += weight * (float(said[members[0], t]) - best) ** 2
            visits += weight
    return error / visits


# ---------------------------------------------------------------- the world on disk, and a run


def build(task: Task, directory: Path, seed: int) -> None:
    """A two-layer, 64-wide transformer over the task's symbols, as a Hugging Face directory, and its prompts."""
    torch.manual_seed(seed)
    # Learned positions: rotary ones cannot count how often a prompt's own symbol was repeated, so some V* would be out
    # of reach.
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=task.symbols, n_embd=64, n_inner=128, n_layer=2, n_head=4, n_positions=32, initializer_range=0.1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=task.stop, pad_token_id=None,
    ))  # fmt: skip
    with torch.no_grad():
        if task.reference == "uniform":
            model.lm_head.weight.zero_()
        if task.reference == "bandit":  # logits W·h = -0.3 k for the one hidden state h that there is
            hidden = model.transformer(torch.tensor([[task.prompts[0]]])).last_hidden_state[0, 0]
            model.lm_head.weight.copy_(torch.outer(-0.3 * torch.arange(8.0), hidden) / hidden.dot(hidden))
    model.save_pretrained(directory / "model")
    words = {chr(ord("a") + i): i for i in range(task.symbols)}
    plain = Tokenizer(models.WordLevel(words, unk_token="a"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    stop = chr(ord("a") + task.stop) if task.stop is not None else None
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=stop).save_pretrained(directory / "model")
    lines = [json.dumps({"prompt": chr(ord("a") + p), "symbol": p}) for p in task.prompts]
    (directory / "prompts.jsonl").write_text("\n".join(lines) + "\n")


def config(task: Task, directory: Path, seed: int, cycles: int, route: str) -> PPOConfig:  # cycles: of 256 responses
    """gae: a critic. ahead: the same, sampled one update before. group: a group baseline in place of the critic.
    constant: a group baseline, and a rate that never falls.

    At the optimum every response has the same g, so a group baseline leaves no noise and the rate may stay; but not
    along advantages that are older than the step before, and not with steps as long as the rate however small the
    gradient is, as Adam's are. Hence one step a cycle, of 64 responses, and a β₂ that remembers larger gradients.
    """
    section: dict[str, Any] = {"epochs": 4, "minibatch": 64, "advantage": "group"}
    optim, batch = OptimConfig(lr=2e-3, critic_lr=2e-3), 256
    if route in ("gae", "ahead"):
        section |= {"advantage": "gae", "lam": 0.95, "value_coef": 0.5, "ahead": int(route == "ahead")}
    if route == "constant":
        section, batch = section | {"epochs": 1}, 64
        optim = OptimConfig(lr=1e-3, betas=(0.9, 0.999), schedule="constant")
    return PPOConfig(
        run=str(directory / "run"), seed=seed, device="cpu",
        model=ModelConfig(policy=str(directory / "model")),
        prompts=PromptsConfig(path=str(directory / "prompts.jsonl")),
        sampling=SamplingConfig(
            max_new_tokens=task.length, stop_token_ids=[] if task.stop is None else [task.stop], slots=batch
        ),
        ppo=PPOSection(
            cycles=cycles * 256 // batch, batch=batch, responses_per_prompt=batch // len(task.prompts),
            kl=KLConfig(coef=task.beta), **section,
        ),
        optim=optim,
        log=LogConfig(rollouts_every=0, tensorboard=False),
        checkpoint=CheckpointConfig(every=10 * 256 // batch, keep=1000),
        evaluate=HeldOutConfig(every=0),
    )  # fmt: skip


def run(name: str, seed: int, cycles: int | None = None, route: str = "gae") -> dict[str, Any]:
    """Train one task with one seed and compare every checkpoint with the optimum."""
    torch.set_num_threads(1)
    task = TASKS[name]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        build(task, directory, seed)

        def score(
            prompts: list[str], completions: list[str], completion_ids: list[list[int]], symbol: list[int]
        ) -> list[float]:
            return [task.score(p, tuple(y)) for p, y in zip(symbol, completion_ids, strict=True)]

        wanted = config(task, directory, seed, cycles or task.cycles, route)
        done = tether.ppo(wanted, reward=score)
        reference = LanguageModel(
            load_causal_lm(str(directory / "model"), dtype=torch.float32, device=CPU), torch.float32
        )
        curve, gaps = [], []
        for checkpoint in sorted((done.path / "checkpoints").glob("cycle-*")):
            policy = Policy(
                LanguageModel(
                    load_causal_lm(str(checkpoint / "policy"), dtype=torch.float32, device=CPU), torch.float32
                ),
                value_head=wanted.ppo.has_critic,
            )
            if policy.has_critic:
                policy.load_critic(checkpoint / "critic")
            values = lambda rows, policy=policy: policy(rows, temperature=1.0).values  # noqa: E731
            exact = compare(task, policy.model, reference, values if policy.has_critic else None)
            cycle = int(checkpoint.name.removeprefix("cycle-"))
            curve.append((cycle * wanted.ppo.batch / 256, exact.kl_to_optimum))
            if 0.01 <= exact.kl_to_optimum <= 0.5:
                gaps.append((cycle, exact.kl_to_optimum, sampled_gap(task, policy.model, reference, seed, cycle)))
    return {"task": name, "route": route, "seed": seed, "curve": curve, "gaps": gaps, **vars(exact)}


def sampled_gap(task: Task, policy: LanguageModel, reference: LanguageModel, seed: int, cycle: int) -> float:
    """The log-mean-exp form of the optimality gap on 16,384 fresh samples of each prompt: no enumeration."""
    stops = () if task.stop is None else (task.stop,)
    sampling = Sampling(
        max_new_tokens=task.length, stop_token_ids=stops, responses_per_prompt=16384, seed=seed, stream=GENERATE
    )
    prompts = [Prompt((p,), "", i) for i, p in enumerate(task.prompts)]
    drawn = LocalSampler(policy, slots=4096).generate(prompts, sampling, cycle=cycle)
    g = torch.empty(len(drawn), dtype=torch.float64)
    for prompt in task.prompts:
        rows = [i for i, p in enumerate(drawn.prompts) if p.ids == (prompt,)]
        responses = [tuple(drawn.response_ids[i]) for i in rows]
        ratio = response_logprobs(policy, prompt, responses) - response_logprobs(reference, prompt, responses)
        scores = torch.tensor([task.score(prompt, y) for y in responses], dtype=torch.float64)
        g[torch.tensor(rows)] = scores - task.beta * ratio
    return optimality_gap_logmeanexp(g.view(len(task.prompts), -1), task.beta)


# ---------------------------------------------------------------- dpo: the same optimum from pairs


def write_pairs(task: Task, directory: Path, reference: LanguageModel, seed: int, count: int) -> None:
    """`count` pairs of different responses drawn from the reference, labeled P = σ(Δscore): the log-odds of who chooses
    by score."""
    responses, lines = task.responses(), []
    generator = torch.Generator().manual_seed(seed)
    for prompt in task.prompts:
        probabilities = response_logprobs(reference, prompt, responses).exp()
        # More than are needed: a pair of one response twice teaches nothing.
        drawn = torch.multinomial(probabilities, 6 * count, replacement=True, generator=generator).view(-1, 2).tolist()
        different = [(i, j) for i, j in drawn if i != j][: count // len(task.prompts)]
        for i, j in different:
            first, second = responses[i], responses[j]
            row: dict[str, Any] = {"prompt": spelled((prompt,)), "chosen": spelled(first), "rejected": spelled(second)}
            row["probability"] = 1 / (1 + math.exp(task.score(prompt, second) - task.score(prompt, first)))
            row |= {f"{side}_finish_reason": "stop" if y[-1] == task.stop else "length"
                    for side, y in (("chosen", first), ("rejected", second))}  # fmt: skip
            lines.append(json.dumps(row))
    (directory / "pairs.jsonl").write_text("\n".join(lines) + "\n")


def spelled(ids: Ids) -> str:
    """Ids in the world's own words."""
    return " ".join(chr(ord("a") + i) for i in ids)


def run_dpo(name: str, seed: int, cycles: int | None = None) -> dict[str, Any]:
    """Train one task with one seed by `tether.dpo` and compare every checkpoint with the optimum.

    cycles: of 256 responses, 128 pairs, in steps of 64; one pass over the 8,192 pairs is 64 of them. By default one for
    the bandits and six for the others: sampled responses seen again cost nothing.
    """
    torch.set_num_threads(1)
    task = TASKS[name]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        build(task, directory, seed)
        start = load_causal_lm(str(directory / "model"), dtype=torch.float32, device=CPU)
        reference = LanguageModel(start, torch.float32)
        write_pairs(task, directory, reference, seed, 8192)
        default = 64 if task.length == 1 else 384
        done = tether.dpo(DPOConfig(
            run=str(directory / "run"), seed=seed, device="cpu",
            model=ReferencedModelConfig(policy=str(directory / "model")),
            data=PairsConfig(path=str(directory / "pairs.jsonl"), max_tokens=32),
            dpo=DPOSection(
                beta=task.beta, epochs=max(1, round((cycles or default) / 64)), batch=64, test_fraction=0
            ),
            optim=OptimConfig(lr=2e-3),
            log=LogConfig(tensorboard=False),
            checkpoint=CheckpointConfig(every=20, keep=1000),
        ))  # fmt: skip
        curve = []
        for checkpoint in sorted((done.path / "checkpoints").glob("step-*")):
            policy = load_causal_lm(str(checkpoint / "policy"), dtype=torch.float32, device=CPU)
            exact = compare(task, LanguageModel(policy, torch.float32), reference, None)
            curve.append((int(checkpoint.name.removeprefix("step-")) / 2, exact.kl_to_optimum))
    return {"task": name, "route": "dpo", "seed": seed, "curve": curve, "gaps": [], **vars(exact)}


# ---------------------------------------------------------------- Q-learning: scored answers, nobody's policy


def write_scored(task: Task, path: Path, seed: int, count: int) -> None:
    """Answers whose every token is drawn uniformly, up to the first stop, with their scores."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for i in range(count):
            prompt, y = task.prompts[i % len(task.prompts)], tuple[int, ...]()
            while len(y) < task.length and (not y or y[-1] != task.stop):
                y = (*y, draw.randrange(task.symbols))
            stopped = y[-1] == task.stop
            words = [chr(ord("a") + s) for s in (y[:-1] if stopped else y)]
            row = {"prompt": chr(ord("a") + prompt), "completion": " ".join(words), "score": task.score(prompt, y),
                   "finish_reason": "stop" if stopped else "length"}  # fmt: skip
            file.write(json.dumps(row) + "\n")


def run_bellman(name: str, seed: int, cycles: int | None = None, **settings: Any) -> dict[str, Any]:
    """Train one task by Q-learning and compare every checkpoint with the optimum.

    cycles: of 256 answers, each seen four times, as PPO sees its own. settings: of `qlearning`.
    """
    torch.set_num_threads(1)
    task, cycles = TASKS[name], cycles or TASKS[name].cycles
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        build(task, directory, seed)
        write_scored(task, directory / "scored.jsonl", seed, 256 * cycles)
        section = QLearningSection(**{"beta": task.beta, "epochs": 4, "batch": 64} | settings)
        done = tether.qlearning(QLearningConfig(
            run=str(directory / "run"), seed=seed, device="cpu",
            model=ModelConfig(policy=str(directory / "model")),
            data=ScoredConfig(path=str(directory / "scored.jsonl")),
            qlearning=section,
            optim=OptimConfig(lr=2e-3, critic_lr=2e-3),
            log=LogConfig(rollouts_every=0, tensorboard=False),
            checkpoint=CheckpointConfig(every=cycles, keep=1000),
        ))  # fmt: skip
        load = lambda path: LanguageModel(  # noqa: E731
            load_causal_lm(str(path), dtype=torch.float32, device=CPU), torch.float32
        )
        reference, curve = load(directory / "model"), []
        for checkpoint in sorted((done.path / "checkpoints").glob("step-*")):
            policy = Policy(load(checkpoint / "policy"))
            policy.load_critic(checkpoint / "critic")
            values = lambda rows, policy=policy: policy(rows, temperature=1.0).values  # noqa: E731
            exact = compare(task, policy.model, reference, values)
            curve.append((int(checkpoint.name.removeprefix("step-")) * section.batch / 256, exact.kl_to_optimum))
    return {"task": name, "route": "bellman", "seed": seed, "curve": curve, "gaps": [], **vars(exact)}


def run_route(name: str, seed: int, cycles: int | None, route: str) -> dict[str, Any]:
    if route == "dpo":
        result = run_dpo(name, seed, cycles)
    else:
        result = run_bellman(name, seed, cycles) if route == "bellman" else run(name, seed, cycles, route)
    return {"cycles": cycles} | result


# ---------------------------------------------------------------- table and plot


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| task | E score | KL(π‖ref) | KL(π‖π*), each seed | critic RMSE, each seed | reached | gap off by (worst) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, route in dict.fromkeys((r["task"], r["route"]) for r in results):
        mine = [r for r in results if (r["task"], r["route"]) == (name, route)]
        title = name if route == "gae" else f"{name}, {route}"
        reached = sum(r["kl_to_optimum"] <= 0.01 and (r["value_rmse"] or 0) <= 0.05 for r in mine)
        gaps = [g for r in mine for g in r["gaps"]]
        worst = max((min(abs(s - t) / t / 0.15, abs(s - t) / 0.002) for _, t, s in gaps), default=0.0)
        known = TASKS[name].known
        lines.append(
            f"| {title} | {_mean(mine, 'score')}{f' (optimum {known[0]:.4f})' if known else ''} "
            f"| {_mean(mine, 'kl_to_reference')}{f' ({known[1]:.4f})' if known else ''} "
            f"| {' '.join(format(r['kl_to_optimum'], '.4f') for r in mine)} "
            f"| {' '.join(format(r['value_rmse'], '.3f') for r in mine if r['value_rmse'] is not None) or '–'} "
            f"| {reached}/{len(mine)} | {worst:.2f} of the bound, {len(gaps)} checkpoints |"
        )
    return "\n".join(lines)


def _mean(results: list[dict[str, Any]], key: str) -> str:
    return f"{sum(r[key] for r in results) / len(results):.4f}"


def apart(results: list[dict[str, Any]]) -> str:
    """How far the routes' policies are from one another, where two of them ended the same task with the same seed."""
    lines = ["| task | routes | KL between any two, worst of both directions | seeds |", "|---|---|--:|--:|"]
    for name in dict.fromkeys(r["task"] for r in results):
        worst, seeds, routes = 0.0, set[int](), dict[str, None]()
        for one, other in itertools.permutations([r for r in results if r["task"] == name], 2):
            if one["seed"] == other["seed"] and one["route"] != other["route"]:
                p, q = (torch.tensor(r["logprobs"], dtype=torch.float64) for r in (one, other))
                worst = max(worst, float((p.exp() * (p - q)).sum(1).mean()))
                seeds.add(one["seed"])
                routes[one["route"]] = None
        if seeds:
            lines.append(f"| {name} | {', '.join(routes)} | {worst:.4f} | {len(seeds)} |")
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """KL(π‖π*) over the answers that were learned from, one thin line a seed. An answer that is learned from four times
    counts four times, as it does in the steps of DPO and Q-learning."""
    tasks, routes = ({r[key] for r in results} for key in ("task", "route"))
    lines = []
    for r in results:
        name = ", ".join(r[key] for key, all_ in (("task", tasks), ("route", routes)) if len(all_) > 1)
        passes = 4 if r["route"] in ("gae", "ahead", "group") else 1
        lines.append(Line(name or r["task"], [(256 * cycle * passes, kl) for cycle, kl in r["curve"]]))
    draw(
        path,
        lines,
        x="answers learned from, each pass counted",
        y="KL(π‖π*), nats; dashed: the bar",
        log_y=(-4, 0.7),
        bar=0.01,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tasks", nargs="*", default=list(TASKS), choices=list(TASKS), metavar="TASK", help=", ".join(TASKS)
    )
    parser.add_argument(
        "--routes", nargs="*", default=["gae"], choices=["gae", "ahead", "group", "constant", "dpo", "bellman"]
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--cycles", type=int, help="of 256 responses; by default each task's own, 60 to 250")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--to", type=Path, help="a file of results: runs that are in it are not repeated, but read")
    parser.add_argument("--plot", type=Path, help="write the plot here")
    args = parser.parse_args()
    done = [json.loads(line) for line in args.to.read_text().splitlines()] if args.to and args.to.exists() else []
    of = {(r["task"], r["seed"], r["cycles"], r["route"]): r for r in done}
    wanted = list(itertools.product(args.tasks, args.seeds, [args.cycles], args.routes))
    with (
        ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool,
        (args.to or Path(os.devnull)).open("a") as file,
    ):
        for run_ in as_completed([pool.submit(run_route, *key) for key in wanted if key not in of]):
            result = run_.result()
            of[result["task"], result["seed"], result["cycles"], result["route"]] = result
            print(json.dumps(result), file=file, flush=True)
            name = f"{result['task']} {result['route']} seed {result['seed']}"
            print(f"{name}: KL(π‖π*) {result['kl_to_optimum']:.4f}", file=sys.stderr, flush=True)
    results = [
        of[task, seed, args.cycles, route] for task in args.tasks for route in args.routes for seed in args.seeds
    ]
    print(table(results))
    if len(args.routes) > 1:
        print(f"\n{apart(results)}")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
