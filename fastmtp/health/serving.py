"""Engines that take a folder, the accept length to expect, and the state that the head was trained on."""

from __future__ import annotations

from collections.abc import Iterator

from fastmtp.checkpoint import CODE, CONTRACT_KEY, is_post_norm
from fastmtp.data.samples import read_samples
from fastmtp.engines.sglang import check_model
from fastmtp.head.modeling_mimo import HIDDEN
from fastmtp.health.folder import ERROR, OK, WARNING, Folder, Line
from fastmtp.reference.model import load
from fastmtp.reference.teacher_forced import measure, pooled
from fastmtp.tau import Acceptance, bootstrap, bounds
from fastmtp.tokenizer import load_tokenizer

USELESS = 1.1  # accept length below which a head costs more than it brings


def engines(folder: Folder) -> Iterator[Line]:
    check_model(str(folder.path), 3)
    heads, groups = (folder.config.get(f"num_{kind}_heads", 1) for kind in ("attention", "key_value"))
    sizes = [n for n in (1, 2, 4, 8) if heads % n == 0 and (groups % n == 0 or n % groups == 0)]
    contract = folder.config.get(CONTRACT_KEY)
    before = isinstance(contract, dict) and contract.get("mtp_hidden") == "pre_norm"
    if before:
        text = "hands over the state after the final norm; this head was trained on the one before it"
        yield Line(
            "SGLang", ERROR, text, "serve it with --engine vllm, or train it with mtp_hidden post_norm"
        )
        yield Line("vLLM", OK, "takes it as it is: its MiMo hands over the state before the final norm")
    else:
        yield Line("SGLang", OK, f"takes it; tensor parallel sizes {', '.join(map(str, sizes))}")
    if is_post_norm(folder.config):
        yield Line("vLLM", OK, "takes it with FastMTP's plugin (pip install -e . beside vLLM)")
    elif not before:
        text = "its MiMo hands the head the state before the final norm; fewer drafts may be accepted"
        yield Line("vLLM", WARNING, text, "export the head with fastmtp.export if FastMTP trained it")
    absent = [path.name for path in CODE if not (folder.path / path.name).is_file()]
    text = f"lacks {absent[0]}: the head is left out" if absent else "takes it; the head with remote code"
    yield Line("transformers", WARNING if absent else OK, text, "prepare the folder again" if absent else "")


def expected(folder: Folder, data: str, limit: int, num_steps: int) -> Iterator[Line]:
    """The accept length to expect, and whether the other of the backbone's states gives a higher one."""
    own = load_tokenizer(folder.path)
    samples = read_samples(data, folder.config["vocab_size"], limit, own)
    model = load(folder.path)
    said, results = model.net.config.mtp_hidden, {}
    for state in HIDDEN:
        model.net.config.mtp_hidden = state
        results[state] = pooled(measure(model, samples, num_steps))
    tau = results[said].accept_length
    text = f"{'unknown' if tau is None else f'{tau:.2f}'} with {num_steps} drafts, on {len(samples)} samples"
    if tau is None or tau < USELESS:
        cure = "the head is not trained, or the backbone was changed after it was: train it again"
        yield Line("accept length", ERROR, text, cure)
    else:
        yield Line("accept length", OK, text)
    yield fitting(said, CONTRACT_KEY in folder.config, results)


def fitting(said: str, written: bool, results: dict[str, Acceptance]) -> Line:
    """Which state the head was trained on, by accept length. written: the folder says it; otherwise `said` is
    what we take it for.
    """
    name, (other,) = "head's state", set(HIDDEN) - {said}
    if None in (result.accept_length for result in results.values()):
        return Line(name, WARNING, "unknown: nothing was verified", "give longer samples with --data")
    text = ", ".join(f"{state} {result.accept_length:.3f}" for state, result in results.items())
    text += f"; config.json says {said}" if written else f"; config.json says neither, taken for {said}"
    # Both states meet the same answers, so the difference's interval is a paired one.
    low, high = bounds(bootstrap(results[other].samples) - bootstrap(results[said].samples))
    if low > 0:
        cure = f'if that is so, set "{CONTRACT_KEY}": {{"mtp_hidden": "{other}"}} in config.json'
        return Line(name, ERROR if written else WARNING, f"{text}, but {other} fits", cure)
    if high < 0:
        return Line(name, OK, f"{text}, which fits")
    return Line(name, WARNING, f"{text}; too close to tell", "raise --limit")
