"""What the tests of benchmarks.peers share: small networks of each kind, ours beside its spec."""

from experiments.benchmarks.peers import specs
from flax_resnet.models import BasicBlock, BottleneckBlock, DropBlockResNet, MiniModel, ResNet

SMALL = {
    "basic": (
        specs.ResNet((1, 1), 4, 5, bottleneck=False, imagenet=False),
        ResNet((1, 1), BasicBlock, 5, 4, stem="cifar", shortcut="A"),
    ),
    "bottleneck": (
        specs.ResNet((1, 1), 4, 5, bottleneck=True, imagenet=True),
        ResNet((1, 1), BottleneckBlock, 5, 4),
    ),
    "mini": (
        specs.Mini((1, 2), 4, 5, dropout=0.0),
        MiniModel(5, (1, 2), 4, dropout_rate=0.0),
    ),
    "dropblock": (
        specs.DropBlockNet((4, 8), (6,), 5, rate=0.0, dropout=0.0),
        DropBlockResNet(5, (4, 8), (6,), dropblock_rate=0.0, dropout_rate=0.0),
    ),
}
SIDE = 16
