"""The whole loop, with people played by a lexicon: sample, label, fit a reward model, PPO, look again.

    python examples/loop/loop.py MODEL [--to runs/loop] [--cycles 16]      # minutes on two cores

1. MODEL, say stories260K, answers every prompt of examples/stories, four answers at a time: that is the queue
   (`tether label`).
2. `tether studio` serves it. Ada and Ben put each four answers in order, through the pages that people use. They follow
   VADER's lexicon (Hutto & Gilbert 2014), each with slips of their own, so that they agree no better than people do.
3. `tether reward` fits a reward model to the store; `tether ppo` improves MODEL against it.
4. `tether doctor` looks for what went wrong, the studio's compare page shows before and after, and the lexicon itself,
   which no model has seen, says whether the people got what they wanted.

Needs `pip install tether[studio] httpx vaderSentiment`.
"""

from __future__ import annotations

import argparse
import html
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pyarrow
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from tether.feedback.agreement import agreement
from tether.feedback.store import Store
from tether.runs import Run

PROMPTS = Path(__file__).resolve().parent.parent / "stories" / "prompts.jsonl"
SLIP = 0.25  # standard deviation of a person's error, on the lexicon's scale from -1 to 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a small causal language model, such as stories260K")
    parser.add_argument("--to", type=Path, default=Path("runs/loop"))
    parser.add_argument("--cycles", type=int, default=16, help="of PPO")
    parser.add_argument("--prompts", type=int, help="only the first so many")
    parser.add_argument("--rounds", type=int, default=4, help="how often each prompt is asked (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of answers, slips, reward model and PPO (%(default)s)")
    args = parser.parse_args()
    store, runs = args.to / "preferences.db", args.to / "runs"
    runs.mkdir(parents=True, exist_ok=True)

    print("1. the queue")
    limit = [] if args.prompts is None else ["--limit", str(args.prompts)]
    for seed in range(args.seed * args.rounds, (args.seed + 1) * args.rounds):
        tether(
            "label", "--sample", args.model, "--prompts", PROMPTS, "--answers", 4, "--seed", seed, "--to", store, *limit
        )

    print("2. two people label it in the studio")
    with studio(runs, store, ["Ada", "Ben"]) as people:
        done = 1
        while done:  # in turns, so that both get some of everything
            done = sum(judge(people[name], random.Random(f"{name} {done} {args.seed}")) for name in ("Ada", "Ben"))
    tether("label", "--status", "--to", store)
    kappas = agreement(Store(store, create=False).labels()).kappas
    for both in kappas:
        print(f"They say the same of {both.agreement:.0%} of the pairs that both judged, κ {both.value:.2f}.")

    print("3. a reward model from the store, and PPO against it")
    (args.to / "reward.yaml").write_text(
        f"run: {runs / 'reward'}\nseed: {args.seed}\nmodel: {{policy: {args.model}}}\ndata: {{path: {store}}}\n"
        "reward_model: {epochs: 2, batch: 16, test_fraction: 0.2}\noptim: {lr: 1.0e-3, critic_lr: 1.0e-3, warmup: 10}\n"
    )
    tether("reward", args.to / "reward.yaml")
    (args.to / "ppo.yaml").write_text(
        f"run: {runs / 'ppo'}\nseed: {args.seed}\nmodel: {{policy: {args.model}}}\nprompts: {{path: {PROMPTS}}}\n"
        f"reward: [{{model: {runs / 'reward' / 'final'}}}]\nsampling: {{max_new_tokens: 64}}\n"
        f"ppo: {{cycles: {args.cycles}, batch: 64, minibatch: 64, epochs: 1, lam: 1.0,\n"
        "      kl: {coef: 0.05, target: 7}}   # with β alone one of five seeds went to 20 nats, and said one phrase\n"
        "optim: {lr: 3.0e-4, critic_lr: 1.0e-4}\nevaluate: {every: 4, count: 16, samples: 8}\n"
    )
    tether("ppo", args.to / "ppo.yaml")

    print("4. what the doctor says, and what changed")
    tether("doctor", runs / "ppo")
    with studio(runs, store, []) as people:
        (owner,) = people.values()
        page = owner.get("/compare").text
        options = re.findall(r'<option value="(\w+:evaluations:\d+)"[^>]*>ppo, cycle \d+<', page)
        compared = owner.get("/compare", params={"a": options[0], "b": options[-1]}).text
        sentence = re.search(r"Mean score over [^<]*", compared)
        print(html.unescape(sentence[0]) if sentence else "the compare page shows nothing")
    run = Run(runs / "ppo")
    before, *_, after = (liking(run.evaluations(cycle)) for cycle in run.evaluation_cycles)
    print(f"The lexicon itself: {before:.2f} on the left, {after:.2f} on the right.")
    figures = {"kappa": [both.value for both in kappas], "before": before, "after": after}
    figures |= {"reward_model": json.loads((runs / "reward" / "reward_report.json").read_text())["accuracy"]}
    first, *_, last = run.metrics
    figures |= {"kl": last["kl/ref_mean"], "variety": last["response/distinct_2"] / first["response/distinct_2"]}
    (args.to / "result.json").write_text(json.dumps(figures) + "\n")


def tether(*words: object) -> None:
    """A command, as a person would type it."""
    subprocess.run([sys.executable, "-m", "tether.cli", *map(str, words)], check=True)


def liking(answers: pyarrow.Table) -> float:
    """What the people go by, without their slips: mean over answers."""
    texts = answers["completion"].to_pylist()
    return sum(_lexicon.polarity_scores(text)["compound"] for text in texts) / len(texts)


@contextmanager
def studio(runs: Path, store: Path, people: list[str]) -> Iterator[dict[str, httpx.Client]]:
    """A studio, with its owner and each person signed in to it, in this order."""
    names = [word for person in people for word in ("--person", person)]
    command = [sys.executable, "-m", "tether.cli", "studio", str(runs), "--store", str(store), "--port", "0", *names]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    clients = {}
    try:
        for _ in ["whoever started it", *people]:
            person, link = server.stdout.readline().strip().split(": ", 1)
            clients[person] = httpx.Client(base_url=link.split("/sign-in")[0], follow_redirects=True, timeout=60)
            clients[person].get(link)
        yield clients
    finally:
        server.terminate()
        server.wait()


def judge(client: httpx.Client, slips: random.Random) -> int:
    """Put the answers of one page in order and send the form; 0 if there was nothing left to judge."""
    page = client.get("/label").text
    form = dict(re.findall(r'name="(item|key|form_token|seen)" value="([^"]*)"', page))
    if "item" not in form:
        return 0
    texts = [html.unescape(text) for text in re.findall(r'<p class="text" dir="auto">(.*?)</p>', page, re.DOTALL)]
    answers = re.findall(r'<select name="(rank_\d+)">', page)
    felt = [_lexicon.polarity_scores(text)["compound"] + slips.gauss(0, SLIP) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: -felt[i])
    places = {answers[i]: str(place) for place, i in enumerate(order, 1)}
    client.post("/label", data=form | places | {"choice": "ranking"}).raise_for_status()
    return int(form["item"])


_lexicon = SentimentIntensityAnalyzer()

if __name__ == "__main__":
    main()
