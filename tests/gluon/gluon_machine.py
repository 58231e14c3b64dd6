"""The part of a Hopper SM that `gluon_executor` needs: partitions, TMA, wgmma, mbarriers and shared memory, with who may see what when.

One partition runs at a time. At every step that others can see, it is decided at random whether it goes on, another one does, or a TMA copy
arrives; where nothing can go on, that is a deadlock, reported with what each partition waits for. The same seed repeats a run.

Data races are found whatever the order was: every access to shared memory must be ordered after those that it conflicts with. The order is
kept as vector clocks (Lamport's happens-before). A *timeline* is a sequence of accesses in order, such as a partition's own, its products',
or the copies to one view of shared memory; a clock says how far along each timeline its owner has seen.

- Within a partition the compiler orders the threads' accesses: it puts a barrier between two that conflict, and before an arrival.
- Between partitions mbarriers do: who waits has seen what those who arrived had seen. `expect` is the arrival of one thread: what other
  threads did after the last such barrier is not part of it.
- Products and copies are over when they have been waited for. They see what threads wrote only after a fence.
"""

import random
import sys
import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Clock = dict[Hashable, int]
SHARED_BYTES = 227 << 10
_OURS = {str(Path(__file__).with_name(f"gluon_{name}.py")) for name in ("machine", "values", "memory", "executor")}


class FaultError(AssertionError):
    """The kernel does what it must not do."""


class _StoppedError(BaseException):
    """Ends the threads of partitions after one has failed."""


def here() -> str:
    """The line of the kernel that is being executed."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename in _OURS:
        frame = frame.f_back
    return f"{frame.f_code.co_name}, line {frame.f_lineno}"


def _join(clock: Clock, other: Clock) -> None:
    for timeline, time in other.items():
        clock[timeline] = max(time, clock.get(timeline, 0))


@dataclass(kw_only=True, eq=False)
class Partition:
    """A group of warps that runs one function."""

    number: int
    name: str
    num_warps: int
    clock: Clock = field(default_factory=dict)
    settled: Clock = field(default_factory=dict)
    products: int = 0
    stores: int = 0
    ready: Callable[[], bool] = lambda: True
    waits_for: Callable[[], str] = str
    is_done: bool = False
    baton: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def settle(self) -> None:
        """A barrier of the partition's threads: what they did is done."""
        timelines = (self.number, ("wgmma", self.number), ("store", self.number))
        self.settled = {timeline: self.clock.get(timeline, 0) for timeline in timelines}
        self.clock[self.number] += 1

    def seen_by_one(self) -> Clock:
        """What one of its threads knows to have happened."""
        return self.clock | self.settled

    def is_unsettled(self, access: "Access") -> bool:
        """Whether some threads may not be done with an access of this partition."""
        return access.timeline in self.settled and access.time > self.settled[access.timeline]


@dataclass(kw_only=True, eq=False)
class Copy:
    """A copy by TMA that is under way, and what its arrival does."""

    name: str
    arrive: Callable[[], None]


@dataclass(kw_only=True)
class Access:
    """The latest access on its timeline to a view of shared memory, as later ones see it."""

    timeline: Hashable
    time: int
    writes: bool
    by_threads: int
    view: np.ndarray
    what: str

    @property
    def is_copy(self) -> bool:
        """Whether TMA wrote it."""
        return isinstance(self.timeline, tuple) and self.timeline[0] == "copy"

    def conflicts(self, view: np.ndarray, writes: bool) -> bool:
        """Whether one of the two writes what the other one touches."""
        return (writes or self.writes) and np.may_share_memory(view, self.view) and np.shares_memory(view, self.view)


class Allocation:
    """Shared memory: values, which of them were ever written, and the accesses that later ones must be ordered after."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, name: str) -> None:
        self.values = np.full(shape, np.nan if dtype.is_floating() else 0, np.float32 if dtype.is_floating() else np.int64)
        self.known = np.zeros(shape, bool)
        self.name = name
        self.accesses: dict[Hashable, Access] = {}

    def check(self, view: np.ndarray, me: Partition, *, writes: bool, asynchronous: bool, what: str) -> None:
        """Raise where an earlier access is not over, as far as the partition knows."""
        clock = me.clock
        for access in list(self.accesses.values()):
            if not access.conflicts(view, writes):
                continue
            if me.is_unsettled(access):
                me.settle()
            if clock.get(access.timeline, 0) < access.time:
                raise FaultError(f"data race on {self.name}: {what}, but nothing says that it comes after {access.what}")
            if asynchronous and access.by_threads and access.writes and clock.get(("fence", access.timeline), 0) < access.by_threads:
                raise FaultError(f"{what} on {self.name} needs fence_async_shared after {access.what}")

    def keep(self, view: np.ndarray, timeline: Hashable, time: int, *, writes: bool, by_threads: int = 0, what: str) -> None:
        """Note an access. `by_threads` counts those of a partition's threads, which its fences make visible to TMA and wgmma."""
        access = Access(timeline=timeline, time=time, writes=writes, by_threads=by_threads, view=view, what=what)
        self.accesses[timeline, writes, _bounds(view)] = access


