"""The page names what is wrong with a folder, and only that; it never fails on what it finds."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from helpers.tiny import save_folder
from safetensors.torch import load_file, save_file

from fastmtp.checkpoint import PREFIX
from fastmtp.cli import InputError
from fastmtp.doctor import main
from fastmtp.prepare_model import prepare

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
            self.wfile.write(json.dumps(pages.get(self.path, {})).encode())

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
