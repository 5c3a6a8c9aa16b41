"""The picture of a comparison of mutants, read back from its artists."""

from evaluation.pictures.mutants import mutants_figure


def row(method, mean, seconds, parameters, *, control=False):
    numbers = {"accuracy_mean": mean, "accuracy_std": 0.01}
    costs = {"seconds": seconds, "parameters": parameters}
    return {"method": method, **numbers, **costs, "control": control}


ROWS = [
    row("mutant, trained on", 0.9, 10.0, 1000),
    row("soft-vote ensemble", 0.8, 0.0, 80, control=True),
    row("average, aligned", 0.5, 0.1, 10),
    row("mutant, pruned at once (random)", 0.4, 1.0, 10, control=True),
]


def test_what_a_method_costs_stands_beside_its_accuracy():
    figure = mutants_figure(ROWS, title="digits")
    labels = figure.axes[0].get_yticklabels()
    names = [label.get_text() for label in labels]
    assert names == [r["method"] for r in ROWS[::-1]]
    assert len({label.get_color() for label in labels}) == 4  # one of each kind
    found = [{}, {}, {}]
    for axes, values in zip(figure.axes, found, strict=True):
        for container in axes.containers:
            for x, y in zip(*container.lines[0].get_data(), strict=True):
                values[names[round(y)]] = x
    assert found[0]["average, aligned"] == 50
    assert found[1]["mutant, trained on"] == 10
    assert found[1]["soft-vote ensemble"] == 1e-3  # nothing cannot be seen on a log scale
    assert found[2]["soft-vote ensemble"] == 80
