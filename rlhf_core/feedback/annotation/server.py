"""The page on which people label, and its protocol: JSON over HTTP from one process.

Every request carries a token, which names the person. A page of another site cannot send one, and
the checks of Host and Origin stop it before that. What the server sends says nothing about models,
other people's labels or the order in the data. Left out: TLS. Put a proxy in front of it, or label
on one machine.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rlhf_core.feedback.annotation import flags
from rlhf_core.feedback.annotation.items import Item
from rlhf_core.feedback.annotation.labels import LEASE_SECONDS, LabelStore, Refused
from rlhf_core.files import parse_json, read_text, shown

MAX_BODY = 2**20  # bytes
_MAX_DRAINED = 2**25  # bytes of a body that is too long, read so that the client gets the answer
_ALERT_EVERY = 50  # labels
PAGE = Path(__file__).with_name("page.html")


class InUse(Refused):
    """Another window, or person, works with this link."""


class AnnotationServer(ThreadingHTTPServer):
    """An HTTP server that is bound to its port, and answers once `serve_forever` runs.

    Args:
        store: The open database.
        host: The address to listen on.
        port: 0 takes a free one.
        alert: Called with flags and warnings, as lines of text, after every 50th label.

    Attributes:
        status_token: The secret of `GET /status`, for the person who runs the project.

    Raises:
        OSError: The port is in use.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        store: LabelStore,
        host: str = "127.0.0.1",
        port: int = 0,
        alert: Callable[[list[str]], None] = lambda lines: None,
    ):
        self.store, self.host, self.alert, self.labels = store, host, alert, 0
        self.status_token = secrets.token_urlsafe(18)
        self.page = read_text(PAGE)
        self.policy = _content_policy(self.page)
        self.hosts = {"localhost", host.lower(), socket.gethostname().lower()}
        self.sessions: dict[str, tuple[str, float]] = {}  # person -> window, time of last request
        self.lock = threading.Lock()  # of the sessions and the count of labels
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise OSError(
                f"cannot listen on {host} port {port}: {error.strerror}. Choose another --port"
            ) from None

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks a name server

    def link(self, token: str, path: str = "/") -> str:
        """The address of a page with a token. A wildcard address is shown as the machine's name."""
        host = self.host
        if host in ("", "0.0.0.0", "::"):
            host = socket.gethostname()
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.server_address[1]}{path}?token={token}"

    def person(self, token: str) -> str:
        """The person with this token. Refused if there is none."""
        given = token.encode()
        for name, known in self.store.tokens.items():
            if hmac.compare_digest(known.encode(), given):
                return name
        raise Refused("this link is not valid. Ask for the one that was printed for you", 401)

    def check_session(self, person: str, session: str, takes_over: bool = False) -> None:
        """Note that a window is at work. Refused if another one of this person is, too."""
        if not session:
            return
        with self.lock:
            other, last = self.sessions.get(person, (session, 0.0))
            idle = time.monotonic() - last
            if other != session and idle < LEASE_SECONDS and not takes_over:
                raise InUse(
                    f"{person} is labelling in another window, last {round(idle)} seconds ago. If "
                    "that is you, continue here. If not, ask for a link of your own: two people on "
                    "one link count as one."
                )
            self.sessions[person] = session, time.monotonic()

    def count_label(self) -> None:
        """Look for signs of trouble after every 50th label of this run."""
        with self.lock:
            self.labels += 1
            is_due = self.labels % _ALERT_EVERY == 0
        if is_due:  # in a thread, because nobody should wait for it
            report = lambda: self.alert(flags.alert_lines(flags.summary(self.store.db)))  # noqa: E731
            self.watcher = threading.Thread(target=report, daemon=True)
            self.watcher.start()


