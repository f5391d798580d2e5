"""A judge behind an endpoint: labels exact under bias and faults, budgets kept, and nothing paid twice."""

import json
import math
import threading
from pathlib import Path
from random import Random
from statistics import fmean

import pytest

from scripted_judge import ScriptedJudge, scripted_judge, sigmoid
from tether.config import JudgeSection, LimitsConfig
from tether.errors import ConfigError, ModelError, StoreError
from tether.feedback.client import most_tokens
from tether.feedback.endpoint import Endpoint
from tether.feedback.judge_cache import JudgeCache, cache_path
from tether.feedback.records import Verdict
from tether.feedback.verdict import Comparison, NoVerdict, json_verdict, letter_probability, text_verdict

BOTH = ((0, 1), (1, 0))


@pytest.fixture
def server():
    with scripted_judge() as judge:
        yield judge


def comparisons(count, orders=BOTH):
    """(pairs, T of each): worth a, b between -1 and 1, so that the judge's bias is larger than any difference."""
    random = Random(0)
    worth = [(round(random.uniform(-1, 1), 3), round(random.uniform(-1, 1), 3)) for _ in range(count)]
    made = [Comparison(i, f"Question {i}", (f"worth {a}", f"worth {b}"), "Choose what is worth more.", orders)
            for i, (a, b) in enumerate(worth)]  # fmt: skip
    return made, {i: sigmoid(a - b) for i, (a, b) in enumerate(worth)}


def ask(server: ScriptedJudge, path: Path, asked, *, answer="logprobs", votes=1, key_env=None, tell=None, **limits):
    """(verdicts by item, failures, whether a limit was reached, (requests, tokens) spent). tell: answer_tokens."""
    more = {"answer_tokens": tell} if tell else {}
    config = JudgeSection("m", base_url=server.url, answer=answer, votes=votes, key_env=key_env, **more)
    cache = JudgeCache(path / "cache.db")
    try:
        endpoint = Endpoint(config, LimitsConfig(**{"timeout_s": 5.0} | limits), cache)
        outcomes = [x for x in endpoint.compare(iter(asked)) if x is not None]
        verdicts = {x.item: x for x in outcomes if isinstance(x, Verdict)}
        return verdicts, [x for x in outcomes if isinstance(x, NoVerdict)], endpoint.spent, cache.spent()
    finally:
        cache.close()


def test_soft_labels_are_exact_under_a_position_bias_of_two_logits(server, tmp_path):
    asked, truth = comparisons(30)
    verdicts, failed, _, spent = ask(server, tmp_path, asked)
    assert failed == []
    assert {i: v.probability for i, v in verdicts.items()} == pytest.approx(truth, abs=1e-6)
    assert spent == (60, 6000)
    ask(server, tmp_path, asked)
    assert len(server.asked) == 60  # a rerun asks nothing


def test_what_is_cached_is_read_without_a_thread_and_the_rest_is_asked(server, tmp_path):
    asked, truth = comparisons(12)
    ask(server, tmp_path, asked[::2])
    threads = []

    def watched(questions):
        for question in questions:
            threads.append([t.name for t in threading.enumerate() if t.name.startswith("asking")])
            yield question

    verdicts, *_ = ask(server, tmp_path, watched(asked[::2]))
    assert threads == [[]] * 6
    assert len(server.asked) == 12
    assert len(verdicts) == 6
    verdicts, failed, _, spent = ask(server, tmp_path, asked)
    assert {i: v.probability for i, v in verdicts.items()} == pytest.approx(truth, abs=1e-6)
    assert (failed, spent[0], len(server.asked)) == ([], 24, 24)


def test_a_cached_answer_that_could_not_be_read_is_followed_by_the_next_form_as_before(server, tmp_path):
    server.mass = 0.1  # log-probs, but of neither letter
    asked, _ = comparisons(2)  # fewer than make a form be given up
    before, *_ = ask(server, tmp_path, asked, answer="auto")
    requests = len(server.asked)
    after, failed, *_ = ask(server, tmp_path, asked, answer="auto")
    assert (after, failed, len(server.asked)) == (before, [], requests)
    assert {answer["form"] for verdict in after.values() for answer in verdict.answers} == {"json"}


