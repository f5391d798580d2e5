"""A run of Q-learning in the studio: its curves, the answers it learned from, and V at each of their tokens."""

import json
import re

import pytest

import tether
from served import serve
from tether.config import LogConfig, ModelConfig, QLearningConfig, QLearningSection, ScoredConfig


@pytest.fixture(params=["bellman", "ilql"])
def loss(request):
    return request.param


@pytest.fixture
def studio(tiny_model, tmp_path, loss):
    rows = [{"prompt": "why?", "completion": f"{'x' * i}y", "score": i} for i in range(6)]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tether.qlearning(
        QLearningConfig(
            str(tmp_path / "runs" / "q"), ModelConfig(str(tiny_model())), ScoredConfig(str(tmp_path / "scored.jsonl")),
            log=LogConfig(tensorboard=False), qlearning=QLearningSection(loss=loss),
        )
    )  # fmt: skip
    yield from serve(tmp_path / "runs", tmp_path / "preferences.db")


def test_the_answers_that_it_learned_from_are_shown_token_by_token_with_their_values(studio, loss):
    client = studio.client()
    path = re.search(r'"(/runs/\w+)"', client.get("/").text.replace("/runs/differences", ""))[1]
    page = client.get(path).text
    assert "Responses of step 1" in page
    assert {"bellman": "Log-ratio on the data", "ilql": "Mean advantage of the data"}[loss] in page
    assert client.get(f"{path}/rollouts/1?sort=kl").status_code == 200  # ilql has none
    listing = client.get(f"{path}/rollouts/1?sort=order").text
    assert "6 of 6 responses" in listing
    assert "xxxxxy" in listing
    response = client.get(f"{path}/rollouts/1/5")
    assert response.status_code == 200
    assert "Value V" in response.text
    assert "r + γ·V′ − V" in response.text
    if loss == "bellman":
        assert "r = score − β·KL = 5.000 − 0.1·" in response.text
    else:
        assert "r = score = 5.000" in response.text
        assert "min Q̄ − V = 0.000 − 0.000 = 0.000" in response.text  # one step, and no sync yet
        assert "Value of the token Q" in response.text
        assert "KL to the reference" not in response.text
    report = tether.report(studio.root / "q").read_text()
    assert "Step 1, the best" in report
