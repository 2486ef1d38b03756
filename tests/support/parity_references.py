"""Networks of Keras and of torch as references of ours, and variables for both."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from parity_helpers import channels_first, keras, torch, torch_layout


def random_variables(module, x, rng):
    """He-scaled kernels, noise on everything else, variances above zero.

    What a branch ends with is a fifth of that: rounding errors grow from block to block with
    the branches' share, and so stay under 1e-4 through 152 layers in training mode too (at full
    size they pass 1e-3).
    """
    block_cls = module.block_cls
    end = f"{'conv' if block_cls.preactivation else 'norm'}{len(block_cls(filters=64).convs())}"

    def draw(path, shape):
        noise = np.sqrt(12, dtype=np.float32) * (rng.random(shape.shape, np.float32) - 0.5)
        *_, layer, leaf = [part.key for part in path]
        match leaf:
            case "kernel":
                noise *= np.sqrt(2 / np.prod(shape.shape[:-1]), dtype=np.float32)
            case "scale" | "var":
                noise = np.exp(0.3 * noise)
            case _:
                noise *= np.float32(0.1)
        ends = layer == end and leaf in ("kernel", "scale")
        return jnp.asarray(noise * np.float32(0.2) if ends else noise)

    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(draw, shapes)


KERAS_MODULES = {
    "stem_conv": "conv1_conv",
    "stem_norm": "conv1_bn",
    "final_norm": "post_bn",
    "head": "predictions",
    "conv1": "1_conv",
    "conv2": "2_conv",
    "conv3": "3_conv",
    "shortcut_conv": "0_conv",
    "shortcut_norm": "0_bn",
}
KERAS_NORMS = {
    "v1": {"norm1": "1_bn", "norm2": "2_bn", "norm3": "3_bn"},
    "v2": {"norm1": "preact_bn", "norm2": "1_bn", "norm3": "2_bn"},
}
KERAS_LEAVES = {"scale": "gamma", "mean": "moving_mean", "var": "moving_variance"}


class KerasReference:
    """A network of keras.applications with our variables."""

    def __init__(self, name, variables, shape):
        self.modules = KERAS_MODULES | KERAS_NORMS["v2" if name.endswith("V2") else "v1"]
        build = getattr(keras.applications, name)
        self.model = build(weights=None, input_shape=shape[1:], classifier_activation=None)
        values, weights = self.names(variables), self.weights()
        assert values.keys() == weights.keys()
        for key, weight in weights.items():
            weight.assign(values[key])
        ends = {layer.name: layer.output for layer in self.model.layers}
        self.ends = {"stem": ends["pool1_pool"], "logits": ends["predictions"]} | {
            keras_block_to_ours(key): end for key, end in ends.items() if key.endswith("_out")
        }
        self.with_ends = keras.Model(self.model.input, list(self.ends.values()))

    def weights(self):
        layers = self.model.layers
        return {f"{layer.name}/{w.name}": w for layer in layers for w in layer.weights}

    def names(self, variables):
        named = {}
        for path, value in jax.tree_util.tree_leaves_with_path(variables):
            *blocks, module, leaf = [part.key for part in path[1:]]
            name = self.modules[module]
            if blocks:
                stage, block = blocks[0].removeprefix("stage").split("_block")
                name = f"conv{int(stage) + 1}_block{block}_{name}"
            leaf = "beta" if leaf == "bias" and "norm" in module else KERAS_LEAVES.get(leaf, leaf)
            named[f"{name}/{leaf}"] = value
        return named

    def run(self, x, train):
        outputs = dict(zip(self.ends, self.with_ends(x, training=train), strict=True))
        self.state = {name: w.value for name, w in self.weights().items()}
        return outputs


def keras_block_to_ours(name):
    stage, block = name.removeprefix("conv").removesuffix("_out").split("_block")
    return f"stage{int(stage) - 1}_block{block}"


class Spec(NamedTuple):
    """A network as torchvision's constructor takes it, and what other libraries add."""

    bottleneck: bool
    sizes: tuple[int, ...]
    filters: int = 64
    groups: int = 1
    width: int = 64
    early: bool = False  # stride in a bottleneck's first 1x1
    dilate: tuple[bool, ...] = (False, False, False, False)
    shortcut: str = "B"
    squeeze: bool = False
    preact: bool = False
    stem: str = "imagenet"
    stem_filters: int | None = None
    classes: int = 1000


