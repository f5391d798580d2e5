"""`tether label --from-run RUN --uncertain`: people are asked about the pairs that models are least sure of."""

import json
import re
from dataclasses import replace
from itertools import combinations

import pytest
import torch

import tether
from served import form_token, serve
from tether.cli import main
from tether.config import RewardSourceConfig
from tether.config.reading import to_yaml
from tether.feedback.records import Answer, Filters, Item, Verdict
from tether.feedback.store import Store
from tether.feedback.uncertain import uncertain_items
from tether.models.reward_model import init_reward_model, load_reward_model, save_reward_model
from tether.runs.files import write_table
from tiny_ppo import tiny_config

CPU = torch.device("cpu")
ENSEMBLE = RewardSourceConfig(models=["m/1", "m/2"], name="two")
ALONE = RewardSourceConfig(model="m/rm")


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """make_run([source], c1={"prompt": {"answer": its score, or its members' scores}}): a run directory, `run`."""
    monkeypatch.chdir(tmp_path)

    def make(sources, **cycles):
        folder = tmp_path / "run"
        (folder / "rollouts").mkdir(parents=True)
        (folder / "config.yaml").write_text(to_yaml(replace(tiny_config(folder, "m"), reward=sources)))
        (folder / "status.json").write_text('{"kind": "ppo", "state": "finished"}')
        for cycle, prompts in cycles.items():
            rows = [(i, k, p, text, score) for i, (p, given) in enumerate(prompts.items())
                    for k, (text, score) in enumerate(given.items())]  # fmt: skip
            names = ("prompt_index", "response_index", "prompt", "completion")
            columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
            columns["finish_reason"] = ["stop"] * len(rows)
            for source in sources[:1]:
                kind = "members/two" if source.models else "score/f" if source.function else "score/rm"
                columns[kind] = [row[4] for row in rows]
            write_table(folder / "rollouts" / f"cycle-{int(cycle[1:]):06d}.parquet", columns)
        return "run"

    return make


def reasons(items):
    """prompt → (why, uncertainty), in the order given."""
    return {
        i.prompt: (i.source["uncertain"]["why"], pytest.approx(i.source["uncertain"]["uncertainty"], abs=1e-4))
        for i in items
    }


def stored(path="preferences.db"):
    """The items of a store, in the order of their queue."""
    with Store(path, create=False) as store:
        return [store.item(number) for number, _, _ in store.judge_queue("nobody")]


# Differences (2, -2), (2, 2) and (√7, 1): their mean square is 4, so s = 2 and the P's are
# σ(±1) = .7311, .2689, deviation .2311; σ(1), σ(1), deviation 0; σ(1.3229) = .7897, σ(.5) = .6225, deviation .0836.
BY_HAND = {
    "agreed": {"x": [2.0, 2.0], "y": [0.0, 0.0]},
    "far apart, one order": {"x": [7**0.5, 1.0], "y": [0.0, 0.0]},
    "opposed": {"x": [2.0, -2.0], "y": [0.0, 0.0]},
}


