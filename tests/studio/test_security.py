"""Who is let in: everything on the attack list is refused by the real server, and changes nothing."""

import contextlib
import http.client
import json
import socket
import sqlite3

import httpx
import pytest

from served import form_token, serve
from tether.errors import ConfigError
from tether.feedback.records import Answer, Item
from tether.feedback.store import Store
from tether.studio.security import Gate, cookie_name
from tether.studio.serve import main, read_users


def name_of_cookie(studio) -> str:
    return cookie_name(studio.url.removeprefix("http://"))


PAGES = [
    "/runs",
    "/compare",
    "/label",
    "/agreement",
    "/try",
    "/revisions",
    "/runs/differences",
    "/agreement/preferences.jsonl",
]


@pytest.mark.parametrize("path", PAGES)
def test_without_a_session_no_page_is_shown(studio, path):
    assert httpx.get(studio.url + path).status_code == 401


def test_a_link_signs_in_once(studio):
    link = studio.link()
    first = httpx.get(link)
    assert first.status_code == 200
    cookie = first.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert httpx.get(link).status_code == 401


def test_a_session_that_was_made_up_or_changed_is_none():
    gate = Gate({"localhost"})
    cookie = gate.redeem(gate.link("Ada"))
    assert gate.person(cookie) == "Ada"
    name, _, mac = cookie.partition(".")
    forgeries = ["", ".", mac, f"{b'Ben'.hex()}.{mac}", f"{name}.{'0' * 64}", f"{name}x.{mac}", "zz.é", cookie + "0"]
    for forged in forgeries:
        assert gate.person(forged) is None


@pytest.mark.parametrize("cookie", [b"ff.x", b'"416461.\\351"', b"\xff\xfe", b"."])
def test_a_strange_cookie_is_an_unknown_visitor(studio, cookie):
    answer = httpx.get(studio.url + "/runs", headers={"cookie": f"{name_of_cookie(studio)}=".encode() + cookie})
    assert answer.status_code == 401
    assert "content-security-policy" in answer.headers


def test_the_cookies_of_other_programs_on_this_machine_are_passed_over(studio):
    name = name_of_cookie(studio)
    session = studio.client().cookies[name]
    assert httpx.get(studio.url + "/runs", headers={"cookie": f'prefs={{"a":1}}; {name}={session}'}).status_code == 200


def test_two_studios_on_one_host_do_not_sign_each_other_out(studio, trained, tmp_path):
    # a browser keeps cookies by host, whatever the port: the second must not take the first one's place
    for second in serve(trained, tmp_path / "second.db"):
        with httpx.Client() as browser:
            assert browser.get(studio.link()).status_code == 200
            assert browser.get(second.link()).status_code == 200
            assert browser.get(studio.url + "/runs").status_code == 200
            assert browser.get(second.url + "/runs").status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "[::1]:", "lab.local:80;x=1", "lab.local:\r\n", "lab.local:²"])
def test_a_cookies_name_holds_nothing_of_the_host_but_a_port(host):
    assert cookie_name(host) == "tether_session"
    assert cookie_name("[::1]:8765") == "tether_session_8765"


def test_another_studios_session_is_none():
    gate = Gate({"localhost"})
    assert Gate({"localhost"}).person(gate.redeem(gate.link("Ada"))) is None


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "127.0.0.1.evil.example"])
def test_a_host_that_we_do_not_serve_is_refused(studio, host):
    client = studio.client()
    connection = http.client.HTTPConnection(studio.url.removeprefix("http://"))
    connection.putrequest("GET", "/runs", skip_host=True)
    connection.putheader("Host", host)
    connection.putheader("Cookie", "; ".join(f"{name}={value}" for name, value in client.cookies.items()))
    connection.endheaders()
    assert connection.getresponse().status == 421


@pytest.mark.parametrize("origin", ["https://evil.example", "http://localhost.evil.example", "null"])
def test_a_write_from_a_foreign_page_is_refused(studio, origin):
    client = studio.client()
    data = {"form_token": form_token(client), "key": "k"}
    answer = client.post("/label/undo", data=data, headers={"origin": origin})
    assert answer.status_code == 403
    assert not studio.store.exists()


@pytest.mark.parametrize("token", [None, "", "0" * 64])
def test_a_write_without_the_form_token_is_refused(studio, token):
    data = {"key": "k"} | ({} if token is None else {"form_token": token})
    assert studio.client().post("/label/undo", data=data).status_code == 403


def test_another_persons_form_token_is_refused(studio):
    ada, ben = studio.client("Ada"), studio.client("Ben")
    assert ada.post("/label/undo", data={"key": "k", "form_token": form_token(ben)}).status_code == 403