class CountedNorm(torch.nn.BatchNorm2d):
    """Keeps how many values a channel had."""

    def forward(self, x):
        self.count = x.numel() // x.shape[1]
        return super().forward(x)


def torch_conv(inputs, filters, kernel_size, stride=1, groups=1, dilation=1):
    pad = dilation * (kernel_size // 2)
    return torch.nn.Conv2d(inputs, filters, kernel_size, stride, pad, dilation, groups, bias=False)


class TorchSqueeze(torch.nn.Module):
    """Gates of the channels, from their averages."""

    def __init__(self, channels):
        super().__init__()
        self.fc1 = torch.nn.Linear(channels, channels // 16)
        self.fc2 = torch.nn.Linear(channels // 16, channels)

    def forward(self, x):
        gates = torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3))))))
        return x * gates[:, :, None, None]


class TorchBlock(torch.nn.Module):
    """A block of two or three convolutions."""

    def __init__(self, spec, inputs, filters, stride, dilation):
        super().__init__()
        nn = torch.nn
        self.spec, self.stride = spec, stride
        if spec.bottleneck:
            inner, outputs = filters * spec.width // 64 * spec.groups, 4 * filters
            early, late = (stride, 1) if spec.early else (1, stride)
            self.conv1 = torch_conv(inputs, inner, 1, early)
            self.conv2 = torch_conv(inner, inner, 3, late, spec.groups, dilation)
            self.conv3 = torch_conv(inner, outputs, 1)
        else:
            outputs = filters
            self.conv1 = torch_conv(inputs, filters, 3, stride)
            self.conv2 = torch_conv(filters, filters, 3)
        self.convs = 3 if spec.bottleneck else 2
        for i in range(1, self.convs + 1):
            conv = getattr(self, f"conv{i}")
            channels = conv.in_channels if spec.preact else conv.out_channels
            setattr(self, f"bn{i}", CountedNorm(channels))
        if spec.squeeze:
            self.se = TorchSqueeze(outputs)
        self.missing = outputs - inputs
        if spec.shortcut != "A" and (stride != 1 or self.missing):
            layers = [torch_conv(inputs, outputs, 1, stride)]
            if spec.shortcut == "D":
                pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
                layers = [pool if stride == 2 else nn.Identity(), torch_conv(inputs, outputs, 1)]
            if not spec.preact:
                layers.append(CountedNorm(outputs))
            self.downsample = nn.Sequential(*layers)

    def forward(self, x):
        convs = [getattr(self, f"conv{i}") for i in range(1, self.convs + 1)]
        norms = [getattr(self, f"bn{i}") for i in range(1, self.convs + 1)]
        source = h = x
        if self.spec.preact:
            source = h = torch.relu(norms[0](x))
            for i, conv in enumerate(convs):
                h = conv(h if i == 0 else torch.relu(norms[i](h)))
        else:
            for i, (conv, norm) in enumerate(zip(convs, norms, strict=True)):
                h = norm(conv(h if i == 0 else torch.relu(h)))
        if self.spec.squeeze:
            h = self.se(h)
        h = h + self.carry(x, source)
        return h if self.spec.preact else torch.relu(h)

    def carry(self, x, source):
        if hasattr(self, "downsample"):
            return self.downsample(source)
        if self.stride == 1 and not self.missing:
            return x
        zeros = (0, 0, 0, 0, self.missing // 2, self.missing - self.missing // 2)
        return torch.nn.functional.pad(x[:, :, :: self.stride, :: self.stride], zeros)


class TorchNet(torch.nn.Module):
    """Stem, stages, head."""

    def __init__(self, spec):
        super().__init__()
        nn = torch.nn
        self.spec, width = spec, spec.stem_filters or spec.filters
        if spec.stem == "deep":
            half = width // 2
            self.conv1 = nn.Sequential(
                torch_conv(3, half, 3, 2), CountedNorm(half), nn.ReLU(),
                torch_conv(half, half, 3), CountedNorm(half), nn.ReLU(),
                torch_conv(half, width, 3),
            )  # fmt: skip
        else:
            self.conv1 = torch_conv(3, width, *{"imagenet": (7, 2), "cifar": (3, 1)}[spec.stem])
        if not spec.preact:
            self.bn1 = CountedNorm(width)
        inputs, dilation = width, 1
        for stage, blocks in enumerate(spec.sizes):
            filters, stride, before = spec.filters * 2**stage, 2 if stage else 1, dilation
            if spec.dilate[stage]:
                stride, dilation = 1, 2 * dilation
            layer = nn.Sequential()
            for block in range(blocks):
                shape = (stride, before) if block == 0 else (1, dilation)
                layer.append(TorchBlock(spec, inputs, filters, *shape))
                inputs = filters * (4 if spec.bottleneck else 1)
            self.add_module(f"layer{stage + 1}", layer)
        if spec.preact:
            self.final_bn = CountedNorm(inputs)
        self.fc = nn.Linear(inputs, spec.classes)

    def forward(self, x):
        """{our name: output}."""
        x = self.conv1(x)
        if not self.spec.preact:
            x = torch.relu(self.bn1(x))
        if self.spec.stem != "cifar":
            x = torch.nn.functional.max_pool2d(x, 3, 2, 1)
        outputs = {"stem": x}
        for stage in range(1, len(self.spec.sizes) + 1):
            for block, module in enumerate(getattr(self, f"layer{stage}"), start=1):
                outputs[f"stage{stage}_block{block}"] = x = module(x)
        if self.spec.preact:
            x = torch.relu(self.final_bn(x))
        return outputs | {"logits": self.fc(x.mean((2, 3)))}


TORCH_MODULES = {
    "stem_conv": "conv1",
    "stem_norm": "bn1",
    "final_norm": "final_bn",
    "head": "fc",
    "norm1": "bn1",
    "norm2": "bn2",
    "norm3": "bn3",
    "shortcut_conv": "downsample.0",
    "shortcut_norm": "downsample.1",
    "reduce": "fc1",
    "expand": "fc2",
}
TORCH_DEEP_STEM = {
    "stem_conv1": "conv1.0",
    "stem_norm1": "conv1.1",
    "stem_conv2": "conv1.3",
    "stem_norm2": "conv1.4",
    "stem_conv": "conv1.6",
}
TORCH_POOLED_SHORTCUT = {"shortcut_conv": "downsample.1", "shortcut_norm": "downsample.2"}


class TorchReference:
    """A network in torch with our variables."""

    def __init__(self, spec, variables):
        self.modules = TORCH_MODULES
        if spec.stem == "deep":
            self.modules = self.modules | TORCH_DEEP_STEM
        if spec.shortcut == "D":
            self.modules = self.modules | TORCH_POOLED_SHORTCUT
        with torch.device("meta"):  # spends no time on torch's own initialisation
            self.model = TorchNet(spec)
        state = {name: torch.tensor(value) for name, value in self.names(variables).items()}
        for name in self.model.state_dict():
            if name.endswith("num_batches_tracked"):
                state[name] = torch.tensor(0)
        self.model.load_state_dict(state, assign=True)

    def names(self, variables):
        named = {}
        for path, value in jax.tree_util.tree_leaves_with_path(variables):
            *modules, leaf = [part.key for part in path[1:]]
            if modules[0].startswith("stage"):
                stage, block = modules[0].removeprefix("stage").split("_block")
                modules[0] = f"layer{stage}.{int(block) - 1}"
            leaf, value = torch_layout(leaf, value)
            named[".".join([*(self.modules.get(m, m) for m in modules), leaf])] = value
        return named

    def run(self, x, train):
        before = {name: value.numpy().copy() for name, value in self.model.named_buffers()}
        with torch.no_grad():
            outputs = self.model.train(train)(channels_first(x))
        self.state = {name: value.numpy().copy() for name, value in self.model.named_buffers()}
        if train:
            # torch's running variance is of the sample (n - 1); ours of the population.
            for name, module in self.model.named_modules():
                if isinstance(module, CountedNorm):
                    key = f"{name}.running_var"
                    kept, n = 0.9 * before[key], module.count
                    self.state[key] = kept + (self.state[key] - kept) * (n - 1) / n
        return {name: channels_last(output) for name, output in outputs.items()}


def channels_last(output):
    output = output.numpy()
    return output.transpose(0, 2, 3, 1) if output.ndim == 4 else output


R18, R50, R101, R152 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)
