"""Which row wins, and which may not take part: rows are launched in Triton's interpreter, and compiled for a card that is not here."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lab
import pytest
import torch
import tune
from candidates import CASES, label
from compare import DEVICE
from contest import Crew, Lengths, choose, hold
from lab import LostCardError

from polyvit_kernels.tiles import Tile

BENCHMARKS = Path(tune.__file__).parent
ALL = [(family, case) for family, cases in CASES.items() for case in cases]
OPS = sorted({case.op for _, case in ALL})
WITHOUT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


class Alone(Crew):
    """Does in this process what the others do in theirs."""

    def ask(self, function, job, rows, refused, *rest):
        rows = [row for row in rows if label(row) not in refused]
        return function(job, rows, *rest) if rows else {}


def small_job(op):
    """In the interpreter's dtype, or in a card's."""
    family, case = next((family, case) for family, case in ALL if case.op == op)
    job = tune.job_of(case, family, (), is_small=True)
    return replace(job, dtype=tune.job_of(case, family, (), is_small=False).dtype) if DEVICE.type == "cuda" else job


def test_the_fastest_wins_but_a_row_in_use_gives_way_for_one_percent_only():
    seconds = {"a": [3.0, 2.0, 9.0], "b": [1.0, 1.0, 7.0], "c": [1.009, 1.009, 1.0]}
    assert choose(seconds, in_use="a") == ["b", "c", "a"]
    assert choose(seconds, in_use="c") == ["c", "b", "a"]
    assert choose(seconds | {"c": [1.02]}, in_use="c") == ["b", "c", "a"]
    assert choose(seconds, in_use="refused") == ["b", "c", "a"]
    assert choose({}, in_use="a") == []


@pytest.mark.parametrize("op", OPS)
def test_rows_in_use_are_right(op):
    job = small_job(op)
    row = tune.row_in_use(job.case, 90, portable=DEVICE.type != "cuda")
    assert lab.judge(job, [row]) == {label(row): ""}


def test_a_row_that_leaves_keys_out_is_refused():
    job = small_job("attention_short_forward")
    right = tune.row_in_use(job.case, 90, portable=True)
    wrong = replace(right, blocks={**right.blocks, "KEYS_1": 0, "KEYS_2": 0})
    reasons = lab.judge(job, [right, wrong])
    assert reasons[label(right)] == ""
    assert "out: error" in reasons[label(wrong)]


def test_a_row_that_lacks_a_constant_is_refused():
    job = small_job("sgd_update")
    broken = Tile(op="sgd_update", archs=(), blocks={"BLOCKS": 4})
    assert "KeyError" in lab.judge(job, [broken])[label(broken)]
    assert "KeyError" in lab.times(job, [broken], 1, 1)[label(broken)]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="in the interpreter a lap is slow enough to be told from another")
def test_a_case_is_decided_by_times_among_right_rows():
    job = replace(small_job("sgd_update"), size=(16_000,))
    slow, wrong = (Tile(op="sgd_update", archs=(), blocks={"BLOCK": block}) for block in (512, 3))
    with Alone(90) as crew:
        outcome = hold(job, slow, crew, Lengths(first=(1, 1), last=(2, 1), candidates=5), check_budget=False)
        assert outcome.new is not None
        assert outcome.us(outcome.new) == min(filter(None, map(outcome.us, [outcome.new, slow])))
        assert outcome.new.blocks["BLOCK"] > 512
        # A row in use that is wrong (a block must be a power of two) is replaced.
        replaced = hold(job, wrong, crew, Lengths(first=(1, 1), last=(1, 1), candidates=2), check_budget=False)
    assert label(wrong) in replaced.refused
    assert replaced.new is not None
    assert replaced.old == wrong


def lose_the_card(job, rows):
    if len(rows) > 1:
        raise LostCardError(job.case.op, label(rows[-1]), "an illegal address")
    return dict.fromkeys(map(label, rows), "")


def end_the_process(job, rows):
    os._exit(1)


def test_a_row_after_which_the_card_is_lost_is_left_out_and_the_others_go_on():
    job, refused = small_job("sgd_update"), {}
    rows = [Tile(op="sgd_update", archs=(), blocks={"BLOCK": block}) for block in (512, 1024)]
    with Crew(90) as crew:
        assert crew.ask(lose_the_card, job, rows, refused) == {label(rows[0]): ""}
        assert refused == {label(rows[1]): "the card was lost: an illegal address"}
        assert crew.ask(end_the_process, job, rows, refused) == {}
    assert "the process was lost" in refused[label(rows[0])]


COMPILING = """
import card, torch, triton
from triton.backends.compiler import GPUTarget

