"""The database of labels: an append-only log in SQLite, and who gets which item.

One process writes to a database. It holds what it needs to assign items in memory, as a fold of the
log, so that a restart continues where the log ends. A label is stored when `add` returns: one
transaction, synced to the disk. An undo is a row of the log like any other.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import math
import secrets
import sqlite3
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from rlhf_core.feedback.annotation.items import (
    Item,
    display_order,
    outcomes,
    unblind,
    unblind_ratings,
)
from rlhf_core.files import shown
from rlhf_core.locks import hold

LEASE_SECONDS = 600
_APPLICATION_ID = 0x524C4846  # "RLHF" in the header of the file
_SCHEMA = (
    f"PRAGMA application_id = {_APPLICATION_ID}",
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE items (position INTEGER PRIMARY KEY, id NOT NULL UNIQUE, content TEXT NOT NULL)",
    "CREATE TABLE annotators (name TEXT PRIMARY KEY, token TEXT NOT NULL)",
    "CREATE TABLE guidelines (version INTEGER PRIMARY KEY, text TEXT NOT NULL, time TEXT NOT NULL)",
    """CREATE TABLE leases (
        annotator TEXT PRIMARY KEY, item NOT NULL, served REAL NOT NULL, expires REAL NOT NULL)""",
    """CREATE TABLE labels (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,   -- made by the client, so that it may send a label twice
        kind TEXT NOT NULL,        -- label, skip or undo
        item NOT NULL,
        annotator TEXT NOT NULL,
        choice,                    -- about the responses in the order of the data
        ratings TEXT,              -- JSON: criterion to a rating for each response, in that order
        shown TEXT,                -- JSON: numbers of the responses from left to right
        side INTEGER AS (json_extract(shown, '$[0]')),  -- the number of the left one: 0 or 1
        ms INTEGER,                -- from showing the item to the label
        time TEXT NOT NULL,        -- ISO 8601, UTC
        guidelines INTEGER,        -- version of the guidelines
        gold INTEGER NOT NULL,     -- 1 for a gold question
        undoes TEXT                -- id of the row that an undo takes back
    )""",
    """CREATE TRIGGER labels_keep BEFORE UPDATE ON labels
        BEGIN SELECT RAISE(ABORT, 'labels are never changed'); END""",
    """CREATE TRIGGER labels_stay BEFORE DELETE ON labels
        BEGIN SELECT RAISE(ABORT, 'labels are never deleted'); END""",
    """CREATE VIEW current AS SELECT * FROM labels WHERE kind != 'undo'
        AND id NOT IN (SELECT undoes FROM labels WHERE kind = 'undo') ORDER BY number""",
)
_COLUMNS = (
    *("id", "kind", "item", "annotator", "choice", "ratings", "shown", "ms", "time"),
    *("guidelines", "gold", "undoes"),
)


class Refused(ValueError):
    """The store does not take this label. `status` is the HTTP status that says why."""

    def __init__(self, message: str, status: int = 409):
        super().__init__(message)
        self.status = status


class Lease(NamedTuple):
    """An item that a person has open. Times are seconds since 1970."""

    item: str | int
    served: float
    expires: float


class Settings(NamedTuple):
    """What a database was made with. Labels under other settings would not mean the same."""

    mode: str
    criteria: tuple[str, ...] = ()
    seed: int = 0


Comparison = tuple[str | int, tuple[int, int]]  # an item's id, the places of two responses in it
Vote = tuple[dict[str, Any], int | str]  # the row of a label, and 1, 2, 0 or "both_bad"


class Contents(NamedTuple):
    """A database as read.

    Attributes:
        settings: What it was made with.
        items: By id; gold questions have ranks.
        rows: Labels and skips that nobody has taken back, oldest first, by the columns of the table
            `labels`; `ratings` and `shown` decoded, `choice` a number, text or list.
    """

    settings: Settings
    items: dict[str | int, Item]
    rows: list[dict[str, Any]]

    def labels(self) -> list[dict[str, Any]]:
        """The rows that are labels, without gold questions."""
        return [row for row in self.rows if row["kind"] == "label" and not row["gold"]]

    def votes(self) -> dict[Comparison, list[Vote]]:
        """What the labels say about each two responses of an item; in "write" they say nothing."""
        votes: dict[Comparison, list[Vote]] = defaultdict(list)
        for row in self.labels() if self.settings.mode != "write" else ():
            for pair, outcome in outcomes(self.settings.mode, row["choice"]).items():
                votes[row["item"], pair].append((row, outcome))
        return votes


def read_labels(db: Path) -> Contents:
    """Read a database of labels, which a server may be writing to.

    Raises:
        ValueError or OSError: It does not exist, is damaged, or is something else.
    """
    if not db.is_file():
        raise FileNotFoundError(f"{db} does not exist. rlhf-core annotate makes it")
    with _faults(db), contextlib.closing(_connect(db, "ro")) as connection:
        _check_kind(db, connection)
        settings = _settings(connection)
        return Contents(settings, _items(connection), _current(connection, settings.mode))


@contextlib.contextmanager
def open_store(
    db: Path,
    items: Sequence[Item] | None = None,
    settings: Settings | None = None,
    *,
    annotators: Sequence[str] = (),
    overlap: int = 1,
    gold_every: int = 20,
    guidelines: str = "",
    offered: Collection[str | int] | None = None,
) -> Iterator[LabelStore]:
    """Hold a database and yield its store. Given items, it is made or extended.

    Args:
        db: The file. A lock in its folder, `.NAME.lock`, keeps a second process out.
        items: What is labelled; gold questions have ranks. All items of the database must be among
            them, new ones are added. None: those of the database.
        settings: None: those of the database.
        annotators: Names. Each has a token, which stays the same in later runs.
        overlap: Number of people who label each item. Everybody gets all gold questions.
        gold_every: One in this many items of a person is a gold question.
        guidelines: Their text. A text that differs from the last one is a new version.
        offered: Ids of the items that people get beside gold questions; None: all.

    Raises:
        BlockingIOError: Another process has opened the database.
        ValueError: It was made for other data or with other settings, or it is damaged.
    """
    with hold(db.parent, f".{db.name}.lock"), _faults(db):
        if items is None and not db.is_file():
            raise FileNotFoundError(f"{db} does not exist. Pass --data to make it")
        with contextlib.closing(_connect(db, "rwc")) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            if items is not None and settings is not None:
                _make_or_extend(db, connection, items, settings)
            _check_kind(db, connection)
            if connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("pages are missing or wrong")
            connection.execute("PRAGMA journal_mode = WAL")
            store = LabelStore(db, connection, overlap, gold_every, offered)
            store.set_people(annotators)
            store.set_guidelines(guidelines)
            try:
                yield store
            finally:
                with store.lock:  # a label that is being stored is the last
                    connection.close()


class LabelStore:
    """Items, people and labels of one open database. Its methods may be called by any thread.

    Attributes:
        tokens: The secret of each person of this run.
    """

    def __init__(
        self,
        db: Path,
        connection: sqlite3.Connection,
        overlap: int = 1,
        gold_every: int = 20,
        offered: Collection[str | int] | None = None,
    ):
        self.db, self.overlap, self.gold_every = db, overlap, gold_every
        self.settings, self.items = _settings(connection), _items(connection)
        self.tokens: dict[str, str] = {}
        self.lock = threading.Lock()
        self._connection = connection
        versions = connection.execute("SELECT version, text FROM guidelines ORDER BY version")
        self.guidelines_version, self.guidelines = [(0, ""), *versions][-1]
        leases = connection.execute("SELECT annotator, item, served, expires FROM leases")
        self._leases = {annotator: Lease(*rest) for annotator, *rest in leases}
        self._gold = [item for item in self.items.values() if item.ranks]
        self._offered = offered
        # Folds of the log: items with fewer labels than `overlap`, the kind of row that each person
        # gave an item, and each person's rows in order.
        self._open = {name: x for name, x in self.items.items() if self._is_offered(x)}
        self._seen: dict[Any, dict[str, str]] = defaultdict(dict)
        self._history: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in _current(connection, self.settings.mode):
            self._apply(row)

    # ---- people

    def set_people(self, names: Sequence[str]) -> None:
        """Admit these people, and give a token to those who have none yet."""
        known = dict(self._connection.execute("SELECT name, token FROM annotators"))
        self.tokens = {name: known.get(name) or secrets.token_urlsafe(18) for name in names}
        with self._transaction():
            self._connection.executemany(
                "INSERT OR IGNORE INTO annotators VALUES (?, ?)", self.tokens.items()
            )

    def set_guidelines(self, text: str) -> None:
        """Store the guidelines as a new version, unless they are those of the last one."""
        if text and text != self.guidelines:
            row = (self.guidelines_version + 1, text, iso(time.time()))
            with self._transaction():
                self._connection.execute("INSERT INTO guidelines VALUES (?, ?, ?)", row)
            self.guidelines_version, self.guidelines = row[:2]

    # ---- assignment

    def next_item(self, annotator: str) -> Item | None:
        """The item that this person has open, or a new one, leased for ten minutes. None: no more.

        A person gets the first item that they have not seen and that has room: fewer labels, and
        leases of others, than `overlap`. Every `gold_every`-th item is a gold question.
        """
        with self.lock:
            now, lease = time.time(), self._leases.get(annotator)
            if lease is not None and self._has_room(lease.item, annotator, now):
                item: Item | None = self.items[lease.item]
                served = lease.served
            else:
                item, served = self._choose(annotator, now), now
            if item is not None:
                self._lease(annotator, Lease(item.id, served, now + LEASE_SECONDS))
            return item

    def _choose(self, annotator: str, now: float) -> Item | None:
        seen = self._history[annotator]
        asked = sum(row["gold"] for row in seen)
        is_due = (asked + 1) * self.gold_every <= len(seen) + 1
        queue = itertools.chain(self._gold if is_due else (), self._open.values())
        return next((item for item in queue if self._has_room(item.id, annotator, now)), None)

    def _has_room(self, item: str | int, annotator: str, now: float) -> bool:
        """Whether this person may label the item."""
        seen = self._seen[item]
        if annotator in seen:
            return False
        if self.items[item].ranks:
            return True
        open_to = {
            name
            for name, lease in self._leases.items()
            if lease.item == item and lease.expires > now and name != annotator
        }
        return self._label_count(item) + len(open_to - seen.keys()) < self.overlap

    def _label_count(self, item: str | int) -> int:
        return list(self._seen[item].values()).count("label")

    def _lease(self, annotator: str, lease: Lease) -> None:
        with self._transaction():
            self._connection.execute(
                "INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?)", (annotator, *lease)
            )
        self._leases[annotator] = lease

    def order(self, item: Item, annotator: str) -> list[int]:
        """The numbers of the item's responses from left to right, as this person sees them."""
        return display_order(self.settings.seed, item.id, annotator, len(item.responses))

    def progress(self, annotator: str) -> dict[str, Any]:
        """Labels given, all labels with an estimate of those to come, and seconds that these take.

        The estimate shares the missing labels equally among the people of this run.
        """
        with self.lock:
            rows = [row for row in self._history[annotator] if row["kind"] == "label"]
            needed = sum(self.overlap - self._label_count(name) for name in self._open)
        left = math.ceil(needed / max(1, len(self.tokens)))
        times = [row["ms"] for row in rows[-50:] if row["ms"] is not None]
        seconds = round(left * statistics.median(times) / 1000) if len(times) > 2 else None
        return {"done": len(rows), "total": len(rows) + left, "seconds_left": seconds}

    def waiting(self, annotator: str) -> int:
        """Number of items that this person may still get, if others do not finish them."""
        with self.lock:
            return sum(annotator not in self._seen[name] for name in self._open)

    def count(self, items: Iterable[str | int]) -> int:
        """Number of labels of these items; skips do not count."""
        with self.lock:
            return sum(map(self._label_count, items))

    # ---- labels

    def add(self, annotator: str, label: dict[str, Any]) -> dict[str, Any]:
        """Store a label, a skip or an undo, as a client sends it: see the protocol in the guide.

        Returns:
            The row's id, kind and item.

        Raises:
            Refused: The label is malformed, or this person may not give it.
            OSError: The disk is full, or cannot be written to. Nothing is stored.
        """
        with self.lock:
            now = time.time()
            row = self._parsed(annotator, label)
            stored = self._connection.execute(
                f"SELECT {', '.join(_COLUMNS)} FROM labels WHERE id = ?", (row["id"],)
            ).fetchone()
            if stored is not None:
                before = _decoded(stored, self.settings.mode)
                if any(before[key] != value for key, value in row.items() if key != "ms"):
                    raise Refused(f"id {shown(row['id'])} is that of another label. Make a new id")
                return {"id": before["id"], "kind": before["kind"], "item": before["item"]}
            if row["kind"] == "undo":
                if not self._history[annotator]:
                    raise Refused("there is no label to take back")
                undone = self._history[annotator][-1]
                row |= {"item": undone["item"], "undoes": undone["id"], "gold": undone["gold"]}
            else:
                if not self._has_room(row["item"], annotator, now):
                    mine = annotator in self._seen[row["item"]]
                    reason = "you have labelled it already" if mine else "others have finished it"
                    raise Refused(f"item {shown(row['item'])} is closed: {reason}")
                lease = self._leases.get(annotator)
                if row["ms"] is None and lease is not None and lease.item == row["item"]:
                    row["ms"] = round(1000 * (now - lease.served))
            row |= {"time": iso(now), "guidelines": self.guidelines_version}
            self._append([row])
            if row["kind"] == "undo" and self._has_room(row["item"], annotator, now):
                self._lease(annotator, Lease(row["item"], now, now + LEASE_SECONDS))
            return {"id": row["id"], "kind": row["kind"], "item": row["item"]}

    def add_imported(self, rows: Sequence[dict[str, Any]]) -> Counter[str]:
        """Store labels that people gave elsewhere, all or none.

        A label whose id is known is skipped. It replaces another label of the same person for the
        same item, by an undo.

        Args:
            rows: id, item, annotator, choice (unblinded), time, and optionally kind, ratings, ms.

        Returns:
            How many were "new", "known" and "replaced".
        """
        with self.lock:
            ids = {name for (name,) in self._connection.execute("SELECT id FROM labels")}
            counts: Counter[str] = Counter()
            given = {
                (row["item"], row["annotator"]): row
                for rows in self._history.values()
                for row in rows
            }
            log = []
            for row in rows:
                key = (row["item"], row["annotator"])
                if row["id"] in ids:
                    counts["known"] += 1
                    continue
                row = {"kind": "label", "gold": int(bool(self.items[row["item"]].ranks))} | row
                before = given.get(key)
                if before is not None:
                    undo = {"id": f"undo:{row['id']}", "kind": "undo", "undoes": before["id"]}
                    log.append(row | undo | {"choice": None, "ratings": None})
                counts["new" if before is None else "replaced"] += 1
                ids.add(row["id"])
                given[key] = row
                log.append(row)
            self._append(log)
            return counts

    def _parsed(self, annotator: str, label: dict[str, Any]) -> dict[str, Any]:
        """The columns that follow from the request alone."""
        name, choice, ms = label.get("id"), label.get("choice"), label.get("ms")
        if not isinstance(name, str) or not 0 < len(name) <= 200:
            raise Refused(f"id must be text of 1 to 200 characters, got {shown(name)}", 400)
        if ms is not None and not (type(ms) is int and 0 <= ms < 2**53):
            raise Refused(f"ms must be a whole number of milliseconds, got {shown(ms)}", 400)
        if choice == "undo":
            return {"id": name, "kind": "undo", "annotator": annotator}
        item = label.get("item")
        if type(item) not in (str, int) or item not in self.items:
            raise Refused(f"there is no item {shown(item)}", 404)
        order = self.order(self.items[item], annotator)
        row = {"id": name, "kind": "skip", "annotator": annotator, "item": item, "ms": ms}
        row |= {"shown": order, "gold": int(bool(self.items[item].ranks)), "choice": None}
        if choice == "skip":
            return row
        mode = self.settings.mode
        choice = label.get({"rank": "ranks", "write": "text"}.get(mode, "choice"))
        try:
            row |= {"kind": "label", "choice": unblind(mode, choice, order)}
            row["ratings"] = unblind_ratings(label.get("ratings"), self.settings.criteria, order)
        except ValueError as error:
            raise Refused(str(error), 400) from None
        return row

    def _append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows to the log in one transaction, then note them."""
        marks = ", ".join("?" * len(_COLUMNS))
        values = [[_encoded(row.get(name)) for name in _COLUMNS] for row in rows]
        with self._transaction():
            self._connection.executemany(
                f"INSERT INTO labels ({', '.join(_COLUMNS)}) VALUES ({marks})", values
            )
        for row in rows:
            self._apply(row)

    def _apply(self, row: dict[str, Any]) -> None:
        """Note a row of the log in the folds."""
        annotator, history = row["annotator"], self._history[row["annotator"]]
        if row["kind"] == "undo":
            history[:] = [x for x in history if x["id"] != row["undoes"]]
            self._seen[row["item"]].pop(annotator, None)
        else:
            history.append(row)
            self._seen[row["item"]][annotator] = row["kind"]
        item = self.items[row["item"]]
        if self._label_count(item.id) >= self.overlap:
            self._open.pop(item.id, None)
        elif self._is_offered(item) and item.id not in self._open:  # after an undo it comes first
            self._open = {item.id: item} | self._open

    def _is_offered(self, item: Item) -> bool:
        return not item.ranks and (self._offered is None or item.id in self._offered)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with _faults(self.db), _transaction(self._connection):
            yield


# ---- SQLite


def _connect(db: Path, mode: str) -> sqlite3.Connection:
    """A connection that any thread may use, one at a time, with explicit transactions."""
    address = f"file:{quote(str(db.absolute()))}?mode={mode}"
    return sqlite3.connect(address, uri=True, isolation_level=None, check_same_thread=False)


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # a full disk may have ended it
            connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def _faults(db: Path) -> Iterator[None]:
    """SQLite's errors as OSError where the disk is at fault, else as ValueError; both name db."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OSError(f"{db}: {error}. Nothing was stored by this step") from None
    except sqlite3.DatabaseError as error:
        raise ValueError(
            f"{db} is damaged, or not a database: {error}. Restore a copy, or choose another --db"
        ) from None


