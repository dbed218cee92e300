"""Reads the keys of a transformers `config.json`, and complains about one key at a time."""

from __future__ import annotations

from typing import Any, NoReturn

from outlay.planner.spec.files import line_of
from outlay.profiles.errors import FileError

LARGEST_SIZE = 2**31 - 1
"""Positions may be large (Llama 4: 10 M); no width or vocabulary comes near."""
DEEPEST = 10_000
"""Layers; the deepest published models have a few hundred."""

ACTIVATIONS = frozenset({
    "gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "leaky_relu", "mish", "quick_gelu", "relu", "relu2",
    "silu", "swish",
})  # fmt: skip
"""Names of transformers' `activations.py` whose operators are known."""


class Reader:
    """The keys of one config. `source` is the file's path, for `path:line` in complaints."""

    def __init__(
        self,
        config: dict[str, Any],
        *,
        source: str,
        aliases: dict[str, str],
        within: tuple[str, ...] = (),
    ) -> None:
        self.config = config
        self.source = source
        self.within = within
        """The keys that lead to this mapping, where it is nested."""
        self.aliases = aliases
        """Key → the other name it goes by (transformers' attribute_map)."""

    def refuse(self, key: str, what: str, *, why: str = "", do: str = "") -> NoReturn:
        """Raise the one error that a bad key gets, by the name that the config uses."""
        other = self.aliases.get(key)
        named = other if other in self.config and key not in self.config else key
        keys = (*self.within, str(named))
        where = line_of(self.source, keys)
        raise FileError(f"{'.'.join(keys)}: {what}", where=where, why=why, do=do)

    def has(self, key: str) -> bool:
        return self._name(key) in self.config

    def layers(self, key: str) -> int:
        """The number of blocks."""
        count = self.size(key)
        if count > DEEPEST:
            self.refuse(key, f"is {count}, more than the {DEEPEST} layers that outlay takes")
        return count

    def size(self, key: str, default: int | None = None, *, at_least: int = 1) -> int:
        """A whole number that must be there, unless there is a default."""
        if not self.has(key):
            if default is None:
                self._missing(key)
            return default
        value = self.config[self._name(key)]
        if value is None:
            self.refuse(key, f"is null, expected a whole number of at least {at_least}")
        return self._whole(key, value, at_least)

    def optional_size(self, key: str, default: int | None, *, at_least: int = 1) -> int | None:
        """A whole number or null; `default` where the key is missing."""
        if not self.has(key):
            return default
        value = self.config[self._name(key)]
        return None if value is None else self._whole(key, value, at_least)

    def activation(self, key: str, default: str) -> str:
        """An activation of transformers whose saved tensors are known (estimate/kernels.py)."""
        value = self.text(key, default)
        if value not in ACTIVATIONS:
            self.refuse(key, f"is {value!r}, which is none of {', '.join(sorted(ACTIVATIONS))}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(self._name(key), default)
        if not isinstance(value, bool):
            self.refuse(key, f"is {value!r}, expected true or false")
        return value

    def optional_flag(self, key: str) -> bool:
        """A flag that may be null, which means false."""
        return self.config.get(self._name(key)) is not None and self.flag(key, False)

    def probability(self, key: str, default: float) -> float:
        value = self.config.get(self._name(key), default)
        if value is None:
            return 0.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            self.refuse(key, f"is {value!r}, expected a probability from 0 to 1")
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self.config.get(self._name(key), default)
        if not isinstance(value, str):
            self.refuse(key, f"is {value!r}, expected text")
        return value

    def integer(self, key: str, default: int) -> int:
        """A whole number of either sign (-1 stands for «none» in some configs)."""
        value = self.config.get(self._name(key), default)
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) > LARGEST_SIZE:
            self.refuse(key, f"is {value!r}, expected a whole number")
        return value

    def wholes(self, key: str) -> tuple[int, ...] | None:
        """A list of whole numbers (layer indices, a 0 or 1 for each layer); null where missing."""
        value = self.config.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            self.refuse(key, f"is {value!r}, expected a list of whole numbers")
        return tuple(self._whole(key, entry, 0) for entry in value)

    def nested(self, key: str) -> Reader:
        """The keys of a nested mapping; none where it is missing or null."""
        value = self.config.get(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, f"is {value!r}, expected a mapping")
        return Reader(value or {}, source=self.source, aliases={}, within=(*self.within, key))

    def texts(self, key: str, *, length: int, known: tuple[str, ...]) -> tuple[str, ...] | None:
        """A list with one of the known words for each layer; null where it is missing."""
        value = self.config.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            self.refuse(key, f"is {value!r}, expected a list")
        if len(value) != length:
            self.refuse(key, f"has {len(value)} entries for {length} layers")
        for entry in value:
            if entry not in known:
                self.refuse(key, f"{entry!r} is not one of {', '.join(known)}")
        return tuple(value)

    def _name(self, key: str) -> str:
        """The name that this config uses for the key; both names with two values are refused."""
        other = self.aliases.get(key)
        if other is None or other not in self.config:
            return key
        if key in self.config and self.config[key] != self.config[other]:
            self.refuse(
                key,
                f"is {self.config[key]!r}, but {other}, its other name, is {self.config[other]!r}",
                do="keep one of them",
            )
        return key if key in self.config else other

    def _missing(self, key: str) -> NoReturn:
        other = self.aliases.get(key)
        named = f"{key} (or {other})" if other else key
        model_type = self.config.get("model_type")
        raise FileError(
            f"{named}: is missing",
            where=self.source,
            why=f"it decides the size of a {model_type} model",
            do="pass the complete config.json of the model",
        )

    def _whole(self, key: str, value: Any, at_least: int) -> int:
        expected = f"expected a whole number of at least {at_least}"
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(key, f"is {value!r}, {expected}")
        if value < at_least:
            self.refuse(key, f"is {value}, {expected}")
        if value > LARGEST_SIZE:
            self.refuse(key, f"is {value}, more than the largest size {LARGEST_SIZE}")
        return value
