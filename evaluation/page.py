"""table.json as a page: what to know first, then by task, then every figure with its interval."""

from __future__ import annotations

from evaluation import metrics, streams
from fastmtp.show.markdown import around, grid, number, spanned


def markdown(report: dict) -> str:
    """The whole page."""
    titles = report["titles"]
    parts = [
        "# Speed and accept length",
        f"{_place(report['environment'])}. {' '.join(report['facts'])}",
        "Means over tasks, with 95 % bootstrap intervals over questions. Accept length: tokens per verify "
        "pass. Decode: without the time to the first token. Milliseconds of a cycle, or of a plain step: "
        f"median over answers of at least {metrics.SHORT} cycles, with the 10th and 90th percentile.",
        _summary(report),
    ]
    if report["warnings"]:
        parts += ["**Be careful:**", "\n".join(f"- {text}" for text in report["warnings"])]
    parts += [
        "## By task",
        "End-to-end speed-up (accept length); the baseline in tokens per second.",
        _by_task(report),
        "\n".join(f"![{text}]({name})" for name, text in pictures(report).items()),
    ]
    if report["streams"]:
        parts += ["## Several requests at a time", streams.markdown(report["streams"])]
    parts += ["## Detail", _detail_table(report), _cards(report)]
    if report["drift"]:
        changes = ", ".join(f"{titles[task]} {change:+.1%}" for task, change in report["drift"].items())
        parts.append(f"Baseline asked again at the end, change in tokens/s: {changes}.")
    return "\n\n".join(filter(None, parts)) + "\n"


def _place(environment: dict) -> str:
    versions = environment["versions"]
    engines = {"sglang": ("SGLang", "sglang"), "vllm": ("vLLM", "vllm")}
    name, package = engines.get(environment["backend"], ("torch", "torch"))
    settings = environment["settings"].get("dtype") or environment.get("dtype")  # vLLM does not tell
    engine = f"{name} {versions.get(package)}"
    return f"{environment['gpu'] or 'CPU'}, {engine}, {settings}, {environment['finished']}"


def _summary(report: dict) -> str:
    """One line per arm: what a reader looks for first."""
    head = ["arm", "accept length", "decode speed-up", "end-to-end speed-up", "decode tok/s"]
    head += ["ms per cycle (10 to 90 %)", "accepted at position 1, 2, ..."]
    rows = []
    for name in report["arms"]:
        cell, spans = report["average"][name], report["average"][name]["intervals"]
        drafts = bool(report["cells"][name][report["tasks"][0]]["num_steps"])
        rows.append(
            [
                name,
                spanned(cell["accept_length"], spans.get("accept_length"), ".2f") if drafts else "1",
                spanned(cell["decode_speedup"], spans.get("decode_speedup"), ".2f") if drafts else "1",
                spanned(cell["speedup"], spans.get("speedup"), ".2f") if drafts else "1",
                number(cell["decode_throughput"], ".1f"),
                around(report["cycle_ms"][name], ".2f"),
                _rates(report["position_rates"][name]),
            ]
        )
    return grid(head, rows)


def _by_task(report: dict) -> str:
    head = ["arm", *(report["titles"][name] for name in report["tasks"]), "average"]
    rows = []
    for name in report["arms"]:
        cells = [_short(report["cells"][name][task]) for task in report["tasks"]]
        rows.append([name, *cells, _short(report["average"][name])])
    return grid(head, rows)


def _short(cell: dict) -> str:
    plain = cell["accept_length"] is None or cell["accept_length"] == 1.0
    if cell["speedup"] is None or (plain and cell["speedup"] == 1.0):
        return f"{number(cell['throughput'], '.1f')} tok/s" + (
            "" if plain else f" ({cell['accept_length']:.2f})"
        )
    return f"{cell['speedup']:.2f}x ({number(cell['accept_length'], '.2f')})"


def _detail_table(report: dict) -> str:
    head = ["arm", "task", "questions", "accept length (95 %)", "tok/s (95 %)", "decode tok/s"]
    head += [
        "first token, ms (10 to 90 %)",
        "decode speed-up (95 %)",
        "speed-up (95 %)",
        "identical",
        "accepted at position 1, 2, ...",
    ]
    rows = [
        _detail(name, report["titles"][task], report["cells"][name][task])
        for name in report["arms"]
        for task in report["tasks"]
    ]
    return grid(head, rows)


def _detail(name: str, title: str, cell: dict) -> list[str]:
    spans = cell["intervals"]
    lossless = cell["lossless"]
    return [
        name,
        title,
        str(cell["num_questions"]),
        spanned(cell["accept_length"], spans.get("accept_length"), ".2f") if cell["num_steps"] else "1",
        spanned(cell["throughput"], spans.get("throughput"), ".1f"),
        number(cell["decode_throughput"], ".1f"),
        around(cell["first_ms"], ".0f"),
        spanned(cell["decode_speedup"], spans.get("decode_speedup"), ".2f"),
        spanned(cell["speedup"], spans.get("speedup"), ".2f"),
        f"{lossless['identical']}/{lossless['questions']}" if lossless else "",
        _rates(cell["position_rates"]),
    ]


def _cards(report: dict) -> str:
    if not report["cards"]:
        return ""
    rates = ", ".join(f"card {card} {rate:.1f}" for card, rate in report["cards"].items())
    return (
        f"The arms ran on {len(report['cards'])} cards; each is compared with the baseline of its own card. "
        f"The baseline's tokens/s, mean over tasks: {rates}."
    )


def pictures(report: dict) -> dict[str, str]:
    """Names of the pictures that this table has something to show in, and what they show."""
    arms = [name for name in report["arms"] if name != "baseline"]
    names = {"radar.png": "speed-up by task"} if arms and _all_speedups(report, arms) else {}
    both = {"steps.png": "accept length and speed by draft steps", "acceptance.png": "acceptance by position"}
    levels = {row["streams"] for row in report.get("streams", [])}
    many = {"streams.png": "throughput and speed-up by requests at a time"} if len(levels) > 1 else {}
    return names | (both if arms else {}) | many


def _all_speedups(report: dict, arms: list[str]) -> bool:
    return all(report["average"][name]["speedup"] for name in arms)


def _rates(rates: list[float] | None) -> str:
    return "-" if rates is None else " ".join(f"{rate:.2f}" for rate in rates)
