"""Runs in SkyPilot's environment: its own Task over emitted files, and over broken ones.

SkyPilot looks instance types and some accelerators up in a catalog that it downloads. Where that is out
of reach, its schemas are what is left, and how many files that concerns is counted.
"""

import json
import os
import sys
from pathlib import Path

import sky
import yaml
from sky.utils import common_utils, schemas

# OSError: what requests raises where a host cannot be reached, and its like
SEEN = {"task": 0, "schema_only": 0, "without_catalog": 0}


def read(config):
    common_utils.validate_schema(config, schemas.get_task_schema(), "task: ")
    common_utils.validate_schema(config["resources"], schemas.get_resources_schema(), "resources: ")
    nodes = config["num_nodes"]
    try:
        task = sky.Task.from_yaml_config(dict(config), env_overrides={"DATA": "text.txt"})
        (resources,) = task.resources
        assert task.num_nodes == nodes
        assert task.file_mounts == {"/data/text": "text.txt"}
        # the accelerators of an instance type are in the catalog
        assert resources.instance_type or resources.accelerators
    except OSError:
        SEEN["schema_only"] += 1
        return
    SEEN["task"] += 1
    try:
        task.validate()
    except OSError:
        SEEN["without_catalog"] += 1


def main():
    refused, count = [], 0
    for folder in sorted(Path(sys.argv[1]).glob("*/out")):
        os.chdir(folder)
        try:
            read(yaml.safe_load(Path("task.yaml").read_text()))
            count += 1
        except Exception as error:
            refused.append([str(folder), f"{type(error).__name__}: {str(error)[:400]}"])
    seen, missed = dict(SEEN), []
    controls = {
        "typo": {"num_node": 2},
        "type": {"num_nodes": "two"},
        "resources": {"resources": {"accelerator": "H100:8"}},
        "cloud": {"resources": {"infra": "nowhere", "accelerators": "H100:8"}},
    }
    for name, change in controls.items():
        try:
            read(yaml.safe_load(Path("task.yaml").read_text()) | change)
            missed.append(name)
        except Exception:
            continue
    result = {
        "read": count,
        "refused": refused,
        "controls": len(controls),
        "controls_missed": missed,
    }
    result |= seen
    print("RESULT " + json.dumps(result))


main()
