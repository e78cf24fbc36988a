"""The SGLang model package against made-up engine classes (SGLang's own signatures: test_signatures.py)."""

import importlib.util
import sys
import types

import numpy as np
import pytest
import torch

from fastmtp.vocab.draft_vocab import DraftVocab
from fastmtp.vocab.lang import LANGUAGES
from fastmtp.vocab.script_table import ScriptTable

V, H = 40, 8
PHASES = ("draft", "_draft_extend_for_prefill", "_draft_extend_for_decode")


def engine(tp_rank=0, attn_dp_size=1) -> dict[str, types.ModuleType]:
    """Modules with what the package takes from SGLang, as small as they can be."""

    class LogitsProcessor(torch.nn.Module):
        def __init__(self, config):
            super().__init__()

        def _compute_lm_head(self, hidden_states, lm_head, embedding_bias=None):
            return hidden_states @ lm_head.weight.T

    class MiMoMTP(torch.nn.Module):
        def __init__(self, config, quant_config=None, prefix=""):
            super().__init__()
            self.lm_head = torch.nn.Linear(H, V, bias=False)
            self.lm_head.shard_indices = types.SimpleNamespace(org_vocab_start_index=0)

        def set_embed_and_head(self, embed, head):
            self.lm_head.weight = head

        def load_weights(self, weights):
            self.lm_head.weight.data.copy_(dict(weights)["lm_head.weight"])

    class EagleDraftWorker:
        speculative_num_draft_tokens, topk = 3, 1

        def __init__(self, model):
            self.draft_runner = types.SimpleNamespace(model=model)
            self.seen, self.first = [], {}

        def draft(self, batch, *, with_topology=False):
            head = self.draft_runner.model.logits_processor.head
            self.seen.append(head.active)
            if not batch.reqs:
                return None
            rows = [[0, self.first[id(req)], int(head.columns[1])] for req in batch.reqs]
            return types.SimpleNamespace(draft_token=torch.tensor(rows).flatten())

        def _draft_extend_for_prefill(self, batch, *rest):
            head = self.draft_runner.model.logits_processor.head
            self.first |= {id(req): int(head.columns[0]) for req in batch.reqs}

        def _draft_extend_for_decode(self, batch, result):
            self._draft_extend_for_prefill.__wrapped__(self, batch)

    parallel = types.SimpleNamespace(attn_dp_size=attn_dp_size, tp_rank=tp_rank)
    contents = {
        "sglang.srt.layers.logits_processor": {"LogitsProcessor": LogitsProcessor},
        "sglang.srt.models.mimo_mtp": {"MiMoMTP": MiMoMTP},
        "sglang.srt.runtime_context": {"get_parallel": lambda: parallel},
        "sglang.srt.speculative.eagle_worker_v2": {"EagleDraftWorker": EagleDraftWorker},
    }
    modules = {}
    for name, things in contents.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        vars(modules[name]).update(things)
    return modules


def request(prompt, custom=None):
    return types.SimpleNamespace(
        origin_input_ids=prompt, output_ids=[], sampling_params=types.SimpleNamespace(custom_params=custom)
    )


def batch(*reqs):
    return types.SimpleNamespace(reqs=list(reqs))


@pytest.fixture
def package(monkeypatch, tmp_path):
    """(the package's module, its model with shared head, a draft worker) on a made-up engine; drafts are
    checked.
    """

    def make(**kwargs):
        for name, module in engine(**kwargs).items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, "fastmtp.sglang_ext.mimo_mtp", raising=False)
        kind = np.array([LANGUAGES.index("en")] * 20 + [LANGUAGES.index("zh")] * 20, np.uint8)
        maps = {"en": torch.arange(0, 10), "zh": torch.arange(20, 30), "mixed": torch.arange(15, 25)}
        DraftVocab(maps, "auto", ScriptTable(kind, np.ones(V, np.float32))).save(tmp_path / "v.pt")
        monkeypatch.setenv("FASTMTP_DRAFT_VOCAB", str(tmp_path / "v.pt"))
        monkeypatch.setenv("FASTMTP_CHECK_DRAFTS", "1")
        monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
        module = importlib.import_module("fastmtp.sglang_ext.mimo_mtp")
        model = module.EntryClass(None)
        model.set_embed_and_head(None, torch.nn.Parameter(torch.randn(V, H), requires_grad=False))
        worker = sys.modules["sglang.srt.speculative.eagle_worker_v2"].EagleDraftWorker(model)
        return module, model, worker

    yield make
    sys.modules.pop("fastmtp.sglang_ext.mimo_mtp", None)


ENGLISH, CHINESE = [1, 2, 3, 4], [31, 32, 33, 34]


def test_it_overrides_the_engines_class_by_name(package):
    module, model, _ = package()
    assert module.EntryClass.__name__ == "MiMoMTP" and model.logits_processor.head.active == "mixed"


