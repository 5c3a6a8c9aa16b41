"""What several rooms are tested on: a small real zoo, a merger trained on it, wired networks."""

import gc
import os
import socket
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch import nn
from torch._subclasses import fake_impls
from torch.export import exported_program
from torch.multiprocessing import ProcessExitedException, start_processes

from evaluation.metrics import family_logits, references
from metamerge.alignment import weight_matching
from metamerge.mergers import GNNConfig, GNNMerger, ThresholdObjective, probe_start
from metamerge.structure import Layout, discover_program, run, trace
from zoo import architectures
from zoo.parts import split_task
from zoo.splits import dirichlet
from zoo.tasks import load_task
from zoo.training import init_networks, train_networks

os.environ.setdefault("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")  # seconds, and noise

FAMILIES, MEMBERS, TRAINED_ON = 48, 4, 36
LONG = {
    *("test_architectures.py", "test_tutorial.py", "test_suites.py", "test_compare.py"),
    *("test_compare_methods.py", "test_merger_script.py", "test_rounds_script.py"),
    *("test_clusters_script.py", "test_subsets_script.py", "test_mutants_script.py"),
    *("test_rules.py", "test_servers.py", "test_build.py", "test_faults.py"),
}


def pytest_collection_finish():
    """What imports and collecting left stays: it is never looked through for garbage again."""
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Files that take longest come first, so that none of them keeps one worker busy at the end."""
    items.sort(key=lambda item: item.path.name not in LONG)


@contextmanager
def swapped(kernels, rules):
    """For a while, kernels and rules of operators are these."""
    known = {op: op.py_kernels.copy() for op in kernels}

    def put(all_kernels):
        for op, own in all_kernels.items():
            op.py_kernels.clear()
            op.py_kernels.update(own)
            op._dispatch_cache.clear()

    put(kernels)
    fake_impls.op_implementations_dict.update(rules)
    try:
        yield
    finally:
        put(known)
        for op in rules:
            del fake_impls.op_implementations_dict[op]


@pytest.fixture(scope="session", autouse=True)
def export_without_memory():
    """What torch.export tells 525 operators for every network anew, it tells them out of memory.

    It looks for them 26 times, too. Together that is three quarters of the time that a small
    network takes to be traced, and there are thousands. The fixture is torch.export's own
    functions by their names; test_tracing.py holds them against what is remembered.
    """
    names = ("_override_composite_implicit_decomp", "_collect_all_valid_cia_ops")
    by_name = {name: getattr(exported_program, name) for name in names}
    (own, collect), entered, collected = by_name.values(), {}, {}

    def collecting():
        found = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
        key = (*torch.ops._dir, *found)
        if key not in collected:
            collected[key] = collect()
        return collected[key]

    @contextmanager
    def remembering(table):
        key = tuple(table.items())
        if key not in entered:
            with own(table):
                pass  # takes away rules that operators had before: from now on it is always alike
            before = {*fake_impls.op_implementations_dict}
            with own(table):
                rules = fake_impls.op_implementations_dict.items()
                entered[key] = (
                    {op: op.py_kernels.copy() for op in table},
                    {op: rule for op, rule in rules if op not in before},
                )
        with swapped(*entered[key]):
            yield

    with pytest.MonkeyPatch.context() as patch:
        for name, instead in zip(names, (remembering, collecting), strict=True):
            patch.setattr(exported_program, name, instead)
        yield by_name


def as_rank(rank, main, settings, said):
    """What a process does that was forked to be one of several."""
    os.environ |= settings | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # that of the process it comes from
    with (said / str(rank)).open("w") as file, redirect_stdout(file), redirect_stderr(file):
        code = main()
    sys.exit(code)


@pytest.fixture(scope="session")
def on_two_processes(tmp_path_factory):
    """Call ``main`` on two CPU processes that know of each other: what both printed.

    They are forked from this one, which has imported what a launched process would take seconds to
    import. Tests of mergers and of comparisons have theirs launched.
    """

    def on_two_processes(main):
        said = tmp_path_factory.mktemp("said")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        settings = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        settings |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        try:
            start_processes(as_rank, (main, settings, said), nprocs=2, start_method="fork")
        except ProcessExitedException as error:
            pytest.fail(f"{error}\n{''.join(file.read_text() for file in said.iterdir())}")
        return "".join(file.read_text() for file in said.iterdir())

    return on_two_processes


@pytest.fixture(scope="session")
def digits_zoo():
    """48 families of four networks 64-32-10, each trained on 200 skewed digits; half a second.

    ``train`` and ``unseen`` share no member; nobody has seen the images of any other part.
    """
    split = split_task(load_task("digits"), objective=400)
    task, shape = split.task, tuple(split.task.inputs.shape[1:])

    def network():
        return architectures.build("mlp", shape, task.classes, widths=(32,))

    program = architectures.program_of(network(), shape)
    generator = torch.Generator().manual_seed(0)
    skew = {"alpha": 0.4, "size": 200, "overlap": True}
    segments = [
        segment
        for _ in range(FAMILIES)
        for segment in dirichlet(task.targets, split.segments, MEMBERS, generator=generator, **skew)
    ]
    weights = train_networks(
        program,
        init_networks(network, range(FAMILIES * MEMBERS)),
        task.inputs,
        task.targets,
        segments,
        epochs=15,
    ).weights
    families = {key: t.unflatten(0, (FAMILIES, MEMBERS)) for key, t in weights.items()}
    return SimpleNamespace(
        network=network,
        layout=Layout(program, discover_program(program)),
        train={key: t[:TRAINED_ON] for key, t in families.items()},
        unseen={key: t[TRAINED_ON:] for key, t in families.items()},
        segments=segments,
        split=split,
        objective=split.images("objective"),
        validation=split.images("validation"),
    )


@pytest.fixture(scope="session")
def trained_merger(digits_zoo):
    """A merger after 40 steps on training families and objective images; a second or two."""
    layout, (inputs, targets) = digits_zoo.layout, digits_zoo.objective
    members = layout.spec.permute(digits_zoo.train, weight_matching(digits_zoo.train, layout.spec))
    known = references(family_logits(layout.program, members, inputs), targets)
    objective = ThresholdObjective("ensemble", headroom=0.05)
    thresholds = objective.thresholds(known["best_member"], known["ensemble"])
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        shape = tuple(inputs.shape[1:])
        config = GNNConfig(probes=64, shapes=(shape,), width=16)
        merger = GNNMerger(config, {shape: probe_start(inputs, 64, generator)})
    fast = [merger.strength, merger.log_ridge]
    probes = list(merger.probes.parameters())
    named = {id(parameter) for parameter in (*fast, *probes)}
    groups = [
        {"params": fast, "lr": 3e-2},
        {"params": probes, "lr": 1e-2},
        {"params": [p for p in merger.parameters() if id(p) not in named], "lr": 3e-3},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for _ in range(40):
        rows = torch.randperm(TRAINED_ON, generator=generator)[:12]
        images = torch.randperm(len(targets), generator=generator)[:150]
        fused = merger({key: t[rows] for key, t in members.items()}, layout).weights
        logits = run(layout.program, fused, [inputs[images]], stacked=True)
        loss, _ = objective.loss(logits, targets[images], thresholds[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(merger.parameters(), 1.0)
        optimizer.step()
    return merger.requires_grad_(False).eval()


class Vision(nn.Module):
    """Patches, a class token and places; attention out of layers of its own for q, k and v."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 12, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 12))
        self.place = nn.Parameter(torch.zeros(5, 12))
        self.before, self.behind = nn.LayerNorm(12), nn.LayerNorm(12)
        self.q, self.k, self.v = (nn.Linear(12, 6) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 16), nn.Linear(16, 12)
        self.leave = nn.Linear(12, 5)

    def forward(self, x):  # [b, 1, 8, 8]
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        y = self.before(x)
        q, k, v = (f(y).unflatten(-1, (2, 3)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.behind(x))))
        return self.leave(x[:, 0])


