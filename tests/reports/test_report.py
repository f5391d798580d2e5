"""The report of runs written by the real run directory; the file is read back by an HTML parser, as a browser would."""

import base64
import hashlib
import json
import re
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tether.config import (
    DataConfig,
    DPOConfig,
    HeldOutConfig,
    InitModelConfig,
    KLConfig,
    ModelConfig,
    PPOConfig,
    PPOSection,
    PromptsConfig,
    QLearningConfig,
    QLearningSection,
    ReferencedModelConfig,
    RewardConfig,
    ScoredConfig,
    SFTConfig,
    SFTModelConfig,
)
from tether.diagnose import examine
from tether.errors import Interrupted, RunError
from tether.reports import report
from tether.reports.held_out import Evaluation, best_of, win_share
from tether.reports.html import safe_json
from tether.reports.page import render
from tether.runs import Run, RunDirectory

HOSTILE = [
    "</pre></article><script>alert(1)</script>",
    "<img src=x onerror=alert(1)> & &amp; \" ' `",
    "</script><script>alert(2)</script><!--",
    "{{ 7 * 7 }} {% raw %} ${alert(3)}",
    "\x1b[2J\x1b]0;title\x07 \x00",
    "abc\u202egpj.exe\u2066",
    "long " * 20_000,
]


