"""From answers to numbers: accept length, per-position rates, throughput, and how far each can be trusted.

An answer is `{"question", "turns": [Turn as a dict, ...]}`. Everything here is arithmetic on those, so that
every figure in a report can be computed again from the answer files. What an engine did not report is None
here, never zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtp import tau

SHORT = 16  # cycles below which an answer's mean cycle is mostly its beginning and end


def turns(answers: list[dict]) -> list[dict]:
    return [turn for answer in answers for turn in answer["turns"]]


def output_tokens(answers: list[dict]) -> int:
    return sum(len(turn["output_ids"]) for turn in turns(answers))


def verify_passes(answers: list[dict]) -> int:
    """Verify passes; a decoder without speculation spends one pass per token."""
    return sum(
        len(t["output_ids"]) if t["verify_passes"] is None else t["verify_passes"] for t in turns(answers)
    )


def accept_length(answers: list[dict]) -> float | None:
    """tau, pooled. None if nothing was verified."""
    return tau.accept_length(output_tokens(answers), verify_passes(answers))


def histogram(answers: list[dict], num_steps: int) -> list[int] | None:
    """Pooled counts, [num_steps + 1]: entry j = verify passes with exactly j accepted drafts.

    None if an answer's counts are not there, or are not those of its verify passes and tokens.
    """
    total = [0] * (num_steps + 1)
    for turn in turns(answers):
        passes, counted = turn["verify_passes"], sum(turn["histogram"])
        # Engines may count the pass in which an answer ends, or not.
        if passes is None or (passes and not counted) or abs(passes - counted) > 1:
            return None
        # Each pass gives its accepted drafts and one token more; the first token comes from prefill, and the
        # last passes may give more than the answer keeps.
        given = sum((accepted + 1) * count for accepted, count in enumerate(turn["histogram"]))
        if abs(given - (len(turn["output_ids"]) - 1)) > 2 * (num_steps + 1):
            return None
        for accepted, count in enumerate(turn["histogram"]):
            total[accepted] += count
    return total


def position_rates(answers: list[dict], num_steps: int) -> list[float] | None:
    """[num_steps]: share of verify passes whose draft i+1 was accepted (and so every draft before it).

    [] without drafts; None if the engine did not say, or nothing was verified.
    """
    if not num_steps:
        return []
    counts = histogram(answers, num_steps)
    return tau.position_rates(counts) if counts else None


def unknowns(line: dict) -> list[str]:
    """What a result line could not say, each a sentence's end."""
    if not line["output_tokens"]:
        return ["every answer is empty; nothing was measured"]
    if line["position_rates"] is None:
        return ["the engine gave no usable histogram of accepted drafts; rates are unknown"]
    return []


def wall_seconds(answers: list[dict]) -> float:
    """Seconds during which at least one request was in flight: pauses of an interrupted run do not count."""
    spans = sorted((t["started"], t["started"] + t["latency_s"]) for t in turns(answers))
    total, end = 0.0, float("-inf")
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def decode_throughput(answers: list[dict]) -> float | None:
    """Tokens per second of one stream after its first token, so without prefill. None if all were one token
    long.
    """
    tokens, seconds = _decoding(answers)
    return tokens / seconds if tokens and seconds > 0 else None


def cycle_times(answers: list[dict]) -> list[float]:
    """The mean milliseconds of a cycle, or of a plain step, after the first chunk, in each answer of at least
    SHORT of them.
    """
    times = []
    for turn in turns(answers):
        cycles = turn["verify_passes"]
        if cycles is None:
            cycles = len(turn["output_ids"]) - turn["first_tokens"]
        if cycles >= SHORT:
            times.append(1000 * (turn["latency_s"] - turn["first_s"]) / cycles)
    return times


def cycle_ms(answers: list[dict]) -> list[float] | None:
    """[10th, 50th, 90th percentile] of `cycle_times`; None if there are none."""
    return _percentiles(cycle_times(answers))


def first_ms(answers: list[dict]) -> list[float] | None:
    """[10th, 50th, 90th percentile] of the milliseconds to the first chunk; None without an answer."""
    return _percentiles([1000 * turn["first_s"] for turn in turns(answers)])


def _percentiles(times: list[float]) -> list[float] | None:
    """[10th, 50th, 90th percentile]; None of nothing."""
    shares = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    return torch.tensor(times, dtype=torch.float64).quantile(shares).tolist() if times else None


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    """Index of the first differing token; the shorter length if one output only stops earlier; None if
    equal.
    """
    for index, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return index
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def identical(answers: list[dict], reference: list[dict]) -> dict:
    """Compare outputs token by token, by question: `{"reference", "questions", "identical", "share"}`.

    Two outputs without a token say nothing and are not counted.
    """
    expected = {a["question"]: [t["output_ids"] for t in a["turns"]] for a in reference}
    pairs = [([t["output_ids"] for t in a["turns"]], expected.get(a["question"])) for a in answers]
    pairs = [(ours, theirs) for ours, theirs in pairs if theirs is not None and (any(ours) or any(theirs))]
    same = sum(ours == theirs for ours, theirs in pairs)
    share = same / len(pairs) if pairs else None
    return {"reference": "baseline", "questions": len(pairs), "identical": same, "share": share}


