"""Networks on which structure discovery is proved: one entry per way that units are wired.

``OWN`` holds networks written here, a few lines each, on PyTorch and PyG; ``TRANSFORMERS`` holds
models of the ``transformers`` package with small configs and random weights. Calling an entry
builds the network in eval mode together with example inputs. Sizes of different roles differ
wherever they can, so that two axes are never confused because they happen to be equally long.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Sample = tuple[nn.Module, tuple[Tensor, ...] | dict[str, Tensor]]


@contextmanager
def _seeded():
    """Same random numbers on every run; the caller's generator stays where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@torch.no_grad()
def _sample(build: Callable[[], nn.Module], example: Callable) -> Sample:
    """The network in eval mode, no two of its units alike, and example inputs."""
    with _seeded():
        network, inputs = build().eval(), example()
        # Initialisers leave scales at one and biases at zero, which every permutation of units
        # leaves as they are, and weights so small that layers add nothing to a residual stream.
        for parameter in network.parameters():
            std = (2 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.2
            parameter += std * torch.randn_like(parameter)
        tracking = [m for m in network.modules() if hasattr(m, "running_var")]
        for norm in tracking:  # statistics of the example, or the signal dies in deep networks
            norm.weight.uniform_(0.5, 1.5)  # transformers starts some of them around zero
            norm.momentum = 0.9
            norm.train()
        if tracking:
            network(**inputs) if isinstance(inputs, dict) else network(*inputs)
        return network.train().eval(), inputs  # train() empties what forward passes cached


def _noise(*shapes: Sequence[int]) -> Callable[[], tuple[Tensor, ...]]:
    """Example inputs, standard normal, one per shape."""
    return lambda: tuple(torch.randn(*shape) for shape in shapes)


def _tokens(vocabulary: int, length: int) -> Tensor:
    """Example tokens [2, length], without the first three ids, which are often special."""
    return torch.randint(3, vocabulary, (2, length))


def _conv(channels: int, width: int, norm: Callable[[int], nn.Module], **options) -> nn.Sequential:
    """Convolution 3x3 without a bias, normalisation, ReLU."""
    convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False, **options)
    return nn.Sequential(convolution, norm(width), nn.ReLU())


def _pooled(width: int) -> list[nn.Module]:
    """Global mean and five logits."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)]


# Plain chains


def _mlp() -> nn.Module:
    hidden = [nn.Linear(11, 24), nn.ReLU(), nn.Linear(24, 18), nn.GELU()]
    return nn.Sequential(*hidden, nn.Linear(18, 5))


def _prelu_mlp() -> nn.Module:
    hidden = [nn.Linear(11, 24), nn.PReLU(24), nn.Linear(24, 18), nn.PReLU()]
    return nn.Sequential(*hidden, nn.Linear(18, 5))


def _weight_norm_mlp() -> nn.Module:
    norm = nn.utils.parametrizations.weight_norm
    hidden = [norm(nn.Linear(11, 24)), nn.ReLU(), norm(nn.Linear(24, 18)), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(18, 5))


def _vgg() -> nn.Module:
    layers: list[nn.Module] = []
    for channels, width in ((3, 8), (8, 12), (12, 20)):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.Flatten(), nn.Linear(20 * 2 * 2, 28), nn.ReLU(), nn.Dropout(), nn.Linear(28, 5)]
    return nn.Sequential(*layers, *head)


def _mobilenet() -> nn.Module:
    layers: list[nn.Module] = [_conv(3, 8, nn.BatchNorm2d)]
    for channels, width in ((8, 14), (14, 20)):
        pointwise = nn.Conv2d(channels, width, 1, bias=False)
        depthwise = _conv(channels, channels, nn.BatchNorm2d, groups=channels)
        layers += [depthwise, pointwise, nn.BatchNorm2d(width), nn.ReLU6()]
    return nn.Sequential(*layers, *_pooled(20))


def _group_norm_net() -> nn.Module:
    def norm(width: int) -> nn.Module:
        return nn.GroupNorm(4, width)

    return nn.Sequential(_conv(3, 12, norm), _conv(12, 20, norm), *_pooled(20))


def _audio_net() -> nn.Module:
    first, second = nn.Conv1d(1, 10, 9, stride=2), nn.Conv1d(10, 14, 5)
    norm = nn.InstanceNorm1d(14, affine=True, track_running_stats=True)
    body = [first, nn.InstanceNorm1d(10, affine=True), nn.LeakyReLU(), nn.AvgPool1d(2)]
    head = [norm, nn.ELU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(14, 5)]
    return nn.Sequential(*body, second, *head)


def _video_net() -> nn.Module:
    first, second = nn.Conv3d(3, 6, 3, padding=1), nn.Conv3d(6, 10, 3, padding=1)
    body = [first, nn.BatchNorm3d(6), nn.SiLU(), nn.MaxPool3d(2), second, nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(10, 5))


def _autoencoder() -> nn.Module:
    down = [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU()]
    down += [nn.Conv2d(8, 14, 3, stride=2, padding=1), nn.BatchNorm2d(14), nn.ReLU()]
    up = [nn.ConvTranspose2d(14, 10, 4, stride=2, padding=1), nn.BatchNorm2d(10), nn.ReLU()]
    up += [nn.ConvTranspose2d(10, 3, 4, stride=2, padding=1), nn.Sigmoid()]
    return nn.Sequential(*down, *up)


def _super_resolution() -> nn.Module:
    body = [nn.Conv2d(3, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 24, 3, padding=1)]
    return nn.Sequential(*body, nn.PixelShuffle(2), nn.Tanh(), nn.Conv2d(6, 3, 3, padding=1))


class _Siren(nn.Module):
    """Coordinates to colours through sines."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 24), nn.Linear(24, 18)])
        self.out = nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(3 * layer(x))
        return self.out(x)


