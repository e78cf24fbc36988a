"""Starts SGLang with the head as its draft model, waits until it answers, and stops it on Ctrl-C.

    python -m fastmtp.serve --model models/smollm2-fastmtp --num-steps 3 --token-map vocab/smollm2/en_32k.pt
    python -m fastmtp.serve --model models/mimo-7b-fastmtp --token-maps en=vocab/qwen2/en_32k.pt,zh=vocab/qwen2/zh_32k.pt

The command line is built for the SGLang that is installed (0.5.17 or later), printed, and run as a process of its
own. Flags after `--` go to SGLang as they are and override what is chosen here.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from fastmtp.cli import InputError, Parser, run
from fastmtp.files import existing, python_path

OLDEST = (0, 5, 17)
HOST = "127.0.0.1"
LOG_LINES = 25
EXTERNAL_PACKAGE = "SGLANG_EXTERNAL_MODEL_PACKAGE"  # SGLang takes models of this package before its own
VOCAB_READY = "draft vocabulary: ready"  # what fastmtp.sglang_ext logs once it is in use


class ServerError(Exception):
    """The server died or did not come up; the message ends with its last log lines."""


def sglang_version() -> str:
    """Version of the installed SGLang. Raises InputError where there is none, or one too old."""
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        raise InputError("SGLang is not installed; pip install -e '.[serve]' on a machine with a GPU") from None
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if numbers < OLDEST:
        raise InputError(f"SGLang {version} is too old; pip install 'sglang>={'.'.join(map(str, OLDEST))}'")
    return version


def attention_backend() -> str:
    """fa3 where its kernels are installed and the GPU is Hopper, which alone runs them; else triton.

    SGLang's own default on Hopper is fa3 whether or not its kernels are there, and then fails at start.
    """
    spec = importlib.util.find_spec("sgl_kernel")
    folders = list(spec.submodule_search_locations or []) if spec else []
    kernels = [file for folder in folders for file in Path(folder).glob("**/flash_ops*.so")]
    return "fa3" if kernels and compute_capability().startswith("9.") else "triton"


def compute_capability() -> str:
    """Of the first GPU, as `9.0`; empty without one. Asked without making a context on it."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.split("\n")[0].strip()


def check_model(folder: str, num_steps: int) -> dict:
    """The folder's config. Raises InputError for what SGLang would only reveal minutes later, or never."""
    path = existing(existing(folder, "model folder") / "config.json", "model config")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg}); export the model again") from None
    if num_steps and "MiMoForCausalLM" not in config.get("architectures", []):
        raise InputError(
            f"{path}: architectures is {config.get('architectures')}; export with fastmtp.export, or --no-spec"
        )
    if num_steps and config.get("num_nextn_predict_layers") != 1:
        # SGLang would allocate the draft's KV cache for every layer of the backbone.
        found = config.get("num_nextn_predict_layers")
        raise InputError(f"{path}: num_nextn_predict_layers is {found}, must be 1; export the model again")
    return config


def command(
    model: str,
    num_steps: int = 3,
    token_map: str | None = None,
    tp: int = 1,
    port: int = 30000,
    flags: list[str] = (),
    backend: str | None = None,
) -> list[str]:
    """SGLang's command line. num_steps 0 is plain decoding; `flags` override. Raises InputError for what cannot work."""
    config = check_model(model, num_steps)
    if token_map and not num_steps:
        raise InputError("--token-map: there is no draft to shorten with --no-spec; leave one of them out")
    if token_map and tp > 1:
        raise InputError(
            f"--token-map with --tp {tp}: SGLang indexes a head split over GPUs with whole-vocabulary ids and crashes or "
            "drafts wrong tokens (github.com/sgl-project/sglang/issues/4328); use --tp 1 or no map"
        )
    parts = ["--model-path", model, "--host", HOST, "--port", str(port), "--tp-size", str(tp)]
    attention = backend or attention_backend()
    parts += ["--attention-backend", attention, "--sampling-backend", "pytorch"]
    if "auto_map" in config and config.get("model_type") not in ("qwen2", "llama"):
        parts += ["--trust-remote-code"]
    if num_steps:
        parts += ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", str(num_steps)]
        parts += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(num_steps + 1)]
    if num_steps and attention == "fa3":
        # With fa3 SGLang 0.5.17 runs the draft's extension without a CUDA graph.
        parts += ["--speculative-draft-attention-backend", "triton"]
    if token_map:
        # A path that does not exist would be taken for a Hub repository.
        parts += ["--speculative-token-map", str(existing(token_map, "token map").resolve())]
    return [sys.executable, "-m", "sglang.launch_server", *without(parts, flags), *flags]


