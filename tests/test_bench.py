"""The benchmark measures what it says, and fails where the numbers are wrong."""

import math
import sys

import jax
import numpy as np
import pytest

from rmsprop_jax import bench


def test_it_prints_a_table_with_every_row(monkeypatch, capsys, lenient):
    monkeypatch.setattr(sys, "argv", ["bench", "--quick"])
    monkeypatch.setattr(bench, "trees", lambda quick: {"one": [(256, 256)] * quick})
    few = bench.many_leaves
    monkeypatch.setattr(bench, "many_leaves", lambda name, *_: few(name, 5, 3))
    bench.main()
    table = [x for x in capsys.readouterr().out.splitlines() if x.startswith("|")]
    assert len(table) == 2 + 6 + 3 * 3
    assert len({line.count("|") for line in table}) == 1
    for row in table[2:8]:
        _, _, wide, optax, _, _, moved, share, temporary = (
            cell.strip() for cell in row.strip("|").split("|")
        )
        assert float(optax) > 0 and float(share) > 0
        small = "bfloat16" in row or "uint8" in row
        assert float(wide) > 0 if small else wide == "-"
        # A donated step needs no memory beside its arguments.
        assert small or temporary == "0"
        assert float(moved) == pytest.approx(MOVED[row.split("|")[1].strip()], abs=0.2)


MOVED = {
    "step, plain": 20,
    "step, momentum": 28,
    "step, centered + momentum": 36,
    "step, bfloat16 nu": 16,
    "step, uint8 nu": 19.1,
    "step, bfloat16 nu and momentum": 20,
}


def test_trees_are_what_their_names_say():
    trees = bench.trees(quick=False)
    assert [sum(map(math.prod, shapes)) for shapes in trees.values()] == [
        *(4096**2, 100 * 409**2, 128 * 128 * (65 + 48 * 12) + 256 + 48 * 1664),
        16384**2,
    ]
    assert len(trees["580 mixed"]) == 580


def test_a_wrong_step_is_not_timed():
    params, grads = bench.arrays([(4,)] * 2, 0), bench.arrays([(4,)] * 2, 1)
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
