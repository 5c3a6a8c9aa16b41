"""Networks and files of different widths are merged by optimal transport."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from metamerge import merge
from metamerge.alignment import align_members
from metamerge.structure import run
from zoo import architectures
from zoo.tasks import load_task
from zoo.training import init_networks, train_networks


@pytest.mark.parametrize("cost", ["weights", "activations"])
def test_merge_takes_models_and_files_of_different_widths(elastic_mlp, tmp_path, cost):
    torch.manual_seed(0)
    small, large = elastic_mlp.build(6, 5), elastic_mlp.build(9, 8)
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    torch.save(large.state_dict(), tmp_path / "large.pt")
    files = [tmp_path / "small.safetensors", tmp_path / "large.pt"]
    given = {
        "method": "average",
        "align": "optimal_transport",
        "align_options": {"cost": cost},
        "batches": torch.randn(20, 4),
    }
    for model in (small, large):
        fused = merge([small, large], model=model, **given)
        shapes = {key: t.shape for key, t in model.state_dict().items()}
        assert {key: t.shape for key, t in fused.weights.items()} == shapes
        from_files = merge(files, model=model, **given)
        assert all(torch.equal(from_files.weights[key], t) for key, t in fused.weights.items())
    fused.save(tmp_path / "fused")
    again = merge([tmp_path / "fused", files[1]], **given)
    assert again.weights["0.weight"].shape == (9, 4)


def test_after_it_other_alignments_go_on(elastic_mlp):
    torch.manual_seed(0)
    nets = [elastic_mlp.build(6, 5), elastic_mlp.build(9, 8)]
    align = ["optimal_transport", "weight_matching"]
    found = merge(nets, method="average", align=align, batches=torch.randn(9, 4))
    assert [told["name"] for told in found.report["alignment"]] == align


def test_trained_networks_of_two_widths_merge_into_one_as_good_as_they_are(make_layout):
    task = load_task("digits")
    rows = torch.randperm(len(task.inputs), generator=torch.Generator().manual_seed(0))
    trained, layouts = [], []
    for width in (48, 64):
        net = architectures.build("mlp", (1, 8, 8), 10, widths=(width,))
        layouts.append(make_layout(net, task.inputs[:2]))
        weights = train_networks(
            layouts[-1].program,
            init_networks(lambda n=net: n, [width]),
            task.inputs,
            task.targets,
            [rows[:700] if width == 48 else rows[700:1400]],
            epochs=15,
        ).weights
        trained.append({key: t[0] for key, t in weights.items()})
    images, labels = task.inputs[rows[1400:]], task.targets[rows[1400:]]

    def accuracy(layout, weights):
        return float((run(layout.program, weights, [images]).argmax(-1) == labels).float().mean())

    alone = [accuracy(*own) for own in zip(layouts, trained, strict=True)]
    noise = (np.mean(alone) * (1 - np.mean(alone)) / len(labels)) ** 0.5
    for layout in layouts:
        moved, _ = align_members(trained, layout, "optimal_transport")
        fused = {key: (moved[0][key] + moved[1][key]) / 2 for key in moved[0]}
        assert accuracy(layout, fused) > np.mean(alone) - 2 * noise
