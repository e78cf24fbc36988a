"""The reference decoder loses nothing: greedy token for token, sampled in distribution; it counts right."""

import json
import shutil

import pytest
import torch
from helpers.chi_square import assert_fits, p_value
from helpers.table_net import TableNet
from helpers.tiny import save_folder, tiny_model, wrap

from fastmtp import decoding, files
from fastmtp.checkpoint import read_head
from fastmtp.cli import InputError
from fastmtp.decoding import summarise
from fastmtp.reference.speculative import accept_sampled, generate

VOCAB = 97
MAP = torch.arange(0, VOCAB, 3)
PROMPT = [5, 17, 3, 88, 41]


@pytest.fixture(scope="module")
def nets():
    """Random networks: most drafts are wrong, and many a greedy text ends in a loop, where some are right."""
    return [tiny_model(seed, spread=0.2) for seed in (0, 1)]


def plain_greedy(net, prompt: list[int], count: int, ends: set[int]) -> list[int]:
    """The whole text through the network for each token: no cache, no code of the decoder."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + count and not (len(ids) > len(prompt) and ids[-1] in ends):
            ids.append(int(net(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def check_counts(found, num_steps: int) -> None:
    """Each pass keeps its accepted drafts and one more token, but the last, which may be cut; the first token
    is free.
    """
    assert sum(found.histogram) == found.verify_passes and len(found.histogram) == num_steps + 1
    assert found.histogram == [found.accepted.count(drafts) for drafts in range(num_steps + 1)]
    most = 1 + sum((j + 1) * passes for j, passes in enumerate(found.histogram))
    assert most - 1 <= len(found.ids) <= most


@pytest.mark.parametrize("token_map", [None, MAP], ids=["full", "map"])
@pytest.mark.parametrize("num_steps", range(1, 8))
def test_greedy_is_plain_greedy(nets, num_steps, token_map):
    for net in nets:
        wanted = plain_greedy(net, PROMPT, 24, set())
        found = generate(wrap(net), PROMPT, 24, num_steps, token_map=token_map)
        assert found.ids == wanted
        check_counts(found, num_steps)


def test_zero_steps_is_plain_decoding(nets):
    found = generate(wrap(nets[0]), PROMPT, 10, 0)
    assert found.ids == plain_greedy(nets[0], PROMPT, 10, set())
    assert found.verify_passes == 9 and found.histogram == [9]


def test_useful_drafts_save_passes_and_change_nothing(useful):
    """The same with a head that is often right, so that long accepted prefixes are exercised too."""
    for prompt in useful.prompts[:4]:
        for num_steps in (1, 3, 5):
            found = generate(useful.model, prompt, 30, num_steps)
            assert found.ids == plain_greedy(useful.model.net, prompt, 30, set())
            assert found.verify_passes < 27
            check_counts(found, num_steps)


def test_accepted_drafts_are_listed_in_the_order_of_the_passes(useful):
    """Decoded anew from where a pass began, the first pass accepts as many drafts."""
    prompt = useful.prompts[0]
    whole = generate(useful.model, prompt, 30, 3)
    assert len(set(whole.accepted)) > 1, "the test has lost its point"
    for turn, accepted in enumerate(whole.accepted[:-1]):
        text = prompt + whole.ids[: turn + sum(whole.accepted[:turn])]
        assert generate(useful.model, text, 5, 3).accepted[0] == accepted


@pytest.mark.parametrize("count", range(1, 9))
def test_the_limit_cuts_a_cycle(useful, count):
    prompt = useful.prompts[0]
    found = generate(useful.model, prompt, count, 3)
    assert found.ids == plain_greedy(useful.model.net, prompt, count, set()) and len(found.ids) == count
    check_counts(found, 3)


@pytest.mark.parametrize("token_map", [None, "map"], ids=["full", "map"])
def test_an_end_token_stops_inside_accepted_drafts(useful, token_map):
    """Every token of a text in turn is made the end token: as last of a cycle, as a draft, as the first
    token.
    """
    token_map = useful.token_map if token_map else None
    inside = 0
    for prompt in useful.prompts[:3]:
        text = plain_greedy(useful.model.net, prompt, 16, set())
        for end in set(text):
            found = generate(useful.model, prompt, 16, 3, eos_ids={end}, token_map=token_map)
            assert found.ids == text[: text.index(end) + 1]
            check_counts(found, 3)
            inside += len(found.ids) == sum((j + 1) * n for j, n in enumerate(found.histogram))
    assert inside > 0, "no end token was an accepted draft: the test has lost its point"


def test_a_prompt_of_one_token(nets):
    assert generate(wrap(nets[0]), [7], 12, 3).ids == plain_greedy(nets[0], [7], 12, set())


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("mapped", [False, True], ids=["full", "map"])
def test_accepted_tokens_are_distributed_as_the_model(mapped):
    """20,000 draws of two drafts against fixed distributions: the three kept tokens are as three draws from
    p.
    """
    generator = torch.Generator().manual_seed(0)
    p = (torch.randn(3, 6, generator=generator) * 1.5).softmax(-1)
    q = (torch.randn(2, 6, generator=generator) * 1.5).softmax(-1)
    if mapped:
        q[:, [0, 3, 5]] = 0
        q /= q.sum(-1, keepdim=True)
    counts = torch.zeros(6, 6, 6)
    draws = 20_000
    for first, second in torch.stack(
        [row.multinomial(draws, True, generator=generator) for row in q], 1
    ).tolist():
        accepted, extra = accept_sampled([first, second], q, p, generator)
        kept = [first, second][:accepted] + [extra]
        kept += [int(row.multinomial(1, generator=generator)) for row in p[len(kept) :]]
        counts[tuple(kept)] += 1
    assert_fits(counts, draws * p[0][:, None, None] * p[1][None, :, None] * p[2][None, None, :])


@pytest.mark.parametrize("mapped", [False, True], ids=["full", "map"])
def test_sampled_texts_are_distributed_as_the_model(mapped, monkeypatch):
    """Joint chi-square over the first three tokens of texts decoded with drafts, every seed another text."""
    net = TableNet()
    net.without_cache(monkeypatch)
    token_map = torch.tensor([1, 3]) if mapped else None
    counts, draws = torch.zeros(4, 4, 4), 20_000
    model = wrap(net)
    for seed in range(draws):
        counts[tuple(generate(model, [0, 2], 3, 2, temperature=1.0, seed=seed, token_map=token_map).ids)] += 1
    wanted = net.p[2][:, None, None] * net.p[:, :, None] * net.p[None]
    assert_fits(counts, draws * wanted)


@pytest.mark.parametrize("mapped", [False, True], ids=["full", "map"])
def test_sampled_texts_of_a_real_network_fit_it(mapped):
    """Rank every sampled token among the network's own probabilities, likeliest draft first: uniform if
    lossless.

    The order by the head's distribution makes the test keen on what goes wrong in practice, favour for the
    draft.
    """
    small = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    net = tiny_model(4, spread=0.4, vocab_size=24, **small)
    token_map = torch.arange(0, 24, 2) if mapped else None
    prompt, bins, ranks = [1, 2, 3], 10, []
    noise = torch.Generator().manual_seed(1)
    for seed in range(16):
        text = (
            prompt + generate(wrap(net), prompt, 100, 2, temperature=1.0, seed=seed, token_map=token_map).ids
        )
        ids = torch.tensor([text])
        with torch.no_grad():
            p = net(input_ids=ids).logits[0].softmax(-1)
            q = net.lm_head(net.mtp_states(ids, num_steps=1)[1][0])[0]
        for at in range(len(prompt) + 1, len(text)):
            order = q[at - 2].argsort(descending=True)
            mass = p[at - 1][order]
            place = int((order == text[at]).nonzero())
            ranks.append(float(mass[:place].sum() + mass[place] * torch.rand((), generator=noise)))
    counts = torch.histc(torch.tensor(ranks), bins, 0, 1)
    assert_fits(counts, torch.full((bins,), len(ranks) / bins))


def test_temperature_sharpens_and_the_seed_repeats():
    net = tiny_model(2, spread=0.2)
    same = [generate(wrap(net), PROMPT, 12, 3, temperature=1.0, seed=7).ids for _ in range(2)]
    assert same[0] == same[1] != generate(wrap(net), PROMPT, 12, 3, temperature=1.0, seed=8).ids
    assert generate(wrap(net), PROMPT, 12, 3, temperature=1e-4).ids == plain_greedy(net, PROMPT, 12, set())


def test_a_draft_the_model_never_says_is_refused_even_where_rounding_leaves_no_residual():
    """p and q both round to one at token 0; q still drew token 1, about which p has nothing to say."""
    p, q = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[1.0, 1e-9]])
    assert accept_sampled([1], q, p, torch.Generator().manual_seed(0)) == (0, 0)


def test_the_chi_square_helper_can_fail():
    wanted = torch.full((10,), 100.0)
    assert_fits(wanted + torch.tensor([5.0, -5.0] * 5), wanted)
    with pytest.raises(AssertionError):
        assert_fits(wanted + torch.tensor([25.0, -25.0] * 5), wanted)
    assert p_value(21.666, 9) == pytest.approx(0.01, rel=1e-3)  # from a printed table


class Place:
    """A working folder with a model, prompts, two heads and maps, and the command's usual arguments."""

    def __init__(self, root, base_folder):
        self.root, self.model = root, shutil.copytree(base_folder, root / "model")
        self.prompts, self.out = root / "prompts.jsonl", root / "out.jsonl"
        self.prompts.write_text('{"id": "a", "prompt": "what?"}\n{"id": "b", "prompt": "the cat"}\n')
        for seed in (5, 6):
            save_folder(root / f"head{seed}", seed=seed)
        for name, ids in (("en", range(0, 200)), ("zh", range(100, 300))):
            torch.save(torch.tensor(list(ids)), root / f"{name}.pt")

    def run(self, capsys, *flags: str, **paths) -> tuple[str, list[dict]]:
        """(what was said of asked and kept rows, the rows)."""
        chosen = {"model": self.model, "prompts": self.prompts, "out": self.out} | paths
        words = [word for name, path in chosen.items() for word in (f"--{name}", str(path))]
        decoding.main([*words, "--max-new-tokens", "6", *flags])
        files.release(chosen["out"])
        (asked,) = (line for line in capsys.readouterr().err.splitlines() if " asked, " in line)
        rows = [json.loads(line) for line in chosen["out"].read_text().splitlines()]
        return asked.rpartition(": ")[2], rows


