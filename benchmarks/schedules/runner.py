"""Runs many `RunSpec`s at once, as many as there are cores; skips those whose results are there, and can be stopped and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from conditions import RunSpec
from one_run import Assignment
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

HERE = Path(__file__).parent


@dataclass
class Runner:
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
        failed: list[RunSpec] = []
        with Progress(*columns, console=console) as progress, ThreadPoolExecutor(self.workers) as pool:
            bar = progress.add_task(title, total=len(specs), completed=len(specs) - len(left))
            futures: dict[Future[int], RunSpec] = {pool.submit(self._run, spec): spec for spec in left}
            try:
                pending = set(futures)
                while pending:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        spec, code = futures[future], future.result()
                        progress.advance(bar)
                        if code:
                            failed.append(spec)
                            console.print(
                                f"{spec.name}: exit code {code}; {self.work / self.form / spec.stage / spec.name}.log has the reason"
                            )
            except KeyboardInterrupt:
                self._stop()
                for future in futures:
                    future.cancel()
                raise
        return failed

    def _run(self, spec: RunSpec) -> int:
        folder = self.work / self.form / spec.stage / spec.name
        folder.parent.mkdir(parents=True, exist_ok=True)
        assignment = Assignment(spec, self.form, self.device, self.find_results(spec).absolute(), folder.absolute(), _keeps_weights(spec))
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
