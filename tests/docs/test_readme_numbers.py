"""Every number in README is in the results file that its row or sentence links to."""

import re
from pathlib import Path

import pytest
from helpers.blocks import blocks

REPOSITORY = Path(__file__).resolve().parents[2]
README = REPOSITORY / "README.md"
LONGEST = 120  # lines
# A number of its own: no part of a name (7B, H100, K=3, EAGLE-3, float32); 2.16x and 55% are 2.16 and 55.
NUMBER = re.compile(r"(?<![\w.=/-])\d[\d,]*(?:\.\d+)*(?=x?(?![\w]))")
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
# Of sentences that link to no results: the phrase in README, the file, and how the file says it.
ELSEWHERE = {
    "SGLang 0.5.17": ("results/engines_gpu.md", "SGLang 0.5.17"),
    "vLLM 0.25.1": ("results/engines_gpu.md", "vLLM 0.25.1"),
    "torch 2.11.0": ("results/engines_gpu.md", "torch 2.11.0"),
    "ms-swift 4.6.0": ("results/smollm2_heads.md", "ms-swift 4.6.0"),
    "Python 3.11": ("pyproject.toml", ">=3.11"),
    "Exit code 0 means": ("docs/trust.md", "| 0 | what was asked for happened |"),
    "2.03x for MiMo-7B-RL on an A10": ("results/speed_7b/README.md", "2.03x at K=3"),
}


def stands(number: str, text: str) -> bool:
    return number in NUMBER.findall(text)


def prose(text: str) -> list[str]:
    """README's sentences and list items, one line each; no tables, code, pictures or citations."""
    text = re.sub(r"^```.*?^```$|^<!--.*?-->$", "", text, flags=re.M | re.S)
    text = re.sub(r"^(!\[|\||#).*$", "", text, flags=re.M)
    text = re.sub(r"`[^`]*`", "", text)
    blocks = re.split(r"\n\s*\n|\n(?=- )", text)
    lines = [" ".join(block.replace("\n> ", "\n").split()) for block in blocks]
    return [
        part
        for line in lines
        if "arxiv.org" not in line or not line.startswith("- ")
        for part in re.split(r"(?<=[.:]) (?=[A-Z*\[])", line)
        if part
    ]


def results_of(text: str) -> list[str]:
    return [target.split("#")[0] for _, target in LINK.findall(text) if target.startswith("results/")]


def unfounded(readme: str, root: Path) -> list[str]:
    """The numbers of README's prose that no results file of their sentence has."""
    wrong = []
    for sentence in prose(readme):
        plain = LINK.sub(lambda match: "" if "://" in match[2] else match[1], sentence)
        for phrase, (file, said) in ELSEWHERE.items():
            if phrase in plain and said in (root / file).read_text(encoding="utf-8"):
                plain = plain.replace(phrase, "")
        known = " ".join((root / file).read_text(encoding="utf-8") for file in results_of(sentence))
        wrong += [f"{number}: {sentence}" for number in NUMBER.findall(plain) if not stands(number, known)]
    return wrong


def tables(text: str) -> list[list[list[str]]]:
    """The Markdown tables of a text: rows of cells, the header first."""
    blocks = re.findall(r"(?:^\|.*\n?)+", text, flags=re.M)
    rows = [[line.strip().strip("|").split("|") for line in block.splitlines()] for block in blocks]
    return [[row for row in table if not re.fullmatch(r"[\s:|-]*", "|".join(row))] for table in rows]


def rows_of_results(readme: str) -> list[list[str]]:
    """README's rows that link to a results file."""
    return [row for table in tables(readme) for row in table if results_of(row[-1])]


def in_one_line(numbers: list[str], results: str) -> bool:
    """Whether one row or one column of a table in `results` has all the numbers."""
    for table in tables(results):
        width = max(map(len, table))
        columns = [[row[column] for row in table if len(row) > column] for column in range(width)]
        for line in (*table, *columns):
            if all(any(stands(number, cell) for cell in line) for number in numbers):
                return True
    return False


def row_is_founded(row: list[str], root: Path) -> bool:
    """The measured cells (all but what ran, what is real, and the link) stand together in the file; of cells
    such as `2.11 / 2.69` all the first, and all the second.
    """
    results = (root / results_of(row[-1])[0]).read_text(encoding="utf-8")
    sides = [cell.split(" / ") for cell in row[2:-1]]
    for side in range(max(map(len, sides))):
        numbers = NUMBER.findall(" ".join(cell[min(side, len(cell) - 1)] for cell in sides))
        if not numbers or not in_one_line(numbers, results):
            return False
    return True


def test_rows():
    rows = rows_of_results(README.read_text(encoding="utf-8"))
    rows = [row for row in rows if len(row) > 3]
    assert len(rows) >= 6
    assert [row for row in rows if not row_is_founded(row, REPOSITORY)] == []


def test_sentences():
    text = README.read_text(encoding="utf-8")
    assert len(prose(text)) > 20
    assert unfounded(text, REPOSITORY) == []


def test_printed_lines():
    """What a command prints is shown as the results file has it."""
    shown = [block for block in blocks(README) if not block.language]
    assert shown
    for block in shown:
        known = (REPOSITORY / results_of(block.before)[-1]).read_text(encoding="utf-8")
        assert [line for line in block.text.splitlines() if line.strip() not in known] == []


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize(
    "readme, found",
    [
        ("It took 18 minutes ([here](results/a.md)).", 0),
        ("It took 19 minutes ([here](results/a.md)).", 1),
        ("It is 2.16x as fast.", 1),  # no link, no number
        ("A 7B model at K=3 on an H200, in float32, beside EAGLE-3.", 0),  # names
        ("In `results/a.md` are 19.", 1),
    ],
)
def test_an_unfounded_number_is_seen(tmp_path, readme, found):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.md").write_text("took 18 minutes, 2.16x\n")
    assert len(unfounded(readme, tmp_path)) == found


def test_numbers_of_two_rows_are_no_row(tmp_path):
    table = "| run | tau | speed-up |\n|---|---:|---:|\n| a | 2.0 | 1.5x |\n| b | 2.1 | 1.6x |\n"
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.md").write_text(table)
    cells = ["a", "real", "2.0", "1.5", "[a](results/a.md)"]
    assert row_is_founded(cells, tmp_path)
    assert not row_is_founded([*cells[:3], "1.6", cells[4]], tmp_path)
