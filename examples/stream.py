"""Streams one answer from a running server (`fastmtp.serve`) through the openai client, and times it.

python examples/stream.py "Explain speculative decoding to a child."
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
import time
from urllib.parse import urlsplit

import openai


def client(url: str, key: str | None) -> openai.OpenAI:
    """A client for the server. One on this machine is asked directly, past any proxy of the environment."""
    host = urlsplit(url).hostname or ""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    return openai.OpenAI(
        base_url=url,
        api_key=key or os.environ.get("OPENAI_API_KEY") or "none",
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=not local),
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", nargs="?", default="Explain speculative decoding to a child.")
    parser.add_argument("--url", default="http://127.0.0.1:30000/v1")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--api-key", help="of the server; default: OPENAI_API_KEY, if it is set")
    args = parser.parse_args(argv)

    first = None
    try:
        server = client(args.url, args.api_key)
        models = server.models.list().data  # vLLM answers to its model's name alone
        started = time.perf_counter()
        stream = server.chat.completions.create(
            model=models[0].id if models else "default",
            messages=[{"role": "user", "content": args.prompt}],
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            stream=True,
            stream_options={"include_usage": True},
        )
        tokens = 0
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.perf_counter()
                print(chunk.choices[0].delta.content, end="", flush=True)
            if chunk.usage:
                tokens = chunk.usage.completion_tokens
    except openai.OpenAIError as error:
        sys.exit(f"stream: {args.url}: {error}; is the server running? (python -m fastmtp.serve)")
    ended = time.perf_counter()
    print()
    if first is not None and tokens > 1:
        speed = (tokens - 1) / (ended - first)
        print(
            f"[{tokens} tokens, first after {first - started:.2f} s, then {speed:.1f} tokens/s]",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
