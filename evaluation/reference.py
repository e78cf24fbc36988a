"""The same arms without a server: each request through `fastmtp.decoding`, on the CPU or one GPU."""

from __future__ import annotations

import json
import time
from pathlib import Path

from evaluation.turn import Turn


class Reference:
    """Answers like `client.Server`, one request at a time. `async with Reference(...) as backend:`."""

    def __init__(self, model_folder: str, dtype: str, device: str, num_steps: int, token_map: str | None):
        self.model_folder, self.dtype, self.device = model_folder, dtype, device
        self.num_steps, self.token_map = num_steps, token_map

    async def __aenter__(self) -> Reference:
        from transformers import AutoTokenizer

        from fastmtp import decoding

        self.decoding = decoding
        self.model = decoding.load(self.model_folder, dtype=self.dtype, device=self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_folder)
        self.eos_ids = end_ids(self.model_folder, self.tokenizer.eos_token_id)
        self.map = None
        if self.token_map:
            from fastmtp.token_map import load_token_map

            vocab_size = json.loads((Path(self.model_folder) / "config.json").read_text())["vocab_size"]
            self.map = load_token_map(self.token_map, vocab_size)
        return self

    async def __aexit__(self, *_: object) -> None:
        del self.model

    async def info(self) -> dict:
        settings = {"dtype": self.dtype, "device": self.device}
        return {"model": self.model_folder, "tokenizer": self.model_folder, "version": None, "settings": settings}

    async def flush(self) -> None:
        """Nothing is cached between requests."""

    async def ask(self, prompt_ids: list[int], max_new_tokens: int, temperature: float = 0.0, seed: int = 0) -> Turn:
        started, clock = time.time(), time.perf_counter()
        found = self.decoding.generate(
            self.model,
            prompt_ids,
            max_new_tokens,
            num_steps=self.num_steps,
            temperature=temperature,
            seed=seed,
            token_map=self.map,
            eos_ids=self.eos_ids,
        )
        latency_s = time.perf_counter() - clock
        return Turn(
            output_ids=list(found.ids),
            text=self.tokenizer.decode(found.ids, skip_special_tokens=True),
            prompt_tokens=len(prompt_ids),
            verify_passes=found.verify_passes if self.num_steps else None,
            histogram=list(found.histogram) if self.num_steps else [],
            first_tokens=1,
            first_s=found.prefill_s,
            latency_s=latency_s,
            started=started,
            finish="stop" if found.ids and found.ids[-1] in self.eos_ids else "length",
        )


def end_ids(model_folder: str, tokenizer_eos: int | None) -> set[int]:
    """Every end token that the engine would stop at: the tokenizer's and those of both config files."""
    ids = set() if tokenizer_eos is None else {tokenizer_eos}
    for name in ("config.json", "generation_config.json"):
        path = Path(model_folder) / name
        if path.is_file():
            eos = json.loads(path.read_text()).get("eos_token_id")
            ids |= set(eos) if isinstance(eos, list) else set() if eos is None else {eos}
    return ids
