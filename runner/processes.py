"""Rank processes: started together, ended together, never left behind. Light: no torch here."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

STARTED = "OUTLAY_STARTED_S"
"""When the supervisor started, on CLOCK_MONOTONIC."""
EARLIER = "OUTLAY_EARLIER_S"
"""Seconds that earlier attempts have used."""
SUPERVISOR = "OUTLAY_SUPERVISOR_PID"
RENDEZVOUS = "OUTLAY_RENDEZVOUS"
"""torch's init_method; a file of our own on one host, so that no port is ever contended for."""

_PR_SET_PDEATHSIG = 1
"""prctl(2)."""


def die_with_supervisor() -> None:
    """Ask the kernel to kill this process when its supervisor ends, even by kill -9."""
    expected = os.environ.get(SUPERVISOR)
    if expected is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(expected):  # it ended before the kernel was asked
        os._exit(1)


class StopRequest:
    """Set by SIGTERM or SIGINT; the training loop looks at it between steps."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, _number: int, _frame: object) -> None:
        self.requested = True


class Ranks:
    """The rank processes of one host, each the leader of a process group of its own."""

    def __init__(
        self,
        world: int,
        run: Path,
        *,
        arguments: Sequence[str],
        environment: dict[str, str],
        log: Callable[[int], Path],
    ) -> None:
        self._rendezvous = Path(tempfile.mkdtemp(prefix="outlay-"))
        self._processes: list[subprocess.Popen[bytes]] = []
        self.deaths: list[tuple[int, int]] = []
        """(rank, exit code) in the order in which they ended; negative = the signal."""
        try:
            for rank in range(world):
                self._start(rank, world, run, arguments, environment, log(rank))
        except BaseException:
            self.close()
            raise

    def _start(
        self,
        rank: int,
        world: int,
        run: Path,
        arguments: Sequence[str],
        environment: dict[str, str],
        log: Path,
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        own = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            SUPERVISOR: str(os.getpid()),
            RENDEZVOUS: f"file://{self._rendezvous}/store",
        }
        with log.open("ab") as handle:
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "outlay.runner.rank", str(run), *arguments],
                    env={**environment, **own},
                    stdin=subprocess.DEVNULL,
                    stdout=handle,
                    stderr=handle,
                    start_new_session=True,
                )
            )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def poll(self) -> bool:
        """Note who has ended; true while any lives."""
        ended = {rank for rank, _ in self.deaths}
        for rank, process in enumerate(self._processes):
            code = process.poll()
            if rank not in ended and code is not None:
                self.deaths.append((rank, code))
        return len(self.deaths) < len(self._processes)

    def terminate(self) -> None:
        """SIGTERM to each rank itself: finish the step, save, end."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()

    def kill(self) -> None:
        """SIGKILL to each rank and all that it started."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def wait(self, timeout_s: float) -> bool:
        """Whether all ended in time."""
        end_s = time.monotonic() + timeout_s
        while self.poll():
            if time.monotonic() >= end_s:
                return False
            time.sleep(0.02)
        return True

    def close(self) -> None:
        """Nothing is left afterwards, however this is left."""
        self.kill()
        for process in self._processes:
            process.wait()
        self.poll()
        shutil.rmtree(self._rendezvous, ignore_errors=True)


class Signals:
    """SIGINT and SIGTERM of the supervisor, counted while it waits for its ranks."""

    def __init__(self) -> None:
        self.stop = False
        """Stop well: save first."""
        self.kill = False
        """A second Ctrl-C: at once."""
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        with contextlib.suppress(ValueError):  # not the main thread: nobody sends it signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame: object) -> None:
        self.kill = self.kill or (self.stop and number == signal.SIGINT)
        self.stop = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
