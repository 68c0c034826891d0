"""People in the loop: a run asks them to compare answers, and waits for their labels.

The run itself serves the page of `annotate`, on the same database.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rlhf_core.data import Candidates
from rlhf_core.data.chat import Content
from rlhf_core.feedback.annotation.items import make_items
from rlhf_core.feedback.annotation.labels import (
    Contents,
    LabelStore,
    Settings,
    open_store,
    read_labels,
)
from rlhf_core.feedback.annotation.server import AnnotationServer


class People(NamedTuple):
    """Who compares answers, where, and how many labels are enough.

    Attributes:
        db: Database of labels. It is made if it does not exist, and keeps the labels that it has.
        prompts: The run's prompts as people read them: text or messages.
        annotators: Names; each gets a link.
        overlap: Number of people who label each item.
        wait_labels: Labels of a round after which the run goes on; None: when nobody has an item
            left.
        host, port: Where the page is served; port 0 takes a free one.
    """

    db: Path
    prompts: Sequence[Content]
    annotators: Sequence[str] = ("annotator",)
    overlap: int = 1
    wait_labels: int | None = None
    host: str = "127.0.0.1"
    port: int = 8765


def ask(people: People, rows: Sequence[Candidates], seed: int = 0) -> Contents:
    """Have people compare the responses of the rows; returns all labels of the database.

    Items whose ids the database knows are not asked again, so that an interrupted run goes on.

    Args:
        rows: With ids of their own.
        seed: Seed of the sides in a new database.

    Raises:
        ValueError: The responses to every prompt are equal, or the database is for texts to write.
        BlockingIOError: Another process has opened the database.
    """
    known = read_labels(people.db) if people.db.exists() else None
    settings = Settings("pair", (), seed) if known is None else known.settings
    if settings.mode == "write":
        raise ValueError(f"{people.db} is for texts that people write. Choose another --db")
    items = {item.id: item for item in make_items(rows, settings.mode)}
    if not items:
        raise ValueError(
            "the responses to every prompt are equal, so there is nothing to compare. Raise the "
            "temperature of sampling"
        )
    every = {**items, **({} if known is None else known.items)}
    options = dict(annotators=people.annotators, overlap=people.overlap, offered=items)
    with (
        open_store(people.db, list(every.values()), settings, **options) as store,
        AnnotationServer(store, people.host, people.port) as server,
    ):
        server.timeout = 1  # seconds until handle_request returns without a request
        if not _is_enough(people, store, items):
            print(f"waiting for labels of {len(items)} items:", file=sys.stderr)
            for name, token in store.tokens.items():
                print(f"{name}: {server.link(token)}", flush=True)
            print("Ctrl-C stops the run; --resume goes on, every label is stored", file=sys.stderr)
        while not _is_enough(people, store, items):
            server.handle_request()
    return read_labels(people.db)


def _is_enough(people: People, store: LabelStore, items: Sequence[str | int]) -> bool:
    if people.wait_labels is not None and store.count(items) >= people.wait_labels:
        return True
    return not any(store.waiting(name) for name in people.annotators)
