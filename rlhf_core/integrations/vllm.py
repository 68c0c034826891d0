"""A vLLM server samples from the policy: `Engine("http://host:8000")` is an engine for trainers.

    vllm serve MODEL --logprobs-mode processed_logprobs --dtype float32   # VLLM_SERVER_DEV_MODE=1

Token ids go in and out, with one seed a row and the log-prob of every sampled token. After each
change of the policy its weights are written to a folder, from which the server reloads them. Then
the server's log-probs of fixed rows must be the model's, so that an engine that keeps an old head,
or anything else, is an error and not a biased gradient. They are compared again after every batch,
which finds a server that has restarted meanwhile: it gets the weights again, and the batch is
sampled again with the same seeds.

The protocol is vLLM's own (0.32): /v1/models, /v1/completions, /tokenize, and with
VLLM_SERVER_DEV_MODE=1 /pause, /collective_rpc, /reset_prefix_cache and /resume. Left out: API keys,
weights over NCCL, several servers, truncated sampling (top_k, top_p, min_p).
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import uuid
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from rlhf_core.checks import check_own
from rlhf_core.data import Tokenizer
from rlhf_core.data.collate import unknown_id
from rlhf_core.generation import EngineError, Generation, Stops
from rlhf_core.models import Transformer, TransformerConfig, eval_mode
from rlhf_core.models.lora import adapters_off, has_adapters
from rlhf_core.remote import FAILURES, Client, may_pass, reason_of, retry_after

Item, Result = TypeVar("Item"), TypeVar("Result")

TOLERANCE = 1e-4  # nats; float32 on both sides differs by some 1e-5
LEAST_TEMPERATURE = 0.01  # vLLM raises lower ones to this, except 0
LONGEST_WAIT = 15.0  # seconds between two attempts: a restart takes a minute
HELLO_TIMEOUT = 30.0  # seconds, of requests that are sent once
RESTARTS = 3  # of the server in one batch
PROBES, PROBE_LENGTH = 4, 16  # fixed rows whose log-probs are compared
DEV_MODE = "start it with VLLM_SERVER_DEV_MODE=1 in its environment"
RAW = "the server needs --logprobs-mode processed_logprobs"
# A server takes what a request leaves out from the model's generation_config.json.
_NEUTRAL = {
    "top_k": -1,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
_SENTENCE = "Hello, world! 42 naïve 日本"
_UNREADABLE = (LookupError, TypeError, AttributeError)  # of replies, beside FAILURES
_PARTS: dict[str, Callable[[str], bool]] = {
    "its old output head": lambda name: name == "lm_head.weight",
    "its old token embedding": lambda name: name == "trunk.embed.weight",
    "its old final norm": lambda name: name.startswith("trunk.norm."),
    "its old embedding and output head": lambda name: "blocks" not in name,
    "all of its old weights": lambda name: True,
}


class Row(NamedTuple):
    """A response: its token ids, their log-probs, and whether EOS or a stop string ended it."""

    ids: list[int]
    logprobs: list[float]
    ended: bool


class Engine:
    """A vLLM server as `generation.Engine`. Its methods run one at a time."""

    def __init__(
        self,
        url: str,
        *,
        folder: str | os.PathLike | None = None,
        requests: int = 64,
        timeout: float = 600.0,
        patience: float = 300.0,
        tolerance: float = TOLERANCE,
        sleep: Callable[[float], Any] = time.sleep,
    ):
        """
        Args:
            url: http(s)://HOST:PORT of the server.
            folder: where weights are written, which the server must see under the same path; None:
                the folder of temporary files. Every run has a folder of its own there, which it
                removes at the end.
            requests: rows sampled at a time, >= 1; a server with more room is faster with more.
            timeout: seconds that one request may take, the sampling of a whole response included.
            patience: seconds for which a server that fails, or restarts, is asked again.
            tolerance: largest difference of a log-prob in nats after the weights are loaded. A
                server in bfloat16 needs some 0.1.
            sleep: waits for seconds.

        Raises:
            ValueError: an argument is out of range.
        """
        parts = urllib.parse.urlsplit(url)
        plain = parts.path.strip("/") in ("", "v1") and not (parts.query or parts.fragment)
        if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
            raise ValueError(f"an engine's URL must be http(s)://HOST[:PORT], got {url!r}")
        if "@" in parts.netloc:
            raise ValueError(f"the engine's URL at {parts.hostname} may hold no password")
        for name, value in (("timeout", timeout), ("patience", patience), ("tolerance", tolerance)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if requests < 1:
            raise ValueError(f"requests must be at least 1, got {requests}")
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"the engine's folder {folder} is not a directory: create it first")
        self.url = f"{parts.scheme}://{parts.netloc}"
        self.requests, self.patience, self.tolerance = requests, patience, tolerance
        self.parent = Path(tempfile.gettempdir() if folder is None else folder).absolute()
        self.folder: Path | None = None  # of this run, inside it
        self.loads = 0  # how often the server has got weights
        self._client = Client(timeout, sleep, longest_wait=LONGEST_WAIT)
        self._lock = threading.RLock()
        self._loaded: dict[str, int] | None = None  # `_fingerprint` of the weights
        self._started = False

    # ---- weights

    def start(self, model: Transformer, tokenizer: Tokenizer | None = None) -> None:
        """Check that the server can sample from the model, and load its weights.

        Raises:
            EngineError: there is no vLLM server, it serves a model of another vocabulary or
                tokenizer, cannot reload, or its log-probs are not the model's.
        """
        with self._lock:
            self._hello()
            self._check_vocabulary(model)
            if tokenizer is not None:
                self._check_tokenizer(tokenizer)
            self._started = True
            try:
                self.load(model)
                self._check_temperature(model)
            except BaseException:
                self._started, self._loaded = False, None
                raise

    def load(self, model: Transformer) -> None:
        """Give the server the model's weights, merged with adapters, unless it has them.

        Raises:
            EngineError: the server does not reload them, or other log-probs come out.
        """
        check_own(model)
        if not isinstance(model, Transformer):
            raise ValueError(
                f"an engine samples from a Transformer, not from a {type(model).__name__}"
            )
        with self._lock:
            if not self._started:
                self.start(model)
                return
            fingerprint = _fingerprint(model)
            if fingerprint == self._loaded:
                return
            self._loaded = None
            self._write(model)
            self._config, self._expected = model.config, _logprobs(model, _probes(model.config))
            self._reload(model)
            self._loaded = fingerprint

    def _write(self, model: Transformer) -> None:
        """Write a new folder of weights. The one before it stays, for `_stale_part`."""
        if self.folder is None:
            folder = self.parent / f"rlhf-core-engine-{uuid.uuid4().hex[:12]}"
            folder.mkdir()
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self.folder = folder
        self.loads += 1
        # vLLM builds a tied head from the embedding when it starts, and not again when it reloads.
        model.plain_copy().save_pretrained(self._weights(self.loads))
        shutil.rmtree(self._weights(self.loads - 2), ignore_errors=True)

    def _weights(self, number: int) -> Path:
        return self.folder / f"weights-{number}"

    def _reload(self, model: Transformer | None = None) -> None:
        """Let the server read the newest folder, and compare its log-probs.

        model: with these weights, for the error's message; None while it may be training.
        """
        folder = str(self._weights(self.loads))
        request = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        self._ask("/pause", {})
        try:
            self._ask("/collective_rpc", request, may_pass=_never)
        except BaseException as error:
            with contextlib.suppress(EngineError):  # the first error matters more
                self._ask("/resume", {}, patience=0)
            if not isinstance(error, EngineError):
                raise
            raise EngineError(
                f"{error}. The server could not load {folder}: see its log, and restart it if it "
                "has stopped. If it cannot see this folder, choose one that it can (folder=, or "
                "--engine-folder). If it serves another model, start it with this one"
            ) from None
        self._ask("/reset_prefix_cache", {})
        self._ask("/resume", {})
        self._salt = uuid.uuid4().hex
        found = self._measured()
        error = _difference(found, self._expected)
        if not error <= self.tolerance:
            part = self._stale_part(found, model)
            cause = "It serves another model, or computes in another dtype than --dtype float32"
            if part is not None:
                cause = f"It has kept {part}"
            raise EngineError(
                f"{self.url}: after loading weights its log-probs differ from the model's by "
                f"{error:.3g} nats, more than {self.tolerance:g}. {cause}"
            )

    def _measured(self) -> Tensor:
        """The server's log-probs of the fixed rows."""
        rows = _probes(self._config)
        request = {"model": self._name, "prompt": rows, "max_tokens": 1, "prompt_logprobs": 0}

        def read(reply: dict[str, Any]) -> Tensor:
            choices = sorted(reply["choices"], key=lambda choice: choice["index"])
            found = [
                [float(x[str(token)]["logprob"]) for x, token in zip(logprobs[1:], row[1:])]
                for row, logprobs in zip(rows, (x["prompt_logprobs"] for x in choices), strict=True)
            ]
            return torch.tensor(found)

        return self._ask("/v1/completions", request, read)

    def _stale_part(self, found: Tensor, model: Transformer | None) -> str | None:
        """The part of the weights that the server has not loaded, if one explains `found`."""
        rows, folders = _probes(self._config), [self._weights(self.loads - i) for i in (0, 1)]

        def explains(candidate: Transformer) -> bool:
            return _difference(found, _logprobs(candidate, rows)) <= self.tolerance

        if model is not None and has_adapters(model):
            with adapters_off(model):
                if explains(model):
                    return "the base model without the adapters"
        if not folders[1].is_dir():
            return None
        candidate, old = (Transformer.from_pretrained(folder) for folder in folders)
        new = {name: x.clone() for name, x in candidate.state_dict().items()}
        old = old.state_dict()
        for part, belongs in _PARTS.items():
            candidate.load_state_dict({x: old[x] if belongs(x) else new[x] for x in new})
            if explains(candidate):
                return part
        layers = {name.split(".")[2] for name in new if name.startswith("trunk.blocks.")}
        for layer in sorted(layers, key=int):
            prefix = f"trunk.blocks.{layer}."
            candidate.load_state_dict({x: (old if x.startswith(prefix) else new)[x] for x in new})
            if explains(candidate):
                return f"its old block {layer}"
        return None

    # ---- sampling

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        max_new_tokens: int,
        num_samples: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        eos_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        tokenizer: Tokenizer | None = None,
    ) -> Generation:
        """Sample from the loaded weights; arguments as for `generation.Engine.generate`.

        Raises:
            ValueError: an option is out of range or not supported, or a row is too long.
            EngineError: no weights are loaded, or the server fails for longer than `patience`.
        """
        stops = Stops(eos_ids, stop_strings, tokenizer, 0)
        with self._lock:
            if not self.loads:
                raise EngineError(f"{self.url}: no weights are loaded; call load(model) first")
            truncation = dict(top_k=top_k, top_p=top_p, min_p=min_p)
            self._check_options(prompts, max_new_tokens, num_samples, temperature, truncation)
            size = self._config.vocab_size
            if any(not 0 <= token < size for token in stops.eos_ids):
                raise ValueError(f"eos_ids must be in [0, {size}), got {sorted(stops.eos_ids)}")
            repeated = [list(prompt) for prompt in prompts for _ in range(num_samples)]
            if len(seeds) != len(repeated):
                raise ValueError(f"there are {len(seeds)} seeds for {len(repeated)} rows")
            options = {
                "model": self._name,
                "max_tokens": max_new_tokens,
                "temperature": temperature,
                **_NEUTRAL,
                "logprobs": 0,
                "return_token_ids": True,
                "ignore_eos": True,  # the model's own; those of this call follow
                "stop_token_ids": sorted(stops.eos_ids),
            }
            if stops.strings:
                options |= {"stop": list(stops.strings), "include_stop_str_in_output": True}
            for _ in range(RESTARTS):
                # A cached prefix belongs to the weights that computed it.
                options["cache_salt"] = self._salt
                rows = _each(
                    lambda row: self._row(*row, options, stops),
                    list(zip(repeated, seeds)),
                    self.requests,
                )
                if _difference(self._measured(), self._expected) <= self.tolerance:
                    return self._generation(rows, temperature)
                self._reload()  # the server has restarted
        raise EngineError(
            f"{self.url}: the server lost the policy's weights {RESTARTS} times in one batch. "
            "Look into its log, or whether another program loads weights into it"
        )

    def _check_options(
        self, prompts: Sequence, new: int, samples: int, temperature: float, truncation: dict
    ) -> None:
        for name, value in truncation.items():
            if value is not None:
                raise ValueError(
                    f"{name} is {value}, but an engine returns log-probs of the truncated "
                    "distribution, which no training forward has. Sample without it"
                )
        for name, value in (("max_new_tokens", new), ("num_samples", samples)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if temperature and not LEAST_TEMPERATURE <= temperature < math.inf:
            raise ValueError(
                f"temperature must be 0 or at least {LEAST_TEMPERATURE} for vLLM, got {temperature}"
            )
        limit = min(self._limit, self._config.max_positions)
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"row {i}: the prompt is empty")
            if fault := unknown_id(prompt, self._config.vocab_size):
                raise ValueError(f"prompt {i} {fault}")
            if len(prompt) + new > limit:
                raise ValueError(
                    f"row {i}: {len(prompt)} prompt + {new} new tokens exceed the {limit} of the "
                    f"model or of {self.url} (vllm serve --max-model-len)"
                )

    def _row(self, prompt: list[int], seed: int, options: dict[str, Any], stops: Stops) -> Row:
        """One response, cut where `generate` would have ended it."""
        request = {**options, "prompt": prompt, "seed": seed}

        def read(reply: dict[str, Any]) -> tuple[Row, bool]:
            return self._read_row(reply["choices"][0], prompt, request, stops)

        row, early = self._ask("/v1/completions", request, read)
        if early:  # the server's text has a stop string where ours has none
            request = {name: value for name, value in request.items() if name != "stop"}
            row, _ = self._ask("/v1/completions", request, read)
        return row

    def _read_row(
        self, choice: dict[str, Any], prompt: list[int], request: dict[str, Any], stops: Stops
    ) -> tuple[Row, bool]:
        """The response of a choice, and whether only the server knows why it ended.

        Raises:
            ValueError, LookupError, TypeError: it cannot be a response to the request.
        """
        ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        if choice.get("prompt_token_ids", prompt) != prompt:
            raise ValueError("the server has changed the prompt")
        if not 0 < len(ids) == len(logprobs) <= request["max_tokens"]:
            raise ValueError(f"{len(ids)} tokens with {len(logprobs)} log-probs")
        if fault := unknown_id(ids, self._config.vocab_size):
            raise ValueError(f"the response {fault}")
        if not all(isinstance(x, float | int) and -math.inf < x <= 1e-3 for x in logprobs):
            raise ValueError("a log-prob is not a finite number of at most 0")
        end = stops.end(ids, len(ids), len(ids))
        early = not end and len(ids) < request["max_tokens"]
        if early and not (choice["finish_reason"] == "stop" and "stop" in request):
            reason = choice["finish_reason"]
            raise ValueError(f"a response has ended after {len(ids)} tokens, because of {reason}")
        length = end or len(ids)
        return Row(ids[:length], logprobs[:length], ended=bool(end)), early

    def _generation(self, rows: list[Row], temperature: float) -> Generation:
        lengths = torch.tensor([len(row.ids) for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.full(mask.shape, self._config.pad_id or 0)
        ids[mask] = torch.tensor([token for row in rows for token in row.ids])
        logprobs = torch.zeros(mask.shape)
        logprobs[mask] = torch.tensor([x for row in rows for x in row.logprobs])
        ended = torch.tensor([row.ended for row in rows])
        own = logprobs if temperature else torch.zeros_like(logprobs)  # greedy: all mass on one
        return Generation(ids, mask, own, logprobs, ended)

    # ---- what the server is

    def _hello(self) -> None:
        """Learn the model's name and longest sequence; EngineError if this is no vLLM server."""

        def read(reply: dict[str, Any]) -> tuple[str, int]:
            model = reply["data"][0]
            return str(model["id"]), int(model["max_model_len"])

        try:
            self._name, self._limit = self._ask("/v1/models", None, read, patience=0)
        except EngineError as error:
            raise EngineError(f"{error}. Is a vLLM server running there?") from None
        try:
            self._ask("/is_paused", None, patience=0)
        except _Refused as error:
            raise EngineError(f"{error}. The server cannot reload weights: {DEV_MODE}") from None

    def _check_vocabulary(self, model: Transformer) -> None:
        """Compare its size. The server rejects the bias of a token that it does not have."""
        size = model.config.vocab_size

        def has(token: int) -> bool:
            bias = {"prompt": [0], "max_tokens": 1, "logit_bias": {str(token): 1.0}}
            try:
                self._ask("/v1/completions", {"model": self._name, **bias})
            except _Refused:
                return False
            return True

        if (known := has(size - 1)) and not has(size):
            return
        raise EngineError(
            f"{self.url}: the model {self._name} has {'more' if known else 'fewer'} token ids than "
            f"the policy, which has {size}. Start the server with the policy's model"
        )

    def _check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Compare the ids of a text. Only the stop strings need the server's tokenizer."""
        request = {"model": self._name, "prompt": _SENTENCE, "add_special_tokens": False}
        try:
            read = lambda reply: list(reply["tokens"])  # noqa: E731
            theirs = self._ask("/tokenize", request, read, may_pass=_never)
        except _Refused:
            return  # it has none (--skip-tokenizer-init)
        ours = list(tokenizer.encode(_SENTENCE))
        if ours != theirs:
            raise EngineError(
                f"{self.url}: its tokenizer encodes {_SENTENCE!r} as {theirs}, the policy's as "
                f"{ours}. Start the server with the policy's model, or with its --tokenizer"
            )

    def _check_temperature(self, model: Transformer) -> None:
        """Compare the log-probs of a response at a temperature far from 1."""
        prompt, new = _probes(model.config)[0][:4], 8
        rows = self.generate(
            [prompt], seeds=[1], max_new_tokens=min(new, self._limit - 4), temperature=2.0
        )
        ids = [prompt + rows.response_ids[0].tolist()]
        own, raw = (_logprobs(model, ids, t)[:, len(prompt) - 1 :] for t in (2.0, 1.0))
        error = _difference(rows.logprobs, own)
        if not error <= self.tolerance:
            is_raw = _difference(rows.logprobs, raw) <= self.tolerance
            raise EngineError(
                f"{self.url}: at temperature 2 its log-probs differ from the model's by "
                f"{error:.3g} nats. "
                + (f"They are those of temperature 1: {RAW}" if is_raw else f"Perhaps {RAW}")
            )

    # ---- requests

    def _ask(
        self,
        path: str,
        body: dict[str, Any] | None,
        read: Callable[[dict[str, Any]], Result] = lambda reply: None,  # type: ignore[assignment]
        *,
        may_pass: Callable[[int], bool] = may_pass,
        patience: float | None = None,
    ) -> Result:
        """What `read` makes of the reply. A failure is asked again until patience ends.

        Raises:
            _Refused: a status that `may_pass` denies.
            EngineError: nothing but failures.
        """
        patience = self.patience if patience is None else patience
        timeout = self._client.timeout if patience else HELLO_TIMEOUT
        attempt, spent = 0, 0.0
        while True:
            started, asked = time.monotonic(), None
            try:
                return read(self._client.send(self.url + path, body, timeout))
            except urllib.error.HTTPError as error:
                detail = " ".join(error.read(2000).decode(errors="replace").split())[:300]
                reason = f"status {error.code}: {detail or error.reason}"
                if not may_pass(error.code):
                    raise _Refused(f"{self.url}{path}: {reason}") from None
                asked = retry_after(error)
            except FAILURES as error:
                reason = reason_of(error)
            except _UNREADABLE as error:
                reason = f"cannot read the reply: {error!r}"
            attempt, spent = attempt + 1, spent + time.monotonic() - started
            if spent >= patience:
                raise EngineError(f"{self.url}{path}: {reason}; {attempt} attempts")
            spent += self._client.wait(attempt, asked)


class _Refused(EngineError):
    """A request with this content has no answer."""


def _never(status: int) -> bool:
    """For `may_pass`: every status is final."""
    return False


@torch.no_grad()
def _fingerprint(model: Transformer) -> dict[str, int]:
    """The sum of each tensor's bits. Fused AdamW does not count the tensor's `_version` up."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensors = model.state_dict()
    sums = [x.view(kinds[x.itemsize]).sum(dtype=torch.int64) for x in tensors.values()]
    return dict(zip(tensors, torch.stack(sums).tolist()))


def _probes(config: TransformerConfig) -> list[list[int]]:
    """The fixed rows, (PROBES, PROBE_LENGTH) ids at most."""
    length = min(PROBE_LENGTH, config.max_positions - 1)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (PROBES, length), generator=generator).tolist()


@torch.no_grad()
def _logprobs(model: Transformer, rows: list[list[int]], temperature: float = 1.0) -> Tensor:
    """Log-probs (n, T - 1) of the tokens after the first of n rows of T ids, on the CPU."""
    ids = torch.tensor(rows, device=model.device)
    with eval_mode(model):
        hidden = model.hidden_states(ids)[:, :-1].flatten(0, 1)
        tokens = model.token_logprobs(hidden, ids[:, 1:].flatten(), temperature=temperature)
    return tokens.logprobs.view(len(rows), -1).float().cpu()


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest one in nats; infinite for another shape."""
    return float((a - b).abs().max()) if a.shape == b.shape else math.inf


def _each(function: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    """Call the function on every item, in at most `threads` threads; the first error ends it.

    The threads are daemons, so that Ctrl-C need not wait for a request.
    """
    todo: queue.SimpleQueue = queue.SimpleQueue()
    done: queue.SimpleQueue = queue.SimpleQueue()
    over = threading.Event()
    for numbered in enumerate(items):
        todo.put(numbered)

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while not over.is_set():
                i, item = todo.get_nowait()
                try:
                    done.put((i, function(item), None))
                except BaseException as error:
                    done.put((i, None, error))

    for _ in range(min(threads, len(items))):
        threading.Thread(target=work, daemon=True).start()
    results: list[Any] = [None] * len(items)
    try:
        for _ in items:
            i, results_i, error = done.get()
            if error is not None:
                raise error
            results[i] = results_i
    finally:
        over.set()
    return results
