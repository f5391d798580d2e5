"""What the pages promise is there: every file that they link to, every command of the benchmarks."""

import re
from pathlib import Path

import pytest
import yaml

from tether.config import check
from tether.config.reading import load_config
from tether.rewards import FunctionReward, load_function

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "bench" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_to_a_file_leads_to_one(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_every_benchmark_that_says_how_it_is_run_has_a_row_with_its_command():
    scripts = {p.name for p in (ROOT / "bench").glob("*.py") if f"bench/{p.name}" in p.read_text()}
    rows = re.findall(r"^\|.*`python bench/(\w+\.py)", (ROOT / "bench" / "README.md").read_text(), re.M)
    assert sorted(rows) == sorted(scripts)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_page_has_a_placeholder_left_where_a_figure_belongs(page):
    assert re.findall(r"@[A-Z]+@", page.read_text()) == []


RECIPES = re.findall(r"(?:^    \w+: .*\n)+", (ROOT / "docs" / "recipes.md").read_text(), re.M)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_accepted(recipe, tmp_path):
    """A block of keys of `tether ppo`; what it leaves out is filled in."""
    rest = {"run": "r", "model": {"policy": "m"}, "prompts": {"path": "p"}, "reward": [{"function": "a.py:f"}]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(rest | yaml.safe_load(recipe)))
    config = load_config(tmp_path / "c.yaml")
    check(config)
    for source in config.reward:
        if source.function.startswith("tether."):
            FunctionReward(load_function(source.function), name="", tokenizer=None, stop_ids=(), fixed=source.arguments)
