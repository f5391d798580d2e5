"""Every page over real runs, by HTTP: what it shows is what is in the files."""

import html
import itertools
import json
import re
import shutil
import threading
import time
from random import Random

import httpx
import pytest

import tether
from labeled import pairs
from served import form_token, serve
from tether.config import EvaluateConfig, PromptsConfig, SamplingConfig
from tether.config.ppo import PPOSection
from tether.errors import StoreError
from tether.feedback import agreement
from tether.feedback.records import Answer, Item, Verdict
from tether.feedback.store import Store
from tether.reports.signals import SIGNALS, STEPS, Scale, arithmetic, beta_of
from tether.reports.text import visible
from tether.runs import EvaluationDir, Run
from tether.runs.files import write_table
from tether.runs.tail import lines_since, sample_lines
from tiny_ppo import id_score

HOSTILE = [
    "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "' \" ` & &amp;", "abc\u202egpj.exe\u2066",
    "\x1b[2J\x1b]0;t\x07", "zero\u200bwidth\u2060", "{{ 7 * 7 }} ${alert(3)} {% raw %}",
    "long " * 20_000, "\ud800 half",
]  # fmt: skip


def ids(client) -> dict[str, str]:
    return {name: i for i, name in re.findall(r'<a href="/runs/(\w+)">([\w/]+)</a>', client.get("/runs").text)}


def test_runs_are_listed_with_their_state_and_curves(studio):
    text = studio.client().get("/runs").text
    assert text.count('class="state finished"') == 2
    assert text.count("<polyline") == 4


def test_agreement_that_is_being_counted_is_shown_once_it_is_and_a_failure_is_tried_again(studio, monkeypatch):
    store = Store(studio.store)
    store.add_items([Item(f"q{i}", (Answer("x"), Answer("y"))) for i in range(4)], overlap=1)
    for person in ("Ada", "Ben"):
        store.add_annotator(person)
        while task := store.next_task(person):
            store.record(person, task.item, key=f"k{task.item}", choice="ab"[task.item % 2])
    go = threading.Event()
    calls = []

    def slowly(labels):
        calls.append(1)
        go.wait(30)
        if len(calls) == 1:
            raise StoreError("it is locked")
        return agreement.agreement(labels)

    monkeypatch.setattr("tether.studio.agreement.agreement", slowly)
    client = studio.client()
    waiting = client.get("/agreement").text
    assert "being computed" in waiting
    assert 'http-equiv="refresh"' in waiting
    go.set()
    answers = [client.get("/agreement") for _ in range(50) if not time.sleep(0.02)]
    assert sum(answer.status_code == 503 for answer in answers) == 1
    assert "Krippendorff" in answers[-1].text
    assert 'http-equiv="refresh"' not in answers[-1].text
    assert len(calls) == 2


def test_every_link_of_every_page_leads_somewhere(studio):
    client = studio.client()
    queue, seen = ["/runs", "/compare", "/label", "/agreement", "/revisions", "/try"], set()
    while queue:
        path = queue.pop()
        answer = client.get(path)
        assert answer.status_code == 200, path
        if answer.headers["content-type"].startswith("text/html"):
            here = httpx.URL(studio.url + path)
            links = {
                str(here.join(html.unescape(link))) for link in re.findall(r'(?:href|src)="([^"#]+)"', answer.text)
            }
            inside = {link.removeprefix(studio.url) for link in links if link.startswith(studio.url)}
            queue += sorted(inside - seen)
            seen |= inside
    assert any("/compare?a=" in path for path in seen)
    assert any(re.fullmatch(r"/runs/\w+/rollouts/4/\d+", path) for path in seen)


