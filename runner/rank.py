"""One rank: `python -m outlay.runner.rank RUN`, started by the supervisor, torchrun or deepspeed.

Reads RANK, LOCAL_RANK and WORLD_SIZE (and MASTER_ADDR and MASTER_PORT where the supervisor gave no
rendezvous), RUN/plan.yaml, and with --checkpoint the folder to continue from.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from functools import partial
from pathlib import Path

from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import EXIT_DONE
from outlay.runner import processes
from outlay.runner.budget import Meter, Spent, process_started_s
from outlay.runner.energy import ENERGY_BASE, energy_of
from outlay.runner.events import EventLog
from outlay.runner.failures import note_failure
from outlay.runner.folder import RunFolder
from outlay.runner.swap import placed


def main() -> None:
    """Ends the process itself: after a failure the clean-up of a broken group could hang."""
    parser = argparse.ArgumentParser(prog="python -m outlay.runner.rank")
    parser.add_argument("run", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--memory-steps", type=int, help="measure memory over so many steps")
    options = parser.parse_args()
    processes.die_with_supervisor()
    stop = processes.StopRequest()
    folder = RunFolder(options.run)
    try:
        if options.memory_steps is not None:
            code = _measure_memory(folder, options.memory_steps)
        else:
            code = _train(folder, options.checkpoint, stop)
    except BaseException as error:
        traceback.print_exc()
        code = note_failure(folder, int(os.environ.get("RANK", "0")), error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _join() -> None:
    from outlay.runner.engine import RankInfo, init_process_group

    method = os.environ.get(processes.RENDEZVOUS, "env://")
    init_process_group(RankInfo.from_environment(), init_method=method)


def _meter(plan: Plan, folder: RunFolder) -> Meter:
    """The supervisor's; where there is none the clock starts with this process."""
    started = os.environ.get(processes.STARTED)
    earlier = os.environ.get(processes.EARLIER)
    cluster, limits = plan.cluster, folder.read_limits()
    attempts = folder.read_attempts()
    energy = energy_of(
        cluster,
        limits.power_w,
        limits.used_pue()[0],
        base_j=json.loads(os.environ.get(ENERGY_BASE, "null")),
    )
    return Meter.of_cluster(
        plan.job.budget,
        cluster,
        drawn=limits.drawn,
        project=limits.project,
        started_s=process_started_s() if started is None else float(started),
        earlier=attempts.spent(cluster.price_usd_per_h, cluster.ranks)
        if earlier is None
        else Spent(**json.loads(earlier)),
        energy=energy,
        kgco2e_per_kwh=limits.kgco2e_per_kwh,
        minimum_s=limits.minimum_s,
    )


def _train(folder: RunFolder, checkpoint: Path | None, stop: processes.StopRequest) -> int:
    plan = placed(folder.read_plan(), folder.root)
    meter = _meter(plan, folder)
    log = EventLog(folder.events, meter.elapsed_s)
    from outlay.runner.checkpoint import load_checkpoint
    from outlay.runner.compress.teacher_share import open_teacher
    from outlay.runner.data.dataset import TokenDataset
    from outlay.runner.engine import Engine, RankInfo
    from outlay.runner.train import Trainer

    info = RankInfo.from_environment()
    dataset = TokenDataset(folder.dataset(plan), seq_len=plan.job.seq_len, seed=plan.job.seed)
    _join()
    engine = Engine.build(plan)
    trainer = Trainer(
        plan,
        folder,
        engine=engine,
        info=info,
        dataset=dataset,
        meter=meter,
        log=log,
        stop=stop,
        limits=folder.read_limits(),
    )
    if checkpoint is not None:
        # the supervisor has just checked the hashes; without one the ranks do
        load = (
            engine.load if processes.SUPERVISOR in os.environ else partial(load_checkpoint, engine)
        )
        trainer.restore(load(checkpoint), str(checkpoint))
    open_teacher(trainer)
    log.write("rank_ready", trainer.step, rank=info.rank)
    code = trainer.run()
    log.close()
    return code


def _measure_memory(folder: RunFolder, steps: int) -> int:
    from outlay.runner.memory_probe import measure_in_rank

    _join()
    measure_in_rank(folder, steps)
    return EXIT_DONE


if __name__ == "__main__":
    main()
