import json
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import exported_program

from evaluation.benchmarks.architectures import OWN
from metamerge.errors import StructureError, Unreadable
from metamerge.structure import Program, discover, run, trace


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


def assert_close(found, expected):
    """Equal in float32: up to a hundred operators, each rounded to 1e-7 of what it puts out."""
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


def check_same_function(model, shape=(4,)):
    """The program of a model computes what the model does; returns the program."""
    program = trace(model, torch.zeros(2, *shape))
    inputs = torch.randn(5, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(inputs.clone())
        assert_close(run(program, model.state_dict(), [inputs]), expected)
    return program


# ---------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("name", ["mlp", "mixer", "gat"])
def test_tests_trace_what_torch_export_finds_without_their_memory(
    name, export_without_memory, monkeypatch
):
    remembered = trace(*OWN[name]()).digest
    for own, function in export_without_memory.items():
        monkeypatch.setattr(exported_program, own, function)
    assert trace(*OWN[name]()).digest == remembered


def test_every_program_computes_what_its_module_does(network):
    weights, inputs = network.weights(), network.inputs(5)
    found = run(network.program, weights, [inputs])
    expected = network.outputs(weights, inputs)
    assert float((found - expected).abs().max()) < 1e-12 * (1 + float(expected.abs().max()))


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


@pytest.mark.parametrize(
    "change",
    [
        lambda view: view.add_(1),
        lambda view: view[:, 0].zero_(),
        lambda view: view.select(2, 1).copy_(view[:, :, 0]),
        lambda view: view.transpose(1, 2)[:, 1:].mul_(3),
        lambda view: view.masked_fill_(view > 0, -1.0),
    ],
)
def test_a_change_in_place_is_seen_through_every_view_of_the_tensor(change):
    def forward(self, x):
        h = F.relu(self.a(x))
        change(h.view(-1, 2, 3))
        return self.b(h)

    check_same_function(linear_pair(forward))


def test_a_view_that_is_read_before_the_change_keeps_its_values():
    def forward(self, x):
        h = self.a(x)
        before = h.view(-1, 2, 3).mean(2)
        h = h.relu_().flatten(1).relu_()
        return self.b(h) + before.mean(1, keepdim=True)

    check_same_function(linear_pair(forward))


def test_entries_may_be_assigned():
    def forward(self, x):
        h = torch.zeros(x.shape[0], 6)
        h[:, :4] = x
        h[:, [4, 5]] = x[:, :2]
        return self.b(h)

    check_same_function(module_of(forward, b=nn.Linear(6, 3)))


def test_a_change_in_place_of_what_dropout_passes_on_is_refused():
    # In eval mode dropout returns its argument, so that what follows in place changes both, while
    # torch.export makes a copy.
    def forward(self, x):
        h = self.a(x)
        dropped = self.drop(h)
        dropped += 1
        dropped *= 2
        return self.b(h) + self.b(dropped)

    with pytest.raises(StructureError, match=r"add_.*changes what dropout gives back"):
        trace(linear_pair(forward, drop=nn.Dropout()), torch.zeros(2, 4))


def test_a_network_may_end_in_dropout():
    program = check_same_function(nn.Sequential(nn.Linear(4, 3), nn.Dropout()).eval())
    assert ops(program) == ["linear.default"]
    assert program.output == program.nodes[-1].name


def test_a_network_may_return_what_it_was_given():
    program = check_same_function(nn.Identity())
    assert program.nodes == ()
    assert program.outputs == program.inputs


def test_casts_to_the_dtype_at_hand_and_memory_formats_vanish():
    def forward(self, x):
        x = self.conv(x.float()).to(torch.float32)
        return x.contiguous(memory_format=torch.channels_last).flatten(1)

    program = check_same_function(module_of(forward, conv=nn.Conv2d(2, 3, 2)), (2, 4, 4))
    assert [op for op in ops(program) if op != "sym_size.int"] == [
        "conv2d.default",
        "reshape.default",
    ]
    assert all(node.kwargs == {} for node in program.nodes)
    json.dumps(program.to_json())


def test_a_cast_that_changes_something_stays():
    program = check_same_function(linear_pair(lambda self, x: self.a(x).half().float()))
    assert ops(program) == ["linear.default", "to.dtype", "to.dtype"]


def test_several_pieces_of_one_tensor_are_taken_one_by_one():
    program = check_same_function(linear_pair(lambda self, x: self.a(x).chunk(2, 1)[1]))
    assert ops(program)[-1] == "python.getitem"


# ---------------------------------------------------------------------------- weights


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


def test_a_buffer_that_is_not_saved_becomes_a_constant():
    model = linear_pair(lambda self, x: self.a(x) * self.factor)
    model.register_buffer("factor", torch.arange(6.0), persistent=False)
    program = check_same_function(model)
    ((name, constant),) = program.constants.items()
    assert torch.equal(constant, torch.arange(6.0))
    assert name not in program.parameters
    model.factor.zero_()
    assert torch.equal(constant, torch.arange(6.0))  # a copy, not the module's own


def test_a_tensor_that_is_no_buffer_becomes_a_constant():
    model = linear_pair(lambda self, x: self.a(x) * self.factor, factor=torch.arange(6.0))
    program = check_same_function(model)
    assert [t.tolist() for t in program.constants.values()] == [[0, 1, 2, 3, 4, 5]]


def test_a_list_in_the_code_becomes_a_constant():
    program = check_same_function(linear_pair(lambda self, x: self.a(x)[:, [4, 0, 4]]))
    assert [t.tolist() for t in program.constants.values()] == [[4, 0, 4]]


def test_a_buffer_of_integers_keeps_its_values_and_stays_a_weight():
    model = linear_pair(lambda self, x: self.a(x)[:, self.order])
    model.register_buffer("order", torch.tensor([3, 1, 0]))
    program = check_same_function(model)
    assert "order" in program.parameters.values()
    assert {key: t.tolist() for key, t in program.indices.items()} == {"order": [3, 1, 0]}


# ---------------------------------------------------------------------------- inputs and outputs


class Difference(nn.Module):
    """Named inputs, whose order matters."""

    def forward(self, left, right):
        return left - right


def test_several_inputs_are_read_in_call_order():
    program = trace(Difference(), [torch.zeros(2, 3), torch.zeros(2, 3)])
    assert run(program, {}, [torch.ones(4, 3), torch.zeros(4, 3)]).tolist() == [[1.0] * 3] * 4


def test_inputs_may_be_named():
    example = {"right": torch.zeros(2, 3), "left": torch.zeros(2, 3)}
    program = trace(Difference(), example)
    given = {"left": torch.ones(4, 3), "right": torch.zeros(4, 3)}
    ordered = [given[name] for name in program.inputs]
    assert run(program, {}, ordered).tolist() == [[1.0] * 3] * 4


def test_named_inputs_and_inputs_in_order_make_the_same_program():
    zeros = torch.zeros(2, 3)
    one, other = (
        trace(Difference(), {"left": zeros, "right": zeros}),
        trace(Difference(), (zeros,) * 2),
    )
    assert one == other


def test_tokens_are_kept_as_examples_and_noise_is_not():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, x, tokens):
            return x + self.table(tokens).sum(1)

    tokens = torch.tensor([[1, 8, 3], [0, 2, 7], [4, 4, 4]])
    program = trace(Both(), [torch.randn(3, 4), tokens])
    assert list(program.examples) == [program.inputs[1]]
    assert torch.equal(program.examples[program.inputs[1]], tokens[:2])  # rows of the trace


