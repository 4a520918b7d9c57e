"""A reward server in the standard library: python3 server.py [PORT]. See run.yaml beside it.

A score is 1 for a response that holds a digit, less a hundredth of its characters.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def reward(response: str, prompt: str, label: object) -> float:
    return float(any(c.isdigit() for c in response)) - 0.01 * len(response)


class Scorer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        rewards = [reward(*one) for one in zip(asked["responses"], asked["prompts"], asked["labels"])]
        body = json.dumps({"rewards": rewards}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # of 5, the others of a batch would wait a second for their connection


if __name__ == "__main__":
    server = Server(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 8000), Scorer)
    print(f"listening on http://127.0.0.1:{server.server_port}/score", flush=True)
    server.serve_forever()
