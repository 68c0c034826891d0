"""The page in headless Chromium, driven over the WebDriver protocol of chromedriver."""

import base64
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from contextlib import contextmanager

import pytest

from rlhf_core.data import Candidates
from rlhf_core.feedback.annotation.items import make_items
from rlhf_core.feedback.annotation.labels import Settings, open_store, read_labels
from rlhf_core.feedback.annotation.server import AnnotationServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="chromium and chromedriver are not installed (Debian: chromium chromium-driver)",
    ),
]
FLAGS = ["--headless", "--no-sandbox", "--disable-background-networking", "--disable-gpu"]
ENTER, ESCAPE, BACKSPACE, CONTROL = "\ue007", "\ue00c", "\ue003", "\ue009"


class Browser:
    """A session of chromedriver."""

    def __init__(self, address):
        self.address = f"{address}/session"
        options = {"browserName": "chrome", "goog:chromeOptions": {"args": FLAGS}}
        self.id = self.call("", {"capabilities": {"alwaysMatch": options}})["sessionId"]
        self.address += f"/{self.id}"

    def call(self, path, body=None, method=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, method=method)
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.load(reply)["value"]

    def open(self, url):
        self.call("/url", {"url": url})

    def run(self, script, *arguments):
        return self.call("/execute/sync", {"script": f"return {script}", "args": arguments})

    def press(self, *keys):
        """Press keys, and release them in the opposite order if there are several."""
        actions = [{"type": "keyDown", "value": key} for key in keys]
        actions += [{"type": "keyUp", "value": key} for key in reversed(keys)]
        self.call("/actions", {"actions": [{"type": "key", "id": "k", "actions": actions}]})

    def wait(self, script, expected=True):
        """Wait until the script has this value."""
        end = time.monotonic() + 10
        while (found := self.run(script)) != expected:
            assert time.monotonic() < end, f"{script} is {found!r}, not {expected!r}"
            time.sleep(0.02)

    def text(self, selector):
        """The visible text, without blank lines."""
        shown = self.run("document.querySelector(arguments[0]).innerText", selector)
        return re.sub("\n+", "\n", shown)

    def screenshot(self, width, height, dark=False):
        """PNG of the window at this size."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[feature])
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        return base64.b64decode(self.call("/screenshot"))

    def devtools(self, command, **parameters):
        return self.call("/goog/cdp/execute", {"cmd": command, "params": parameters})


@pytest.fixture(scope="module")
def browser():
    process = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        port = next(
            filter(
                None, (re.search(r"successfully on port (\d+)", line) for line in process.stdout)
            )
        )[1]
        made = Browser(f"http://127.0.0.1:{port}")
        yield made
        made.call("", method="DELETE")
    finally:
        process.terminate()
        process.wait()


ROWS = [
    Candidates("p0", "How do plants eat?", [{"text": "Light."}, {"text": "Soil."}]),
    Candidates(
        "p1",
        [{"role": "user", "content": "<b>bold?</b>"}, {"role": "assistant", "content": "yes"}],
        [{"text": "<script>document.title='hit'</script>"}, {"text": "<img src=x onerror=hit()>"}],
    ),
    Candidates("p2", "Sad?", [{"text": "Very."}, {"text": "No."}], warning="This is about death."),
]


@contextmanager
def serving(db, mode="pair", rows=ROWS, port=0, criteria=(), **options):
    """The store and the link of the first person, while a server runs."""
    options = {"annotators": ["ann"]} | options
    items, settings = make_items(rows, mode), Settings(mode, criteria)
    with (
        open_store(db, items, settings, **options) as store,
        AnnotationServer(store, port=port) as server,
    ):
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield store, server.link(store.tokens["ann"])
        finally:
            server.shutdown()
            thread.join()


def choices(db):
    return [(row["item"], row["kind"], row["choice"]) for row in read_labels(db).rows]


def shows(browser, item):
    browser.wait(f"task && task.item === {json.dumps(item)} && !busy")


def test_a_person_labels_by_keyboard_and_takes_back_after_a_restart(tmp_path, browser):
    db = tmp_path / "l.sqlite"
    with serving(db, guidelines="Be kind.\nBe brief.") as (_, link):
        port = int(re.search(r":(\d+)/", link)[1])
        browser.open(link)
        shows(browser, "p0")
        left = browser.text("#answers .answer .body")
        browser.press("?")
        browser.wait("document.getElementById('dialog').open")
        assert browser.text("#dialog") == "Guidelines, version 1\nBe kind.\nBe brief.\nClose"
        browser.press("2")  # nothing is chosen behind the dialog
        browser.press(ESCAPE)
        browser.wait("document.getElementById('dialog').open", False)
        browser.press("1")
        shows(browser, "p1")
        browser.press("b")
        browser.wait("document.getElementById('dialog').open")
        assert "This is about death." in browser.text("#dialog")
        assert not browser.run("document.getElementById('work').checkVisibility()")
        browser.press(ENTER)
        browser.wait("document.getElementById('work').checkVisibility()")
        browser.press("s")
        browser.wait("task.done")
        assert "You have seen every item" in browser.text("#end")
    first = 1 if left == "Light." else 2
    assert choices(db) == [
        *(("p0", "label", first), ("p1", "label", "both_bad"), ("p2", "skip", None))
    ]
    with serving(db, port=port) as (_, link):
        browser.press("u")
        shows(browser, "p2")
        browser.press(ENTER)
        browser.wait("document.getElementById('dialog').open", False)
        browser.press("u")
        shows(browser, "p1")
        assert browser.text("#status") == "Your last label is taken back"
        browser.open(link)  # a reload resumes at the open item
        shows(browser, "p1")
        browser.press("0")
        browser.wait("task.item", "p2")
    assert choices(db) == [("p0", "label", first), ("p1", "label", 0)]


def test_texts_are_shown_as_text_and_turns_as_turns(tmp_path, browser):
    with serving(tmp_path / "l.sqlite", rows=ROWS[1:2]) as (_, link):
        browser.open(link)
        shows(browser, "p1")
        assert browser.text("#prompt") == "user\n<b>bold?</b>\nassistant\nyes"
        shown = browser.text("#answers")
        assert "<script>document.title='hit'</script>" in shown
        assert "<img src=x onerror=hit()>" in shown
        assert browser.run("document.title") == "0 of 1 labels"
        assert (
            browser.run("document.querySelectorAll('#work img, #work script, #work b').length") == 2
        )


def test_the_eight_points_are_keys_and_buttons_with_names(tmp_path, browser):
    db = tmp_path / "l.sqlite"
    with serving(db, "likert8", ROWS[:2]) as (store, link):
        browser.open(link)
        shows(browser, "p0")
        names = browser.run(
            "[...document.querySelectorAll('#choices button')].map(x => x.ariaLabel)"
        )
        assert names[0] == "1: left is much better" and names[7] == "8: right is much better"
        browser.press("3")
        shows(browser, "p1")
        browser.run("document.querySelectorAll('#choices button')[7].click()")
        browser.wait("task.done")
        orders = [store.order(store.items[name], "ann") for name in ("p0", "p1")]
    expected = [c if order == [0, 1] else 9 - c for c, order in zip((3, 8), orders)]
    assert [choice for *_, choice in choices(db)] == expected


def test_a_ranking_with_a_tie_by_keys_and_by_menus(tmp_path, browser):
    db = tmp_path / "l.sqlite"
    rows = [Candidates(f"r{i}", "Rank.", [{"text": x} for x in "abc"]) for i in range(2)]
    with serving(db, "rank", rows) as (store, link):
        browser.open(link)
        shows(browser, "r0")
        browser.press(ENTER)
        assert browser.text("#alert") == "Give each answer a rank first."
        for key in ("1", BACKSPACE, "3", "1", "=", "2", ENTER):
            browser.press(key)
        shows(browser, "r1")
        browser.run(
            "document.querySelectorAll('select').forEach((x, i) => "
            "{ x.value = i + 1; x.dispatchEvent(new Event('change')); })"
        )
        browser.run("document.querySelector('#choices button').click()")
        browser.wait("task.done")
        shown = [[2, 2, 1], [1, 2, 3]]
        orders = [store.order(store.items[name], "ann") for name in ("r0", "r1")]
    expected = [
        [dict(zip(order, ranks))[i] for i in range(3)] for order, ranks in zip(orders, shown)
    ]
    assert [choice for *_, choice in choices(db)] == expected


def test_an_answer_is_written_from_a_draft_that_survives_a_reload(tmp_path, browser):
    db = tmp_path / "l.sqlite"
    with serving(db, "write", ROWS[:1]) as (_, link):
        browser.open(link)
        shows(browser, "p0")
        browser.run("document.querySelector('#answers button').click()")
        for key in " us1":
            browser.press(key)
        browser.open(link)
        shows(browser, "p0")
        draft = browser.run("document.getElementById('text').value")
        assert draft.endswith(". us1")
        browser.run("document.getElementById('text').focus()")
        browser.press(CONTROL, ENTER)
        browser.wait("task.done")
    assert choices(db) == [("p0", "label", draft)]


def test_every_criterion_is_rated_before_a_choice(tmp_path, browser):
    db = tmp_path / "l.sqlite"
    with serving(db, "pair", ROWS[:1], criteria=("helpful", "honest")) as (store, link):
        browser.open(link)
        shows(browser, "p0")
        browser.press("1")
        assert browser.text("#alert") == "Rate helpful of each answer first."
        assert browser.run("document.activeElement.name") == "rating-helpful-0"
        for name, value in (("helpful-0", 5), ("helpful-1", 2), ("honest-0", 4), ("honest-1", 1)):
            browser.run(f"document.getElementsByName('rating-{name}')[{value - 1}].click()")
        browser.press("1")
        browser.wait("task.done")
        swapped = store.order(store.items["p0"], "ann") == [1, 0]
    (row,) = read_labels(db).rows
    expected = {"helpful": [5, 2], "honest": [4, 1]}
    assert row["ratings"] == {k: v[::-1] if swapped else v for k, v in expected.items()}


def test_a_second_window_on_one_link_is_told_so(tmp_path, browser):
    with serving(tmp_path / "l.sqlite") as (_, link):
        browser.open(link)
        shows(browser, "p0")
        first = browser.call("/window")
        browser.call("/window", browser.call("/window/new", {"type": "tab"}) | {})
        browser.open(link)
        browser.wait("document.getElementById('dialog').open")
        assert "ann is labelling in another window" in browser.text("#dialog")
        browser.press(ENTER)
        shows(browser, "p0")
        browser.call("/window", method="DELETE")
        browser.call("/window", {"handle": first})
        browser.press("1")  # the label waits until the person says who they are
        browser.wait("document.getElementById('dialog').open")
        browser.press(ENTER)
        shows(browser, "p1")


def test_a_label_is_sent_again_when_the_server_is_back(tmp_path, browser):
    db = tmp_path / "l.sqlite"
    with serving(db) as (_, link):
        port = int(re.search(r":(\d+)/", link)[1])
        browser.open(link)
        shows(browser, "p0")
    browser.press("0")
    browser.wait("document.getElementById('alert').hidden", False)
    assert browser.text("#alert") == "The server does not answer. Trying again."
    with serving(db, port=port):
        shows(browser, "p1")
    assert choices(db) == [("p0", "label", 0)]


def test_the_page_fits_a_phone_and_the_dark(tmp_path, browser):
    with serving(tmp_path / "l.sqlite") as (_, link):
        browser.open(link)
        shows(browser, "p0")
        light = browser.screenshot(390, 800)
        wide = "document.documentElement.scrollWidth"
        assert browser.run(wide) == 390
        boxes = browser.run(
            "[...document.querySelectorAll('.answer')].map(x => x.getBoundingClientRect().left)"
        )
        assert boxes[0] == boxes[1]  # one below the other
        style = "getComputedStyle(document.body).backgroundColor"
        colours = [browser.run(style)]
        dark = browser.screenshot(390, 800, dark=True)
        colours.append(browser.run(style))
    assert light[:4] == dark[:4] == b"\x89PNG" and light != dark
    assert colours == ["rgb(246, 246, 243)", "rgb(21, 24, 27)"]


def test_a_screen_reader_finds_names_and_keys(tmp_path, browser):
    with serving(tmp_path / "l.sqlite", rows=ROWS[:1], criteria=("kind",)) as (_, link):
        browser.open(link)
        shows(browser, "p0")
        browser.devtools("Accessibility.enable")
        nodes = browser.devtools("Accessibility.getFullAXTree")["nodes"]
    found = {
        (node["role"]["value"], node["name"]["value"])
        for node in nodes
        if not node["ignored"] and node.get("name", {}).get("value")
    }
    assert {
        ("heading", "Prompt"),
        ("region", "Left answer"),
        ("region", "Right answer"),
        ("group", "kind of the left answer, 1 is worst, 5 is best"),
        ("radio", "3"),
        ("group", "Your choice"),
        ("progressbar", "0 of 1 labels"),
    } <= found
    buttons = {name for role, name in found if role == "button"}
    choices = {"Left is better", "Right is better", "Tie", "Both are bad"}
    assert buttons == choices | {"Undo", "Skip", "Guidelines"}
    keys = (
        "[...document.querySelectorAll('button[aria-keyshortcuts]')].map(x => x.ariaKeyShortcuts)"
    )
    assert browser.run(keys) == ["u", "s", "?", "1", "2", "0", "b"]