def test_a_damaged_run_does_not_hide_the_others(studio, trained, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(trained, root)
    (root / "first" / "status.json").write_text("{")
    for served in serve(root, tmp_path / "p.db"):
        text = served.client().get("/runs").text
        assert "status.json cannot be read" in text
        assert ">second<" in text


def test_what_differs_between_two_runs_is_named(studio):
    client = studio.client()
    both = list(ids(client).values())
    text = client.get("/runs/differences", params={"run": both}).text
    assert set(re.findall(r"<code>([\w.\[\]]+)</code>", text)) == {"run", "seed", "optim.lr", "model.policy"}


def test_curves_hold_the_numbers_of_the_file_and_overlays_those_of_the_other(studio, trained):
    client = studio.client()
    found = ids(client)
    plots = client.get(f"/runs/{found['first']}/curves", params={"with": found["second"]}).json()["plots"]
    for trace, name in ((-2, "first"), (-1, "second")):
        got = plots["kl/ref_mean"]["data"][trace]
        assert got["x"] == [1, 2, 3, 4]
        assert got["y"] == [m["kl/ref_mean"] for m in Run(trained / name).metrics]


def test_a_running_run_is_told_line_by_line_and_from_the_cursor_on(studio, trained):
    client = studio.client()
    with client.stream("GET", f"/runs/{ids(client)['first']}/live") as answer:
        lines = iter(answer.iter_lines())
        events = []
        for line in lines:
            events.append(line)
            if line.startswith("event: state"):
                break
    size = (trained / "first" / "metrics.jsonl").stat().st_size
    assert f"id: {size}" in events
    data = json.loads(next(line for line in events if line.startswith("data: {"))[len("data: ") :])
    assert data["plots"]["reward/score_mean"]["data"][-1]["x"] == [1, 2, 3, 4]


def test_a_cycles_responses_come_best_first_and_are_found_by_their_words(studio, trained):
    client = studio.client()
    run = ids(client)["first"]
    rows = Run(trained / "first").rollouts(4).to_pylist()
    text = client.get(f"/runs/{run}/rollouts/4?sort=best").text
    order = [int(n) for n in re.findall(rf'/runs/{run}/rollouts/4/(\d+)">', text)]
    assert [rows[i]["score"] for i in order] == sorted((r["score"] for r in rows), reverse=True)
    assert "No response is like that" in client.get(f"/runs/{run}/rollouts/4?find=zzzzzzz").text
    stopped = client.get(f"/runs/{run}/rollouts/4?finish=stop").text
    wanted = sum(row["finish_reason"] == "stop" for row in rows)
    assert f"{wanted} of 8 responses" in stopped


def test_a_point_between_two_written_cycles_opens_the_nearer(studio):
    client = studio.client()
    run = ids(client)["first"]
    assert client.get(f"/runs/{run}/evaluations/3").url.path in (
        f"/runs/{run}/evaluations/2",
        f"/runs/{run}/evaluations/4",
    )


# ---------------------------------------------------------------- the arithmetic of a token

ROW = {
    "text": ["a", "b"], "score": 1.0, "old_logprob": [-1.0, -2.0], "ref_logprob": [-1.5, -1.0], "value": [0.25, 0.5],
    "reward": [-0.05, 1.1], "delta": [0.2, 0.6], "advantage": [0.5, 0.6], "return": [0.75, 1.1], "entropy": [1.0, 0.5],
    "new_logprob": [-0.7, -2.0], "ratio": [1.35, 1.0], "clipped": [True, False],
}  # fmt: skip


def test_the_board_says_what_was_worked_by_hand():
    # γ = 1, λ = 0.5, β = 0.1. δ₁ = 1.1 − 0.5 = 0.6 = A₁; δ₀ = −0.05 + 0.5 − 0.25 = 0.2; A₀ = 0.2 + 0.5·0.6 = 0.5
    said = dict(arithmetic(ROW, 0, PPOSection(gamma=1.0, lam=0.5, clip=0.2), 0.1))
    assert said["δ"] == "r + γ·V′ − V = (−0.050) + 1·0.500 − 0.250 = 0.200"
    assert said["A"] == "δ + γλ·A′ = 0.200 + 0.5·0.600 = 0.500"
    assert said["KL"].endswith("= 0.500")
    assert said["reward"] == "r = −β·KL = −0.1·0.500 = (−0.050)"
    assert "clipped: above 1.2 with whitened A > 0" in said["ratio"]
    last = dict(arithmetic(ROW, 1, PPOSection(gamma=1.0, lam=0.5, clip=0.2), 0.1))
    assert last["reward"] == "r = score − β·KL = 1.000 − 0.1·(−1.000) = 1.100"
    assert last["δ"] == "r + γ·V′ − V = 1.100 + 1·0.000 − 0.500 = 0.600"


def test_the_critics_own_lambda_is_said_and_no_false_sum():
    said = dict(arithmetic(ROW, 0, PPOSection(gamma=1.0, lam=0.5, critic_lam=1.0, clip=0.2), 0.1))
    assert said["return"] == "0.750, with the critic's own λ = 1"


def test_beta_is_read_off_the_row_where_a_controller_moves_it(trained):
    run = Run(trained / "first")
    for cycle, line in zip((1, 2, 3, 4), run.metrics, strict=True):
        for row in run.rollouts(cycle).to_pylist():
            if max(abs(a - b) for a, b in zip(row["old_logprob"], row["ref_logprob"], strict=True)) > 1e-3:
                assert beta_of(row, run.config.ppo) == pytest.approx(line["kl/coef"], rel=1e-2)


def test_every_sum_on_the_board_is_true_of_a_real_run(trained):
    run = Run(trained / "first")
    row = run.rollouts(4).to_pylist()[0]
    for t in range(len(row["value"])):
        said = dict(arithmetic(row, t, run.config.ppo, beta_of(row, run.config.ppo)))
        for name in ("δ", "A", "return", "reward"):
            sum_, _, result = said[name].rpartition(" = ")
            plain = sum_.rpartition(" = ")[2].replace("−", "-").replace("·", "*")
            assert abs(eval(plain) - float(result.replace("−", "-").strip("()"))) < 3e-3, (name, said[name])


def test_colors_are_full_at_the_98th_percentile_and_even_out_around_the_middle():
    rows = [{"delta": [x / 100 for x in range(-100, 101)] + [50.0]}]
    scale = Scale.of(SIGNALS["delta"], rows)
    assert scale.middle == 0
    assert 0.97 < scale.reach <= 1.0
    assert [scale.step(v) for v in (-5.0, 0.0, 5.0, None, float("nan"))] == [-STEPS, 0, STEPS, 0, 0]


# ---------------------------------------------------------------- hostile text


def test_hostile_text_is_shown_as_text_on_every_page(trained, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(trained, root)
    run = Run(root / "first")
    for folder, cycle in (("rollouts", 4), ("evaluations", 4), ("evaluations", 0)):
        table = (run.rollouts if folder == "rollouts" else run.evaluations)(cycle).to_pydict()
        texts = [h.encode("utf-8", "replace").decode() for h in HOSTILE]  # Parquet holds no half characters
        for i in range(len(table["prompt"])):
            table["prompt"][i] = texts[i % len(texts)] if folder == "rollouts" else texts[0]
            table["completion"][i] = f"{cycle} {texts[(i + 1) % len(texts)]}"
            table["text"][i][0] = texts[i % len(texts)]
        write_table(root / "first" / folder / f"cycle-{cycle:06d}.parquet", table)
    for served in serve(root, tmp_path / "p.db"):
        store = Store(tmp_path / "p.db")
        store.add_items([Item(h.encode("utf-8", "replace").decode(), (Answer(HOSTILE[0]), Answer(HOSTILE[3])))
                         for h in HOSTILE], overlap=0)  # fmt: skip
        client = served.client()
        i = ids(client)["first"]
        paths = [f"/runs/{i}/rollouts/4", f"/runs/{i}/rollouts/4/0", f"/runs/{i}/rollouts/4/1", "/label",
                 f"/compare?a={i}:evaluations:0&b={i}:evaluations:4", f"/runs/{i}/evaluations/4/0"]  # fmt: skip
        for path in paths:
            text = client.get(path).text
            assert "<script>alert" not in text, path
            assert "<img src=x" not in text, path
            assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\u202a-\u202e\u2066-\u2069]", text), path
        assert "&lt;script&gt;alert(1)" in client.get(f"/runs/{i}/rollouts/4").text


def test_five_hundred_hostile_strings_are_escaped_text(studio):
    rng = Random(0)
    alphabet = [*"<>&\"'`/={}$%\\\x00\x1b\u202e\u200b a", "</script>", "<svg onload=", "]]>", "<!--", "\u2066"]
    client = studio.client()
    for _ in range(500):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 30)))
        shown = client.get("/runs", params={"find": text.encode("utf-8", "replace").decode()}).text
        value = re.search(r'name="find" value="([^"]*)"', shown)
        assert value
        assert html.unescape(value[1]) == visible(text.encode("utf-8", "replace").decode())


