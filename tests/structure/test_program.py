import json
import tracemalloc
from base64 import b64encode
from dataclasses import replace
from functools import cache
from zlib import compress

import pytest
import torch
from torch import nn

from metamerge.errors import StructureError, Unreadable
from metamerge.structure import Program, run, trace
from metamerge.structure.program import Node, Ref

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
]


@cache
def linear_program():
    return trace(nn.Sequential(nn.Linear(4, 3)), torch.zeros(2, 4))


def linear_json():
    return linear_program().to_json()


def refused(data):
    """What ``from_json`` says of data that is no program."""
    with pytest.raises(Unreadable, match="no program written by metamerge") as caught:
        Program.from_json(data)
    return str(caught.value)


def written(program):
    """The program, written as text and read back."""
    return Program.from_json(json.loads(json.dumps(program.to_json())))


def packed(raw, shape, dtype="uint8"):
    return {"dtype": dtype, "shape": shape, "zlib": b64encode(compress(raw)).decode()}


# ---------------------------------------------------------------------------- JSON


def test_every_program_survives_json(network):
    text = json.dumps(network.program.to_json())
    back = Program.from_json(json.loads(text))
    assert back == network.program
    assert hash(back) == hash(network.program)
    assert json.dumps(back.to_json()) == text


def test_a_program_that_was_read_back_computes_the_same_bits(network):
    weights, inputs = network.weights(), network.inputs(3)
    back = written(network.program)
    assert torch.equal(run(back, weights, [inputs]), run(network.program, weights, [inputs]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (2, 0, 3)], ids=str)
def test_tensors_of_every_dtype_and_shape_survive_json(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    tensor = (100 * torch.rand(shape, generator=generator)).to(dtype)
    program = replace(
        linear_program(),
        constants={"c": tensor},
        indices={"i": tensor.transpose(0, -1) if tensor.ndim else tensor},
        examples={"e": tensor},
    )
    back = written(program)
    for found, expected in (
        (back.constants["c"], program.constants["c"]),
        (back.indices["i"], program.indices["i"]),
        (back.examples["e"], program.examples["e"]),
    ):
        assert found.dtype == dtype
        assert found.shape == expected.shape
        assert torch.equal(found, expected)


def test_numbers_that_are_not_finite_survive_json():
    tensor = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    back = written(replace(linear_program(), constants={"c": tensor}))
    assert torch.equal(back.constants["c"].view(torch.int32), tensor.view(torch.int32))


def test_arguments_of_all_kinds_survive_json():
    arguments = (Ref("x"), 3, 0.5, True, None, "same", torch.float16, (1, (Ref("y"), None)))
    node = Node("made", "linear.default", arguments, {"dtype": torch.int64, "by": {"a": 1}})
    program = replace(linear_program(), nodes=(node,))
    (back,) = written(program).nodes
    assert back == node
    assert back.refs == ("x", "y")


def test_an_argument_that_json_cannot_hold_is_refused():
    node = Node("made", "linear.default", (Ref("x"), torch.device("cpu")))
    with pytest.raises(StructureError, match=r"device.*which a program cannot hold"):
        replace(linear_program(), nodes=(node,)).to_json()


# ---------------------------------------------------------------------------- digests


def test_programs_of_different_networks_have_different_digests(networks):
    digests = {network.program.digest for network in networks.values()}
    assert len(digests) == len(networks)


def test_the_digest_depends_neither_on_weights_nor_on_the_size_of_the_batch():
    def digest(seed, batch):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
        return trace(model, torch.randn(batch, 1, 4, 4)).digest

    assert digest(0, 1) == digest(1, 2) == digest(2, 7)


def test_the_digest_does_not_depend_on_the_tokens_of_the_example():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
    one, other = (
        trace(model, tokens) for tokens in (torch.zeros(2, 5).long(), torch.eye(5).long())
    )
    assert not torch.equal(next(iter(one.examples.values())), next(iter(other.examples.values())))
    assert one.digest == other.digest
    assert one == other


@pytest.mark.parametrize(
    "other",
    [
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)),  # wider
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),  # another activation
        nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3)),
        nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(0.1), nn.Linear(5, 3)),
        nn.Sequential(nn.Linear(4, 5), nn.Identity(), nn.ReLU(), nn.Linear(5, 3)),  # other names
    ],
)
def test_the_digest_depends_on_the_architecture(other):
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    example = torch.zeros(2, 4)
    assert trace(other, example).digest != trace(model, example).digest
    assert trace(other, example) != trace(model, example)


