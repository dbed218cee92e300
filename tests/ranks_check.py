"""What DeepSpeed itself says of a configuration, in living ranks (the `ranks` fixture)."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any


def initialized(config: dict[str, Any]) -> str:
    """The optimizer's class that deepspeed.initialize makes of it, or `refused: why`."""
    import deepspeed
    from torch import nn

    from outlay.runner.repairs import release

    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            engine = deepspeed.initialize(
                model=model,
                model_parameters=list(model.parameters()),
                config=copy.deepcopy(config),
            )[0]
    except Exception as error:  # whatever DeepSpeed raises is a refusal
        return f"refused: {type(error).__name__}: {error}"
    kind = type(engine.optimizer).__name__
    release(engine)
    return kind