# ---------------------------------------------------------------- reading long files


def test_some_lines_of_a_long_file_are_its_own_first_and_last_among_them(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"cycle": i, "pad": "x" * (i % 7)}) + "\n" for i in range(1, 5001)) + '{"half')
    lines, cursor = sample_lines(file, 100)
    cycles = [line["cycle"] for line in lines]
    assert cycles[0] == 1
    assert cycles[-1] == 5000
    assert cycles == sorted(set(cycles))
    assert 90 <= len(cycles) <= 100
    assert max(b - a for a, b in itertools.pairwise(cycles)) < 60
    assert lines_since(file, cursor) == ([], cursor)
    with file.open("a") as f:
        f.write('": 1, "cycle": 5001}\n')
    more, end = lines_since(file, cursor)
    assert [m["cycle"] for m in more] == [5001]
    assert end == file.stat().st_size


@pytest.mark.parametrize("content", ["", '{"half', None])
def test_a_file_without_a_line_has_none(tmp_path, content):
    file = tmp_path / "metrics.jsonl"
    if content is not None:
        file.write_text(content)
    assert sample_lines(file, 10) == ([], 0)
    assert lines_since(file, 0) == ([], 0)


def test_a_file_that_was_cut_back_is_noticed(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"cycle": 1}\n{"cycle": 2}\n')
    _, cursor = sample_lines(file, 10)
    file.write_text('{"cycle": 1}\n')
    assert lines_since(file, cursor) is None


