"""Eight processes draw on one project budget and are killed at random: `ledger_storm.py FILE ROUNDS SEED`.

What each really spent stands in memory that they share and that outlives them. Each notes what it is
about to spend before it spends it, as a run does that reserves before it starts.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

from outlay.planner.spec.job import Budget
from outlay.profiles.errors import NotFeasible
from outlay.runner.budget import Spent
from outlay.runner.ledger import Entry, Ledger, Want

PROCESSES = 8
A_ROUND = 4.0
"""USD more in the project's budget each round."""
EPSILON = 1e-6


def worker(path: Path, shared: mmap.mmap, slot: int, seed: int) -> None:
    """Reserve, spend in small steps, close; until killed."""
    rng = random.Random(seed)
    ledger = Ledger(path)
    while True:
        entry = Entry(
            run=f"{slot}", user=f"u{slot % 3}", project="p", machine="m", price_usd_per_h=36.0
        )
        want = Want(kind="money", amount=rng.uniform(0.1, 1.0), least=0.02)
        try:
            run = ledger.open_run(entry, wants=[want])
        except NotFeasible:
            time.sleep(0.01)
            continue
        spent, reserved = 0.0, run.reserved["money"]
        while spent < reserved - EPSILON:
            step = min(rng.uniform(0.0, 0.1), reserved - spent)
            spent += step
            at = Spent(wall_s=spent, cost_usd=spent, gpu_hours=0.0, fraction=None)
            assert run.heartbeat(at, next_s=0.05), "a living run lost its reservation"
            (before,) = struct.unpack_from("d", shared, 8 * slot)
            struct.pack_into("d", shared, 8 * slot, before + step)
        at = Spent(wall_s=spent, cost_usd=spent, gpu_hours=0.0, fraction=None)
        run.close_run(at, state="budget")


def start(path: Path, shared: mmap.mmap, slot: int, seed: int) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            worker(path, shared, slot, seed)
        finally:
            os._exit(1)
    return pid


def check(ledger: Ledger, shared: mmap.mmap, amount: float) -> float:
    """Nothing is above the budget, and nothing is spent that the ledger does not know."""
    really = sum(struct.unpack_from(f"{PROCESSES}d", shared))
    (total,) = ledger.totals("p")
    assert total.charged <= amount + EPSILON, (total, amount)
    assert really <= total.charged + EPSILON, (really, total)
    return really


def storm(path: Path, rounds: int, seed: int) -> dict[str, float]:
    rng = random.Random(seed)
    shared = mmap.mmap(-1, 8 * PROCESSES)
    ledger, kills, amount, really = Ledger(path), 0, 0.0, 0.0
    for _ in range(rounds):
        amount += A_ROUND
        ledger.set_budget("p", Budget(kind="money", amount=amount))
        pids = [start(path, shared, i, rng.getrandbits(32)) for i in range(PROCESSES)]
        for _ in range(rng.randint(4, 16)):
            time.sleep(rng.uniform(0, 0.05))
            slot = rng.randrange(PROCESSES)
            kills += kill(pids[slot])
            check(ledger, shared, amount)
            pids[slot] = start(path, shared, slot, rng.getrandbits(32))
        kills += sum(kill(pid) for pid in rng.sample(pids, PROCESSES))
        really = check(ledger, shared, amount)
        assert ledger.whole()
        (total,) = ledger.totals("p")
        assert total.alive == 0, total
        if total.left > EPSILON:
            # all that is not spent can be drawn: no reservation of the dead is in the way
            run = ledger.open_run(Entry(run="all", user="u", project="p", machine="m"))
            assert abs(run.reserve("money", None) - total.left) < EPSILON
            run.close_run(Spent(wall_s=0, cost_usd=0, gpu_hours=0, fraction=None), state="stopped")
    charged = ledger.totals("p")[0].charged
    return {"kills": kills, "budget": amount, "charged": charged, "really": really}


def kill(pid: int) -> int:
    """It must have been alive: a worker that failed by itself is an error."""
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), f"a worker ended by itself with status {status}"
    return 1


if __name__ == "__main__":
    print(json.dumps(storm(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
