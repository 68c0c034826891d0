"""A client of OpenAI-compatible endpoints: completions with retries and a cache on the disk.

An API key comes from the environment alone. It is sent as a header, over HTTPS or to this machine,
and is in no file, log or message. Left out: streaming, and proxies that need a password.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import math
import os
import threading
import urllib.error
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from rlhf_core.feedback.rewards import RewardError
from rlhf_core.feedback.verdicts import Reply
from rlhf_core.files import read_json, write_json
from rlhf_core.remote import FAILURES, Client, may_pass, reason_of, retry_after

Value = TypeVar("Value")
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError)  # of replies


class JudgeError(RewardError):
    """The judge cannot go on: it is set up wrongly, or fails too often."""


class RequestError(RuntimeError):
    """One request has failed for good."""


class Endpoint:
    """Completions of a model behind a URL."""

    def __init__(
        self,
        url: str,
        *,
        key_env: str = "OPENAI_API_KEY",
        cache: str | os.PathLike | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        top_logprobs: int = 20,
        sleep: Callable[[float], Any] | None = None,
        seed: int = 0,
    ):
        """
        Args:
            url: http(s)://HOST[/PATH][#MODEL]. A path that does not end with "completions" gets
                the rest of /v1/chat/completions. A path /v1/completions gets the prompt as text.
            key_env: environment variable with the API key. An unset or empty one sends no key.
            cache: folder that keeps replies, so that no request is paid twice; None: none.
            timeout: seconds without data after which an attempt has failed.
            retries: attempts after the first one. The wait doubles from half a second, less a
                random part of at most a half, unless the server asks for a longer one.
            top_logprobs: likely tokens to ask for. A server that rejects them is asked without.
            sleep: waits for seconds; None: as time.sleep, but `close` ends it.
            seed: of the random part of waits.

        Raises:
            ValueError: the URL is malformed, or would get the key unencrypted.
        """
        parts = urllib.parse.urlsplit(url)
        if "@" in parts.netloc or parts.query:
            raise ValueError(
                f"the judge's URL at {parts.hostname} may hold no password or query. Set the key "
                f"in the environment variable {key_env or 'OPENAI_API_KEY'}"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"a judge's URL must be http(s)://HOST[/PATH][#MODEL], got {url!r}")
        if not 0 < timeout < math.inf or retries < 0:
            raise ValueError(
                f"timeout must be positive and retries at least 0, got {timeout} and {retries}"
            )
        path = parts.path.rstrip("/")
        if not path.endswith("completions"):
            path += "/chat/completions" if path.endswith("/v1") else "/v1/chat/completions"
        self.url = urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", ""))
        self.model, self.chat = parts.fragment or None, path.endswith("/chat/completions")
        self._key = os.environ.get(key_env, "").strip() if key_env else ""
        self.key_env = key_env
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError(f"the key in {key_env} has characters that no header can hold")
        if self._key and parts.scheme == "http" and not _is_local(parts.hostname):
            raise ValueError(
                f"{self.url}: the key in {key_env} would be sent unencrypted. Use https, or name "
                "another environment variable for this server's key"
            )
        self.cache = None if cache is None else Path(cache)
        self.retries, self.top_logprobs = retries, top_logprobs
        self._closed, self._reason = threading.Event(), ""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = Client(timeout, sleep or self._closed.wait, headers=headers, seed=seed)
        self._changes: set[str] = set()  # that this server has asked for

    def close(self, reason: str = "closed") -> None:
        """End all waits, and answer nothing more. What is under way fails at its next attempt."""
        self._reason = reason
        self._closed.set()

    def complete(self, prompt: str, max_tokens: int, read: Callable[[Reply], Value]) -> Value:
        """What `read` makes of the model's reply. The cache keeps replies that it can read.

        Raises:
            RequestError: the request has failed, or `read` raised ValueError.
            JudgeError: the server refuses all requests, such as those with this key or model.
        """
        body = self._body(prompt, max_tokens)
        file, reply = self._file(body), None
        if file is not None and file.is_file():
            with contextlib.suppress(*_UNREADABLE):
                kept = read_json(file)
                if kept["url"] == self.url and kept["request"] == body:
                    return read(self._reply(kept["reply"]))
        try:
            raw = self._send(body)
            reply = self._reply(raw)
            value = read(reply)
        except _UNREADABLE as error:
            shown = f"; the reply is {reply.text!r:.100}" if reply else ""
            raise RequestError(f"{self.url}: {self._masked(error)}{shown}") from None
        if file is not None:
            write_json(file, {"url": self.url, "request": body, "reply": raw})
        return value

    def _body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        body: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0}
        if self.model:
            body["model"] = self.model
        if self.chat:
            messages = [{"role": "user", "content": prompt}]
            return body | {
                "messages": messages,
                "logprobs": True,
                "top_logprobs": self.top_logprobs,
            }
        return body | {"prompt": prompt, "logprobs": self.top_logprobs}

    def _file(self, body: dict[str, Any]) -> Path | None:
        """Where the cache keeps the reply."""
        if self.cache is None:
            return None
        key = hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()
        return self.cache / key[:2] / f"{key}.json"

    def _reply(self, raw: dict[str, Any]) -> Reply:
        choice = raw["choices"][0]
        text = choice["message"]["content"] if self.chat else choice["text"]
        if not isinstance(text, str):
            raise ValueError("the reply has no text")
        return Reply(text, _tokens(choice.get("logprobs")))

    # ---- requests

    def _send(self, body: dict[str, Any]) -> dict[str, Any]:
        attempt = 0
        while True:
            if self._closed.is_set():
                raise JudgeError(f"{self.url}: {self._reason}")
            changes, asked = set(self._changes), None
            try:
                return self._client.send(self.url, _changed(body, changes))
            except urllib.error.HTTPError as error:
                detail = self._masked(error.read(2000).decode(errors="replace"))
                reason = f"status {error.code}: {' '.join(detail.split())[:200] or error.reason}"
                if error.code in (400, 422):
                    if changes != self._changes or self._adapt(body, changes, detail):
                        continue
                    raise RequestError(f"{self.url}: {reason}") from None
                if error.code == 413:
                    raise RequestError(f"{self.url}: {reason}") from None
                if not may_pass(error.code) or "insufficient_quota" in detail:
                    self.close(reason + self._remedy(error.code))  # for all threads
                    continue  # to the JudgeError
                asked = retry_after(error)
            except FAILURES as error:
                reason = self._masked(reason_of(error))
            attempt += 1
            if attempt > self.retries:
                raise RequestError(f"{self.url}: {reason}; {attempt} attempts")
            self._client.wait(attempt, asked)

    def _adapt(self, body: dict[str, Any], changes: set[str], detail: str) -> bool:
        """Whether the next attempt can leave out, or rename, a field that the server rejects."""
        names = [name for name in ("logprobs", "temperature") if name in detail]
        if "max_completion_tokens" in detail:
            names.append("max_tokens")
        new = [name for name in names if name in body and name not in changes]
        self._changes.update(new)
        return bool(new)

    def _remedy(self, status: int) -> str:
        if status in (401, 403):
            return f". Set the API key in {self.key_env}" if self.key_env else ""
        if status == 404:
            return ". Check the path and the model: http(s)://HOST/v1#MODEL"
        return ""

    def _masked(self, text: object) -> str:
        return str(text).replace(self._key, "***") if self._key else str(text)


def _changed(body: dict[str, Any], changes: set[str]) -> dict[str, Any]:
    """The request without fields that the server rejects, or with their other names."""
    body = dict(body)
    if "logprobs" in changes:
        body.pop("logprobs", None)
        body.pop("top_logprobs", None)
    if "temperature" in changes:
        body.pop("temperature", None)
    if "max_tokens" in changes:
        body["max_completion_tokens"] = body.pop("max_tokens")
    return body


def _tokens(logprobs: dict[str, Any] | None) -> list[tuple[str, dict[str, float]]]:
    """The tokens of a reply as in `Reply`, of /chat/completions or of /completions."""
    if not logprobs:
        return []
    if rows := logprobs.get("content"):
        listed = ({x["token"]: x["logprob"] for x in row.get("top_logprobs") or ()} for row in rows)
        parts = [({row["token"]: row["logprob"]}, top) for row, top in zip(rows, listed)]
    else:
        tokens, own = logprobs.get("tokens") or (), logprobs.get("token_logprobs") or ()
        tops = logprobs.get("top_logprobs") or [{}] * len(tokens)
        parts = [({token: x}, top or {}) for token, x, top in zip(tokens, own, tops)]
    return [(next(iter(token)), _numbers(token | top)) for token, top in parts]


def _numbers(logprobs: dict[str, Any]) -> dict[str, float]:
    return {token: float(x) for token, x in logprobs.items() if isinstance(x, float | int)}


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
