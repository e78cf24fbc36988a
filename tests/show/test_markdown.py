"""Markdown tables."""

from fastmtp.show.markdown import around, grid, number


def test_a_table_with_numbers_to_the_right_and_cells_that_cannot_break_it():
    rows = [["a|b", 1], ["two\nlines", 22]]
    assert grid(["name", "count"], rows, text=1).splitlines() == [
        "| name | count |",
        "| --- | ---: |",
        "| a\\|b | 1 |",
        "| two lines | 22 |",
    ]
    assert grid(["only"], []) == "| only |\n| --- |"


def test_the_unknown_is_a_dash_and_zero_is_zero():
    assert (number(None, ".2f"), number(0.0, ".2f")) == ("-", "0.00")


def test_a_median_has_its_percentiles_around_it():
    assert around([1.0, 2.25, 3.0], ".1f") == "2.2 (1.0 to 3.0)"
    assert around(None, ".1f") == "-"