def test_pairs_of_an_ensemble_are_ranked_by_how_far_its_members_probabilities_are_apart(make_run, capsys):
    run = make_run([ENSEMBLE], c1=BY_HAND)
    items = uncertain_items(run, to="none.db").items
    assert list(reasons(items).items()) == [
        ("opposed", ("members of two disagree", 0.2311)),
        ("far apart, one order", ("members of two disagree", 0.0836)),
        ("agreed", ("members of two disagree", 0.0)),
    ]
    first = items[0]
    flipped = first.answers[0].text == "y"
    assert first.source["uncertain"]["probabilities"] == ([0.2689, 0.7311] if flipped else [0.7311, 0.2689])
    assert first.answers[0].source.keys() == {"run", "cycle", "prompt_index", "response_index"}
    assert main(["label", "--from-run", run, "--uncertain", "--limit", "2", "--overlap", "0"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "run, cycle 1: 2 of 3 pairs, one of a prompt, whose order is least certain",
        "  2 by how far members of two disagree: P(better) by 0.231 to 0.084",
        "run: 2 items added to preferences.db, 0 of them for two people; all of them are asked first",
    ]
    assert {item.prompt for item in stored()} == {"opposed", "far apart, one order"}


def test_a_prompt_gives_the_least_certain_of_its_pairs_alone(make_run):
    many = {"x": [0.0, 0.0], "y": [1.0, -1.0], "z": [-3.0, 3.0]}
    (item,) = uncertain_items(make_run([ENSEMBLE], c1={"p": many}), to="none.db").items
    assert {answer.text for answer in item.answers} == {"y", "z"}


def test_pairs_of_one_reward_model_are_ranked_by_how_close_their_scores_are(make_run, capsys):
    # Differences 7 and 1: s = 5, so P is σ(1.4) = .8022 and σ(.2) = .5498; 1 - |2P - 1| is .3957 and .9003.
    run = make_run([ALONE], c1={"far": {"x": 8.0, "y": 1.0}, "close": {"x": 4.0, "y": 5.0}})
    assert list(reasons(uncertain_items(run, to="none.db").items).items()) == [
        ("close", ("rm scores both nearly alike", 0.9003)),
        ("far", ("rm scores both nearly alike", 0.3957)),
    ]
    assert main(["label", "--from-run", run, "--uncertain"]) == 0
    assert "  2 by how close rm scores both answers: P(better) 0.550 to 0.802" in capsys.readouterr().out.splitlines()


def judged(path, *pairs):
    """Items with a judge's labels: (prompt, first answer, second answer, P(the first is better))."""
    with Store(path, gold_fraction=0, repeat_fraction=0) as store:
        items = [Item(p, (Answer(a), Answer(b)), source={"file": "f.jsonl"}) for p, a, b, _ in pairs]
        ids = store.add_items(items, overlap=0).ids
        store.add_judge("judge:j", {})
        said = [Verdict(i, p, (0, 1), "be kind", ()) for i, (*_, p) in zip(ids, pairs, strict=True)]
        store.record_verdicts("judge:j", said)


def test_where_a_judge_and_the_reward_model_prefer_different_answers_people_are_asked_first(make_run, capsys):
    # Differences of x and y: 7, -1, 7 and of the older cycle 1; s = 5. P = σ(1.4) = .8022 against .1 of the judge
    # makes .7022, σ(.2) = .5498 against .4 makes .1498; where both prefer x nothing is contrary.
    run = make_run(
        [ALONE],
        c1={"older": {"x": 1.0, "y": 0.0}},
        c2={"sure": {"x": 8.0, "y": 1.0}, "close": {"x": 4.0, "y": 5.0}, "same": {"x": 7.0, "y": 0.0}},
    )
    judged("preferences.db", ("sure", "x", "y", 0.1), ("older", "y", "x", 0.6), ("same", "x", "y", 0.9))
    items = uncertain_items(run, to="preferences.db").items
    assert list(reasons(items).items()) == [
        ("sure", ("judge:j and rm prefer different answers", 0.7022)),
        ("older", ("judge:j and rm prefer different answers", 0.1498)),
        ("close", ("rm scores both nearly alike", 0.9003)),
        ("same", ("rm scores both nearly alike", 0.3957)),
    ]
    assert items[1].source["uncertain"]["probabilities"] == [0.4502]  # of the answer that is stored first
    assert items[1].source["uncertain"]["judge"] == 0.6
    assert main(["label", "--from-run", run, "--uncertain", "--limit", "2"]) == 0
    out = capsys.readouterr().out
    assert "  2 where judge:j and rm prefer different answers" in out
    assert "run: 0 items added to preferences.db, 0 of them for two people; 2 were there already; all of them" in out
    first = stored()
    assert [item.prompt for item in first][2:] == ["same"]  # what is contrary waits before what is not
    assert first[0].source["file"] == "f.jsonl"
    assert "judge:j" in first[0].source["uncertain"]["why"]


def test_pairs_that_a_judge_labeled_count_whichever_cycle_they_are_from(make_run):
    sure = {"x": 8.0, "y": 1.0}
    run = make_run([ALONE], c1={"older": sure}, c2={f"p{i}": sure for i in range(4)})
    judged("preferences.db", ("older", "x", "y", 0.4))
    (item,) = uncertain_items(run, to="preferences.db", limit=1).items
    assert item.prompt == "older"


def test_what_is_there_is_not_added_twice_and_what_people_have_judged_makes_room(make_run, capsys):
    run = make_run([ENSEMBLE], c1=BY_HAND)
    with Store("preferences.db", gold_fraction=0, repeat_fraction=0) as store:
        for a, b in (("x", "y"), ("y", "x")):  # one of the two is not as the command would write it
            store.add_items([Item(f"{a}{b}", (Answer(a), Answer(b)))], overlap=0)
        (opposed,) = store.add_items([Item("opposed", (Answer("y"), Answer("x")))], overlap=0).ids
        (apart,) = store.add_items([Item("far apart, one order", (Answer("x"), Answer("y")))], overlap=0).ids
        argv = ["label", "--from-run", run, "--uncertain", "--limit", "2"]
        assert main(argv) == 0
        assert store.item(opposed).source["uncertain"]["probabilities"] == [0.2689, 0.7311]  # of the one stored first
        assert store.item(apart).source["uncertain"]["probabilities"] == [0.7897, 0.6225]
        assert "0 items added to preferences.db, 0 of them for two people; 2 were there already" in (
            capsys.readouterr().out
        )
        store.add_annotator("Ada")
        tasks = []
        for n in range(2):
            tasks.append(store.next_task("Ada"))
            store.record("Ada", tasks[-1].item, key=f"k{n}", choice="a")
        assert {task.item for task in tasks} == {opposed, apart}  # before the two that were there first
        assert main(argv) == 0
        out = capsys.readouterr().out
        assert "1 of 3 pairs" in out
        assert "1 items added" in out
        assert store.next_task("Ada").prompt == "agreed"
        assert store.overview().items == 5


def test_people_are_asked_about_what_the_policy_writes_now(make_run):
    run = make_run(
        [ENSEMBLE],
        c1={"opposed": {"old": [9.0, -9.0], "older": [0.0, 0.0]}, "gone": {"x": [9.0, -9.0], "y": [0.0, 0.0]}},
        c2={"one": {"x": [1.0, 0.0]}},
        c3=BY_HAND | {"one": {"y": [0.0, 0.0]}},
    )
    found = uncertain_items(run, to="none.db", limit=1)  # four prompts are enough, and two cycles have them
    assert [item.prompt for item in found.items] == ["opposed"]
    assert {answer.text for answer in found.items[0].answers} == {"x", "y"}
    assert found.notes[0].startswith("run, cycles 2 to 3: 1 of 4 pairs")
    assert [item.prompt for item in uncertain_items(run, to="none.db", limit=2).items] == ["gone", "opposed"]
    older = uncertain_items(run, to="none.db", cycle=1)
    assert {answer.text for item in older.items for answer in item.answers} == {"old", "older", "x", "y"}


def test_answers_that_a_source_did_not_score_are_left_out(make_run):
    run = make_run([replace(ALONE, optional=True)], c1={"p": {"x": 1.0, "y": None, "z": 2.0}, "q": {"x": None, "y": 1}})
    (item,) = uncertain_items(run, to="none.db").items
    assert {answer.text for answer in item.answers} == {"x", "z"}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--from-run", "run", "--limit", "0"], "--limit 0: no pair would be asked about"),
        (["--from-run", "run", "--cycle", "7"], "rollouts were written of these cycles: 1"),
        (["--from-run", "run", "--per-prompt", "3"], "--uncertain chooses pairs, and --per-prompt 3"),
        (["--from", "p.jsonl"], "--uncertain goes with --from-run RUN"),
        (["--from-run", "."], ". is not a run directory"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_store(make_run, tmp_path, capsys, argv, says):
    make_run([ENSEMBLE], c1=BY_HAND)
    refused(["label", "--uncertain", *argv], says, tmp_path, capsys)


@pytest.mark.parametrize(
    ("source", "cycles", "says"),
    [
        (ENSEMBLE, {}, "run holds no rollouts"),
        (ENSEMBLE, {"c1": {"p": {"x": [1.0, 2.0]}, "q": {"x": [1.0, 2.0]}}}, "responses_per_prompt of 2 or more"),
        (RewardSourceConfig(function="r.py:f"), {"c1": {"p": {"x": 1.0, "y": 2.0}}}, "its reward is f, and a function"),
        (None, {"c1": {"p": {"x": 1.0, "y": 2.0}}}, "its reward is given from Python, and a function"),
        (replace(ENSEMBLE, name="other"), {"c1": BY_HAND}, "the rollouts of run do not hold members/other"),
    ],
)  # fmt: skip
def test_a_run_that_is_sure_of_everything_is_refused(make_run, tmp_path, capsys, source, cycles, says):
    make_run([source] if source else [], **cycles)
    refused(["label", "--uncertain", "--from-run", "run"], says, tmp_path, capsys)


def refused(argv, says, tmp_path, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("tether: error: ")
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "preferences.db").exists()


# ---------------------------------------------------------------- a real run


@pytest.fixture(scope="module")
def run(tiny_model, tiny_tokenizer, tmp_path_factory):
    """A short run of PPO with an ensemble of two random reward models, each with a normalization of its own."""
    folder, members = tmp_path_factory.mktemp("ppo"), []
    for seed in range(2):
        model = init_reward_model(
            str(tiny_model()), dtype=torch.float32, weights_dtype=torch.float32, device=CPU, seed=seed
        )
        model.mean, model.std = 0.1 * seed, 1.0 + seed
        save_reward_model(model, tiny_tokenizer, folder / f"member-{seed + 1}", stop_id=1)
        members.append(str(folder / f"member-{seed + 1}"))
    config = tiny_config(folder / "run", tiny_model(), log={"tensorboard": False, "rollouts_every": 1})
    return tether.ppo(replace(config, reward=[RewardSourceConfig(models=members)]))


def test_rollouts_hold_what_each_member_of_an_ensemble_said(run):
    rows = run.rollouts(4).to_pylist()
    tokens = [row["prompt_token_id"] + row["token_id"] for row in rows]
    for k, path in enumerate(run.config.reward[0].models):
        want = load_reward_model(path, dtype=torch.float32, device=CPU).score(tokens)
        assert [row["members/ensemble"][k] for row in rows] == pytest.approx(want.tolist(), abs=1e-5)


def test_the_label_page_asks_about_the_pairs_of_a_real_run_first(run, tmp_path, capsys):
    store = Store(tmp_path / "labels.db", gold_fraction=0, repeat_fraction=0)
    store.add_items([Item(f"earlier {i}", (Answer("x"), Answer("y"))) for i in range(70)], overlap=0)
    argv = ["label", "--from-run", str(run.path), "--uncertain", "--limit", "3", "--to", str(store.path)]
    assert main([*argv, "--overlap", "0"]) == 0
    assert "3 items added" in capsys.readouterr().out
    # The same by hand: every prompt's answers of its latest cycle, their pair of largest deviation of σ(d / s).
    answers = {}
    for cycle in (4, 3, 2, 1):
        rows = run.rollouts(cycle).to_pylist()
        for prompt in {row["prompt"] for row in rows if len(answers.get(row["prompt"], {})) < 2}:
            given = {row["completion"]: row["members/ensemble"] for row in rows if row["prompt"] == prompt}
            answers[prompt] = given | answers.get(prompt, {})
    pairs = [(p, a, b) for p, given in answers.items() for a, b in combinations(given.values(), 2)]
    d = torch.tensor([[x - y for x, y in zip(a, b, strict=True)] for _, a, b in pairs], dtype=torch.float64)
    spread = (d / d.square().mean().sqrt()).sigmoid().std(1, correction=0)
    want = list(dict.fromkeys(pairs[i][0] for i in spread.argsort(descending=True)))[:3]
    shown = []
    for served in serve(run.path.parent, store.path):
        client = served.client()
        for _ in range(3):
            page = client.get("/label").text
            shown.append(re.search(r'<pre class="text prompt"[^>]*>(.*?)</pre>', page, re.DOTALL)[1])
            assert "disagree" not in page  # why it is asked would sway whoever answers
            item = re.search(r'name="item" value="(\d+)"', page)[1]
            form = {"form_token": form_token(client), "item": item, "key": f"k{item}", "choice": "left:2"}
            assert "Saved" in client.post("/label", data=form).text
    assert sorted(shown) == sorted(want)
    assert len(list(store.labels(Filters()))) == 3
    assert main(["label", "--to", str(store.path), "--export", str(tmp_path / "out")]) == 0
    items = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    assert sum("disagree" in str(item["source"]) for item in items) == 3  # and whoever runs the project can read it
