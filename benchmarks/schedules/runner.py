"""Runs many `RunSpec`s at once, as many as there are cores; skips those whose results are there, and can be stopped and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from assignment import Assignment
from conditions import RunSpec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

HERE = Path(__file__).parent


@dataclass
class RunPool:
    """Where runs keep their files, and how many run at once."""

    form: str
    device: str
    results: Path
    work: Path
    workers: int
    processes: set[subprocess.Popen[bytes]] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_stopped: bool = False

    def find_results(self, spec: RunSpec) -> Path:
        """The file of results of a run."""
        return self.results / self.form / spec.stage / f"{spec.name}.jsonl"

    def run_all(self, specs: Sequence[RunSpec], title: str) -> list[RunSpec]:
        """Run those that have no results yet; returns the ones that failed. Ctrl-C stops all, which then can go on later."""
        left = [spec for spec in specs if not self.find_results(spec).is_file()]
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress, ThreadPoolExecutor(self.workers) as pool:
            bar = progress.add_task(title, total=len(specs), completed=len(specs) - len(left))
            futures = {pool.submit(self._run, spec): spec for spec in left}
            failed: list[RunSpec] = []
            try:
                for future in as_completed(futures):
                    progress.advance(bar)
                    if future.result():
                        failed.append(futures[future])
                        console.print(f"{futures[future].name} failed: {self._find_reason(futures[future])}", soft_wrap=True)
            except KeyboardInterrupt:
                self._stop()
                for future in futures:
                    future.cancel()
                raise
        return failed

    def _find_folder(self, spec: RunSpec) -> Path:
        """Its run folder, next to which its log lies."""
        return (self.work / self.form / spec.stage / spec.name).absolute()

    def _find_reason(self, spec: RunSpec) -> str:
        log = Path(f"{self._find_folder(spec)}.log")
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{lines[-1] if lines else 'it said nothing'} ({log})"

    def _run(self, spec: RunSpec) -> int:
        folder = self._find_folder(spec)
        folder.parent.mkdir(parents=True, exist_ok=True)
        assignment = Assignment(spec, self.form, self.device, self.find_results(spec).absolute(), folder, _keeps_weights(spec))
        todo = folder.with_suffix(folder.suffix + ".json")
        todo.write_text(assignment.to_json())
        # One thread: the other cores have other runs. No thread of a pool spins while it waits.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        with open(f"{folder}.log", "ab") as log:
            with self.lock:
                if self.is_stopped:
                    return 1
                command = [sys.executable, str(HERE / "one_run.py"), str(todo)]
                process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
                self.processes.add(process)
            code = process.wait()
        with self.lock:
            self.processes.discard(process)
        return code

    def _stop(self) -> None:
        with self.lock:
            self.is_stopped = True
            for process in self.processes:
                process.send_signal(signal.SIGTERM)


def _keeps_weights(spec: RunSpec) -> bool:
    """The first weighted run is the model that is published."""
    return spec.stage == "table" and spec.condition.name == "weighted" and spec.seed == 1