@pytest.fixture
def place(tmp_path, base_folder) -> Place:
    return Place(tmp_path, base_folder)


def test_the_same_content_is_kept_wherever_it_lies(place, capsys):
    flags = ["--head", str(place.root / "head5"), "--token-map", str(place.root / "en.pt")]
    asked, rows = place.run(capsys, *flags)
    assert asked == "2 asked, 0 kept" and [row["id"] for row in rows] == ["a", "b"]
    elsewhere = {
        "model": shutil.copytree(place.model, place.root / "elsewhere"),
        "prompts": shutil.copyfile(place.prompts, place.root / "other.jsonl"),
    }
    shutil.copytree(place.root / "head5", place.root / "again")
    shutil.copyfile(place.root / "en.pt", place.root / "map.pt")
    (place.model / "config.json").touch()
    moved = ["--head", str(place.root / "again"), "--token-map", str(place.root / "map.pt")]
    for now, paths in ((flags, {}), (moved, elsewhere)):
        assert place.run(capsys, *now, **paths) == ("0 asked, 2 kept", rows)


def exchange(place: Place, what: str) -> None:
    """Put other content under the same name."""
    if what == "head":
        shutil.rmtree(place.root / "head5")
        shutil.copytree(place.root / "head6", place.root / "head5")
    elif what == "own head":
        shutil.rmtree(place.model)
        save_folder(place.model, seed=9)
    elif what == "map":
        shutil.copyfile(place.root / "zh.pt", place.root / "en.pt")
    else:
        place.prompts.write_text('{"id": "a", "prompt": "who?"}\n{"id": "b", "prompt": "the cat"}\n')


