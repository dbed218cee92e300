"""A pool of living ranks: n processes that join one process group once and then run many things.

Starting ranks costs seconds (interpreters, torch, DeepSpeed); an engine in living ranks costs a
fraction of one. Measuring and the tests build hundreds of engines in the same ranks.

    with RankPool(2) as pool:
        losses = pool.call("package.module:function", plan)     # one result a rank
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from outlay.profiles.errors import OutlayError
from outlay.runner.host import AcceleratorKind, default_extensions_dir, prepare_environment

_LOG_TAIL_LINES = 25
_GRACE_S = 15.0
"""How long the other ranks may take to come back once one has failed: they may wait for it."""


class PoolError(OutlayError):
    """A rank died or did not answer in time; the pool is stopped and the next call starts it anew."""


class RankError(OutlayError):
    """The function raised in at least one rank. `errors` has rank → traceback text."""

    def __init__(self, target: str, errors: dict[int, str]) -> None:
        self.errors = errors
        rank, text = next(iter(errors.items()))
        last = text.strip().splitlines()[-1]
        super().__init__(f"{target} failed in rank {rank} (of {sorted(errors)}): {last}", why=text)


class RankPool:
    """n living ranks on this host. Starts at the first call (or `with`); not for several threads."""

    def __init__(
        self,
        n: int,
        threads_per_rank: int = 1,
        *,
        accelerator: AcceleratorKind = "cpu",
        extensions_dir: Path | None = None,
        start_timeout_s: float = 300.0,
        grace_s: float = _GRACE_S,
    ) -> None:
        self.n = n
        self.threads_per_rank = threads_per_rank
        self.accelerator = accelerator
        self.extensions_dir = extensions_dir or default_extensions_dir()
        self.start_timeout_s = start_timeout_s
        self.grace_s = grace_s
        self.start_s: float | None = None
        """How long the last start took; seconds."""
        self.starts = 0
        """How often the ranks were started."""
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._folder: Path | None = None

    def __enter__(self) -> RankPool:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether the ranks live and wait for a call."""
        return bool(self._processes) and all(p.poll() is None for p in self._processes)

    @property
    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [process.pid for process in self._processes]

    def start(self) -> None:
        """Start the ranks unless they live already."""
        if self.alive:
            return
        self.kill()
        started = time.monotonic()
        self._folder = Path(tempfile.mkdtemp(prefix="outlay-pool-"))
        environment = prepare_environment(
            self.n, self.threads_per_rank, self.accelerator, self.extensions_dir
        )
        environment |= {
            "OUTLAY_POOL_INIT": (self._folder / "rendezvous").as_uri(),
            "OUTLAY_POOL_TIMEOUT_S": "1800",
            "PYTHONUNBUFFERED": "1",
        }
        if any(name == "lo" for _, name in socket.if_nameindex()):
            # The ranks are on this host: gloo need not look up the host's name.
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        for rank in range(self.n):
            self._start_rank(rank, environment)
        self._collect("start", time.monotonic() + self.start_timeout_s, self.start_timeout_s)
        self.start_s = time.monotonic() - started
        self.starts += 1

    def _start_rank(self, rank: int, environment: dict[str, str]) -> None:
        assert self._folder is not None
        here, there = socket.socketpair()
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.n)}
        with self._log(rank).open("wb") as log, there:
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "outlay.runner.pool_worker", str(there.fileno())],
                    env={**environment, **own},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(there.fileno(),),
                )
            )
        self._connections.append(Connection(here.detach()))

    def call(self, target: str, *args: Any, timeout_s: float = 600.0, **kwargs: Any) -> list[Any]:
        """Run `module:function` in every rank with the same arguments; the results by rank.

        Raises what the function raised where all ranks raised the same kind of OutlayError,
        RankError for any other exception, PoolError where a rank died or did not answer.
        """
        self.start()
        request = (target, args, kwargs, [path for path in sys.path if path])
        for rank, connection in enumerate(self._connections):
            try:
                connection.send(request)
            except OSError:
                self._give_up(target, f"rank {rank} is gone", [rank])
        answers = self._collect(target, time.monotonic() + timeout_s, timeout_s)
        errors = {rank: a for rank, a in enumerate(answers) if a[0] == "error"}
        if errors:
            first = next(iter(errors.values()))[2]
            same = all(type(a[2]) is type(first) for a in errors.values())
            if isinstance(first, OutlayError) and same and len(errors) == self.n:
                raise first
            raise RankError(target, {rank: a[1] for rank, a in errors.items()})
        return [answer[1] for answer in answers]

    def _collect(self, target: str, deadline: float, timeout_s: float) -> list[tuple[Any, ...]]:
        """One answer from each rank."""
        answers: dict[int, tuple[Any, ...]] = {}
        failed: list[int] = []
        while len(answers) < self.n:
            pending = {id(c): r for r, c in enumerate(self._connections) if r not in answers}
            left = deadline - time.monotonic()
            ready = wait([self._connections[r] for r in pending.values()], timeout=max(left, 0))
            if not ready:
                silent = sorted(pending.values())
                what = f"no answer from rank {', '.join(map(str, silent))}"
                if failed:
                    what += f" after rank {failed[0]} failed: {answers[failed[0]][1]}"
                self._give_up(target, f"{what} within {timeout_s:g} s", silent)
            for connection in ready:
                rank = pending[id(connection)]
                try:
                    answers[rank] = self._connections[rank].recv()
                except (EOFError, OSError):
                    code = self._processes[rank].wait()
                    self._give_up(target, f"rank {rank} died (exit code {code})", [rank])
                if answers[rank][0] == "error":
                    failed.append(rank)
                    deadline = min(deadline, time.monotonic() + self.grace_s)
        return [answers[rank] for rank in range(self.n)]

    def _give_up(self, target: str, what: str, ranks: list[int]) -> None:
        tails = [f"last lines of rank {rank}:\n{self._log_tail(rank)}" for rank in ranks]
        self.kill()
        raise PoolError(
            f"{target}: {what}; all ranks of the pool are stopped", why="\n".join(tails)
        )

    def _log(self, rank: int) -> Path:
        assert self._folder is not None
        return self._folder / f"rank-{rank}.log"

    def _log_tail(self, rank: int) -> str:
        try:
            text = self._log(rank).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-_LOG_TAIL_LINES:])

    def close(self) -> None:
        """Let the ranks end by themselves; kill what does not within seconds."""
        for connection in self._connections:
            try:
                connection.send(None)
            except OSError:
                continue
        deadline = time.monotonic() + 10.0
        for process in self._processes:
            try:
                process.wait(timeout=max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                continue
        self.kill()

    def kill(self) -> None:
        """End the ranks at once."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