def test_the_digest_depends_on_the_values_of_constants():
    program = linear_program()
    one, other = (replace(program, constants={"c": torch.full((2,), v)}) for v in (1.0, 2.0))
    assert one.digest != other.digest


# ---------------------------------------------------------------------------- foreign programs


@pytest.mark.parametrize("data", [{}, [], None, {"nodes": 3}, {"nodes": [["a", "b"]]}, "text"])
def test_json_that_is_no_program_is_refused(data):
    refused(data)


@pytest.mark.parametrize(
    "key",
    [
        *("format", "parameters", "inputs", "nodes", "outputs", "sizes", "constants", "indices"),
        *("examples", "tied", "untraced"),
    ],
)
def test_json_without_a_part_is_refused(key):
    data = linear_json()
    del data[key]
    assert key in refused(data)


@pytest.mark.parametrize("found", ["metamerge-program-1", "metamerge-program-3", "", None])
def test_another_format_is_refused_with_the_expected_one(found):
    message = refused({**linear_json(), "format": found})
    assert repr(found) in message
    assert "metamerge-program-2" in message


@pytest.mark.parametrize(
    "op",
    [
        "relu_.default",  # changes its input
        "batch_norm_update_stats.out",  # writes into arguments
        "from_file.default",  # reads a file, or makes one
        "rand.default",  # makes a tensor, and not of its arguments
        "no_such_operator.default",
        "linear.no_such_overload",
        "linear",
        "__class__.__name__",
        "os.system",
        "python.eval",
        3,
    ],
)
def test_json_with_an_operator_that_is_not_pure_is_refused(op):
    data = linear_json()
    data["nodes"][0][1] = op
    refused(data)


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("full.default", [[2**20, 2**20], 1.0]),
        ("zeros.default", [[2**29]]),
        ("ones.default", [[2**15, 2**15]]),
        ("empty.memory_format", [[2**40]]),
        ("arange.default", [2**40]),
        ("eye.m", [2**20, 2**20]),
    ],
)
def test_json_with_an_operator_that_would_fill_the_memory_is_refused(op, args):
    data = linear_json()
    data["nodes"].append(["made", op, args, {"map": {}}])
    assert op in refused(data)


@pytest.mark.parametrize(
    ("op", "args", "kwargs"),
    [
        pytest.param("arange.start", [-(2**40), 0], {}, id="a negative start"),
        pytest.param("arange.default", [1e12], {}, id="a float"),
        pytest.param("arange.start_step", [0, 1, 1e-12], {}, id="a small step"),
        pytest.param("zeros.default", [], {"size": [2**40]}, id="by name"),
        pytest.param("eye.default", [2**20], {}, id="a square"),
    ],
)
def test_factories_are_bounded_however_they_are_called(op, args, kwargs):
    data = linear_json()
    data["nodes"].append(["made", op, args, {"map": kwargs}])
    refused(data)


def test_factories_of_a_sane_size_are_read():
    data = linear_json()
    data["nodes"].append(["made", "full.default", [[2, 3], 1.0], {"map": {}}])
    assert Program.from_json(data).nodes[-1].op == "full.default"


@pytest.mark.parametrize("part", ["constants", "indices", "examples"])
@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(packed(bytes(3), [4]), id="too short"),
        pytest.param(packed(bytes(5), [4]), id="too long"),
        pytest.param(packed(bytes(4), [4], "float32"), id="of another dtype"),
        pytest.param(packed(b"", [-1]), id="negative"),
        pytest.param(packed(bytes(4), [-2, -2]), id="negative twice"),
        pytest.param(packed(bytes(4), [2**40]), id="enormous"),
        pytest.param(packed(bytes(4), [4], "complex64"), id="of an unknown dtype"),
        pytest.param(packed(bytes(4), 4), id="without a shape"),
        pytest.param({"dtype": "uint8", "shape": [4], "zlib": "&"}, id="no base64"),
        pytest.param({"dtype": "uint8", "shape": [4]}, id="without values"),
    ],
)
def test_tensors_that_contradict_themselves_are_refused(part, tensor):
    refused({**linear_json(), part: {"c": tensor}})


