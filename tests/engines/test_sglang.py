"""SGLang's command line, and what is refused before a start. No SGLang is needed."""

import json
import sys
import types
from pathlib import Path

import pytest
from helpers.serving import a_map, exported, value

from fastmtp import serve
from fastmtp.cli import InputError
from fastmtp.engines import sglang, vllm
from fastmtp.engines.request import Serving
from fastmtp.engines.sglang_flags import canonical
from fastmtp.trees.tree import DynamicTree


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch):
    """The engine tests of this machine may have installed one."""
    monkeypatch.setattr(vllm, "find_python", lambda: None)


@pytest.fixture
def model(tmp_path):
    return exported(tmp_path / "model")


def command(model, *settings, backend="triton", **more):
    return sglang.command(Serving(model, *settings, **more), backend)


def test_the_command_line(model, tmp_path):
    path = a_map(tmp_path)
    line = command(model, 3, path)
    assert line[:3] == [sys.executable, "-m", "sglang.launch_server"]
    assert value(line, "--model-path") == model and value(line, "--port") == "30000"
    assert value(line, "--speculative-algorithm") == "EAGLE"
    assert (
        value(line, "--speculative-num-steps") == "3" and value(line, "--speculative-num-draft-tokens") == "4"
    )
    assert value(line, "--speculative-eagle-topk") == "1"
    assert value(line, "--speculative-token-map") == str(Path(path).resolve())
    assert "--trust-remote-code" not in line
    plain = command(model, 0)
    assert not [part for part in plain if "speculative" in part]


def test_flags_of_the_user_win_and_stand_there_once(model):
    flags = ["--attention-backend", "flashinfer", "--tp-size=2", "--disable-radix-cache"]
    line = command(model, 3, flags=flags)
    assert "triton" not in line and line.count("--attention-backend") == 1
    assert "--tp-size" not in line and "--tp-size=2" in line and line[-1] == "--disable-radix-cache"


def test_old_flag_names_are_given_their_new_ones():
    assert canonical(["--cuda-graph-max-bs", "1", "--cuda-graph-max-bs=2", "--x"]) == [
        "--cuda-graph-max-bs-decode",
        "1",
        "--cuda-graph-max-bs-decode=2",
        "--x",
    ]


def test_remote_code_only_if_the_user_says_so(tmp_path):
    released = exported(tmp_path / "mimo", model_type="mimo", auto_map={"AutoConfig": "c.C"})
    with pytest.raises(InputError, match="needs code from this folder; make one that needs none"):
        command(released)
    allowed = command(released, flags=["--trust-remote-code"])
    assert allowed.count("--trust-remote-code") == 1
    known = exported(tmp_path / "known", auto_map={"AutoConfig": "c.C"})
    assert "--trust-remote-code" not in command(known)


TWO_GPUS = r"--token-map with --tp 2.*sgl-project/sglang/issues/4328"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--tp 2", TWO_GPUS),
        ("--tp=2", TWO_GPUS),
        ("--tp-size 2", TWO_GPUS),
        ("--tensor-parallel-size=2", TWO_GPUS),
        ("--tensor-parallel-size 1 --tp 2", TWO_GPUS),
        ("--tensor-parallel 2", "abbreviated"),
        ("--tp two", "--tp two: must be a whole number"),
        ("--tp 0", "--tp 0: must be"),
        ("--port 30001", "--port 30001 after --"),
        ("--port=0", "--port 0 after --"),
        ("--host 0.0.0.0", "--host 0.0.0.0 after --"),
        ("--model other", "--model-path other after --"),
        ("--model-path=other", "--model-path other after --"),
        ("--speculative-num-steps 5", "--speculative-num-steps 5 after --"),
        ("--speculative-token-map ids.json", "ids.json after --.*give --token-map"),
        ("--speculative-num-draft-tokens 9", "num-draft-tokens 9 after --.*give the tree"),
        ("--speculative-eagle-topk 4", "eagle-topk 4 after --.*give the tree"),
        ("--speculative-adaptive", "give --adaptive"),
        ("--speculative-adaptive-config steps.json", "steps.json after --.*--plan"),
        ("--speculative-algorithm NGRAM", "must be EAGLE"),
        ("--speculative-draft-model other", "the head in the model folder is the draft"),
        ("--speculative-accept-threshold-single 0.5", "must be 1 for drafts"),
        ("--speculative-num 5", "abbreviated"),
        ("--config server.yaml", "write its flags out"),
        ("--config=server.yaml", "write its flags out"),
        ("--api-key secret", "it would be printed"),
    ],
)
def test_flags_after_the_dashes_are_checked_like_our_own(flags, message, model, tmp_path, monkeypatch):
    monkeypatch.setattr(sglang, "attention_backend", lambda: "triton")
    argv = ["--model", model, "--token-map", a_map(tmp_path), "--dry-run", "--", *flags.split()]
    with pytest.raises(InputError, match=message) as caught:
        serve.main(argv)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize("flag", ["--speculative-algorithm EAGLE", "--speculative-num-steps=3"])
