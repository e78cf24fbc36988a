"""Models, heads and token maps by name, from stand-ins of the Hugging Face Hub and of ModelScope."""

import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.hubs import serving
from helpers.tiny import save_folder, save_released
from huggingface_hub import constants
from safetensors.torch import load_file

from evaluation.plan import parse_arms
from fastmtp import acceptance, hub, serve
from fastmtp.budget.shapes import shape_of
from fastmtp.checkpoint import HEAD_TENSORS, PREFIX, head_files, read_head
from fastmtp.cli import InputError
from fastmtp.export import export
from fastmtp.prepare_model import prepare
from fastmtp.vocab.draft_vocab import load_map, parse_maps

MIMO, MAPS = "XiaomiMiMo/MiMo-7B-RL", "thunlp/Qwen2-7B-Instruct-FR-Spec"


@pytest.fixture(params=["hf", "modelscope"])
def hubs(request, stand_in, monkeypatch):
    """The stand-in, with one of the two hubs switched on."""
    monkeypatch.setenv("FASTMTP_HUB", request.param)
    hub.head.cache_clear()
    hub.token_map.cache_clear()
    return stand_in


@pytest.fixture(scope="module")
def mimo(tmp_path_factory) -> Path:
    """A released MiMo folder in four files and an index, with its own code, pickled weights and a picture."""
    folder = save_released(tmp_path_factory.mktemp("mimo") / "model", "25KB")
    assert len([*folder.glob("*.safetensors")]) >= 4
    for name in ("pytorch_model.bin", "modeling_mimo.py", "consolidated.pth", "figure.png"):
        (folder / name).write_bytes(b"never asked for")
    return folder


