"""Rules of the launchers: how many processes, on which devices, and whose flags."""

from __future__ import annotations

from collections.abc import Iterable

from outlay.planner.read.edits import remove, set_to
from outlay.planner.rules.config import Found, config_rule
from outlay.planner.rules.places import here, is_of, main_edits
from outlay.planner.rules.setup import Setup


@config_rule(
    "more_processes_than_accelerators",
    "illegal",
    "each process takes an accelerator of its own",
    deepspeed=False,
)
def more_processes_than_accelerators(s: Setup) -> Iterable[Found]:
    """More processes than the hardware has accelerators."""
    world = s.meaning.said("world")
    if s.cluster is None or world is None or world <= s.cluster.ranks or s.cluster.kind == "cpu":
        return
    yield Found(
        what=f"{world} processes on {s.cluster.ranks} accelerators (--hardware)",
        where=s.meaning.values["world"].where, do=f"start {s.cluster.ranks}, or name the right hardware",
        edits=tuple(s.meaning.set_value("world", s.cluster.ranks)) if not is_of(s, "launch") else (),
    )  # fmt: skip


@config_rule(
    "include_beside_num_gpus",
    "illegal",
    "launcher/runner.py: Cannot specify num_nodes/gpus with include/exclude",
    deepspeed=False,
)
def include_beside_num_gpus(s: Setup) -> Iterable[Found]:
    """--include or --exclude beside --num_gpus or --num_nodes."""
    launch = s.meaning.flags.get("launch", {})
    if s.meaning.flags.get("launcher") != "deepspeed":
        return
    picks = [k for k in ("include", "exclude", "i", "e") if k in launch]
    counts = [k for k in ("num_gpus", "num_accelerators", "num_nodes") if k in launch]
    if picks and counts:
        yield Found(
            what=f"--{picks[0]} and --{counts[0]} together are refused by the launcher",
            where=here(s, "launch", counts[0]), do=f"remove --{counts[0]}",
            edits=main_edits(*(remove("launch", k) for k in counts)),
        )  # fmt: skip


@config_rule(
    "visible_devices_ignored",
    "ignored",
    "launcher/runner.py: ignoring it because one of --include … --num_nodes was used; huggingface/accelerate#663",
    deepspeed=False,
)
def visible_devices_ignored(s: Setup) -> Iterable[Found]:
    """CUDA_VISIBLE_DEVICES before `deepspeed --num_gpus`: the launcher deletes it."""
    if s.meaning.flags.get("launcher") != "deepspeed":
        return
    launch, env = s.meaning.flags["launch"], s.meaning.flags["env"]
    used = [
        k
        for k in ("include", "exclude", "num_gpus", "num_accelerators", "num_nodes")
        if k in launch
    ]
    if "CUDA_VISIBLE_DEVICES" not in env or not used or "hostfile" in launch:
        return
    listed = str(env["CUDA_VISIBLE_DEVICES"])
    counts = [k for k in used if k.startswith("num_")]
    edits = (
        main_edits(*(remove("launch", k) for k in counts))
        if counts and len(counts) == len(used)
        else ()
    )
    yield Found(
        what=f"CUDA_VISIBLE_DEVICES={listed} is ignored: --{used[0]} is given",
        where=here(s, "env", "CUDA_VISIBLE_DEVICES"),
        do=f"write --include localhost:{listed} and nothing else, or drop --{used[0]}", edits=edits,
    )  # fmt: skip


@config_rule(
    "arguments_before_the_script",
    "illegal",
    "launcher/runner.py: what stands before the script is the launcher's; it refuses what it does not know",
    deepspeed=False,
)
def arguments_before_the_script(s: Setup) -> Iterable[Found]:
    """The script's own arguments before the script."""
    if s.meaning.flags.get("launcher") not in ("deepspeed", "torchrun"):
        return
    script = {
        "deepspeed_config",
        "deepspeed",
        "per_device_train_batch_size",
        "model_name_or_path",
        "output_dir",
    }
    for key in s.meaning.flags["launch"]:
        if key in script:
            yield Found(
                what=f"--{key} stands before the script: the launcher takes it for its own and refuses it",
                where=here(s, "launch", key), do="write it behind the script",
                edits=main_edits(remove("launch", key), set_to("args", key, value=s.meaning.flags["launch"][key])),
            )  # fmt: skip