class _GatedMLP(nn.Module):
    """A chunk into value and gate, twice: by hand, and as ``F.glu``."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(11, 2 * 14), nn.Linear(14, 2 * 18)
        self.out = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.first(x).chunk(2, dim=-1)
        return self.out(F.glu(self.second(value * F.silu(gate))))


# Residuals, concatenations and skips


class _Residual(nn.Module):
    """Two convolutions and a shortcut; a 1x1 convolution projects it where the width changes."""

    def __init__(
        self, channels: int, width: int, stride: int, groups: int, norm: Callable[[int], nn.Module]
    ):
        super().__init__()
        self.body = nn.Sequential(
            _conv(channels, width, norm, stride=stride),
            nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False),
            norm(width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if channels != width:
            project = nn.Conv2d(channels, width, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(project, norm(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def _resnet20(norm: Callable[[int], nn.Module], groups: int = 1) -> nn.Module:
    layers: list[nn.Module] = [_conv(3, 8, norm)]
    for stage, (channels, width) in enumerate(((8, 8), (8, 16), (16, 32))):
        layers.append(_Residual(channels, width, 2 if stage else 1, groups, norm))
        layers += [_Residual(width, width, 1, groups, norm) for _ in range(2)]
    return nn.Sequential(*layers, *_pooled(32))


def _resnext() -> nn.Module:
    grouped = [_Residual(6, 16, 1, 4, nn.BatchNorm2d), _Residual(16, 16, 1, 4, nn.BatchNorm2d)]
    return nn.Sequential(_conv(3, 6, nn.BatchNorm2d), *grouped, *_pooled(16))


class _DenseBlock(nn.Module):
    """Every layer reads the concatenation of all outputs before it."""

    def __init__(self, channels: int, growth: int, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(
            _conv(channels + i * growth, growth, nn.BatchNorm2d) for i in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return x


def _densenet() -> nn.Module:
    transition = [nn.Conv2d(8 + 3 * 6, 10, 1), nn.AvgPool2d(2)]
    blocks = [_DenseBlock(8, 6, 3), *transition, _DenseBlock(10, 6, 2)]
    return nn.Sequential(_conv(3, 8, nn.BatchNorm2d), *blocks, nn.BatchNorm2d(22), *_pooled(22))


class _UNet(nn.Module):
    """Down twice, up by interpolation and by transposed convolution, with concatenated skips."""

    def __init__(self):
        super().__init__()
        self.fine, self.middle = _conv(3, 8, nn.BatchNorm2d), _conv(8, 12, nn.BatchNorm2d)
        self.coarse, self.rise = _conv(12, 20, nn.BatchNorm2d), _conv(32, 14, nn.BatchNorm2d)
        self.up = nn.ConvTranspose2d(14, 10, 2, stride=2)
        self.out = nn.Sequential(_conv(18, 9, nn.BatchNorm2d), nn.Conv2d(9, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        middle = self.middle(F.max_pool2d(fine, 2))
        x = self.coarse(F.max_pool2d(middle, 2))
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = self.rise(torch.cat([x, middle], dim=1))
        return self.out(torch.cat([self.up(x), fine], dim=1))


class _SqueezeExcitation(nn.Module):
    """A gate per channel, computed from the means of all channels."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.squeeze, self.excite = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean(dim=(2, 3))))))
        return x + x * gate[:, :, None, None]