def test_one_order_keeps_the_bias(server, tmp_path):
    asked, _ = comparisons(1, orders=((1, 0),))
    verdicts, *_ = ask(server, tmp_path, asked)
    a, b = (float(text.removeprefix("worth ")) for text in asked[0].answers)
    assert verdicts[0].probability == pytest.approx(1 - sigmoid(b - a + 2), abs=1e-6)


@pytest.mark.parametrize("form", ["json", "text"])
def test_votes_are_counted_in_both_orders(server, tmp_path, form):
    server.forms = (form,)
    asked, _ = comparisons(3)
    verdicts, failed, *_ = ask(server, tmp_path, asked, answer=form, votes=6)
    assert (len(verdicts), failed, len(server.asked)) == (3, [], 36)
    for verdict in verdicts.values():
        (ab, ba) = (answer["wins"] for answer in verdict.answers)
        assert {answer["votes"] for answer in verdict.answers} == {6}
        odds = (ab + 0.5) / (6.5 - ab) * (6.5 - ba) / (ba + 0.5)  # k + ½ to n - k + ½, in either order
        assert verdict.probability == pytest.approx(math.sqrt(odds) / (1 + math.sqrt(odds)))


@pytest.mark.slow
def test_sixty_four_votes_in_both_orders_are_within_two_points_of_a_judge_with_a_bias_of_two_logits(server, tmp_path):
    server.forms = ("text",)
    asked, truth = comparisons(24)
    verdicts, failed, *_ = ask(server, tmp_path, asked, answer="text", votes=64, concurrency=1)
    assert (len(verdicts), failed, len(server.asked)) == (24, [], 24 * 128)
    # On average, and towards the better answer: the noise of 128 votes moves a single label by .07.
    beyond = [(verdicts[i].probability - truth[i]) * math.copysign(1, truth[i] - 0.5) for i in truth]
    assert fmean(beyond) == pytest.approx(0, abs=0.02)
    assert max(map(abs, beyond)) < 4 * 0.07


@pytest.mark.parametrize(
    ("forms", "found"), [(("logprobs", "json", "text"), "logprobs"), (("json", "text"), "json"), (("text",), "text")]
)
def test_the_first_form_that_the_endpoint_can_give_is_found_and_remembered(server, tmp_path, forms, found):
    server.forms = forms
    asked, _ = comparisons(6)
    verdicts, failed, *_ = ask(server, tmp_path, asked, answer="auto", concurrency=1)
    assert (len(verdicts), failed) == (6, [])
    assert {answer["form"] for v in verdicts.values() for answer in v.answers} == {found}
    tried = 3 - len(forms)  # requests that found out what it cannot do
    assert len(server.asked) == 12 + tried
    more, _ = comparisons(8)
    ask(server, tmp_path, more, answer="auto")
    assert len(server.asked) == 16 + tried


