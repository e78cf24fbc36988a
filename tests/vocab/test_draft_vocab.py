"""Which map a request drafts with, from token ids alone; what is refused; what a batch shares."""

import json
import logging

import numpy as np
import pytest
import torch
from helpers.tiny import chatml_tokenizer

from fastmtp import acceptance, decoding
from fastmtp.cli import InputError
from fastmtp.reference.speculative import generate
from fastmtp.reference.teacher_forced import measure_at, pooled
from fastmtp.tokenizer import fingerprint
from fastmtp.vocab.draft_vocab import LOOK_EVERY, DraftVocab, mix, names_by_anchor, read
from fastmtp.vocab.lang import LANGUAGES, detect
from fastmtp.vocab.script_table import SPECIAL, ScriptTable, build

TEXTS = {
    "en": "Name three rivers of Europe and say where each of them ends.",
    "zh": "请说出欧洲的三条河流,并说明它们在哪里入海。这个问题不难。",
    "ru": "Назовите три реки Европы и скажите, куда впадает каждая из них.",
    "other": "নদীর জল আজ শান্ত, আকাশ পরিষ্কার। পাখিরা গান গায়।",
    "ko": "유럽의 강 세 개를 말하고 각각 어디로 흐르는지 설명하세요.",
}


@pytest.fixture(scope="module")
def tokenizer():
    return chatml_tokenizer()  # knows English only: other scripts come as single bytes


@pytest.fixture(scope="module")
def scripts(tokenizer):
    return build(tokenizer)


@pytest.fixture
def toy() -> ScriptTable:
    """Ids 0..9 English, 10..19 Chinese, 20..29 Korean, 30 a special one, 31 without letters; one token
    each.
    """
    kind = np.array(
        [LANGUAGES.index(lang) for lang in ("en", "zh", "ko") for _ in range(10)] + [SPECIAL, 0], np.uint8
    )
    return ScriptTable(kind, np.array([1.0] * 30 + [0.0, 0.0], np.float32))


@pytest.fixture
def vocab(toy) -> DraftVocab:
    maps = {"en": torch.arange(0, 8), "zh": torch.arange(8, 16), "mixed": torch.arange(4, 12)}
    return DraftVocab(maps, "auto", toy)


@pytest.mark.parametrize("lang", TEXTS)
def test_ids_tell_what_the_text_tells(tokenizer, scripts, lang):
    ids = tokenizer(TEXTS[lang], add_special_tokens=False)["input_ids"]
    assert detect(TEXTS[lang]) == lang and scripts.language(ids) == lang


def test_little_text_tells_nothing(scripts, tokenizer):
    assert scripts.language(tokenizer("2 + 2 = 4", add_special_tokens=False)["input_ids"]) is None
    assert scripts.language([]) is None and scripts.language([10**9, -1, 5 * 10**8]) is None


def test_the_last_turn_that_says_enough_counts(tokenizer, scripts):
    def asked(system, user):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        return list(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
        )

    assert scripts.prompt_language(asked(TEXTS["en"] * 3, TEXTS["zh"])) == "zh"
    assert scripts.prompt_language(asked(TEXTS["zh"] * 3, TEXTS["en"])) == "en"


def test_a_changed_language_is_followed_within_sixteen_tokens(vocab):
    follower = vocab.follow([0, 1, 2, 3])
    assert follower.name == "en"
    answer = [1] * 8 + [12] * 200
    names = [follower.look(answer[:n]) for n in range(len(answer))]
    assert names[0] == "en" and names[-1] == "zh"
    assert sum(a != b for a, b in zip(names, names[1:], strict=False)) == 1
    # 8 English tokens are outweighed as soon as more than 8 Chinese ones stand there, and the next look sees
    # it
    assert names.index("zh") <= 17 + LOOK_EVERY
    assert names_by_anchor(vocab, [0, 1, 2, 3], answer) == names[1:]


