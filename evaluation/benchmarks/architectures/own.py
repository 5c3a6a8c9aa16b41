"""Networks written here, a few lines each, on PyTorch and PyG: one per way that units are wired."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.benchmarks.architectures.sample import Sample, noise, sample, seeded, tokens
from zoo.architectures import Residual, resnet20


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


def _resnet20(norm: str) -> nn.Module:
    return resnet20((3, 16, 16), 5, widths=(8, 16, 32), norm=norm)


def _resnext() -> nn.Module:
    grouped = [Residual(c, 16, nn.BatchNorm2d, groups=4) for c in (6, 16)]
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
    name: partial(sample, build, example)
    for name, build, example in (
        ("mlp", _mlp, noise(_VECTOR)),
        ("prelu_mlp", _prelu_mlp, noise(_VECTOR)),
        ("weight_norm_mlp", _weight_norm_mlp, noise(_VECTOR)),
        ("gated_mlp", _GatedMLP, noise(_VECTOR)),
        ("siren", _Siren, noise((2, 2))),
        ("vgg", _vgg, noise(_IMAGE)),
        ("mobilenet", _mobilenet, noise(_IMAGE)),
        ("group_norm_net", _group_norm_net, noise(_IMAGE)),
        ("audio_net", _audio_net, noise((2, 1, 64))),
        ("video_net", _video_net, noise((2, 3, 4, 8, 8))),
        ("autoencoder", _autoencoder, noise(_IMAGE)),
        ("super_resolution", _super_resolution, noise(_IMAGE)),
        ("resnet20", partial(_resnet20, "batch"), noise(_IMAGE)),
        ("resnet20_layer_norm", partial(_resnet20, "layer"), noise(_IMAGE)),
        ("resnext", _resnext, noise(_IMAGE)),
        ("densenet", _densenet, noise(_IMAGE)),
        ("unet", _UNet, noise(_IMAGE)),
        ("squeeze_excitation", _squeeze_excitation, noise(_IMAGE)),
        ("shufflenet", _ShuffleNet, noise(_IMAGE)),
        ("mixer", _Mixer, noise(_IMAGE)),
        ("lstm_tagger", _LSTMTagger, lambda: (tokens(61, 7),)),
        ("gru_classifier", _GRUClassifier, noise((2, 7, 6))),
        ("encoder_post_norm", partial(_encoder, norm_first=False), noise(_SEQUENCE)),
        ("encoder_pre_norm", partial(_encoder, norm_first=True), noise(_SEQUENCE)),
        ("cross_attention", _CrossAttention, noise(_SEQUENCE, (2, 9, 11))),
        ("einsum_attention", _EinsumAttention, noise(_SEQUENCE)),
        ("tied_language_model", _TiedLanguageModel, lambda: (tokens(61, 7),)),
        ("bilinear", _Bilinear, noise(_VECTOR, (2, 6))),
        ("two_towers", _TwoTowers, noise(_IMAGE, _VECTOR)),
        ("two_outputs", _TwoOutputs, noise(_VECTOR)),
        ("gcn", partial(_graph_net, "gcn"), _graph),
        ("gin", partial(_graph_net, "gin"), _graph),
        ("graph_sage", partial(_graph_net, "sage"), _graph),
        ("gat", partial(_graph_net, "gat"), _graph),
    )
}


def resnet18() -> Sample:
    """ResNet-18 for ImageNet: 11.7 million parameters, images of 64 x 64."""
    with seeded():
        stem = [nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64)]
        layers: list[nn.Module] = [*stem, nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
        for channels, width in ((64, 64), (64, 128), (128, 256), (256, 512)):
            stride = 1 if channels == width else 2
            layers.append(Residual(channels, width, nn.BatchNorm2d, stride=stride))
            layers.append(Residual(width, width, nn.BatchNorm2d))
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)]
        return nn.Sequential(*layers, *head).eval(), (torch.randn(2, 3, 64, 64),)