def faulty(n):
    """One request in five fails, each in another way."""
    return [429, 500, "half", "refuse", "hang"][n // 5 % 5] if n % 5 == 3 else None


def test_faults_give_no_wrong_label_and_never_pass_the_budget(server, tmp_path):
    server.fault = faulty
    asked, truth = comparisons(25)
    verdicts: dict[int, Verdict] = {}
    for budget in (20, 41, 500):
        found, failed, limited, (requests, _) = ask(
            server, tmp_path, asked, requests=budget, timeout_s=0.5, retries=5, concurrency=4
        )
        assert len(server.asked) <= budget
        assert requests == len(server.asked)
        assert limited == (budget < 500)
        verdicts |= found
    assert {f.reason for f in failed} <= {"neither letter likely"}
    assert {i: v.probability for i, v in verdicts.items()} == pytest.approx({i: truth[i] for i in verdicts}, abs=1e-6)
    assert len(verdicts) + len(failed) == 25
    assert max(server.answered.values()) == 1  # a hanging answer came too late, and is counted as none


@pytest.mark.parametrize("fault", [408, 429, 500, "half", "hang"])
def test_what_may_pass_is_asked_again(server, tmp_path, fault):
    server.fault = lambda n: fault if n == 0 else None
    verdicts, failed, _, (requests, _) = ask(server, tmp_path, comparisons(1)[0], timeout_s=0.5)
    assert (len(verdicts), failed, requests) == (1, [], 3)


def test_tokens_are_reserved_before_a_request_and_settled_after_it(server, tmp_path):
    asked, _ = comparisons(20)
    most = max(most_tokens({"messages": c.question(o, "logprobs"), "max_tokens": 1}) for c in asked for o in BOTH)
    verdicts, _, limited, (requests, tokens) = ask(server, tmp_path, asked, tokens=most + 900)
    assert limited
    assert requests >= 9  # not stopped by what others had only reserved
    assert tokens == 100 * requests <= most + 900
    assert len(verdicts) == requests // 2 or len(verdicts) < 20


def test_the_longest_answer_is_the_configs_and_is_reserved(server, tmp_path):
    asked, _ = comparisons(1)
    question = sum(len(m["content"]) for m in asked[0].question((0, 1), "text"))
    with pytest.raises(ConfigError, match=f"is below the {question + 256 + 4000} tokens that one request can take"):
        ask(server, tmp_path, asked, answer="text", tell=4000, tokens=question + 256 + 3999)
    assert server.asked == []
    ask(server, tmp_path, asked, answer="text", tell=4000, tokens=2 * (question + 256 + 4000))
    ask(server, tmp_path, asked, answer="text")
    assert [body["max_tokens"] for body in server.asked] == [4000, 4000, 512, 512]


def test_eight_requests_in_flight_keep_eight_in_flight(server, tmp_path):
    server.delay_s = 0.3  # longer than eight requests take to be made
    ask(server, tmp_path, comparisons(16)[0], concurrency=8)
    assert server.most == 8


def test_a_cut_answer_is_neither_read_nor_kept(server, tmp_path):
    server.forms, server.fault = ("text",), lambda n: "cut" if n == 0 else None
    verdicts, failed, *_ = ask(server, tmp_path, comparisons(1)[0], answer="text")
    assert (verdicts, failed[0].reason) == ({}, "refused, filtered or cut")
    verdicts, *_ = ask(server, tmp_path, comparisons(1)[0], answer="text")
    assert len(verdicts) == 1
    assert len(server.asked) == 3  # both orders, of which the first was cut before


# ---------------------------------------------------------------- what goes wrong


def test_no_endpoint_there_is_told_in_one_line(tmp_path):
    with scripted_judge() as gone:
        pass
    with pytest.raises(ModelError, match=r"does not answer as an endpoint for m \(.*refused.*tried 2 times") as error:
        ask(gone, tmp_path, comparisons(3)[0], retries=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fault": lambda n: 404}, "HTTP 404 Not Found.*Check the address, which mostly ends in /v1, and judge.model"),
        ({"fault": lambda n: "html"}, "no chat completion .*tried 2 times.*mostly ends in /v1"),
        ({"key": "sk-secret"}, "HTTP 401 Unauthorized.*judge.key_env"),
        ({"forms": ()}, "HTTP 400 Bad Request.*judge.answer"),
    ],
)
def test_what_is_no_such_endpoint_ends_the_judge(server, tmp_path, change, said):
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(ModelError, match=said):
        ask(server, tmp_path, comparisons(5)[0], answer="auto", retries=1)


def test_an_endpoint_that_is_gone_for_good_ends_the_judge(server, tmp_path):
    server.fault = lambda n: 503 if n >= 20 else None
    with pytest.raises(ModelError, match="HTTP 503 Service Unavailable"):
        ask(server, tmp_path, comparisons(100)[0], retries=0)
    assert 20 + 20 <= len(server.asked) <= 20 + 20 + 2 * 8


