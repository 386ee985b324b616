"""The benchmark measures what it says, and stops where the numbers are wrong."""

import math
import sys

import jax
import pytest
import speed

# Parameter and gradient are read, the parameter and each buffer are written.
BYTES_MOVED = {
    "plain": 20,
    "momentum": 28,
    "centered + momentum": 36,
    "bfloat16 nu": 16,
    "uint8 nu": 14.1,
    "bfloat16 nu and momentum": 20,
}


def test_tables_have_every_row(monkeypatch, capsys, lenient):
    many_leaves, first_use = speed.many_leaves, speed.first_use
    monkeypatch.setattr(sys, "argv", ["speed", "--quick"])
    monkeypatch.setattr(speed, "trees", lambda quick: {"one": [(256, 256)] * quick})
    monkeypatch.setattr(speed, "transformer", lambda *_: [(8, 8)] * 6)
    monkeypatch.setattr(speed, "many_leaves", lambda *_: many_leaves(3, 1))
    monkeypatch.setattr(speed, "first_use", lambda *_: first_use(6, 2, 1, 64, 1))
    speed.main()
    first, _, *rest = capsys.readouterr().out.splitlines()
    assert f"jax {jax.__version__}" in first and "GB/s" in first
    steps, others = rest[2 : 2 + len(BYTES_MOVED)], rest[5 + len(BYTES_MOVED) :]
    for row, (expected_name, expected) in zip(steps, BYTES_MOVED.items(), strict=True):
        name, _, wide, optax, _, _, moved, share, temporary = row[2:-2].split(" | ")
        assert name == expected_name
        assert float(moved) == pytest.approx(expected, abs=0.2)
        assert float(optax) > 0 and float(share) > 0
        small = name in speed.SMALL
        assert float(wide) > 0 if small else wide == "-"
        # A donated step needs no memory beside its arguments.
        assert small or temporary == "0"
    ratios = [float(row.split("|")[-2]) for row in others]
    assert len(ratios) == 3 * len(speed.OPTIONS) + 6 and min(ratios) > 0


def test_trees_have_the_sizes_that_they_are_named_after():
    trees = speed.trees(quick=False)
    assert [sum(map(math.prod, shapes)) for shapes in trees.values()] == [
        *(4096**2, 100 * 409**2, 128 * 128 * (65 + 48 * 12) + 256 + 48 * 1664),
        16384**2,
    ]
    assert len(trees["580 mixed"]) == 580


def test_a_wrong_step_is_not_timed():
    params, grads = speed.problem([(4,)] * 2)
    wrong = jax.tree.map(lambda p: p * 1.001, params)
    with pytest.raises(AssertionError):
        speed.check(wrong, params, grads, False)


def test_runs_take_turns_and_are_prepared_anew():
    events = []
    runs = {name: lambda name=name: events.append(name) for name in "ab"}
    prepare = lambda run: events.append("prepared") or run
    found = speed.interleaved(runs, 3, prepare)
    assert events == 4 * ["prepared", "a", "prepared", "b"]
    assert found.keys() == {"a", "b"} and min(found.values()) > 0