def _squeeze_excitation() -> nn.Module:
    excited = _SqueezeExcitation(12, 7)
    return nn.Sequential(
        _conv(3, 12, nn.BatchNorm2d), excited, _conv(12, 9, nn.BatchNorm2d), *_pooled(9)
    )


class _ShuffleNet(nn.Module):
    """Grouped 1x1 convolutions whose channels change groups in between."""

    def __init__(self):
        super().__init__()
        self.stem = _conv(3, 12, nn.BatchNorm2d)
        self.first, self.second = nn.Conv2d(12, 24, 1, groups=3), nn.Conv2d(24, 15, 1, groups=3)
        self.head = nn.Sequential(nn.ReLU(), *_pooled(15))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.stem(x)))
        x = x.unflatten(1, (3, 8)).transpose(1, 2).flatten(1, 2)
        return self.head(self.second(x))


class _Mixer(nn.Module):
    """Patches, then one MLP across patches and one across channels."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 18, 4, stride=4)  # 16 patches
        self.norms = nn.ModuleList(nn.LayerNorm(18) for _ in range(3))
        self.tokens = nn.Sequential(nn.Linear(16, 13), nn.GELU(), nn.Linear(13, 16))
        self.channels = nn.Sequential(nn.Linear(18, 30), nn.GELU(), nn.Linear(30, 18))
        self.head = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)  # [batch, patches, channels]
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norms[1](x))
        return self.head(self.norms[2](x).mean(dim=1))


# Sequences


class _LSTMTagger(nn.Module):
    """Embedding, two bidirectional layers, one label per token."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(61, 14)
        self.lstm = nn.LSTM(14, 10, num_layers=2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(20, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.lstm(self.embedding(tokens))[0])


class _GRUClassifier(nn.Module):
    """One label per sequence, from the last hidden state."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(6, 18, num_layers=2, batch_first=True)
        self.out = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gru(x)[1][-1])


def _encoder(*, norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 56, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(11, 32), encoder, nn.LayerNorm(32), nn.Linear(32, 5))


class _CrossAttention(nn.Module):
    """Queries attend to a memory of another width, with values of a third one."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(11, 24), nn.Linear(11, 13), nn.Linear(11, 18)
        self.attention = nn.MultiheadAttention(24, 3, kdim=13, vdim=18, batch_first=True)
        self.norm, self.out = nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        query = self.query(x)
        key, value = self.key(memory), self.value(memory)
        mixed = self.attention(query, key, value, need_weights=False)[0]
        return self.out(self.norm(query + mixed))


class _EinsumAttention(nn.Module):
    """Attention whose heads are axes of the weights, as in JAX code."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(11, 18), nn.Linear(18, 5)
        self.query, self.key, self.value = (nn.Parameter(torch.zeros(18, 3, 8)) for _ in range(3))
        self.merge = nn.Parameter(torch.zeros(3, 8, 18))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        query, key, value = (
            torch.einsum("btd,dhk->bthk", x, w) for w in (self.query, self.key, self.value)
        )
        scores = torch.einsum("bqhk,bshk->bhqs", query, key) / 8**0.5
        mixed = torch.einsum("bhqs,bshk->bqhk", scores.softmax(-1), value)
        return self.out(x + torch.einsum("bqhk,hkd->bqd", mixed, self.merge))


class _TiedLanguageModel(nn.Module):
    """One matrix embeds the tokens and reads out their logits."""

    def __init__(self):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(61, 18), nn.Embedding(7, 18)
        self.feed = nn.Sequential(nn.LayerNorm(18), nn.Linear(18, 30), nn.GELU())
        self.back, self.norm = nn.Linear(30, 18), nn.LayerNorm(18)
        self.logits = nn.Linear(18, 61, bias=False)
        self.logits.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions(torch.arange(7))
        x = x + self.back(self.feed(x)).cumsum(dim=1)
        return self.logits(self.norm(x))


# Several inputs or outputs


class _Bilinear(nn.Module):
    """Two inputs meet in a bilinear form."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(11, 14), nn.Linear(6, 9)
        self.meet, self.out = nn.Bilinear(14, 9, 12), nn.Linear(12, 5)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.out(F.relu(self.meet(F.relu(self.left(left)), F.relu(self.right(right)))))


class _TwoTowers(nn.Module):
    """An image and a vector, concatenated with their sum in front of the head."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(_conv(3, 8, nn.BatchNorm2d), *_pooled(8)[:2], nn.Linear(8, 14))
        self.vector = nn.Sequential(nn.Linear(11, 20), nn.ReLU(), nn.Linear(20, 14))
        self.norm, self.out = nn.LayerNorm(42), nn.Linear(42, 5)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        image, vector = self.image(image), self.vector(vector)
        return self.out(self.norm(torch.cat([image, vector, image + vector], dim=1)))


class _TwoOutputs(nn.Module):
    """One trunk: logits, and a regression that also reads the logits."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(11, 24), nn.ReLU(), nn.Linear(24, 18), nn.ReLU())
        self.logits, self.hidden = nn.Linear(18, 5), nn.Linear(18 + 5, 9)
        self.value = nn.Linear(9, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.trunk(x)
        logits = self.logits(x)
        return logits, self.value(torch.tanh(self.hidden(torch.cat([x, logits], dim=-1))))


# Graphs: the first axis of x are nodes


class _GraphNet(nn.Module):
    """Two graph convolutions and one linear layer per node."""

    def __init__(self, first: nn.Module, second: nn.Module, width: int):
        super().__init__()
        self.first, self.second, self.out = first, second, nn.Linear(width, 5)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = F.relu(self.first(x, edge_index))
        return self.out(F.relu(self.second(x, edge_index)))


def _graph_net(layer: str) -> nn.Module:
    from torch_geometric import nn as pyg

    def mlp(channels: int, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(channels, 22), nn.ReLU(), nn.Linear(22, width))

    # Without self-loops, whose number depends on the edges and so cannot be exported.
    convolution = {
        "gcn": lambda c, w: pyg.GCNConv(c, w, add_self_loops=False),
        "gin": lambda c, w: pyg.GINConv(mlp(c, w), train_eps=True),
        "sage": lambda c, w: pyg.SAGEConv(c, w),
        "gat": lambda c, w: pyg.GATConv(c, w // 2, heads=2, add_self_loops=False),
    }[layer]
    return _GraphNet(convolution(6, 14), convolution(14, 18), 18)


def _graph() -> tuple[Tensor, Tensor]:
    """Nine nodes on a ring in both directions, and five edges at random."""
    ring = torch.arange(9)
    edges = torch.stack([ring, (ring + 1) % 9])
    return torch.randn(9, 6), torch.cat([edges, edges.flip(0), torch.randint(9, (2, 5))], dim=1)


_VECTOR, _SEQUENCE = (2, 11), (2, 7, 11)
_IMAGE = (2, 3, 16, 16)

OWN: dict[str, Callable[[], Sample]] = {
    name: partial(_sample, build, example)
    for name, build, example in (
        ("mlp", _mlp, _noise(_VECTOR)),
        ("prelu_mlp", _prelu_mlp, _noise(_VECTOR)),
        ("weight_norm_mlp", _weight_norm_mlp, _noise(_VECTOR)),
        ("gated_mlp", _GatedMLP, _noise(_VECTOR)),
        ("siren", _Siren, _noise((2, 2))),
        ("vgg", _vgg, _noise(_IMAGE)),
        ("mobilenet", _mobilenet, _noise(_IMAGE)),
        ("group_norm_net", _group_norm_net, _noise(_IMAGE)),
        ("audio_net", _audio_net, _noise((2, 1, 64))),
        ("video_net", _video_net, _noise((2, 3, 4, 8, 8))),
        ("autoencoder", _autoencoder, _noise(_IMAGE)),
        ("super_resolution", _super_resolution, _noise(_IMAGE)),
        ("resnet20", partial(_resnet20, nn.BatchNorm2d), _noise(_IMAGE)),
        ("resnet20_layer_norm", partial(_resnet20, partial(nn.GroupNorm, 1)), _noise(_IMAGE)),
        ("resnext", _resnext, _noise(_IMAGE)),
        ("densenet", _densenet, _noise(_IMAGE)),
        ("unet", _UNet, _noise(_IMAGE)),
        ("squeeze_excitation", _squeeze_excitation, _noise(_IMAGE)),
        ("shufflenet", _ShuffleNet, _noise(_IMAGE)),
        ("mixer", _Mixer, _noise(_IMAGE)),
        ("lstm_tagger", _LSTMTagger, lambda: (_tokens(61, 7),)),
        ("gru_classifier", _GRUClassifier, _noise((2, 7, 6))),
        ("encoder_post_norm", partial(_encoder, norm_first=False), _noise(_SEQUENCE)),
        ("encoder_pre_norm", partial(_encoder, norm_first=True), _noise(_SEQUENCE)),
        ("cross_attention", _CrossAttention, _noise(_SEQUENCE, (2, 9, 11))),
        ("einsum_attention", _EinsumAttention, _noise(_SEQUENCE)),
        ("tied_language_model", _TiedLanguageModel, lambda: (_tokens(61, 7),)),
        ("bilinear", _Bilinear, _noise(_VECTOR, (2, 6))),
        ("two_towers", _TwoTowers, _noise(_IMAGE, _VECTOR)),
        ("two_outputs", _TwoOutputs, _noise(_VECTOR)),
        ("gcn", partial(_graph_net, "gcn"), _graph),
        ("gin", partial(_graph_net, "gin"), _graph),
        ("graph_sage", partial(_graph_net, "sage"), _graph),
        ("gat", partial(_graph_net, "gat"), _graph),
    )
}


# Models of the transformers package


def _pretrained(model: str, example: Callable, config: dict, **options) -> Callable[[], Sample]:
    """An entry: a class of ``transformers`` by name, with the config that belongs to it."""

    def build() -> nn.Module:
        import transformers

        architecture = getattr(transformers, model)
        return architecture(architecture.config_class(**config | options))

    return partial(_sample, build, example)


def _classifier(model: str, config: dict, **options) -> Callable[[], Sample]:
    return _pretrained(f"{model}ForSequenceClassification", _text, config, **options)


def _causal(model: str, config: dict, **options) -> Callable[[], Sample]:
    return _pretrained(f"{model}ForCausalLM", _text, config, **options)


def _generation(model: str, config: dict, **options) -> Callable[[], Sample]:
    return _pretrained(f"{model}ForConditionalGeneration", _texts, config, **options)


def _vision(model: str, config: dict, size: int = 32, **options) -> Callable[[], Sample]:
    example = partial(_image, size)
    return _pretrained(f"{model}ForImageClassification", example, config, **options)


def _text() -> dict[str, Tensor]:
    return {"input_ids": _tokens(61, 7)}


def _texts() -> dict[str, Tensor]:
    return {"input_ids": _tokens(61, 7), "decoder_input_ids": _tokens(61, 5)}


def _image(size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def _image_and_text() -> dict[str, Tensor]:
    return _image() | _text()


def _wave() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 210)}


def _spectrum() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 24, 16)}


