"""RLAIF: online DPO on the labels of a model behind an OpenAI-compatible endpoint.

The endpoint here is a stub on this machine, which prefers the answer with more vowels. Replace its
URL by that of a real one, such as "http://localhost:8000/v1#name", and choose your principles.
`Endpoint(url, cache=folder)` in place of the URL keeps the replies.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from rlhf_core import AIJudge, ByteTokenizer, Transformer, TransformerConfig
from rlhf_core.rollout import sample
from rlhf_core.trainers import OnlineDPOConfig, OnlineDPOTrainer


class Stub(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        answers = re.search(
            r"\(A\):\n(.*)\n\nAnswer \(B\):\n(.*)\n\n", question, re.DOTALL
        ).groups()
        vowels = [sum(c in "aeiou" for c in answer) for answer in answers]
        verdict = "(A)" if vowels[0] > vowels[1] else "(B)"
        if vowels[0] == vowels[1]:
            verdict = "Winner: tie"
        reply = json.dumps({"choices": [{"message": {"content": verdict}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
threading.Thread(target=server.serve_forever, daemon=True).start()

torch.manual_seed(0)
tokenizer = ByteTokenizer()
policy = Transformer(
    TransformerConfig(tokenizer.vocab_size, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id)
)
judge = AIJudge(f"http://127.0.0.1:{server.server_port}", ["Which answer has more vowels?"])
config = OnlineDPOConfig(
    batch_size=32, lr=2e-3, beta=0.1, epochs=1, response_length=12, num_samples=2
)
prompts = [tokenizer.encode_prompt("say something: ")] * (32 * 12)


def mean_vowels():
    generator = torch.Generator().manual_seed(1)
    rollout = sample(policy, prompts[:128], max_new_tokens=12, generator=generator)
    texts = map(tokenizer.decode, rollout.responses())
    return sum(c in "aeiou" for text in texts for c in text) / 128


before = mean_vowels()
OnlineDPOTrainer(policy, prompts, config, judge=judge, tokenizer=tokenizer).train()
print(f"vowels in a response: {before:.3f} -> {mean_vowels():.3f}")
print(f"comparisons: {judge.counts}")
server.shutdown()