def steady_throughput(turns: list[dict], streams: int) -> float | None:
    """Tokens per second of all requests together while `streams` of them were in flight: from the start of
    the last stream until the first answer that nobody follows. None if there was no such time.

    A request's tokens are spread evenly over its time, which for one stream is tokens over seconds.
    """
    starts = sorted(turn["started"] for turn in turns)
    if len(starts) < streams:
        return None
    begin, last = starts[streams - 1], starts[-1]
    spans = [(t["started"], t["started"] + t["latency_s"], len(t["output_ids"])) for t in turns]
    end = min((stop for _, stop, _ in spans if stop > last), default=begin)
    if end <= begin:
        return None
    tokens = sum(
        count * max(0.0, min(stop, end) - max(start, begin)) / (stop - start)
        for start, stop, count in spans
        if stop > start
    )
    return tokens / (end - begin)


def draws(answers: list[dict], baseline: list[dict] | None) -> dict[str, Tensor]:
    """Bootstrap draws over questions of accept_length, throughput and decode_throughput, and with a baseline
    of speedup and decode_speedup; {} for one question, which says nothing of others.

    Throughput here is tokens over summed request latencies, which is the reported throughput at one request
    at a time. The speed-ups are paired: each resample takes the same questions of both arms.
    """
    ours = {a["question"]: [a] for a in answers}
    theirs = {a["question"]: [a] for a in baseline or []}
    questions = [q for q in ours if q in theirs] if theirs else list(ours)
    if len(questions) < 2:
        return {}
    columns = [_sums(ours[q]) + (_sums(theirs[q]) if theirs else ()) for q in questions]
    sums = tau.resample(columns).T
    tokens, passes, seconds, decoded, decode_s = sums[:5]
    result = {
        "accept_length": tokens / passes,
        "throughput": tokens / seconds,
        "decode_throughput": decoded / decode_s,
    }
    if theirs:
        result["speedup"] = result["throughput"] / (sums[5] / sums[7])
        result["decode_speedup"] = result["decode_throughput"] / (sums[8] / sums[9])
    return result


def intervals(draws: dict[str, Tensor]) -> dict[str, list[float]]:
    """95 % intervals of `draws`: {"accept_length": [low, high], ...}."""
    spans = {name: tau.bounds(values) for name, values in draws.items()}
    return {name: list(span) for name, span in spans.items() if span}


def mean_draws(tasks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Draws of the mean over tasks, of what every task has.

    Tasks of one size were drawn alike, so each task's draws are shifted: those of different tasks are
    independent.
    """
    names = set.intersection(*(set(draws) for draws in tasks)) if tasks else set()
    return {
        name: torch.stack([draws[name].roll(7 * n) for n, draws in enumerate(tasks)]).mean(0)
        for name in sorted(names)
    }


def _sums(answers: list[dict]) -> tuple[float, float, float, float, float]:
    """Tokens, verify passes, seconds; tokens and seconds after the first chunk."""
    seconds = sum(turn["latency_s"] for turn in turns(answers))
    return output_tokens(answers), verify_passes(answers), seconds, *_decoding(answers)


def _decoding(answers: list[dict]) -> tuple[int, float]:
    """Tokens after the first chunk, and the seconds that they took."""
    long = [t for t in turns(answers) if len(t["output_ids"]) > t["first_tokens"]]
    tokens = sum(len(t["output_ids"]) - t["first_tokens"] for t in long)
    return tokens, sum(t["latency_s"] - t["first_s"] for t in long)


def result_line(
    answers: list[dict],
    *,
    task: str,
    arm: str,
    model: str,
    num_steps: int,
    token_map: str | None,
    temperature: float,
    config: dict,
    environment: dict,
    baseline: list[dict] | None = None,
    baseline_throughput: float | None = None,
) -> dict:
    """The contract's line: exactly these keys, whoever writes it.

    `speedup` divides throughputs, end to end, and is None without a baseline of the same questions.
    `lossless` is {} without a baseline's answers, and when sampling (then only the distribution is kept, not
    the text).
    """
    tokens, wall = output_tokens(answers), wall_seconds(answers)
    throughput = tokens / wall if wall > 0 and tokens else None
    if baseline is not None:
        seconds = wall_seconds(baseline)
        baseline_throughput = output_tokens(baseline) / seconds if seconds > 0 else None
    greedy_pair = baseline is not None and temperature == 0
    return {
        "task": task,
        "arm": arm,
        "model": model,
        "num_questions": len(answers),
        "num_steps": num_steps,
        "token_map": token_map,
        "temperature": temperature,
        "output_tokens": tokens,
        "wall_s": wall,
        "throughput": throughput,
        "decode_throughput": decode_throughput(answers),
        "accept_length": accept_length(answers),
        "position_rates": position_rates(answers, num_steps),
        "speedup": throughput / baseline_throughput if throughput and baseline_throughput else None,
        "lossless": identical(answers, baseline) if greedy_pair else {},
        "config": config,
        "environment": environment,
    }
