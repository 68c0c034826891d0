"""The protocol: labels of people at once, nobody else's requests, nothing that unblinds."""

import contextlib
import http.client
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import write

from rlhf_core.data import Candidates
from rlhf_core.feedback.annotation.items import make_items
from rlhf_core.feedback.annotation.labels import Settings, open_store, read_labels
from rlhf_core.feedback.annotation.server import MAX_BODY, AnnotationServer

RESPONSES = [
    {"text": "first", "model": "secret-a", "temperature": 0.7, "seed": 12345, "logprob": -9.5},
    {"text": "second", "model": "secret-b", "temperature": 1.2, "seed": 67890, "logprob": -8.5},
]
ROWS = [Candidates(f"p{i}", f"question {i}", RESPONSES) for i in range(3)]
GOLD = [Candidates("g", "gold", [{"text": "good"}, {"text": "bad"}], [1, 2])]


class Client:
    """One person's requests over one connection."""

    def __init__(self, server, person="ann"):
        self.connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1])
        self.token, self.person, self.sent = server.store.tokens.get(person, person), person, 0

    def request(self, method, path, body=None, query="", **headers):
        """Status and value of the answer."""
        if isinstance(body, dict):
            body = json.dumps(body).encode()
            headers = {"Content-Type": "application/json"} | headers
        self.connection.request(method, f"{path}?token={self.token}{query}", body, headers)
        reply = self.connection.getresponse()
        raw = reply.read()
        is_json = reply.headers["Content-Type"].startswith("application/json")
        return reply.status, json.loads(raw) if is_json else raw.decode()

    def next(self, query=""):
        return self.request("GET", "/next", query=query)[1]

    def label(self, item, choice=1, **fields):
        self.sent += 1
        label = {"id": f"{self.person}-{self.sent}", "item": item, "annotator": self.person}
        return self.request("POST", "/label", label | {"choice": choice} | fields)


@contextlib.contextmanager
def serving(db, rows=ROWS, mode="pair", people=("ann", "ben"), gold=(), criteria=(), **options):
    items = make_items(rows, mode) + make_items(gold, mode, gold=True)
    settings = Settings(mode, criteria)
    with (
        open_store(db, items, settings, annotators=people, **options) as store,
        AnnotationServer(store) as server,
    ):
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


# ---- the protocol


def test_next_gives_an_item_until_all_are_labelled(tmp_path):
    with serving(tmp_path / "l.sqlite", criteria=("kind",), guidelines="Be kind.") as server:
        ann = Client(server)
        task = ann.next()
        assert task == {
            "annotator": "ann",
            "mode": "pair",
            "item": "p0",
            "prompt": "question 0",
            "left": task["left"],
            "right": "second" if task["left"] == "first" else "first",
            "warning": None,
            "criteria": ["kind"],
            "guidelines": 1,
            "progress": {"done": 0, "total": 2, "seconds_left": None},
        }
        ratings = {"ratings": {"kind": [1, 5]}}
        for i in range(3):
            assert ann.label(f"p{i}", **ratings) == (
                200,
                {"id": f"ann-{i + 1}", "kind": "label", "item": f"p{i}"},
            )
        done = ann.next()
        assert (done["done"], done["waiting"], done["progress"]["done"]) == (True, 0, 3)
        assert ann.request("GET", "/guidelines") == (200, {"version": 1, "text": "Be kind."})


@pytest.mark.parametrize("mode", ["pair", "likert8", "rank", "write"])
def test_nothing_that_is_sent_unblinds(tmp_path, mode):
    with serving(tmp_path / "l.sqlite", mode=mode, overlap=2) as server:
        ben = Client(server, "ben")
        choice = {"pair": {}, "likert8": {}, "rank": {"ranks": [2, 1]}, "write": {"text": "w"}}
        assert ben.label("p0", 1, **choice[mode])[0] == 200
        _, text = Client(server).request("GET", "/next")
        sent = json.dumps(text)
        secrets = ("secret", "0.7", "1.2", "12345", "67890", "-9.5", "ben", "chosen", "shown")
        assert not [word for word in secrets if word in sent]
        shown = text["responses"] if mode in ("rank", "write") else [text["left"], text["right"]]
        assert sorted(shown) == ["first", "second"]


def test_gold_questions_look_like_other_items(tmp_path):
    with serving(tmp_path / "l.sqlite", gold=GOLD, gold_every=1) as server:
        ann = Client(server)
        gold, other = ann.next(), (ann.label("g"), ann.next())[1]
        assert gold["item"] == "g" and gold.keys() == other.keys()