def _check_kind(db: Path, connection: sqlite3.Connection) -> None:
    if connection.execute("PRAGMA application_id").fetchone() != (_APPLICATION_ID,):
        raise ValueError(f"{db} is not a database of labels. Choose another --db")


def _make_or_extend(
    db: Path, connection: sqlite3.Connection, items: Sequence[Item], settings: Settings
) -> None:
    """Fill an empty database, or add items that are new.

    Raises:
        ValueError: The database was made with other settings, or holds items that are not these.
    """
    meta = {name: json.dumps(value) for name, value in settings._asdict().items()}
    contents = {item.id: json.dumps(item._asdict()) for item in items}
    if len(contents) < len(items):
        twice = next(x for x, n in Counter(item.id for item in items).items() if n > 1)
        raise ValueError(f"a gold question and another item have the id {shown(twice)}. Rename one")
    is_new = not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    stored = {}
    if not is_new:
        _check_kind(db, connection)
        for name, value in connection.execute("SELECT name, value FROM meta"):
            if meta[name] != value:
                raise ValueError(
                    f"{db} was made with --{name} {value}, now it is {meta[name]}. Use the same, "
                    "or choose another --db"
                )
        stored = dict(connection.execute("SELECT id, content FROM items"))
        other = [name for name, content in stored.items() if contents.get(name) != content]
        if other:
            raise ValueError(
                f"{db} was made from other data: item {shown(other[0])} is missing or differs. Use "
                "the same --data and --gold, to which rows may be added, or choose another --db"
            )
    new = [(name, content) for name, content in contents.items() if name not in stored]
    if new or is_new:
        with _transaction(connection):
            if is_new:
                for statement in _SCHEMA:
                    connection.execute(statement)
                connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
            connection.executemany("INSERT INTO items (id, content) VALUES (?, ?)", new)