def test_the_head_is_stock_until_the_targets_is_shared(package):
    module, model, _ = package()
    fresh = module.EntryClass(None)
    hidden = torch.randn(3, H)
    assert torch.equal(
        fresh.logits_processor._compute_lm_head(hidden, model.lm_head), hidden @ model.lm_head.weight.T
    )
    drafted = model.logits_processor._compute_lm_head(hidden, model.lm_head, None, out=None)
    assert drafted.shape == (3, V) and set(drafted.argmax(-1).tolist()) <= set(range(15, 25))


def test_the_map_follows_the_requests(package):
    _, model, worker = package()
    english, chinese = request(ENGLISH), request(CHINESE)
    worker._draft_extend_for_prefill(batch(english))
    worker.draft(batch(english))
    worker._draft_extend_for_prefill(batch(chinese))
    worker.draft(batch(english, chinese))  # the first drafts are of two other maps
    worker._draft_extend_for_decode(batch(english, chinese), None)
    worker.draft(batch(english, chinese))
    worker._draft_extend_for_decode(batch(english), None)
    worker.draft(batch(english))
    worker.draft(batch())
    assert worker.seen == ["en", "mixed", "mixed", "en", "en"]
    assert model.record.switches == 4  # en, zh, mixed, en
    assert model.record.drafted == {"en": 4, "mixed": 8}


def test_an_answer_in_another_language_switches_in_flight(package):
    _, _, worker = package()
    req = request(ENGLISH)
    worker._draft_extend_for_prefill(batch(req))
    for _ in range(20):
        worker.draft(batch(req))
        worker._draft_extend_for_decode(batch(req), None)
        req.output_ids += [35, 36]
    assert worker.seen[0] == "en" and worker.seen[-1] == "zh"


@pytest.mark.parametrize(
    "custom, name",
    [
        ({"draft_lang": "zh", "__req__": 1}, "zh"),
        ({"draft_lang": "xx"}, "mixed"),
        ({"draft_lang": 7}, "mixed"),
        ({}, "en"),
        ("zh", "en"),
    ],
)
def test_what_a_request_asks_for(package, custom, name):
    _, _, worker = package()
    req = request(ENGLISH, custom)
    worker._draft_extend_for_prefill(batch(req))
    worker.draft(batch(req))
    assert worker.seen == [name]


def test_a_draft_outside_its_map_stops_a_checked_server(package):
    _, _, worker = package()
    req = request(ENGLISH)
    worker._draft_extend_for_prefill(batch(req))
    worker.first[id(req)] = 25
    with pytest.raises(AssertionError, match="draft 25 is outside the map 'en'"):
        worker.draft(batch(req))


def test_in_a_tree_the_roots_children_may_be_of_the_map_before(package):
    module, _, _ = package()
    reqs, allowed = [types.SimpleNamespace(fastmtp_first=("en", {1, 2}))], ("zh", {21, 22})
    for drafts in ([0, 1, 2, 21, 22], [0, 1, 21, 22]):
        module.check(reqs, allowed, torch.tensor(drafts), topk=2)
    for drafts, topk in (([0, 21, 2, 22], 2), ([0, 1, 21, 2], 2), ([0, 1, 2], 1)):
        with pytest.raises(AssertionError, match="outside the map"):
            module.check(reqs, allowed, torch.tensor(drafts), topk=topk)


def test_new_weights_reach_the_active_rows(package):
    _, model, _ = package()
    hidden, weight = torch.randn(2, H), torch.randn(V, H)
    model.load_weights([("lm_head.weight", weight)])
    got = model.logits_processor._compute_lm_head(hidden, model.lm_head)
    torch.testing.assert_close(got[:, 15:25], hidden @ weight[15:25].T)


def test_only_the_first_rank_talks(package, capsys):
    package(tp_rank=1)
    assert "draft vocabulary" not in capsys.readouterr().out
    package(tp_rank=0)
    assert (
        "draft vocabulary: ready, policy auto, maps en 10, zh 10, mixed 10; active mixed"
        in capsys.readouterr().out
    )


def test_dp_attention_is_refused(package):
    with pytest.raises(ValueError, match="DP attention"):
        package(attn_dp_size=2)


def test_without_maps_the_head_stays_stock(package, monkeypatch):
    module, _, _ = package()
    monkeypatch.delenv("FASTMTP_DRAFT_VOCAB")
    model = module.EntryClass(None)
    weight, hidden = torch.nn.Parameter(torch.randn(7, H), requires_grad=False), torch.randn(2, H)
    model.set_embed_and_head(None, weight)  # SGLang has taken the rows of its own token map already
    got = model.logits_processor._compute_lm_head(hidden, model.lm_head)
    torch.testing.assert_close(got, hidden @ weight.T)
