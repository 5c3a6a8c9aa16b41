import pytest
import torch

from metamerge.errors import StructureError
from metamerge.structure.axes import BATCH, Axes
from metamerge.structure.operators import BINARY, CONVOLUTIONS, ELEMENTWISE, RULES
from metamerge.structure.program import Node, Ref, operator

ARGUMENTS = {
    "pow.Tensor_Scalar": (3,),
    "clamp.default": (-0.5, 0.5),
    "add.Scalar": (2.0,),
    "mul.Scalar": (2.0,),
    "dropout.default": (0.5, False),
    "softmax.int": (1,),
    "log_softmax.int": (1,),
    "to.dtype": (torch.float32,),
}


class Walk:
    """Apply rules to values of given sizes, with axes to look at."""

    def __init__(self):
        self.axes, self.values = Axes(), {}

    def value(self, name, *sizes):
        self.values[name] = [self.axes.fresh(size) for size in sizes]
        return self.values[name]

    def __call__(self, op, *args, shape=()):
        args = tuple(Ref(a) if isinstance(a, str) else a for a in args)
        return RULES[op](self.axes, Node("call", op, args), self.values, shape)

    def same(self, one, other):
        return self.axes.resolve(one) == self.axes.resolve(other)

    def fixed(self, axis):
        return all(factor in self.axes.fixed for factor in self.axes.resolve(axis))


@pytest.fixture
def walk():
    return Walk()


@pytest.mark.parametrize("op", sorted(RULES))
def test_every_rule_is_for_an_operator_that_exists_and_is_pure(op):
    assert not operator(op)._schema.is_mutable


@pytest.mark.parametrize("op", sorted(ELEMENTWISE))
def test_pointwise_operators_do_not_care_for_the_order_of_entries(op):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 6, generator=generator) + 0.1  # positive, for the roots
    perm = torch.randperm(6, generator=generator)
    call = operator(op)
    result = call(x, *ARGUMENTS.get(op, ()))
    permuted = call(x[:, perm], *ARGUMENTS.get(op, ()))
    # a softmax sums six terms in another order, vector instructions may round their tail apart
    assert torch.allclose(permuted, result[:, perm], rtol=1e-6, atol=1e-6)


def test_linear_ties_columns_to_what_is_read_and_rows_to_what_comes_out(walk):
    x, weight, bias = walk.value("x", BATCH, 7, 4), walk.value("w", 5, 4), walk.value("b", 5)
    out = walk("linear.default", "x", "w", "b")
    assert walk.same(x[2], weight[1])
    assert walk.same(bias[0], weight[0])
    assert out == [x[0], x[1], weight[0]]
    assert not walk.fixed(weight[0])


@pytest.mark.parametrize("op", sorted(CONVOLUTIONS))
def test_convolutions_tie_channels_and_fix_taps_and_positions(walk, op):
    space = int(op[4])
    x = walk.value("x", BATCH, 4, *[9] * space)
    weight, bias = walk.value("w", 5, 4, *[3] * space), walk.value("b", 5)
    out = walk(op, "x", "w", "b", shape=(None, 5, *[7] * space))
    assert walk.same(x[1], weight[1])
    assert walk.same(bias[0], weight[0])
    assert out[:2] == [x[0], weight[0]]
    assert [walk.axes.size(axis) for axis in out[2:]] == [7] * space
    assert all(walk.fixed(axis) for axis in (*x[2:], *weight[2:], *out[2:]))
    assert not walk.fixed(weight[0])
    assert not walk.fixed(weight[1])


def test_a_depthwise_convolution_ties_its_rows_to_the_channels_it_reads(walk):
    x, weight = walk.value("x", BATCH, 4, 9, 9), walk.value("w", 4, 1, 3, 3)
    out = walk("conv2d.default", "x", "w", None, (1, 1), (0, 0), (1, 1), 4, shape=(None, 4, 7, 7))
    assert walk.same(x[1], weight[0])
    assert walk.same(out[1], x[1])


