"""After the timings, a table of rates: how many times as fast ours is as each peer of its group."""

from collections import defaultdict


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    groups = defaultdict(list)
    for bench in session.benchmarks if session else []:
        if bench.has_error or "amount" not in bench.extra_info:
            continue
        groups[bench.group].append(
            (bench.extra_info["contender"], bench.extra_info["amount"] / bench.stats.median, bench.extra_info["unit"])
        )
    if not groups:
        return
    terminalreporter.section("rates (median)")
    for group, rows in groups.items():
        ours = next((rate for contender, rate, _ in rows if contender == "ours"), None)
        for contender, rate, unit in rows:
            ratio = f"  ours / it = {ours / rate:.2f}" if ours and contender != "ours" else ""
            terminalreporter.write_line(f"{group:24} {contender:28} {rate:10.1f} {unit}/s{ratio}")
