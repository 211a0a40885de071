"""A server that speaks as much of Weights & Biases' language as a run needs to begin, and then answers nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_BUCKET = {"id": "b", "name": "run", "displayName": "run", "description": None, "config": "{}", "sweepName": None,
           "historyLineCount": 0, "project": {"id": "p", "name": "project", "entity": {"id": "e", "name": "entity"}}}
_ANSWERS = (
    ("upsertBucket", {"upsertBucket": {"bucket": _BUCKET, "inserted": True}}),
    ("createRunFiles", {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}),
    ("viewer", {"viewer": {"id": "u", "entity": "entity", "username": "u", "flags": "{}", "teams": {"edges": []}}}),
    ("", {"model": {"bucket": None}}),
)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(errors="replace")
        if not self.server.answers or self.path != "/graphql":
            self.server.closing.wait()
            return
        found = next(data for word, data in _ANSWERS if word in body)
        reply = json.dumps({"data": found}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_GET = do_PUT = do_POST

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    answers = True

    def handle_error(self, *_: object) -> None:
        """A client that went away is no fault."""


@contextmanager
def fake_wandb(answers: bool) -> Iterator[str]:
    """Serve; yield the address. With `answers` a run can begin, but none of its rows is ever taken."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.answers, server.closing = answers, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