@pytest.mark.parametrize("what", ["head", "own head", "map", "prompts"])
def test_other_content_under_the_same_name_is_asked_again(place, capsys, what):
    flags = ["--token-map", str(place.root / "en.pt")]
    flags += ["--head", str(place.root / "head5")] if what == "head" else []
    place.run(capsys, *flags)
    exchange(place, what)
    assert place.run(capsys, *flags)[0] == "2 asked, 0 kept"


def test_other_settings_are_asked_again(place, capsys):
    en, zh = place.root / "en.pt", place.root / "zh.pt"
    for flags in (
        ["--num-steps", "3"],
        ["--num-steps", "2"],
        ["--dtype", "bfloat16"],
        ["--max-new-tokens", "5"],
        ["--token-map", str(en)],
        ["--token-maps", f"en={en},zh={zh}"],
        ["--token-maps", f"zh={en},en={zh}"],
        ["--token-maps", f"en={en},zh={zh}", "--vocab-policy", "fixed:en"],
        ["--token-maps", f"en={en},zh={zh}", "--vocab-policy", "union"],
    ):
        assert place.run(capsys, *flags)[0] == "2 asked, 0 kept", flags
        assert place.run(capsys, *flags)[0] == "0 asked, 2 kept", flags


def test_somebody_elses_file_stays(place, capsys):
    place.out.write_text("my own notes\n")
    for out in (place.out, place.prompts):
        before = out.read_text()
        with pytest.raises(InputError, match="not written by this project|an input of this command"):
            place.run(capsys, out=out)
        assert out.read_text() == before


