import dataclasses
from typing import Literal

import pytest

from flax_resnet.cli.flags import arguments, parse
from flax_resnet.errors import UserError
from flax_resnet.models import (
    BasicBlock,
    MiniModel,
    PreActBasicBlock,
    cifar_resnet,
    keras_resnet,
)
from flax_resnet.optim.optimizers import SGD, AdamW, Cosine, OneCycle
from flax_resnet.training.config import TrainConfig

BASE = TrainConfig(
    model=cifar_resnet(20, num_classes=7), optimizer=SGD(schedule=Cosine(warmup=0.1))
)


def flags(*argv):
    return parse(BASE, "runs/x", argv).config


def test_no_flags_give_the_config_itself():
    got = parse(BASE, "runs/x", [])
    assert (got.workdir, got.config) == ("runs/x", BASE)
    assert parse(BASE, "runs/x", ["--workdir", "y"]).workdir == "y"


def test_any_field_can_be_set():
    got = flags(
        "--seed", "5", "--data.image_size", "64", "--augment.flip", "--ema-decay=0.9",
        "--optimizer.schedule.final", "0.2", "--optimizer.no-nesterov", "--loss",
        "binary_cross_entropy", "--checkpoint.every-steps", "9", "--num-steps", "None",
        "--model.stage-sizes", "1", "2", "--model.dtype", "bfloat16", "--model.shortcut", "B",
    )  # fmt: skip
    want = dataclasses.replace(
        BASE,
        seed=5,
        data=dataclasses.replace(BASE.data, image_size=64),
        augment=dataclasses.replace(BASE.augment, flip=True),
        ema_decay=0.9,
        optimizer=SGD(schedule=Cosine(warmup=0.1, final=0.2)),
        loss="binary_cross_entropy",
        checkpoint=dataclasses.replace(BASE.checkpoint, every_steps=9),
        model=BASE.model.clone(stage_sizes=(1, 2), dtype="bfloat16", shortcut="B"),
    )
    assert got == want
    assert hash(got.model.stage_sizes)


def test_classes_are_chosen_by_name():
    got = flags("--optimizer", "adamw", "--optimizer.b1", "0.8").optimizer
    assert got == AdamW(b1=0.8, schedule=Cosine(warmup=0.1))
    got = flags("--optimizer.schedule=OneCycle", "--optimizer.schedule.rise", "0.5").optimizer
    assert got == SGD(schedule=OneCycle(rise=0.5))
    got = flags("--model", "mini", "--model.dropout-rate", "0.5").model
    assert got == MiniModel(num_classes=7, dropout_rate=0.5)
    assert flags("--model", "resnet56").model == cifar_resnet(56, num_classes=7)
    assert flags("--model=ResNet50V2").model == keras_resnet(50, "v2", num_classes=7)


def test_block_classes_are_chosen_by_name():
    got = flags("--model.block-cls", "PreActBasicBlock", "--model.connection", "highway").model
    assert (got.block_cls, got.connection) == (PreActBasicBlock, "highway")
    named = "flax_resnet.models.blocks:BasicBlock"
    assert flags("--model.block-cls", named).model.block_cls is BasicBlock


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--optimzer", "adamw"], r"--optimzer: there is no .*mean --optimizer\?"),
        (["--optimizer.schedul=cosine"], r"mean --optimizer.schedule\?"),
        (["--optimizer", "adamm"], r"'adamm': expected one of sgd, .*mean 'adam'\?"),
        (["--optimizer"], "--optimizer '': expected one of sgd"),
        (["--model", "resnet21"], r"the names that .* names` lists \(did you mean 'resnet\d+'"),
        (["--model", "Resnet50"], "'Resnet50': expected one of the names"),
        (["--model.dtype", "float31"], "dtype 'float31': expected one such as float32"),
        (["--model.block-cls", "ResidualUnit"], "block_cls=.*Unit.*: expected a subclass of Block"),
        (["--model.block-cls", "Foo"], "'flax_resnet.models:Foo' is not known"),
        (["--model.block-cls", "os:system"], "'os:system' is not known"),
        (["--batch-size", "-3"], "batch_size=-3: expected 1 or more"),
        (["--augment.rotation", "-3"], "augment.rotation=-3.0: expected 0"),
    ],
)
def test_mistakes_are_one_line(argv, message):
    with pytest.raises(UserError, match=message) as caught:
        flags(*argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--batch-siz", "3"], ["Unrecognized options: --batch-siz, 3", "--batch-size INT"]),
        (["--optimizer.learning-rat=3"], ["--optimizer.learning-rate FLOAT"]),
        (["--epochs", "2"], ["--num-epochs FLOAT"]),
        (["stray"], ["Unrecognized options: stray"]),
        (["--num-epochs", "abc"], ["--num-epochs: could not convert string to float: 'abc'"]),
    ],
)
def test_tyro_names_a_wrong_flag_and_the_nearest(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        flags(*argv)
    said = capsys.readouterr()
    assert (stop.value.code, said.out) == (2, "")
    for word in words:
        assert word in said.err


def test_parameters_of_an_experiment_are_flags_too(capsys):
    def get_config(depth: int = 20, recipe: Literal["90", "a2"] = "90"):
        return BASE

    rest = ["--batch-size", "3", "--model.stage-sizes", "1", "2", "--augment.flip"]
    values, others, helps = arguments(get_config, [*rest[:2], "--depth=20", *rest[2:]])
    assert (values, others) == ({"depth": 20}, rest)
    assert "--depth INT (default: 20); --recipe {90,a2} (default: 90)" in helps
    assert arguments(get_config, ["--recipe", "a2", "--help"])[:2] == ({"recipe": "a2"}, ["--help"])
    assert arguments(lambda: BASE, rest) == ({}, rest, "")
    for argv in (["--depth", "x"], ["--recipe", "91"]):
        with pytest.raises(SystemExit) as stop:
            arguments(get_config, argv)
        assert stop.value.code == 2
        assert argv[0] in capsys.readouterr().err


def test_help_lists_fields_with_their_meaning_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(BASE, "runs/x", ["--help"], "The claim of the experiment.")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in (
        "The claim of the experiment.",
        "--optimizer.schedule constant|piecewise|cosine|onecycle|reduceonplateau",
        "--model.bn-momentum FLOAT share of the running statistics kept at each step",
        "--batch-size INT Images in one optimizer step, over all devices. (default: 128)",
        "--augment.cutmix FLOAT Beta parameter of CutMix",
        "--workdir STR Directory of the run's record.",
    ):
        assert part in text


def test_another_network_keeps_what_an_experiment_says_of_any():
    from experiments import finetune, mnist_transfer

    model = parse(finetune.get_config(), "w", ["--model", "resnet18"]).config.model
    assert (model.norm_kind, model.stage_sizes) == ("frozen", (2, 2, 2, 2))
    model = parse(mnist_transfer.get_config(), "w", ["--model", "resnet20"]).config.model
    assert (model.frozen_stages, model.hidden_units, model.num_classes) == (3, (256,), 10)
    argv = ["--model", "ResNet50", "--model.frozen-stages", "1"]
    assert parse(mnist_transfer.get_config(), "w", argv).config.model.frozen_stages == 1