class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

triton.runtime.driver.set_active(Driver())
import lab, tune
from candidates import CASES, label
from dataclasses import replace
from triton.compiler.compiler import get_cache_key, make_backend
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.runtime.jit import JITFunction

case = CASES["attention"][0]
job = lab.Job(case=case, size=(1, 197, 1, 64), sample=(1, 197, 1, 64), dtype=torch.bfloat16)
good, in_gluon = (tune.row_in_use(case, 90, portable=portable) for portable in (True, False))
free = replace(in_gluon, max_registers=None)
bad = replace(good, blocks={**good.blocks, "BLOCK_M": 128, "KEYS_0": 256, "KEYS_1": 0, "KEYS_2": 0})
asked = lab.requests(job, [good, free, bad, in_gluon])
for row in (good, free, bad):
    print(lab.compile_apart(asked[label(row)][0], 90) or "compiles")
backend, variables = make_backend(Driver.get_current_target()), get_cache_invalidating_env_vars()

def key(fn, signature, constants, attributes, options):
    return get_cache_key(fn.ASTSource(fn, signature, constants, attributes), backend, backend.parse_options(options), variables)

def launch(self, _, signature, device, constants, options, attributes, warmup):
    keys.append(key(self, signature, constants, attributes, dict(options.__dict__)))
    asked_for = {"num_warps": request.num_warps, "num_stages": request.num_stages, "maxnreg": request.max_registers}
    keys.append(key(self, dict(request.signature), dict(request.constants), dict(request.attributes), asked_for))

JITFunction._do_compile = launch
for row in (good, in_gluon):
    request, keys = asked[label(row)][0], []
    lab.TRIALS[case.op].run(lab.inputs_of(case.op, job.size, job.dtype), row)
    print(keys[0] == keys[1])
"""


def test_what_is_compiled_beforehand_is_what_a_launch_looks_for_and_spills_are_refused(tmp_path):
    script = tmp_path / "compiling.py"
    script.write_text(COMPILING)
    env = WITHOUT | {"PYTHONPATH": str(BENCHMARKS), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env)
    assert not done.returncode, done.stderr
    good, in_gluon, bad, *same_keys = done.stdout.splitlines()
    assert good == in_gluon == "compiles"
    assert bad.startswith("spills: ")
    assert same_keys == ["True", "True"]


def test_the_budget_is_that_of_the_ahead_of_time_compilation(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    good, in_gluon = (tune.row_in_use(CASES["attention"][0], 90, portable=portable) for portable in (True, False))
    bad = replace(good, blocks={**good.blocks, "BLOCK_M": 128, "KEYS_0": 256, "KEYS_1": 0, "KEYS_2": 0})
    with Crew(90) as crew:
        assert crew.excesses(good, "bf16") == crew.excesses(in_gluon, "bf16") == []
        assert any("spill stores" in excess for excess in crew.excesses(replace(in_gluon, max_registers=96), "bf16"))
        assert any("spill stores" in excess for excess in crew.excesses(bad, "bf16"))


def test_the_dtype_of_a_case_is_the_interpreters_or_the_cards():
    case = CASES["mlp"][0]
    assert tune.job_of(case, "mlp", (), is_small=True).dtype is torch.float32
    assert tune.job_of(case, "mlp", (), is_small=False).dtype is torch.bfloat16
    assert tune.job_of(case, "mlp", (), is_small=False).sample == (1_500, 768, 3072)
    assert tune.job_of(CASES["update"][0], "update", (), is_small=False).dtype is torch.float32
