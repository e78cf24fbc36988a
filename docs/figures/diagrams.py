"""The diagrams of the documentation, drawn again by `python docs/figures/diagrams.py`.

pipeline: what each command makes of what. cycle: one draft-verify cycle. recursion: the K steps of the head
and what each sees. tree: a draft tree and its attention mask.
"""

from __future__ import annotations

from pathlib import Path

from drawing import BLUE, GREEN, GREY, INK, ORANGE, TINTS, Sheet

FOLDER = Path(__file__).parent


def pipeline() -> Sheet:
    """Files in boxes, one command per arrow; the second row runs back to the left."""
    s = Sheet(920, 322, "The pipeline: which command makes what of which file")
    width, height, top, bottom = 134, 46, 84, 256
    x = [20, 276, 524, 766]

    def file(column, y, words, colour=GREY):
        s.node(x[column], y, width, height, words, colour, 13, mono=True)

    def command(left, y, words):
        s.arrow((x[left] + width, y + height / 2), (x[left + 1], y + height / 2))
        s.text((x[left] + width + x[left + 1]) / 2, y + height / 2 - 9, words, 13, BLUE, mono=True, bold=True)

    for column, words in enumerate(("your model", "models/NAME", "distilled.jsonl", "train.jsonl")):
        file(column, top, words)
    for column, words in enumerate(("prepare_model", "distill", "curate")):
        command(column, top, words)
    s.node(400, 14, width, 34, "prompts.jsonl", GREY, 13, mono=True)
    s.arrow((467, 48), (467, 86))

    file(3, bottom, "runs/NAME\n(the head)", ORANGE)
    file(2, bottom, "model + head\nin one folder", GREEN)
    file(1, bottom, "a server,\nSGLang or vLLM", GREEN)
    file(0, bottom, "results/NAME")
    s.arrow((833, top + height), (833, bottom))
    s.text(823, 196, "train", 13, BLUE, mono=True, bold=True, anchor="end")
    for column, words in ((2, "export"), (1, "serve"), (0, "evaluate")):
        s.arrow((x[column + 1], bottom + 23), (x[column] + width, bottom + 23))
        middle = (x[column + 1] + x[column] + width) / 2
        s.text(middle, bottom + 14, words, 13, BLUE, mono=True, bold=True)

    s.node(276, 170, width, 40, "token map .pt", GREY, 13, mono=True)
    s.arrow((560, top + height), (560, 190), (410, 190))
    s.text(551, 158, "build_vocab", 13, BLUE, mono=True, bold=True, anchor="end")
    s.arrow((343, 210), (343, bottom))
    return s


def cycle() -> Sheet:
    """Three drafts, two of them right: three tokens for one pass of the model."""
    s = Sheet(820, 318, "One cycle: the head drafts three tokens, the model verifies them in one pass")
    x = [190, 290, 390, 490, 590]

    def row(y, label, second=""):
        s.text(20, y + (20 if second else 24), label, 14, bold=True, anchor="start")
        s.text(20, y + 37, second, 12, GREY, anchor="start")

    def word(column, y, words, colour, **look):
        s.node(x[column], y, 86, 36, words, colour, 14, **look)

    row(20, "text so far")
    word(0, 20, "The", GREY)
    word(1, 20, "quick", GREY)

    row(90, "head drafts", "small, K=3 times")
    for column, words in ((2, "brown"), (3, "fox"), (4, "ran")):
        word(column, 90, words, ORANGE, dashed=True)
    for column in (2, 3):
        s.arrow((x[column] + 86, 108), (x[column + 1], 108), colour=ORANGE)
    s.arrow((x[1] + 43, 56), (x[1] + 43, 108), (x[2], 108), colour=ORANGE)

    row(170, "model verifies", "all at once, one pass")
    s.box(270, 162, 416, 52, BLUE, "white")
    for column, words in ((2, "brown"), (3, "fox"), (4, "jumps")):
        word(column, 170, words, BLUE)
        s.arrow((x[column] + 43, 126), (x[column] + 43, 170), colour=GREY)
    s.text(x[2] - 14, 184, "what it would", 13, anchor="end")
    s.text(x[2] - 14, 201, "have written", 13, anchor="end")
    for column, mark, colour in ((2, "right", GREEN), (3, "right", GREEN), (4, "wrong", ORANGE)):
        s.text(x[column] + 50, 152, mark, 12, colour, bold=True, anchor="start")

    row(256, "text grows", "by three tokens")
    word(2, 256, "brown", GREEN)
    word(3, 256, "fox", GREEN)
    word(4, 256, "jumps", BLUE)
    for column in (2, 3, 4):
        s.arrow((x[column] + 43, 214), (x[column] + 43, 256), colour=GREY)
    s.text(700, 264, "two drafts kept,", 13, GREY, anchor="start")
    s.text(700, 281, "one token is the", 13, GREY, anchor="start")
    s.text(700, 298, "model's own", 13, GREY, anchor="start")
    return s