def test_plain_decoding_takes_no_drafting_flags(flag, model):
    with pytest.raises(InputError, match="--speculative-"):
        command(model, 0, flags=flag.split())


def test_flags_that_repeat_our_options_stand_there_once(model):
    flags = ["--port", "30000", "--speculative-num-steps=3", "--speculative-draft-attention-backend", "fa3"]
    line = command(model, 3, port=30000, flags=flags)
    names = [part.partition("=")[0] for part in line if part.startswith("--")]
    assert len(names) == len(set(names)) and value(line, "--port") == "30000"
    assert command(model, 0, flags=flags[-2:]), "a baseline passes over it"


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_ports_and_hosts_that_cannot_be(port, model):
    with pytest.raises(InputError, match=f"--port {port}: must be between 1 and 65535"):
        command(model, port=port)
    with pytest.raises(InputError, match="--host no such host"):
        command(model, host="no such host")


def test_maps_are_checked_before_anything_starts(model, base_folder, tmp_path):
    for ids, message in (([5, 400], "id 400 is outside"), ([-1], "id -1 is outside")):
        with pytest.raises(InputError, match=message):
            command(model, token_map=a_map(tmp_path, ids))
    with pytest.raises(InputError, match="zh.pt: no such token map"):
        command(model, token_maps=f"en={a_map(tmp_path)},zh={tmp_path}/zh.pt")
    with pytest.raises(InputError, match="--token-maps with --enable-dp-attention"):
        flags = ["--dp", "2", "--enable-dp-attention"]
        command(model, token_maps=f"en={a_map(tmp_path)}", flags=flags)
    beside = {"tokenizer": {"name": "other", "sha256_of_vocabulary": "f00", "ids": 30}}
    path = a_map(tmp_path)
    Path(path).with_suffix(".json").write_text(json.dumps(beside))
    for maps in ({"token_map": path}, {"token_maps": f"en={path}"}):
        with pytest.raises(InputError, match="made for another tokenizer"):
            command(str(base_folder), **maps)


