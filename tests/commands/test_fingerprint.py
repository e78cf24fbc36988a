import json
import os
import shutil

import pytest

from fastmtp import fingerprint as fp
from fastmtp.cli import InputError
from fastmtp.fingerprint import content, differences, digest, fingerprint


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(fp, "SMALL", 4)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"0123456789")
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def test_a_copy_a_touch_and_a_new_run_json_are_the_same_model(folder, tmp_path):
    before = content(folder)
    os.utime(folder / "model.safetensors", (1, 1))
    (folder / "run.json").write_text('{"finished": "today"}')
    (folder / "README.md").write_text("card")
    assert content(folder) == before
    shutil.copytree(folder, tmp_path / "copy")
    assert content(tmp_path / "copy") == before


def test_other_weights_of_the_same_size_and_time_are_another_model(folder):
    before = content(folder)
    stat = (folder / "model.safetensors").stat()
    (folder / "model.safetensors").write_bytes(b"0123456780")
    os.utime(folder / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert content(folder) != before


def test_a_large_file_is_read_once(folder, monkeypatch):
    before = content(folder)
    monkeypatch.setattr(fp.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    (folder / "config.json").unlink()  # small files are read each time
    content(folder)
    monkeypatch.undo()
    (folder / "config.json").write_text("{}")
    assert content(folder) == before


@pytest.mark.parametrize(
    "cache", ["", "[]", '{"model.safetensors": 3}', '{"model.safetensors": {"stamp": []}}']
)
def test_a_broken_cache_costs_time_alone(folder, cache):
    before = content(folder)
    (folder / fp.CACHE).write_text(cache)
    assert content(folder) == before


def test_differences_are_named(folder, tmp_path):
    maps = tmp_path / "map.pt"
    maps.write_bytes(b"one")
    before = fingerprint({"model": folder, "token map": maps}, {"dtype": "float32", "K": 3})
    assert differences(before, json.loads(json.dumps(before))) == []
    maps.write_bytes(b"two")
    now = fingerprint({"model": folder, "token map": maps}, {"dtype": "float32", "K": 5})
    assert differences(before, now) == ["token map: other content", "K: 3 -> 5"]
    assert digest(before) != digest(now)
    none = fingerprint({"model": folder, "token map": None}, {"dtype": "float32", "K": 5})
    assert differences(now, none) == ["token map: other content -> none"]


def test_several_files_count_in_their_order(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    paths = [tmp_path / "a", tmp_path / "b"]
    assert fingerprint({"data": paths}, {}) != fingerprint({"data": paths[::-1]}, {})


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="gone"):
        content(tmp_path / "gone")
    with pytest.raises(ValueError, match="twice: model"):
        fingerprint({"model": None}, {"model": 1})
