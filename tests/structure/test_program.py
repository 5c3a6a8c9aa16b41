import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metamerge.errors import StructureError, Unreadable
from metamerge.structure import Program, run, trace
from metamerge.structure.program import Ref


def module_of(forward, **parts):
    """A module with the given parts and forward function."""

    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

        def forward(self, x):
            return forward(self, x)

    return Written().eval()


def linear_pair(forward, **parts):
    torch.manual_seed(0)
    return module_of(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 3), **parts)


def ops(program):
    return [node.op for node in program.nodes]


def check_same_function(model, shape=(4,)):
    """The program of a model computes what the model does; returns the program."""
    program = trace(model, torch.zeros(2, *shape))
    inputs = torch.randn(5, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(inputs.clone())
        found = run(program, model.state_dict(), [inputs])
    assert torch.allclose(found, expected, atol=1e-5)  # float32, a handful of terms
    return program


def test_every_program_computes_what_its_module_does(network):
    weights, inputs = network.weights(), network.inputs(5)
    found = run(network.program, weights, [inputs])
    expected = network.outputs(weights, inputs)
    assert float((found - expected).abs().max()) < 1e-12 * (1 + float(expected.abs().max()))


def test_every_program_survives_json(network):
    text = json.dumps(network.program.to_json())
    back = Program.from_json(json.loads(text))
    assert back == network.program
    assert back.digest == network.program.digest
    assert json.dumps(back.to_json()) == text


def test_programs_of_different_networks_have_different_digests(networks):
    digests = {network.program.digest for network in networks.values()}
    assert len(digests) == len(networks)


def test_the_digest_depends_neither_on_weights_nor_on_the_size_of_the_batch():
    def digest(seed, batch):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
        return trace(model, torch.zeros(batch, 1, 4, 4)).digest

    assert digest(0, 1) == digest(1, 2) == digest(2, 7)


def test_every_submodule_keeps_the_mode_it_was_in():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3))
    model.train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    program = trace(model, torch.randn(8, 4))
    assert [module.training for module in model.modules()] == before
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert "dropout.default" not in ops(program)  # traced in eval mode


def test_modes_come_back_when_tracing_fails():
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout()).train()
    with pytest.raises(StructureError):
        trace(model, torch.zeros(2, 5))
    assert all(module.training for module in model.modules())


def test_the_batch_axis_is_free_even_if_the_example_has_one_row():
    program = trace(nn.Sequential(nn.Flatten(), nn.Linear(8, 3)), torch.zeros(1, 2, 4))
    assert program.input_shape() == (None, 2, 4)
    assert program.shapes[program.output] == (None, 3)
    weights = {"1.weight": torch.ones(3, 8), "1.bias": torch.zeros(3)}
    assert run(program, weights, [torch.ones(5, 2, 4)]).tolist() == [[8.0] * 3] * 5


def test_an_example_of_the_wrong_shape_is_refused_with_its_shape():
    with pytest.raises(StructureError, match=r"inputs of shape \[\(2, 5\)\].*shape of the example"):
        trace(nn.Sequential(nn.Linear(4, 3)), torch.zeros(2, 5))


def test_two_outputs_are_refused():
    with pytest.raises(StructureError, match="returns 2 tensors"):
        trace(module_of(lambda self, x: (x, x + 1)), torch.zeros(2, 4))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.a(x) * 2 if x.shape[0] == 2 else self.a(x),
        lambda self, x: self.a(x).view(2, 6),
        lambda self, x: self.a(x)[0],
        lambda self, x: self.a.weight,
    ],
)
def test_outputs_that_do_not_follow_the_batch_are_refused(forward):
    with pytest.raises(StructureError, match="one row of outputs per row of inputs"):
        trace(linear_pair(forward), torch.zeros(2, 4))


def test_control_flow_on_values_is_refused():
    model = linear_pair(lambda self, x: self.a(x) if x.sum() > 0 else self.a(-x))
    with pytest.raises(StructureError, match="control flow that depends on values"):
        trace(model, torch.zeros(2, 4))


