"""Every figure against hand-made histograms and times."""

import json

import pytest

from evaluation import metrics, table

CONTRACT = (
    "task arm model num_questions num_steps token_map temperature output_tokens wall_s throughput "
    "decode_throughput accept_length position_rates speedup lossless config environment"
).split()


def turn(tokens, passes=None, histogram=(), started=0.0, latency=1.0, first=0.0, ids=None):
    return {
        "output_ids": list(ids if ids is not None else range(tokens)),
        "text": "",
        "prompt_tokens": 3,
        "verify_passes": passes,
        "histogram": list(histogram),
        "first_tokens": 1,
        "first_s": first,
        "latency_s": latency,
        "started": started,
        "finish": "stop",
    }


def answer(question, *turns):
    return {"question": question, "turns": list(turns)}


# Ten passes in all: 4 accept nothing, 3 one draft, 2 two, 1 three -> 10 accepted drafts, 10 bonus tokens, 1
# from prefill.
SPEC = [
    answer("a", turn(13, 6, [2, 2, 1, 1], started=0.0, latency=2.0, first=0.5)),
    answer("b", turn(9, 4, [2, 1, 1], started=10.0, latency=1.0, first=0.5)),
]
PLAIN = [
    answer("a", turn(13, started=0.0, latency=4.0, first=0.5)),
    answer("b", turn(9, started=4.0, latency=2.0, first=0.5)),
]


def line(answers, **more):
    given = dict(
        task="t",
        arm="fastmtp:3",
        model="m",
        num_steps=3,
        token_map=None,
        temperature=0.0,
        config={},
        environment={},
    )
    return metrics.result_line(answers, **(given | more))


def test_accept_length_is_output_tokens_over_verify_passes_pooled():
    assert metrics.accept_length(SPEC) == pytest.approx(22 / 10)
    assert metrics.accept_length(PLAIN) == 1.0


def test_position_rates_count_passes_that_accepted_at_least_that_many():
    assert metrics.histogram(SPEC, 3) == [4, 3, 2, 1]
    assert metrics.position_rates(SPEC, 3) == pytest.approx([0.6, 0.3, 0.1])
    # tau from the rates, one bonus token a pass, against tau from the histogram
    assert 1 + sum(metrics.position_rates(SPEC, 3)) == pytest.approx(1 + (3 + 4 + 3) / 10)
    assert metrics.position_rates([answer("a", turn(1, 0))], 3) is None, "nothing was verified"


def test_wall_seconds_leave_out_pauses_and_count_overlap_once():
    assert metrics.wall_seconds(SPEC) == pytest.approx(3.0)
    overlapping = [answer("a", turn(2, started=0, latency=4)), answer("b", turn(2, started=1, latency=2))]
    assert metrics.wall_seconds(overlapping) == pytest.approx(4.0)


def test_decode_throughput_leaves_out_prefill_and_the_first_token():
    assert metrics.decode_throughput(SPEC) == pytest.approx((12 + 8) / (1.5 + 0.5))
    assert metrics.decode_throughput([answer("a", turn(1, latency=1.0, first=1.0))]) is None


def test_the_line_has_the_contracts_keys_and_no_others():
    made = line(SPEC, baseline=PLAIN)
    assert list(made) == CONTRACT
    assert made["num_questions"] == 2 and made["output_tokens"] == 22
    assert made["throughput"] == pytest.approx(22 / 3)
    assert made["speedup"] == pytest.approx((22 / 3) / (22 / 6))
    assert made["lossless"] == {"reference": "baseline", "questions": 2, "identical": 2, "share": 1.0}
    json.dumps(made, allow_nan=False)


def test_without_a_baseline_nothing_is_claimed():
    made = line(SPEC)
    assert made["speedup"] is None and made["lossless"] == {}
    assert line(SPEC, baseline=PLAIN, temperature=0.6)["lossless"] == {}


def test_one_different_token_in_a_later_turn_is_a_different_output():
    two = [answer("a", turn(2), turn(3))]
    other = [answer("a", turn(2), turn(3, ids=[0, 1, 9]))]
    assert metrics.identical(two, two)["identical"] == 1
    assert metrics.identical(other, two)["identical"] == 0


