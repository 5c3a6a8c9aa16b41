"""Messages along weights: the dense and the sparse path, and a loop over edges beside them."""

import pytest
import torch

from metamerge.mergers.messages import Edge, LinearMessage, MessageRound

WIDTH, FAMILIES, MEMBERS = 6, 2, 3
SIZES = {"inputs": 5, "hidden": 4, "outputs": 2}
# Two layers between the same spaces, one that skips, one from a space to itself, one that reads
# two spaces of which all members share the first, and one that writes two.
LAYERS = [
    (("inputs",), ("hidden",)),
    (("inputs",), ("hidden",)),
    (("inputs",), ("outputs",)),
    (("hidden",), ("hidden",)),
    (("inputs", "hidden"), ("outputs",)),
    (("hidden",), ("outputs", "hidden")),
]


def make_graph(dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        drawn = torch.randn(FAMILIES, MEMBERS, *shape, generator=generator, dtype=dtype)
        return drawn.to(device)

    states = {space: draw(n, WIDTH) for space, n in SIZES.items()}
    states["inputs"] = states["inputs"][:, :1]  # all members read the same inputs
    edges = []
    for number, (come, to) in enumerate(LAYERS, 1):
        weights = draw(sum(SIZES[s] for s in to), sum(SIZES[s] for s in come))
        size = torch.full((FAMILIES, 1, 1, 1), 1 + number / 10, dtype=dtype, device=device)
        edges.append(Edge(come, to, weights, size))
    return states, edges


def make_round(dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MessageRound(WIDTH).to(dtype).requires_grad_(False)


def assert_equal(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for space, state in expected.items():
        assert torch.allclose(found[space], state, atol=tolerance, rtol=0), space


def test_a_message_of_two_edges():
    message = LinearMessage(1)
    with torch.no_grad():
        message.lin.weight.fill_(2.0)
    states, weights = torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0, -0.5]])
    dense = message.dense(states[None, None], weights[None, None])
    assert dense.flatten().tolist() == [2.0]  # 2 * 3 * 1 - 2 * 4 * 0.5
    # The same edges from nodes 0 and 1 to node 2.
    index, nodes = torch.tensor([[0, 1], [2, 2]]), torch.cat([states, torch.zeros(1, 1)])
    assert message(nodes, index, weights[0]).flatten().tolist() == [0.0, 0.0, 2.0]


def test_the_sparse_path_equals_the_dense_path():
    states, edges = make_graph()
    update = make_round()
    # Sums of at most 18 products of size 1: rounding of a few 1e-7.
    assert_equal(update(states, edges, sparse=True), update(states, edges), 1e-5)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_round_equals_a_loop_over_edges(sparse):
    states, edges = make_graph(torch.float64)
    update = make_round(torch.float64)
    own = {space: state.expand(-1, MEMBERS, -1, -1) for space, state in states.items()}
    along, back = (
        {space: torch.zeros_like(state) for space, state in own.items()} for _ in range(2)
    )
    for come, to, weights, size in edges:
        rows = [(space, i) for space in to for i in range(SIZES[space])]
        columns = [(space, j) for space in come for j in range(SIZES[space])]
        for r, (target, i) in enumerate(rows):
            for c, (source, j) in enumerate(columns):
                w = weights[:, :, r, c, None] / size[..., 0]
                sent, answered = own[source][:, :, j], own[target][:, :, i]
                along[target][:, :, i] += w / len(columns) ** 0.5 * update.along.lin(sent)
                back[source][:, :, j] += w / len(rows) ** 0.5 * update.back.lin(answered)
    expected = {}
    for space, state in states.items():
        received = [part[space] for part in (along, back)]
        if space == "inputs":  # one state for all members: they hear the mean of what is said
            received = [part.mean(1, keepdim=True) for part in received]
        pooled = [state.mean(1, keepdim=True), state.max(1, keepdim=True).values]
        pooled = [part.expand_as(state) for part in pooled]
        expected[space] = state + update.update(torch.cat([state, *received, *pooled], -1))
    assert_equal(update(states, edges, sparse=sparse), expected, 1e-12)


@pytest.mark.parametrize("sparse", [False, True])
def test_messages_stay_within_their_network(sparse):
    states, edges = make_graph()
    update = make_round()
    with torch.no_grad():
        update.update[0].weight[:, 3 * WIDTH :] = 0  # no pooling over members
    before = update(states, edges, sparse=sparse)
    changed = [edge._replace(matrix=edge.matrix.clone()) for edge in edges]
    for edge in changed:
        edge.matrix[0, 1] += 1
    after = update(states, changed, sparse=sparse)
    for space in ("hidden", "outputs"):
        moved = (after[space] - before[space]).abs().amax((2, 3)) > 1e-3
        assert moved.tolist() == [[False, True, False], [False, False, False]]
    moved = (after["inputs"] - before["inputs"]).abs().amax((2, 3)) > 1e-3
    assert moved.tolist() == [[True], [False]]


@pytest.mark.parametrize("sparse", [False, True])
def test_without_edges_nothing_is_received(sparse):
    states, _ = make_graph()
    update = make_round()
    found = update(states, [], sparse=sparse)
    with torch.no_grad():
        for message in (update.along, update.back):
            message.lin.weight.zero_()
    assert_equal(found, update(states, make_graph()[1]), 0)


def test_members_hear_of_each_other_and_families_do_not():
    states, edges = make_graph()
    update = make_round()
    before = update(states, edges)
    changed = {space: state.clone() for space, state in states.items()}
    for space in ("hidden", "outputs"):
        changed[space][0, 1] += 1
    after = update(changed, edges)
    for space, state in states.items():
        moved = (after[space] - before[space]).abs().amax((2, 3)) > 1e-3
        assert moved.tolist() == [[True] * state.shape[1], [False] * state.shape[1]]


def test_messages_are_linear_in_the_weight():
    states, edges = make_graph(torch.float64)
    (come,), _, weights, _ = edges[0]
    message = make_round(torch.float64).along
    single, double = (message.dense(states[come], factor * weights) for factor in (1, 2))
    assert torch.allclose(double, 2 * single, atol=1e-12)


def test_the_mean_message_does_not_grow_with_the_fan_in():
    generator = torch.Generator().manual_seed(0)
    update = make_round()
    sizes = {}
    for columns in (16, 1024):
        states = {
            "inputs": torch.randn(1, 1, columns, WIDTH, generator=generator),
            "outputs": torch.zeros(1, 1, 200, WIDTH),
        }
        weights = torch.randn(1, 1, 200, columns, generator=generator)
        edge = Edge(("inputs",), ("outputs",), weights, torch.ones(1, 1, 1, 1))
        received = update._dense(states, [edge])["outputs"][0]
        sizes[columns] = float(received.std())
    assert sizes[1024] == pytest.approx(sizes[16], rel=0.3)


def test_the_sparse_path_stays_on_the_device_of_the_weights():
    states, edges = make_graph(device="meta")  # a device that computes nothing but shapes
    update, seen = make_round().to("meta"), []
    for message in (update.along, update.back):
        message.register_forward_pre_hook(lambda _, given: seen.extend(given))
    found = update(states, edges, sparse=True)
    assert [tensor.device.type for tensor in seen] == ["meta"] * 6
    assert {space: state.device.type for space, state in found.items()} == dict.fromkeys(
        SIZES, "meta"
    )