def test_an_input_that_nothing_reads_is_still_an_input():
    class Half(nn.Module):
        def forward(self, left, right):
            return left * 2

    program = trace(Half(), [torch.zeros(2, 3), torch.zeros(2, 5)])
    assert len(program.inputs) == 2
    assert run(program, {}, [torch.ones(4, 3), torch.ones(4, 5)]).tolist() == [[2.0] * 3] * 4


@dataclass
class Outputs:
    logits: torch.Tensor
    hidden: torch.Tensor


torch.export.register_dataclass(Outputs)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits, hidden: (logits, hidden),
        lambda logits, hidden: [logits, {"hidden": (hidden, None)}],
        lambda logits, hidden: {"logits": logits, "hidden": hidden},
        Outputs,
    ],
    ids=["tuple", "nested", "dict", "dataclass"],
)
def test_all_tensors_that_come_out_are_outputs_and_the_first_is_judged(wrap):
    def forward(self, x):
        hidden = torch.relu(self.a(x))
        return wrap(self.b(hidden), hidden)

    model = linear_pair(forward)
    program = trace(model, torch.zeros(2, 4))
    assert [program.shapes[name] for name in program.outputs] == [(None, 3), (None, 6)]
    assert program.output == program.outputs[0]
    x = torch.ones(5, 4)
    with torch.no_grad():
        assert_close(run(program, model.state_dict(), [x]), model.b(torch.relu(model.a(x))))


