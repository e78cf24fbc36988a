import importlib.util
from pathlib import Path

import pytest

from fastmtp.cli import InputError

SOURCE = Path(__file__).resolve().parents[2] / "benchmarks" / "qwen2_tokenizer.py"
spec = importlib.util.spec_from_file_location("qwen2_tokenizer", SOURCE)
qwen2 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(qwen2)

needs_dashscope = pytest.mark.skipif(
    not importlib.util.find_spec("dashscope"), reason="dashscope has the merge ranks"
)


@needs_dashscope
def test_known_ids_and_both_implementations(tmp_path):
    ranks = qwen2.find_ranks()
    tokenizer = qwen2.build(ranks)
    assert len(tokenizer) == 151665 and tokenizer.eos_token_id == 151645
    assert tokenizer("Hello, world!")["input_ids"] == [9707, 11, 1879, 0]
    assert tokenizer("<|im_start|>你好<|im_end|>")["input_ids"] == [151644, 108386, 151645]
    text = "def f(x):\n    return x ** 2  # 平方\n\n\n  1234 café naïve 😀\tI'll — 今天天气很好。\r\n"
    (tmp_path / "text.txt").write_bytes((text * 3).encode())
    lines, tokens = qwen2.check(tokenizer, ranks, tmp_path / "text.txt")
    assert lines == 15 and tokens > 60


@pytest.mark.parametrize("content", [b"", b"IQ== 0\nIg== 1\n", b"no ranks at all\n"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "x.tiktoken").write_bytes(content)
    with pytest.raises(InputError, match="x.tiktoken"):
        qwen2.build(tmp_path / "x.tiktoken")
