"""The chains of `tether revise` as the studio shows them: in order, what changed marked, and text that cannot act."""

import html
import json
import re

import httpx
import pytest

from served import opened, serve
from tether.feedback.chain_file import ChainFile, read, starts

MADE_BY = {"model": "some/writer", "rounds": 2}
HOSTILE = ["</p><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "abc\u202egpj", "\x1b[2J", "{{ 7 * 7 }}"]


def row(number, *texts, prompt="Can I read my neighbor's letters?", given=False):
    kinds = ["answer", *["critique", "revision"] * 4]
    steps = [
        {"step": kind, "principle": f"Principle {(i + 1) // 2}." if i else None, "text": text}
        for i, (kind, text) in enumerate(zip(kinds, texts, strict=False))
    ]
    return {"id": f"chain-{number:016x}", "prompt": prompt, "completion": texts[-1], "revised": texts[0] != texts[-1],
            "given": given, "chain": steps, "made_by": MADE_BY}  # fmt: skip


def write(path, *rows):
    with ChainFile(path, MADE_BY) as file:
        file.add(rows)
    return path


@pytest.fixture
def served(tmp_path):
    root = tmp_path / "runs"
    texts = (
        "Yes, steam them open.", "It helps to break the law.", "No, letters are private.",
        "It gives no help.", "No, letters are private. Ask your neighbor.",
    )  # fmt: skip
    long = "A sentence with a-very-long-word-" + "x" * 300 + " in it. " + "More of it. " * 80
    chat = [{"role": "user", "content": HOSTILE[0]}]
    rows = [
        row(0, *texts),
        row(1, "As it was.", "Nothing.", "As it was.", given=True),
        row(2, *HOSTILE[:3], prompt=HOSTILE[3]),
        row(3, *HOSTILE[2:], prompt=chat),
        row(4, long, long, long.replace("More", "Less")),
        *(row(5 + i, "a", "b", f"c{i}") for i in range(20)),
    ]
    write(root / "deeper" / "revised.jsonl", *rows)
    (root / "notes.jsonl").write_text('{"prompt": "no chain"}\n')
    yield from serve(root, tmp_path / "preferences.db")


def chains(client, page=1):
    (its_id,) = re.findall(r'href="/revisions/(\w+)"', client.get("/revisions").text)
    return client.get(f"/revisions/{its_id}", params={"page": page}).text


def test_every_file_of_chains_is_listed_and_no_other(served):
    text = served.client().get("/revisions").text
    assert re.findall(r'">([^<]+\.jsonl)</a></td><td class="n">(\d+)<', text) == [("deeper/revised.jsonl", "25")]


def test_a_chain_is_shown_in_order_with_what_changed_marked(served):
    text = chains(served.client())
    first = text[text.index("<article") :].partition("</article>")[0]
    plain = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", first)).split())
    order = ["Can I read my neighbor's letters?", "First answer", "Critique 1", "Principle 1.", "It helps to break",
             "Revision 1", "Critique 2", "Principle 2.", "It gives no help.", "Revision 2", "learned"]  # fmt: skip
    places = [plain.index(part) for part in order]
    assert places == sorted(places)
    marked = [re.sub(r"</mark>(\s?)<mark>", r"\1", text) for text in re.findall(r'<p class="text".*?</p>', first)]
    assert "<mark>Yes, steam them open.</mark>" in marked[0].replace("</mark> <mark>", " ")
    assert "No, letters are private.<mark> Ask your neighbor.</mark>" in marked[4]
    second = text.split("<article")[2]
    assert "Answer of the data" in second
    assert "unchanged" in second
    assert "learned" not in second.partition("unchanged")[2]


def test_what_a_model_wrote_cannot_act(served):
    text = chains(served.client())
    for hostile in ("<script>alert", "<img src=x", "\u202e", "\x1b", ">49<"):
        assert hostile not in text
    assert "⟨U+202E⟩" in text
    assert "␛[2J" in text
    assert "{{ 7 * 7 }}" in text


def test_rows_are_shown_page_by_page_and_a_file_that_grows_is_read_again(served):
    client = served.client()
    assert chains(client).count("<article") == 10
    last = chains(client, page=99)
    assert "page 3 of 3" in last
    assert last.count("<article") == 5
    path = served.root / "deeper" / "revised.jsonl"
    with path.open("ab") as file:
        file.write(json.dumps(row(25, "new", "c", "newer")).encode() + b'\n{"id": "chain-half')
    assert chains(client, page=3).count("<article") == 6
    with path.open("ab") as file:
        file.write(b'"}\n')
    assert "Row 27 is damaged" in chains(client, page=3)


def test_no_path_comes_from_a_browser(served):
    client = served.client()
    for path in ("/revisions/none", "/revisions/..%2f..%2fetc%2fpasswd"):
        answer = client.get(path)
        assert answer.status_code == 404
    assert httpx.get(served.url + "/revisions").status_code == 401


def test_rows_are_read_from_where_they_begin(tmp_path):
    path = write(tmp_path / "r.jsonl", *(row(i, "a", "b", f"zä{i}") for i in range(5)))
    places = starts(path)
    assert len(places) == 6
    assert [r["completion"] for r in read(path, places[2:5])] == ["zä2", "zä3"]


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_chains_is_no_wider_than_the_screen(browser, served, width, scheme):
    for page in opened(browser, served, color_scheme=scheme):
        page.set_viewport_size({"width": width, "height": 800})
        page.goto(served.url + "/revisions")
        page.click("a:text-is('deeper/revised.jsonl')")
        page.wait_for_selector("article")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.querySelectorAll('article').length") == 10
        left, right = (page.locator("article >> nth=0 >> .sides .card").nth(i).bounding_box() for i in (0, 1))
        assert (right["y"] == left["y"]) == (width == 1280)  # side by side where there is room, else below each other
