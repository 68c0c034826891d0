"""The client against a server on this machine: retries, refusals, cache, secrecy of keys."""

import datetime
import email.utils
import json
import socket

import pytest

from rlhf_core.feedback.endpoint import Endpoint, JudgeError, RequestError
from rlhf_core.feedback.verdicts import Reply

KEY = "sk-secret"


@pytest.fixture
def server(judge_server):
    return judge_server()


def endpoint(server, waits=None, **options):
    sleep = (lambda seconds: None) if waits is None else waits.append
    return Endpoint(server.url, sleep=sleep, **options)


def text(reply):
    return reply.text


def test_a_reply_has_text_and_log_probs_of_both_kinds_of_endpoint(server):
    top = [{"token": "A", "logprob": -0.5}, {"token": "B", "logprob": -1}]
    content = {"content": [{"token": "A", "logprob": -0.5, "top_logprobs": top}]}
    server.replies = [{"choices": [{"message": {"content": "A"}, "logprobs": content}]}]
    expected = Reply("A", [("A", {"A": -0.5, "B": -1.0})])
    assert endpoint(server).complete("q", 5, lambda reply: reply) == expected
    path, _, body = server.requests[-1]
    assert path == "/v1/chat/completions" and body["messages"][0]["content"] == "q"
    logprobs = {"tokens": ["A"], "token_logprobs": [-0.5], "top_logprobs": [{"A": -0.5, "B": -1.0}]}
    server.replies = [{"choices": [{"text": "A", "logprobs": logprobs}]}]
    plain = Endpoint(f"{server.url}/v1/completions#tiny")
    assert plain.complete("q", 5, lambda reply: reply) == expected
    path, _, body = server.requests[-1]
    assert path == "/v1/completions" and (body["prompt"], body["model"]) == ("q", "tiny")


def test_what_may_pass_is_tried_again_with_growing_waits(server):
    waits = []
    server.replies = [500, b"not JSON", b'{"choices": [{"mess', b"[]", None, "A"]
    assert endpoint(server, waits).complete("q", 5, text) == "A"
    assert len(waits) == 5
    assert all(2**i / 4 <= wait <= 2**i / 2 for i, wait in enumerate(waits))
    again = []
    server.replies = [500, "A"]
    endpoint(server, again).complete("q", 5, text)
    assert again == waits[:1]  # seeded


def test_a_server_that_is_busy_says_how_long_to_wait(server):
    waits, later = [], datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=90)
    after = ("7", email.utils.format_datetime(later, usegmt=True), "99999", "soon", "nan")
    server.replies = [*((429, {"Retry-After": value}) for value in after), "A"]
    assert endpoint(server, waits).complete("q", 5, text) == "A"
    assert waits[0] == 7 and 80 < waits[1] <= 90 and waits[2] == 300
    assert waits[3] <= 4 and waits[4] <= 8  # its own


def test_attempts_end(server):
    server.replies = [503] * 3
    with pytest.raises(RequestError, match=r"chat/completions: status 503: .*; 3 attempts"):
        endpoint(server, retries=2).complete("q", 5, text)


def test_a_slow_server_is_a_failure(server):
    server.replies = [0.3, 0.3]
    with pytest.raises(RequestError, match="timed out; 2 attempts"):
        endpoint(server, retries=1, timeout=0.05).complete("q", 5, text)


def test_a_server_that_is_down_is_a_failure():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    down = Endpoint(f"http://127.0.0.1:{port}", retries=0)
    with pytest.raises(RequestError, match=r"refused.*; 1 attempts"):
        down.complete("q", 5, text)


@pytest.mark.parametrize(
    "status, remedy",
    [(401, "Set the API key in OTHER_KEY"), (404, "Check the path and the model"), (302, "")],
)
def test_a_server_that_refuses_every_request_stops_at_once(server, status, remedy):
    server.replies = [(status, {"Location": "http://127.0.0.1:1/elsewhere"}), "A"]
    with pytest.raises(JudgeError, match=f"status {status}.*{remedy}"):
        endpoint(server, key_env="OTHER_KEY").complete("q", 5, text)
    assert len(server.requests) == 1


