"""Runs that were trained for real, a studio over them, and a browser."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import tether
from served import Served, opened, serve
from tiny_ppo import id_score, tiny_config

CHROMIUM = "/usr/bin/chromium"


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_model) -> Path:
    """A folder with a finished run of PPO, `runs/first`, and one of another seed, `runs/second`."""
    root = tmp_path_factory.mktemp("studio") / "runs"
    root.mkdir()
    for name, seed in (("first", 0), ("second", 1)):
        config = tiny_config(root / name, tiny_model(seed=3), optim={"lr": 1e-3 * (seed + 1)})
        tether.ppo(replace(config, seed=seed), reward=id_score)
    return root


@pytest.fixture
def studio(trained, tmp_path) -> Iterator[Served]:
    yield from serve(trained, tmp_path / "preferences.db")


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"needs Debian's chromium at {CHROMIUM}")
    with playwright.sync_playwright() as started:
        flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync"]  # fmt: skip
        found = started.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield found
        found.close()


@pytest.fixture
def page(browser, studio):
    """A page of the browser, signed in; every request that leaves the studio is refused and noted."""
    yield from opened(browser, studio, java_script_enabled=True)


@pytest.fixture
def plain_page(browser, studio):
    """The same without scripts."""
    yield from opened(browser, studio, java_script_enabled=False)