def test_undo_and_skip_are_choices(tmp_path):
    with serving(tmp_path / "l.sqlite") as server:
        ann = Client(server)
        assert ann.label(None, "undo") == (409, {"error": "there is no label to take back"})
        ann.label("p0")
        assert ann.label("p1", "skip")[1]["kind"] == "skip"
        assert ann.next()["item"] == "p2"
        assert ann.label(None, "undo")[1] == {"id": "ann-4", "kind": "undo", "item": "p1"}
        assert ann.next()["item"] == "p1"


def test_signs_of_trouble_are_reported_while_people_label(tmp_path):
    alerts = []
    rows = [Candidates(f"p{i}", "?", RESPONSES) for i in range(60)]
    with serving(tmp_path / "l.sqlite", rows) as server:
        server.alert = alerts.append
        ann = Client(server)
        for i in range(60):
            ann.label(f"p{i}", 1, ms=5000)  # always the left one
            if i == 49:
                server.watcher.join()
    assert alerts == [["warning: ann chose the left answer in 50 of 50 items (binomial p 2e-15)"]]


def test_a_token_may_come_as_a_bearer(tmp_path):
    with serving(tmp_path / "l.sqlite") as server:
        client = Client(server, "unknown")
        known = f"Bearer {server.store.tokens['ben']}"
        assert client.request("GET", "/next", Authorization=known)[1]["annotator"] == "ben"


@pytest.mark.parametrize(
    "body, headers, status, error",
    [
        (b"{", {}, 400, "the request is malformed"),
        (b"\xff", {}, 400, "the request is malformed"),
        (b"[" * 10**5, {}, 400, "the request is malformed: not valid JSON: nested"),
        (b'{"id": "\\ud800"}', {}, 400, "the request is malformed"),
        (b"[1]", {}, 400, "the request must be a JSON object, got [1]"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "must have Content-Type: application/json"),
        (b"x" * (MAX_BODY + 1), {}, 413, "more than 1048576"),
        (b"{}", {}, 400, "id must be text"),
        (b'{"id": "x", "item": "p0", "choice": 3}', {}, 400, "choice must be 1, 2, 0"),
        (b'{"id": "x", "item": "p0", "choice": 1, "ms": -1}', {}, 400, "ms must be"),
        (b'{"id": "x", "item": "p9", "choice": 1}', {}, 404, 'there is no item "p9"'),
        (b'{"id": "x", "item": ["p0"], "choice": 1}', {}, 404, "there is no item"),
        (b'{"id": "x", "annotator": "ben"}', {}, 403, 'annotator "ben" does not belong'),
    ],
)
def test_a_bad_label_is_refused_and_the_server_goes_on(tmp_path, body, headers, status, error):
    with serving(tmp_path / "l.sqlite") as server:
        ann = Client(server)
        headers = {"Content-Type": "application/json"} | headers
        found, value = ann.request("POST", "/label", body, **headers)
        assert found == status and error in value["error"]
        assert ann.label("p0")[0] == 200
    assert len(read_labels(tmp_path / "l.sqlite").rows) == 1


def test_a_full_disk_is_reported_and_the_label_can_be_sent_again(tmp_path):
    with serving(tmp_path / "l.sqlite", mode="write") as server:
        connection, ann = server.store._connection, Client(server)
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
        label = {"id": "x", "item": "p0", "text": "long" * 10**5}
        status, value = ann.request("POST", "/label", label)
        assert status == 507 and "full" in value["error"]
        connection.execute("PRAGMA max_page_count = 100000")
        assert ann.request("POST", "/label", label)[0] == 200


# ---- strangers


@pytest.mark.parametrize("path", ["/next", "/guidelines", "/status", "/label", "/session"])
def test_a_stranger_gets_nothing(tmp_path, path):
    with serving(tmp_path / "l.sqlite") as server:
        stranger = Client(server, "guess")
        method = "POST" if path in ("/label", "/session") else "GET"
        status, value = stranger.request(method, path, {} if method == "POST" else None)
        assert status == 401 and value.keys() == {"error"}


def test_other_sites_get_nothing(tmp_path):
    with serving(tmp_path / "l.sqlite") as server:
        ann = Client(server)
        port = server.server_address[1]
        assert ann.request("GET", "/next", Host=f"evil.example:{port}")[0] == 421
        assert ann.request("GET", "/", Host="evil.example")[0] == 421
        assert ann.request("GET", "/", Host="[evil")[0] == 421
        assert ann.request("GET", "/", Host="[::1]")[0] == 200
        assert ann.request("GET", "/next", Origin="http://evil.example")[0] == 403
        for host in ("localhost", "127.0.0.1"):
            own = {"Host": f"{host}:{port}", "Origin": f"http://{host}:{port}"}
            assert ann.request("GET", "/next", **own)[0] == 200