def answered(ids) -> dict:
    """A prompt whose earlier answer says its exact tokens."""
    turns = [("user", "what?"), ("assistant", "the cat"), ("user", "and?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    messages[1]["token_ids"] = ids
    return {"messages": messages}


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": "many words " * 600}, "has [0-9]+ tokens, the model's context leaves 506"),
        ({"prompt": None}, "prompts.jsonl:2: no prompt"),
        ({"prompt": 5}, "prompts.jsonl:2: "),
        ({"messages": [None]}, "prompts.jsonl:2: "),
        ({"messages": [{"content": "x"}]}, "prompts.jsonl:2: "),
        ({"messages": [{"role": "tool", "content": "5"}]}, "prompts.jsonl:2: "),
        ({"id": "half \ud83d", "prompt": "x"}, "prompts.jsonl:2: "),
        (answered([9999]), "'token_ids' holds 9999, which is no token id"),
        (answered(["5"]), "'token_ids' holds '5', which is no token id"),
        (answered([70, 71, 72]), "`token_ids` spell other text"),
    ],
    ids=[
        *("long", "null", "number", "null message", "no role", "tool", "surrogate"),
        *("ids beyond", "ids as texts", "ids of other text"),
    ],
)
def test_a_prompt_that_cannot_be_asked_is_named_before_anything_is_loaded(
    place, capsys, row, words, monkeypatch
):
    monkeypatch.setattr(decoding, "load", lambda *_: pytest.fail("the weights were read"))
    place.prompts.write_text('{"prompt": "what?"}\n' + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=words):
        place.run(capsys)
    assert not place.out.exists() and not files.record_of(place.out).exists()


def test_a_template_that_refuses_is_quoted(place, capsys):
    refusal = "{{ raise_exception('System role not supported') }}"
    (place.model / "chat_template.jinja").write_text(refusal)
    with pytest.raises(InputError, match="prompt 'a': .*System role not supported"):
        place.run(capsys)


def test_nothing_verified_is_a_dash(place, capsys):
    decoding.main(
        ["--model", str(place.model), "--prompts", str(place.prompts), "--out", str(place.out)]
        + ["--max-new-tokens", "1"]
    )
    assert capsys.readouterr().out == "tau=- speedup=- identical=2/2 rates=-\n"
    assert summarise([json.loads(line) for line in place.out.read_text().splitlines()])["speedup"] is None


def test_another_head_takes_the_place_of_the_models_own(base_folder, tmp_path, monkeypatch):
    other = save_folder(tmp_path / "other", seed=5)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "what?"}\n')
    used = []

    def compare(model, *_):
        used.append({name: tensor for name, tensor in model.net.state_dict().items() if "mtp_layers" in name})
        raise SystemExit

    monkeypatch.setattr(decoding, "compare", compare)
    common = [
        "--model",
        str(base_folder),
        "--prompts",
        str(tmp_path / "prompts.jsonl"),
        "--out",
        str(tmp_path / "out.jsonl"),
    ]
    for flags in ([], ["--head", str(other)]):
        with pytest.raises(SystemExit):
            decoding.main([*common, *flags])
    for found, folder in zip(used, (base_folder, other), strict=True):
        wanted = read_head(folder)
        assert found.keys() == wanted.keys() and all(
            torch.equal(found[name], wanted[name]) for name in wanted
        )
