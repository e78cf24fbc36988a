"""What the vocabulary builder's tests share: a small byte-level BPE tokenizer trained here, its texts, the
command.
"""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastmtp import files
from fastmtp.build_vocab import main
from fastmtp.vocab import corpus
from fastmtp.vocab.token_counts import Counter, Counts

ENGLISH = [
    "The cat sat on the mat.",
    "A dog ran after the cat; the cat ran away.",
    "Numbers: 1 2 3, and more words.",
]
CHINESE = ["今天天气很好，我们去公园。", "猫坐在垫子上，狗在追猫。", "数学是研究数量的学科。"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def small_tokenizer(path: Path) -> str:
    """Written to the folder `path`: 256 bytes, some 120 merges, three special tokens and one added plain
    one.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(ENGLISH * 4 + CHINESE * 4, trainer)
    bpe.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 300]}))
    return str(path)


def write(path: Path, rows: list) -> str:
    """Rows as JSON lines, gzipped or as Parquet by the path's ending; a text is a line as it is."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return str(path)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as out:
        out.writelines(
            (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows
        )
    return str(path)


def count(tokenizer, paths: list[str], column=None, lang="en", held_out=0.0, seed=0) -> Counts:
    """The counts of the files' rows, `held_out` of them apart."""
    counter = Counter(tokenizer, column, lang, held_out, seed, False)
    counts = Counts(counter.size)
    counter.count(corpus.file_chunks(corpus.expand(paths), column), counts)
    return counts


def tally(counts: Counts, lang: str = "en") -> dict[int, int]:
    """How often each id occurs in one language, held-out rows included; ids that never do are left out."""
    table = counts.tables[lang].sum(0)
    return {int(i): int(table[i]) for i in np.flatnonzero(table)}


def run(folder: str, *args, out: Path, sizes: str = "300,350") -> None:
    main(["--tokenizer", folder, "--sizes", sizes, "--out", str(out), *map(str, args)])


def leftovers(path: Path) -> list[str]:
    """What lies in a folder after a command that was refused, or interrupted, ended as `cli.run` ends it."""
    files.withdraw()
    return [p.name for p in path.rglob("*")] if path.exists() else []


def command(folder: str, *args, out: Path, **kwargs) -> subprocess.Popen:
    here = Path(__file__).resolve().parents[2]
    line = [
        sys.executable,
        "-m",
        "fastmtp.build_vocab",
        "--tokenizer",
        folder,
        "--out",
        out,
        "--sizes",
        "300,350",
        *args,
    ]
    env = {**os.environ, "PYTHONPATH": str(here), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, line)), env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
