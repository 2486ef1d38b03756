import numpy as np
import pytest
from helpers import assert_one_line_error, tiny_resnet

from flax_resnet.cli.app import command
from flax_resnet.models import BottleneckBlock, create, summary

TINY = tiny_resnet(stage_sizes=(1, 2), num_filters=4)


def test_rows_are_the_layers_with_what_they_cost():
    counted = summary.summarize(TINY, (16, 16, 3), batch_size=2)
    rows = {row.name: row for row in counted.rows}
    assert list(rows)[:3] == ["stem_conv", "stem_norm", "stage1_block1.conv1"]
    strided = rows["stage2_block1.conv1"]
    assert (strided.kind, strided.shape) == ("Conv 3x3 /2", (8, 8, 8))
    assert (strided.parameters, strided.macs) == (9 * 4 * 8, 9 * 4 * 8 * 64)
    assert (rows["stem_norm"].parameters, rows["stem_norm"].macs) == (8, 0)
    assert (rows["head"].kind, rows["head"].parameters, rows["head"].macs) == ("Dense", 90, 80)
    assert counted.parameters == sum(row.parameters for row in counted.rows)
    assert counted.macs == sum(row.macs for row in counted.rows)
    norms = [row for row in counted.rows if row.kind == "BatchNorm"]
    assert counted.statistics == sum(row.parameters for row in norms)


def test_scanned_blocks_are_listed_one_by_one():
    scanned = TINY.clone(scan_blocks=True, remat=True)
    assert summary.summarize(scanned, (8, 8, 3)).rows == summary.summarize(TINY, (8, 8, 3)).rows


def test_groups_and_dilation_are_said_and_counted():
    model = tiny_resnet(
        stage_sizes=(1, 1), block_cls=BottleneckBlock, groups=2, width_per_group=32, output_stride=1
    )
    rows = {r.name: r for r in summary.summarize(model, (8, 8, 3)).rows}
    assert rows["stage1_block1.conv2"].kind == "Conv 3x3 groups 2"
    assert rows["stage1_block1.conv2"].macs == 9 * 4 * 8 * 64
    two = tiny_resnet(stage_sizes=(1, 2), output_stride=1)
    rows = {r.name: r for r in summary.summarize(two, (8, 8, 3)).rows}
    assert rows["stage2_block2.conv1"].kind == "Conv 3x3 dilation 2"


def test_parts_sum_their_layers():
    counted = summary.summarize(TINY, (16, 16, 3))
    parts = {row.name: row for row in summary.by_part(counted.rows)}
    assert list(parts) == ["stem_conv", "stem_norm", "stage1_block1", "stage2_block1",
                           "stage2_block2", "head"]  # fmt: skip
    assert (parts["stage2_block1"].kind, parts["stage2_block1"].shape) == ("6 layers", (8, 8, 8))
    assert sum(row.macs for row in parts.values()) == counted.macs


def test_the_printed_table_ends_with_the_totals(capsys):
    counted = summary.summarize(TINY.clone(dtype="bfloat16"), (16, 16, 3), batch_size=8)
    assert counted.output_bytes == 8 * 2 * sum(np.prod(row.shape) for row in counted.rows)
    summary.show("tiny", counted)
    text = capsys.readouterr().out
    assert text.count("Conv 3x3") == 7
    assert f"parameters {counted.parameters:,}; running statistics {counted.statistics:,}" in text
    assert f"multiply-adds {counted.macs:,} for one image" in text
    assert f"outputs of these layers {counted.output_bytes / 1e6:,.1f} MB for the batch" in text


def test_the_command_prints_a_named_network(capsys):
    command(["summary", "resnet50", "--parts", "--batch-size", "32"])
    text = capsys.readouterr().out
    assert "parameters 25,557,032; running statistics 53,120" in text
    assert "(4.089 G;" in text
    assert "stage4_block3" in text
    command(["summary", "resnet20", "--no-top", "--input-shape", "8", "8", "1", "--parts"])
    text = capsys.readouterr().out
    assert "head" not in text
    assert "input 8x8x1" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["resnt50"], "network 'resnt50' is not known (did you mean 'resnet50'?)"),
        (["resnet50", "--batch-size", "0"], "--batch-size=0: expected 1 or more"),
        (["resnet50", "--dtype", "int8"], "dtype 'int8': expected one such as float32"),
        (["mini", "--no-top"], "mini has no field 'include_top'"),
    ],
)
def test_bad_input_is_one_line(argv, message, call):
    assert_one_line_error(call("summary", *argv), message)


def test_names_are_listed(capsys):
    command(["names"])
    names = capsys.readouterr().out.split()
    assert {"resnet50", "ResNet152V2", "wrn_28_10", "mini"} <= set(names)
    assert all(create(name) for name in names)
    command(["names", "--weights"])
    tags = dict(line.partition(" ")[::2] for line in capsys.readouterr().out.splitlines())
    assert list(tags) == names
    assert set(tags["resnet50"].split()) == {"tv_v1", "tv_v2", "keras", "hf"}
    assert tags["resnet20"] == ""
