"""The benchmark that says where a step's time goes."""

import json

import pytest
from helpers import line_of_bad_input, tiny_resnet

from experiments.benchmarks import step_profile, steps

BACK = 'metadata={op_name="jit(f)/transpose(jvp(N))/conv"}'
PROGRAM = f"""
  %conv.1 = f32[4,8,8,5]{{3,2,1,0}} convolution(%x, %k), window={{size=3x3}}, dim_labels=b01f_01io->b01f
  ROOT %conv.2 = f32[4,8,8,5]{{3,2,1,0}} convolution(%g, %k), window={{size=3x3}}, dim_labels=b01f_01oi->b01f, {BACK}
  %conv.3 = f32[5,3,3,5]{{3,2,1,0}} convolution(%x, %g), window={{size=8x8}}, dim_labels=b01f_01io->b01f, {BACK}
  %dot.4 = f32[8,8]{{1,0}} dot(%x, %g), lhs_contracting_dims={{0}}
  %transpose_copy_fusion.5 = f32[8,8]{{0,1}} fusion(%x), kind=kLoop, calls=%f
  %reduce_fusion = f32[8]{{0}} fusion(%x), kind=kInput, calls=%g
  %loop_add_fusion = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%h
"""  # noqa: E501


def test_instructions_are_of_the_kind_that_they_are():
    assert step_profile.kinds(PROGRAM) == {
        "conv.1": "convolution",
        "conv.2": "gradient by input",
        "conv.3": "gradient by kernel",
        "dot.4": "product",
        "transpose_copy_fusion.5": "transposes",
        "reduce_fusion": "sums",
        "loop_add_fusion": "values",
    }


def test_an_operation_lasts_until_its_end_is_told():
    events = [(5.0, 0.5, "b"), (1.0, 0.1, "a"), (4.0, 0.0, "end: a"), (11.0, 0.1, "a")]
    assert sorted(step_profile.spans([*events, (12.0, 0.0, "end: a")])) == [
        (1.0, 4.0, "a"),
        (4.0, 4.0, "end: a"),
        (5.0, 5.5, "b"),
        (11.0, 12.0, "a"),
        (12.0, 12.0, "end: a"),
    ]


def test_what_is_under_way_at_once_shares_the_time():
    done = [(0.0, 4.0, "a"), (2.0, 4.0, "b"), (3.0, 4.0, "c"), (6.0, 7.0, "b"), (0.0, 9.0, "x")]
    found = step_profile.shared(done, {"a": "values", "b": "sums", "c": "sums"}, count=2)
    assert found["values"] == pytest.approx((2 + 1 / 2 + 1 / 3) / 2)
    assert found["sums"] == pytest.approx((1 / 2 + 2 / 3 + 1) / 2)
    assert sum(found.values()) == pytest.approx(5 / 2)


@pytest.mark.slow
def test_a_step_is_traced(monkeypatch, capfd):
    monkeypatch.setattr(steps.models, "create", lambda name, **fields: tiny_resnet(**fields))
    step_profile.main([
        "--models", "resnet20", "--image-size", "16", "--batch-size", "64", "--steps", "2",
        "--rounds", "1", "--peak-size", "64",
    ])  # fmt: skip
    row = json.loads(capfd.readouterr().out)
    spent = row["kind_seconds"]
    assert list(spent) == list(step_profile.KINDS)
    for kind in ("convolution", "gradient by kernel", "values"):
        assert spent[kind] > 0
    assert sum(spent.values()) < 10 * row["step_seconds"]["most"]  # the profiler slows it
    assert row["floor_seconds"] > 0


def test_bad_input_is_one_line(capfd):
    said = line_of_bad_input(step_profile.main, ["--models", "resnet21"], capfd)
    assert "resnet21" in said