class Page(HTMLParser):
    """The elements of a page: texts of <pre>, scripts with their types, and every attribute."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.pres: list[str] = []
        self.scripts: list[tuple[dict, str]] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.stack: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.stack.append(tag)
        if tag == "pre":
            self.pres.append("")
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        while self.stack and self.stack.pop() != tag:
            pass

    def handle_data(self, data):
        if "pre" in self.stack:
            self.pres[-1] += data
        if "script" in self.stack:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif "style" not in self.stack:
            self.words += data


def ppo_config(run: Path, **ppo) -> PPOConfig:
    return PPOConfig(
        run=str(run),
        model=ModelConfig(policy="models/<b>start</b>"),
        prompts=PromptsConfig(path="prompts.jsonl"),
        ppo=PPOSection(cycles=4, **ppo),
        evaluate=HeldOutConfig(every=2),
    )


def metrics(cycle: int, **more) -> dict:
    names = ["reward/score_mean", "reward/score_std", "kl/ref_mean", "policy/entropy", "policy/clip_fraction",
             "policy/kl_old_new", "value/loss", "value/explained_variance", "response/length_mean",
             "response/truncated_fraction", "kl/coef", "check/sampler_gap", "time/rollout_s"]  # fmt: skip
    return {"cycle": cycle, **dict.fromkeys(names, 0.1 * cycle), "reward/helpful_mean": 0.5, **more}


def answers(texts: list[str], scores: list[list[float]], cycle: int) -> dict:
    """Columns of an evaluation: prompt i is texts[i], its answers are numbered, scores[i] are theirs."""
    rows = [
        {"cycle": cycle, "prompt_index": i, "response_index": k, "prompt": text, "completion": f"{text} {cycle} {k}",
         "finish_reason": "stop", "length": 3, "score": score, "kl": 0.5 * cycle}
        for i, text in enumerate(texts) for k, score in enumerate(scores[i])
    ]  # fmt: skip
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.fixture
def hostile_run(tmp_path) -> Path:
    with RunDirectory.open(ppo_config(tmp_path / "run"), command="ppo") as run:
        for cycle in range(1, 5):
            run.append_metrics(metrics(cycle, **{"value/explained_variance": None if cycle == 1 else 0.5}))
        for cycle in (0, 2, 4):
            run.write_evaluation(cycle, answers(HOSTILE, [[cycle, cycle + 1.0]] * len(HOSTILE), cycle))
        run.event("alarm", cycle=3, what="</li><script>alert(4)</script>\x1b[0m \ud800")
    return tmp_path / "run"


def read(path: Path) -> tuple[str, Page]:
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def test_hostile_text_is_shown_whole_and_never_acts(hostile_run):
    _, page = read(report(hostile_run))
    assert len(page.scripts) == 3  # the numbers, plotly, and our own: nothing that a model wrote
    assert not any(name.startswith("on") for name, _ in page.attributes)
    shown = "\0".join(page.pres)
    for text in HOSTILE[:4]:
        assert f"{text} 4 1" in shown
    assert "␛[2J␛]0;title␇ ␀ 0 0" in shown
    assert "abc⟨U+202E⟩gpj.exe⟨U+2066⟩ 4 0" in shown
    assert f"{HOSTILE[6]} 4 0" in shown
    assert "</li><script>alert(4)</script>␛[0m" in page.words


def test_no_control_or_bidi_character_is_in_the_markup(hostile_run):
    html, _ = read(report(hostile_run))
    markup = re.sub(r"<script>.*?</script>", "", html, flags=re.S)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", markup)


def test_the_policy_of_the_page_lets_its_own_scripts_run_and_no_other(hostile_run):
    _, page = read(report(hostile_run))
    policy = dict(reversed(page.attributes[:6]))["content"]
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    run = [body for attributes, body in page.scripts if "type" not in attributes]
    assert allowed == {base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in run}
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2]


def test_numbers_cannot_end_the_script_element_that_they_are_in():
    value = {"</script>": "<!-- & <script>"}
    assert not set("<>&") & set(safe_json(value))
    assert json.loads(safe_json(value)) == value


def test_the_file_needs_nothing_from_outside(hostile_run):
    _, page = read(report(hostile_run))
    assert not any(name in ("src", "href") for name, _ in page.attributes)
    assert "link" not in page.tags
    assert any("plotly.js" in body for _, body in page.scripts)


def test_every_curve_has_its_numbers_and_its_place(hostile_run):
    _, page = read(report(hostile_run))
    plots = json.loads(next(body for attributes, body in page.scripts if "type" in attributes))
    places = [value for name, value in page.attributes if name == "id" and value.startswith("plot-")]
    assert list(plots) == places
    curves = [plot["data"][-1] for plot in plots.values()]
    assert [0.1, 0.2, pytest.approx(0.3), 0.4] in [curve["y"] for curve in curves]
    assert [None, 0.5, 0.5, 0.5] in [curve["y"] for curve in curves]
    titles = "Held-out score, Score for KL, KL to the reference, Entropy, Clip fraction, Value loss, Explained variance"
    for title in [*titles.split(", "), "Length", "Cut at the limit"]:
        assert title in page.words
    assert "Weight of the KL" not in page.words  # it is not adapted here


def test_a_target_and_several_sources_get_their_own_curves(tmp_path):
    with RunDirectory.open(ppo_config(tmp_path / "run", kl=KLConfig(target=6.0)), command="ppo") as run:
        run.append_metrics(metrics(1, **{"reward/<b>terse</b>_mean": 0.25}))
    _, page = read(report(tmp_path / "run"))
    assert "Weight of the KL" in page.words
    assert "Source: helpful" in page.words
    assert "Source: <b>terse</b>" in page.words
    plots = json.loads(page.scripts[0][1])
    assert any(shape["y0"] == 6.0 for plot in plots.values() for shape in plot["layout"]["shapes"])


def test_headline_figures_compare_the_first_evaluation_with_the_last(hostile_run):
    _, page = read(report(hostile_run))
    assert "0.5 → 4.5" in page.words  # means of [0, 1] and of [4, 5]
    assert "100%" in page.words  # every prompt won
    assert "2 nats" in page.words  # 0.5 a cycle, 4 cycles


def test_a_win_share_counts_prompts_and_halves_ties():
    before = Evaluation(0, {i: [{"score": 1.0}] for i in range(4)})
    after = Evaluation(
        9, {0: [{"score": 2.0}], 1: [{"score": 1.0}], 2: [{"score": 0.0}], 3: [{"score": 5.0}], 7: [{"score": 9.0}]}
    )
    share = win_share(before, after)
    assert share is not None
    assert share.mean == (1 + 0.5 + 0 + 1) / 4
    assert win_share(before, Evaluation(9, {8: [{"score": 1.0}]})) is None


def test_best_of_n_by_hand():
    # of 4 samples 0, 1, 2, 3: six pairs with maxima 1 2 3 2 3 3, mean 14/6; KL of best of 2: log 2 - 1/2
    evaluation = Evaluation(0, {0: [{"score": s} for s in (2.0, 0.0, 3.0, 1.0)]})
    (n1, kl1, s1), (n2, kl2, s2), (n4, _, s4) = best_of(evaluation)
    assert (n1, kl1, s1) == (1, 0.0, 1.5)
    assert (n2, kl2, s2) == (2, pytest.approx(0.19314718), pytest.approx(14 / 6))
    assert (n4, s4) == (4, 3.0)


def test_a_run_that_has_just_begun_or_failed_or_was_never_evaluated_has_a_page(tmp_path):
    with RunDirectory.open(ppo_config(tmp_path / "new"), command="ppo"):
        _, page = read(report(tmp_path / "new"))
        assert "No cycle is done yet" in page.words
        assert "running" in page.words
    with suppress(Interrupted), RunDirectory.open(ppo_config(tmp_path / "cut"), command="ppo") as run:
        run.append_metrics(metrics(1))
        raise Interrupted("stopped after cycle 1 <b>")
    _, page = read(report(tmp_path / "cut"))
    assert "stopped after cycle 1 <b>" in page.words
    assert "not evaluated" in page.words


STEP = {"step": 1, "loss": 1.0, "optim/lr": 0.1, "optim/grad_norm": 1.0, "tokens/trained": 5, "time/update_s": 1.0,
        "reward_model/loss": 0.7, "reward_model/accuracy": 0.5, "reward_model/margin": 0.1, "qlearning/residual": 0.3,
        "qlearning/log_ratio": -0.2, "value/explained_variance": 0.5}  # fmt: skip
MORE = ("response/length_min", "response/length_max", "eval/score_mean", "reward/total_mean", "policy/optimality_gap",
        "optim/skipped_steps", "check/first_ratio_error", "memory/peak_mb")  # fmt: skip
OF_DPO = ("loss", "accuracy", "margin", "chosen_logratio", "rejected_logratio", "chosen_logprob", "rejected_logprob")
LINES = {"ppo": metrics(1, **dict.fromkeys(MORE, 1.0)), "sft": STEP, "reward": STEP, "qlearning": STEP,
         "ilql": STEP | {"qlearning/nll": 1.0}, "dpo": STEP | {f"dpo/{name}": 0.1 for name in OF_DPO}}  # fmt: skip


@pytest.mark.parametrize(("kind", "evaluated"), [("ppo", False), ("ppo", True), ("sft", False), ("reward", False),
                                                   ("dpo", False), ("qlearning", False), ("ilql", False)])  # fmt: skip
def test_no_metric_that_is_null_keeps_the_report_from_being_written(tmp_path, monkeypatch, kind, evaluated):
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "")  # four megabytes that nothing here looks at
    policy = SFTModelConfig("models/base")
    config = {
        "ppo": ppo_config(tmp_path / "run"),
        "sft": SFTConfig(str(tmp_path / "run"), policy, DataConfig("d.jsonl")),
        "reward": RewardConfig(str(tmp_path / "run"), policy, DataConfig("d.jsonl")),
        "dpo": DPOConfig(str(tmp_path / "run"), ReferencedModelConfig("models/base"), DataConfig("d.jsonl")),
        "qlearning": QLearningConfig(str(tmp_path / "run"), ModelConfig("models/base"), ScoredConfig("d.jsonl")),
        "ilql": QLearningConfig(
            str(tmp_path / "run"), ModelConfig("models/base"), ScoredConfig("d.jsonl"),
            qlearning=QLearningSection(loss="ilql"),
        ),
    }[kind]  # fmt: skip
    line = LINES[kind]
    unit, *names = line
    with RunDirectory.open(config, command="qlearning" if kind == "ilql" else kind) as run:
        if evaluated:
            run.write_evaluation(0, answers(["a", "b"], [[None, 1.0], [None, None]], 0))
            run.write_evaluation(1, answers(["a", "b"], [[None, 1.0], [1.0, float("nan")]], 1) | {"kl": [None] * 4})
    for null in [*([name] for name in names), names]:  # each of them alone, then all at once
        for where in ("first", "last", "only"):
            bad = line | dict.fromkeys(null)
            rows = {"first": [bad, line], "last": [line, bad], "only": [bad]}[where]
            text = "".join(json.dumps(row | {unit: i}) + "\n" for i, row in enumerate(rows, 1))
            (run.path / "metrics.jsonl").write_text(text)
            page = Page(render(Run.open(run.path)))
            examine(run.path)
            assert "NaN" not in page.scripts[0][1]  # JSON has none, and the page's script would stop there
    if kind == "ppo" and not evaluated:
        assert "– → –" in page.words


def test_alarms_are_shown_with_cause_and_knob(tmp_path):
    with RunDirectory.open(ppo_config(tmp_path / "run"), command="ppo") as run:
        for cycle in range(1, 41):
            run.append_metrics(metrics(cycle, **{"policy/clip_fraction": 0.5, "check/sampler_gap": 1e-6}))
        run.event("alarm", cycle=3, rule="sampler-gap", what="sampler gap 0.2 nats per token, above 0.05")
    html, page = read(report(tmp_path / "run"))
    assert "clip-fraction" in page.words
    assert "50% of the tokens have their gradient cut" in page.words
    assert "cycle 1 to 40" in page.words
    assert "Lower optim.lr or ppo.epochs." in page.words
    assert "Sampler gap 0.2 nats per token, above 0.05" in page.words
    assert html.index("sampler-gap") < html.index("clip-fraction")  # the serious first


def test_chat_prompts_are_shown_as_messages(tmp_path):
    chat = json.dumps([{"role": "user", "content": "Hi\nthere"}])
    with RunDirectory.open(ppo_config(tmp_path / "run"), command="ppo") as run:
        run.append_metrics(metrics(1))
        run.write_evaluation(1, answers([chat, "[{not json"], [[1.0]] * 2, 1))
    _, page = read(report(tmp_path / "run"))
    assert "user: Hi\nthere" in page.pres
    assert "[{not json" in page.pres


def test_a_long_run_is_thinned_and_keeps_its_mean(tmp_path):
    config = SFTConfig(
        str(tmp_path / "sft"), SFTModelConfig(InitModelConfig({"model_type": "llama"}, "tok")), DataConfig("d.jsonl")
    )
    with RunDirectory.open(config, command="sft") as run:
        (run.path / "metrics.jsonl").write_text(
            "".join(json.dumps({"step": i, "loss": i % 7}) + "\n" for i in range(1, 5001))
        )
    _, page = read(report(tmp_path / "sft"))
    (plot,) = [p for p in json.loads(page.scripts[0][1]).values() if p["data"][0]["y"]]
    y = plot["data"][0]["y"]
    assert 500 <= len(y) <= 1000
    assert sum(y) / len(y) == pytest.approx(3.0, abs=0.01)
    assert "a new llama model" in page.words


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_a_run_on_pairs_shows_accuracy_length_baseline_and_calibration(tmp_path, kind):
    cls, model = {"reward": (RewardConfig, SFTModelConfig), "dpo": (DPOConfig, ReferencedModelConfig)}[kind]
    config = cls(str(tmp_path / "rm"), model("models/base"), DataConfig("pairs.jsonl"))
    share = {"value": 0.71, "low": 0.65, "high": 0.77}
    found = {"train_pairs": 90, "test_pairs": 40, "accuracy": share, "train_accuracy": 0.8, "loss": 0.55,
             "length_prefers": "longer", "length_accuracy": {"value": 0.6, "low": 0.5, "high": 0.7},
             "calibration_error": 0.05, "mean": 0.0, "std": 1.0, "learned": True,
             "calibration": [{"pairs": 40, "confidence": 0.62, "accuracy": share}]}  # fmt: skip
    with RunDirectory.open(config, command=kind) as run:
        run.append_metrics(LINES[kind])
        (run.path / f"{kind}_report.json").write_text(json.dumps(found))
    _, page = read(report(tmp_path / "rm"))
    for words in ("71.0%", "[65.0%, 77.0%] on 40 pairs", "60.0%", "always preferring the longer", "Calibration"):
        assert words in page.words
    assert any(p["data"][-1].get("x") == [0.62] for p in json.loads(page.scripts[0][1]).values())


def test_it_is_written_where_asked_and_replaces_what_is_there(hostile_run, tmp_path):
    target = tmp_path / "page.html"
    target.write_text("old")
    assert report(Run.open(hostile_run), to=target) == target
    assert target.read_text(encoding="utf-8")[:3] != "old"
    assert not list(tmp_path.glob(".*"))


def test_a_place_that_cannot_be_written_and_a_directory_that_is_no_run_are_named(hostile_run, tmp_path):
    with pytest.raises(RunError, match=r"nowhere/x.html cannot be written .*Name a file"):
        report(hostile_run, to=tmp_path / "nowhere" / "x.html")
    with pytest.raises(RunError, match="is not a run directory"):
        report(tmp_path)
