import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmtp.cli import InputError
from fastmtp.vocab.token_map import (
    describe,
    load_token_map,
    map_name,
    parse_size,
    save_token_map,
    short_names,
)


def saved(folder, value):
    torch.save(value, folder / "m.pt")
    return folder / "m.pt"


@pytest.mark.parametrize(
    "value", [[5, 2, 9, 2], torch.tensor([9, 5, 2, 2]), torch.tensor([2, 5, 9], dtype=torch.int32)]
)
def test_loads_lists_and_tensors_sorted_without_duplicates(tmp_path, value):
    ids = load_token_map(saved(tmp_path, value), 10)
    assert ids.dtype == torch.int64 and ids.tolist() == [2, 5, 9]


@pytest.mark.parametrize(
    "value",
    [
        [1, 10],
        [-1, 3],
        [1, 2**70],
        [],
        [1.0, 2.0],
        [True, False],
        ["a"],
        {"ids": [1]},
        (1, 2),
        7,
        torch.tensor([[1, 2]]),
        torch.tensor(3),
        torch.tensor([1.0]),
        torch.tensor([True]),
        torch.tensor([], dtype=torch.int64),
        torch.tensor([0, 1]).to_sparse(),
        torch.tensor([1, 2], device="meta"),
        torch.tensor([1, 2]).to(torch.uint16),
        np.array([1, 2]),
    ],
)
def test_other_content_is_refused_in_one_line_that_names_the_file(tmp_path, value):
    with pytest.raises(InputError) as error:
        load_token_map(saved(tmp_path, value), 10)
    assert "m.pt" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not a map", b"PK\x03\x04broken", b"\x80\x02"])
def test_broken_files(tmp_path, content):
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(InputError, match="m.pt"):
        load_token_map(tmp_path / "m.pt", 10)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(InputError):
            load_token_map(path, 10)


def test_same_ids_same_bytes_and_the_engine_s_read(tmp_path):
    ids = torch.tensor([0, 3, 7])
    save_token_map(tmp_path / "en_3.pt", ids, {"lang": "en"})
    save_token_map(tmp_path / "other" / "x_3.pt", ids, {"lang": "en"})
    assert (tmp_path / "en_3.pt").read_bytes() == (tmp_path / "other" / "x_3.pt").read_bytes()
    # What SGLang does with the file: no code from the pickle, then an int64 tensor.
    found = torch.tensor(torch.load(tmp_path / "en_3.pt", weights_only=True).tolist(), dtype=torch.int64)
    assert found.tolist() == [0, 3, 7]
    info = json.loads((tmp_path / "en_3.json").read_text())
    assert (
        info["file"] == "en_3.pt" and info["size"] == 3 and info["lang"] == "en" and len(info["sha256"]) == 64
    )


@pytest.mark.parametrize(
    "ids",
    [torch.tensor([1, 1]), torch.tensor([2, 1]), torch.tensor([1], dtype=torch.int32), torch.tensor([])],
)
def test_save_refuses_what_is_no_map_and_leaves_nothing(tmp_path, ids):
    with pytest.raises(ValueError):
        save_token_map(tmp_path / "en_2.pt", ids, {})
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_neither_file(tmp_path):
    with pytest.raises(TypeError):
        save_token_map(tmp_path / "en_1.pt", torch.tensor([1]), {"not json": object()})
    assert not list(tmp_path.iterdir())


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, 151679), min_size=1, max_size=200))
def test_round_trip(tmp_path_factory, ids):
    path = tmp_path_factory.mktemp("map") / "m.pt"
    save_token_map(path, torch.tensor(sorted(ids)), {})
    assert load_token_map(path, 151680).tolist() == sorted(ids)


def test_sizes_and_names():
    assert [parse_size(s) for s in ("8k", "32K", "5000")] == [8192, 32768, 5000]
    assert [map_name("en", n) for n in (8192, 32768, 5000)] == ["en_8k", "en_32k", "en_5000"]
    for text in ("", "k", "0", "0k", "-8k", "1.5k", "8m", "²"):
        with pytest.raises(InputError, match="size"):
            parse_size(text)


GOOD = {"tokenizer": {"name": "t", "sha256_of_vocabulary": "f00", "ids": 10}}


@pytest.mark.parametrize(
    "beside",
    [
        "[1, 2, 3]",
        '{"broken": ',
        "",
        "null",
        "{}",
        '{"lang": "en"}',
        '{"tokenizer": null}',
        '{"tokenizer": "qwen2"}',
        '{"tokenizer": {"name": "t", "ids": 10}}',
        '{"tokenizer": {"name": "t", "sha256_of_vocabulary": "f00"}}',
        '{"tokenizer": {"name": "t", "sha256_of_vocabulary": 5, "ids": 10}}',
        '{"tokenizer": {"name": null, "sha256_of_vocabulary": "f00", "ids": 10}}',
        '{"tokenizer": {"name": "t", "sha256_of_vocabulary": "f00", "ids": "10"}}',
        json.dumps(GOOD | {"sha256": "of another map"}),
        json.dumps(GOOD | {"sha256": ["a", "b"]}),
        b"\xff\xfe\x00",
    ],
)
def test_a_json_of_another_kind_beside_a_map_is_refused_in_one_line(tmp_path, beside):
    path = saved(tmp_path, [1, 2])
    (tmp_path / "m.json").write_bytes(beside if isinstance(beside, bytes) else beside.encode())
    with pytest.raises(InputError, match=r"m\.json: .*move it away from m\.pt") as error:
        describe(path)
    assert "\n" not in str(error.value)


def test_a_map_with_its_description_and_one_without(tmp_path):
    assert describe(saved(tmp_path, [1, 2])) is None
    save_token_map(tmp_path / "en_2.pt", torch.tensor([1, 2]), GOOD)
    assert describe(tmp_path / "en_2.pt")["tokenizer"] == GOOD["tokenizer"]
    (tmp_path / "ids.json").write_text("[1, 2]")
    with pytest.raises(InputError, match="ids.json: not a token map"):
        load_token_map(tmp_path / "ids.json", 10)


def test_maps_of_one_name_are_told_apart_by_their_folders():
    assert short_names(["a/union_32k.pt", "b/en_8k.pt"]) == ["union_32k", "en_8k"]
    assert short_names(["mine/union_32k.pt", "vocab/qwen2/union_32k.pt", "c/en_8k.pt"]) == [
        "mine/union_32k",
        "qwen2/union_32k",
        "en_8k",
    ]
    for paths in (["a/m.pt", "a/m.pt"], ["x/full.pt"]):
        with pytest.raises(InputError, match="is taken; rename or copy"):
            short_names(paths, ("full",))