def test_a_question_that_is_too_long_does_not_cost_the_others_their_form(server, tmp_path):
    server.fault = lambda n: 400 if n in (0, 1, 2, 7) else None  # the first pair in every form, and a later one
    verdicts, failed, *_ = ask(server, tmp_path, comparisons(6)[0], answer="auto", concurrency=1)
    assert [f.reason for f in failed] == ["the endpoint refused the question"] * 2
    assert {a["form"] for v in verdicts.values() for a in v.answers} == {"logprobs"}


def test_the_key_is_sent_and_stands_nowhere(server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-of-somebody-else")
    server.key = "sk-very-secret"
    verdicts, *_ = ask(server, tmp_path, comparisons(2)[0], key_env="JUDGE_KEY")
    assert len(verdicts) == 2
    server.key = "sk-another"
    with pytest.raises(ModelError, match="Check the key in JUDGE_KEY") as error:
        ask(server, tmp_path, comparisons(4)[0], key_env="JUDGE_KEY")
    ask(server, tmp_path, comparisons(2)[0])  # all cached; without key_env
    assert "secret" not in str(error.value)
    assert not any(b"secret" in file.read_bytes() for file in tmp_path.iterdir())
    assert not any("somebody" in json.dumps(headers) for headers in server.headers)


def test_a_key_that_is_not_in_the_environment_is_named(server, tmp_path):
    with pytest.raises(ConfigError, match=r"judge\.key_env=NO_SUCH_KEY: there is no such variable"):
        ask(server, tmp_path, comparisons(1)[0], key_env="NO_SUCH_KEY")


@pytest.mark.parametrize("key", ["sk-very\nsecret", "sk-very-secrét", "sk-very secret"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(server, tmp_path, monkeypatch, key):
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(ConfigError, match=r"judge\.key_env=JUDGE_KEY: .* characters that no key has") as error:
        ask(server, tmp_path, comparisons(1)[0], key_env="JUDGE_KEY", retries=0)
    assert "very" not in str(error.value)
    assert not server.asked


def test_no_two_stores_share_a_file_of_answers():
    paths = [cache_path(store, "judge:x") for store in ("d/a.db", "d/a.sqlite", "d/a", "d/a.sqlite.db", "d/b.db")]
    assert paths[0] == Path("d/a.judge-x.db")
    assert len(set(paths)) == 5


def test_two_judges_of_one_name_do_not_pay_for_the_same(tmp_path):
    first = JudgeCache(tmp_path / "c.db")
    with pytest.raises(StoreError, match="in use by another tether judge"):
        JudgeCache(tmp_path / "c.db")
    first.close()
    JudgeCache(tmp_path / "c.db").close()


# ---------------------------------------------------------------- reading


def test_letters_are_summed_over_their_variants_and_need_half_of_the_mass():
    logs = {"A": 0.3, " A": 0.15, "B": 0.1, "\nB": 0.05, "The": 0.4}
    assert letter_probability({token: math.log(p) for token, p in logs.items()}) == pytest.approx(0.45 / 0.6)
    assert letter_probability({"A": math.log(0.3), "B": math.log(0.19), "I": math.log(0.5)}) is None
    assert letter_probability({}) is None


@pytest.mark.parametrize("logprob", [math.inf, 1e6, math.nan])
def test_log_probs_that_are_none_are_no_verdict(logprob):
    assert letter_probability({"A": logprob, "B": -1.0}) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("So.\nVERDICT: A", "A"), ("VERDICT: A, no.\nVERDICT: B", "B"), ("**Verdict:** answer b.", "B"),
        ("**VERDICT**: **A**", "A"), ("VERDICT: A or B", None), ("VERDICT: neither", None), ("A", None), ("", None),
        ("VERDICT: A or VERDICT: B", None),
    ],
)  # fmt: skip
def test_the_last_verdict_of_a_text_is_read_or_none(text, letter):
    assert text_verdict(text) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ('{"reasoning": "x", "verdict": "B"}', "B"), ('```json\n{"verdict": "A"}\n```', "A"),
        ('{"verdict": "C"}', None), ('{"reasoning": "x", "verd', None), ('["A"]', None),
        ('{"verdict": null}', None), ("A", None),
    ],
)  # fmt: skip
def test_a_json_verdict_is_read_or_none(text, letter):
    assert json_verdict(text) == letter
