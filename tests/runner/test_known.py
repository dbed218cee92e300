"""What a run's events tell of the least that its next start must hold."""

from __future__ import annotations

from pathlib import Path

from outlay.runner import known
from outlay.runner.events import EventLog
from outlay.runner.known import least_work_s


def test_the_shortest_step_and_save_count(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "events.jsonl"
    assert least_work_s(path) == 0.0
    log = EventLog(path, lambda: 0.0)
    for took_s in (0.5, 0.25, 0.75):
        log.write("step", 1, step_s=took_s)
    assert least_work_s(path) == 0.25
    log.write("save", 1, save_s=3.0)
    log.write("save", 2, save_s=2.0)
    log.write("warning", message="no")
    log.close()
    assert least_work_s(path) == 2.25
    with path.open("a") as handle:
        handle.write('{"kind": "step", "data": {"step_s"')  # torn
    assert least_work_s(path) == 2.25
    monkeypatch.setattr(known, "TAIL_BYTES", 200)  # begins within a line
    assert least_work_s(path) <= 2.0
