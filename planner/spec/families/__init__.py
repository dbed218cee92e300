"""transformers `config.json` → ModelSpec, for the families known in closed form.

`registry.py` says which; `catalog.py` finds the config by a preset's name or by its path; the other
files each read one kind of family.
"""

from outlay.planner.spec.families.catalog import preset_config, preset_names, resolve_model
from outlay.planner.spec.families.registry import FAMILIES, spec_from_config

__all__ = ["FAMILIES", "preset_config", "preset_names", "resolve_model", "spec_from_config"]