def test_bytes_that_are_not_compressed_are_refused():
    tensor = {"dtype": "uint8", "shape": [4], "zlib": b64encode(b"garbage").decode()}
    refused({**linear_json(), "constants": {"c": tensor}})


def test_a_tensor_that_unpacks_to_more_than_it_says_is_not_unpacked():
    bomb = {**linear_json(), "constants": {"c": packed(bytes(10**8), [4])}}
    tracemalloc.start()
    refused(bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**6  # the 100 kB that were packed, and their text


# ---------------------------------------------------------------------------- weights and rows


def test_weights_that_fit_pass_the_check(network):
    network.program.check_weights("member", network.weights())


def test_missing_weights_are_named():
    with pytest.raises(StructureError) as caught:
        linear_program().check_weights("b.pt", {"0.weight": torch.zeros(3, 4)})
    assert str(caught.value).startswith("b.pt: tensor '0.bias' is missing; the network reads")
    assert "['0.bias', '0.weight']" in str(caught.value)


def test_weights_of_another_shape_are_named_with_both_shapes():
    weights = {"0.weight": torch.zeros(3, 5), "0.bias": torch.zeros(3)}
    with pytest.raises(StructureError) as caught:
        linear_program().check_weights("b.pt", weights)
    assert "b.pt: '0.weight' has shape (3, 5), the network has (3, 4)" in str(caught.value)


def test_rows_of_every_network_of_the_table_may_be_used(network):
    network.program.check_rows()
    assert network.program.input_shape() == (None, *network.shape)


@pytest.mark.parametrize("sizes", [(2, 3), (), (3, -2)])
def test_outputs_without_a_row_per_input_are_refused_where_data_are_used(sizes):
    program = linear_program()
    fixed = replace(program, sizes={**program.sizes, program.output: sizes})
    with pytest.raises(StructureError, match="one row per row of inputs") as caught:
        fixed.check_rows()
    assert str(fixed.shapes[program.output]) in str(caught.value)


def test_an_axis_that_grows_with_the_batch_is_negative_in_sizes_and_none_in_shapes():
    program = linear_program()
    (name,) = program.inputs
    assert program.sizes[name] == (-2, 4)
    assert program.shapes[name] == (None, 4)
    assert program.shape(name) == (2, 4)


# ---------------------------------------------------------------------------- nodes


def test_nodes_list_every_value_that_they_read_in_order():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x):
            return torch.cat([self.a(x), x], 1)

    program = trace(Beside(), torch.zeros(2, 4))
    first, last = program.nodes
    assert first.refs[0] == program.inputs[0]
    assert [program.parameters[ref] for ref in first.refs[1:]] == ["a.weight", "a.bias"]
    assert last.refs == (first.name, program.inputs[0])
    assert (last.argument(1), last.argument(2, "absent")) == (1, "absent")
    assert first.argument(0) == Ref(program.inputs[0])
    assert program.last_use[program.inputs[0]] == last.name
    assert program.output not in program.last_use


def test_arguments_go_by_the_names_of_the_schema_with_defaults_filled_in():
    node = Node("made", "avg_pool2d.default", (Ref("x"), (2, 2)), {"ceil_mode": True})
    assert node.arguments == {
        "self": Ref("x"),
        "kernel_size": (2, 2),
        "stride": [],
        "padding": [0, 0],
        "ceil_mode": True,
        "count_include_pad": True,
        "divisor_override": None,
    }
    assert Node("size", "python.mul", (Ref("s"), 2)).arguments == {"0": Ref("s"), "1": 2}


def test_a_program_in_float64_neither_casts_nor_multiplies_in_less():
    nodes = (
        Node("low", "to.dtype", (Ref("x"), torch.float16)),
        Node("made", "full.default", ((2,), 1.0), {"dtype": torch.bfloat16}),
        Node("kept", "to.dtype", (Ref("x"), torch.int32)),
    )
    constants = {"c": torch.ones(2), "i": torch.ones(2, dtype=torch.int32)}
    exact = replace(linear_program(), nodes=nodes, constants=constants).in_float64()
    assert exact.nodes[0].args == (Ref("x"), torch.float64)
    assert exact.nodes[1].kwargs == {"dtype": torch.float64}
    assert exact.nodes[2].args == (Ref("x"), torch.int32)
    assert {name: t.dtype for name, t in exact.constants.items()} == {
        "c": torch.float64,
        "i": torch.int32,
    }
