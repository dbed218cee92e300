"""How weights come into DeepSpeed's hands, part by part, and out again, and what it says meanwhile."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

from torch import nn

from outlay.profiles.errors import UsageError
from outlay.runner.model import Filler, parts_of


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed prints while it builds, saves and loads; stdout is for data."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What DeepSpeed refuses of a configuration, as one error of ours."""
    from deepspeed import DeepSpeedConfigError
    from pydantic import ValidationError

    try:
        yield
    except (AssertionError, DeepSpeedConfigError, ValidationError) as error:
        raise UsageError(
            "DeepSpeed refuses the configuration of this plan",
            why=str(error) or type(error).__name__,
            do="plan again, or correct the plan's `deepspeed` section",
        ) from error


def fill_partitioned(model: nn.Module, filler: Filler, config: dict[str, Any]) -> None:
    """Fill and split one part at a time, so that no rank ever holds the whole model."""
    import deepspeed

    swapper = None
    with quiet(), refusals():
        for part in parts_of(model):
            # One swapper for all: a second would empty the folder of the first.
            made = deepspeed.zero.Init(
                module=filler.fill(part), config_dict_or_path=config, param_swapper=swapper
            )
            swapper = made.param_swapper


def gathered(parameters: list[nn.Parameter], zero: int) -> contextlib.AbstractContextManager[Any]:
    """ZeRO-3's weights whole for a while, on every rank; nothing to do at the other stages."""
    if zero < 3 or not parameters:
        return contextlib.nullcontext()
    import deepspeed

    held: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters)
    return held
