"""Every command that a document, a docstring or a `--help` shows is one that the real parser takes."""

import importlib.util
import re
import runpy
import shlex
import types
from pathlib import Path

import pytest
import yaml
from helpers.blocks import NOT_RUN, RUN, blocks, pages

from fastmtp import cli, distill, train
from fastmtp.data.recipe import HEAD_KEYS

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = ("*.md", "docs/*.md", "vocab/*.md", "examples/*.md", "fastmtp/**/*.md", "benchmarks/**/*.md")
SOURCES = ("fastmtp/**/*.py", "evaluation/**/*.py", "benchmarks/**/*.py", "examples/*.py", "scripts/*.sh")
START = (
    r"(?:[A-Z_]+=\S+ )*"  # an environment variable
    r"(?:python3? (?:-m (?:fastmtp|evaluation|benchmarks)\.|examples/)|sh scripts/|fastmtp [a-z_]+ )"
)
OTHERS = ("scripts/install.sh", "scripts/test.sh", "scripts/docs.sh")  # scripts that run no command of ours
PLACEHOLDERS = re.compile(
    r"MODULE|\{(?:config|model)|TASK|fastmtp\.x\b|interrupted|^fastmtp [a-z_]+( \.\.\.)+$"
)


def commands_of(path: Path) -> set[str]:
    """Command lines with arguments that a file shows: a line of their own, or in backquotes."""
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".py", ".sh"):  # an example is a string over several lines; a comment begins with #
        text = re.sub(r'(?<!\\n)"\n\s+"', "", text)  # one string over two lines
        text = text.replace('\\n"\n', '"\n').replace("\\\\", "\\").replace('\\"\n', "\\\n")
        text = re.sub(r'^[ #"]+', "", text.replace("\\n", "\n"), flags=re.M)
    text = re.sub(r'\\\n[\s#"]*', "", text)
    shown = re.findall(rf"^({START}.*)$", text, flags=re.M)
    shown += [
        f"{part} ..." for part in re.findall(rf"`({START}[^`]*)`", text)
    ]  # in prose, what matters alone
    shown = [line[: line.rindex('"')] if line.count('"') % 2 else line for line in shown]
    words = {shlex.join(shlex.split(line.rstrip("& "), comments=True)) for line in shown}
    return {line for line in words if not PLACEHOLDERS.search(line)}


def shown_commands() -> list:
    paths = sorted({path for pattern in (*DOCUMENTS, *SOURCES) for path in REPOSITORY.glob(pattern)})
    return [
        pytest.param(command, id=f"{path.relative_to(REPOSITORY)}: {command[:60]}")
        for path in paths
        for command in sorted(commands_of(path))
    ]


def module_and_arguments(words: list[str]) -> tuple[str, list[str]]:
    """The module that a command line runs, or a file, and what it is given."""
    while "=" in words[0]:
        words = words[1:]
    if words[0] == "sh":
        script = (REPOSITORY / words[1]).read_text(encoding="utf-8")
        script = re.sub(r"\$\(\(.*\)\)", "0", script)
        runs = re.findall(r'exec \S+ -m (fastmtp\S+|evaluation\S+|benchmarks\S+)((?: [^"\\]*)?)"\$@"', script)
        assert runs or words[1] in OTHERS, "runs no module"
        return (runs[-1][0], [*shlex.split(runs[-1][1]), *words[2:]]) if runs else ("", [])
    if words[:2] == ["fastmtp", "bench"]:
        return f"evaluation.{words[2]}.bench_sglang_eagle", words[3:]
    if words[0] == "fastmtp":
        return cli.COMMANDS[words[1]].module, words[2:]
    return (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])


def parser_of(module: str, monkeypatch):
    if module.endswith(".py"):
        loaded = types.SimpleNamespace(**runpy.run_path(str(REPOSITORY / module)))
    else:
        loaded = importlib.import_module(module)
    if module.endswith("bench_sglang_eagle"):
        task = importlib.import_module("evaluation.tasks").TASKS[module.split(".")[1]]
        return importlib.import_module("evaluation.harness").parser(task)
    if hasattr(loaded, "parser"):
        return loaded.parser()
    monkeypatch.setattr("argparse.ArgumentParser.parse_args", lambda parser, *_: stop(parser))
    with pytest.raises(Stop) as end:  # its parser is made in `main`
        loaded.main()
    return end.value.args[0]


class Stop(Exception):
    pass


