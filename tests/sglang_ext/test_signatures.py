"""Our overrides and flags against SGLang's: pinned facts of the oldest and newest version, and real sources.

What is pinned, and how to pin another version: pin.py.
"""

import ast
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from fastmtp import sglang_ext
from fastmtp.engines import sglang, sglang_flags
from fastmtp.engines.request import Serving
from fastmtp.sglang_ext import fast_tree
from fastmtp.trees.tree import DynamicTree

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import pin  # noqa: E402

OVERRIDES = {
    "_compute_lm_head": "layers/logits_processor.py LogitsProcessor._compute_lm_head",
    "__init__": "models/mimo_mtp.py MiMoMTP.__init__",
    "set_embed_and_head": "models/mimo_mtp.py MiMoMTP.set_embed_and_head",
    "load_weights": "models/mimo_mtp.py MiMoMTP.load_weights",
}
PINNED = {p.stem for p in HERE.glob("sglang_*.json")}
PHASES = ("draft", "_draft_extend_for_prefill", "_draft_extend_for_decode")


def sources() -> dict[str, dict]:
    """Facts by name: the committed ones, those of an installed SGLang, those of folders in SGLANG_SOURCES."""
    found = {p.stem: json.loads(p.read_text()) for p in sorted(HERE.glob("sglang_*.json"))}
    spec = importlib.util.find_spec("sglang") if "sglang" not in sys.modules else None
    roots = [Path(spec.submodule_search_locations[0])] if spec else []
    roots += [Path(p) for p in os.environ.get("SGLANG_SOURCES", "").split(os.pathsep) if p]
    return found | {str(root): pin.facts(root) for root in roots}


@pytest.fixture(params=sources().items(), ids=lambda item: item[0])
def facts(request) -> dict:
    return request.param[1]


@pytest.fixture(scope="module")
def ours() -> ast.Module:
    return ast.parse((Path(sglang_ext.__file__).parent / "mimo_mtp.py").read_text(encoding="utf-8"))


def fits(own: ast.FunctionDef, pinned: dict) -> bool:
    """Whether every call that fits the pinned signature fits our function: the same names in the same order,
    as many optional ones, and other keywords taken by name or by `**`.
    """
    mine = pin.signature(own)
    return (
        mine["names"] == pinned["names"]
        and mine["defaults"] >= pinned["defaults"]
        and (own.args.kwarg is not None or {*pinned["keywords"]} <= {*mine["keywords"]})
    )


@pytest.mark.parametrize("name", OVERRIDES)
def test_overrides_take_what_sglang_passes(facts, ours, name):
    kind = "ActiveLogits" if name == "_compute_lm_head" else "MiMoMTP"
    pinned = facts["signatures"][OVERRIDES[name]]
    assert pinned is not None, f"{OVERRIDES[name]} is gone"
    assert fits(pin.definition(ours, f"{kind}.{name}"), pinned)


def test_a_changed_signature_is_noticed(ours):
    head = pin.definition(ours, "ActiveLogits._compute_lm_head")
    same = {"names": ["self", "hidden_states", "lm_head", "embedding_bias"], "defaults": 1, "keywords": []}
    assert fits(head, same) and fits(head, same | {"keywords": ["anything"]})
    assert not fits(head, same | {"names": ["self", "lm_head", "hidden_states", "embedding_bias"]})
    load = pin.definition(ours, "MiMoMTP.load_weights")
    assert not fits(load, {"names": ["self", "weights"], "defaults": 0, "keywords": ["is_mtp"]})


def test_the_phases_and_constructors_that_are_called(facts):
    for phase in PHASES:
        pinned = facts["signatures"][f"speculative/eagle_worker_v2.py EagleDraftWorker.{phase}"]
        assert pinned is not None and pinned["names"][:2] == ["self", "batch"], phase
    assert facts["signatures"]["layers/logits_processor.py LogitsProcessor.__init__"]["names"][1] == "config"
    parallel = facts["signatures"]["runtime_context.py get_parallel"]
    assert parallel == {"names": [], "defaults": 0, "keywords": []}


def test_attributes_that_are_read(facts):
    assert facts["mentions"] == pin.MENTIONS


def test_the_replaced_functions_are_those_of_one_version(facts, request):
    known = {k: v for _, functions in fast_tree.KNOWN.values() for k, v in functions.items()}
    assert facts["digests"].keys() == known.keys()
    pinned = request.node.callspec.id
    assert pinned not in PINNED or (facts["digests"] == known) == (pinned == "sglang_0.5.17")


def test_every_name_that_is_imported_is_pinned(ours):
    modules = {path.partition(" ")[0] for path in (*pin.SIGNATURES, *pin.MENTIONS)}
    imported = [n for n in ast.walk(ours) if isinstance(n, ast.ImportFrom) and "sglang.srt" in n.module]
    assert len(imported) == 4
    for node in imported:
        path = node.module.removeprefix("sglang.srt.").replace(".", "/") + ".py"
        assert path in modules
        for alias in node.names:
            assert any(name.partition(".")[0] == alias.name for name in pin.SIGNATURES[path])


def test_flags_and_aliases(facts, tmp_path):
    flags, aliases = facts["flags"], {a: name for name, names in facts["flags"].items() for a in names}
    config = {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1, "vocab_size": 9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    presets = [*sglang_flags.FLOAT32, *sglang_flags.MEASURED, *sglang_flags.DUMMY, *sglang_flags.streams(1)]
    presets += sglang_flags.SLEEPING
    tree, changing = {"tree": DynamicTree(4, 3, 16)}, {"adaptive": True, "table": "steps.json"}
    for drafts in ({}, tree, changing):
        line = sglang.command(Serving(str(tmp_path), flags=presets, **drafts), "fa3")
        assert not [part for part in line if part.startswith("--") and part not in flags]
    # Every alias of a flag that we look at is known to us, and what we take for an alias is one.
    guarded = {*sglang.GUARDED}
    assert {a: n for a, n in aliases.items() if n in guarded}.items() <= sglang_flags.ALIASES.items()
    for alias, name in sglang_flags.ALIASES.items():
        assert aliases.get(alias, name) == name
    # Abbreviations are refused; no flag that SGLang spells out may look like one.
    whole = {*flags, *aliases} - guarded - sglang_flags.ALIASES.keys()
    assert not [name for name in whole if any(g.startswith(name) for g in guarded)]