class _Handler(BaseHTTPRequestHandler):
    server: AnnotationServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "rlhf-core", ""
    timeout = 60
    wbufsize = -1  # one packet for headers and body

    def do_GET(self) -> None:
        self._answer(
            {
                "/": self._page,
                "/next": self._next,
                "/guidelines": self._guidelines,
                "/status": self._status,
            }
        )

    def do_POST(self) -> None:
        self._answer({"/label": self._label, "/session": self._session})

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the addresses hold tokens."""

    # ---- pages

    def _page(self) -> str:
        return self.server.page

    def _next(self) -> dict[str, Any]:
        person, store = self._person(), self.server.store
        item = store.next_item(person)
        reply: dict[str, Any] = {"annotator": person, "mode": store.settings.mode}
        reply["progress"] = store.progress(person)
        if item is None:
            return reply | {"done": True, "waiting": store.waiting(person)}
        return reply | {
            **_as_shown(item, store.order(item, person), store.settings.mode),
            "criteria": store.settings.criteria,
            "guidelines": store.guidelines_version,
        }

    def _label(self) -> dict[str, Any]:
        label, person = self._body(), self._person()
        named = label.get("annotator", person)
        if named != person:
            raise Refused(f"annotator {shown(named)} does not belong to this token", 403)
        reply = self.server.store.add(person, label)
        self.server.count_label()
        return reply

    def _session(self) -> dict[str, Any]:
        self._body()
        return {"annotator": self._person(takes_over=True)}

    def _guidelines(self) -> dict[str, Any]:
        self._person()
        store = self.server.store
        return {"version": store.guidelines_version, "text": store.guidelines}

    def _status(self) -> dict[str, Any]:
        if not hmac.compare_digest(self._token().encode(), self.server.status_token.encode()):
            raise Refused("the status needs the token that was printed for it", 401)
        return flags.summary(self.server.store.db)

    # ---- requests

    def _answer(self, pages: dict) -> None:
        try:
            self._check_sender()
            page = pages.get(urlsplit(self.path).path)
            if page is None:
                raise Refused("there is no such page", 404)
            status, value = 200, page()
        except Refused as error:
            status, value = error.status, {"error": str(error)}
            if isinstance(error, InUse):
                value["code"] = "in_use"
        except OSError as error:  # the database, not the socket: nothing is sent before this line
            status, value = 507, {"error": str(error)}
        except ValueError as error:
            status, value = 500, {"error": str(error)}
        is_page = isinstance(value, str)
        body = (value if is_page else json.dumps(value, ensure_ascii=False)).encode()
        self.send_response(status)
        kind = "text/html" if is_page else "application/json"
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        if status >= 400 and self.command == "POST":
            self.close_connection = True  # the body may not have been read
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _check_sender(self) -> None:
        """Refuse a request of another site: by a name that it made point here, or by its page."""
        host = self.headers.get("Host", "")
        name = re.sub(r":\d+$", "", host).strip("[]").lower()
        if name not in self.server.hosts and not _is_address(name):
            allowed = ", ".join(sorted(self.server.hosts))
            raise Refused(f"host {shown(name)} is not this server ({allowed}, or its address)", 421)
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{host}":
            raise Refused(f"a page of {shown(origin)} may not use this server", 403)

    def _query(self, name: str) -> str:
        return parse_qs(urlsplit(self.path).query).get(name, [""])[0]

    def _token(self) -> str:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return token.strip() if scheme.lower() == "bearer" else self._query("token")

    def _person(self, takes_over: bool = False) -> str:
        person = self.server.person(self._token())
        self.server.check_session(person, self._query("session"), takes_over)
        return person

    def _body(self) -> dict[str, Any]:
        """The JSON object in the request."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused("the request needs a Content-Length", 411)
        if int(length) > MAX_BODY:
            rest = min(int(length), _MAX_DRAINED)
            while rest > 0 and (chunk := self.rfile.read(min(rest, MAX_BODY))):
                rest -= len(chunk)
            raise Refused(f"the request has {length} bytes, more than {MAX_BODY}", 413)
        raw = self.rfile.read(int(length))
        if self.headers.get_content_type() != "application/json":
            raise Refused("the request must have Content-Type: application/json", 415)
        try:
            value = parse_json(raw.decode())
            json.dumps(value, ensure_ascii=False).encode()  # fails on half a surrogate pair
        except ValueError as error:
            raise Refused(f"the request is malformed: {error}", 400) from None
        if not isinstance(value, dict):
            raise Refused(f"the request must be a JSON object, got {shown(value)}", 400)
        return value


def _as_shown(item: Item, order: list[int], mode: str) -> dict[str, Any]:
    """What a person may know of an item."""
    value = {"item": item.id, "prompt": item.prompt, "warning": item.warning}
    responses = [item.responses[i] for i in order]
    if mode in ("rank", "write"):
        return value | {"responses": responses}
    return value | {"left": responses[0], "right": responses[1]}


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return False


def _content_policy(page: str) -> str:
    """A Content-Security-Policy under which only the page's own script and style run."""
    digests = {
        tag: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL)
    }
    return (
        f"default-src 'none'; script-src 'sha256-{digests['script']}'; "
        f"style-src 'sha256-{digests['style']}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