def check_token_map(path: str, model: str) -> None:
    """InputError for a map of another tokenizer, or a file that is no map: SGLang would draft wrong tokens or crash."""
    from fastmtp import draft_vocab
    from fastmtp.build_vocab import load_tokenizer

    draft_vocab.load_map(path, load_tokenizer(model), check_model(model, 1)["vocab_size"])


def vocab_environment(token_maps: str, policy: str, model: str, path: Path, context_rows: int = 0) -> dict[str, str]:
    """Write the draft vocabulary's file to `path`; the environment in which SGLang uses it (fastmtp.sglang_ext).

    Raises InputError for maps that do not fit the model, each other or the policy.
    """
    from fastmtp import draft_vocab
    from fastmtp.build_vocab import load_tokenizer

    config = check_model(model, 1)
    draft_vocab.read(token_maps, policy, load_tokenizer(model), config["vocab_size"], context_rows).save(path)
    return extension(path)


def extension(path: Path) -> dict[str, str]:
    """The environment in which SGLang loads our draft model with the vocabulary in `path`."""
    return {EXTERNAL_PACKAGE: "fastmtp.sglang_ext", "FASTMTP_DRAFT_VOCAB": str(path.resolve()), "PYTHONPATH": python_path()}


RENAMED = {"--cuda-graph-max-bs": "--cuda-graph-max-bs-decode"}  # the old name is gone after 0.5.17


def renamed(flags: list[str]) -> list[str]:
    """Flags under the names that every supported version knows."""
    split = [flag.partition("=") for flag in flags]
    return [RENAMED.get(name, name) + equals + value for name, equals, value in split]


def without(parts: list[str], flags: list[str]) -> list[str]:
    """`parts` without the flags that the user gives: the printed command then shows each once."""
    given = {flag.partition("=")[0] for flag in flags if flag.startswith("--")}
    kept, skipping = [], False
    for part in parts:
        if part.startswith("--"):
            skipping = part in given
        if not skipping:
            kept.append(part)
    return kept


