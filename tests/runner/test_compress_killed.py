"""A pruned run that is killed with -9 and resumed ends as one that was not: masks, loss and export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_launch import Launched, data, gone, small_plan

from outlay.planner.spec.compress import Compression, Pruning, Qat
from outlay.runner.events import read_events

pytestmark = pytest.mark.processes
__all__ = ["data"]


def test_killed_and_resumed_the_masks_hold(data: Path, tmp_path: Path) -> None:
    compress = Compression(
        pruning=Pruning(sparsity=0.6, updates=10), qat=Qat(bits=4, group=32, start=0.3)
    )
    plan = small_plan(data, zero=3, steps=80, save_every=20, compress=compress)
    whole = Launched(plan, tmp_path / "whole")
    code, stderr = whole.end()
    assert code == 0, stderr

    first = Launched(plan, tmp_path / "run")
    first.until(30)
    children = first.ranks()
    first.process.kill()
    first.end()
    assert gone(children)
    second = Launched(plan, tmp_path / "run", "resume")
    code, stderr = second.end()
    assert code == 0, stderr
    assert min(second.steps()) == 21

    found, expected = second.outcome(), whole.outcome()
    assert found.train_loss == expected.train_loss
    assert found.compression == expected.compression
    assert found.compression is not None
    assert found.compression["zeros"] == found.compression["wanted"]
    weights = load_file(Path(str(found.export)) / "model.safetensors")
    for name, matrix in found.compression["matrices"].items():
        assert np.count_nonzero(weights[name] == 0) == matrix["zeros"]
        assert matrix["zeros"] == round(0.6 * matrix["weights"])
    said = [e.data for e in read_events(second.folder.events) if e.kind == "compress"]
    assert said[-1] == found.compression
    assert {"quantizes": True} in [dict(list(d.items())[-1:]) for d in said]