def test_a_script_that_is_not_told_apart_drafts_with_the_mixed_map(tokenizer, scripts):
    maps = {name: torch.arange(8) for name in ("en", "zh", "mixed")}
    vocab = DraftVocab(maps, "auto", scripts)
    for text in (
        TEXTS["other"],
        "ტყეში ჩიტები მღერიან და მდინარე მიედინება",
        "Անտառում թռչունները երգում են",
    ):
        ids = tokenizer("Write. " + text, add_special_tokens=False)["input_ids"]
        assert scripts.language(ids) in ("other", None) and vocab.follow(ids).name == "mixed"


def test_looks_are_rare(vocab, monkeypatch):
    looked = []
    language = ScriptTable.language
    monkeypatch.setattr(
        ScriptTable, "language", lambda self, ids: looked.append(len(ids)) or language(self, ids)
    )
    follower = vocab.follow([0, 1, 2])
    looked.clear()
    for n in range(160):
        follower.look([1] * n)
    assert looked == [min(n, 64) for n in range(LOOK_EVERY, 160, LOOK_EVERY)]


def test_what_the_request_asks_for_wins(vocab, caplog):
    assert vocab.follow([0, 1, 2], "zh").look([1] * 100) == "zh"
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert vocab.follow([0, 1, 2], "klingon").look([1] * 100) == "mixed"
        assert vocab.follow([0, 1, 2], {"a": 1}).name == "mixed"
        assert vocab.follow([25, 25, 25]).name == "mixed"  # Korean, which has no map
    assert [record.getMessage().count("klingon") for record in caplog.records] == [1, 0, 0]
    assert vocab.follow([30, 31, 0]).name == "mixed", "too little to tell"


def test_a_batch_shares_one_map(vocab):
    assert vocab.together(["zh", "zh"]) == "zh"
    assert vocab.together(["zh", "en"]) == vocab.together(["en", "mixed"]) == "mixed"


def test_fixed_never_switches(vocab):
    vocab.policy = "fixed:zh"
    assert vocab.first() == "zh" and vocab.follow([0, 1, 2], "en").look([1] * 100) == "zh"


def test_mix_takes_what_is_shared_then_the_lowest_in_turn():
    a, b = torch.tensor([0, 1, 5, 6, 7, 8]), torch.tensor([0, 1, 20, 21, 22, 23])
    assert mix([a, b], 6).tolist() == [0, 1, 5, 6, 20, 21]
    assert mix([a], 6).tolist() == a.tolist()
    assert mix([torch.arange(3), torch.arange(3)], 3).tolist() == [0, 1, 2]


def saved(folder, name, ids, tokenizer_sha=None, count=None):
    torch.save(torch.tensor(ids), folder / f"{name}.pt")
    if tokenizer_sha:
        facts = {"name": "t", "sha256_of_vocabulary": tokenizer_sha, "ids": count}
        (folder / f"{name}.json").write_text(json.dumps({"tokenizer": facts}))
    return f"{folder}/{name}.pt"


def test_maps_from_files(tmp_path, tokenizer):
    size = len(tokenizer)
    mine = fingerprint(tokenizer)
    en = saved(tmp_path, "en", range(20), mine, size)
    zh = saved(
        tmp_path, "zh", range(10, 30), fingerprint(tokenizer, 40), 40
    )  # of a tokenizer that ours extends
    found = read(f"en={en},zh={zh}", "auto", tokenizer, size)
    assert (
        set(found.maps) == {"en", "zh", "mixed"}
        and len(found.maps["mixed"]) == 20
        and found.first() == "mixed"
    )
    both = read(f"en={en},zh={zh}", "union", tokenizer, size)
    assert both.maps["union"].tolist() == list(range(30)) and both.first() == "union"
    assert both.follow([1], "zh").name == "union"
    own = read(f"en={en},zh={zh},mixed={en}", "fixed:en", tokenizer, size)
    assert own.maps["mixed"].tolist() == list(range(20)) and own.first() == "en"
    found.save(tmp_path / "v.pt")
    again = DraftVocab.load(tmp_path / "v.pt")
    assert again.policy == "auto" and all(torch.equal(again.maps[n], ids) for n, ids in found.maps.items())
    assert np.array_equal(again.scripts.kind, found.scripts.kind)


