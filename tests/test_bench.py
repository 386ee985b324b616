"""The benchmark measures what it says, and fails where the numbers are wrong."""

import sys

import jax
import numpy as np
import pytest

from rmsprop_jax import bench


def test_quick_prints_a_table_with_every_row(monkeypatch, capsys, lenient):
    monkeypatch.setattr(sys, "argv", ["bench", "--quick"])
    bench.main()
    table = [x for x in capsys.readouterr().out.splitlines() if x.startswith("|")]
    assert len(table) == 2 + 2 * 3 + 3 * 3
    assert len({line.count("|") for line in table}) == 1
    for row in table[2:8]:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert float(cells[2]) > 0
        assert cells[6] == "0", "a donated step needs no memory beside its arguments"


def test_a_wrong_step_is_not_timed():
    params, grads = bench.arrays(2, (4,), 0), bench.arrays(2, (4,), 1)
    wrong = [jax.tree.map(lambda p: p * 1.001, params)]
    with pytest.raises(AssertionError):
        bench.check(wrong, params, grads, False)


def test_the_median_of_each_task_is_returned():
    counts = dict(a=0, b=0)

    def task(name):
        def run():
            counts[name] += 1

        return lambda: run

    found = bench.interleaved({name: task(name) for name in counts}, 3)
    assert counts == dict(a=5, b=5)
    assert np.isfinite(list(found.values())).all()
