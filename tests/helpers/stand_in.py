"""A stand-in for an SGLang server, for the tests: the same endpoints and response fields, made-up tokens.

The format was written from the source of SGLang 0.5.17 (tokenizer_manager.py, http_server.py), not recorded.
Answers depend on the prompt alone, so every arm gives the same tokens, as greedy speculative decoding does.
Run as a script it is a server process: python tests/helpers/stand_in.py --port 30000 --num-steps 3
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import random
import socket
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# Seconds per token or verify pass. A test that compares speeds sets more than the machine's own noise.
PAUSE = "STAND_IN_PAUSE"
VERSION = "0.5.17"
# Two whole cycles of 30 us and the start of a third: a verification graph of two kernels (its second
# overlapped by a copy), a kernel outside graphs, the extension's graph, the drafting graph; 4 us of nothing
# before the next cycle.
TRACE = []
for cycle in range(3):
    t, c = 100.0 + 30 * cycle, 10 * cycle
    for number, launched in ((0, t - 9), (3, t + 8), (4, t + 12)):
        args = {"correlation": c + number}
        TRACE += [
            {
                "ph": "X",
                "cat": "cuda_runtime",
                "name": "cudaGraphLaunch",
                "ts": launched,
                "dur": 1,
                "args": args,
            }
        ]
    for name, start, duration, number in (
        ("gemm", 0, 6, 0),
        ("norm", 6, 2, 0),
        ("argmax", 11, 4, 2),
        ("extend_gemm", 15, 5, 3),
        ("draft_gemm", 20, 5, 4),
        ("draft_norm", 25, 1, 4),
        ("draft_argmax", 25, 1, 4),
    ):
        args = {"correlation": c + number}
        TRACE += [{"ph": "X", "cat": "kernel", "name": name, "ts": t + start, "dur": duration, "args": args}]
    args = {"correlation": c + 1}
    TRACE += [
        {"ph": "X", "cat": "gpu_memcpy", "name": "copy", "ts": t + 7, "dur": 2, "args": args},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": t, "dur": 50},
    ]


def answer_ids(prompt_ids: list[int], max_new_tokens: int, ignore_eos: bool = False) -> tuple[list[int], str]:
    """Tokens and finish reason: 5 to 24 tokens, cut at max_new_tokens."""
    seed = sum((n + 1) * i for n, i in enumerate(prompt_ids))
    length = max_new_tokens + 1 if ignore_eos else 5 + seed % 20
    ids = [5 + (seed + n * n) % 40 for n in range(min(length, max_new_tokens))]
    return ids, "stop" if length <= max_new_tokens else "length"


def accounting(tokens: int, num_steps: int) -> tuple[int, list[int]]:
    """Verify passes and histogram for an answer: accepted drafts go 0, 1, ..., num_steps, 0, ... until it is
    full.
    """
    histogram, made, passes = [0] * (num_steps + 1), 1, 0
    while made < tokens:
        accepted = passes % (num_steps + 1)
        histogram[accepted] += 1
        made += accepted + 1
        passes += 1
    return passes, histogram


def generated(body: dict, number: int, num_steps: int) -> tuple[dict, dict, int]:
    """What SGLang answers to the `number`th /generate: its first chunk, its last, and its passes."""
    prompt_ids, sampling = body["input_ids"], body["sampling_params"]
    ids, finish = answer_ids(prompt_ids, sampling["max_new_tokens"], sampling.get("ignore_eos", False))
    meta = {
        "id": f"r{number}",
        "finish_reason": None,
        "prompt_tokens": len(prompt_ids),
        "weight_version": "default",
        "num_retractions": 0,
        "completion_tokens": 1,
        "cached_tokens": 0,
    }
    first = {"text": "", "output_ids": ids[:1], "meta_info": meta}
    reason = {"type": finish, "matched": 2} if finish == "stop" else {"type": finish, "length": len(ids)}
    done = meta | {"finish_reason": reason, "completion_tokens": len(ids), "e2e_latency": 0.002}
    passes, histogram = accounting(len(ids), num_steps)
    if num_steps and passes:
        correct = sum(n * count for n, count in enumerate(histogram))
        done |= {
            "spec_accept_rate": correct / (passes * num_steps),
            "spec_accept_length": len(ids) / passes,
            "spec_num_correct_drafts": correct,
            "spec_num_proposed_drafts": passes * num_steps,
            "spec_verify_ct": passes,
            "spec_accepted_drafts": correct,
            "spec_proposed_drafts": passes * num_steps,
            "spec_correct_drafts_histogram": histogram,
            "spec_accept_histogram": histogram,
        }
    last = {"text": " ".join(f"w{i}" for i in ids), "output_ids": ids, "meta_info": done}
    return first, last, passes if num_steps else len(ids)


def spoil(first: dict, last: dict, fault: str | None) -> None:
    """Put the fault into an answer, if it is one of content."""
    if fault == "no text":  # SGLang with --skip-tokenizer-init
        first.pop("text"), last.pop("text")
    if fault == "malformed":
        last["meta_info"] = {"finish_reason": last["meta_info"]["finish_reason"]}
    if fault == "abort":
        reason = {"type": "abort", "message": "out of memory", "status_code": 500}
        last["meta_info"]["finish_reason"] = reason


def free_port() -> int:
    """The first of eight free ports in a row, below those that the system gives to outgoing connections."""
    while True:
        first = random.SystemRandom().randrange(15000, 30000)
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for port in range(first, first + 8):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


class StandIn(ThreadingHTTPServer):
    """`fault(n, path)` may return "400", "429", "500", "hang", "malformed", "cut", "abort", "slow", "no text"
    or "drop" for the nth /generate.
    """

    daemon_threads = True

    def __init__(
        self, port: int = 0, model: str = "stand-in", num_steps: int = 0, token_map=None, fault=None
    ):
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.num_steps, self.token_map = model, num_steps, token_map
        self.fault = fault or (lambda number, path: None)
        self.bodies: list[dict] = []
        self.flushed = 0
        self.gives_ids = True  # token ids in OpenAI's chat, if asked for
        self.message = {"role": "assistant", "content": "red green"}  # what OpenAI's chat answers
        self.keys: list[str | None] = []  # the Authorization header of every question
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> StandIn:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """Clients that time out hang up; that is not news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        s = self.server
        if self.path == "/health":
            self._send(200, b"")
        elif self.path == "/model_info":
            self._json({"model_path": s.model, "tokenizer_path": s.model, "is_generation": True})
        elif self.path == "/v1/models":
            self._json({"object": "list", "data": [{"id": s.model, "object": "model"}]})
        elif self.path == "/server_info":
            spec = {
                "speculative_algorithm": None,
                "speculative_num_steps": None,
                "speculative_token_map": None,
            }
            if s.num_steps:
                spec = {
                    "speculative_algorithm": "EAGLE",
                    "speculative_num_steps": s.num_steps,
                    "speculative_token_map": s.token_map,
                }
            self._json({"version": VERSION, "dtype": "bfloat16", "attention_backend": "triton"} | spec)
        else:
            self._send(404, b"Not Found")

    def do_POST(self) -> None:
        self.server.keys.append(self.headers.get("Authorization"))
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if self.path.startswith("/flush_cache"):
            self.server.flushed += 1
            self._send(200, b"Cache flushed.\n")
        elif self.path == "/generate":
            self._generate(json.loads(body))
        elif self.path == "/v1/chat/completions":
            self._chat(json.loads(body))
        elif self.path == "/start_profile":
            with gzip.open(Path(json.loads(body)["output_dir"]) / "1-TP-0.trace.json.gz", "wt") as trace:
                json.dump({"traceEvents": TRACE}, trace)
            self._send(200, b"Start profiling.\n")
        else:
            self._send(404, b"Not Found")

    def _generate(self, body: dict) -> None:
        s = self.server
        with s.lock:
            s.bodies.append(body)
            number = len(s.bodies)
        fault = s.fault(number, self.path)
        if fault in ("400", "429", "500"):
            return self._send(
                int(fault),
                HTTPStatus(int(fault)).phrase.encode(),
                {"Retry-After": "0.05"} if fault == "429" else {},
            )
        if fault == "slow":
            time.sleep(0.2)
        if fault == "hang":
            time.sleep(3)
            return None
        if fault == "drop":
            return self.connection.shutdown(socket.SHUT_RDWR)
        first, last, passes = generated(body, number, s.num_steps)
        spoil(first, last, fault)
        if not body.get("stream"):
            return self._send(200, b"{cut" if fault == "cut" else json.dumps(last).encode())
        chunks = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in (first, last)]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(chunks[0])
        self.wfile.flush()
        # Speculation answers faster, so that speed-ups above 1 can be seen.
        time.sleep(float(os.environ.get(PAUSE, 0.0002)) * passes)
        self.finish_stream((b"" if fault == "cut" else chunks[1]) + b"data: [DONE]\n\n")

    def finish_stream(self, data: bytes) -> None:
        """What comes after the first chunk; tests put other words in its place."""
        self.wfile.write(data)
        self.close_connection = True

    def _chat(self, body: dict) -> None:
        """OpenAI's chat, as SGLang speaks it; streamed: role, content, finish, usage, [DONE]."""
        with self.server.lock:
            self.server.bodies.append(body)
        if not body.get("stream"):
            choice = {
                "index": 0,
                "message": self.server.message,
                "finish_reason": "stop",
            }
            if body.get("return_token_ids") and self.server.gives_ids:
                choice |= {"token_ids": [7, 8], "prompt_token_ids": [1, 2, 3]}
            return self._json({"object": "chat.completion", "model": body["model"], "choices": [choice]})
        shared = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
        deltas = [{"role": "assistant", "content": ""}, {"content": "red "}, {"content": "green"}]
        chunks = [
            shared | {"choices": [{"index": 0, "delta": d, "finish_reason": None}], "usage": None}
            for d in deltas
        ]
        chunks.append(
            shared | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": None}
        )
        usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
        chunks.append(shared | {"choices": [], "usage": usage})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for chunk in chunks:
            self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _json(self, value: dict) -> None:
        self._send(200, json.dumps(value).encode())

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--num-steps", type=int, default=0)
    parser.add_argument("--no-text", action="store_true", help="as SGLang with --skip-tokenizer-init")
    args = parser.parse_args()
    fault = "no text" if args.no_text else None
    StandIn(args.port, num_steps=args.num_steps, fault=lambda number, path: fault).serve_forever()


if __name__ == "__main__":
    main()
