"""A server on this machine in the place of vLLM's: its protocol, with the numbers of our model."""

import copy
import io
import json
import threading
import time
import urllib.error
import urllib.parse
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from rlhf_core.generation import generate
from rlhf_core.models import Transformer
from rlhf_core.ops import token_logprobs
from rlhf_core.rollout import sample


@torch.no_grad()
def widened(model, size):
    """The same function with heads of this size, because vLLM has no kernel for the smallest ones.

    Each pair of elements moves to the pair of the wider head that turns as fast.
    """
    config = model.config
    K, H, G = config.head_dim, config.num_heads, config.num_kv_heads
    pairs = torch.arange(K // 2) * (size // K)
    places = torch.cat((pairs, size // 2 + pairs))

    def spread(rows, heads, scale=1.0):
        out = rows.new_zeros(heads, size, rows.shape[1])
        out[:, places] = rows.view(heads, K, -1) * scale
        return out.flatten(0, 1)

    state = model.state_dict()
    for name, x in state.items():
        if name.endswith("attn.qkv.weight"):
            q, k, v = x.split((H * K, G * K, G * K))
            state[name] = torch.cat((spread(q, H, (size / K) ** 0.5), spread(k, G), spread(v, G)))
        elif name.endswith("attn.out.weight"):
            state[name] = spread(x.T, H).T
    wide = Transformer(replace(config, head_dim=size))
    wide.load_state_dict(state)
    return wide.eval()


class EngineServer(ThreadingHTTPServer):
    """Serves a model as `vllm serve` does, and reloads its weights.

    Tests change its attributes:
        faults: consumed by the next requests whose path has the key: path -> list of a status,
            "truncate" (half of the reply), "drop" (no reply), a float (seconds of delay), or a
            function that is called before the reply.
        keep: whether a reload leaves the tensor of this name as it is.
        edit: changes the choice of a sampled response.
        raw: log-probs ignore the temperature.
        bias: added to every log-prob.
        missing: paths that do not exist.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, model, *, tokenizer=None, limit=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.initial = copy.deepcopy(model.plain_copy())
        self.model = copy.deepcopy(self.initial)
        self.tokenizer, self.limit = tokenizer, limit or model.config.max_positions
        self.faults, self.requests, self.missing = {}, [], set()
        self.keep, self.edit = lambda name: False, lambda choice: choice
        self.raw, self.bias, self.paused = False, 0.0, False
        self.lock, self.running, self.most = threading.Lock(), 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def restart(self):
        """Back to the weights that it was started with."""
        self.model, self.paused = copy.deepcopy(self.initial), False

    def handle_error(self, request, client_address):
        """Say nothing of clients that hang up."""

    # ---- replies

    def reply(self, path, body):
        """Status and JSON value."""
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "tiny", "max_model_len": self.limit}]}
        if path == "/is_paused":
            return 200, {"is_paused": self.paused}
        if path in ("/pause", "/resume"):
            self.paused = path == "/pause"
            return 200, {"status": "paused" if self.paused else "resumed"}
        if path == "/reset_prefix_cache":
            return 200, {"success": True}
        if path == "/collective_rpc":
            return self.reload(Path(body["kwargs"]["weights_path"]))
        if path == "/tokenize":
            if self.tokenizer is None:
                return 501, {"error": {"message": "no tokenizer"}}
            ids = self.tokenizer.encode(body["prompt"])
            return 200, {"count": len(ids), "max_model_len": self.limit, "tokens": ids}
        return self.complete(body)

    def reload(self, folder):
        if not self.paused:
            return 500, {"error": {"message": "not paused"}}
        try:
            new = Transformer.from_pretrained(folder).state_dict()
            old = self.model.state_dict()
            self.model.load_state_dict({x: (old if self.keep(x) else new)[x] for x in old})
        except (OSError, KeyError, RuntimeError) as error:
            return 500, {"error": {"message": f"Worker failed with error {error}"}}
        return 200, {"results": [None]}

    def complete(self, body):
        size = self.model.config.vocab_size
        bad = [token for token in body.get("logit_bias", {}) if not 0 <= int(token) < size]
        if bad:
            message = f"token_id(s) {bad} in logit_bias contain out-of-vocab token ids."
            return 400, {"error": {"message": f"{message} Vocabulary size: {size}"}}
        if self.paused:
            return 500, {"error": {"message": "paused"}}
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        with self.lock:
            choices = [self.choice(i, prompt, body) for i, prompt in enumerate(prompts)]
        return 200, {"object": "text_completion", "model": "tiny", "choices": choices}

    def choice(self, index, prompt, body):
        new = min(body["max_tokens"], self.limit - len(prompt))
        greedy = body.get("temperature", 1.0) == 0
        ids = torch.tensor([prompt])
        sampled = generate(
            self.model,
            ids,
            max_new_tokens=new,
            temperature=body.get("temperature", 1.0),
            eos_ids=body.get("stop_token_ids", ()),
            stop_strings=body.get("stop", ()),
            tokenizer=self.tokenizer,
            seeds=torch.tensor([body.get("seed", 0)]),
        )
        tokens = sampled.response_ids[0].tolist()
        logprobs = sampled.full_logprobs if greedy else sampled.logprobs
        whole = torch.cat((ids, sampled.response_ids), dim=1)
        with torch.no_grad():
            plain = token_logprobs(self.model(whole)[:, :-1], whole[:, 1:])[0]
        if self.raw:
            logprobs = plain[None, len(prompt) - 1 :]
        shown = (logprobs[0] + self.bias).tolist()
        texts = [f"token_id:{token}" for token in tokens]
        prompt_logprobs = None
        if "prompt_logprobs" in body:
            found = (plain[: len(prompt) - 1] + self.bias).tolist()
            prompt_logprobs = [None] + [
                {str(token): {"logprob": x, "rank": 1, "decoded_token": str(token)}}
                for token, x in zip(prompt[1:], found)
            ]
        logprobs = {
            "text_offset": [0] * len(tokens),
            "token_logprobs": shown,
            "tokens": texts,
            "top_logprobs": [{text: x} for text, x in zip(texts, shown)],
        }
        with_ids = body.get("return_token_ids")
        choice = {
            "index": index,
            "text": "".join(texts),
            "logprobs": logprobs if "logprobs" in body else None,
            "finish_reason": "stop" if sampled.ended[0] else "length",
            "stop_reason": None,
            "token_ids": tokens if with_ids else None,
            "prompt_logprobs": prompt_logprobs,
            "prompt_token_ids": prompt if with_ids else None,
        }
        return self.edit(choice) if "seed" in body else choice

    def fault(self, path):
        """The next fault of this path, if there is one."""
        with self.lock:
            waiting = self.faults.get(path)
            return waiting.pop(0) if waiting else None


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(None)

    def do_POST(self):
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body):
        server = self.server
        with server.lock:
            server.requests.append((self.path, body))
            server.running += 1
            server.most = max(server.most, server.running)
        try:
            fault = server.fault(self.path)
            if callable(fault):
                fault()
            if isinstance(fault, float):
                time.sleep(fault)
            if fault == "drop":
                return
            if self.path in server.missing:
                status, value = 404, {"detail": "Not Found"}
            elif isinstance(fault, int):
                status, value = fault, {"error": {"message": "fault", "code": fault}}
            else:
                status, value = server.reply(self.path, body)
        finally:  # before the client can send its next request
            with server.lock:
                server.running -= 1
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "truncate" else data)

    def log_message(self, *_):
        """Print nothing."""


# ---- a recording of vLLM


def key_of(path, body):
    """What a request asks, without what differs from run to run."""
    body = {name: x for name, x in (body or {}).items() if name not in ("cache_salt", "kwargs")}
    return json.dumps([path, body], sort_keys=True)


class Recorder:
    """Stands between an engine and its client, and keeps every exchange."""

    def __init__(self, engine):
        self.client, self.exchanges = engine._client, []
        self.timeout, self.wait = self.client.timeout, self.client.wait
        engine._client = self

    def send(self, url, body=None, timeout=None):
        path, status, reply = urllib.parse.urlsplit(url).path, 200, None
        try:
            reply = self.client.send(url, body, timeout)
            return reply
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
            reply = json.loads(text)
            again = status, error.reason, error.headers, io.BytesIO(text)
            raise urllib.error.HTTPError(url, *again) from None
        finally:
            entry = dict(zip(("path", "body"), json.loads(key_of(path, body))))
            self.exchanges.append(entry | {"status": status, "reply": reply})


class Replay(EngineServer):
    """Answers every request as it was answered when the exchanges were recorded."""

    def __init__(self, model, exchanges):
        self.replies = {}
        for x in exchanges:
            replies = self.replies.setdefault(key_of(x["path"], x["body"]), [])
            replies.append((x["status"], x["reply"]))
        super().__init__(model)

    def reply(self, path, body):
        replies = self.replies[key_of(path, body)]
        with self.lock:
            return replies.pop(0) if len(replies) > 1 else replies[0]


def session(engine, model, tokenizer, prompts):
    """Everything that an engine asks a server; returns the rollouts."""
    engine.start(model, tokenizer)
    options = dict(max_new_tokens=12, num_samples=2, seeds=torch.arange(2 * len(prompts)) * 977)
    options |= dict(eos_ids=(1, 2), engine=engine)
    return [
        sample(model, prompts, temperature=0.7, **options),
        sample(model, prompts, temperature=0.0, **options),
        sample(model, prompts, stop_strings=("a",), tokenizer=tokenizer, **options),
    ]