def published(folder: Path, **more: bytes) -> dict[str, bytes]:
    """A folder as a repository's files."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} | more


def saved(ids) -> bytes:
    buffer = io.BytesIO()
    torch.save(ids, buffer)
    return buffer.getvalue()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_a_released_model_is_prepared_by_name_and_then_without_a_network(hubs, mimo, tmp_path, monkeypatch):
    hubs.repos[MIMO] = published(mimo)
    prepare(MIMO, tmp_path / "out")
    old, new = weights(mimo), weights(tmp_path / "out")
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert {Path(name).suffix for name in hubs.downloads()} == {".json", ".safetensors", ".jinja"}
    assert len(hubs.downloads()) == len(set(hubs.downloads()))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hubs.requests.clear()
    prepare(MIMO, tmp_path / "again")
    assert hubs.requests == []


def test_of_a_head_only_its_files_are_fetched(hubs, mimo, base_folder, tmp_path):
    hubs.repos["TencentBAC/FastMTP"] = published(mimo)
    export(base_folder, "TencentBAC/FastMTP", tmp_path / "out")
    index = json.loads((mimo / "model.safetensors.index.json").read_bytes())["weight_map"]
    needed = {file for name, file in index.items() if name.startswith(PREFIX)}
    assert {name for name in hubs.downloads() if name.endswith(".safetensors")} == needed != {*index.values()}
    head, out = read_head(mimo), read_head(tmp_path / "out")
    assert out.keys() == HEAD_TENSORS and all(torch.equal(head[name], out[name]) for name in out)
    assert {path.name for path in head_files("TencentBAC/FastMTP")} == needed


def test_a_revision_is_kept_to(hubs, mimo, tmp_path):
    hubs.repos[MIMO] = published(mimo)
    assert (hub.model(f"{MIMO}@v1") / "config.json").is_file()
    with pytest.raises(
        InputError, match="@v9: no such path here, and .* did not give it: no such .*revision"
    ):
        hub.model(f"{MIMO}@v9")


def test_maps_are_found_by_file_and_by_folder(hubs, tokenizer, capsys):
    hubs.repos[MAPS] = {"freq_32768.pt": saved([9, 3, 3, 7])}
    hubs.repos["TencentBAC/FastMTP"] = {
        "fr_zh/freq_zh_16384.pt": saved(torch.tensor([5, 4])),
        "config.json": b"{}",
    }
    ids = load_map(hub.token_map(f"{MAPS}/freq_32768.pt"), tokenizer, 100)
    assert ids.tolist() == [3, 7, 9]
    warning = capsys.readouterr().err
    assert (
        "special tokens are not in this map, such as <|im_end|>" in warning and warning.count("warning") == 1
    )
    assert load_map(hub.token_map("TencentBAC/FastMTP/fr_zh"), tokenizer, 100).tolist() == [4, 5]
    hubs.repos["TencentBAC/FastMTP"]["fr_zh/freq_zh_32768.pt"] = saved([1])
    hub.token_map.cache_clear()
    with pytest.raises(
        InputError, match="several token maps; give one of TencentBAC/FastMTP/fr_zh/freq_zh_16384"
    ):
        hub.token_map("TencentBAC/FastMTP/fr_zh")
    with pytest.raises(InputError, match="has no file fr_zh/freq_en.pt; check the name"):
        hub.token_map("TencentBAC/FastMTP/fr_zh/freq_en.pt")


def test_a_map_with_all_special_tokens_is_used_without_a_word(tokenizer, tmp_path, capsys):
    (tmp_path / "all.pt").write_bytes(saved([*range(len(tokenizer))]))
    load_map(tmp_path / "all.pt", tokenizer, len(tokenizer))
    assert capsys.readouterr().err == ""


def test_servers_and_evaluation_take_maps_by_name(hubs, base_folder, capsys):
    hubs.repos[MAPS] = {"freq_32768.pt": saved([9, 3]), "zh.pt": saved([9, 4])}
    name = f"{MAPS}/freq_32768.pt"
    serve.main(["--model", str(base_folder), "--engine", "sglang", "--token-map", name, "--dry-run"])
    path = hub.token_map(name)
    assert f"--speculative-token-map {Path(path).resolve()}" in capsys.readouterr().out
    assert parse_maps(f"en={name},zh={MAPS}/zh.pt") == {"en": path, "zh": hub.token_map(f"{MAPS}/zh.pt")}
    assert parse_arms("fastmtp:3+fr", "m", None, [f"fr={name}"])[0].token_map == path


def test_heads_and_models_of_a_hub_are_measured_under_their_names(hubs, mimo, base_folder, tmp_path, capsys):
    hubs.repos |= {MIMO: published(mimo), "org/base": published(base_folder)}
    sample = {"id": "a", "key": "a", "source": "s", "lang": "en", "messages": [], "finish": "stop"}
    (tmp_path / "data.jsonl").write_text(json.dumps(sample | {"prompt_ids": [7, 8], "output_ids": [9, 8, 7]}))
    out = tmp_path / "out.json"
    asked = ["--model", "org/base", "--head", MIMO, "--data", str(tmp_path / "data.jsonl"), "--out", str(out)]
    acceptance.main([*asked, "--device", "cpu", "--json"])
    figures = json.loads(out.read_text())
    assert {row["head"] for row in figures["rows"]} == {MIMO}
    assert json.loads(capsys.readouterr().out) == figures


def test_a_budget_needs_the_configuration_alone(hubs, mimo):
    hubs.repos[MIMO] = published(mimo)
    assert shape_of(MIMO) == shape_of(str(mimo)) and hubs.downloads() == ["config.json"]


def test_what_is_not_supported_costs_no_weights(hubs, mimo, tmp_path):
    config = json.dumps({"model_type": "gemma2", "architectures": ["Gemma2"]}).encode()
    hubs.repos["org/model"] = published(mimo) | {"config.json": config}
    with pytest.raises(InputError, match="org/model.*gemma2"):
        prepare("org/model", tmp_path / "out")
    assert hubs.downloads() == ["config.json"]


@pytest.mark.parametrize(
    "files, message",
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"p"}, "no weights in safetensors format"),
        ({"model.safetensors": b"w"}, "has no config.json"),
        (
            {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "a.safetensors"}}'},
            "a.safetensors is missing",
        ),
    ],
)
def test_repositories_that_are_no_model_are_refused(hubs, files, message):
    hubs.repos["org/model"] = files
    with pytest.raises(InputError, match=message):
        hub.model("org/model")
    assert "pytorch_model.bin" not in hubs.downloads()


def test_what_is_nowhere_is_one_line_that_says_both(hubs, monkeypatch):
    with pytest.raises(
        InputError, match="org/none: no such path here, and .*no such repository.*, or run: .*login"
    ):
        hub.model("org/none")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hubs.requests.clear()
    with pytest.raises(InputError, match="org/model: .*HF_HUB_OFFLINE is set.*not downloaded before"):
        hub.model("org/model")
    assert hubs.requests == []


def test_a_hub_that_is_down_gives_what_was_downloaded(stand_in, mimo):
    stand_in.repos[MIMO] = published(mimo)
    folder = hub.model(MIMO)
    stand_in.down = True
    assert hub.model(MIMO) == folder
    with pytest.raises(InputError, match="no network"):
        hub.model("org/other")


@pytest.mark.parametrize(
    "text",
    ["models/x", "runs/a/b", "vocab/qwen2/en_9k.pt", "here/model", "gpt2", "../a/b", "/a/b", "a/b.gguf"],
)
def test_what_looks_like_a_path_starts_no_download(text, stand_in, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(InputError, match="no such"):
        hub.model(text)
    assert hub.token_map(text) == text
    assert stand_in.requests == []


def test_a_folder_of_a_repositorys_name_is_the_model(stand_in, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_folder(Path("org/model"))
    assert hub.model("org/model") == Path("org/model") and stand_in.requests == []


COMMANDS = {
    "fastmtp.acceptance": "--model NAME --data rows.jsonl",
    "fastmtp.build_vocab": "--tokenizer NAME --data rows.jsonl --lang en --sizes 400 --out maps",
    "fastmtp.curate": "--input rows.jsonl --model NAME --out curated",
    "fastmtp.decoding": "--model NAME --prompts prompts.jsonl --out out.jsonl",
    "fastmtp.distill": "--model NAME --prompts prompts.jsonl --out out.jsonl",
    "fastmtp.doctor": "NAME",
    "fastmtp.export": "--base NAME --head smollm2-vanilla --out out",
    "fastmtp.fit_head": "--model NAME --data rows.jsonl --out out",
    "fastmtp.plan": "--model NAME --data rows.jsonl --costs costs.json --out plan.json",
    "fastmtp.prepare_model": "--model NAME --out out",
    "fastmtp.serve": "--model NAME --dry-run",
    "evaluation.run": "--model NAME --arms baseline --out out",
}


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_that_takes_a_model_asks_the_hub(module, stand_in, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompt = {"id": "a", "messages": [{"role": "user", "content": "x"}]}
    Path("prompts.jsonl").write_text(json.dumps(prompt) + "\n")
    Path("rows.jsonl").write_text("{}\n")
    words = COMMANDS[module].replace("NAME", "org/none").split()
    with pytest.raises(InputError, match="org/none: no such path here, and the Hugging Face Hub"):
        importlib.import_module(module).main(words)
    assert {path.name for path in tmp_path.iterdir()} <= {"prompts.jsonl", "rows.jsonl"}


def test_another_word_for_a_hub_is_refused(monkeypatch):
    monkeypatch.setenv("FASTMTP_HUB", "github")
    with pytest.raises(InputError, match="FASTMTP_HUB=github: no such hub; give one of hf, modelscope"):
        hub.model("org/model")


def test_a_command_reads_the_environment(base_folder, tmp_path):
    """In a process of its own, which sets the clients up by itself; its log gets no bar."""
    with serving() as (stand_in, url):
        stand_in.repos["org/base"] = published(base_folder)
        ours = {
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        line = [sys.executable, "-m", "fastmtp.doctor", "org/base"]
        result = subprocess.run(line, capture_output=True, text=True, env=os.environ | ours)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "43 in F32" in result.stdout
    assert result.stderr == "org/base: from the Hugging Face Hub; what is here already is used again\n"