def test_fields_that_a_server_rejects_are_left_out(server):
    rejected = "unsupported: logprobs, temperature; use max_completion_tokens"
    server.replies = [(400, {}, rejected), "A", "B", (400, {}, rejected)]
    asked = endpoint(server)
    assert [asked.complete(x, 5, text) for x in "pq"] == ["A", "B"]
    for _, _, body in server.requests[1:]:
        assert body["max_completion_tokens"] == 5
        assert not body.keys() & {"logprobs", "top_logprobs", "temperature", "max_tokens"}
    with pytest.raises(RequestError, match="status 400"):
        asked.complete("r", 5, text)


def test_the_cache_is_keyed_by_everything_that_matters(server, tmp_path):
    def ask(prompt="q", tokens=5, suffix="", **options):
        asked = Endpoint(server.url + suffix, cache=tmp_path / "cache", **options)
        return asked.complete(prompt, tokens, text)

    variants = [{}, {"prompt": "r"}, {"tokens": 6}, {"suffix": "#m"}, {"suffix": "/v2"}]
    variants += [{"top_logprobs": 3}]
    server.replies = list("ABCDEF")
    first = [ask(**variant) for variant in variants]
    assert first == list("ABCDEF") and [ask(**variant) for variant in variants] == first
    assert len(server.requests) == 6


def test_a_reply_that_cannot_be_read_is_not_kept(server, tmp_path):
    def strict(reply):
        if reply.text != "A":
            raise ValueError("no verdict")
        return reply.text

    server.replies = ["?", "A"]
    asked = endpoint(server, cache=tmp_path)
    with pytest.raises(RequestError, match=r"no verdict; the reply is '\?'"):
        asked.complete("q", 5, strict)
    assert not list(tmp_path.iterdir())
    assert asked.complete("q", 5, strict) == "A"
    (file,) = tmp_path.rglob("*.json")
    file.write_text('{"url": ')  # a damaged file is asked for again
    server.replies = ["A"]
    assert asked.complete("q", 5, strict) == "A" and len(server.requests) == 3
    assert json.loads(file.read_text())["reply"]["choices"][0]["message"]["content"] == "A"


def test_the_key_is_sent_and_shown_nowhere(server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    asked = endpoint(server, key_env="JUDGE_KEY", cache=tmp_path)
    server.replies = ["A", (401, {}, f"bad key {KEY}")]
    asked.complete("q", 5, text)
    assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"
    with pytest.raises(JudgeError, match=r"bad key \*\*\*") as caught:
        asked.complete("r", 5, text)
    assert KEY not in str(caught.value)
    assert all(KEY not in file.read_text() for file in tmp_path.rglob("*.json"))


def test_a_key_goes_only_over_https_or_to_this_machine(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    Endpoint("https://example.com"), Endpoint("http://localhost:1"), Endpoint("http://[::1]:1")
    with pytest.raises(ValueError, match="OPENAI_API_KEY would be sent unencrypted"):
        Endpoint("http://example.com")
    Endpoint("http://example.com", key_env="")
    monkeypatch.setenv("OPENAI_API_KEY", "a\nb")
    with pytest.raises(ValueError, match="OPENAI_API_KEY has characters that no header can hold"):
        Endpoint("https://example.com")


@pytest.mark.parametrize(
    "url, message",
    [
        ("ftp://x", "must be http"),
        ("http://", "must be http"),
        ("https://me:pw@x", "no password or query"),
        ("http://me:pw@", "no password or query"),
        ("https://x/v1?key=pw", "no password or query"),
    ],
)
def test_a_bad_url_is_an_error_without_its_secrets(url, message):
    with pytest.raises(ValueError, match=message) as caught:
        Endpoint(url)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_paths_are_completed(path):
    assert Endpoint(f"http://localhost:8000{path}#m").url == (
        "http://localhost:8000/v1/chat/completions"
    )
