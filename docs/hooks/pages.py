"""What the site shows beside docs/: every command's own help, and the repository's files that pages link to.

A link such as `../results/distill.md` works in a checkout. On the site it needs a page: a Markdown file or a
picture becomes one under its own path, and code is shown under `source/`. Called by mkdocs (mkdocs.yml).
"""

from __future__ import annotations

import importlib
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from mkdocs.structure.files import File, Files

from fastmtp.cli import COMMANDS, Parser

REPOSITORY = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
CODE = re.compile(r"^```.*?^```$|^    .*?$", re.M | re.S)
CHECKS = {
    "Checks": ("evaluation.lossless", "evaluation.agreement"),
    "Benchmarks": (
        "benchmarks.speed.run",
        "benchmarks.dynamic_vocabulary.check",
        "benchmarks.dynamic_vocabulary.cost",
        "benchmarks.train_throughput",
        "benchmarks.curate",
    ),
}


def on_files(files: Files, config) -> Files:
    """Adds the page of commands, and every file outside docs/ that a page links to, directly or not."""
    files.append(File.generated(config, "cli.md", content=commands()))
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages() if file.src_uri != "cli.md"]
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        for path in linked(page, (REPOSITORY / page).read_text(encoding="utf-8")):
            if path not in seen and not path.startswith("docs/"):
                seen.add(path)
                files.append(outside(path, config))
                if path.endswith(".md"):
                    waiting.append(path)
    return files


def on_page_markdown(text: str, page, config, files) -> str:
    """The links of a page, from the repository's paths to the site's."""
    if page.file.src_uri == "cli.md" or page.file.src_uri.startswith("source/"):
        return text
    here = repository_path(page.file.src_uri)
    folder = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match) -> str:
        path = resolve(here, match[2])
        return match[1] + posixpath.relpath(site_path(path), folder or ".") + match[3] if path else match[0]

    return outside_code(text, lambda part: LINK.sub(moved, part))


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """`text` with `change` applied to all but its code blocks."""
    parts, end = [], 0
    for block in CODE.finditer(text):
        parts += [change(text[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, change(text[end:])])


def linked(page: str, text: str) -> Iterator[str]:
    """The repository's paths that `page` links to."""
    for match in LINK.finditer(CODE.sub("", text)):
        if path := resolve(page, match[2]):
            yield path


def resolve(page: str, link: str) -> str | None:
    """The repository's path that a link of `page` means. None for an address, and for what is no file."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return path if "://" not in link and (REPOSITORY / path).is_file() else None


def site_path(path: str) -> str:
    """Where the site has the repository's file `path`."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path.endswith((".md", ".png", ".svg")) else f"source/{path}.md"


def repository_path(uri: str) -> str:
    """The repository's path of the site's page `uri`."""
    return f"docs/{uri}" if (REPOSITORY / "docs" / uri).exists() else uri


def outside(path: str, config) -> File:
    """A file of the repository as a page, or as a picture. Code is not searched."""
    uri = site_path(path)
    if not uri.startswith("source/"):
        return File.generated(config, uri, content=(REPOSITORY / path).read_bytes())
    language = {".py": "python", ".yaml": "yaml", ".sh": "sh"}.get(Path(path).suffix, "text")
    text = (REPOSITORY / path).read_text(encoding="utf-8")
    page = f"---\ntitle: {path}\nsearch: {{exclude: true}}\n---\n\n````{language}\n{text}\n````\n"
    return File.generated(config, uri, content=page)


def commands() -> str:
    """The page of all commands, each with what its parser prints for `--help`."""
    sections = [
        "# Commands",
        "Every command runs as `fastmtp NAME` or as `python -m MODULE`. Installed, it runs from any folder: "
        "recipes, prompts and token maps of the project are found by the names used here, such as "
        "`configs/quickstart.yaml`. What follows is printed by `--help`.",
    ]
    for name, command in COMMANDS.items():
        module = importlib.import_module(command.module)
        if name == "bench":
            parser = module.parser(importlib.import_module("evaluation.tasks").TASKS["mt_bench"])
            name = "bench TASK"
        else:
            parser = module.parser()
        sections += [f"## fastmtp {name}", f"`{command.module}`: {command.about}", shown(parser)]
    for title, modules in CHECKS.items():
        sections.append(f"## {title}")
        for module in modules:
            sections += [f"### python -m {module}", shown(importlib.import_module(module).parser())]
    return "\n\n".join(sections) + "\n"


def shown(parser: Parser) -> str:
    os.environ["COLUMNS"] = "84"  # the width that argparse writes for
    return f"```text\n{parser.format_help().rstrip()}\n```"