# ---------------------------------------------------------------- labels by plain HTTP


def fields(page: str) -> dict[str, str]:
    """The hidden fields of a label page's form; none where there is nothing to judge."""
    form = page.partition('id="judge"')[2].partition("</form>")[0]
    return dict(re.findall(r'name="(item|key|form_token|seen)" value="([^"]*)"', form))


def answers_of(page: str) -> list[str]:
    """The answers of a label page in the order in which they are shown."""
    return re.findall(r'<p class="text" dir="auto">(.*?)</p>', page, re.DOTALL)


def test_the_same_form_sent_twice_is_one_label(studio):
    store = Store(studio.store)
    store.add_items([Item("q", (Answer("x"), Answer("y")))], overlap=0)
    client = studio.client()
    page = client.get("/label").text
    data = fields(page) | {"choice": "left:1"}
    for _ in range(2):
        assert client.post("/label", data=data).status_code == 200
    (label,) = store.labels()
    assert ("ab".index(label.choice), label.strength) == (label.order[0], 1)


def test_answers_are_ranked_by_their_places(studio):
    store = Store(studio.store)
    store.add_items([Item("q", tuple(Answer(t) for t in "xyz"))], overlap=0)
    client = studio.client()
    page = client.get("/label").text
    shown = answers_of(page)
    places = {"rank_0": "3", "rank_1": "1", "rank_2": "2"}
    wrong = client.post("/label", data=fields(page) | places | {"rank_2": "1", "choice": "ranking"})
    assert "same place" in wrong.text
    client.post("/label", data=fields(page) | places | {"choice": "ranking"})
    assert [["xyz"[i] for i in label.ranking] for label in store.labels()] == [[shown[1], shown[2], shown[0]]]


def test_a_ranking_begins_with_the_order_that_is_shown(studio):
    store = Store(studio.store)
    store.add_items([Item("q", tuple(Answer(t) for t in "xyz"))], overlap=0)
    page = studio.client().get("/label").text
    chosen = [re.findall(r'<option value="(\d)" selected', one) for one in re.findall(r"<select.*?</select>", page)]
    assert chosen == [["1"], ["2"], ["3"]]