class Server:
    """`with Server(command, port) as server:`: a running server; its whole process group ends with the block.

    Raises ServerError when it dies or does not answer within `wait` seconds. `log` keeps its output.
    """

    def __init__(
        self,
        argv: list[str],
        port: int,
        log: Path,
        wait: float = 900.0,
        env: dict[str, str] | None = None,
        stop_patience: float = 15.0,
    ):
        self.argv, self.port, self.log, self.wait = argv, port, Path(log), wait
        self.stop_patience = stop_patience
        self.env = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        self.process: subprocess.Popen | None = None
        self.url = f"http://{HOST}:{port}"

    def __enter__(self) -> Server:
        try:
            self.start()
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start and do not wait. Raises InputError where the port is taken."""
        with socket.socket() as probe:
            if probe.connect_ex((HOST, self.port)) == 0:
                raise InputError(f"port {self.port} is taken; stop what listens there or choose another --port")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # A command that is asked to end unwinds as if by Ctrl-C, and so ends its servers.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with open(self.log, "wb") as out:
            # A session of its own: Ctrl-C reaches us alone, and we end all of the server's processes in order.
            self.process = subprocess.Popen(
                self.argv, stdout=out, stderr=subprocess.STDOUT, env=self.env, start_new_session=True
            )

    def wait_until_ready(self) -> None:
        """Return when the server answers. Raises ServerError when it dies or does not answer within `wait` seconds."""
        started = time.monotonic()
        while True:
            if self.process.poll() is not None:
                raise ServerError(f"the server ended with exit code {self.process.returncode}{self.tail()}")
            if answers(self.url + "/health"):
                return
            if time.monotonic() - started > self.wait:
                raise ServerError(f"the server does not answer after {self.wait:g} s{self.tail()}")
            time.sleep(0.5)

    def tail(self) -> str:
        """The last log lines, to end an error message with."""
        with open(self.log, "rb") as stream:
            stream.seek(max(0, os.path.getsize(self.log) - 20_000))
            lines = stream.read().decode("utf-8", errors="replace").splitlines()[-LOG_LINES:]
        return f"; the end of {self.log}:\n" + "\n".join(f"  | {line}" for line in lines)

    def stop(self) -> None:
        """End the whole group, politely and then not: a worker left over would hold the GPU's memory."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            self.send(sign)
            if self.process is None or self._group_ends():
                return

    def send(self, sign: int) -> None:
        """A signal to all of the server's processes that are still there."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)

    def _group_ends(self) -> bool:
        """Whether every process of the group is gone within `stop_patience` seconds."""
        end = time.monotonic() + self.stop_patience
        while time.monotonic() < end:
            self.process.poll()  # reaps the leader, which would else count as a member
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.05)
        return False


@contextlib.contextmanager
def together(servers: list[Server]) -> Iterator[list[ServerError | None]]:
    """All servers started at once; what became of each: None (it answers) or its error. All end with the block.

    Loading and compiling take minutes and run side by side; measuring must not, so ask one server after the other.
    """
    try:
        for server in servers:
            server.start()
        yield [_outcome(server) for server in servers]
    finally:
        for server in servers:  # all at once: each takes seconds to end
            server.send(signal.SIGTERM)
        for server in servers:
            server.stop()


def _outcome(server: Server) -> ServerError | None:
    try:
        server.wait_until_ready()
    except ServerError as error:
        return error
    return None


def answers(url: str) -> bool:
    """Whether `url` gives HTTP 200 within five seconds."""
    try:
        # No proxy: the server is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError, ValueError):
        return False


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.serve",
        "Serve an exported model with SGLang and its MTP head as the draft. Flags after -- go to SGLang.",
        "python -m fastmtp.serve --model models/smollm2-fastmtp --num-steps 3 --port 30000 -- --mem-fraction-static 0.7",
    )
    p.add_argument("--model", required=True, metavar="FOLDER", help="folder written by fastmtp.export")
    p.add_argument("--num-steps", type=int, default=3, help="drafts per cycle (default %(default)s)")
    p.add_argument("--token-map", metavar="PATH", help="draft vocabulary, from fastmtp.build_vocab")
    p.add_argument(
        "--token-maps", metavar="EN=PATH,ZH=PATH", help="a map for each language; the draft follows the requests' languages"
    )
    p.add_argument(
        "--vocab-policy", metavar="auto|fixed:NAME|union", help="which of --token-maps is used when (default auto)"
    )
    p.add_argument(
        "--context-rows", type=int, default=0, help="ids of the running prompts that join the active one of --token-maps (default 0)"
    )
    p.add_argument("--no-spec", action="store_true", help="plain decoding, the baseline")
    p.add_argument("--tp", type=int, default=1, help="GPUs to split the model over (default %(default)s)")
    p.add_argument("--port", type=int, default=30000, help="default %(default)s")
    p.add_argument("--dry-run", action="store_true", help="print SGLang's command line and stop")
    return p


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    args, flags = parser().parse_args(argv[:cut]), renamed(argv[cut + 1 :])
    if args.num_steps < 1:
        raise InputError(f"--num-steps {args.num_steps}: must be at least 1; for plain decoding give --no-spec")
    if args.tp < 1:
        raise InputError(f"--tp {args.tp}: must be at least 1")
    if args.token_maps and (args.token_map or args.no_spec):
        raise InputError(f"--token-maps with {'--token-map' if args.token_map else '--no-spec'}: give one of them")
    if (args.vocab_policy or args.context_rows) and not args.token_maps:
        raise InputError("--vocab-policy and --context-rows: there are no --token-maps; give them or leave these out")
    if not 1 <= args.port <= 65535:
        raise InputError(f"--port {args.port}: must be 1 to 65535")
    line = command(args.model, 0 if args.no_spec else args.num_steps, args.token_map, args.tp, args.port, flags)
    log = Path(tempfile.gettempdir()) / f"fastmtp-serve-{args.port}.log"
    env = {}
    if args.token_map:
        check_token_map(args.token_map, args.model)
    if args.token_maps:
        file = log.with_suffix(".vocab.pt")
        env = vocab_environment(args.token_maps, args.vocab_policy or "auto", args.model, file, args.context_rows)
    shown = shlex.join([*(f"{name}={value}" for name, value in env.items()), *line])
    if args.dry_run:
        print(shown)
        return
    print(f"SGLang {sglang_version()}: {shown}", flush=True)
    serve(line, args.port, log, env)


def serve(argv: list[str], port: int, log: Path, env: dict[str, str] | None = None) -> None:
    """Run until Ctrl-C or the server's end. A server that dies ends us with exit code 1 and its last lines."""
    started = time.monotonic()
    print(f"starting; the log is {log}", flush=True)
    try:
        with Server(argv, port, log, env=env) as server:
            if env and VOCAB_READY not in log.read_text(encoding="utf-8", errors="replace"):
                # SGLang passes over a model package that it cannot import, and drafts from the whole vocabulary.
                raise ServerError(f"SGLang does not use fastmtp.sglang_ext; {log} says why")
            print(f"{server.url} answers after {time.monotonic() - started:.0f} s; Ctrl-C stops it", flush=True)
            code = server.process.wait()
            raise ServerError(f"the server ended with exit code {code}{server.tail()}")
    except ServerError as error:
        sys.exit(f"fastmtp.serve: error: {error}")
    except KeyboardInterrupt:
        print("stopped", flush=True)


if __name__ == "__main__":
    run(main)
