"""Who may talk to the studio, and what their browser may do with its answers.

One middleware stands before every page:

    Host      must be one that we serve: else a foreign name that resolves to us could read our pages (DNS rebinding)
    session   a link printed by `tether studio` carries a token that works once and becomes a cookie (HttpOnly,
              SameSite=Strict) naming a person; all but the sign-in needs it
    part      whoever is no owner may label, and see nothing else: what others said would sway them
    writes    must come from our own pages (Origin) and carry the form token that those pages hold (CSRF)
    bodies    end at 1 MB, however long they claim to be
    answers   carry a content security policy: no inline script, nothing from another host, no frame around us
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

FORM_TOKEN = "form_token"
MOST_FIELDS = 1000  # of a form: a ranking of as many answers is more than anybody reads
MOST_BYTES = 1_000_000  # of a request's body: a label with a long note is a thousandth of it

_OF_ALL = ("/label", "/static/")  # paths that every person may ask for

POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)  # plotly writes style attributes; no script may be inline
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


def cookie_name(host: str) -> str:
    """The session cookie's name under a Host header. Browsers keep cookies by host alone: without the port, two studios
    on one machine would overwrite each other's."""
    port = re.search(r":([0-9]{1,5})\Z", host)
    return f"tether_session_{port[1]}" if port else "tether_session"


@dataclass
class Gate:
    """Tokens in, sessions out.

    hosts   names that a browser may call us by, without port.
    owners  people who may see every page; all others only label.
    once    one-time token -> person: of links printed at the start.
    users   token -> person, always valid: of a users file.
    """

    hosts: set[str]
    owners: set[str] = field(default_factory=set)
    once: dict[str, str] = field(default_factory=dict)
    users: dict[str, str] = field(default_factory=dict)
    _secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    def link(self, person: str) -> str:
        """A new one-time token for `person`."""
        token = secrets.token_urlsafe(24)
        self.once[token] = person
        return token

    def redeem(self, token: str) -> str | None:
        """The session cookie of a token's person; None if the token is not one. A one-time token is used up."""
        given = token.encode("utf-8", "surrogateescape")
        for known in list(self.once):
            if hmac.compare_digest(known.encode(), given):
                person = self.once.pop(known, None)  # None: somebody was as quick
                return self._signed(person) if person is not None else None
        for known, person in self.users.items():
            if hmac.compare_digest(known.encode(), given):
                return self._signed(person)
        return None

    def person(self, cookie: str) -> str | None:
        """Whom a session cookie names, if we signed it."""
        name, _, mac = cookie.rpartition(".")
        genuine = hmac.compare_digest(self._mac("session", name).encode(), mac.encode("utf-8", "surrogateescape"))
        return bytes.fromhex(name).decode() if genuine else None  # what we signed, we wrote

    def form_token(self, person: str) -> str:
        """What forms on a person's pages carry."""
        return self._mac("form", person)

    def _signed(self, person: str) -> str:
        name = person.encode().hex()
        return f"{name}.{self._mac('session', name)}"

    def _mac(self, purpose: str, text: str) -> str:
        content = f"{purpose}\0{text}".encode("utf-8", "surrogateescape")
        return hmac.digest(self._secret, content, "sha256").hex()


class Guard:
    """The middleware: `app` is reached by those alone that the gate lets through.

    Sets scope["state"]: person, owner, form_token, and form, the fields that were sent.
    open_paths: those that need no session.
    """

    def __init__(self, app: ASGIApp, gate: Gate, refuse: Callable[[int, str], ASGIApp], open_paths: set[str]) -> None:
        self.app, self.gate, self.refuse, self.open_paths = app, gate, refuse, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        form: dict[str, str] = {}
        try:
            request = Request(scope)
            self._check_host(request.headers.get("host", ""))
            person = self._person(request)
            owner = person in self.gate.owners
            if not owner and not scope["path"].startswith(_OF_ALL) and scope["path"] not in (*self.open_paths, "/"):
                raise _Refused(403, "This page is for whoever runs the project: it would show you what others said. "
                                    "Yours is the label page.")  # fmt: skip
            if scope["method"] not in ("GET", "HEAD"):
                self._check_origin(request)
                form = await _form(request, receive)
                if scope["path"] not in self.open_paths:
                    self._check_form_token(form, person)
            scope.setdefault("state", {}).update(
                person=person, owner=owner, form_token=self.gate.form_token(person), form=form
            )
            app = self.app
        except _Refused as refused:
            app = self.refuse(refused.status, refused.why)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        await app(scope, receive, send_with_headers)

    def _check_host(self, host: str) -> None:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if name.lower() not in self.gate.hosts:
            raise _Refused(421, f"This studio is not served under the name {host[:80]!r}. Open it by the link that it "
                                "printed; if the name is right, start it with --name.")  # fmt: skip

    def _person(self, request: Request) -> str:
        person = self.gate.person(request.cookies.get(cookie_name(request.headers["host"]), ""))
        if person is None and request.scope["path"] not in self.open_paths:
            raise _Refused(401, "Open the studio by the link that it printed when it was started: it signs you in.")
        return person or ""

    def _check_origin(self, request: Request) -> None:
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != request.headers["host"]:
            raise _Refused(403, "This came from a page that is not the studio's. Nothing was changed.")

    def _check_form_token(self, form: dict[str, str], person: str) -> None:
        given = form.get(FORM_TOKEN, "")
        if not hmac.compare_digest(given.encode(), self.gate.form_token(person).encode()):
            raise _Refused(403, "This form is not one that the studio gave you, or the studio was restarted since. "
                                "Nothing was changed: reload the page and do it again.")  # fmt: skip


class _Refused(Exception):
    def __init__(self, status: int, why: str) -> None:
        self.status, self.why = status, why


async def _form(request: Request, receive: Receive) -> dict[str, str]:
    """The fields that were sent."""
    body = await _whole_body(request.headers.get("content-length", "0"), receive)
    if not request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        return {}
    try:
        found = parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=MOST_FIELDS)
    except ValueError:
        raise _Refused(
            413, f"More than {MOST_FIELDS} fields: nothing was changed. Go back and reload the page."
        ) from None
    return dict(found)


async def _whole_body(length: str, receive: Receive) -> bytes:
    if not length.isdigit() or int(length) > MOST_BYTES:
        raise _Refused(413, f"More than {MOST_BYTES:,} bytes: nothing was changed. Shorten the text.")
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MOST_BYTES:
            raise _Refused(413, f"More than {MOST_BYTES:,} bytes: nothing was changed. Shorten the text.")
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return bytes(body)
