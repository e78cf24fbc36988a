"""What was measured, to calibrate the estimates with and to hold them against."""

from __future__ import annotations

from typing import NamedTuple

SPEED_7B, ENGINES = "results/speed_7b", "results/engines_gpu.md"
VOCABULARY, THROUGHPUT, HEADS = (
    "results/dynamic_vocabulary",
    "results/train_throughput.md",
    "results/smollm2_heads.md",
)
QUICKSTART, QWEN, ONCE = "results/quickstart.md", "results/qwen15.md", "one run"
TREES = "results/trees_gpu.md"  # on a slow host: what its pauses cost a small model
WHOLE = None


class Pass(NamedTuple):
    """Milliseconds of a plain step (K = 0) or of a cycle at one stream. rows: draft vocabulary, None: whole.
    fitted: the engine's constants were fitted to it.
    """

    shape: str
    card: str
    num_steps: int
    rows: int | None
    ms: float
    source: str
    fitted: bool


def _cycles(card: str, rows: int | None, ms: str, source: str, fitted: bool) -> list[Pass]:
    """K = 1, 2, ... of the 7B shape."""
    values = enumerate(map(float, ms.split()), 1)
    return [Pass("mimo-7b", card, k, rows, value, source, fitted) for k, value in values]


DECODING = [
    Pass("mimo-7b", "h200", 0, WHOLE, 4.765, SPEED_7B, True),
    *_cycles("h200", WHOLE, "5.564 6.071 6.566 7.021 7.497 7.962 8.444", SPEED_7B, True),
    *_cycles("h200", 65536, "5.466 5.772 6.153 6.401 6.740 7.058 7.370", SPEED_7B, True),
    *_cycles("h200", 32768, "5.427 5.720 5.895 6.214 6.492 6.760 7.002", SPEED_7B, True),
    *_cycles("h200", 16384, "5.349 5.589 5.853 6.029 6.255 6.476 6.723", SPEED_7B, True),
    *_cycles("h200", 8192, "5.324 5.565 5.803 5.981 6.171 6.400", SPEED_7B, True),
    Pass("mimo-7b", "h100", 0, WHOLE, 6.28, ENGINES, True),
    Pass("mimo-7b", "h100", 3, 32768, 7.65, ENGINES, True),
    Pass("qwen2.5-1.5b", "h200", 0, WHOLE, 1.961, ONCE, True),
    Pass("qwen2.5-1.5b", "h100", 0, WHOLE, 2.22, QWEN, True),
    Pass("qwen2.5-1.5b", "h100", 3, WHOLE, 3.61, QWEN, True),
    Pass("qwen2.5-1.5b", "h100", 3, 32768, 3.30, QWEN, True),
    Pass("smollm2", "h100", 0, WHOLE, 1.422, ENGINES, True),
    Pass("mimo-7b", "h100", 3, 8192, 7.472, VOCABULARY, False),
    Pass("mimo-7b", "h100", 3, 16384, 7.610, VOCABULARY, False),
    Pass("mimo-7b", "h100", 3, 32768, 7.762, VOCABULARY, False),
    Pass("mimo-7b", "h100", 3, 40960, 7.907, VOCABULARY, False),
    Pass("mimo-7b", "h100", 3, WHOLE, 8.729, VOCABULARY, False),
    Pass("mimo-7b", "h200", 3, 16384, 5.764, VOCABULARY, False),
    Pass("mimo-7b", "h200", 3, 32768, 5.876, VOCABULARY, False),
    Pass("mimo-7b", "h200", 3, WHOLE, 6.495, VOCABULARY, False),
    Pass("qwen2.5-1.5b", "h200", 3, WHOLE, 2.94, ONCE, False),
    Pass("qwen2.5-1.5b", "h200", 0, WHOLE, 1.973, TREES, False),
    Pass("qwen2.5-1.5b", "h200", 3, 32768, 3.869, TREES, False),
    Pass("qwen2.5-1.5b", "h200", 5, 32768, 4.140, TREES, False),
    Pass("smollm2", "h100", 3, WHOLE, 3.413, ENGINES, False),
    Pass("qwen2.5-1.5b", "cpu", 0, WHOLE, 195.0, ONCE, True),
    Pass("qwen2.5-1.5b", "cpu", 0, WHOLE, 228.0, ONCE, True),
    Pass("qwen2.5-1.5b", "cpu", 3, 32768, 258.0, ONCE, True),
    Pass("qwen2.5-1.5b", "cpu", 3, WHOLE, 379.0, ONCE, True),
    Pass("smollm2", "cpu", 0, WHOLE, 42.7, QUICKSTART, True),
    Pass("smollm2", "cpu", 3, 8192, 54.8, QUICKSTART, True),
]


class Rate(NamedTuple):
    """Tokens per second of one card. streams: requests in flight, of which prompts and sampling took no time;
    0: training with K = 3.
    """

    shape: str
    card: str
    streams: int
    tokens: float
    source: str


RATES = [
    Rate("mimo-7b", "h200", 0, 18208.9, THROUGHPUT),
    Rate("qwen2.5-1.5b", "h200", 0, 52600, QWEN),  # a third of three cards
    Rate("qwen2.5-1.5b", "h100", 0, 54000, QWEN),
    Rate("smollm2", "h100", 0, 182000, HEADS),
    Rate("mimo-7b", "h200", 1, 205, ONCE),
    Rate("mimo-7b", "h200", 8, 1556, ONCE),
    Rate("mimo-7b", "h200", 64, 9786, ONCE),
    Rate("qwen2.5-1.5b", "h200", 64, 24800, ONCE),
]
# Tokens per second while `fastmtp.distill` kept a card busy: prompts, sampling and the last answers included.
DISTILLED = Rate("qwen2.5-1.5b", "h100", 2048, 53000, QWEN)
