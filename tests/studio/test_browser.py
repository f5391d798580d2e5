"""In a real browser that can reach nothing but the studio: by keyboard, live, token by token, and without scripts."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Error

import tether
from served import opened, serve
from tether.feedback.records import Answer, Item
from tether.feedback.store import Store
from tether.reports.text import visible
from tether.runs import Run
from tiny_ppo import id_score, tiny_config


def queue(store: Path, pairs: int) -> Store:
    found = Store(store)
    found.add_items(
        [Item(f"prompt {i}", (Answer(f"first {i}"), Answer(f"second {i}"))) for i in range(pairs)], overlap=0
    )
    return found


def until(page, expression: str, seconds: float = 60) -> None:
    """Wait for a JavaScript expression: Playwright's own way evaluates a string, which our policy forbids."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(Error):  # the page it was asked of is gone, and the next one is coming
            if page.evaluate(f"document.readyState === 'complete' && {expression}"):
                return
        time.sleep(0.02)
    raise AssertionError(expression)


def judged(page) -> int:
    return int(page.inner_text("#progress").split()[2].rstrip(".,"))


def test_twenty_pairs_are_labeled_by_keyboard_alone_undone_and_exported(page, studio):
    store = queue(studio.store, 20)
    page.goto(studio.url + "/label")
    for i in range(20):
        page.keyboard.press("123456gb"[i % 8])
        until(page, f"document.querySelector('#progress').innerText.includes('You judged {i + 1}')")
    page.reload()
    assert judged(page) == 20
    assert len(list(store.labels())) == 20
    page.keyboard.press("u")
    until(page, "document.body.innerText.includes('Taken back')")  # and the page listens to keys again
    assert judged(page) == 19
    page.keyboard.press("1")
    until(page, "document.body.innerText.includes('Saved')")
    page.goto(studio.url + "/agreement")
    with page.expect_download() as download:
        page.click("text=Preferences as JSONL")
    rows = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    assert rows == json.loads(json.dumps(store.preference_rows()))
    ties = [row for row in rows if row.get("probability") == 0.5]
    decided = [label for label in store.labels() if label.choice in ("a", "b")]
    assert len(ties) == sum(label.choice in ("both_good", "both_bad") for label in store.labels())
    assert len(rows) == len(decided) + len(ties)


def test_what_is_recorded_is_the_side_that_was_shown(page, studio):
    store = queue(studio.store, 6)
    page.goto(studio.url + "/label")
    shown = {}
    for i in range(6):
        prompt, left = page.inner_text("pre.prompt"), page.inner_text(".sides .card >> nth=0 >> .text")
        shown[prompt] = left
        page.keyboard.press("1")
        until(page, f"document.querySelector('#progress').innerText.includes('You judged {i + 1}')")
    assert {row["prompt"]: row["chosen"] for row in store.preference_rows()} == shown
    assert len({label.order for label in store.labels()}) == 2  # sides are shuffled


def test_a_skip_asks_for_its_reason_and_a_note_survives_a_reload(page, studio):
    store = queue(studio.store, 2)
    page.goto(studio.url + "/label")
    page.keyboard.press("n")
    page.keyboard.type("hmm 1 s")
    page.reload()
    assert page.input_value("textarea[name=note]") == "hmm 1 s"
    page.keyboard.press("s")
    page.keyboard.type("cut off")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Saved")
    (label,) = store.labels()
    assert (label.choice, label.reason) == ("skip", "cut off")


def test_without_scripts_labeling_still_works(plain_page, studio):
    store = queue(studio.store, 2)
    plain_page.goto(studio.url + "/label")
    plain_page.click("button:has-text('right, clearly')")
    plain_page.click("button:has-text('all bad')")
    assert [label.choice in ("a", "b") or label.choice for label in store.labels()] == [True, "both_bad"]
    plain_page.click("text=take back")
    assert len(list(store.labels())) == 1


def test_enter_in_the_form_without_scripts_records_nothing(plain_page, studio):
    store = queue(studio.store, 1)
    plain_page.goto(studio.url + "/label")
    plain_page.focus("#reason")
    plain_page.keyboard.type("cut off")
    plain_page.keyboard.press("Enter")
    plain_page.wait_for_timeout(300)
    assert list(store.labels()) == []


def test_other_pages_load_while_an_answer_is_written(page, studio):
    page.goto(studio.url + "/try")
    page.fill("#prompt", "once")
    page.click("button:has-text('Answer')")
    client = studio.client()
    for _ in range(40):
        assert client.get("/runs").status_code == 200
    until(page, "document.querySelector('#after').getAttribute('aria-busy') === 'false'")
    assert page.is_hidden("#refused")