def stop(parser):
    raise Stop(parser)


@pytest.mark.parametrize("command", shown_commands())
def test_a_shown_command_is_one_that_the_parser_takes(command, monkeypatch):
    module, words = module_and_arguments(shlex.split(command))
    words, _ = cli.split_at_dashes(words)  # what follows is an engine's
    if not module or set(words) <= {"...", "--help"}:
        assert not module or importlib.util.find_spec(module), f"no module {module}"
        return
    parser = parser_of(module, monkeypatch)
    if "..." in words:  # only its flags can be right or wrong
        for action in parser._actions:
            action.required = False
    unknown = [word for word in parser.parse_known_args(words)[1] if word != "..."]
    if module == "benchmarks.distill":  # what is left is the distiller's
        unknown = distill.parser().parse_known_args(unknown)[1]
    if module in ("fastmtp.train", "fastmtp.speedrun", "benchmarks.ablation.run"):
        recipe = train.apply_overrides({}, unknown)
        unknown = sorted((recipe.keys() | recipe.pop("model_kwargs").keys()) - known_keys())
    assert unknown == []


def known_keys() -> set[str]:
    pytest.importorskip("swift")
    from fastmtp.swift_plugin import swift_keys

    return {*swift_keys(), *HEAD_KEYS}


def test_many_commands_are_seen():
    """The patterns above must not stop matching unnoticed."""
    seen = [parameter.id for parameter in shown_commands()]
    assert len(seen) > 60 and {name.split(":")[0] for name in seen} >= {
        "README.md",
        "docs/serve.md",
        "docs/evaluate.md",
        "fastmtp/serve.py",
        "evaluation/run.py",
        "benchmarks/speed/run.py",
        "scripts/ablation.sh",
    }


def test_a_wrong_flag_is_found(tmp_path, monkeypatch):
    (tmp_path / "x.md").write_text(
        "```sh\npython -m fastmtp.export --base a \\\n    --hed b --out c # why\n```\n"
    )
    (command,) = commands_of(tmp_path / "x.md")
    assert command == "python -m fastmtp.export --base a --hed b --out c"
    with pytest.raises((SystemExit, AssertionError)):
        test_a_shown_command_is_one_that_the_parser_takes(command, monkeypatch)


@pytest.mark.parametrize("pattern", DOCUMENTS)
def test_files_that_a_document_names_exist(pattern):
    for path in REPOSITORY.glob(pattern):
        text = path.read_text(encoding="utf-8")
        links = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
        assert [link for link in sorted(links) if link and not (path.parent / link).exists()] == [], path
        if path.name == "CONTRIBUTING.md":  # the rooms: in backquotes, from the root or from the package
            named = re.findall(r"`([a-z_/0-9]+(?:\.py|\.yaml|/))`", text)
            roots = (REPOSITORY, REPOSITORY / "fastmtp")
            assert len(named) > 30 and [n for n in named if not any((r / n).exists() for r in roots)] == []


def test_no_message_sends_users_to_the_package_index_for_this_project():
    """The name fastmtp there is somebody else's."""
    sources = [p for pattern in (*DOCUMENTS, *SOURCES) for p in REPOSITORY.glob(pattern)]
    wrong = re.compile(r"pip install (?!-)[^\n]*\bfastmtp\b")
    assert [str(p) for p in sources if wrong.search(p.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_a_block_of_commands_is_run_or_says_why_not(page):
    """tests/docs/test_blocks.py runs the others."""
    allowed = {*NOT_RUN} | ({None} if page.name in RUN else set())
    wrong = [block.line for block in blocks(page) if block.language == "sh" and block.not_run not in allowed]
    assert wrong == [], f"{page.name}: write <!-- not run: REASON --> above, or add the page to RUN"


def test_every_page_has_a_place_on_the_site():
    kinds = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    entries = [
        entry
        for kind in kinds
        for value in kind.values()
        for entry in ([value] if isinstance(value, str) else value)
    ]
    listed = {entry if isinstance(entry, str) else next(iter(entry.values())) for entry in entries}
    assert listed == {page.name for page in pages()[1:]} | {"cli.md"}  # made when the site is built


def test_every_page_of_results_is_listed():
    results = [*REPOSITORY.glob("results/*.md"), *REPOSITORY.glob("results/*/README.md")]
    text = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8")
    assert [str(page) for page in results if f"(../{page.relative_to(REPOSITORY)})" not in text] == []