def test_twelve_answers_are_ranked_through_the_real_form(studio):
    store = Store(studio.store)
    store.add_items([Item("q", tuple(Answer(f"answer {i}") for i in range(12)))], overlap=0)
    client = studio.client()
    page = client.get("/label").text
    shown, selects = answers_of(page), re.findall(r'<select name="(\w+)">', page)
    places = [7, 12, 1, 3, 10, 2, 11, 4, 9, 5, 8, 6]  # of the answers from top to bottom
    form = fields(page) | dict(zip(selects, map(str, places), strict=True)) | {"choice": "ranking"}
    assert "Saved" in client.post("/label", data=form).text
    (label,) = store.labels()
    assert [f"answer {i}" for i in label.ranking] == [text for _, text in sorted(zip(places, shown, strict=True))]


def test_gold_items_are_not_passed_by_any_form_value_that_stays_the_same(studio):
    # chosen is stored first in every gold item, so a value that named the stored answer would always be right
    store = Store(studio.store)
    store.add_items([Item(f"q{i}", (Answer("good"), Answer("bad")), gold=0) for i in range(80)])
    client = studio.client()
    right = []
    for _ in range(80):
        page = client.get("/label").text
        side = ("left", "right")[answers_of(page).index("good")]
        (button,) = re.findall(rf'<button name="choice" value="([^"]*)"[^>]*>(?:<kbd>\d</kbd>) {side}, clearly', page)
        right.append(button)
        assert "Saved" in client.post("/label", data=fields(page) | {"choice": button}).text
    assert [label.choice for label in store.labels()] == ["a"] * 80  # the good answer, wherever it was shown
    assert 25 <= max(right.count(value) for value in set(right)) <= 55  # of a fair coin: 40 ± 15, p < 0.001


def test_no_label_page_tells_in_which_order_its_answers_are_stored(studio):
    # without its texts and the values made for it, the form is the same whichever answer is where
    store = Store(studio.store)
    names = ("alpha", "beta", "gamma")
    store.add_items([Item(f"q{i}", tuple(map(Answer, names[:2])), gold=0) for i in range(12)])
    store.add_items([Item(f"r{i}", tuple(map(Answer, names)), gold=0) for i in range(12)])
    client = studio.client()
    forms: dict[str, set[str]] = {"pair": set(), "rank": set()}
    orders: dict[str, set[tuple[int, ...]]] = {"pair": set(), "rank": set()}
    while "item" in fields(page := client.get("/label").text):
        task = store.next_task("Ada")
        form = re.search(r'<form method="post" action="/label" id="judge".*?</form>', page, re.DOTALL)[0]
        for own in [*names, *fields(page).values()]:
            form = form.replace(own, "OWN")
        forms[task.kind].add(form)
        orders[task.kind].add(task.order)
        store.record("Ada", task.item, key=str(task.item), choice="both_good")
    assert len(orders["pair"]) == 2
    assert len(orders["rank"]) >= 4
    assert {kind: len(found) for kind, found in forms.items()} == {"pair": 1, "rank": 1}


def test_an_error_about_a_label_does_not_tell_the_stored_order(studio):
    store = Store(studio.store)
    store.add_items([Item(f"q{i}", (Answer("x"), Answer("y")), gold=0) for i in range(12)])
    store.add_items([Item(f"r{i}", tuple(map(Answer, "xyz")), gold=0) for i in range(12)])
    client = studio.client()
    said: dict[str, set[str]] = {"pair": set(), "rank": set()}
    wrong = {"pair": {"choice": "left:9"}, "rank": {"choice": "ranking", "rank_0": "2", "rank_1": "1"}}
    while "item" in fields(page := client.get("/label").text):
        task = store.next_task("Ada")
        answer = client.post("/label", data=fields(page) | wrong[task.kind])
        assert answer.status_code == 400
        said[task.kind].add(answer.text)
        store.record("Ada", task.item, key=str(task.item), choice="both_good")
    assert {kind: len(found) for kind, found in said.items()} == {"pair": 1, "rank": 1}