def test_a_completion_is_walked_by_arrow_keys_and_the_numbers_are_the_files(page, studio, trained):
    row = Run(trained / "first").rollouts(4).to_pylist()[0]
    page.goto(studio.url + "/runs")
    page.click("a:text-is('first')")
    page.click("text=Responses of cycle 4")
    page.goto(page.url.split("?")[0] + "/0")
    for t in range(len(row["value"])):
        assert page.inner_text("#at-number") == str(t)
        board = page.inner_text("#board").replace("−", "-").replace("(", "").replace(")", "")
        assert f"= {row['delta'][t]:.3f}" in board
        assert f"= {row['advantage'][t]:.3f}" in board
        page.keyboard.press("ArrowRight")
    assert page.inner_text("#at-number") == str(len(row["value"]) - 1)
    before = page.get_attribute(".tok >> nth=0", "class")
    page.check("input[value=entropy]")
    assert page.get_attribute(".tok >> nth=0", "class") != before or row["entropy"][0] == 0
    assert "How open the choice was" in page.inner_text("#says")


def test_a_run_is_watched_while_it_trains_and_a_point_opens_its_cycle(browser, tiny_model, tmp_path):
    root = tmp_path / "runs"
    root.mkdir()
    config = tiny_config(root / "live", tiny_model(), ppo={"cycles": 30, "batch": 8, "minibatch": 8, "epochs": 1})
    slow = threading.Event()

    def reward(completion_ids, **_):
        slow.wait(0.15)
        return id_score(completion_ids)

    training = threading.Thread(target=lambda: tether.ppo(config, reward=reward))
    training.start()
    while not (root / "live" / "metrics.jsonl").exists():
        time.sleep(0.05)
    for served in serve(root, tmp_path / "p.db"):
        for page in opened(browser, served):
            page.click("a:text-is('live')")
            until(page, "document.querySelector('.plot .scatterlayer')")
            count = "document.querySelector('[data-metric=\"reward/score_mean\"] .plot').data.at(-1).x.length"
            first = page.evaluate(count)
            until(page, f"{count} > {first} + 3")
            assert page.inner_text("#state") == "running"
            slow.set()
            training.join()
            until(page, "document.querySelector('#state').innerText === 'finished'")
            until(page, f"{count} === 30")
            x = "document.querySelector('[data-metric=\"reward/score_mean\"] .plot').data.at(-1).x"
            assert page.evaluate(x) == list(range(1, 31))
            points = page.locator('[data-metric="reward/score_mean"] .plot .points path')
            points.last.scroll_into_view_if_needed()
            points.last.click(force=True)
            page.wait_for_url("**/rollouts/30")


