"""Every file and heading that a Markdown file of the repository links to exists. No address is asked."""

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\(([^)\s]+)\)|\bsrc=\"([^\"]+)\"")


def documents() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=REPOSITORY, capture_output=True, text=True)
    return listed.stdout.split()


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.M | re.S)


def anchors(text: str) -> set[str]:
    """The names that GitHub and mkdocs give to the headings; both agree as long as no two spaces meet."""
    names: set[str] = set()
    for heading in re.findall(
        r"^#+ +(.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), flags=re.M
    ):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", other) is not None for other in names)
        names.add(f"{name}-{number}" if number else name)
    return names


def broken(path: Path) -> list[str]:
    """The links of a Markdown file that lead nowhere."""
    result = []
    for match in LINK.finditer(without_code(path.read_text(encoding="utf-8"))):
        link = match[1] or match[2]
        target, _, anchor = link.partition("#")
        file = path.parent / target if target else path
        if "://" in link or link.startswith("mailto:"):
            continue
        if not file.exists():
            result.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
            result.append(f"{link}: no such heading")
    return result


@pytest.mark.parametrize("name", documents())
def test_links_lead_somewhere(name):
    assert broken(REPOSITORY / name) == []


def test_a_broken_link_is_seen(tmp_path):
    (tmp_path / "a.md").write_text("# One `two`, three\n\n```\n# no heading\n```\n## Twice\n## Twice\n")
    page = tmp_path / "b.md"
    page.write_text("[x](a.md#one-two-three) [y](a.md#twice-1) `[code](no.md)` [z](https://a.b/c.md)")
    assert broken(page) == []
    page.write_text("[x](c.md) [y](a.md#no-heading) [z](#nothing)")
    assert broken(page) == [
        "c.md: no such file",
        "a.md#no-heading: no such heading",
        "#nothing: no such heading",
    ]
