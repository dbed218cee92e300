"""Runs in an environment with kubeflow-trainer-api: its types, and the CRD's schema where it is given."""

import copy
import json
import sys
from pathlib import Path

import yaml
from jsonschema import Draft202012Validator
from kubeflow_trainer_api.models import IoK8sApiCoreV1ConfigMap, TrainerV1alpha1TrainJob


def strict(schema):
    """The schema with unknown fields refused, as `kubectl --validate=strict` does."""
    if isinstance(schema, dict):
        schema = {k: strict(v) for k, v in schema.items()}
        closed = "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields")
        if closed and "additionalProperties" not in schema:
            schema["additionalProperties"] = False
        return schema
    return [strict(v) for v in schema] if isinstance(schema, list) else schema


def crd_validator(path):
    crd = yaml.safe_load(Path(path).read_text())
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1alpha1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {
        "type": "object"
    }  # the API server has its own schema for it
    return Draft202012Validator(schema)


def reader(validator):
    def read(documents):
        config, job = documents
        for kind, value in ((IoK8sApiCoreV1ConfigMap, config), (TrainerV1alpha1TrainJob, job)):
            back = kind.from_dict(copy.deepcopy(value)).to_dict()
            if back != value:
                raise ValueError(f"read back otherwise: {sorted(set(value) ^ set(back))}")
        if validator:
            errors = [e.message for e in validator.iter_errors(job)]
            if errors:
                raise ValueError("; ".join(errors)[:400])
        (patch,) = job["spec"]["runtimePatches"]
        (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        volumes = replicated["template"]["spec"]["template"]["spec"]["volumes"]
        if volumes[0]["configMap"]["name"] != config["metadata"]["name"]:
            raise ValueError("the volume is not the ConfigMap")

    return read


def controls_of(documents):
    """Name → documents broken on purpose."""

    def changed(path, value):
        mine = copy.deepcopy(documents)
        node = mine[1]["spec"]
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        return mine

    return {
        "typo": changed(("trainer", "numNode"), 2),
        "type": changed(("trainer", "numNodes"), "two"),
        "missing": changed(("runtimeRef",), {"nam": "torch-distributed"}),
        "deep typo": changed(("runtimePatches", 0, "trainingRuntimeSpec", "templates"), {}),
    }


def main():
    read = reader(crd_validator(sys.argv[2]) if len(sys.argv) > 2 else None)
    refused, count, documents = [], 0, None
    for folder in sorted(Path(sys.argv[1]).glob("*/out")):
        documents = list(yaml.safe_load_all((folder / "trainjob.yaml").read_text()))
        try:
            read(documents)
            count += 1
        except Exception as error:
            refused.append([str(folder), f"{type(error).__name__}: {str(error)[:400]}"])
    missed, controls = [], controls_of(documents)
    for name, broken in controls.items():
        try:
            read(broken)
            missed.append(name)
        except Exception:
            continue
    result = {
        "read": count,
        "refused": refused,
        "controls": len(controls),
        "controls_missed": missed,
    }
    print("RESULT " + json.dumps(result))


main()