@pytest.mark.parametrize(
    "changes, given, message",
    [
        ({"architectures": ["LlamaForCausalLM"]}, {}, "export with fastmtp.export, or --no-spec"),
        ({"num_nextn_predict_layers": None}, {}, "num_nextn_predict_layers is None, must be 1"),
        ({}, {"token_map": "/nowhere/en.pt"}, "no such token map"),
        ({}, {"token_map": "/nowhere/en.pt", "num_steps": 0}, "nothing to shorten"),
        ({}, {"token_map": "/nowhere/en.pt", "tp": 2}, r"sgl-project/sglang/issues/4328"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(changes, given, message, tmp_path):
    folder = exported(tmp_path / "m", **changes)
    with pytest.raises(InputError, match=message) as caught:
        command(folder, **given)
    assert "\n" not in str(caught.value)


def test_any_model_can_be_served_plain(tmp_path):
    folder = exported(tmp_path / "m", architectures=["LlamaForCausalLM"])
    assert command(folder, 0)
    with pytest.raises(InputError, match="no such model folder"):
        command(str(tmp_path / "none"))


def test_versions(monkeypatch):
    for version, fine in (("0.5.17", True), ("0.5.23", True), ("0.6.0rc1", True), ("0.5.9", False)):
        monkeypatch.setattr(sglang.importlib.metadata, "version", lambda name, v=version: v)
        if fine:
            assert sglang.sglang_version() == version
        else:
            with pytest.raises(InputError, match="too old"):
                sglang.sglang_version()


@pytest.mark.parametrize(
    "kernels, capability, backend",
    [(True, "9.0", "fa3"), (False, "9.0", "triton"), (True, "8.6", "triton"), (True, "", "triton")],
)
def test_the_attention_backend_is_what_can_run(kernels, capability, backend, tmp_path, monkeypatch):
    if kernels:
        (tmp_path / "flash_ops.abi3.so").write_bytes(b"")
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(sglang.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(sglang, "compute_capability", lambda: capability)
    assert sglang.attention_backend() == backend


def test_with_fa3_the_draft_keeps_its_cuda_graphs(model):
    flag = "--speculative-draft-attention-backend"
    line = command(model, 3, backend="fa3")
    assert line[line.index(flag) + 1] == "triton"
    assert flag not in command(model, 0, backend="fa3") and flag not in command(model, 3, backend="triton")
    own = command(model, 3, flags=[flag, "fa3"], backend="fa3")
    assert own.count(flag) == 1 and own[own.index(flag) + 1] == "fa3"


def served(model, capsys, *options):
    """The printed command line of `fastmtp serve`."""
    serve.main(["--model", model, "--dry-run", *options])
    return capsys.readouterr().out.split()


def test_a_tree_gives_topk_steps_and_nodes(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sglang, "attention_backend", lambda: "triton")
    line = served(model, capsys, "--tree", "4,5,16", "--token-map", a_map(tmp_path))
    assert value(line, "--speculative-eagle-topk") == "4" and value(line, "--speculative-num-steps") == "5"
    assert value(line, "--speculative-num-draft-tokens") == "16" and "--speculative-token-map" in line
    flags = ["--speculative-eagle-topk", "4", "--speculative-num-draft-tokens=16"]
    line = served(model, capsys, "--tree", "4,5,16", "--num-steps", "5", "--", *flags)
    assert line.count("--speculative-eagle-topk") == 1 and "--speculative-num-draft-tokens=16" in line


@pytest.mark.parametrize(
    "options, message",
    [
        ("--tree 4,3", "give TOPK,DEPTH,NODES"),
        ("--tree 2,2,9", "draw 6 drafts, so nodes must be at most 7"),
        ("--tree 4,3,16 --num-steps 5", "3 drafts deep, not 5"),
        ("--tree 4,3,16 --no-spec", "--tree with --no-spec"),
        ("--tree 4,3,16 --adaptive", "--adaptive with a tree"),
        ("--tree 32,1,30 --token-map {map}", "20 ids are too few for a tree of topk 32"),
        ("--tree 32,1,30 --token-maps en={map}", "20 ids are too few for a tree of topk 32"),
        ("--tree 4,3,16 -- --speculative-eagle-topk 2", "eagle-topk 2 after --"),
        ("--tree 4,3,16 --engine vllm", "a draft tree: vLLM drafts chains"),
        ("--tree {tree}", "SGLang draws its trees while it runs"),
        ("--adaptive --no-spec", "--adaptive with --no-spec"),
        ("--adaptive --num-steps 5", "table, 7; leave the steps out"),
        ("--adaptive --engine vllm", "--adaptive: vLLM drafts chains"),
        ("--adaptive -- --enable-dp-attention --dp 2", "--adaptive with --enable-dp-attention"),
    ],
)
def test_trees_and_changing_steps_that_cannot_work(options, message, model, tmp_path, monkeypatch):
    monkeypatch.setattr(sglang, "attention_backend", lambda: "triton")
    (tmp_path / "tree.json").write_text('{"paths": [[0], [1]]}')
    options = options.format(map=a_map(tmp_path), tree=tmp_path / "tree.json")
    with pytest.raises(InputError, match=message) as caught:
        serve.main(["--model", model, "--dry-run", *options.split()])
    assert "\n" not in str(caught.value)


def test_a_tree_as_deep_as_it_says(model):
    tree = DynamicTree(4, 3, 16)
    assert value(command(model, 3, tree=tree), "--speculative-num-draft-tokens") == "16"
    with pytest.raises(InputError, match="3 drafts deep, not 2"):
        command(model, 2, tree=tree)


def test_adaptive_steps(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sglang, "attention_backend", lambda: "triton")
    line = served(model, capsys, "--adaptive", "--token-map", a_map(tmp_path))
    assert "--speculative-adaptive" in line and "--speculative-adaptive-config" not in line
    assert value(line, "--speculative-eagle-topk") == "1" and "--speculative-token-map" in line
    assert value(line, "--speculative-num-draft-tokens") == "8"  # its buffers must hold the table's 7 steps
    line = command(model, 5, adaptive=True, table=str(tmp_path / "steps.json"))
    assert value(line, "--speculative-adaptive-config") == str(tmp_path / "steps.json")


def test_the_user_decides_about_the_tree_kernels(monkeypatch):
    tree = DynamicTree(4, 3, 16)
    monkeypatch.setattr(sglang, "_installed_version", lambda: "0.5.17")
    monkeypatch.delenv("SGLANG_EXTERNAL_MODEL_PACKAGE", raising=False)
    for said, parts in ((None, "1"), ("draft", "draft"), ("0", None), ("", None)):
        monkeypatch.delenv("FASTMTP_FAST_TREE", raising=False)
        if said is not None:
            monkeypatch.setenv("FASTMTP_FAST_TREE", said)
        assert sglang.tree_environment(tree).get("FASTMTP_FAST_TREE") == parts
        assert not sglang.tree_environment(None)
    monkeypatch.delenv("FASTMTP_FAST_TREE")
    monkeypatch.setenv("SGLANG_EXTERNAL_MODEL_PACKAGE", "models.of.mine")
    assert sglang.tree_environment(tree) == {}
