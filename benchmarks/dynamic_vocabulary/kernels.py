"""The draft's output head alone, without a server: the time of a switch and of a pass inside a CUDA graph."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.gpu import timed
from fastmtp.sglang_ext.active_head import ActiveHead
from fastmtp.vocab.draft_vocab import AUTO, MIXED, DraftVocab
from fastmtp.vocab.lang import LANGUAGES
from fastmtp.vocab.script_table import ScriptTable

LANGS = ("en", "zh")


def toy_vocab(rows: int, vocab_size: int) -> DraftVocab:
    """Two maps without a common id, each id a word of its language: drafts of a map keep an answer in its
    language.

    What a real text does, but with random weights; so that looks at the answer happen and change nothing.
    """
    maps = {lang: torch.arange(rows) + n * rows for n, lang in enumerate(LANGS)}
    maps[MIXED] = torch.arange(rows) + rows // 2
    kind, weight = np.zeros(vocab_size, np.uint8), np.zeros(vocab_size, np.float32)
    for lang in LANGS:
        kind[maps[lang].numpy()], weight[maps[lang].numpy()] = LANGUAGES.index(lang), 1.0
    return DraftVocab(maps, AUTO, ScriptTable(kind, weight))


@torch.inference_mode()
def kernels(shape: dict, sizes: list[int]) -> list[dict]:
    """Per size: microseconds of a switch and of the head in a graph, for one row; RuntimeError if a replay is
    stale.
    """
    generator = torch.Generator(device="cuda").manual_seed(0)
    size = (shape["vocab_size"], shape["hidden_size"])
    head = torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn((1, size[1]), generator=generator, device="cuda", dtype=torch.bfloat16)

    def graph_of(work):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = work()
        return graph, result

    full, _ = graph_of(lambda: (hidden @ head.T).float().argmax(-1))
    costs = [
        {
            "rows": size[0],
            "switch_us": 0.0,
            "head_us": 1e6 * timed(full.replay),
            "static_us": 1e6 * timed(full.replay),
        }
    ]
    for rows in sizes:
        vocab = toy_vocab(rows, size[0])
        active = ActiveHead(head, vocab.maps)
        active.activate(LANGS[0])
        graph, best = graph_of(lambda active=active: active.logits(hidden).float().argmax(-1))
        for name in (*LANGS, MIXED, LANGS[0]):
            active.activate(name)
            graph.replay()
            expected = vocab.maps[name][(hidden @ head[vocab.maps[name].cuda()].T).argmax(-1).cpu()]
            if best.cpu().tolist() != expected.tolist():
                raise RuntimeError(
                    f"after a switch to '{name}' the graph drafted {best.tolist()}, not {expected.tolist()}"
                )
        turns = [0]

        def switch(active=active, turns=turns):
            turns[0] += 1
            active.activate(LANGS[turns[0] % 2])

        small = head[:rows].clone()
        static, _ = graph_of(lambda small=small: (hidden @ small.T).float().argmax(-1))
        cost = {
            "switch_us": timed(switch),
            "head_us": timed(graph.replay),
            "static_us": timed(static.replay),
        }
        costs.append({"rows": rows} | {name: 1e6 * seconds for name, seconds in cost.items()})
    return costs