def _bounds(view: np.ndarray) -> tuple[int, ...]:
    return (*np.lib.array_utils.byte_bounds(view), *view.shape)


class Barrier:
    """An mbarrier: a phase is over when all arrivals and bytes that it expects have come."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0  # not initialized
        self.phase = self.pending = self.num_bytes = 0
        self.clock: Clock = {}
        self.arriving: Clock = {}

    def __str__(self) -> str:
        return f"{self.name} in phase {self.phase} ({self.pending} of {self.count} arrivals and {self.num_bytes} bytes are missing)"

    def init(self, count: int) -> None:
        """Begin phase 0, for so many arrivals a phase."""
        if count < 1:
            raise FaultError(f"{self.name} is initialized for {count} arrivals")
        self.count = self.pending = count
        self.phase = self.num_bytes = 0

    def arrive(self, clock: Clock, *, count: int = 0, expected: int = 0, copied: int = 0) -> None:
        """Arrivals, bytes that they announce, bytes that were copied."""
        if not self.count:
            raise FaultError(f"{self.name} is not initialized")
        if count > self.pending:
            raise FaultError(f"more arrivals than expected, {count} at {self}")
        _join(self.arriving, clock)
        self.pending -= count
        self.num_bytes += expected - copied
        if not self.pending and not self.num_bytes:
            _join(self.clock, self.arriving)
            self.arriving = {}
            self.phase += 1
            self.pending = self.count

    def is_over(self, parity: int) -> bool:
        """Whether the phase of that parity is, as the hardware sees it: the present one has the other."""
        if not self.count:
            raise FaultError(f"{self.name} is not initialized")
        return self.phase % 2 != parity


class Machine:
    """One program's partitions, shared memory and copies under way."""

    def __init__(self, name: str, num_warps: int, rng: random.Random) -> None:
        self.rng = rng
        self.copies: list[Copy] = []
        self.failure: BaseException | None = None
        self.num_bytes = 0
        self.root = Partition(number=0, name=name, num_warps=num_warps, clock={0: 1})
        self.root.settle()
        self.partitions = [self.root]
        self.current = self.root
        self.num_partitions = 1

    def allocate(self, num_bytes: int) -> None:
        """Take shared memory. The compiler may reuse what another allocation no longer needs; this does not."""
        self.num_bytes += num_bytes
        if self.num_bytes > SHARED_BYTES:
            raise FaultError(f"{self.num_bytes} bytes of shared memory are more than the {SHARED_BYTES} that a program can have")

    # Taking turns

    def step(self) -> None:
        """Somebody else may go first."""
        if self.rng.random() < 0.25:
            self.wait(lambda: True, str)

    def wait(self, ready: Callable[[], bool], waits_for: Callable[[], str]) -> None:
        """Let others go on until the present partition is ready and has its turn."""
        me = self.current
        me.ready, me.waits_for = ready, waits_for
        if self._pass_on() is not me:
            me.baton.acquire()
            if self.failure:
                raise _StoppedError

    def _pass_on(self) -> Partition:
        """The partition that goes on, which is woken."""
        while True:
            able = [partition for partition in self.partitions if not partition.is_done and partition.ready()]
            choices = [*able, *self.copies]
            if not choices:
                raise FaultError("\n".join(["deadlock:", *self._waiting()]))
            chosen = self.rng.choice(choices)
            if isinstance(chosen, Partition):
                before, self.current = self.current, chosen
                if chosen is not before:
                    chosen.baton.release()
                return chosen
            self.copies.remove(chosen)
            chosen.arrive()

    def _waiting(self) -> Iterator[str]:
        for partition in self.partitions:
            if not partition.is_done:
                yield f"  {partition.name} waits for {partition.waits_for()}"

    def run_partitions(self, functions: list[tuple[str, Callable[[], Any], int]]) -> Any:
        """Run (name, function, warps) side by side to their ends; gives what the first one returns."""
        results: dict[int, Any] = {}
        parent = self.current
        parent.settle()
        children = []
        for number, (name, _, num_warps) in enumerate(functions):
            child = Partition(
                number=self.num_partitions, name=f"partition {number}, {name},", num_warps=num_warps, clock=dict(parent.clock)
            )
            child.clock[child.number] = 1
            child.settle()
            self.num_partitions += 1
            children.append(child)
        threads = [
            threading.Thread(target=self._run, args=(child, function, results), daemon=True)
            for child, (_, function, _) in zip(children, functions, strict=True)
        ]
        self.partitions += children
        for thread in threads:
            thread.start()
        try:
            self.wait(lambda: all(child.is_done for child in children), lambda: "its partitions")
        except BaseException as error:
            self._fail(error)
        for thread in threads:
            thread.join()
        if self.failure:
            raise self.failure
        for child in children:
            _join(parent.clock, child.clock)
            self.partitions.remove(child)
        return results.get(children[0].number)

    def _run(self, partition: Partition, function: Callable[[], Any], results: dict[int, Any]) -> None:
        partition.baton.acquire()
        if self.failure:
            return
        try:
            with np.errstate(all="ignore"):
                results[partition.number] = function()
            self.check_end(partition)
            partition.is_done = True
            self._pass_on()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Keep the first failure and end everybody."""
        if not self.failure and not isinstance(error, _StoppedError):
            self.failure = error
            for partition in self.partitions:
                partition.baton.release()

    # What partitions do

    def read(self, allocation: Allocation, view: np.ndarray, what: str) -> None:
        """Threads read shared memory."""
        self.step()
        me, where = self.current, f"{what} in {here()}"
        allocation.check(view, me, writes=False, asynchronous=False, what=where)
        allocation.keep(view, me.number, me.clock[me.number], writes=False, what=where)

    def write(self, allocation: Allocation, view: np.ndarray) -> None:
        """Threads write it."""
        self.step()
        me, where = self.current, f"a store in {here()}"
        allocation.check(view, me, writes=True, asynchronous=False, what=where)
        me.stores += 1
        allocation.keep(view, me.number, me.clock[me.number], writes=True, by_threads=me.stores, what=where)

    def fence(self) -> None:
        """TMA and wgmma will see what the partition's threads have written."""
        self.current.clock["fence", self.current.number] = self.current.stores

    def begin_product(self, operands: list[tuple[Allocation, np.ndarray]]) -> int:
        """The number of a wgmma that reads shared memory until it is waited for."""
        self.step()
        me, where = self.current, f"a wgmma in {here()}"
        me.products += 1
        for allocation, view in operands:
            allocation.check(view, me, writes=False, asynchronous=True, what=where)
            allocation.keep(view, ("wgmma", me.number), me.products, writes=False, what=where)
        return me.products

    def wait_products(self, outstanding: int) -> int:
        """The number of the latest wgmma that is over."""
        me = self.current
        over = max(me.products - outstanding, me.clock.get(("wgmma", me.number), 0))
        me.clock["wgmma", me.number] = over
        return over

    def load(self, allocation: Allocation, view: np.ndarray, known: np.ndarray, values: np.ndarray, barrier: Barrier, size: int) -> None:
        """TMA begins to copy `values` to shared memory; their bytes arrive at the barrier."""
        self.step()
        where = f"a copy to shared memory in {here()}"
        allocation.check(view, self.current, writes=True, asynchronous=True, what=where)
        timeline = ("copy", *_bounds(view))
        clock = self.current.seen_by_one()
        time = clock[timeline] = clock.get(timeline, 0) + 1
        allocation.keep(view, timeline, time, writes=True, what=where)

        def arrive() -> None:
            view[...] = values
            known[...] = True
            barrier.arrive(clock, copied=size)

        self.copies.append(Copy(name=where, arrive=arrive))

    def store(self, allocation: Allocation, view: np.ndarray) -> None:
        """TMA begins to copy from shared memory, and reads it until that is waited for."""
        self.step()
        me, where = self.current, f"a copy from shared memory in {here()}"
        allocation.check(view, me, writes=False, asynchronous=True, what=where)
        timeline = ("store", me.number)
        me.clock["stores begun", me.number] = time = me.clock.get(("stores begun", me.number), 0) + 1
        allocation.keep(view, timeline, time, writes=False, what=where)

    def wait_stores(self, outstanding: int) -> None:
        """All but the last `outstanding` copies from shared memory have read it."""
        me = self.current
        timeline = ("store", me.number)
        me.clock[timeline] = max(me.clock.get(timeline, 0), me.clock.get(("stores begun", me.number), 0) - outstanding)

    def arrive(self, barrier: Barrier, count: int) -> None:
        """The partition arrives, all its threads having come so far."""
        self.step()
        self.current.settle()
        barrier.arrive(self.current.seen_by_one(), count=count)

    def expect(self, barrier: Barrier, num_bytes: int) -> None:
        """One thread arrives and announces bytes."""
        self.step()
        barrier.arrive(self.current.seen_by_one(), count=1, expected=num_bytes)

    def wait_barrier(self, barrier: Barrier, parity: int) -> None:
        """Go on when the phase of that parity is over."""
        where = here()
        self.wait(lambda: barrier.is_over(parity), lambda: f"parity {parity} of {barrier} in {where}")
        _join(self.current.clock, barrier.clock)

    def check_end(self, partition: Partition) -> None:
        """What a partition began, it has waited for."""
        if partition.clock.get(("wgmma", partition.number), 0) < partition.products:
            raise FaultError(f"{partition.name} ends before its last wgmma was waited for")
        if partition.clock.get(("store", partition.number), 0) < partition.clock.get(("stores begun", partition.number), 0):
            raise FaultError(f"{partition.name} ends before its last copy from shared memory was waited for")

    def finish(self, allocations: list[Allocation]) -> None:
        """The program ends: nothing may be under way, for its shared memory goes to another one."""
        self.check_end(self.root)
        for copy in self.copies:
            raise FaultError(f"the program ends during {copy.name}")
        for access in (access for allocation in allocations for access in allocation.accesses.values()):
            if access.is_copy and self.root.clock.get(access.timeline, 0) < access.time:
                raise FaultError(f"the program ends without waiting for {access.what}")
