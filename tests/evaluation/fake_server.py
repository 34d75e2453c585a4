"""A server with the OpenAI API whose model recalls numbers, or forgets those of long prompts."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx


class FakeServer:
    """What the server answers.

    Attributes:
        forgets_beyond: characters of a prompt beyond which numbers are forgotten.
        key: that requests must carry; None for none.
        counts_rows: whether it answers /toptheta/stats.
        failures: statuses to answer, one for each of the next requests, before it works.
        requests: the bodies of all completions asked for.
    """

    def __init__(
        self, *, forgets_beyond: int = 10**9, key: str | None = None, counts_rows: bool = False, failures: Any = ()
    ) -> None:
        self.forgets_beyond = forgets_beyond
        self.key = key
        self.counts_rows = counts_rows
        self.failures = list(failures)
        self.requests: list[dict[str, Any]] = []

    def answer(self, method: str, path: str, headers: Any, content: bytes) -> tuple[int, dict[str, Any]]:
        if self.failures:
            return self.failures.pop(0), {"error": "busy"}
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            return 401, {"error": "no key"}
        match method, path:
            case "GET", "/v1/models":
                return 200, {"data": [{"id": "org/fake"}]}
            case "GET", "/toptheta/stats" if self.counts_rows:
                done = len(self.requests)
                return 200, {"layers": [{"rows_read": 10 * done, "rows_cached": 100 * done}] * 2}
            case "POST", "/v1/completions":
                body = json.loads(content)
                self.requests.append(body)
                usage = {"prompt_tokens": len(body["prompt"]) // 4}
                return 200, {"choices": [{"index": 0, "text": self.complete(body["prompt"])}], "usage": usage}
        return 404, {"detail": "Not Found"}

    def complete(self, prompt: str) -> str:
        asked = re.search(r"(\S+) is$", prompt)
        if asked is None or len(prompt) > self.forgets_beyond:
            return " 0.\n"
        found = re.search(rf"{re.escape(asked[1])}(?: is|:) (\d+)", prompt)
        return f" {found[1]}.\nand more" if found else " 1.\n"

    def transport(self) -> httpx.MockTransport:
        def handle(request: httpx.Request) -> httpx.Response:
            status, body = self.answer(request.method, request.url.path, request.headers, request.content)
            return httpx.Response(status, json=body)

        return httpx.MockTransport(handle)

    @contextmanager
    def listening(self) -> Iterator[str]:
        """Serves on a port of this machine, and yields the URL."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.respond(b"")

            def do_POST(self) -> None:
                self.respond(self.rfile.read(int(self.headers["content-length"])))

            def respond(self, content: bytes) -> None:
                status, body = fake.answer(self.command, self.path, self.headers, content)
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