def test_intervals_hold_the_estimate_narrow_with_questions_and_do_not_change():
    few, many = SPEC * 1, []
    for n in range(60):
        tokens = 20 + n % 7
        many.append(answer(f"q{n}", turn(tokens, 8, [2, 3, 2, 1], latency=1.0 + 0.01 * (n % 5))))
    plain = [answer(f"q{n}", turn(20 + n % 7, latency=2.0)) for n in range(60)]
    spans = metrics.intervals(metrics.draws(many, plain))
    low, high = spans["accept_length"]
    assert low < metrics.accept_length(many) < high
    assert high - low < 0.2
    low, high = spans["speedup"]
    assert low < 2.0 / 1.02 < high and high - low < 0.05
    assert spans == metrics.intervals(metrics.draws(many, plain))
    wide = metrics.intervals(metrics.draws(few, PLAIN))["accept_length"]
    assert wide[0] == pytest.approx(13 / 6) and wide[1] == pytest.approx(9 / 4)
    assert metrics.draws(SPEC[:1], PLAIN) == {}


@pytest.mark.parametrize("histogram", [[], [0, 0, 0, 0], [1, 0, 0], [0, 0, 0, 5]])
def test_rates_that_the_engine_did_not_report_are_unknown_and_not_zero(histogram):
    """One answer without counts is enough: rates of the others would not be those of the task."""
    answers = [SPEC[0], answer("b", turn(9, 4, histogram))]
    assert metrics.position_rates(answers, 3) is None
    made = line(answers)
    assert made["position_rates"] is None and made["accept_length"] == pytest.approx(22 / 10)
    assert metrics.position_rates(PLAIN, 0) == []


def test_a_histogram_that_says_other_than_the_tokens_is_not_believed():
    """All passes in the first place beside 2.5 tokens per pass: rates of zero would be made up."""
    made = line([answer("a", turn(41, 16, [16]))])
    assert made["position_rates"] is None and made["accept_length"] == pytest.approx(41 / 16)
    assert metrics.position_rates([answer("a", turn(17, 16, [16]))], 3) == [0.0, 0.0, 0.0]


def test_answers_without_a_token_are_neither_lossless_nor_a_number():
    empty = [answer("a", turn(0)), answer("b", turn(0, latency=0.0))]
    made = line(empty, num_steps=0, baseline=empty)
    assert made["lossless"] == {"reference": "baseline", "questions": 0, "identical": 0, "share": None}
    assert (made["throughput"], made["speedup"], made["accept_length"]) == (None, None, None)
    json.dumps([made, metrics.intervals(metrics.draws(empty, empty))], allow_nan=False)
    assert metrics.identical([answer("a", turn(0))], [answer("a", turn(2))])["identical"] == 0


def test_the_time_of_a_cycle_leaves_out_the_first_chunk_and_short_answers():
    slow = answer("c", turn(60, 20, latency=0.5, first=0.1))  # 20 ms per cycle
    fast = answer("d", turn(60, 30, latency=0.4, first=0.1))  # 10 ms
    short = answer("e", turn(9, 4, latency=9.0, first=0.1))
    assert metrics.cycle_ms([slow, fast, short]) == pytest.approx([11, 15, 19])
    assert metrics.cycle_ms([answer("p", turn(51, latency=1.1, first=0.1))]) == pytest.approx([20, 20, 20])
    assert metrics.cycle_ms([short]) is None
    assert metrics.first_ms(
        [answer(str(ms), turn(1, first=ms / 1000)) for ms in (20, 30, 40)]
    ) == pytest.approx([22, 30, 38])
    assert metrics.first_ms([]) is None


@pytest.mark.parametrize(
    "high, parallel, said",
    [(14.0, 1, False), (16.0, 1, True), (16.0, 4, False)],
)
def test_cycles_that_differ_much_are_said(high, parallel, said):
    cycles = {"baseline": [9.0, 10.0, 11.0], "fastmtp:1": [10.0, 12.0, high], "fastmtp:2": None}
    cycles |= {"fastmtp:3": [0.0, 0.0, 1.0], "fastmtp:7@adaptive": [1.0, 2.0, 3.0]}
    found = table.unsteady([{"config": {"parallel": parallel}}], cycles)
    assert found[:1] == [text for text in found if text.startswith("fastmtp:1: a cycle took 10.0 to 16.0 ms")]
    assert len(found) == said
