"""JSON over HTTP against a server on this machine. test_endpoint.py has the retries."""

import datetime
import email.message
import email.utils
import urllib.error

import pytest

from rlhf_core.remote import FAILURES, Client, may_pass, reason_of, retry_after


def test_an_object_goes_out_and_comes_back(judge_server):
    server = judge_server([b'{"answer": 42}'])
    client = Client(5.0, headers={"X-Key": "k"})
    assert client.send(f"{server.url}/path", {"question": "é"}) == {"answer": 42}
    path, headers, body = server.requests[-1]
    assert (path, body, headers["X-Key"]) == ("/path", {"question": "é"}, "k")
    assert headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    "reply", [b"", b"[1]", b"{", b"NaN", None, 0.4, 500, (302, {"Location": "/"})]
)
def test_anything_else_is_a_failure(reply, judge_server):
    server = judge_server([reply, b"{}"])
    with pytest.raises(FAILURES) as error:
        Client(60.0).send(server.url, {}, timeout=0.1)
    assert reason_of(error.value)
    assert len(server.requests) == 1  # a redirect is not followed


def test_waits_double_and_end_at_the_longest():
    waits = []
    client = Client(1.0, waits.append, longest_wait=10.0)
    assert [client.wait(attempt) for attempt in range(1, 9)] == waits
    assert all(min(2**i / 4, 10) <= wait <= min(2**i / 2, 10) for i, wait in enumerate(waits))
    assert client.wait(1, asked=7.0) == 7 and client.wait(1, asked=70.0) == 10


def test_statuses_that_may_pass():
    assert all(map(may_pass, (408, 409, 425, 429, 500, 503, 599)))
    assert not any(map(may_pass, (301, 400, 401, 404, 413, 422)))


def test_the_header_that_asks_to_wait():
    def asked(value):
        headers = email.message.Message()
        if value is not None:
            headers["Retry-After"] = value
        return retry_after(urllib.error.HTTPError("http://a", 429, "", headers, None))

    later = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=90)
    assert asked("7") == 7.0
    assert 80 < asked(email.utils.format_datetime(later, usegmt=True)) <= 90
    assert asked(None) is asked("soon") is None
