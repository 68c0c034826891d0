"""JSON over HTTP: one attempt, what its failure means, and the wait before the next one.

Redirects are failures, because they would carry the headers elsewhere. Left out: streaming, and
proxies that need a password.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_core.files import parse_json

LONGEST_WAIT = 300.0  # seconds between two attempts
FAILURES = (OSError, http.client.HTTPException, ValueError)  # of `Client.send`
_LARGEST = 2**24  # bytes of a reply
_AGAIN = {408, 409, 425, 429}  # statuses that may pass, beside those from 500 on


class Client:
    """Sends JSON objects and reads JSON objects."""

    def __init__(
        self,
        timeout: float,
        sleep: Callable[[float], Any] = time.sleep,
        *,
        headers: Mapping[str, str] | None = None,
        longest_wait: float = LONGEST_WAIT,
        seed: int = 0,
    ):
        """
        Args:
            timeout: seconds without data after which an attempt has failed.
            sleep: waits for seconds.
            headers: of every request.
            longest_wait: seconds between two attempts at most.
            seed: of the random part of waits.
        """
        own = {"Content-Type": "application/json", "User-Agent": "rlhf-core"}
        self.timeout, self.headers, self.longest_wait = (
            timeout,
            {**own, **(headers or {})},
            longest_wait,
        )
        self._sleep, self._random = sleep, random.Random(seed)
        self._opener = urllib.request.build_opener(_NoRedirect)

    def send(
        self, url: str, body: Mapping[str, Any] | None = None, timeout: float | None = None
    ) -> dict[str, Any]:
        """The reply to one POST of the body, or to a GET without one; timeout None: the client's.

        Raises:
            urllib.error.HTTPError: the status is not 200.
            OSError, http.client.HTTPException: there is no answer.
            ValueError: the answer is not a JSON object.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, self.headers)
        with self._opener.open(request, timeout=timeout or self.timeout) as response:
            text = response.read(_LARGEST).decode()
        reply = parse_json(text)
        if not isinstance(reply, dict):
            raise ValueError(f"the reply is not a JSON object: {text[:80]!r}")
        return reply

    def wait(self, attempt: int, asked: float | None = None) -> float:
        """Wait after a failed attempt (1, 2, ...), and return the seconds.

        They double from half a second, less a random part of at most a half, unless the server has
        `asked` for more.
        """
        wait = 0.5 * 2 ** (attempt - 1) * (1 - self._random.random() / 2)
        wait = min(max(wait, asked or 0), self.longest_wait)
        self._sleep(wait)
        return wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_) -> None:
        return None


def may_pass(status: int) -> bool:
    """Whether the same request may get another status later."""
    return status in _AGAIN or status >= 500


def reason_of(error: Exception) -> str:
    """Why there is no answer, as text."""
    return str(getattr(error, "reason", None) or error) or repr(error)


def retry_after(error: urllib.error.HTTPError) -> float | None:
    """Seconds that the header Retry-After asks to wait: a number, or a date."""
    value = error.headers.get("Retry-After")
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
