"""The candidates of every case on every card."""

import itertools

import pytest
import tune
from candidates import CASES, candidates, key_chunks, label, neighbours

from polyvit_kernels.tiles import ANY
from polyvit_kernels.tiles.table import TABLE

ARCHS = (80, 86, 89, 90, 100, 120)
ALL = [case for cases in CASES.values() for case in cases]


@pytest.mark.parametrize("arch", ARCHS)
def test_the_row_in_use_comes_first_and_no_row_twice(arch):
    for case in ALL:
        in_use = tune.row_in_use(case, arch)
        rows = candidates(case, in_use, arch)
        assert rows[0] == in_use
        assert len(set(map(label, rows))) == len(rows) > 2


@pytest.mark.parametrize("arch", ARCHS)
def test_candidates_have_the_constants_that_the_kernels_want(arch):
    for case in ALL:
        wanted = {frozenset(row.blocks) for row in TABLE if row.op == case.op and row.backend == "triton"}
        for row in candidates(case, tune.row_in_use(case, arch), arch):
            if row.op == case.op and row.backend == "triton" and case.op != "attention":
                assert frozenset(row.blocks) in wanted
                assert row.num_warps in (1, 2, 4, 8, 16)


def test_a_case_is_one_class_of_the_table_and_the_measured_call_is_in_it():
    for case in ALL:
        tokens, features = case.question()
        assert case.tokens[0] <= tokens <= case.tokens[1]
        assert features <= case.features
    assert len({(case.op, case.tokens, case.features) for case in ALL}) == len(ALL)


@pytest.mark.parametrize("op", ["attention", "attention_long_forward", "attention_long_backward"])
def test_lengths_beyond_the_short_ones_have_a_case_each(op):
    ranges = sorted(case.tokens for case in ALL if case.op == op)
    assert ranges[-1][1] == ANY
    assert all(before[1] + 1 == after[0] for before, after in itertools.pairwise(ranges))


@pytest.mark.parametrize("tokens", [(1, 64), (65, 128), (129, 144), (193, 208), (209, 256)])
def test_chunks_of_keys_hold_the_longest_row_and_only_the_last_is_masked(tokens):
    found = set(key_chunks(tokens))
    for chunks in itertools.product((0, 16, 32, 64, 128, 256), repeat=3):
        used = [size for size in chunks if size]
        holds = sum(used) >= tokens[1] and sum(used[:-1]) < tokens[0]
        falls = list(chunks) == sorted(chunks, reverse=True)
        assert (chunks in found) == bool(used and holds and falls)


def test_kernels_for_hopper_are_tried_there_alone_with_other_limits_of_registers():
    for case in ALL:
        fitting = [row for row in TABLE if row.op == case.op and row.backend == "hopper" and row.fits(*case.question())]
        tried = [row for row in candidates(case, tune.row_in_use(case, 90, portable=True), 90) if row.backend == "hopper"]
        assert {frozenset(row.blocks) for row in tried} == {frozenset(row.blocks) for row in fitting}
        assert not fitting or {row.max_registers for row in tried} >= {None, 128, 168}
        assert not [row for row in candidates(case, tune.row_in_use(case, 100), 100) if row.backend == "hopper"]
    ops = {case.op for case in ALL for row in candidates(case, tune.row_in_use(case, 90), 90) if row.backend == "hopper"}
    assert ops >= {"attention_short_forward", "attention_short_backward", "linear_gelu_forward", "linear_add_forward", "dgelu_backward"}


def test_short_rows_without_a_row_of_their_own_have_a_case_of_the_long_backward():
    assert (129, 256) in [case.tokens for case in CASES["attention"] if case.op == "attention_long_backward"]


def test_neighbours_differ_in_one_thing():
    for case in ALL:
        row = tune.row_in_use(case, 90)
        for other in neighbours(case, row):
            assert (other.num_stages != row.num_stages) + sum(other.blocks[name] != row.blocks[name] for name in row.blocks) == 1
            assert other.num_warps == row.num_warps