def test_only_the_page_and_its_protocol_are_served(tmp_path):
    with serving(tmp_path / "l.sqlite") as server:
        ann = Client(server)
        for path in ("/labels.sqlite", "/../l.sqlite", "/page.html", "/label"):
            assert ann.request("GET", path)[0] == 404
        status, page = ann.request("GET", "/")
        assert status == 200 and "http://" not in page and "https://" not in page
        ann.connection.request("GET", "/")
        reply = ann.connection.getresponse()
        reply.read()
        assert reply.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src")
        assert "unsafe" not in reply.headers["Content-Security-Policy"]
        assert reply.headers["Referrer-Policy"] == "no-referrer"


def test_tokens_differ_and_stay(tmp_path):
    with serving(tmp_path / "l.sqlite") as server:
        first = dict(server.store.tokens)
    assert len(set(first.values())) == 2 and all(len(token) == 24 for token in first.values())
    with serving(tmp_path / "l.sqlite", people=("ben", "eve")) as server:
        assert server.store.tokens["ben"] == first["ben"]
        assert Client(server, first["ann"]).request("GET", "/next")[0] == 401  # not of this run


def test_two_windows_on_one_link_are_told_so(tmp_path):
    with serving(tmp_path / "l.sqlite") as server:
        ann = Client(server)
        assert ann.next("&session=1")["item"] == "p0"
        status, value = ann.request("GET", "/next", query="&session=2")
        assert (status, value["code"]) == (409, "in_use")
        assert "ann is labelling in another window" in value["error"]
        assert ann.request("POST", "/session", {}, "&session=2")[0] == 200
        assert ann.next("&session=2")["item"] == "p0"
        label = {"id": "x", "item": "p0", "choice": 1}
        assert ann.request("POST", "/label", label, "&session=1")[0] == 409
        assert Client(server, "ben").next("&session=1")["item"] == "p1"


def test_a_port_in_use_is_named(tmp_path):
    with serving(tmp_path / "l.sqlite") as server:
        port = server.server_address[1]
        with pytest.raises(OSError, match=f"127.0.0.1 port {port}: Address already in use"):
            AnnotationServer(server.store, port=port)


# ---- many people, and the end of the process


@pytest.mark.slow
def test_eight_people_label_each_item_three_times(tmp_path):
    """600 labels, three distinct people each, about as many on either side."""
    db, people = tmp_path / "l.sqlite", [f"person{i}" for i in range(8)]
    rows = [Candidates(f"p{i}", f"question {i}", RESPONSES) for i in range(200)]

    def work(person):
        client, lefts = Client(server, person), []
        while "done" not in (task := client.next()):
            lefts.append(task["left"])
            status, value = client.label(task["item"], 1 if task["left"] == "first" else 2)
            assert status == 200, value
        return lefts

    with serving(db, rows, people=people, overlap=3) as server, ThreadPoolExecutor(8) as pool:
        lefts = [left for part in pool.map(work, people) for left in part]
    given = defaultdict(list)
    for item, person, choice in sqlite3.connect(db).execute(
        "SELECT item, annotator, choice FROM labels"
    ):
        given[item].append(person)
        assert choice == 1  # everybody prefers the first response, on whatever side
    assert len(given) == 200
    assert all(len(names) == len(set(names)) == 3 for names in given.values())
    assert 0.42 <= Counter(lefts)["first"] / 600 <= 0.58


@pytest.mark.slow
def test_a_killed_server_has_stored_what_it_answered(tmp_path):
    """SIGKILL in the middle of the work: each answered label is there, and no other."""
    data = write(
        tmp_path / "c.jsonl",
        [{"id": i, "prompt": f"q{i}", "responses": ["a", "b"]} for i in range(300)],
    )
    db = tmp_path / "l.sqlite"
    command = [sys.executable, "-m", "rlhf_core", "annotate", "--data", data, "--db", db]
    process = subprocess.Popen(
        [*map(str, command), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    try:
        link = process.stdout.readline().split()[-1]
        port, token = int(link.split(":")[2].split("/")[0]), link.rpartition("=")[2]
        connection = http.client.HTTPConnection("127.0.0.1", port)
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        for i in range(200):
            label = {"id": f"c{i}", "item": i, "annotator": "annotator", "choice": 1}
            connection.request("POST", "/label", json.dumps(label), headers)
            reply = connection.getresponse()
            assert reply.status == 200, reply.read()
            reply.read()
        connection.request("GET", "/next", headers=headers)  # not answered when it is killed
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert len(read_labels(db).rows) == 200
    rows = sqlite3.connect(db).execute("SELECT id, item FROM labels ORDER BY number").fetchall()
    assert rows == [(f"c{i}", i) for i in range(200)]
    items = make_items(
        [Candidates(i, f"q{i}", [{"text": "a"}, {"text": "b"}]) for i in range(300)], "pair"
    )
    with open_store(db, items, Settings("pair"), annotators=["annotator"]) as store:
        assert store.next_item("annotator").id == 200
