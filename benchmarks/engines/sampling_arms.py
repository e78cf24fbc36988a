"""The arms of the sampling test and their servers: what is served, and an error that must be seen."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from evaluation import backends
from evaluation.backend_vllm import VllmServer
from fastmtp.engines import process, sglang, vllm
from fastmtp.engines.request import Serving
from fastmtp.engines.sglang_flags import MEASURED, merged, streams
from fastmtp.inputs import read_json

AT_ONCE = 128  # requests in flight
PLANTED = "accepted unseen"
Started = tuple[process.Server, list[str]]  # and the lines that its log must hold


@dataclass(frozen=True)
class Arm:
    """drafts None: plain decoding; greedy: the head's likeliest token; sampled: drawn from the head's
    distribution.
    """

    name: str
    drafts: str | None = None
    mapped: bool = False


ARMS = [
    Arm("plain"),
    Arm("plain, other seeds"),
    Arm("greedy drafts", "greedy"),
    Arm("greedy drafts, map", "greedy", True),
    Arm("sampled drafts", "sampled"),
    Arm("sampled drafts, map", "sampled", True),
    Arm(PLANTED, "greedy"),
]

# A plugin of vLLM's: the rule accepts a draft if p/q is at least a uniform number, and that is now always 0.
ACCEPT_ALL = """def register():
    from vllm.v1.sample import rejection_sampler
    draw = rejection_sampler.generate_uniform_probs
    rejection_sampler.generate_uniform_probs = lambda *args, **names: draw(*args, **names).zero_()
"""
# SGLang accepts a draft at once if the model's probability of it is at least this.
ACCEPT_ANY = ["--speculative-accept-threshold-single", "0.0", "--speculative-accept-threshold-acc", "1.0"]


def plant(folder: Path) -> dict[str, str]:
    """Write the plugin into `folder` as an installed package; the environment in which vLLM loads it."""
    (folder / "accept_all.py").write_text(ACCEPT_ALL, encoding="utf-8")
    about = folder / "accept_all-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: accept-all\nVersion: 1\n", encoding="utf-8")
    (about / "entry_points.txt").write_text(
        "[vllm.general_plugins]\naccept_all = accept_all:register\n", encoding="utf-8"
    )
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


class Vllm:
    """float32 on the CPU build; each request's seed decides its answer."""

    dtype = "float32"

    def __init__(self):
        self.engine = vllm.installed()
        self.name = f"vLLM {self.engine.version}{' (CPU build)' if self.engine.cpu else ''}"

    def server(self, args, arm: Arm, number: int, port: int, log: Path, folder: Path) -> Started:
        """The arm's server, not started yet; `folder` takes the planted plugin."""
        flags = ["--dtype", self.dtype, "--max-num-seqs", str(AT_ONCE), "--max-model-len", "256"]
        flags = merged([*flags, "--enforce-eager"], args.flags)
        steps, token_map = args.num_steps if arm.drafts else 0, args.token_map if arm.mapped else None
        sampled = arm.drafts == "sampled"
        serving = Serving(args.model, steps, token_map, port=port, flags=flags, sampled=sampled)
        line = vllm.command(serving, self.engine)
        env = vllm.environment(self.engine, args.model)
        env |= plant(folder) if arm.name == PLANTED else {}
        ready = vllm.ready_lines(read_json(Path(args.model) / "config.json"), steps, token_map)
        return process.Server(line, port, log, env=env), ready

    def client(self, url: str) -> VllmServer:
        return VllmServer(url, alone=False)


class SGLang:
    """bfloat16: SGLang refuses rejection sampling in its deterministic mode, which its float32 needs.

    Without that mode a request's seed means nothing: every server draws numbers of its own.
    """

    dtype = "bfloat16"

    def __init__(self):
        self.name = f"SGLang {sglang.sglang_version()}"

    def server(self, args, arm: Arm, number: int, port: int, log: Path, folder: Path) -> Started:
        """The arm's server, not started yet; `folder` takes the draft vocabulary."""
        env, ready = {}, []
        steps, token_map = args.num_steps if arm.drafts else 0, args.token_map if arm.mapped else None
        own = ["--dtype", self.dtype, "--random-seed", str(number), "--mem-fraction-static", "0.7"]
        own += ["--context-length", "256", *streams(AT_ONCE), *MEASURED]
        sampled = arm.drafts == "sampled"
        serving = Serving(args.model, steps, port=port, flags=merged(own, args.flags), sampled=sampled)
        if sampled and token_map:  # SGLang's own map gives no distribution; our draft model does
            env = sglang.vocab_environment(f"map={token_map}", "fixed:map", args.model, folder / "map.pt")
            ready = [sglang.VOCAB_READY]
        else:
            serving = replace(serving, token_map=token_map)
        line = sglang.command(serving)
        if arm.name == PLANTED:
            line += ACCEPT_ANY
        return process.Server(line, port, log, env=env), ready

    def client(self, url: str) -> backends.Server:
        return backends.Server(url)


ENGINES = {"vllm": Vllm, "sglang": SGLang}
