import math

import numpy as np
import pytest
from scipy import stats

from flax_resnet.studies import tables


def rows(values, state="finished"):
    """A row for each {variant: top-1 by seed}."""
    return [
        {"variant": v, "seed": seed, "state": state, "top1": top1, "train_top1": 0.5, "loss": 1.0}
        for v, own in values.items()
        for seed, top1 in enumerate(own)
    ]


def test_pairs_are_by_seed_and_what_has_no_pair_is_left_out():
    got = tables.paired_test({0: 1.0, 1: 5.0, 7: 9.0}, {1: 4.0, 0: 3.0, 2: 0.0})
    assert (got["n"], got["difference"]) == (2, -0.5)


def test_no_p_where_there_is_nothing_to_test():
    for a, b in [({0: 1.0}, {0: 2.0}), ({0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0}), ({}, {})]:
        assert math.isnan(tables.paired_test(a, b)["p"])


def test_holm_is_the_step_down_correction():
    # By hand: 0.01 * 4, then max(0.04, 0.02 * 3), max(0.06, 0.03 * 2), max(0.06, 0.5).
    assert tables.holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert tables.holm([0.9, math.nan, 0.8])[::2] == pytest.approx([1.0, 1.0])


def test_the_table_has_a_line_for_each_variant():
    table = rows({"plain": [0.70, 0.72, 0.71], "residual": [0.80, 0.83, 0.80]})
    lines = tables.markdown(table, "plain").splitlines()
    assert lines[0] == (
        "| variant | n | evaluation error (%) | training error (%) | evaluation loss (nats) | "
        "against | difference | p |"
    )
    assert lines[2] == "| plain | 3 | 29.00 ± 1.00 | 50.00 ± 0.00 | 1.000 ± 0.000 |  |  |  |"
    p = stats.ttest_rel([0.30, 0.28, 0.29], [0.20, 0.17, 0.20]).pvalue
    d = np.array([-10.0, -11.0, -9.0])
    width = stats.t.ppf(0.975, 2) * d.std(ddof=1) / math.sqrt(3)
    assert lines[3] == (
        "| residual | 3 | 19.00 ± 1.73 | 50.00 ± 0.00 | 1.000 ± 0.000 | "
        f"plain | -10.00 ± {width:.2f} | {p:.2g} |"
    )


def test_what_failed_is_said_and_not_counted():
    table = [*rows({"a": [0.5, 0.7]}), *rows({"b": [0.1]}, "failed: no such file")]
    text = tables.markdown(table, "a")
    assert "| b | 0 of 1 | - | - | - | a | - | - |" in text
    assert "comparisons: 0." in text
    assert "Not finished: b/seed0: failed: no such file." in text


def test_each_may_have_a_reference_of_its_own(rng):
    values = {name: rng.normal(0.8, 0.01, 4) for name in ("p20", "r20", "p56", "r56")}
    text = tables.markdown(rows(values), {"r20": "p20", "r56": "p56"})
    lines = {line.split(" | ")[0][2:]: line.split(" | ")[5:] for line in text.splitlines()[2:6]}
    assert lines["p20"][0] == lines["p56"][0] == ""
    ps = [stats.ttest_rel(-values[f"r{d}"], -values[f"p{d}"]).pvalue for d in (20, 56)]
    want = tables.holm(ps)
    for depth, p in zip((20, 56), want, strict=True):
        assert lines[f"r{depth}"][0] == f"p{depth}"
        assert lines[f"r{depth}"][2] == f"{p:.2g} |"


def test_what_is_written_is_read(tmp_path):
    table = rows({"a,b": [0.25]})
    tables.write(table, tmp_path)
    (got,) = tables.read(tmp_path)
    assert got == {k: str(v) for k, v in table[0].items()}
    assert (tmp_path / "table.md").read_text() == tables.markdown(table)