def _settings(connection: sqlite3.Connection) -> Settings:
    meta = dict(connection.execute("SELECT name, value FROM meta"))
    mode, criteria, seed = (json.loads(meta[name]) for name in Settings._fields)
    return Settings(mode, tuple(criteria), seed)


def _items(connection: sqlite3.Connection) -> dict[str | int, Item]:
    rows = connection.execute("SELECT id, content FROM items ORDER BY position")
    return {name: Item(**json.loads(content)) for name, content in rows}


def _current(connection: sqlite3.Connection, mode: str) -> list[dict[str, Any]]:
    rows = connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM current")
    return [_decoded(row, mode) for row in rows]


def _encoded(value: Any) -> Any:
    is_json = isinstance(value, list | dict)
    return json.dumps(value, ensure_ascii=False) if is_json else value


def _decoded(values: Sequence[Any], mode: str) -> dict[str, Any]:
    row = dict(zip(_COLUMNS, values))
    for name in ("ratings", "shown", *["choice"] * (mode == "rank")):
        if row[name] is not None:
            row[name] = json.loads(row[name])
    return row


def seconds_of(time: str) -> float:
    """Seconds since 1970 of a time in ISO 8601, which is in UTC unless it says otherwise."""
    moment = datetime.datetime.fromisoformat(time.replace("Z", "+00:00"))
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.timezone.utc)
    return moment.timestamp()


def iso(seconds: float) -> str:
    """A time, in seconds since 1970, as the database writes it."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.isoformat(timespec="milliseconds")