def _spectrum_and_text() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 18, 26), "decoder_input_ids": _tokens(61, 5)}


_LABELS = {"num_labels": 5}
_DEPTH = {"num_hidden_layers": 2, "num_attention_heads": 4}
_SMALL = _LABELS | _DEPTH | {"hidden_size": 32, "intermediate_size": 56}
_IDS = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = _SMALL | _IDS | {"max_position_embeddings": 23}
_CAUSAL = _TEXT | {"use_cache": False}
_RELATIVE = _TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_DISTILLED = _LABELS | _IDS | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 56}
_DISTILLED |= {"max_position_embeddings": 23}
_GROUPED = _CAUSAL | {"num_key_value_heads": 2, "head_dim": 8}
_GPT = _IDS | {"use_cache": False, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 56}
_GPT_NEO = _CAUSAL | {"num_layers": 2, "num_heads": 4}
_GPT_NEO |= {"attention_types": [[["global", "local"], 1]]}
_BART = _IDS | {"use_cache": False, "d_model": 32, "decoder_start_token_id": 2}
_BART |= {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 56}
_BART |= {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 40}
_WHISPER = _BART | {"num_mel_bins": 18, "max_source_positions": 13, "max_target_positions": 23}
_T5 = _IDS | {"use_cache": False, "d_model": 32, "d_kv": 8, "d_ff": 56}
_T5 |= {"num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_VIT = _SMALL | {"image_size": 32, "patch_size": 8}
_SWIN = _LABELS | {"image_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16}
_SWIN |= {"depths": [2, 2], "num_heads": [2, 4], "mlp_ratio": 3.0}
_STAGES = _LABELS | {"depths": [2, 2], "hidden_sizes": [16, 32]}
_PYRAMID = _STAGES | {"image_size": 32, "num_encoder_blocks": 2, "num_attention_heads": [2, 4]}
_PYRAMID |= {"mlp_ratios": [2, 3], "sr_ratios": [2, 1], "strides": [4, 2]}
_EFFICIENT = _LABELS | {"width_coefficient": 0.25, "hidden_dim": 320, "kernel_sizes": [3, 5]}
_EFFICIENT |= {"in_channels": [32, 64], "out_channels": [64, 112], "strides": [1, 2]}
_EFFICIENT |= {"num_block_repeats": [1, 2], "expand_ratios": [1, 4], "depthwise_padding": []}
_FOCAL = _STAGES | {"image_size": 32, "embed_dim": 16}
_FOCAL |= {"focal_levels": [2, 2], "focal_windows": [3, 3]}
_MOBILE = _LABELS | {"image_size": 128, "num_attention_heads": 4, "mlp_ratio": 1.5}
_MOBILE |= {"hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 10, 12, 14, 18, 20, 30]}
_LEVIT = _LABELS | {"image_size": 128, "hidden_sizes": [32, 48, 64], "depths": [1, 1, 1]}
_LEVIT |= {"num_attention_heads": [4, 6, 8], "key_dim": [8, 8, 8]}
_CVT = _LABELS | {"embed_dim": [16, 24, 32], "num_heads": [2, 3, 4], "depth": [1, 2, 3]}
_SPEECH = _SMALL | _IDS | {"conv_dim": (10, 18), "conv_kernel": (10, 4), "conv_stride": (5, 2)}
_SPEECH |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 4}
_SPEECH_PRE_NORM = _SPEECH | {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
_AST = _SMALL | {"max_length": 24, "num_mel_bins": 16, "patch_size": 8}
_CLIP = {"text_config": _TEXT | {"projection_dim": 24}, "projection_dim": 24}
_CLIP |= {"vision_config": _VIT | {"intermediate_size": 40, "projection_dim": 24}}

TRANSFORMERS: dict[str, Callable[[], Sample]] = {
    "bert": _classifier("Bert", _TEXT),
    "roberta": _classifier("Roberta", _TEXT),
    "distilbert": _classifier("DistilBert", _DISTILLED),
    "albert": _classifier("Albert", _TEXT, embedding_size=18),
    "electra": _classifier("Electra", _TEXT, embedding_size=18),
    "deberta": _classifier("Deberta", _RELATIVE),
    "deberta_v2": _classifier("DebertaV2", _RELATIVE),
    "mpnet": _classifier("MPNet", _TEXT),
    "squeezebert": _classifier("SqueezeBert", _TEXT, embedding_size=32),
    "modernbert": _classifier("ModernBert", _TEXT, cls_token_id=1, sep_token_id=2),
    "gpt2": _pretrained("GPT2LMHeadModel", _text, _GPT, n_positions=23),
    "gpt_neo": _causal("GPTNeo", _GPT_NEO),
    "gptj": _causal("GPTJ", _GPT, n_positions=23, rotary_dim=4),
    "gpt_neox": _causal("GPTNeoX", _CAUSAL),
    "opt": _causal("OPT", _CAUSAL, ffn_dim=56, word_embed_proj_dim=18),
    "bloom": _causal("Bloom", _GPT, hidden_size=32),
    "falcon": _causal("Falcon", _CAUSAL),
    "llama": _causal("Llama", _GROUPED),
    "mistral": _causal("Mistral", _GROUPED, sliding_window=5),
    "mixtral": _causal(
        "Mixtral", _GROUPED, num_local_experts=3, experts_implementation="batched_mm"
    ),
    "qwen2": _causal("Qwen2", _GROUPED),
    "qwen3": _causal("Qwen3", _GROUPED),
    "gemma": _causal("Gemma", _GROUPED),
    "gemma2": _causal("Gemma2", _GROUPED),
    "phi": _causal("Phi", _CAUSAL),
    "phi3": _causal("Phi3", _GROUPED),
    "olmo2": _causal("Olmo2", _GROUPED),
    "stablelm": _causal("StableLm", _CAUSAL, num_key_value_heads=2),
    "mamba": _causal("Mamba", _IDS, hidden_size=32, num_hidden_layers=2, use_cache=False),
    "t5": _generation("T5", _T5),
    "t5_gated": _generation("T5", _T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": _generation("Bart", _BART, max_position_embeddings=23),
    "pegasus": _generation("Pegasus", _BART, max_position_embeddings=23),
    "vit": _vision("ViT", _VIT),
    "deit": _vision("DeiT", _VIT),
    "beit": _vision("Beit", _VIT, use_relative_position_bias=True, layer_scale_init_value=0.5),
    "dinov2": _vision("Dinov2", _VIT, mlp_ratio=2),
    "dinov2_swiglu": _vision("Dinov2", _VIT, mlp_ratio=2, use_swiglu_ffn=True),
    "swin": _vision("Swin", _SWIN),
    "swinv2": _vision("Swinv2", _SWIN),
    "convnext": _vision("ConvNext", _STAGES, num_stages=2),
    "convnextv2": _vision("ConvNextV2", _STAGES, num_stages=2),
    "resnet": _vision("ResNet", _STAGES, embedding_size=10, hidden_sizes=[24, 40]),
    "bit": _vision("Bit", _STAGES, size=64, embedding_size=24, num_groups=4),
    "regnet": _vision("RegNet", _STAGES, embedding_size=10, hidden_sizes=[16, 24], groups_width=8),
    "mobilenet_v1": _vision("MobileNetV1", _LABELS, depth_multiplier=0.25),
    "mobilenet_v2": _vision("MobileNetV2", _LABELS, depth_multiplier=0.25),
    "efficientnet": _vision("EfficientNet", _EFFICIENT),
    "focalnet": _vision("FocalNet", _FOCAL),
    "segformer": _vision("Segformer", _PYRAMID),
    "poolformer": _vision(
        "PoolFormer", _LABELS, 64, hidden_sizes=[8, 12, 20, 32], depths=[1, 1, 2, 1]
    ),
    "pvt": _vision("Pvt", _PYRAMID, sequence_reduction_ratios=[2, 1], patch_sizes=[4, 2]),
    "pvt_v2": _vision("PvtV2", _PYRAMID, patch_sizes=[7, 3]),
    "mobilevit": _vision("MobileViT", _MOBILE, size=128),
    "levit": _vision("Levit", _LEVIT, size=128),
    "cvt": _vision("Cvt", _CVT),
    "clip": _pretrained("CLIPModel", _image_and_text, _CLIP),
    "clip_vision": _pretrained("CLIPVisionModelWithProjection", _image, _VIT, projection_dim=24),
    "siglip": _pretrained("SiglipVisionModel", _image, _VIT),
    "whisper": _pretrained("WhisperForConditionalGeneration", _spectrum_and_text, _WHISPER),
    "wav2vec2": _pretrained("Wav2Vec2ForCTC", _wave, _SPEECH),
    "hubert": _pretrained("HubertForCTC", _wave, _SPEECH_PRE_NORM),
    "ast": _pretrained("ASTForAudioClassification", _spectrum, _AST),
}


# Full size, to measure speed


def resnet18() -> Sample:
    """ResNet-18 for ImageNet: 11.7 million parameters, images of 64 x 64."""
    with _seeded():
        stem = [nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64)]
        layers: list[nn.Module] = [*stem, nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
        for channels, width in ((64, 64), (64, 128), (128, 256), (256, 512)):
            stride = 1 if channels == width else 2
            layers.append(_Residual(channels, width, stride, 1, nn.BatchNorm2d))
            layers.append(_Residual(width, width, 1, 1, nn.BatchNorm2d))
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)]
        return nn.Sequential(*layers, *head).eval(), (torch.randn(2, 3, 64, 64),)


def bert_base() -> Sample:
    """BERT base of ``transformers`` with its default config: 110 million parameters, 16 tokens."""
    from transformers import BertConfig, BertModel

    with _seeded():
        return BertModel(BertConfig()).eval(), {"input_ids": _tokens(30522, 16)}