def test_an_output_that_is_returned_twice_is_one():
    program = trace(linear_pair(lambda self, x: (self.a(x),) * 2), torch.zeros(2, 4))
    assert len(program.outputs) == 1


def test_a_network_without_outputs_is_refused():
    with pytest.raises(StructureError, match="Written returns no tensor"):
        trace(module_of(lambda self, x: x.shape[1]), torch.zeros(2, 4))


# ---------------------------------------------------------------------------- the batch


def test_the_batch_axis_is_free_even_if_the_example_has_one_row():
    program = trace(nn.Sequential(nn.Flatten(), nn.Linear(8, 3)), torch.zeros(1, 2, 4))
    assert program.input_shape() == (None, 2, 4)
    assert program.shapes[program.output] == (None, 3)
    weights = {"1.weight": torch.ones(3, 8), "1.bias": torch.zeros(3)}
    assert run(program, weights, [torch.ones(5, 2, 4)]).tolist() == [[8.0] * 3] * 5


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda self, x: self.a(x).view(2, 6), id="a view"),
        pytest.param(
            lambda self, x: self.a(x) * 2 if x.shape[0] == 2 else self.a(x), id="a question"
        ),
    ],
)
def test_a_batch_that_cannot_be_free_is_fixed_and_refused_only_where_data_are_used(forward):
    model = linear_pair(forward)
    program = trace(model, torch.zeros(2, 4))
    assert program.shapes[program.output] == (2, 6)
    x = torch.ones(2, 4)
    with torch.no_grad():
        assert_close(run(program, model.state_dict(), [x]), forward(model, x))
    assert discover(model, torch.zeros(2, 4)).groups == {}
    with pytest.raises(StructureError, match="whatever the size of the batch"):
        program.check_rows()


def test_the_batch_is_free_however_forward_is_written():
    class Loose(nn.Module):
        def forward(self, *inputs):
            return inputs[0] * 2

    assert trace(Loose(), torch.zeros(2, 4)).input_shape() == (None, 4)


def test_a_fixed_batch_is_that_of_the_example():
    model = linear_pair(lambda self, x: self.a(x).view(3, 6))
    assert trace(model, torch.zeros(3, 4)).shape("x") == (3, 4)


@pytest.mark.parametrize(
    ("forward", "shape"),
    [(lambda self, x: self.a(x)[0], (6,)), (lambda self, x: self.a.weight + 0, (6, 4))],
)
def test_outputs_that_do_not_follow_the_batch_are_refused_only_where_data_are_used(forward, shape):
    program = trace(linear_pair(forward), torch.zeros(2, 4))
    assert program.shapes[program.output] == shape
    with pytest.raises(StructureError, match="whatever the size of the batch"):
        program.check_rows()


def test_inputs_without_a_common_batch_are_traced_as_they_are():
    class Scaled(nn.Module):
        def forward(self, x, factor):
            return x * factor

    program = trace(Scaled(), [torch.zeros(3, 4), torch.tensor(2.0)])
    x = torch.ones(5, 4)
    assert run(program, {}, [x, torch.tensor(3.0)]).tolist() == [[3.0] * 4] * 5


# ---------------------------------------------------------------------------- the module stays


