"""SGLang's flags as words: one name per flag, values, and sets of flags that several commands share."""

from __future__ import annotations

from collections.abc import Sequence

from fastmtp.cli import split_at_dashes

# Other spellings of a flag, and old names that are gone after 0.5.17 -> the name that every version knows.
ALIASES = {
    "--model": "--model-path",
    "--tp": "--tp-size",
    "--tensor-parallel-size": "--tp-size",
    "--dp": "--dp-size",
    "--data-parallel-size": "--dp-size",
    "--attention-data-parallel-size": "--attn-dp-size",
    "--speculative-draft-model": "--speculative-draft-model-path",
    "--cuda-graph-max-bs": "--cuda-graph-max-bs-decode",
}

# Deterministic inference: SGLang has no float32 kernel of its plain RMSNorm. Triton: FlashAttention 3 has
# none either, and Triton multiplies float32 in TensorFloat-32 (10 bits) unless told otherwise.
FLOAT32 = ["--enable-deterministic-inference", "--attention-backend", "triton"]
FLOAT32_ENVIRONMENT = {"TRITON_F32_DEFAULT": "ieee"}
# A server that one command starts, asks and stops: no warm-up, nothing compiled for it in vain.
MEASURED = ["--disable-prefill-cuda-graph", "--skip-server-warmup", "--grammar-backend", "none"]
# A shape without weights on one stream. SGLang takes all memory that is free when it looks, minus a share of
# what was free when it started. So beside others that start too, the key-value pool needs a fixed size, and
# the share must not bind.
DUMMY = ["--load-format", "dummy", "--skip-tokenizer-init", "--dtype", "bfloat16", "--random-seed", "0"]
DUMMY += ["--mem-fraction-static", "0.98", "--max-total-tokens", "4096", "--context-length", "4096"]
DUMMY += ["--chunked-prefill-size", "2048"]
# For servers that wait while others are asked. One that slept may draft more slowly: results/host_pace.md.
SLEEPING = ["--sleep-on-idle"]


def streams(count: int) -> list[str]:
    """At most `count` requests at a time, and CUDA graphs for no more."""
    return ["--max-running-requests", str(count), "--cuda-graph-max-bs-decode", str(count)]


def canonical(flags: Sequence[str]) -> list[str]:
    """Flags under the names that every supported version knows."""
    split = [flag.partition("=") for flag in flags]
    return [ALIASES.get(name, name) + equals + value for name, equals, value in split]


def split_flags(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """A command's own arguments and, after `--`, SGLang's under their canonical names."""
    ours, flags = split_at_dashes(argv)
    return ours, canonical(flags)


def values(flags: Sequence[str]) -> dict[str, str]:
    """Each flag's last value; empty for a switch."""
    result = {}
    for flag, after in zip(flags, [*flags, "--"][1:], strict=True):
        if flag.startswith("--"):
            name, equals, value = flag.partition("=")
            result[name] = value if equals or after.startswith("--") else after
    return result


def without(parts: Sequence[str], flags: Sequence[str]) -> list[str]:
    """`parts` without the flags that `flags` give: the printed command then shows each once."""
    replaced = values(flags)
    kept, skipping = [], False
    for part in parts:
        if part.startswith("--"):
            skipping = part.partition("=")[0] in replaced
        if not skipping:
            kept.append(part)
    return kept


def merged(defaults: Sequence[str], flags: Sequence[str]) -> list[str]:
    """`defaults` where `flags` say nothing else, then `flags`."""
    return [*without(defaults, flags), *flags]
