"""The same arms without a server: each request through `fastmtp.decoding`, on the CPU or one GPU."""

from __future__ import annotations

import time

from evaluation.turn import Turn


class Reference:
    """Answers like `client.Server`, one request at a time. `async with Reference(...) as backend:`."""

    def __init__(self, model_folder: str, dtype: str, device: str, num_steps: int, token_map: str | None):
        self.model_folder, self.dtype, self.device = model_folder, dtype, device
        self.num_steps, self.token_map = num_steps, token_map

    async def __aenter__(self) -> Reference:
        from fastmtp import decoding
        from fastmtp.token_map import load_token_map

        self.generate = decoding.generate
        self.model = decoding.load(self.model_folder, dtype=self.dtype, device=self.device)
        self.map = load_token_map(self.token_map, self.model.net.vocab_size) if self.token_map else None
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
        found = self.generate(
            self.model,
            prompt_ids,
            max_new_tokens,
            num_steps=self.num_steps,
            temperature=temperature,
            seed=seed,
            token_map=self.map,
        )
        latency_s = time.perf_counter() - clock
        return Turn(
            output_ids=list(found.ids),
            text=self.model.tokenizer.decode(found.ids, skip_special_tokens=True),
            prompt_tokens=len(prompt_ids),
            verify_passes=found.verify_passes if self.num_steps else None,
            histogram=list(found.histogram) if self.num_steps else [],
            first_tokens=1,
            first_s=found.prefill_s,
            latency_s=latency_s,
            started=started,
            finish="stop" if found.ids and found.ids[-1] in self.model.eos_ids else "length",
        )
