"""Chats to ids and masks: what the template says, exactly the answers, and never the same tokens twice."""

import pytest
from helpers.tiny import CHATML, chatml_tokenizer

from fastmtp.chat import (
    IGNORE,
    TemplateError,
    answer_ids,
    check_shown,
    encode_chat,
    encode_turns,
    prompt_ids,
)
from fastmtp.cli import InputError
from fastmtp.data.scan import training_row

SINGLE = [
    {"role": "user", "content": "what is two plus two?"},
    {"role": "assistant", "content": "two plus two is four"},
]
MULTI = [
    {"role": "system", "content": "You are a helpful assistant."},
    *SINGLE,
    {"role": "user", "content": "and four plus four?"},
    {"role": "assistant", "content": "four plus four is eight.\nSo it is 8, naïvely: ∑ 你好"},
]


def spans(labels: list[int]) -> list[list[int]]:
    """The runs of labelled tokens."""
    runs, open_ = [], False
    for label in labels:
        if label == IGNORE:
            open_ = False
        elif open_:
            runs[-1].append(label)
        else:
            runs.append([label])
            open_ = True
    return runs


@pytest.mark.parametrize("messages", [SINGLE, MULTI], ids=["single", "multi"])
def test_ids_are_the_templates(tokenizer, messages):
    ids, labels = encode_chat(tokenizer, messages)
    rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert (
        rendered[-1] == tokenizer("\n")["input_ids"][0]
    )  # ChatML's line break after the end token is nobody's
    assert ids == rendered[:-1] and len(labels) == len(ids)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert [tokenizer.decode(run) for run in spans(labels)] == [answer + "<|im_end|>" for answer in answers]
    assert all(label in (IGNORE, token) for label, token in zip(labels, ids, strict=True))


def test_the_prompt_is_the_beginning_of_the_chat(tokenizer):
    ids, labels = encode_chat(tokenizer, SINGLE)
    prompt = prompt_ids(tokenizer, SINGLE[:1])
    assert ids[: len(prompt)] == prompt and labels[: len(prompt)] == [IGNORE] * len(prompt)
    assert labels[len(prompt)] != IGNORE
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("form", ["beside", "content"])
def test_exact_tokens_are_kept_though_the_tokenizer_would_choose_others(tokenizer, form):
    text = "two plus two is four"
    letters = [tokenizer.convert_tokens_to_ids("Ġ" if c == " " else c) for c in text]
    exact = letters + [tokenizer.eos_token_id]
    assert tokenizer.decode(letters) == text and letters != tokenizer(text)["input_ids"]
    for turn in (2, 4):
        messages = [dict(m) for m in MULTI]
        if form == "beside":
            messages[turn] |= {"content": text, "token_ids": exact}
        else:
            messages[turn]["content"] = {"token_ids": exact}
        ids, labels = encode_chat(tokenizer, messages)
        assert spans(labels)[turn // 2 - 1] == exact
        plain = encode_chat(
            tokenizer, [m | {"content": text} if i == turn else m for i, m in enumerate(MULTI)]
        )[0]
        assert tokenizer.decode(ids) == tokenizer.decode(plain)


def test_an_answer_cut_at_the_limit_gets_no_end_token_of_its_own_but_the_template_closes_it(tokenizer):
    cut = tokenizer("two plus two")["input_ids"]
    ids, labels = encode_chat(tokenizer, [SINGLE[0], {"role": "assistant", "content": {"token_ids": cut}}])
    assert spans(labels) == [cut] and ids[-1] == cut[-1]
    messages = [dict(m) for m in MULTI]
    messages[2]["content"] = {"token_ids": cut}
    ids, labels = encode_chat(tokenizer, messages)
    assert spans(labels)[0] == cut
    assert tokenizer.decode(ids).count("<|im_end|>") == 5


def test_trailing_user_turns_are_left_out(tokenizer):
    assert encode_chat(tokenizer, [*SINGLE, {"role": "user", "content": "thanks"}]) == encode_chat(
        tokenizer, SINGLE
    )


def test_no_answer_is_refused(tokenizer):
    with pytest.raises(InputError, match="no assistant"):
        encode_chat(tokenizer, SINGLE[:1])


TRIMS = CHATML.replace(
    "m['content'] +", "(m['content'] if loop.last else m['content'][:8]) +"
)  # earlier turns
OPENS = CHATML.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}")
ONE_USER = (
    "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{ '<|im_start|>user\\n' + users[-1]['content'] + '<|im_end|>\\n' }}"
    "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CALLS = CHATML.replace(
    "m['content'] +", "(m['content'] or '') + (m['tool_calls'] | tojson if m['tool_calls'] else '') +"
)


@pytest.fixture
def templated(tokenizer):
    """The tokenizer with another template, as a function; its own comes back at the end."""
    own = tokenizer.chat_template

    def change(template: str):
        tokenizer.chat_template = template
        return tokenizer

    yield change
    tokenizer.chat_template = own


