"""YAML in which texts of several lines are blocks, so that a person can read the programs in it."""

from __future__ import annotations

from typing import Any

import yaml


class _Blocks(yaml.SafeDumper):
    """A dumper of its own, so that the register is."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Blocks.add_representer(str, _text)


def block_yaml(*documents: Any) -> str:
    """Keys in their order, one document after the other."""
    text: str = yaml.dump_all(documents, Dumper=_Blocks, sort_keys=False, width=110)
    return text