def test_who_labels_is_the_session_whatever_the_form_says(studio):
    store = Store(studio.store)
    (item,) = store.add_items([Item("q", (Answer("x"), Answer("y")))], overlap=0).ids
    client = studio.client("Ada")
    client.get("/label")
    data = {"form_token": form_token(client), "item": str(item), "key": "k", "choice": "left:2"}
    client.post("/label", data=data | {"annotator": "Ben", "person": "Ben"})
    assert [label.annotator for label in store.labels()] == ["Ada"]


def test_a_body_that_is_too_large_is_refused_whatever_it_claims(studio):
    client = studio.client()
    token = form_token(client)
    large = f"form_token={token}&key=".encode() + b"x" * 1_100_000
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post("/label/undo", content=large, headers=headers).status_code == 413

    def pieces():
        for i in range(0, len(large), 65536):
            yield large[i : i + 65536]

    assert client.post("/label/undo", content=pieces(), headers=headers).status_code == 413
    assert client.post("/label/undo", content=b"a=1&" * 2000, headers=headers).status_code == 413


@pytest.mark.parametrize(
    "path",
    [
        "/runs/../../etc/passwd", "/runs/..%2f..%2fetc", "/static/..%2fapp.py", "/static/../app.py", "/runs/%00",
        "/runs/first", "/runs/000000000000", "/compare?a=../first:evaluations:0&b=x:y:1",
        "/try/stream?run=../first&prompt=x",
    ],
)  # fmt: skip
def test_no_path_comes_from_the_browser(studio, path):
    connection = http.client.HTTPConnection(studio.url.removeprefix("http://"))
    client = studio.client()
    connection.request(
        "GET", path, headers={"Cookie": "; ".join(f"{name}={value}" for name, value in client.cookies.items())}
    )
    answer = connection.getresponse()
    assert answer.status == 404
    assert b"root:" not in answer.read()


@pytest.mark.parametrize("path", ["/runs", "/nothing", "/sign-in"])
def test_every_answer_forbids_inline_scripts_foreign_sources_and_frames(studio, path):
    headers = studio.client().get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "script-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"


def test_garbage_on_the_wire_does_not_bring_the_server_down(studio):
    host, port = studio.url.removeprefix("http://").split(":")
    for garbage in (
        b"\x00\xff" * 100,
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /label HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ):
        with socket.create_connection((host, int(port))) as wire:
            wire.sendall(garbage)
            wire.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                wire.recv(100)
    assert studio.client().get("/runs").status_code == 200


def test_whoever_is_no_owner_labels_and_sees_nothing_else(studio):
    client = studio.client("Eve")
    assert client.get("/").url.path == "/label"
    for path in (*PAGES, "/agreement/events.jsonl"):
        assert client.get(path).status_code == (200 if path == "/label" else 403), path
    data = {"form_token": form_token(client), "a": "x", "b": "y"}
    assert client.post("/queue", data=data).status_code == 403
    assert "Agreement" not in client.get("/label").text


def test_a_locked_store_says_so_and_saves_nothing(trained, tmp_path):
    store = Store(tmp_path / "p.db")
    (item,) = store.add_items([Item("q", (Answer("x"), Answer("y")))], overlap=0).ids
    for studio in serve(trained, tmp_path / "p.db", busy_s=0.1):
        client = studio.client()
        client.get("/label")
        token = form_token(client)
        with contextlib.closing(sqlite3.connect(tmp_path / "p.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            answer = client.post(
                "/label", data={"form_token": token, "item": str(item), "key": "k", "choice": "left:1"}
            )
        assert answer.status_code == 503
        assert "locked" in answer.text
        assert list(store.labels()) == []


def test_users_sign_in_with_their_own_token_as_often_as_they_like(trained, tmp_path):
    for studio in serve(trained, tmp_path / "p.db", users={"t" * 24: "Ada"}):
        for _ in range(2):
            assert httpx.post(f"{studio.url}/sign-in", data={"token": "t" * 24}).status_code == 200
        assert httpx.post(f"{studio.url}/sign-in", data={"token": "s" * 24}).status_code == 401


def test_other_machines_are_let_in_only_with_users(tmp_path):
    with pytest.raises(ConfigError, match="--users"):
        main(tmp_path, store=tmp_path / "p.db", host="0.0.0.0")


@pytest.mark.parametrize("port", [-1, 65536, 99999])
def test_a_port_that_is_none_is_said(tmp_path, port):
    with pytest.raises(ConfigError, match="is not a port"):
        main(tmp_path, store=tmp_path / "p.db", port=port)


@pytest.mark.parametrize("content", ["[]", "{", '{"Ada": "short"}', json.dumps({"Ada": "t" * 24, "Ben": "t" * 24})])
def test_a_users_file_that_protects_nothing_is_refused(tmp_path, content):
    file = tmp_path / "users.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"users\.json"):
        read_users(file)