@pytest.mark.parametrize(("channels", "rows", "groups"), [(4, 8, 4), (4, 4, 2), (6, 9, 3)])
def test_convolutions_in_groups_of_several_channels_are_refused(walk, channels, rows, groups):
    walk.value("x", BATCH, channels, 9, 9)
    walk.value("w", rows, channels // groups, 3, 3)
    with pytest.raises(StructureError, match=f"call: a convolution in {groups} groups"):
        walk("conv2d.default", "x", "w", None, (1, 1), (0, 0), (1, 1), groups)


def test_batch_normalisation_ties_all_it_has_to_the_channels(walk):
    x = walk.value("x", BATCH, 4, 9)
    parts = [walk.value(name, 4)[0] for name in ("w", "b", "m", "v")]
    assert walk("batch_norm.default", "x", "w", "b", "m", "v", False, 0.1, 1e-5, True) == x
    assert all(walk.same(part, x[1]) for part in parts)


def test_layer_normalisation_ties_gain_and_bias_to_the_last_axes(walk):
    x = walk.value("x", BATCH, 7, 4)
    gain, bias = walk.value("w", 7, 4), walk.value("b", 7, 4)
    assert walk("layer_norm.default", "x", [7, 4], "w", "b") == x
    assert walk.same(gain[0], x[1])
    assert walk.same(bias[1], x[2])
    assert walk("layer_norm.default", "x", [4]) == x


@pytest.mark.parametrize("op", sorted(BINARY))
def test_operators_of_two_tensors_tie_equal_axes_and_broadcast_the_rest(walk, op):
    x, y = walk.value("x", BATCH, 7, 4), walk.value("y", 1, 4)
    out = walk(op, "x", "y")
    assert walk.same(x[2], y[1])
    assert [walk.axes.size(axis) for axis in out] == [BATCH, 7, 4]
    assert walk.same(walk(op, "y", "x")[1], x[1])
    assert walk(op, "x", 2.0) == x


def test_two_tensors_of_which_one_has_no_batch_are_refused(walk):
    walk.value("x", BATCH, 4)
    walk.value("y", 8, 4)
    with pytest.raises(StructureError, match="call mixes the batch axis with another"):
        walk("add.Tensor", "x", "y")


def test_pooling_keeps_batch_and_channels_and_makes_positions(walk):
    x = walk.value("x", BATCH, 4, 9, 9)
    out = walk("max_pool2d.default", "x", (2, 2), shape=(None, 4, 4, 4))
    assert out[:2] == x[:2]
    assert all(walk.fixed(axis) for axis in (*x[2:], *out[2:]))
    assert not walk.fixed(x[1])


def test_pooling_that_changes_the_channels_is_refused(walk):
    walk.value("x", BATCH, 9)
    with pytest.raises(StructureError, match="changes the channel axis"):
        walk("pad.default", "x", (1, 1), shape=(None, 11))


def test_flattening_makes_one_axis_of_several_and_a_view_takes_it_apart_again(walk):
    x = walk.value("x", BATCH, 4, 3, 5)
    walk.values["flat"] = walk("flatten.using_ints", "x", 1, shape=(None, 60))
    assert walk.values["flat"] == [x[0], (*x[1], *x[2], *x[3])]
    assert walk("view.default", "flat", (-1, 4, 15), shape=(None, 4, 15)) == [
        x[0],
        x[1],
        (*x[2], *x[3]),
    ]


@pytest.mark.parametrize("shape", [(None, 8), (None, 2), (None,)])
def test_a_view_that_puts_positions_into_the_batch_is_refused(walk, shape):
    walk.value("x", BATCH, 4, 8)
    with pytest.raises(StructureError, match="call mixes the batch axis with another"):
        walk("reshape.default", "x", (-1, *shape[1:]), shape=shape)


def test_a_mean_drops_the_axes_it_is_over_or_leaves_one_entry(walk):
    x = walk.value("x", BATCH, 4, 3, 5)
    assert walk("mean.dim", "x", (2, -1)) == x[:2]
    assert walk("mean.dim", "x", (-1, 2), True) == [*x[:2], (), ()]


def test_a_number_where_a_tensor_is_needed_is_refused(walk):
    with pytest.raises(StructureError, match=r"relu.default \(call\): argument 0 is no tensor"):
        walk("relu.default", 3)