def test_what_is_refused(tmp_path, tokenizer):
    size = len(tokenizer)
    en = saved(tmp_path, "en", range(20))
    for spec, policy, says in [
        (f"en={tmp_path}/none.pt", "auto", "no such token map"),
        (f"en={en},zh={saved(tmp_path, 'zh', range(10))}", "auto", "maps of one size"),
        (f"en={saved(tmp_path, 'other', range(20), 'f00', size)}", "auto", "another tokenizer"),
        (f"en={saved(tmp_path, 'big', [size + 5])}", "auto", "outside"),
        (f"en={en}", "fixed:zh", "expected auto, union or fixed:NAME"),
        (f"en={en}", "sometimes", "expected auto, union or fixed:NAME"),
        (f"en={en},en={en}", "auto", "each name once"),
        ("en", "auto", "NAME=PATH"),
        (f"mixed={en}", "auto", "at least one language"),
    ]:
        with pytest.raises(InputError, match=says):
            read(spec, policy, tokenizer, size)


@pytest.fixture(scope="module")
def two_languages(useful) -> DraftVocab:
    """Over the useful model's 32 ids: its ten commonest tokens and six others are `en`'s map; odd ids are
    Chinese.
    """
    common = useful.token_map
    rest = torch.tensor([i for i in range(32) if i not in common.tolist()])
    maps = {"en": torch.cat([common, rest[:6]]).sort().values, "zh": rest[:16], "mixed": torch.arange(8, 24)}
    kind = np.array([LANGUAGES.index("zh" if i % 2 else "en") for i in range(32)], np.uint8)
    return DraftVocab(maps, "auto", ScriptTable(kind, np.ones(32, np.float32)))


@pytest.mark.parametrize("num_steps", [1, 3])
def test_acceptance_counts_what_the_decoder_does_with_it(useful, two_languages, num_steps):
    used = set()
    samples = []
    for n, (prompt, answer) in enumerate(zip(useful.prompts, useful.answers, strict=True)):
        samples.append(dict(id=str(n), prompt_ids=prompt, output_ids=answer))
        used |= set(names_by_anchor(two_languages, prompt, answer))
    assert {"en", "zh"} <= used, "no switch happens here: the test has lost its point"
    found = measure_at(useful.model, samples, [num_steps], vocab=two_languages)[num_steps]
    histogram = torch.zeros(num_steps + 1, dtype=torch.int64)
    for sample in samples:
        decoded = generate(useful.model, sample["prompt_ids"], 40, num_steps, token_map=two_languages)
        assert decoded.ids == sample["output_ids"], "drafts never change the text"
        histogram += torch.tensor(decoded.histogram)
    assert pooled(found, "auto").histogram == histogram.tolist()
    others = [pooled(found, name).histogram for name in ("full", "en", "zh", "mixed")]
    assert histogram.tolist() not in others


def test_sampling_with_it_draws_from_the_active_map(useful, two_languages):
    ids = generate(
        useful.model, useful.prompts[0], 60, 3, temperature=1.0, seed=3, token_map=two_languages
    ).ids
    assert len(ids) == 60 and set(ids) <= set(range(32))


def test_the_commands_take_maps(tmp_path, base_folder, capsys):
    size = 200
    en, zh = saved(tmp_path, "en", range(size)), saved(tmp_path, "zh", range(100, 100 + size))
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"id": "a", "prompt": "what is two plus two?"}\n')
    argv = ["--model", str(base_folder), "--token-maps", f"en={en},zh={zh}"]
    decoding.main(
        [*argv, "--prompts", str(prompts), "--max-new-tokens", "20", "--out", str(tmp_path / "o.jsonl")]
    )
    assert "identical=1/1" in capsys.readouterr().out
    acceptance.main(
        [*argv, "--data", str(tmp_path / "o.jsonl"), "--device", "cpu", "--out", str(tmp_path / "t.json")]
    )
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert {row["map"] for row in rows} == {"full", "en", "zh", "mixed", "union", "auto"}
    decoded = json.loads((tmp_path / "o.jsonl").read_text())
    (followed,) = (row for row in rows if row["map"] == "auto")
    assert followed["histogram"] == decoded["histogram"]
    with pytest.raises(InputError, match="give one of them"):
        decoding.main(
            [*argv, "--token-map", en, "--prompts", str(prompts), "--out", str(tmp_path / "o2.jsonl")]
        )
