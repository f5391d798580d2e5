"""The story of the demo, told while it happens: from a town's mixed texts to a clerk one would trust.

Six steps, each one method below. What a step makes stays on disk, so that running again goes on where it was stopped.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tether
from tether.demo.annotators import PEOPLE, agreement, noise_ceiling
from tether.demo.judge import Judge, Verdict
from tether.demo.recipe import MAX_NEW_TOKENS, ppo_config, reward_config, sft_config
from tether.demo.show import habit, habits_table, heading, mean, means, quote, repeats, say, scores_table, win_rate
from tether.demo.tokenizer import build_tokenizer
from tether.demo.world import Ask, World
from tether.errors import RunError
from tether.runs import Run

TEXTS_PER_PROMPT = 20  # what the start model reads
ANSWERS_PER_PROMPT = 24  # what it writes for the annotators, who compare each with the next two
SAMPLES = 8  # answers to each held-out prompt, before and after

Rows = list[dict[str, Any]]


def tell(to: Path, *, seed: int) -> None:
    """Tell the whole story and write everything into `to`; running again continues."""
    began = time.monotonic()
    story = Story(to, seed)
    steps = {
        "A town that does not exist": story.write_texts,
        "A model that imitates (tether sft)": story.imitate,
        "People compare its answers": story.compare,
        "A model of what people like (tether reward)": story.model_preferences,
        "Reinforcement learning on a leash (tether ppo)": story.improve,
        "People look again": story.look_again,
    }
    for number, (title, step) in enumerate(steps.items(), 1):
        heading(f"{number} of {len(steps)} · {title}")
        step()
    print(f"The whole story took {(time.monotonic() - began) / 60:.1f} minutes; everything is in {to}.")


class Story:
    """One telling: the town of `seed`, and the directory that it is written to."""

    def __init__(self, to: Path, seed: int) -> None:
        self.to, self.seed = to, seed
        self.world = World(seed)
        self.judge = Judge(self.world)
        self.train, self.held_out = self.world.split()
        self.asks = {ask.prompt: ask for ask in self.train + self.held_out}
        self._claim_directory()

    # ------------------------------------------------------------ the steps

    def write_texts(self) -> None:
        say(
            f"""Lanternwick is a harbour town made up for this demo. Its records hold {len(self.world.facts)} facts,
            so that every answer about it can be checked. Its clerks have answered visitors well and badly, kindly and
            rudely, truly and falsely: this mixed bag is all that our model will ever read."""
        )
        texts = once(self.to / "texts.jsonl", self._texts)
        once(self.to / "prompts.jsonl", lambda: [{"prompt": ask.prompt} for ask in self.train])
        once(self.to / "held_out.jsonl", lambda: [{"prompt": ask.prompt} for ask in self.held_out])
        if not (self.to / "tokenizer").exists():
            build_tokenizer((row["prompt"] + row["completion"] for row in texts), self.to / "tokenizer")
        for row in random.Random(self.seed).sample(texts, 4):
            quote(*(row["prompt"] + row["completion"]).splitlines())

    def imitate(self) -> None:
        say(
            """A small Llama with random weights learns to continue these texts. It learns to speak, it picks up the
            facts, and it learns every bad habit as well: imitation does not know good from bad."""
        )
        tether.sft(sft_config(self.to, self.seed))

    def compare(self) -> None:
        say(
            f"""The model answers every prompt {ANSWERS_PER_PROMPT} times, and one of {len(PEOPLE)} annotators says
            which of two answers is better. That is easier than writing a good one; but people slip, seldom look
            things up, like to be flattered, and take long for thorough."""
        )
        judged = self._judged_pairs()
        say(
            f"""{len(judged)} comparisons. Two annotators agree on {agreement(judged):.0%} of the pairs, much as people
            do (63 to 77 %). So whoever predicts them perfectly is right on {noise_ceiling(judged):.1%} and no more:
            the noise ceiling."""
        )

    def model_preferences(self) -> None:
        say(
            """Nobody can compare a million answers. So a reward model learns to predict whom people prefer: the same
            network, with one number at its end. It never sees the town's records, only who was preferred."""
        )
        tether.reward_model(reward_config(self.to, self.seed))
        ceiling = noise_ceiling(self._judged_pairs())
        say(f"Accuracy on held-out pairs: {self._accuracy():.1%}, beside a noise ceiling of {ceiling:.1%}.")

    def improve(self) -> None:
        say(
            """Now the model answers, the reward model scores, and PPO makes what scored well a little more likely,
            again and again. The KL term is the leash: drifting from where it began costs reward, because the reward
            model can only be trusted near the answers that people have seen."""
        )
        tether.ppo(ppo_config(self.to, self.seed))

    def look_again(self) -> None:
        before, after = self._answers("sft"), self._answers("ppo")
        say("The same questions before and after, in words that were in no training text:")
        for i in self._showcase():
            quote(
                f"Visitor: {self.held_out[i].question}",
                f"before:  {before[i][0].strip()}",
                f"after:   {after[i][0].strip()}",
            )
        say(
            f"""Only now a hidden judge, who took no part in training, compares every answer with the town's records
            ({len(self.held_out)} questions, {SAMPLES} answers each; 1 is perfect):"""
        )
        was, now = self._verdicts(before), self._verdicts(after)
        scores_table(was, now)
        say(f"PPO beats its own start on {win_rate(was, now):.0%} of the questions.")
        say("And what became of the clerks' habits? What annotators liked a little, PPO may have learned to overdo:")
        habits_table(was, now)
        self._print_course()
        print(f"Curves and samples: {tether.report(self.to / 'ppo')}")
        print(f"Talk to the clerk:  tether generate {self.to / 'ppo' / 'final'} --prompt $'{self.held_out[0].prompt}'")
        run = Run.open(self.to / "ppo")
        result = {
            "reward_model": self._accuracy(),
            "noise_ceiling": noise_ceiling(self._judged_pairs()),
            "win_rate": win_rate(was, now),
            "before": means(was),
            "after": means(now),
            "courtesies": [habit(was, "courtesy"), habit(now, "courtesy")],  # of an answer
            "repeats": [repeats(before), repeats(after)],
            "kl": mean(row["kl"] for row in run.evaluations(run.evaluation_cycles[-1]).to_pylist()),
        }
        (self.to / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    # ------------------------------------------------------------ what the steps make

    def _texts(self) -> Rows:
        draw = random.Random(f"texts {self.seed}")
        return [
            {"prompt": ask.prompt, "completion": " " + self.world.write_answer(ask, draw)}
            for ask in self.train
            for _ in range(TEXTS_PER_PROMPT)
        ]

    def _pairs(self) -> Rows:
        draw = random.Random(f"labels {self.seed}")
        answers = self._generate("sft", [ask.prompt for ask in self.train], ANSWERS_PER_PROMPT)
        return [
            self._label(ask, first, second, draw)
            for ask, texts in zip(self.train, answers, strict=True)
            for near in (1, 2)
            for first, second in zip(texts, texts[near:] + texts[:near], strict=True)
            if first != second
        ]

    def _label(self, ask: Ask, first: str, second: str, draw: random.Random) -> dict[str, str]:
        person = draw.choice(PEOPLE)
        likes_first = draw.random() < person.prefers_first(self.judge(ask, first), self.judge(ask, second))
        chosen, rejected = (first, second) if likes_first else (second, first)
        pair = {"prompt": ask.prompt, "chosen": chosen, "rejected": rejected}
        return {**pair, "annotator": person.name, "group": ask.question}

    def _answers(self, run: str) -> list[list[str]]:
        """SAMPLES answers to every held-out prompt by a run's final model."""
        return self._generate(run, [ask.prompt for ask in self.held_out], SAMPLES)

    def _generate(self, run: str, prompts: list[str], samples: int) -> list[list[str]]:
        """[prompts][samples] answers of a run's final model."""
        model = self.to / run / "final"
        found = tether.generate(model, prompts, samples=samples, max_new_tokens=MAX_NEW_TOKENS, seed=self.seed)
        return [[g.completion for g in found[i : i + samples]] for i in range(0, len(found), samples)]

    # ------------------------------------------------------------ what is shown

    def _accuracy(self) -> float:
        report = json.loads((self.to / "reward" / "reward_report.json").read_text(encoding="utf-8"))
        return float(report["accuracy"]["value"])

    def _judged_pairs(self) -> list[tuple[Verdict, Verdict]]:
        """The hidden judge's verdicts on the chosen and the rejected answer of each pair."""
        return [
            (self.judge(self.asks[row["prompt"]], row["chosen"]), self.judge(self.asks[row["prompt"]], row["rejected"]))
            for row in once(self.to / "pairs.jsonl", self._pairs)
        ]

    def _verdicts(self, answers: list[list[str]]) -> list[list[Verdict]]:
        return [[self.judge(ask, text) for text in texts] for ask, texts in zip(self.held_out, answers, strict=True)]

    def _showcase(self) -> list[int]:
        """Held-out prompts to print: three facts, and one of each other kind."""
        kinds: list[str] = [ask.kind for ask in self.held_out]
        facts = [i for i, kind in enumerate(kinds) if kind == "fact"]
        return [facts[0], facts[len(facts) // 2], facts[-1], *map(kinds.index, ("unknown", "errand", "danger"))]

    def _print_course(self) -> None:
        """What the reward model said as training went on, and what the judge says of the same answers."""
        run = Run.open(self.to / "ppo")
        say(
            """The whole way, on the held-out questions. Where the reward model's score still rises and the judge's
            does not, the model has begun to please the reward model instead of people: reward hacking."""
        )
        print(f"    {'cycle':>5}{'reward model':>16}{'hidden judge':>16}{'KL spent (nats per answer)':>29}")
        for cycle in run.evaluation_cycles:
            rows = run.evaluations(cycle).to_pylist()
            judged = mean(self.judge(self.asks[row["prompt"]], row["completion"]).score for row in rows)
            score, kl = mean(row["score"] for row in rows), mean(row["kl"] for row in rows)
            print(f"    {cycle:5}{score:16.2f}{judged:16.2f}{kl:29.2f}")
        print()

    def _claim_directory(self) -> None:
        """Make the directory, or find that it tells this very story."""
        try:
            self.to.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"{self.to} cannot be made a directory ({error.strerror or error}): the story would have nowhere to "
                "stand. Give another with --to."
            ) from error
        (told,) = once(self.to / "demo.jsonl", lambda: [{"seed": self.seed}])
        if told["seed"] != self.seed:
            raise RunError(
                f"{self.to} tells the story of seed {told['seed']}, not of seed {self.seed}: the town would change in "
                "the middle of it. Give another directory with --to."
            )


def once(file: Path, make: Callable[[], Rows]) -> Rows:
    """The rows of a JSONL file, made and written first where it is not there yet; whole or not at all."""
    if not file.exists():
        beside = file.with_suffix(".part")
        beside.write_text("".join(json.dumps(row) + "\n" for row in make()), encoding="utf-8")
        beside.replace(file)
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
