"""MiMoMTP whose draft vocabulary follows the language of the running requests; overrides SGLang's class by
its name.

SGLang 0.5.17 to 0.5.23. The draft worker's three phases get the batch with its requests before they run;
there, on the stream that runs the model, the active map is chosen and copied. Verification is untouched, so
texts do not change. `FASTMTP_DRAFT_VOCAB` names the file that fastmtp.serve wrote (without it the head stays
SGLang's own, for `fast_tree` alone); `FASTMTP_CHECK_DRAFTS=1` stops the server at a draft outside the map it
was drafted with (slow: for tests).
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections import Counter

from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.models.mimo_mtp import MiMoMTP as StockMiMoMTP
from sglang.srt.runtime_context import get_parallel

from fastmtp.sglang_ext import fast_tree
from fastmtp.sglang_ext.active_head import ActiveHead
from fastmtp.vocab.draft_vocab import DraftVocab

VOCAB, CHECK = "FASTMTP_DRAFT_VOCAB", "FASTMTP_CHECK_DRAFTS"
FIELD = "draft_lang"  # in a request's custom_params
REPORT_S = 10.0

logger = logging.getLogger(__name__)


class ActiveLogits(LogitsProcessor):
    """SGLang's logits processor on the active rows. head: None until the target's head is shared."""

    head: ActiveHead | None = None

    def _compute_lm_head(self, hidden_states, lm_head, embedding_bias=None, **buffer):
        if self.head is None:
            return super()._compute_lm_head(hidden_states, lm_head, embedding_bias, **buffer)
        return self.head.logits(hidden_states)


class MiMoMTP(StockMiMoMTP):
    """The registry's key is the class name: this one replaces the stock one."""

    def __init__(self, config, quant_config=None, prefix=""):
        super().__init__(config, quant_config, prefix)
        self.logits_processor = ActiveLogits(config)

    def set_embed_and_head(self, embed, head):
        """SGLang calls this once, before it captures its graphs: share the target's tensors, make the
        buffers.
        """
        super().set_embed_and_head(embed, head)
        if (faster := fast_tree.install()) and get_parallel().tp_rank == 0:
            print(f"draft trees: {' and '.join(faster)} by our kernels", flush=True)
        if VOCAB not in os.environ:
            return
        if get_parallel().attn_dp_size != 1:
            raise ValueError(
                "--token-maps: not with DP attention, whose ranks run different requests on one head"
            )
        self.vocab = DraftVocab.load(os.environ[VOCAB])
        first = self.lm_head.shard_indices.org_vocab_start_index
        active = ActiveHead(head, self.vocab.maps, first)
        self.logits_processor.head = active
        self.record = Record(get_parallel().tp_rank == 0)
        active.activate(self.vocab.first())
        sizes = ", ".join(f"{name} {len(ids)}" for name, ids in self.vocab.maps.items())
        # Printed at any log level, because fastmtp.serve looks for this line.
        self.record.ready(f"policy {self.vocab.policy}, maps {sizes}; active {active.active}")
        wrap_worker()

    def load_weights(self, weights):
        super().load_weights(weights)
        if self.logits_processor.head is not None:  # new weights in a running server
            self.logits_processor.head.refresh()

    def follow(self, reqs) -> str:
        """Activate the map for these requests; its name."""
        names = set()
        for req in reqs:
            follower = getattr(req, "fastmtp_follower", None)
            if follower is None:
                params = req.sampling_params.custom_params
                asked = params.get(FIELD) if isinstance(params, dict) else None
                follower = req.fastmtp_follower = self.vocab.follow(req.origin_input_ids, asked)
            names.add(follower.look(req.output_ids))
        name = self.vocab.together(names)
        if self.logits_processor.head.activate(name):
            self.record.switched(name)
        return name


class Record:
    """Switches and tokens drafted per map: lines in the server's log, and counters with --enable-metrics."""

    def __init__(self, shown: bool):
        self.shown, self.switches, self.drafted = shown, 0, Counter()
        self.last, self.metrics = time.monotonic(), None
        if shown and "PROMETHEUS_MULTIPROC_DIR" in os.environ:  # SGLang sets it with --enable-metrics
            import prometheus_client

            switches = prometheus_client.Counter(
                "fastmtp:vocab_switches", "Changes of the draft's token map", ["map"]
            )
            drafted = prometheus_client.Counter(
                "fastmtp:drafted_tokens", "Tokens drafted with a token map", ["map"]
            )
            self.metrics = switches, drafted

    def ready(self, text: str) -> None:
        if self.shown:
            print(f"draft vocabulary: ready, {text}", flush=True)

    def say(self, text: str) -> None:
        if self.shown:
            logger.info("draft vocabulary: %s", text)

    def switched(self, name: str) -> None:
        self.switches += 1
        if self.metrics:
            self.metrics[0].labels(map=name).inc()

    def drew(self, name: str, tokens: int) -> None:
        """Count drafts; every ten seconds with drafts, a line."""
        self.drafted[name] += tokens
        if self.metrics:
            self.metrics[1].labels(map=name).inc(tokens)
        if time.monotonic() - self.last >= REPORT_S:
            self.last = time.monotonic()
            counts = ", ".join(f"{name} {count}" for name, count in self.drafted.items())
            self.say(f"active {name}; {self.switches} switches; tokens drafted: {counts}")


def wrap_worker() -> None:
    """Let the draft worker choose the map before each of its phases; once per process."""
    from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker

    if hasattr(EagleDraftWorker, "fastmtp_wrapped"):
        return
    EagleDraftWorker.fastmtp_wrapped = True
    checking = os.environ.get(CHECK) == "1"

    def wrap(phase: str):
        inner = getattr(EagleDraftWorker, phase)

        @functools.wraps(inner)
        def run(worker, batch, *args, **kwargs):
            model, reqs = worker.draft_runner.model, batch.reqs
            if not reqs:  # an idle rank
                return inner(worker, batch, *args, **kwargs)
            name = model.follow(reqs)
            result = inner(worker, batch, *args, **kwargs)
            if phase == "draft":
                model.record.drew(name, len(reqs) * (worker.speculative_num_draft_tokens - 1))
            if checking:
                allowed = name, set(model.vocab.maps[name].tolist())
                check(reqs, allowed, result.draft_token if phase == "draft" else None, worker.topk)
            return result

        setattr(EagleDraftWorker, phase, run)

    for phase in ("draft", "_draft_extend_for_prefill", "_draft_extend_for_decode"):
        wrap(phase)


def check(reqs, allowed: tuple[str, set[int]], drafts, topk: int = 1) -> None:
    """AssertionError for a draft outside its map (name, ids). drafts: [B * N], the newest token and its
    N - 1 drafts.

    The root's children came from the phase before, whose map is remembered with the request. In a tree they
    are the first drafts, at most `topk` of them.
    """
    if drafts is None:
        for req in reqs:
            req.fastmtp_first = allowed
        return
    for req, row in zip(reqs, drafts.view(len(reqs), -1).tolist(), strict=True):
        for place, token in enumerate(row[1:]):
            maps = [req.fastmtp_first] * (place < topk) + [allowed] * (place > 0)
            assert any(token in ids for _, ids in maps), f"draft {token} is outside the map '{maps[-1][0]}'"


EntryClass = MiMoMTP