class Encoder(nn.Module):
    """Tokens and places, and torch's own encoder, which packs q, k and v into one matrix."""

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(11, 8), nn.Parameter(torch.zeros(6, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.leave = nn.Linear(8, 5)

    def forward(self, x):  # [b, 6]
        return self.leave(self.encoder(self.embed(x) + self.place).mean(1))


class Dense(nn.Module):
    """Every convolution reads all maps before it, one behind the other."""

    def __init__(self):
        super().__init__()
        self.stem, self.one = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self.norm, self.two = nn.BatchNorm2d(9), nn.Conv2d(9, 6, 3, padding=1, bias=False)
        self.leave = nn.Linear(15 * 4, 5)

    def forward(self, x):  # [b, 1, 8, 8]
        x = F.relu(self.stem(x))
        x = torch.cat([x, F.gelu(self.one(x))], 1)
        x = torch.cat([x, F.gelu(self.two(F.gelu(self.norm(x))))], 1)
        return self.leave(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Hourglass(nn.Module):
    """Down, up again, and the maps from before beside those that come back."""

    def __init__(self):
        super().__init__()
        self.enter, self.down = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, 2, padding=1)
        self.up, self.join = nn.ConvTranspose2d(6, 5, 2, stride=2), nn.Conv2d(10, 7, 3, padding=1)
        self.leave = nn.Conv2d(7, 3, 1)

    def forward(self, x):  # [b, 1, 8, 8]
        first = F.gelu(self.enter(x))
        back = F.gelu(self.up(F.gelu(self.down(first))))
        return self.leave(F.gelu(self.join(torch.cat([first, back, x], 1))))


class Blocks(nn.Module):
    """A convolution in groups of several channels."""

    def __init__(self):
        super().__init__()
        self.enter, self.inner = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3, groups=2)
        self.leave = nn.Linear(8, 5)

    def forward(self, x):  # [b, 1, 8, 8]
        return self.leave(F.gelu(self.inner(F.gelu(self.enter(x)))).mean((2, 3)))


class Recurrent(nn.Module):
    """A recurrent layer, whose cells no layer owns, between two that are."""

    def __init__(self):
        super().__init__()
        self.enter, self.cells = nn.Linear(8, 6), nn.GRU(6, 7, batch_first=True)
        self.leave = nn.Linear(7, 5)

    def forward(self, x):  # [b, 1, 8, 8]
        return self.leave(self.cells(F.gelu(self.enter(x[:, 0])))[0][:, -1])


class Tied(nn.Module):
    """Tokens whose embedding is the output layer as well, and a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.leave = nn.Linear(8, 11, bias=False)
        self.leave.weight = self.embed.weight

    def forward(self, x):  # [b, 6]
        x = self.embed(x)
        x = x + F.gelu(self.inner(x))
        return self.leave(x + F.gelu(self.inner(x)))[:, -1]


WIRED = {
    "vision": Vision,
    "encoder": Encoder,
    "dense": Dense,
    "hourglass": Hourglass,
    "blocks": Blocks,
    "recurrent": Recurrent,
    "tied": Tied,
}


@cache
def make_wired(name):
    """A network with random members ``[2, 3, ...]``, all tensors far from zero, and inputs."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(40, 1, 8, 8, generator=generator)
    if name in ("encoder", "tied"):
        inputs = torch.randint(11, (40, 6), generator=generator)
    model = WIRED[name]().eval()
    program = trace(model, inputs[:2])
    members = {}
    for key, tensor in model.state_dict().items():
        shape = (2, 3, *tensor.shape)
        noise = torch.randn(shape, generator=generator)
        noise = noise / max(1, tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else noise / 2
        noise = noise.abs() + 0.5 if key.endswith("running_var") else noise
        members[key] = noise if tensor.is_floating_point() else tensor.expand(shape).clone()
    for alias, key in program.tied.items():
        members[alias] = members[key].clone()
    layout = Layout(program, discover_program(program))
    return SimpleNamespace(name=name, layout=layout, members=members, inputs=inputs)


@pytest.fixture(scope="session")
def wired_network():
    """Makes one of the wired networks by its name."""
    return make_wired


@pytest.fixture(scope="session", params=WIRED)
def wired(request):
    """Every wired network in turn."""
    return make_wired(request.param)
