"""AI feedback from end to end, without a network: an expert teaches a judge, the judge labels, PPO follows its labels.

    python examples/ai_feedback/ai_feedback.py [--to runs/ai_feedback] [--seed 0]      # ten minutes or so on two cores

The town of `tether demo` again, whose hidden judge compares answers with the records and takes no part in training.

1. `tether sft`: a clerk learns to talk from the town's mixed texts, good and bad.
2. `tether sft`: an expert read old answers two at a time, and wrote what is wrong with each and which is better. The
   clerk's model learns to write such verdicts: that is the judge.
3. The clerk writes new answers. Five people compare them two at a time, each with a taste of their own and now and then
   a slip. `tether judge` has the judge compare them in both orders: some through `transformers serve`, over HTTP, where
   it writes its reasons; all of them from its directory, where the log-probs of the letters make soft labels.
4. `tether reward` and `tether ppo` by people's labels, and by the judge's.
5. The hidden judge compares the two clerks with the one they began as.

Needs `pip install 'tether[judge]' 'transformers[serving]'`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from transformers import AutoTokenizer

import tether
from tether import config
from tether.config.ppo import KLConfig
from tether.demo.annotators import PEOPLE
from tether.demo.judge import Judge, Verdict
from tether.demo.recipe import ARCHITECTURE, MAX_NEW_TOKENS
from tether.demo.show import mean, means, win_rate
from tether.demo.story import once
from tether.demo.tokenizer import build_tokenizer
from tether.demo.world import World
from tether.feedback.judges import judge_quality
from tether.feedback.records import Answer, Filters, Item
from tether.feedback.store import Store
from tether.feedback.verdict import question

PRINCIPLE = "Be kind, be true, be brief."  # the constitution
EXPERT = PEOPLE[0]  # Ada, who looks everything up
WORDS = ("harmful", "wrong", "empty", "wordy", "good")  # of the expert, for an answer
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"
SAMPLES = 8  # answers to each held-out question, in the end


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    texts: int = 20  # answers a question that the clerk reads
    verdicts: int = 4000  # pairs that the expert compared
    pairs: int = 5000  # pairs that people and judge compare
    served: int = 200  # of them, over HTTP
    epochs: int = 3  # of the judge's training
    cycles: int = 40  # of PPO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("runs/ai_feedback"))
    parser.add_argument("--seed", type=int, default=0, help="of the town, all draws and all training (%(default)s)")
    for name, default in vars(Size()).items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    args = parser.parse_args()
    Story(args.to, args.seed, Size(**{name: getattr(args, name) for name in vars(Size())})).tell()


class Story:
    """One telling; what a step makes stays on disk, so that running again goes on where it was stopped."""

    def __init__(self, to: Path, seed: int, size: Size) -> None:
        self.to, self.seed, self.size = to, seed, size
        self.world = World(seed)
        self.judge = Judge(self.world)
        self.train, self.held_out = self.world.split()
        to.mkdir(parents=True, exist_ok=True)

    def tell(self) -> None:
        began = time.monotonic()
        print("1. A clerk learns from the town's texts")
        self.imitate()
        print("2. An expert's verdicts teach a judge")
        self.teach_judge()
        print("3. People and the judge compare new answers")
        store = self.to / "preferences.db"
        self.people_label(store)
        self.judge_labels(store)
        result = self.show_agreement(store)
        verdicts = {"start": self.verdicts("sft")}
        for number, (who, annotators) in enumerate({"people": None, "judge": ["judge:clerk"]}.items(), 4):
            print(f"{number}. A reward model and PPO by the labels of {who}")
            result[f"reward_{who}"] = self.follow(who, store, annotators)
            verdicts[who] = self.verdicts(f"ppo-{who}")
        print("6. What the hidden judge says of answers to questions in words that were in no training text")
        for name, found in verdicts.items():
            scores = means(found) | {"better": win_rate(verdicts["start"], found)}
            result[name] = scores
            print(f"   {name:8}" + "".join(f"{axis} {value:.2f}   " for axis, value in scores.items()))
        result["judge_beats_people"] = win_rate(verdicts["people"], verdicts["judge"])
        result["minutes"] = (time.monotonic() - began) / 60
        (self.to / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"The judge's clerk is the better one on {result['judge_beats_people']:.0%} of the questions, ties half. "
              f"{result['minutes']:.1f} minutes.")  # fmt: skip

    # ------------------------------------------------------------ 1 and 2: two models

    def imitate(self) -> None:
        draw = random.Random(f"texts {self.seed}")
        texts = once(self.to / "texts.jsonl", lambda: [
            {"prompt": ask.prompt, "completion": " " + self.world.write_answer(ask, draw)}
            for ask in self.train for _ in range(self.size.texts)
        ])  # fmt: skip
        if not (self.to / "tokenizer").exists():
            build_judge_tokenizer(texts, self.to / "tokenizer")
        init = config.InitModelConfig(ARCHITECTURE | {"max_position_embeddings": 512}, str(self.to / "tokenizer"))
        tether.sft(self._sft("sft", config.SFTModelConfig(init), self.to / "texts.jsonl", epochs=4, lr=3e-3, warmup=30))

    def teach_judge(self) -> None:
        rows = self.to / "verdicts.jsonl"
        steps = len(once(rows, self._verdict_rows)) * self.size.epochs // 32
        model = config.SFTModelConfig(str(self.to / "sft" / "final"))
        tether.sft(self._sft("clerk", model, rows, epochs=self.size.epochs, lr=2e-3, warmup=min(30, steps // 10)))

    def _sft(
        self, name: str, model: config.SFTModelConfig, data: Path, *, epochs: int, lr: float, warmup: int
    ) -> config.SFTConfig:
        return config.SFTConfig(
            run=str(self.to / name), seed=self.seed, model=model, data=config.DataConfig(str(data)),
            sft=config.SFTSection(epochs=epochs, batch=32), optim=config.OptimConfig(lr=lr, warmup=warmup),
            checkpoint=config.CheckpointConfig(every=250),
        )  # fmt: skip

    def _verdict_rows(self) -> list[dict[str, Any]]:
        """What the judge learns from: each pair in both orders, with reasons and as a letter alone.

        Naming what is wrong with either answer is what teaches it: from letters alone it learned nothing.
        """
        draw = random.Random(f"expert {self.seed}")
        rows: list[dict[str, Any]] = []
        read: dict[str, list[str]] = {}
        for row in once(self.to / "texts.jsonl", list):
            read.setdefault(row["prompt"], []).append(row["completion"].strip())
        while len(rows) < 4 * self.size.verdicts:
            ask = draw.choice(self.train)
            pair = draw.sample(read[ask.prompt], 2)
            if pair[0] == pair[1]:
                continue
            seen = [self.judge(ask, text) for text in pair]
            first = draw.random() < EXPERT.prefers_first(*seen)
            for a, b in ((0, 1), (1, 0)):
                letter = "A" if first == (a == 0) else "B"
                reasons = f"A is {word(seen[a])}. B is {word(seen[b])}. VERDICT: {letter}"
                for form, text in (("text", reasons), ("logprobs", f" {letter}")):
                    prompt = question(PRINCIPLE, ask.prompt, pair[a], pair[b], form)
                    rows.append({"prompt": prompt, "completion": [{"role": "assistant", "content": text}]})
        return rows

    # ------------------------------------------------------------ 3: labels

    def people_label(self, path: Path) -> None:
        """Pairs of the clerk's own answers, and what people say of them."""
        asks = {ask.prompt: ask for ask in self.train}
        with Store(path) as store:
            store.add_items(self._pairs(), overlap=0)
            for person in PEOPLE:
                store.add_annotator(person.name)
            draw, busy = random.Random(f"people {self.seed}"), True
            while busy:  # in turns, so that everybody has some of everything
                busy = False
                for person in PEOPLE:
                    if task := store.next_task(person.name):
                        seen = [self.judge(asks[str(task.prompt)], text) for text in task.answers]
                        place = 0 if draw.random() < person.prefers_first(*seen) else 1
                        choice = task.choice_of(place)
                        store.record(person.name, task.item, key=f"{person.name} {task.number}", choice=choice)
                        busy = True

    def _pairs(self) -> list[Item]:
        many = 2 + self.size.pairs // len(self.train)  # answers a question, each compared with the next
        answers = self.generate("sft", [ask.prompt for ask in self.train], many)
        pairs = [
            Item(ask.prompt, (Answer(texts[i]), Answer(texts[i + 1])), group=ask.question)
            for i in range(many - 1) for ask, texts in zip(self.train, answers, strict=True)
            if texts[i] != texts[i + 1]
        ]  # fmt: skip
        return pairs[: self.size.pairs]

    def judge_labels(self, store: Path) -> None:
        """`tether judge`, over HTTP and in this process. A rerun asks nothing that was answered."""
        constitution, model = self.to / "constitution.txt", self.to / "clerk" / "final"
        constitution.write_text(PRINCIPLE + "\n", encoding="utf-8")
        with served(model, self.to / "server.log") as url:
            section = config.JudgeSection(str(model), base_url=url, name="served", constitution=str(constitution))
            some = config.JudgedConfig(str(store), limit=self.size.served)
            print("  ", tether.judge(config.JudgeConfig(section, some)))
        section = config.JudgeSection(str(model), name="clerk", constitution=str(constitution))
        print("  ", tether.judge(config.JudgeConfig(section, config.JudgedConfig(str(store)))))

    def show_agreement(self, path: Path) -> dict[str, Any]:
        """How far judge and people agree, and how often the hidden judge agrees with either."""
        asks, right = {ask.prompt: ask for ask in self.train}, dict[str, list[bool]]()
        with Store(path, create=False) as store:
            labels = list(store.labels(Filters(judges=True)))
            for label in labels:
                item = store.item(label.item)
                a, b = (self.judge(asks[str(item.prompt)], answer.text).score for answer in item.answers)
                if label.choice in ("a", "b") and abs(a - b) > 1e-9:
                    who = label.annotator if label.probability is not None else "people"
                    right.setdefault(who, []).append((a > b) == (label.choice == "a"))
        for who, found in right.items():
            print(f"   {who}: right on {mean(found):.1%} of {len(found)} pairs, by the hidden judge")
        result: dict[str, Any] = {"right": {who: mean(found) for who, found in right.items()}}
        for judged in judge_quality(labels):
            agreed, kappa, name = judged.agreement, judged.kappa, str(judged.quality.annotator)
            if agreed and kappa is not None:
                result[name] = {"agreement": agreed.value, "kappa": kappa}
                print(f"   {name} agrees with people on {agreed.value:.1%} of {judged.shared} pairs, κ {kappa:.2f}")
        return result

    # ------------------------------------------------------------ 4 to 6: what comes of them

    def follow(self, who: str, store: Path, annotators: list[str] | None) -> float:
        """A reward model of these labels, and PPO; returns the reward model's accuracy on held-out labels."""
        start, reward = str(self.to / "sft" / "final"), self.to / f"reward-{who}"
        once(self.to / "prompts.jsonl", lambda: [{"prompt": ask.prompt} for ask in self.train])
        tether.reward_model(config.RewardConfig(
            run=str(reward), seed=self.seed, model=config.SFTModelConfig(start),
            data=config.PairsConfig(str(store), labels=config.LabelsConfig(annotators=annotators)),
            reward_model=config.RewardModelSection(epochs=4, batch=32, microbatch_tokens=1024),
            optim=config.OptimConfig(lr=1e-3, critic_lr=1e-3, warmup=min(20, self.size.pairs // 20)),
        ))  # fmt: skip
        tether.ppo(config.PPOConfig(
            run=str(self.to / f"ppo-{who}"), seed=self.seed, model=config.ModelConfig(start),
            prompts=config.PromptsConfig(str(self.to / "prompts.jsonl")),
            reward=[config.RewardSourceConfig(model=str(reward / "final"))],
            sampling=config.SamplingConfig(max_new_tokens=MAX_NEW_TOKENS),
            # The same distance for both: the scores of the two reward models have scales of their own.
            ppo=config.PPOSection(cycles=self.size.cycles, batch=128, responses_per_prompt=2, epochs=2, minibatch=64,
                                  kl=KLConfig(coef=0.1, target=6.0)),
            optim=config.OptimConfig(lr=7e-4, critic_lr=2e-3, warmup=min(16, self.size.cycles)),
            log=config.LogConfig(rollouts_every=10), checkpoint=config.CheckpointConfig(every=20),
        ))  # fmt: skip
        report = json.loads((reward / "reward_report.json").read_text(encoding="utf-8"))
        return float(report["accuracy"]["value"])

    def verdicts(self, run: str) -> list[list[Verdict]]:
        """The hidden judge's, of a run's final model on questions that nobody trained on."""
        answers = self.generate(run, [ask.prompt for ask in self.held_out], SAMPLES)
        return [[self.judge(ask, text) for text in texts] for ask, texts in zip(self.held_out, answers, strict=True)]

    def generate(self, run: str, prompts: list[str], samples: int) -> list[list[str]]:
        found = tether.generate(self.to / run / "final", prompts, samples=samples, max_new_tokens=MAX_NEW_TOKENS,
                                seed=self.seed)  # fmt: skip
        return [[g.completion for g in found[i : i + samples]] for i in range(0, len(found), samples)]


def word(seen: Verdict) -> str:
    """What the expert writes of an answer: the worst that there is to say."""
    faults = (seen.harmless < 1, seen.honest < 1, seen.helpful < 0.5, seen.score < 0.99, True)
    return WORDS[faults.index(True)]


def build_judge_tokenizer(texts: list[dict[str, str]], directory: Path) -> None:
    """The demo's tokenizer and a chat template. What is the same in every question is one token each: a question takes
    45 tokens instead of 300."""
    said = [f"A is {w}. B is {w}. VERDICT: {letter} {letter}" for w in WORDS for letter in "AB"]
    build_tokenizer([*(row["prompt"] + row["completion"] for row in texts), *said * 50], directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    gap = "\0"
    messages = [m["content"] for form in ("text", "logprobs") for m in question(PRINCIPLE, gap, gap, gap, form)]
    tokenizer.add_tokens(list(dict.fromkeys(piece for text in messages for piece in text.split(gap) if piece)))
    tokenizer.save_pretrained(directory)


@contextmanager
def served(model: Path, log: Path) -> Iterator[str]:
    """The address of `transformers serve` with this model, on a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as out:
        command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model), "--device", "cpu"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        server = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        try:
            until = time.monotonic() + 120
            while not is_up(f"http://127.0.0.1:{port}/health"):
                if server.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"the server did not start, see {log}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait()


def is_up(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=2).is_success
    except httpx2.HTTPError:
        return False


if __name__ == "__main__":
    main()