def test_two_inputs_are_read_in_call_order():
    class Difference(nn.Module):
        def forward(self, x, y):
            return x - y

    program = trace(Difference(), [torch.zeros(2, 3), torch.zeros(2, 3)])
    assert run(program, {}, [torch.ones(4, 3), torch.zeros(4, 3)]).tolist() == [[1.0] * 3] * 4


def test_operators_in_place_become_pure_and_leave_inputs_alone():
    def forward(self, x):
        x.relu_()
        h = self.a(x)
        h += 1
        skip = F.hardtanh_(h)
        h.mul_(2)
        return self.b(h) + self.b(skip)

    program = check_same_function(linear_pair(forward))
    assert not any(op.split(".")[0].endswith("_") for op in ops(program))
    inputs = -torch.ones(2, 4)
    weights = {key: t.requires_grad_() for key, t in linear_pair(forward).state_dict().items()}
    run(program, weights, [inputs]).sum().backward()  # an input changed in place would raise
    assert torch.equal(inputs, -torch.ones(2, 4))


def test_the_output_may_itself_be_changed_in_place():
    program = check_same_function(module_of(lambda self, x: self.a(x).relu_(), a=nn.Linear(4, 3)))
    assert ops(program) == ["linear.default", "relu.default"]
    assert program.output == program.nodes[-1].name


def test_what_dropout_passes_on_is_the_same_tensor_in_eval_mode():
    # In eval mode dropout returns its argument, so that what follows in place changes both.
    def forward(self, x):
        h = self.a(x)
        dropped = self.drop(h)
        dropped += 1
        dropped *= 2
        return self.b(h) + self.b(dropped)

    program = check_same_function(linear_pair(forward, drop=nn.Dropout()))
    assert ops(program)[:4] == ["linear.default", "add.Tensor", "mul.Tensor", "linear.default"]


def test_a_network_may_end_in_dropout():
    program = check_same_function(nn.Sequential(nn.Linear(4, 3), nn.Dropout()).eval())
    assert program.output == program.nodes[-1].name


def test_a_change_in_place_that_is_read_through_a_view_is_refused():
    def forward(self, x):
        h = F.relu(self.a(x))
        view = h.view(-1, 2, 3)
        view += 1
        return self.b(h)

    with pytest.raises(StructureError, match=r"changes relu as well, which shares its memory"):
        trace(linear_pair(forward), torch.zeros(2, 4))


def test_a_view_that_is_not_read_after_the_change_is_no_obstacle():
    def forward(self, x):
        h = self.a(x)
        before = h.view(-1, 2, 3).mean(2)
        h = h.relu_().flatten(1).relu_()
        return self.b(h) + before.mean(1, keepdim=True)

    check_same_function(linear_pair(forward))


def test_casts_to_the_dtype_at_hand_and_memory_formats_vanish():
    def forward(self, x):
        x = self.conv(x.float()).to(torch.float32)
        return x.contiguous(memory_format=torch.channels_last).flatten(1)

    program = check_same_function(module_of(forward, conv=nn.Conv2d(2, 3, 2)), (2, 4, 4))
    assert ops(program) == ["conv2d.default", "contiguous.default", "flatten.using_ints"]
    assert all(node.kwargs == {} for node in program.nodes)
    json.dumps(program.to_json())


def test_an_operator_that_is_not_of_torch_is_refused():
    model = linear_pair(lambda self, x: torch.chunk(self.a(x), 2, 1)[0])
    with pytest.raises(StructureError, match="getitem"):
        trace(model, torch.zeros(2, 4))


def test_names_that_share_a_tensor_are_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    program = check_same_function(Tied())
    ((alias, key),) = program.tied.items()
    assert {alias, key} == {"a.weight", "b.weight"}
    assert key in program.parameters.values()
    assert alias not in program.parameters.values()
    assert program.untraced == ()


