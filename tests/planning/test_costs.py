"""What a cycle costs between measurements, by hand; tables that cannot be used."""

import json

import pytest

from fastmtp.cli import InputError
from fastmtp.planning.choice import Choice, memory, priced, steps_by_streams
from fastmtp.planning.costs import CostTable, Drafts, Setting, check_shape, read_costs

SHAPE = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 400}
FAST, SLOW = Setting(), Setting(("--attention-backend", "triton"), (("A", "1"),))


def chain(steps, rows):
    return Drafts(steps, 1, steps + 1, rows)


@pytest.fixture
def table():
    """Plain at 1 and 9 streams; chains of 1 and 3 over 100 and 300 rows; trees of 8 and 16 nodes over 100."""
    table = CostTable(SHAPE, "a card", "0.5.17")
    for streams, ms in ((1, 10.0), (9, 18.0)):
        table.add(FAST, Drafts(0, 1, 1, 400), streams, ms)
        for steps in (1, 3):
            for rows in (100, 300):
                table.add(FAST, chain(steps, rows), streams, ms + steps + rows / 100)
    table.add(FAST, Drafts(3, 4, 8, 100), 1, 15.0)
    table.add(FAST, Drafts(3, 4, 16, 100), 1, 17.0)
    table.add(SLOW, Drafts(3, 4, 16, 100), 1, 16.5)
    return table


def test_measured_and_between(table, tmp_path):
    table.save(tmp_path / "costs.json")
    table = read_costs(tmp_path / "costs.json")
    assert table.shape == SHAPE and table.gpu == "a card"
    for drafts, streams, ms in [
        (chain(3, 300), 1, 16.0),
        (chain(2, 100), 1, 13.0),  # between one step and three
        (chain(3, 200), 1, 15.0),  # between two maps
        (chain(2, 200), 5, 18.0),  # in the middle of everything
        (Drafts(0, 1, 1, 400), 3, 12.0),
        (Drafts(3, 4, 12, 100), 1, 16.0),
    ]:
        assert table.ms(FAST, drafts, streams) == pytest.approx(ms)
    assert table.ms(SLOW, Drafts(3, 4, 16, 100), 1) == 16.5


@pytest.mark.parametrize(
    "drafts, streams",
    [
        (chain(4, 100), 1),
        (chain(3, 99), 1),
        (chain(3, 301), 1),
        (chain(3, 100), 10),
        (Drafts(3, 4, 17, 100), 1),
        (Drafts(3, 4, 8, 200), 1),  # trees were measured over one map alone
        (Drafts(3, 4, 8, 100), 5),
        (Drafts(2, 4, 8, 100), 1),
        (Drafts(3, 2, 8, 100), 1),
        (Drafts(0, 1, 1, 400), 10),
    ],
)
def test_nothing_is_guessed_outside(table, drafts, streams):
    assert table.ms(FAST, drafts, streams) is None


def test_plain_decoding_is_no_neighbour_of_a_chain(table):
    table.add(FAST, chain(3, 400), 1, 17.0)
    assert table.ms(FAST, chain(2, 400), 1) is None


def test_what_can_be_priced_in_its_fastest_setting(table):
    choices = priced(table, {"small": 100, "middle": 200}, 1)
    by = {(c.map_name, *c.shape): c for c in choices}
    assert [*by] == [
        ("small", 1, 1, 2), ("small", 2, 1, 3), ("small", 3, 1, 4), ("small", 3, 4, 8), ("small", 3, 4, 16),
        ("middle", 1, 1, 2), ("middle", 2, 1, 3), ("middle", 3, 1, 4),
    ]  # fmt: skip
    assert by["small", 3, 4, 16].setting == SLOW and by["small", 3, 4, 16].ms == 16.5
    assert by["small", 3, 4, 8].setting == FAST
    assert Choice(chain(3, 100), "small", FAST, 4, 20.0).tokens_per_s(2.5) == pytest.approx(500)
    for maps, streams, message in (
        ({"tiny": 50}, 1, "map tiny 50: the table of costs was measured for 100 to 300 rows"),
        ({"small": 100}, 10, "--streams 10: the table of costs was measured for 1 to 9 streams"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            priced(table, maps, streams)
        assert "\n" not in str(caught.value)
    assert {c.map_name for c in priced(table, {"full": 400, "small": 100}, 1)} == {"small"}


def test_steps_for_each_number_of_streams(table):
    table.add(FAST, chain(1, 100), 64, 100.0)
    table.add(FAST, Drafts(0, 1, 1, 400), 64, 40.0)
    best = priced(table, {"small": 100}, 1)[0]
    # tokens per ms: at one stream 2.9/14 beats 1.7/12 and 1/10, at 64 streams plain decoding's 1/40 beats all
    assert steps_by_streams(table, best, {1: 1.7, 3: 2.9}) == {1: 3, 9: 3, 64: 0}
    assert steps_by_streams(table, best, {1: 1.7, 3: 1.8})[1] == 1


def test_memory_by_hand():
    sizes = memory(SHAPE, Drafts(3, 4, 8, 100), True)
    per_layer = 2 * 2 * 16 * 2  # keys and values, two heads of 16, two bytes
    assert sizes["map"] == 100 * 64 * 2 / 2**20
    assert sizes["cache_per_1000_tokens"] == 1000 * per_layer / 2**20
    assert sizes["drafts_per_stream"] == (8 * 3 + 4 * 2) * per_layer / 2**20
    assert memory(SHAPE, Drafts(3, 4, 8, 100), False)["map"] == 0


def test_tables_that_cannot_be_used(table, tmp_path):
    path = tmp_path / "costs.json"
    check_shape(table, SHAPE, path, "m")
    with pytest.raises(InputError, match="measured for hidden_size 64, but m has 65"):
        check_shape(table, SHAPE | {"hidden_size": 65}, path, "m")
    for text, message in (
        ("[]", "expected a JSON object"),
        ("{}", "not a table of costs"),
        (json.dumps({"shape": {}, "gpu": "g", "sglang": "0", "cycles": [{}]}), "not a table of costs"),
        (json.dumps({"shape": {}, "gpu": "g", "sglang": "0", "cycles": []}), "no drafts were measured"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_costs(path)
