"""What is in this machine: NVML and the host → Cluster. No torch; a fraction of a second."""

from outlay.planner.probe.gpus import GpuReport, probe_gpus, read_gpus
from outlay.planner.probe.host import probe_host, read_host
from outlay.planner.probe.machine import probe

__all__ = ["GpuReport", "probe", "probe_gpus", "probe_host", "read_gpus", "read_host"]