def test_axes_of_the_form_are_of_the_sides_that_were_shown(studio):
    store = Store(studio.store)
    store.add_items([Item(f"q{i}", (Answer("x"), Answer("y"))) for i in range(8)], overlap=0)
    client = studio.client()
    for _ in range(8):
        page = client.get("/label").text
        form = fields(page) | {"choice": "right:1", "axis_helpful": "left", "axis_honest": "tie"}
        assert "Saved" in client.post("/label", data=form).text
    for label in store.labels():
        left, right = ("ab"[i] for i in label.order)
        assert (label.choice, label.axes) == (right, {"helpful": left, "honest": "tie"})
    assert len({label.order for label in store.labels()}) == 2


def test_a_form_sent_again_after_an_undo_is_told_as_before_and_records_nothing(studio):
    store = Store(studio.store)
    store.add_items([Item("q", (Answer("x"), Answer("y")))], overlap=0)
    client = studio.client()
    form = fields(client.get("/label").text) | {"choice": "right:2"}
    client.post("/label", data=form)
    client.post("/label/undo", data={"form_token": form["form_token"], "key": "u"})
    assert client.post("/label", data=form).status_code == 200
    assert client.post("/label", data=form | {"choice": "left:2"}).status_code == 400  # the key was of the other side
    assert list(store.labels()) == []


def test_a_pair_of_the_pages_comes_into_the_queue(studio):
    client = studio.client()
    run = ids(client)["first"]
    data = {"form_token": form_token(client), "a": f"{run}:evaluations:0:0", "b": f"{run}:evaluations:4:0"}
    assert "Queued" in client.post("/queue", data=data).text
    store = Store(studio.store)
    item = store.item(store.next_task("Ada").item)
    assert [answer.source["cycle"] for answer in item.answers] == [0, 4]


def test_what_is_queued_from_a_page_is_asked_before_all_that_waits(studio):
    store = Store(studio.store)
    store.add_items([Item(f"q{i}", (Answer("x"), Answer("y"))) for i in range(100)], overlap=0)
    client = studio.client()
    run = ids(client)["first"]
    for row in (0, 2):
        data = {"form_token": form_token(client), "a": f"{run}:evaluations:0:{row}", "b": f"{run}:evaluations:4:{row}"}
        assert "Queued" in client.post("/queue", data=data).text
    for person in ("Ada", "Ben"):
        store.add_annotator(person)
        assert not store.next_task(person).prompt.startswith("q")


def test_models_that_tether_evaluate_asked_are_compared_as_runs_are_and_a_pair_of_them_is_queued(
    trained, tmp_path, tiny_model
):
    root = tmp_path / "runs"
    root.mkdir()
    models = [str(trained / "first" / "final"), str(tiny_model(seed=3))]
    prompts, sampling = PromptsConfig(str(trained / "prompts.jsonl")), SamplingConfig(max_new_tokens=8)
    tether.evaluate(
        EvaluateConfig(models, prompts, run=str(root / "asked"), samples=2, sampling=sampling), reward=id_score
    )
    for studio in serve(root, tmp_path / "p.db"):
        client = studio.client()
        choices = dict(re.findall(r'<option value="(\w+:answers:\d+)">([^<]*)', client.get("/compare").text))
        assert [name.rpartition(": ")[0] for name in choices.values()] == ["asked", "asked"]
        a, b = choices
        page = client.get("/compare", params={"a": a, "b": b}).text
        left, right = (EvaluationDir(root / "asked").answers(i).to_pylist() for i in (0, 1))
        means = [sum(row["score"] for row in rows) / len(rows) for rows in (left, right)]
        assert f"{means[0]:.3f} on the left, {means[1]:.3f} on the right" in page
        assert f"· {left[0]['kl']:.1f} nats".replace("-", "−") in page
        (plot,) = (json.loads(html.unescape(text)) for text in re.findall(r'data-plot="([^"]*)"', page))
        shown, chosen = plot["data"]
        assert shown["text"] == ["model 0", "model 1"]
        assert shown["y"] == pytest.approx(means)
        best = [max(left[i]["score"], left[i + 1]["score"]) for i in range(0, len(left), 2)]
        assert chosen["y"] == pytest.approx([means[0], sum(best) / len(best)])
        assert "data-plot" not in client.get("/compare", params={"a": a, "b": b, "blind": True}).text
        differ = next(i for i, row in enumerate(left) if row["completion"] != right[i]["completion"])
        data = {"form_token": form_token(client), "a": f"{a}:{differ}", "b": f"{b}:{differ}"}
        assert "Queued" in client.post("/queue", data=data).text
        store = Store(tmp_path / "p.db")
        answers = store.item(store.next_task("Ada").item).answers
        assert [answer.source["model"] for answer in answers] == models
        for wrong in (f"{a}:99", f"{a}x:0", "a:answers:0:0", f"{a[:12]}:answers:7:0", f"{a[:12]}:final:0:0", "x"):
            assert client.post("/queue", data=data | {"b": wrong}).status_code == 404, wrong