@pytest.mark.parametrize("template", [TRIMS, "{{ messages | length }}" + CHATML], ids=["trims", "counts"])
def test_a_template_that_rewrites_earlier_turns_gives_a_sequence_per_answer(templated, template):
    """Each answer follows the prompt that an engine would build: the history as the template rewrites it."""
    tokenizer = templated(template)
    sequences = encode_turns(tokenizer, MULTI)
    assert len(sequences) == 2 and encode_chat(tokenizer, MULTI) == sequences[-1]
    for (ids, labels), turn in zip(sequences, (2, 4), strict=True):
        prompt = prompt_ids(tokenizer, MULTI[:turn])
        assert ids[: len(prompt)] == prompt and labels[: len(prompt)] == [IGNORE] * len(prompt)
        assert ids[len(prompt) :] == labels[len(prompt) :] == answer_ids(tokenizer, MULTI[turn])


def test_a_turn_that_is_not_learnt_has_no_sequence_of_its_own(templated):
    tokenizer = templated(TRIMS)
    messages = [m | {"loss": False} if n == 2 else m for n, m in enumerate(MULTI)]
    assert encode_turns(tokenizer, messages) == encode_turns(tokenizer, MULTI)[1:]


def test_null_loss_says_nothing(tokenizer):
    null, learnt = (encode_chat(tokenizer, [SINGLE[0], SINGLE[1] | {"loss": x}]) for x in (None, True))
    assert null == learnt == encode_chat(tokenizer, SINGLE)


def test_a_tag_that_the_generation_prompt_opens_is_not_written_twice(templated):
    tokenizer = templated(OPENS)
    answer = {"role": "assistant", "content": "<think>\nhm\n</think>\nfour"}
    text = tokenizer.decode(encode_chat(tokenizer, [SINGLE[0], answer])[0])
    assert text.endswith("assistant\n<think>\nhm\n</think>\nfour<|im_end|>") and text.count("<think>") == 1


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


def test_tool_calls_are_learnt_as_the_template_writes_them(templated):
    tokenizer = templated(CALLS)
    messages = [SINGLE[0], CALL | {"content": ""}, {"role": "tool", "content": "4"}, SINGLE[1]]
    check_shown(tokenizer, messages)
    ids, labels = encode_chat(tokenizer, messages)
    calls, text = (tokenizer.decode(run) for run in spans(labels))
    assert (
        calls.startswith('[{"function": {') and calls.endswith("}]<|im_end|>") and text.startswith("two plus")
    )
    assert "<|im_start|>tool\n4<|im_end|>" in tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("messages", "template", "reason"),
    [
        (
            [{"role": "tool", "content": "two"}, SINGLE[1]],
            CHATML.replace("% for m in messages %", "% for m in messages if m['role'] != 'tool' %"),
            "'tool' turn",
        ),
        ([*SINGLE[:1], SINGLE[0], SINGLE[1]], ONE_USER, "'user' turn"),
        (
            MULTI[:3],
            CHATML.replace("% for m in messages %", "% for m in messages if m['role'] != 'system' %"),
            "'system' turn",
        ),
        ([SINGLE[0], CALL | {"content": "x"}], CHATML, "'tool_calls'"),
        ([SINGLE[0], SINGLE[1] | {"reasoning_content": "hm"}], CHATML, "'reasoning_content'"),
        ([SINGLE[0], CALL], CHATML, "refuses this chat"),
        (MULTI, "{{ raise_exception('no system here') }}", "no system here"),
    ],
)
def test_what_the_template_does_not_show_is_said(templated, messages, template, reason):
    with pytest.raises(TemplateError, match=reason):
        check_shown(templated(template), messages)


def test_tools_that_the_template_leaves_out(tokenizer):
    with pytest.raises(TemplateError, match="the tools"):
        check_shown(tokenizer, SINGLE, [{"type": "function", "function": {"name": "f", "parameters": {}}}])


def test_answer_ids_end_with_the_end_token(tokenizer):
    assert answer_ids(tokenizer, SINGLE[1])[-1] == tokenizer.eos_token_id


def test_distilled_samples_reach_training_with_the_same_tokens(tokenizer):
    """distill's row -> curate's row -> the template's ids."""
    exact = tokenizer("two")["input_ids"] + [tokenizer.eos_token_id]
    asked = prompt_ids(tokenizer, SINGLE[:1])
    answer = {"role": "assistant", "content": "two", "token_ids": exact}
    sample = {"id": "1", "messages": [SINGLE[0], answer], "prompt_ids": asked, "output_ids": exact}
    messages, _ = training_row(sample, "here:1")
    assert encode_chat(tokenizer, messages) == (asked + exact, [IGNORE] * len(asked) + exact)


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages[0]['content'][9] ** 'x' }}", None])
def test_whatever_a_template_raises_is_one_line(template):
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="chat template") as error:
        encode_turns(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}])
    assert "\n" not in str(error.value)
