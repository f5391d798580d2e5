"""Does the studio stay quick and lose nothing? Label writes by 20 clients at once, and pages over a great deal of data.

python bench/studio.py --run RUN [--labels 1000000] [--runs 1000] [--cycles 100000]

writes  20 clients label 4,000 items through the real HTTP pages: labels a minute, how many were lost or doubled
pages   milliseconds of each page (median of 9) with a million labels, 1,000 runs, and a run of 100,000 cycles
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import httpx

from tether.feedback.records import Answer, Item
from tether.feedback.store import Store

CLIENTS, LABELS = 20, 4000


class Person:
    """A signed-in browser, as cheap as Python has one: it shares the machine with the server that is measured."""

    def __init__(self, link: str) -> None:
        host, _, path = link.removeprefix("http://").partition("/")
        self._connection = http.client.HTTPConnection(host, timeout=60)
        self._cookie = ""
        self._cookie = self._ask("GET", f"/{path}").headers["set-cookie"].partition(";")[0]

    def _ask(self, method: str, path: str, body: str | None = None) -> http.client.HTTPResponse:
        headers = {"cookie": self._cookie}
        if body is not None:
            headers["content-type"] = "application/x-www-form-urlencoded"
        self._connection.request(method, path, body, headers)
        answer = self._connection.getresponse()
        self.page = answer.read().decode()
        if answer.status == 303:
            return self._ask("GET", answer.headers["location"])
        assert answer.status == 200, self.page
        return answer

    def get(self, path: str) -> str:
        self._ask("GET", path)
        return self.page

    def post(self, path: str, data: dict[str, str]) -> str:
        """The page that follows."""
        self._ask("POST", path, urlencode(data))
        return self.page


@contextmanager
def served(root: Path, store: Path, people: list[str]) -> Iterator[list[str]]:
    """A studio in a process of its own; the links of its owner and of each person."""
    names = [word for person in people for word in ("--person", person)]
    command = [sys.executable, "-m", "tether.cli", "studio", str(root), "--store", str(store), "--port", "0", *names]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    try:
        yield [re.search(r"http\S+", server.stdout.readline())[0] for _ in [*people, "owner"]]  # type: ignore[index]
    finally:
        server.terminate()
        server.wait()


def fields(page: str) -> dict[str, str]:
    return dict(re.findall(r'name="(item|key|form_token)" value="([^"]*)"', page))


def writes(folder: Path) -> None:
    store = Store(folder / "writes.db", gold_fraction=0.0, repeat_fraction=0.0)
    store.add_items([Item(f"p{i}", (Answer(f"a{i}"), Answer(f"b{i}"))) for i in range(LABELS)], overlap=0.0)
    people = [f"person{i}" for i in range(CLIENTS)]
    acknowledged: list[int] = []

    def label(person: Person) -> None:
        page = person.get("/label")
        while "item" in (data := fields(page)):
            page = person.post("/label", data | {"choice": "left:2"})
            acknowledged.append(int(data["item"]))

    with served(folder, folder / "writes.db", people) as (_, *links):
        threads = [threading.Thread(target=label, args=(Person(link),)) for link in links]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - began
    kept = [found.item for found in store.labels()]
    lost, doubled = len(set(acknowledged) - set(kept)), len(kept) - len(set(kept))
    print(
        f"writes  {60 * len(acknowledged) / seconds:,.0f} labels a minute by {CLIENTS} clients, each with the page that"
    )
    print(f"        follows it; {lost} lost, {doubled} doubled of {len(acknowledged):,}", flush=True)


def pages(folder: Path, labels: int, runs: int, cycles: int, seed_run: Path) -> None:
    fill(folder / "pages.db", labels)
    root = folder / "runs"
    for i in range(runs):
        to = root / f"group{i // 100}" / f"run{i:04d}"
        to.mkdir(parents=True)
        for name in ("config.yaml", "status.json", "environment.json", "events.jsonl", "metrics.jsonl"):
            shutil.copy(seed_run / name, to / name)
    long = root / "long"
    shutil.copytree(seed_run, long)
    lines = (seed_run / "metrics.jsonl").read_text().splitlines()
    with (long / "metrics.jsonl").open("w") as file:
        for cycle in range(1, cycles + 1):
            file.write(json.dumps({**json.loads(lines[cycle % len(lines)]), "cycle": cycle}) + "\n")
    with (
        served(root, folder / "pages.db", []) as (link,),
        httpx.Client(base_url=link.split("/sign-in")[0], timeout=60) as client,
    ):
        client.get(link)
        listed = client.get("/runs", params={"find": "long"}).text
        run = re.search(r'href="(/runs/\w{12})"', listed)[1]  # type: ignore[index]
        paths = ["/runs", "/runs?page=9", run, f"{run}/curves", f"{run}/rollouts/4", f"{run}/rollouts/4/0"]
        for path in [*paths, "/label", "/agreement", "/compare"]:
            times = []
            for _ in range(9):
                began = time.perf_counter()
                assert client.get(path).status_code == 200
                times.append(1000 * (time.perf_counter() - began))
            name = path.replace(run, "/runs/long")
            print(f"pages   {statistics.median(times):6.0f} ms, first {times[0]:6.0f} ms  {name}", flush=True)


def fill(path: Path, labels: int) -> None:
    """Two people's labels of the same items, written straight into the file; a thousand items are left to label."""
    store = Store(path)
    count = labels // 2
    items = (Item(f"prompt {i}", (Answer(f"an answer {i}"), Answer(f"another {i}"))) for i in range(count + 1000))
    store.add_items(items, overlap=1.0)
    for person in ("Ben", "Eve"):
        store.add_annotator(person)
    store.close()
    with sqlite3.connect(path) as c:
        for person in (1, 2):
            c.execute(
                "INSERT INTO events (kind, annotator, item, key, at, choice, shown, seconds) "
                "SELECT 'label', :person, id, 'k' || id, '2026-01-01T00:00:00.000Z', "
                "CASE WHEN (id * 7919) % 5 < :person THEN 'a' ELSE 'b' END, '[0, 1]', 4.0 "
                "FROM items WHERE position < :count",
                {"person": person, "count": count},
            )
        c.execute("INSERT INTO standing SELECT id, item, annotator, 1 FROM events")
        c.execute("UPDATE items SET needs = 0 WHERE position < ?", (count,))
        c.execute("UPDATE annotators SET labels = ?", (count,))
        c.execute("UPDATE totals SET remaining = remaining - ?", (labels,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a finished run of tether ppo, to make copies of")
    parser.add_argument("--labels", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--cycles", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        writes(Path(folder))
        pages(Path(folder), args.labels, args.runs, args.cycles, args.run.resolve())


if __name__ == "__main__":
    main()