def recursion() -> Sheet:
    """Above: the same head three times. Below: the keys that its third step sees, in both modes."""
    s = Sheet(
        880, 562, "The head's three steps, and which keys the third step sees in the modes paper and exact"
    )
    s.text(20, 32, "One head, applied three times", 16, bold=True, anchor="start")
    s.node(20, 92, 118, 56, "model's last\nhidden state h", GREY, 13)
    for step, x in enumerate((190, 420, 650), start=1):
        s.node(x, 88, 110, 64, f"head\nstep {step}", ORANGE, 15, bold=True)
        token = "next token" if step == 1 else f"draft {step - 1}"
        s.node(x + 5, 184, 100, 32, token, GREY, 13, dashed=step > 1)
        s.arrow((x + 55, 184), (x + 55, 152))
        s.node(x + 130, 36, 76, 32, f"draft {step}", ORANGE, 13, dashed=True)
        s.arrow((x + 110, 100), (x + 168, 100), (x + 168, 68), colour=ORANGE)
        if step < 3:
            s.arrow((x + 110, 134), (x + 230, 134))
            s.text(x + 170, 128, "its own state", 12, GREY)
    s.arrow((138, 120), (190, 120))
    s.text(
        20,
        250,
        "The weights are the same in every step. Step k drafts the token k+1 places ahead.",
        13,
        GREY,
        anchor="start",
    )

    s.text(20, 300, "Which keys does step 3 at position p see?", 16, bold=True, anchor="start")
    for left, name, note in (
        (20, "paper", "its own step, all positions"),
        (450, "exact", "step 1 of all positions, then its own chain: what an engine holds"),
    ):
        s.text(left, 336, name, 15, mono=True, bold=True, anchor="start")
        s.text(left, 356, note, 13, GREY, anchor="start")
        for line, step in enumerate((3, 2, 1)):
            s.text(left + 52, 393 + 44 * line, f"step {step}", 13, anchor="end")
            for column in range(6):
                last = column == 5
                seen = step == 3 if name == "paper" else step == 1 or last
                x, y = left + 62 + 52 * column, 370 + 44 * line
                s.box(x, y, 44, 36, BLUE if seen else GREY, TINTS[BLUE] if seen else "white", dashed=not seen)
                if step == 3 and last:
                    s.text(x + 22, y + 23, "query", 12, INK, bold=True)
        for column in range(6):
            s.text(left + 84 + 52 * column, 520, "p" if column == 5 else f"p-{5 - column}", 13)
    s.box(20, 536, 16, 14, BLUE)
    s.text(42, 548, "key that the query sees", 12, GREY, anchor="start")
    return s


PARENTS = {"a": "", "b": "", "c": "a", "d": "a", "e": "b", "f": "c"}  # node -> its parent; "": the last token
WORDS = {"a": "brown", "b": "red", "c": "fox", "d": "dog", "e": "fox", "f": "jumps"}


def tree() -> Sheet:
    """Six drafts in a tree, and which of them each one sees while they are verified in one pass."""
    s = Sheet(860, 360, "A draft tree of six nodes and its attention mask")
    s.text(20, 32, "Drafts as a tree", 16, bold=True, anchor="start")
    s.node(20, 160, 80, 36, "quick", GREY, 14)
    place = {"": (20, 160), "a": (140, 100), "b": (140, 240), "c": (260, 60), "d": (260, 140)}
    place |= {"e": (260, 240), "f": (370, 60)}
    for name, parent in PARENTS.items():
        (x, y), (x0, y0) = place[name], place[parent]
        s.arrow((x0 + 80, y0 + 18), (x, y + 18), colour=GREY)
        s.node(x, y, 80, 36, WORDS[name], ORANGE, 14, dashed=True)
        s.text(x + 40, y - 6, name, 12, GREY, mono=True)
    s.text(20, 318, "One pass verifies all six. The longest right", 13, GREY, anchor="start")
    s.text(20, 336, "path is kept, whichever branch it is on.", 13, GREY, anchor="start")

    s.text(500, 32, "Who sees whom in that pass", 16, bold=True, anchor="start")
    for line, name in enumerate(PARENTS):
        s.text(528, 98 + 38 * line, name, 14, mono=True)
        s.box(546, 78 + 38 * line, 74, 30, BLUE)
        above = ancestors(name)
        for column, other in enumerate(PARENTS):
            seen = other in above
            s.box(
                630 + 36 * column,
                78 + 38 * line,
                30,
                30,
                BLUE if seen else GREY,
                None if seen else "white",
                not seen,
            )
    s.text(583, 68, "the text", 13)
    for column, other in enumerate(PARENTS):
        s.text(645 + 36 * column, 68, other, 14, mono=True)
    s.text(500, 336, "A draft sees the text, its ancestors and itself.", 13, GREY, anchor="start")
    return s


def ancestors(name: str) -> set[str]:
    """A node and all nodes above it, without the last token."""
    return {name} | (ancestors(PARENTS[name]) if PARENTS[name] else set())


if __name__ == "__main__":
    for draw in (pipeline, cycle, recursion, tree):
        draw().save(FOLDER / f"{draw.__name__}.svg")