def test_a_first_cycle_that_ends_between_the_page_and_its_curves_is_drawn(browser, trained, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(trained / "first", root / "first")
    file = root / "first" / "metrics.jsonl"
    lines = file.read_text()
    file.write_text("")

    def finish_a_cycle(route):
        file.write_text(lines)
        route.continue_()

    for served in serve(root, tmp_path / "p.db"):
        for page in opened(browser, served):
            page.route("**/curves?*", finish_a_cycle)
            page.click("a:text-is('first')")
            until(page, "document.querySelector('.plot .scatterlayer')", seconds=20)


def test_seven_tabs_of_live_runs_open_since_hidden_ones_hold_no_connection(browser, trained, tmp_path):
    # browsers open six connections to a host over HTTP/1.1: six live streams leave none for a seventh page
    root = tmp_path / "runs"
    shutil.copytree(trained, root)
    status = root / "first" / "status.json"
    status.write_text(json.dumps(json.loads(status.read_text()) | {"state": "running", "heartbeat": now()}))
    for served in serve(root, tmp_path / "p.db"):
        for first in opened(browser, served):
            first.click("a:text-is('first')")
            until(first, "document.querySelector('.plot .scatterlayer')")
            tabs = [first]
            for _ in range(6):
                show(tabs[-1], "hidden")
                tabs.append(first.context.new_page())
                tabs[-1].goto(first.url, timeout=20_000)
                until(tabs[-1], "document.querySelector('.plot .scatterlayer')", 20)
            # the first tab follows the run again once it is looked at: the new line is drawn
            lines = (root / "first" / "metrics.jsonl").read_text().splitlines()
            with (root / "first" / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(json.loads(lines[-1]) | {"cycle": 5}) + "\n")
            x = "document.querySelector('[data-metric=\"reward/score_mean\"] .plot').data.at(-1).x"
            until(tabs[-1], f"{x}.at(-1) === 5", 20)
            assert first.evaluate(x) == [1, 2, 3, 4]
            show(tabs[-1], "hidden")
            show(first, "visible")
            until(first, f"{x}.at(-1) === 5", 20)
            assert first.evaluate(x) == [1, 2, 3, 4, 5]
            status.write_text(json.dumps(json.loads(status.read_text()) | {"state": "finished"}))
            until(first, "document.querySelector('#state').innerText === 'finished'", 20)


def now() -> str:
    return datetime.now(UTC).isoformat()


def show(page, state: str) -> None:
    """Tell a page that its tab is hidden or visible: Playwright keeps every page of a headless browser visible."""
    page.evaluate(
        """state => {
            Object.defineProperty(document, 'visibilityState', {value: state, configurable: true});
            Object.defineProperty(document, 'hidden', {value: state === 'hidden', configurable: true});
            document.dispatchEvent(new Event('visibilitychange'));
        }""",
        state,
    )


def test_two_checkpoints_are_compared_and_a_pair_goes_to_the_queue(page, studio):
    page.goto(studio.url + "/compare")
    page.select_option("select[name=a]", label="first, cycle 0")
    page.select_option("select[name=b]", label="first, cycle 4")
    page.click("main button:has-text('Compare')")
    assert page.locator(".card").count() == 6
    page.check("input[name=blind]")
    page.click("main button:has-text('Compare')")
    assert "nats" not in page.inner_text("main")
    page.click("button:has-text('Label this pair') >> nth=0")
    page.wait_for_selector("text=Queued")
    assert Store(studio.store).overview().items == 1


def test_a_prompt_is_answered_by_both_models_as_they_write(page, studio, trained):
    page.goto(studio.url + "/try")
    page.select_option("select[name=run]", label="first")
    page.fill("#prompt", "once")
    page.click("button:has-text('Answer')")
    until(page, "document.querySelector('#after').getAttribute('aria-busy') === 'false'")
    assert page.inner_text("#after [data-value]") != "–"
    expected = tether.generate(
        trained / "first" / "final", [[{"role": "user", "content": "once"}]], max_new_tokens=10, temperature=0.7,
        stop_token_ids=list(range(2, 40)),
    )  # fmt: skip
    shown = page.evaluate("document.querySelector('#after [data-text]').textContent")
    assert shown == visible(expected[0].completion)


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_is_wider_than_the_screen_and_everything_has_a_name(browser, studio, width, scheme):
    queue(studio.store, 1)
    for page in opened(browser, studio, color_scheme=scheme):
        page.set_viewport_size({"width": width, "height": 800})
        page.goto(studio.url + "/runs")
        run = page.get_attribute("tbody a", "href")
        for path in (
            "/runs",
            run,
            run + "/rollouts/4",
            run + "/rollouts/4/0",
            "/compare",
            "/label",
            "/agreement",
            "/try",
        ):
            page.goto(studio.url + path)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, path
            nameless = """[...document.querySelectorAll('input:not([type=hidden]), select, textarea, button, a')]
                .filter(e => !e.hidden && !(e.labels && e.labels.length) && !e.innerText.trim() && !e.ariaLabel)
                .length"""
            assert page.evaluate(nameless) == 0, path


def test_kill_minus_nine_in_the_middle_of_labeling_loses_nothing_that_was_acknowledged(trained, tmp_path):
    store = queue(tmp_path / "p.db", 200)
    command = [
        sys.executable,
        "-m",
        "tether.cli",
        "studio",
        str(trained),
        "--store",
        str(tmp_path / "p.db"),
        "--port",
        "0",
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    link = re.search(r"http\S+", server.stdout.readline())[0]  # the owner's
    acknowledged = []
    try:
        with httpx.Client(follow_redirects=True, timeout=30) as client:
            client.get(link)
            base = link.split("/sign-in")[0]
            while True:
                if len(acknowledged) == 20:  # somewhere in the next ones
                    threading.Timer(0.1, lambda: os.kill(server.pid, signal.SIGKILL)).start()
                page = client.get(base + "/label").text
                data = dict(re.findall(r'name="(item|key|form_token)" value="([^"]*)"', page))
                answer = client.post(base + "/label", data=data | {"choice": "left:1"}, follow_redirects=False)
                assert answer.status_code == 303
                acknowledged.append(int(data["item"]))
    except (httpx.HTTPError, KeyError):
        pass
    finally:
        server.kill()
    kept = {label.item for label in store.labels()}
    assert len(acknowledged) >= 20
    assert set(acknowledged) <= kept
    assert len(kept) <= len(acknowledged) + 1  # the one in flight


def test_a_copy_of_a_run_elsewhere_still_opens(trained, tmp_path):
    shutil.copytree(trained / "first", tmp_path / "moved" / "deep" / "run")
    for served in serve(tmp_path / "moved", tmp_path / "p.db"):
        assert "deep/run" in served.client().get("/runs").text
