"""The solved start of a head: the best linear map there is, and a head that export and acceptance take."""

import json

import pytest
import torch
from helpers.tiny import tiny_model
from safetensors.torch import load_file

from fastmtp import acceptance, export
from fastmtp.cli import InputError
from fastmtp.fit_head import SINKS, equations, fit, main


def texts(count: int, length: int = 40, vocab: int = 97) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, vocab, (count, length), generator=generator).tolist()


@pytest.fixture(scope="module")
def fitted():
    net = tiny_model(5)
    given = texts(30)
    return net, given, *fit(net, given)


def test_the_map_is_the_least_squares_solution(fitted):
    net, given, head, explained, positions = fitted
    pairs = [equations(net, torch.tensor(text)) for text in given]
    x, y = (torch.cat(part) for part in zip(*pairs, strict=True))
    wanted = torch.linalg.lstsq(x, y).solution
    found = head["model.mtp_layers.0.input_proj.weight"].double().T
    error, least = ((x @ w - y).pow(2).sum() for w in (found, wanted))
    assert positions == len(x) == 30 * (40 - SINKS - 1)
    assert least <= error < 1.001 * least
    assert explained == pytest.approx(1 - (error / y.pow(2).sum()).item(), abs=1e-4)


def test_features_and_targets_are_of_the_right_positions(fitted):
    net, given, *_ = fitted
    ids = torch.tensor(given[0])
    entering = {}
    hook = net.model.layers[-1].register_forward_pre_hook(lambda _, args: entering.update(x=args[0][0]))
    states = net.model(input_ids=ids[None]).last_hidden_state[0]
    hook.remove()
    x, y = equations(net, ids)
    p = SINKS + 7
    scale = entering["x"][p + 1].double().pow(2).mean().sqrt()
    torch.testing.assert_close(y[7] * scale, entering["x"][p + 1].double())
    normed = [v * v.pow(2).mean().add(1e-6).rsqrt() for v in (states[p], net.model.embed_tokens(ids)[p + 1])]
    torch.testing.assert_close(x[7] * scale, torch.cat(normed).double(), rtol=1e-5, atol=1e-5)


def test_with_the_true_input_the_head_is_the_last_layer(fitted):
    """The layer and norm that are taken over give the backbone's own state where the guess is perfect."""
    net, given, head, *_ = fitted
    layer, norm = net.model.layers[-1], net.model.norm
    for name, tensor in layer.state_dict().items():
        assert torch.equal(head[f"model.mtp_layers.0.{name}"], tensor), name
    assert torch.equal(head["model.mtp_layers.0.final_layernorm.weight"], norm.weight)
    for name in ("hidden", "token"):
        assert bool((head[f"model.mtp_layers.0.{name}_layernorm.weight"] == 1).all())


def test_too_little_text_is_refused():
    with pytest.raises(InputError, match="35 positions for 128 columns"):
        fit(tiny_model(5), texts(1))


def samples(path):
    """A file of 20 answers."""
    rows = [{"prompt_ids": text[:10], "output_ids": text[10:]} for text in texts(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_writes_a_head_that_export_takes(base_folder, tmp_path, capsys):
    data = samples(tmp_path / "d.jsonl")
    argv = [
        "--model",
        str(base_folder),
        "--data",
        str(data),
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "head"),
    ]
    main(argv)
    assert "700 positions" in capsys.readouterr().out
    first = load_file(tmp_path / "head" / "model.safetensors")
    assert json.loads((tmp_path / "head" / "run.json").read_text())["config"]["positions"] == 700
    export.export(base_folder, tmp_path / "head", tmp_path / "model")
    acceptance.main(
        ["--model", str(tmp_path / "model"), "--data", str(data), "--limit", "2", "--device", "cpu"]
    )
    main([*argv[:-1], str(tmp_path / "again")])
    second = load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_acceptance_compares_two_heads_on_the_same_answers(base_folder, tmp_path, capsys):
    data = samples(tmp_path / "d.jsonl")
    common = ["--model", str(base_folder), "--data", str(data), "--device", "cpu"]
    heads = [str(tmp_path / "some"), str(tmp_path / "all")]
    main([*common, "--limit", "8", "--out", heads[0]])
    main([*common, "--out", heads[1]])
    capsys.readouterr()
    words = [*common, "--head", heads[0], "--head", heads[1], "--num-steps", "2", "--at", "1"]
    acceptance.main([*words, "--json"])
    figures = json.loads(capsys.readouterr().out)
    one, two = (row["accept_length"] for row in figures["rows"])
    at_1, at_2 = figures["ratios"]
    assert (at_1["k"], at_2["k"]) == (1, 2) and at_2["head"] == heads[1]
    assert at_2["ratio"] == pytest.approx(two / one) and one != two
    assert at_2["interval"][0] <= at_2["ratio"] <= at_2["interval"][1]
    acceptance.main(words)
    assert f"tau over that of {heads[0]} on the same answers" in capsys.readouterr().out
