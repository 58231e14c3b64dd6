"""The lines that people read."""

from dataclasses import replace

import before
import bench_step
from bench_attention import ON_A_GPU
from tables import Measurement, append, kernel_lines, rate_lines, read, sections, step_lines

INFO = {
    "alike": True,
    "share_of_floor": None,
    "absent": {},
}


def row(contender, us, group="attention forward", **info):
    return Measurement(group=group, median=us / 1e6, info=INFO | {"contender": contender} | info)


def test_a_line_has_ours_the_floor_the_best_peer_and_all_peers_from_fast_to_slow():
    rows = [
        row("ours", 48.0, share_of_floor=0.752, floor_us=36.1),
        row("flash", 90.0),
        row("no gradient", 40.0, alike=False),
        row("cuDNN", 72.0),
        row("eager", 20_000.0),
    ]
    heading, line = kernel_lines(rows)
    assert heading.split() == ["ours", "floor", "of", "floor", "0.3.0", "/", "best", "peers"]
    assert line == (
        "attention forward    48.0 us    36.1 us      75%          -   1.50  "
        "(no gradient 40.0 us), cuDNN 72.0 us, flash 90.0 us, eager 20.0 ms"
    )


def test_a_line_has_what_ours_was_on_that_card():
    group = "attention backward 256×197×12×64"

    def line(card):
        return kernel_lines([row("ours", 340.0, group=group, card=card)])[1].removeprefix(group).split()

    assert line("NVIDIA H100 80GB HBM3") == ["340.0", "us", "-", "-", "697.3", "us", "-"]
    assert line("NVIDIA H200") == ["340.0", "us", "-", "-", "-", "-"]


def test_a_step_s_line_has_what_ours_was_on_that_card():
    (line,) = step_lines([replace(step("ours", 50.0, card="NVIDIA H100 80GB HBM3"), group="ViT-B/16 224, batch 256")])
    assert "0.3.0: 3585.3" in line


def test_what_was_measured_is_named_as_the_benchmarks_name_it_now():
    titles = {f"attention {direction} {'×'.join(map(str, shape))}" for shape in ON_A_GPU for direction in ("forward", "backward")}
    known = before._all(before.RESULTS / "nvidia-h100-80gb-hbm3")
    assert titles <= known.keys()
    assert {rivals.title for rivals in bench_step.ON_A_GPU} & known.keys() == {"ViT-B/16 224, batch 256"}
    assert len(known.keys() & before.LAYERS.keys()) == 6


def test_a_group_without_ours_or_without_peers_has_a_line_too():
    assert kernel_lines([row("eager", 72.0)])[1].split(maxsplit=7)[2:] == ["-", "-", "-", "-", "-", "eager 72.0 us"]
    assert kernel_lines([row("ours", 72.0)])[1].split()[2:] == ["72.0", "us", "-", "-", "-", "-"]
    assert kernel_lines([]) == []


def test_who_is_absent_is_told_by_reason_and_by_group_where_it_was_there_for_another():
    rows = [
        row("ours", 1.0, absent={"Liger": "not installed", "xformers": "not installed", "cuDNN": "no kernel"}),
        row("ours", 1.0, group="MLP", absent={"Liger": "not installed"}),
        row("cuDNN", 1.0, group="MLP"),
    ]
    assert kernel_lines(rows)[-2:] == ["absent, not installed: Liger, xformers", "absent, no kernel: cuDNN (attention forward)"]


def test_rates_are_compared_with_ours():
    rows = [
        Measurement(group="images", median=2.0, info={"contender": name, "amount": amount, "unit": "images"})
        for name, amount in (("ours", 400), ("Pillow", 100))
    ]
    ours, other = rate_lines(rows)
    assert ours.split() == ["images", "ours", "200.0", "images/s"]
    assert other.endswith("50.0 images/s  ours / it = 4.00")


def test_a_rate_s_note_ends_its_line():
    rows = [Measurement(group="plan", median=2.0, info={"contender": "ours", "amount": 10, "unit": "steps", "note": "at most 3 MiB"})]
    assert rate_lines(rows)[0].endswith("5.0 steps/s  at most 3 MiB")


STEP = {
    "kind": "step",
    "amount": 256,
    "unit": "images",
    "mfu": 0.5,
    "peak_gib": 20.0,
    "note": "",
    "absent": {},
}


def step(contender, ms, **info):
    return Measurement(group="ViT-B", median=ms / 1e3, info=STEP | {"contender": contender} | info)


def test_a_step_has_a_line_for_each_contender_ours_first():
    rows = [
        step("timm", 90.0, mfu=0.35),
        step("timm torch.compile", 60.0, note="SDPA cuDNN", absent={}),
        step("ours eager", 45.0),
        step("ours", 50.0, absent={"HF ViT": "not installed"}),
    ]
    ours, *others, absent = step_lines([rows[3], *rows[:3]])
    assert ours.split(maxsplit=4)[:3] == ["ViT-B", "ours", "5120.0"]
    assert ours.endswith("MFU 50.0%, 20.0 GiB")
    assert [line.split()[1:3] for line in others] == [["ours", "eager"], ["timm", "torch.compile"], ["timm", "2844.4"]]
    assert others[1].endswith("images/s  ours / it = 1.20, MFU 50.0%, 20.0 GiB, SDPA cuDNN")
    assert absent == "absent, not installed: HF ViT"


def test_a_cpu_has_neither_mfu_nor_memory():
    assert step_lines([step("ours", 50.0, mfu=None, peak_gib=None)])[0].endswith("5120.0 images/s")


def test_each_kind_of_measurement_has_its_table():
    rate = Measurement(group="images", median=2.0, info={"contender": "ours", "amount": 4, "unit": "images"})
    titles = [title for title, _ in sections([rate, row("ours", 48.0), step("ours", 50.0)])]
    assert titles == ["rates (median)", "kernels (median)", "training steps (median)"]
    assert sections([]) == []


def test_a_contender_is_compared_with_ours_of_its_own_race():
    rows = [row("ours", 50.0, race="first"), row("eager", 100.0, race="first")]
    rows += [
        row("torch.compile", 99.0, race="compiled"),
        row("eager", 101.0, race="compiled"),
        row("ours", 60.0, race="compiled", absent={"Liger": "not installed"}),
    ]
    _, line, absent = kernel_lines(rows)
    assert line.split()[2:] == ["50.0", "us", "-", "-", "-", "1.65", "torch.compile", "99.0", "us,", "eager", "100.0", "us"]
    assert absent == "absent, not installed: Liger"
    steps = [step("ours", 50.0, race="first"), step("ours", 60.0, race="compiled"), step("timm torch.compile", 66.0, race="compiled")]
    assert "ours / it = 1.10" in step_lines(steps)[1]


def test_what_was_appended_is_read_but_for_a_line_that_was_cut(tmp_path):
    path = tmp_path / "measurements.jsonl"
    assert read(path) == []
    rows = [row("ours", 48.0), step("ours", 50.0)]
    for one in rows:
        append(path, one, [one.median] * 3)
    whole = path.read_text()
    assert read(path) == rows
    path.write_text(whole + whole.splitlines()[0][:40])
    assert read(path) == rows
    assert sections(read(path)) == sections(rows)