class Everything(nn.Module):
    """Batch normalisation, dropout, and what PyTorch takes a fast path for."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout()
        self.mix = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def forward(self, x):
        return self.drop(self.mix(self.norm(x)[:, None])[:, 0])


def state_of(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_modes_weights_and_the_fast_path_are_left_as_they_were(fast, fails):
    model = Everything().train()
    model.mix.eval()
    before, state = [module.training for module in model.modules()], state_of(model)
    grad = torch.is_grad_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        if fails:
            with pytest.raises(StructureError):
                trace(model, torch.randn(8, 5))
        else:
            program = trace(model, torch.randn(8, 4))
            assert not any("dropout" in op or "encoder_layer" in op for op in ops(program))
        assert torch.backends.mha.get_fastpath_enabled() == fast
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert torch.is_grad_enabled() == grad
    assert [module.training for module in model.modules()] == before
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_network_in_training_mode_is_traced_as_in_eval_mode():
    torch.manual_seed(0)
    model, example = Everything(), torch.randn(8, 4)
    one, other = trace(model.train(), example), trace(model.eval(), example)
    assert one == other
    x = torch.randn(5, 4)
    with torch.no_grad():
        assert_close(run(one, model.state_dict(), [x]), model(x))


def test_the_example_is_left_as_it_was():
    example = -torch.ones(3, 4)
    trace(linear_pair(lambda self, x: self.a(x.relu_())), example)
    assert torch.equal(example, -torch.ones(3, 4))


# ---------------------------------------------------------------------------- what is refused


def refused(model, example):
    """What ``trace`` says of a network that it refuses."""
    with pytest.raises(StructureError) as caught:
        trace(model, example)
    return str(caught.value)


def test_an_example_of_the_wrong_shape_is_refused_with_its_shape():
    message = refused(nn.Sequential(nn.Linear(4, 3)), torch.zeros(2, 5))
    assert message.startswith("Sequential cannot be traced")
    assert "inputs of shape [(2, 5)]" in message
    assert "Check the shape of the example inputs" in message


def test_too_many_inputs_are_refused_with_all_their_shapes():
    message = refused(nn.Linear(4, 3), [torch.zeros(2, 4), torch.zeros(2, 7)])
    assert "[(2, 4), (2, 7)]" in message


def test_an_input_that_forward_does_not_know_is_refused_by_name():
    example = dict.fromkeys(("left", "right", "middle"), torch.zeros(2, 3))
    assert "middle" in refused(Difference(), example)


@pytest.mark.parametrize(
    ("example", "kind"),
    [
        ([[1.0, 2.0]], "list"),
        ([torch.zeros(2, 4), 3], "int"),
        ({"x": "text"}, "str"),
        ((None,), "NoneType"),
    ],
)
def test_examples_that_are_no_tensors_are_refused_with_their_kind(example, kind):
    message = refused(nn.Linear(4, 3), example)
    assert message.startswith(f"example_inputs: got {kind}, expected tensors")


@pytest.mark.parametrize("example", [3, None], ids=str)
def test_an_example_that_is_no_sequence_is_refused_with_its_kind(example):
    assert type(example).__name__ in refused(nn.Linear(4, 3), example)


def test_an_example_on_another_device_is_refused_with_both():
    message = refused(nn.Linear(4, 3), torch.zeros(2, 4, device="meta"))
    assert "example_inputs are on ['meta'], the weights of Linear on ['cpu']" in message
    assert ".to()" in message
    assert "['cpu'], the weights of Linear on ['meta']" in refused(
        nn.Linear(4, 3, device="meta"), torch.zeros(2, 4)
    )


def test_control_flow_on_values_is_refused_with_the_line_that_asks():
    def forward(self, x):
        if x.sum() > 0:  # the line that asks
            return self.a(x)
        return self.a(-x)

    line = forward.__code__.co_firstlineno + 1
    message = refused(linear_pair(forward), torch.zeros(2, 4))
    assert f"{__file__}, line {line}: 'if x.sum() > 0:" in message
    assert "control flow that depends on values" in message
    assert "prove_module(model, example_inputs, spec)" in message


def test_units_at_an_operator_from_outside_torch_are_refused_by_name_or_pinned():
    @torch.library.custom_op("tracing_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    twice.register_fake(torch.empty_like)
    model = linear_pair(lambda self, x: twice(self.a(x)))
    with pytest.raises(
        StructureError, match=r"Operator tracing_test.twice.default \(twice\) cannot"
    ) as e:
        discover(model, torch.zeros(2, 4))
    assert "a.weight (6, 4)" in str(e.value)
    spec = discover(model, torch.zeros(2, 4), partial=True)
    assert spec.groups == {}
    assert "tracing_test.twice.default" in spec.pinned[0]
    with pytest.raises(Unreadable, match="not one of torch's own"):
        Program.from_json(json.loads(json.dumps(trace(model, torch.zeros(2, 4)).to_json())))


def test_control_flow_that_is_part_of_the_graph_is_refused_by_name():
    def forward(self, x):
        h = torch.cond(x.sum() > 0, lambda h: h.sin(), lambda h: h.cos(), (self.a(x),))
        return self.b(h)

    message = refused(linear_pair(forward), torch.zeros(2, 4))
    assert "cond" in message
    assert "control flow" in message


def test_an_error_in_forward_is_told_with_its_line():
    def forward(self, x):
        raise ValueError("only for grown-ups")

    message = refused(linear_pair(forward), torch.zeros(2, 4))
    assert "only for grown-ups" in message
    assert f"line {forward.__code__.co_firstlineno + 1}" in message


def test_random_numbers_are_not_drawn_in_vain():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout())
    before = torch.random.get_rng_state()
    trace(model, torch.zeros(2, 4))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_tracing_twice_gives_the_same_text():
    make = partial(trace, nn.Sequential(nn.Linear(4, 3), nn.GELU()), torch.zeros(2, 4))
    assert json.dumps(make().to_json()) == json.dumps(make().to_json())
