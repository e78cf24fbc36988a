"""Acceptance from one teacher-forced pass is what the decoder counts; and it is near zero where drafts are
nonsense.
"""

import pytest
import torch
from helpers.tiny import samples_of, tiny_model, wrap

from fastmtp.reference.speculative import generate
from fastmtp.reference.teacher_forced import (
    FULL,
    as_json,
    draft_tables,
    hits,
    measure,
    measure_at,
    pooled,
    table,
)


@pytest.mark.parametrize("batch_tokens", [1, 200, 8192])
@pytest.mark.parametrize("num_steps", [1, 3, 5])
def test_counts_are_the_decoders(useful, num_steps, batch_tokens):
    samples = samples_of(useful)
    found = measure(useful.model, samples, num_steps, {"map": useful.token_map}, batch_tokens)
    for name, token_map in ((FULL, None), ("map", useful.token_map)):
        histogram, passes, tokens = torch.zeros(num_steps + 1, dtype=torch.int64), 0, 0
        for sample in samples:
            decoded = generate(
                useful.model, sample["prompt_ids"], len(sample["output_ids"]), num_steps, token_map=token_map
            )
            assert decoded.ids == sample["output_ids"]
            histogram += torch.tensor(decoded.histogram)
            passes, tokens = passes + decoded.verify_passes, tokens + len(decoded.ids)
        total = pooled(found, name)
        assert total.histogram == histogram.tolist() and total.verify_passes == passes
        assert total.output_tokens == tokens and total.accept_length == tokens / passes
        assert total.accept_length > 1.2, "the head is of no use here: the test has lost its point"


def test_an_answer_cut_by_its_end_token_counts_as_decoded(useful):
    """The last pass keeps fewer tokens than it accepted."""
    for prompt, answer in zip(useful.prompts[:6], useful.answers[:6], strict=True):
        for end in set(answer[:20]):
            text = answer[: answer.index(end) + 1]
            decoded = generate(useful.model, prompt, 40, 3, eos_ids={end})
            assert decoded.ids == text
            if len(text) > 1:
                found = measure(useful.model, [dict(prompt_ids=prompt, output_ids=text)], 3)
                assert pooled(found).histogram == decoded.histogram


def test_other_tokens_than_the_models_are_hardly_accepted(useful):
    """Negative control: the same answers, every token replaced by its neighbour, or the whole answer drawn at
    random.
    """
    wanted = pooled(measure(useful.model, samples_of(useful), 3))
    assert wanted.position_rates[0] > 0.3
    generator = torch.Generator().manual_seed(0)
    shifted = [{**s, "output_ids": [(t + 1) % 32 for t in s["output_ids"]]} for s in samples_of(useful)]
    drawn = [
        {**s, "output_ids": torch.randint(0, 32, (40,), generator=generator).tolist()}
        for s in samples_of(useful)
    ]
    for wrong in (shifted, drawn):
        found = pooled(measure(useful.model, wrong, 3))
        assert found.position_rates[0] < 0.12 and found.accept_length < 1.15


def test_drafts_one_place_off_are_hardly_accepted(useful, monkeypatch):
    """Negative control: the right answers, and states of the neighbouring anchor."""
    net = useful.model.net
    right = pooled(measure(useful.model, samples_of(useful), 3))
    states = type(net).mtp_states

    def shifted(self, *args, **kwargs):
        hidden, found, segments = states(self, *args, **kwargs)
        return hidden, [state.roll(1, dims=1) for state in found], segments

    monkeypatch.setattr(type(net), "mtp_states", shifted)
    wrong = pooled(measure(useful.model, samples_of(useful), 3))
    assert wrong.position_rates[0] < 0.5 * right.position_rates[0] and wrong.position_rates[2] < 0.1


def test_a_random_head_is_hardly_accepted():
    net = tiny_model(21, spread=0.2)
    samples = [dict(prompt_ids=[p, 4], output_ids=generate(wrap(net), [p, 4], 40, 0).ids) for p in range(8)]
    assert pooled(measure(wrap(net), samples, 3)).position_rates[0] < 0.2


def test_hits_are_those_of_the_greedy_chain(useful):
    """Row i, column k: draft k+1 of the anchor before answer token i+1, the true tokens given."""
    prompt, answer = useful.prompts[1], useful.answers[1][:9]
    (found,) = draft_tables(useful.model, [(prompt, answer)], 3, {FULL: None}, hits)
    ids = torch.tensor([prompt + answer])
    net = useful.model.net
    with torch.no_grad():
        _, states, _ = net.mtp_states(ids, num_steps=3, attention="exact")
    for i in range(8):
        for k in range(3):
            place = len(prompt) + i  # of answer token i; the anchor is the place before it
            target = place + k + 1
            wanted = (
                target < ids.shape[1] and int(net.lm_head(states[k][0, place - 1]).argmax()) == ids[0, target]
            )
            assert bool(found[FULL][i, k]) == bool(wanted)


def test_rows_by_source_and_map(useful):
    found = measure(useful.model, samples_of(useful), 2, {"small": useful.token_map})
    assert set(found) == {(s, "en", m) for s in ("s0", "s1") for m in (FULL, "small")}
    rows = as_json(found, "the head")
    assert sum(row["output_tokens"] for row in rows if row["map"] == FULL) == pooled(found).output_tokens
    assert {row["head"] for row in rows} == {"the head"}
    assert len(table(found).splitlines()) == 2 + 4 + 2


def test_several_k_from_one_pass_are_those_measured_alone(useful):
    samples = samples_of(useful)
    for steps, found in measure_at(useful.model, samples, [1, 2, 5], {"map": useful.token_map}).items():
        alone = measure(useful.model, samples, steps, {"map": useful.token_map}, batch_tokens=200)
        assert found == alone and len(pooled(found).histogram) == steps + 1
