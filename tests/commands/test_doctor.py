"""The page names what is wrong with a folder, and only that; it never fails on what it finds."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from helpers.tiny import save_folder, useful_model
from safetensors.torch import load_file, save_file

from fastmtp.checkpoint import CONTRACT_KEY, PREFIX
from fastmtp.cli import InputError
from fastmtp.doctor import main
from fastmtp.health import serving
from fastmtp.health.folder import Folder
from fastmtp.prepare_model import prepare
from fastmtp.reference.teacher_forced import measure, pooled
from fastmtp.tau import Acceptance

HEAD = f"{PREFIX}0."
LAST = "model.layers.1."


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder as it should be: matrices with structure, as training leaves them, and one tokenizer."""
    work = tmp_path_factory.mktemp("doctor")
    prepare(str(save_folder(work / "source", max_position_embeddings=256)), work / "whole")
    rewrite(work / "whole", structured)
    return work / "whole"


def structured(tensors: dict) -> dict:
    generator = torch.Generator().manual_seed(3)
    for tensor in tensors.values():
        if tensor.ndim == 2:
            rows, columns = (torch.randn(size, generator=generator) for size in tensor.shape)
            tensor += 0.2 * rows[:, None] * columns
    return tensors


def rewrite(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def setting(folder: Path, name: str = "config.json", **values) -> None:
    config = json.loads((folder / name).read_text()) | values
    (folder / name).write_text(json.dumps(config))


def page(folder: Path, capsys, *more: str) -> tuple[int, dict[str, dict]]:
    """(exit code, the lines by name)"""
    code = 0
    try:
        main([str(folder), "--json", *more])
    except SystemExit as stop:
        code = stop.code
    return code, {line["name"]: line for line in json.loads(capsys.readouterr().out)}


def test_a_whole_folder_is_well(whole, capsys):
    code, lines = page(whole, capsys)
    assert code == 0 and not [line for line in lines.values() if line["level"] == "error"]
    assert {
        "architecture",
        "tensors",
        "values",
        "head",
        "tokenizer",
        "end ids",
        "SGLang",
        "vLLM",
    } <= lines.keys()
    assert lines["head"]["level"] == "ok" and "distance" in lines["head"]["text"]
    main([str(whole)])
    assert all(line.startswith(("ok ", "warning ")) for line in capsys.readouterr().out.splitlines())


def copied(tensors: dict) -> dict:
    own = {n.removeprefix(LAST): t for n, t in tensors.items() if n.startswith(LAST)}
    return tensors | {HEAD + name: tensor.clone() for name, tensor in own.items()}


def of_head(change):
    def changed(tensors: dict) -> dict:
        head = {n: change(t) for n, t in tensors.items() if n.startswith(HEAD) and t.ndim == 2}
        return tensors | head

    return changed


def nan(tensors: dict) -> dict:
    tensors["model.norm.weight"][3] = torch.nan
    return tensors


WRONG = {
    "head gone": (lambda t: {n: v for n, v in t.items() if "mtp" not in n}, "head", "no tensor"),
    "head a copy": (copied, "head", "copy of the last layer"),
    "head random": (of_head(torch.randn_like), "head", "random"),
    "head all zeros": (of_head(torch.zeros_like), "head", "zeros"),
    "a value is not finite": (nan, "values", "model.norm.weight"),
    "a tensor gone": (
        lambda t: {n: v for n, v in t.items() if n != LAST + "mlp.up_proj.weight"},
        "tensors",
        "up_proj",
    ),
    "no output matrix": (
        lambda t: {n: v for n, v in t.items() if n != "lm_head.weight"},
        "output matrix",
        "missing",
    ),
    "quantised": (lambda t: t | {"lm_head.weight": t["lm_head.weight"].to(torch.int8)}, "quantisation", "I8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_damaged_weights_are_named(name, whole, tmp_path, capsys):
    change, line, word = WRONG[name]
    shutil.copytree(whole, tmp_path / "folder")
    rewrite(tmp_path / "folder", change)
    code, lines = page(tmp_path / "folder", capsys)
    assert code == 1 and lines[line]["level"] == "error" and word in lines[line]["text"]


@pytest.mark.parametrize(
    "change, line, level",
    [
        (lambda f: setting(f, architectures=["LlamaForCausalLM"]), "architecture", "error"),
        (lambda f: setting(f, num_nextn_predict_layers=3), "architecture", "error"),
        (lambda f: setting(f, tie_word_embeddings=True), "output matrix", "error"),
        (lambda f: setting(f, quantization_config={"quant_method": "awq"}), "quantisation", "error"),
        (lambda f: setting(f, vocab_size=300), "vocabulary", "error"),
        (lambda f: setting(f, "generation_config.json", eos_token_id=9), "end ids", "warning"),
        (lambda f: (f / "chat_template.jinja").unlink(), "chat template", "warning"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer", "error"),
        (lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs"), "tensors", "error"),
        (lambda f: (f / "losses.py").unlink(), "transformers", "warning"),
        (lambda f: setting(f, fastmtp={"mtp_hidden": "pre_norm"}), "SGLang", "error"),
    ],
    ids=[
        "plain",
        "layers",
        "tied",
        "awq",
        "vocabulary",
        "end",
        "template",
        "tokenizer",
        "lfs",
        "code",
        "norm",
    ],
)
def test_damaged_files_are_named(change, line, level, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "folder")
    change(tmp_path / "folder")
    code, lines = page(tmp_path / "folder", capsys)
    assert lines[line]["level"] == level and code == (
        1 if any(entry["level"] == "error" for entry in lines.values()) else 0
    )


def test_a_foreign_folder_is_read_without_a_crash(tmp_path, capsys):
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_hidden_layers": "61",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"model.layers.61.eh_proj.weight": torch.ones(2, 4)}, tmp_path / "model.safetensors")
    code, lines = page(tmp_path, capsys)
    assert code == 1 and "not MiMo layout" in lines["architecture"]["text"]


@pytest.mark.parametrize("content", [None, "[1]", "{"])
def test_what_is_no_model_folder_is_bad_input(content, tmp_path):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="config.json"):
        main([str(tmp_path)])
    with pytest.raises(InputError):
        main([str(tmp_path / "none")])


def test_the_accept_length_is_measured(whole, tmp_path, capsys):
    row = {"id": "1", "prompt_ids": [5, 6, 7], "output_ids": [8, 9, 10, 11, 12, 13]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    _, lines = page(whole, capsys, "--data", str(tmp_path / "data.jsonl"))
    assert "on 1 samples" in lines["accept length"]["text"]
    with pytest.raises(InputError, match="none.jsonl"):
        main([str(whole), "--data", str(tmp_path / "none.jsonl")])


@pytest.fixture
def answering():
    """A server that answers with a JSON object per path."""
    pages: dict[str, dict] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in pages else 404)
            self.end_headers()
            value = pages.get(self.path, {})
            self.wfile.write((value if isinstance(value, str) else json.dumps(value)).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", pages
    server.shutdown()


def test_the_server_is_asked(whole, answering, tmp_path, capsys, monkeypatch):
    url, pages = answering
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    pages["/server_info"] = {"model_path": str(whole)}
    code, lines = page(whole, capsys, "--server", url)
    assert code == 1 and lines["server"]["level"] == "ok" and "does not draft" in lines["drafts"]["text"]
    pages["/server_info"] |= {"speculative_algorithm": "EAGLE", "speculative_num_steps": 3}
    code, lines = page(whole, capsys, "--server", url)
    assert code == 0 and "K=3" in lines["drafts"]["text"]
    shutil.copytree(whole, tmp_path / "other")
    rewrite(tmp_path / "other", of_head(lambda tensor: tensor * 2))
    pages["/server_info"]["model_path"] = str(tmp_path / "other")
    code, lines = page(whole, capsys, "--server", url)
    assert code == 1 and "another model" in lines["server"]["text"]
    assert page(whole, capsys, "--server", "http://127.0.0.1:9")[1]["server"]["level"] == "error"


METRICS = """# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 40.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 50.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 30.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 20.0
vllm:spec_decode_num_accepted_tokens_per_pos_created{engine="0",model_name="m",position="0"} 1.7e+09
"""


def test_vllm_is_asked(whole, answering, tmp_path, capsys):
    """It has no /server_info: the model's path is in /v1/models, drafts are in /metrics."""
    url, pages = answering
    pages["/v1/models"] = {"data": [{"id": "m", "root": str(whole)}]}
    assert "does not say" in page(whole, capsys, "--server", url)[1]["server"]["text"]  # some other server
    pages |= {"/version": {"version": "0.32.0"}, "/metrics": METRICS}
    code, lines = page(whole, capsys, "--server", url + "/v1")
    assert code == 0 and lines["server"]["text"] == "serves this folder"
    assert lines["drafts"]["text"] == "MTP, K=2, accept length 2.25 since its start"
    pages["/metrics"] = METRICS.replace("40.0", "0.0").replace("50.0", "0.0")
    assert "accept length unknown" in page(whole, capsys, "--server", url)[1]["drafts"]["text"]
    pages["/metrics"] = "vllm:num_requests_running 0.0"
    code, lines = page(whole, capsys, "--server", url)
    assert code == 1 and "does not draft" in lines["drafts"]["text"]
    del pages["/metrics"]
    assert page(whole, capsys, "--server", url)[1]["drafts"]["level"] == "warning"
    pages["/v1/models"] = {"data": []}
    code, lines = page(whole, capsys, "--server", url)
    assert code == 1 and "names no model" in lines["server"]["text"] and "drafts" not in lines


def test_both_states_are_measured(monkeypatch):
    """Each of the lengths is what acceptance measures when the head gets that state."""
    useful = useful_model(mtp_hidden="pre_norm")
    pairs = zip(useful.prompts, useful.answers, strict=True)
    samples = [{"prompt_ids": p, "output_ids": a} for p, a in pairs]
    monkeypatch.setattr(serving, "load", lambda path: useful.model)
    monkeypatch.setattr(serving, "load_tokenizer", lambda path: None)
    monkeypatch.setattr(serving, "read_samples", lambda *_: samples)
    config = {"vocab_size": 32, CONTRACT_KEY: {"mtp_hidden": "pre_norm"}}
    length, line = serving.expected(Folder(Path("."), config, {}), "data.jsonl", 12, 3)
    post, pre = (float(part.split()[1]) for part in line.text.split(";")[0].split(","))
    assert line.name == "head's state" and "config.json says pre_norm" in line.text
    for state, tau in (("post_norm", post), ("pre_norm", pre)):
        useful.model.net.config.mtp_hidden = state
        assert tau == round(pooled(measure(useful.model, samples, 3)).accept_length, 3)
    assert pre > post and length.text.startswith(f"{pre:.2f} ")


def accepted(*passes: int) -> Acceptance:
    """Answers of 20 tokens after the first, in so many passes."""
    part = Acceptance()
    for count in passes:
        part.add(20, [0, count])
    return part


@pytest.mark.parametrize("state", ["post_norm", "pre_norm"])
def test_the_state_that_fits_is_named(state):
    """Every answer takes fewer passes with `state`; config.json says it, says the other, or says neither."""
    (other,) = {"post_norm", "pre_norm"} - {state}
    results = {state: accepted(8, 9, 10, 8), other: accepted(12, 12, 14, 13)}
    right = serving.fitting(state, True, results)
    assert right.level == "ok" and right.text.endswith(f"config.json says {state}, which fits")
    wrong = serving.fitting(other, True, results)
    assert wrong.level == "error" and f"says {other}, but {state} fits" in wrong.text
    assert f'"mtp_hidden": "{state}"' in wrong.cure
    unsaid = serving.fitting(other, False, results)
    assert unsaid.level == "warning" and f"taken for {other}, but {state} fits" in unsaid.text
    assert serving.fitting(state, False, results).level == "ok"


def test_states_that_are_too_close_are_not_told_apart():
    close = {"post_norm": accepted(8, 12, 9, 11), "pre_norm": accepted(11, 9, 12, 8)}
    line = serving.fitting("post_norm", True, close)
    assert line.level == "warning" and "too close to tell" in line.text
    unknown = serving.fitting("post_norm", True, {"post_norm": Acceptance(), "pre_norm": accepted(9)})
    assert unknown.level == "warning" and "unknown" in unknown.text


def test_a_head_for_the_other_state_is_vllms_alone(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "folder")
    setting(tmp_path / "folder", fastmtp={"mtp_hidden": "pre_norm"})
    _, lines = page(tmp_path / "folder", capsys)
    assert (lines["SGLang"]["level"], lines["vLLM"]["level"]) == ("error", "ok")
