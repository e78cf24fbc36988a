"""Cards as their vendors' data sheets describe them, and what an engine adds to a card's own time."""

from __future__ import annotations

from dataclasses import dataclass

from fastmtp.cli import InputError


@dataclass(frozen=True)
class Engine:
    """What bytes over the data sheet's bandwidth do not explain, fitted to `measured.DECODING`.

    share: of the bandwidth that products of one row reach; in seconds: `layer` per decoder layer (its small
    kernels), `draft` per draft step (choosing the token), `cycle` per cycle (verification); `shortest`: no
    cycle takes less, because the host has its own work to do.
    """

    name: str
    share: float
    layer: float
    draft: float = 0.0
    cycle: float = 0.0
    shortest: float = 0.0


SGLANG = Engine("SGLang", 0.942, 45.0e-6, 59.1e-6, 452e-6, 2.9e-3)
DECODER = Engine("fastmtp.decoding", 1.0, 0.93e-3)


@dataclass(frozen=True)
class Card:
    """memory: bytes; bandwidth: bytes per second; rate: dense bfloat16 operations per second (None: no
    training estimate).
    """

    name: str
    memory: float
    bandwidth: float
    rate: float | None
    source: str
    engine: Engine = SGLANG


NVIDIA = "https://www.nvidia.com/en-us/data-center"
_CARDS = [
    Card("b200", 180e9, 8.0e12, 2250e12, f"{NVIDIA}/dgx-b200/, an eighth of it"),
    Card("h200", 141e9, 4.8e12, 989e12, f"{NVIDIA}/h200/"),
    Card("h100", 80e9, 3.35e12, 989e12, f"{NVIDIA}/h100/, SXM"),
    Card("a100", 80e9, 2.039e12, 312e12, f"{NVIDIA}/a100/, SXM, 80 GB"),
    Card("l40s", 48e9, 0.864e12, 362e12, f"{NVIDIA}/l40s/"),
    Card("a10", 24e9, 0.6e12, 125e12, f"{NVIDIA}/products/a10-gpu/"),
    Card("l4", 24e9, 0.3e12, 121e12, f"{NVIDIA}/l4/"),
    Card("4090", 24e9, 1.008e12, 165e12, "NVIDIA's Ada GPU architecture paper, appendix A"),
    Card(
        "cpu", 16e9, 15.9e9, None, "two cores of an Intel Xeon with AMX, as measured; 16 GB assumed", DECODER
    ),
]
CARDS = {card.name: card for card in _CARDS}


def card_of(name: str) -> Card:
    """The card of this name. InputError if it is not known."""
    key = name.lower().removeprefix("rtx").strip("- ")
    if key not in CARDS:
        raise InputError(f"--gpu {name}: unknown card; choose one of {', '.join(CARDS)}")
    return CARDS[key]
