"""Pictures of rows, read back from their artists."""

import pytest
from matplotlib.colors import to_hex

from evaluation.pictures import (
    accuracy_figure,
    comparison_figures,
    cost_figure,
    leaderboard_figure,
)
from zoo.style import COLOURS


def row(method, members, mean, *, data="none", std=0.02, seconds=0.1, control=False):
    return {
        "method": method,
        "members": members,
        "data": data,
        "accuracy_mean": mean,
        "accuracy_std": std,
        "families": 4,
        "seconds": seconds,
        "control": control,
    }


ROWS = [
    row("gnn", 2, 0.80, seconds=0.3),
    row("gnn", 8, 0.90, std=0.04, seconds=0.3),
    row("gnn, adapted", 8, 0.92, data="labelled:100", seconds=2.0),
    row("gnn, adapted", 8, 0.94, data="labelled:400", seconds=3.0),
    row("gnn, adapted", 2, 0.91, data="labelled:100", seconds=2.0),
    row("gnn, adapted", 2, 0.88, data="labelled:400", seconds=3.0),
    row("average", 2, 0.60, seconds=0.01),
    row("average", 8, 0.30, seconds=0.01),
    row("soft-vote ensemble", 2, 0.70, control=True, seconds=0.0),
    row("soft-vote ensemble", 8, 0.65, control=True, seconds=0.0),
    row("cluster", 8, 0.50, seconds=0.4),  # two members have no clusters
]


def dots(board, panel):
    """Label of a row -> its dots in a panel: accuracy, colour, whether hollow."""
    names = [label.get_text() for label in board.axes[0].get_yticklabels()]
    found = {}
    for line in board.axes[panel].lines:
        if line.get_marker() == "o":
            (x,), (y,) = line.get_data()
            hollow = line.get_markerfacecolor() == "white"
            own = found.setdefault(names[round(y)], [])
            own.append((round(x / 100, 6), to_hex(line.get_color()), hollow))
    return found


@pytest.fixture(scope="module")
def board():
    return leaderboard_figure(ROWS, title="digits")


def test_the_best_with_most_members_stands_on_top(board):
    labels = [label.get_text() for label in board.axes[0].get_yticklabels()]
    assert labels == ["average", "cluster", "soft-vote ensemble", "gnn", "gnn, adapted"]


def test_mergers_are_bold_and_controls_in_italics(board):
    labels = board.axes[0].get_yticklabels()
    assert [label.get_fontweight() for label in labels] == [*["normal"] * 3, "bold", "bold"]
    assert [label.get_fontstyle() for label in labels] == [
        *("normal", "normal", "italic", "normal", "normal"),
    ]


def test_every_row_is_a_dot_in_the_panel_of_its_size(board):
    for panel, size in enumerate((2, 8)):
        assert board.axes[panel].get_title() == f"K = {size} members"
        found = sorted((name, x) for name, own in dots(board, panel).items() for x, _, _ in own)
        assert found == sorted(
            (r["method"], r["accuracy_mean"]) for r in ROWS if r["members"] == size
        )


def test_colours_say_which_images_and_hollow_dots_are_controls(board):
    found = dots(board, 1)
    none, _, labelled, _ = (colour.lower() for colour in COLOURS[:4])
    assert found["gnn"] == [(0.9, none, False)]
    assert {colour for _, colour, _ in found["gnn, adapted"]} == {labelled}
    assert found["soft-vote ensemble"] == [(0.65, none, True)]


def test_bars_are_the_deviation_and_the_interval_of_the_mean(board):
    bars = {
        round(line.get_linewidth(), 1): line.get_xdata()
        for line in board.axes[1].lines
        if line.get_marker() != "o" and list(line.get_ydata()) == [3, 3]  # the row of gnn
    }
    assert bars[0.8] == pytest.approx([86, 94])
    assert bars[2.6] == pytest.approx([90 - 1.96 * 4 / 2, 90 + 1.96 * 4 / 2])  # four families


def test_more_methods_make_a_higher_figure(board):
    higher = leaderboard_figure([*ROWS, row("ties", 8, 0.4)], title="")
    assert higher.get_size_inches()[1] > board.get_size_inches()[1]


def test_a_line_has_one_budget_that_of_most_members(board):
    axes = accuracy_figure(ROWS, title="").axes[0]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["gnn, adapted, labelled:400"] == pytest.approx([88, 94])
    assert lines["soft-vote ensemble (control)"] == pytest.approx([70, 65])
    assert lines["cluster"] == pytest.approx([50])


def test_what_all_are_compared_with_has_a_line_whatever_is_better():
    better = [row(f"better {i}", 8, 0.95 + i / 100, control=True) for i in range(4)]
    rows = [{**one, "against": "gnn"} for one in [*ROWS, *better]]
    labels = [line.get_label() for line in accuracy_figure(rows, title="").axes[0].lines]
    assert "gnn" in labels
    assert labels[:2] == ["better 3 (control)", "better 2 (control)"]


def test_lines_can_be_chosen():
    axes = accuracy_figure(ROWS, title="", methods=["average", "gnn"]).axes[0]
    assert [line.get_label() for line in axes.lines] == ["average", "gnn"]


def test_what_none_beats_in_both_is_named_and_on_the_front():
    axes = cost_figure(ROWS, title="", learned=()).axes[0]
    names = {text.get_text() for text in axes.texts} - {"30"}
    assert names == {"soft-vote ensemble", "gnn", "gnn, adapted"}
    (front,) = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert list(front.get_ydata()) == pytest.approx([65, 90, 92, 94])
    assert list(front.get_xdata()) == pytest.approx([1e-4, 0.3, 2, 3])


def test_what_is_far_below_the_named_is_told_at_the_edge():
    """The named are 29 points apart, so the edge is 29 below the lowest of them, at 36."""
    figure = cost_figure(ROWS, title="", learned=())
    axes = figure.axes[0]
    (low,) = [line for line in axes.lines if line.get_marker() == "v"]
    assert (list(low.get_xdata()), list(low.get_ydata())) == ([0.01], [pytest.approx(36)])
    assert "30" in {text.get_text() for text in axes.texts}
    told = {text.get_text() for text in figure.legends[0].get_texts()}
    assert "below the edge" in told
    near = [one for one in ROWS if one["method"] != "average"]
    assert "v" not in {line.get_marker() for line in cost_figure(near, title="").axes[0].lines}


def test_pictures_of_a_comparison_are_drawn_and_saved(tmp_path):
    made = comparison_figures(ROWS, title="digits")
    assert set(made) == {"leaderboard", "cost", "accuracy_by_members"}
    for name, figure in made.items():
        figure.savefig(tmp_path / f"{name}.png", dpi=50)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "accuracy_by_members" not in comparison_figures([ROWS[0]], title="")