@pytest.mark.parametrize(
    "data", [{"item": "x", "choice": "left:1"}, {"choice": "c"}, {"choice": "a:1"}, {"choice": "skip"}, {}]
)
def test_a_label_that_cannot_be_meant_says_so_and_saves_nothing(studio, data):
    store = Store(studio.store)
    (item,) = store.add_items([Item("q", (Answer("x"), Answer("y")))], overlap=0).ids
    client = studio.client()
    client.get("/label")
    answer = client.post("/label", data={"form_token": form_token(client), "item": str(item), "key": "k"} | data)
    assert answer.status_code in (400, 404)
    assert list(store.labels()) == []


@pytest.mark.parametrize("data", [{"item": "²"}, {"item": "9" * 5000}, {"choice": "left:²"}, {"seen": "²"}])
def test_digits_that_are_no_numbers_are_refused_or_passed_over(studio, data):
    store = Store(studio.store)
    (item,) = store.add_items([Item("q", (Answer("x"), Answer("y")))], overlap=0).ids
    client = studio.client()
    client.get("/label")
    form = {"form_token": form_token(client), "item": str(item), "key": "k", "choice": "left:1"} | data
    assert client.post("/label", data=form).status_code in (200, 400)


@pytest.mark.parametrize(
    "path", ["/live?cursor=" + "9" * 40, "/rollouts/" + "9" * 300 + "/0", "/rollouts/4/" + "9" * 300]
)
def test_numbers_beyond_all_bounds_are_answered(studio, path):
    client = studio.client()
    assert client.get(f"/runs/{ids(client)['first']}{path}").status_code == 404


def test_a_prompt_that_some_evaluations_did_not_ask_is_shown_where_it_was(trained, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(trained, root)
    run = Run(root / "first")
    table = run.evaluations(0).to_pydict()
    write_table(root / "first" / "evaluations" / "cycle-000000.parquet", {k: v[2:] for k, v in table.items()})
    for served in serve(root, tmp_path / "p.db"):
        client = served.client()
        text = client.get(f"/runs/{ids(client)['first']}/evaluations/4/0").text
        assert "The same prompt through the run" in text
        assert "cycle 0<" not in text


def test_a_judge_stands_beside_people_on_the_agreement_page(studio):
    store = Store(studio.store)
    store.add_items(pairs(3))
    store.add_annotator("Bo")
    store.add_judge("judge:m", {})
    task = store.next_task("Bo")
    store.record("Bo", task.item, choice="a", key="k")
    answers = ({"order": [0, 1], "probability": 0.9}, {"order": [1, 0], "probability": 0.3})
    items = [item for item, _, _ in store.judge_queue("judge:m")]
    store.record_verdicts("judge:m", [Verdict(item, 0.8, (0, 1), "be kind", answers) for item in items])
    client = studio.client()
    page = next(text for _ in range(100) if "Judges beside" in (text := client.get("/agreement").text))
    row = page.partition('<th scope="row">judge:m</th>')[2].partition("</tr>")[0]
    assert [cell.split()[0] for cell in re.findall(r">([^<>]+)<", row)][:3] == ["3", "0", "100"]
    assert "0.60" in row  # ½ (.9 + .3): what is shown first
    assert "<dt>labels</dt><dd>1</dd>" in page