def test_what_no_operator_reads_is_listed_as_untraced():
    model = linear_pair(
        lambda self, x: self.norm(self.a(x)), norm=nn.BatchNorm1d(6), unused=nn.Linear(2, 2)
    )
    program = trace(model, torch.zeros(2, 4))
    assert set(program.untraced) == {
        "norm.num_batches_tracked",
        "unused.weight",
        "unused.bias",
        "b.weight",
        "b.bias",
    }
    keys = {*program.parameters.values(), *program.untraced, *program.tied}
    assert keys == set(model.state_dict())


def test_a_buffer_that_is_not_saved_is_refused():
    model = linear_pair(lambda self, x: self.a(x) * self.factor)
    model.register_buffer("factor", torch.ones(6), persistent=False)
    with pytest.raises(StructureError, match=r"computes with \['factor'\].*persistent buffers"):
        trace(model, torch.zeros(2, 4))


def test_a_tensor_that_is_no_buffer_is_refused():
    model = linear_pair(lambda self, x: self.a(x) * self.factor, factor=torch.ones(6))
    with pytest.raises(StructureError, match=r"computes with \['factor'\].*persistent buffers"):
        trace(model, torch.zeros(2, 4))


def test_weights_that_fit_pass_the_check(network):
    network.program.check_weights("member", network.weights())


def test_missing_weights_are_named():
    program = trace(nn.Sequential(nn.Linear(4, 3)), torch.zeros(2, 4))
    with pytest.raises(StructureError) as caught:
        program.check_weights("b.pt", {"0.weight": torch.zeros(3, 4)})
    assert str(caught.value).startswith("b.pt: tensor '0.bias' is missing; the network reads")
    assert "['0.bias', '0.weight']" in str(caught.value)


def test_weights_of_another_shape_are_named_with_both_shapes():
    program = trace(nn.Sequential(nn.Linear(4, 3)), torch.zeros(2, 4))
    with pytest.raises(StructureError) as caught:
        program.check_weights("b.pt", {"0.weight": torch.zeros(3, 5), "0.bias": torch.zeros(3)})
    assert "b.pt: '0.weight' has shape (3, 5), the network has (3, 4)" in str(caught.value)


def linear_json():
    return trace(nn.Sequential(nn.Linear(4, 3)), torch.zeros(2, 4)).to_json()


@pytest.mark.parametrize(
    "op",
    [
        "relu_.default",  # changes its input
        "batch_norm_update_stats.out",  # writes into arguments
        "from_file.default",  # reads a file, or makes one
        "empty.memory_format",  # makes a tensor of any size
        "no_such_operator.default",
        "linear.no_such_overload",
        "linear",
        "__class__.__name__",
        "os.system",
    ],
)
def test_json_with_an_operator_that_is_not_pure_is_refused(op):
    data = linear_json()
    data["nodes"][0][1] = op
    with pytest.raises(Unreadable, match="no program written by metamerge"):
        Program.from_json(data)


@pytest.mark.parametrize("data", [{}, [], None, {"nodes": 3}, {"nodes": [["a", "b"]]}, "text"])
def test_json_that_is_no_program_is_refused(data):
    with pytest.raises(Unreadable, match="no program written by metamerge"):
        Program.from_json(data)


@pytest.mark.parametrize("key", ["parameters", "inputs", "nodes", "output", "shapes", "tied"])
def test_json_without_a_part_is_refused(key):
    data = linear_json()
    del data[key]
    with pytest.raises(Unreadable, match=key):
        Program.from_json(data)


def test_nodes_list_every_value_that_they_read_in_order():
    model = module_of(lambda self, x: torch.cat([self.a(x), x], 1), a=nn.Linear(4, 3))
    program = trace(model, torch.zeros(2, 4))
    first, last = program.nodes
    assert first.refs[0] == program.inputs[0]
    assert [program.parameters[ref] for ref in first.refs[1:]] == ["a.weight", "a.bias"]
    assert last.refs == (first.name, program.inputs[0])
    assert (last.argument(1), last.argument(2, "absent")) == (1, "absent")
    assert first.argument(0) == Ref(program.inputs[0])
    assert program.last_use[program.inputs[0]] == last.name
    assert program.output not in program.last_use
