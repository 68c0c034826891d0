"""A server on this machine in the place of an OpenAI-compatible one."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class JudgeServer(ThreadingHTTPServer):
    """Answers the n-th request with the n-th reply, or with what a function makes of its body.

    A reply is a text; bytes, which are sent as they are; a dict, sent as JSON; a status, alone or
    with headers and text; a float, seconds after which the text A comes; None, which drops the
    connection.
    """

    daemon_threads = True

    def __init__(self, replies):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies, self.requests = replies, []  # path, headers, body of each request
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        """Say nothing of clients that hang up."""


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests.append((self.path, dict(self.headers), body))
        reply = server.replies(body) if callable(server.replies) else server.replies.pop(0)
        status, headers = 200, {}
        if reply is None:
            return
        if isinstance(reply, float):
            time.sleep(reply)
            reply = "A"
        if isinstance(reply, int):
            reply = reply, {}
        if isinstance(reply, tuple):
            status, headers, *text = reply
            reply = "".join(text).encode()
        if isinstance(reply, str):
            reply = {"choices": [{"message": {"content": reply}, "text": reply}]}
        data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(data)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Print nothing."""
