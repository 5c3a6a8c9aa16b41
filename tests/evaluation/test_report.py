"""The page of a comparison: every row, nothing from outside, hostile names stay text."""

import re
from html.parser import HTMLParser

import torch
from matplotlib.figure import Figure

from evaluation.leaderboard import ranked
from evaluation.markdown import report_markdown
from evaluation.report import picture_source, report_page
from evaluation.scored import Scored

HOSTILE = '<script>alert("1")</script>'
VOID = {"meta", "img", "br", "hr", "link", "input"}
OUTSIDE = re.compile(r"""(?:src|href|action|data|poster)\s*=\s*["'](?!data:|#)|@import|url\(""")


class Page(HTMLParser):
    """Tags that are opened and closed in order, and the cells of tables."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.rows, self.text = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data
        if {"td", "th"} & {*self.open}:
            self.rows[-1][-1] += data


def scored(method, members, mean, *, data="none", control=False, families=4, seeds=()):
    accuracies = mean + 0.01 * torch.arange(families).float()
    return Scored(method, members, data, accuracies, 0.2, 2410, control, seeds)


ROWS = [
    *(scored("gnn", k, 0.8) for k in (2, 4)),
    *(scored("gnn, calibrated", k, 0.82, data="unlabelled:100") for k in (2, 4)),
    *(scored("soft-vote ensemble", k, 0.75, control=True) for k in (2, 4)),
    scored("weight_matching > ties", 4, 0.6, data="labelled:50"),
    scored(HOSTILE, 4, 0.5),
]
GATE = {"name": "garbage_members", "value": 0.1, "limit": 0.15, "passed": True}


def meta(**changes):
    told = {
        "folder": f"runs/{HOSTILE}",
        "foreign": True,
        "gates": {"k2": [GATE], "k4": [{**GATE, "passed": False, "name": "label_permutation"}]},
        "forgotten_class_recall": {"k2": 0.1},
        "nearest_training": {"k2": None},
    }
    return {
        "task": {"name": f"digits & {HOSTILE}", "digest": "abc"},
        "images": {"segments": 900, "objective": 300, "validation": 100, "test": 449},
        "seeds": {"zoo": 0, "merger": {"gnn": 0}, "compare": [0]},
        "zoo": {"folder": "zoos/digits", "digest": "def", "options": {"task": "digits"}},
        "notes": [f"a note {HOSTILE}"],
        "mergers": {"gnn": told},
        "failed": [{"method": HOSTILE, "members": 4, "data": "none", "error": f"no {HOSTILE}"}],
        "command": f"python -m evaluation.compare --merger '{HOSTILE}'",
        "protocol": {"test": "test images score and choose nothing"},
        "versions": {"torch": "2.13.0"},
        "options": {"merger": [HOSTILE], "out": "</pre>"},
        **changes,
    }


def figure():
    drawn = Figure()
    drawn.subplots().plot([0, 1])
    return drawn


FIGURES = {"leaderboard": figure()}


def page_of(rows=ROWS, **changes):
    return report_page(ranked(rows, "gnn"), meta(**changes), FIGURES, {"leaderboard": "accuracy"})


def test_the_page_is_well_formed_and_complete():
    text = page_of()
    page = Page(text)
    assert page.open == []
    assert text.startswith("<!doctype html>")
    assert ("meta", {"charset": "utf-8"}) in page.tags
    viewport = {"name": "viewport", "content": "width=device-width, initial-scale=1"}
    assert ("meta", viewport) in page.tags
    assert "prefers-color-scheme: dark" in text


def test_nothing_comes_from_outside():
    text = page_of()
    assert not OUTSIDE.findall(text)
    assert not re.findall(r"https?://", text)
    (image,) = [attrs for tag, attrs in Page(text).tags if tag == "img"]
    assert image["src"].startswith("data:image/svg+xml;base64,")
    assert image["alt"]


def test_every_row_and_every_number_of_members_is_there():
    rows = {(cells[0], cells[1]): cells for cells in Page(page_of()).rows if len(cells) > 5}
    assert {(one.method, one.data) for one in ROWS} <= rows.keys()
    assert rows["gnn", "none"][2].split() == ["81.5", "±", "1.3"]
    ties = rows["weight_matching > ties", "labelled:50"]
    assert [cell.strip() for cell in ties[2:4]] == ["", "61.5 ± 1.3"]
    assert ties[4] == "-20.0"


def test_all_rows_of_a_table_have_as_many_cells_as_its_head():
    for seeds in ((), (0.8, 0.81)):
        rows = [*ROWS, scored("dare", 4, 0.8, seeds=seeds)]
        page = Page(page_of(rows))
        lengths = [len(cells) for cells in page.rows if len(cells) > 5]
        assert len({*lengths}) == 1


def test_hostile_names_stay_text():
    text = page_of()
    assert text.count("<script>") == 1  # the page's own
    assert HOSTILE in Page(text).text
    assert '"</pre>"' not in text


def test_what_failed_and_which_gates_failed_is_told():
    page = Page(page_of())
    assert f"no {HOSTILE}" in page.text
    assert "FAILED: k4 label_permutation" in page.text
    assert "gnn never saw this task" in page.text
    assert ["label_permutation", "k4", "0.1000", "0.1500", "FAILED"] in page.rows


def test_one_family_has_neither_spread_nor_interval():
    rows = [scored("gnn", 4, 0.8, families=1), scored("average", 4, 0.7, families=1)]
    page = Page(page_of(rows, zoo=None))
    (gnn, average) = [cells for cells in page.rows[1:] if cells[0] in ("gnn", "average")][-2:]
    assert (gnn[2].strip(), average[2].strip()) == ("80.0", "70.0")
    assert average[4] == ""


def test_the_same_figure_is_the_same_source():
    assert picture_source(figure()) == picture_source(figure())


def test_the_page_of_markdown_holds_every_row_in_one_table():
    lines = report_markdown(ranked(ROWS, "gnn"), meta(), {"cost.png": "Cost"}).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert {line.count(" | ") for line in table if "---" not in line} == {5}
    assert "| **gnn** | none | 81.5 ± 1.3 | 81.5 ± 1.3 | 0.20 |  |" in table
    assert "| *soft-vote ensemble* | none |" in "\n".join(table)
    assert "![Cost](cost.png)" in lines
    assert meta()["command"] in lines


def test_hostile_names_do_not_break_a_table_of_markdown():
    rows = [*ROWS, scored("a | b *c* <d> `e`", 4, 0.3)]
    text = report_markdown(ranked(rows, "gnn"), meta(), {})
    assert r"| a \| b \*c\* \<d> \`e\` | none |" in text
