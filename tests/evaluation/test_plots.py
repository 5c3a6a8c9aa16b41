"""The picture of a comparison, read back from its artists."""

import pytest

from evaluation.plots import COLOURS, leaderboard_figure


def row(method, members, mean, *, std=0.01, control=False):
    return {
        "method": method,
        "members": members,
        "accuracy_mean": mean,
        "accuracy_std": std,
        "control": control,
    }


ROWS = [
    row("gnn", 2, 0.80),
    row("gnn", 8, 0.90, std=0.02),
    row("average", 2, 0.60),
    row("average", 8, 0.30),
    row("best member", 2, 0.70, control=True),
    row("best member", 8, 0.65, control=True),
    row("cluster", 8, 0.50),  # two members have no clusters
]


@pytest.fixture(scope="module")
def figure():
    return leaderboard_figure(ROWS, title="digits: accuracy on test images")


def labels(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_every_method_has_a_label_and_the_best_with_most_members_stands_on_top(figure):
    assert labels(figure) == ["average", "cluster", "best member (control)", "gnn"]


def test_the_merger_is_set_in_bold(figure):
    weights = [label.get_fontweight() for label in figure.axes[0].get_yticklabels()]
    assert weights == ["normal", "normal", "normal", "bold"]


def test_every_number_of_members_has_a_colour_and_an_entry_in_the_legend(figure):
    told = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert told == ["K = 2", "K = 8"]
    colours = [container.lines[0].get_color() for container in figure.axes[0].containers]
    assert colours == list(COLOURS[:2])


def test_every_row_is_a_dot_in_percent_with_its_deviation(figure):
    found = {}
    for members, container in zip((2, 8), figure.axes[0].containers, strict=True):
        line, _, (bars,) = container.lines
        for x, y, bar in zip(*line.get_data(), bars.get_segments(), strict=True):
            method = labels(figure)[round(y)].removesuffix(" (control)")
            found[method, members] = (x / 100, (bar[1][0] - bar[0][0]) / 200)
    assert found == {
        (r["method"], r["members"]): (
            pytest.approx(r["accuracy_mean"]),
            pytest.approx(r["accuracy_std"]),
        )
        for r in ROWS
    }


def test_the_title_is_shown(figure):
    assert figure.axes[0].get_title() == "digits: accuracy on test images"


def test_more_methods_make_a_higher_figure(figure):
    higher = leaderboard_figure([*ROWS, row("ties", 8, 0.4)], title="")
    assert higher.get_size_inches()[1] > figure.get_size_inches()[1]


def test_more_sizes_than_colours_are_drawn():
    sizes = range(1, 3 + len(COLOURS))
    figure = leaderboard_figure([row("gnn", size, 0.5) for size in sizes], title="")
    assert len(figure.axes[0].containers) == len(sizes)


def test_the_figure_is_saved_as_png(figure, tmp_path):
    figure.savefig(tmp_path / "leaderboard.png", dpi=60)
    assert (tmp_path / "leaderboard.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
