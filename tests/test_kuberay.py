"""The manifests for KubeRay keep its schema and what docs/howto/kubernetes.md promises. No cluster has run them."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Iterator
from typing import Any

import click
import jsonschema
import pytest
import yaml

import ray_ckpt
from ray_ckpt.recipes.train_elastic.command import train_elastic
from ray_ckpt.storage.address import parse
from tests.conftest import REPOSITORY

DIRECTORY = REPOSITORY / "deploy" / "kuberay"
FILES = sorted(path.name for path in DIRECTORY.glob("*.yaml"))
SCHEMA = json.loads((REPOSITORY / "tests" / "data" / "kuberay-v1.schema.json").read_text())
PAGE = REPOSITORY / "docs" / "howto" / "kubernetes.md"


def resource(name: str, kind: str) -> dict[str, Any]:
    [found] = [each for each in yaml.safe_load_all((DIRECTORY / name).read_text()) if each["kind"] == kind]
    return dict(found)


def job() -> dict[str, Any]:
    return resource("rayjob.yaml", "RayJob")


def clusters() -> Iterator[dict[str, Any]]:
    yield job()["spec"]["rayClusterSpec"]
    yield resource("raycluster-autoscaler.yaml", "RayCluster")["spec"]


def check(found: dict[str, Any]) -> None:
    jsonschema.validate(found, {**SCHEMA, "$ref": f"#/$defs/{found['kind']}"})


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.mark.parametrize("name", FILES)
def test_it_keeps_kuberays_schema(name: str) -> None:
    found = list(yaml.safe_load_all((DIRECTORY / name).read_text()))
    ours = [each for each in found if each["apiVersion"] == "ray.io/v1"]
    assert len(ours) == 1
    check(ours[0])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "backofLimit"), 3),
        (("spec", "backoffLimit"), "3"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "on"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "gracePeriod"), 60),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
    ],
)
def test_the_schema_finds_what_is_wrong(path: tuple[Any, ...], value: object) -> None:
    wrong = copy.deepcopy(job())
    *way, last = path
    place: Any = wrong
    for step in way:
        place = place[step]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        check(wrong)


def test_gpu_workers_come_from_zero_and_the_head_takes_no_work() -> None:
    for cluster in clusters():
        assert cluster["enableInTreeAutoscaling"] is True
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        [group] = cluster["workerGroupSpecs"]
        assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (0, 0, 4)
        [worker] = group["template"]["spec"]["containers"]
        assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_versions_are_those_of_this_repository() -> None:
    pinned = re.search(r"^ray==(.*)$", (REPOSITORY / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    for cluster in clusters():
        assert cluster["rayVersion"] == pinned[1]
        for pod in pods(cluster):
            assert pod["containers"][0]["image"].endswith(f"/ray-ckpt:{ray_ckpt.__version__}")


def options_of_the_entrypoint() -> dict[str, Any]:
    program, verb, *arguments = shlex.split(job()["spec"]["entrypoint"])
    assert (program, verb) == ("ray-ckpt", "train")
    with train_elastic.make_context("train", arguments) as context:
        assert isinstance(context, click.Context)
        return dict(context.params)


def test_the_entrypoint_is_a_command_that_resumes_and_names_no_secret() -> None:
    options = options_of_the_entrypoint()
    address = parse(options["storage"])
    assert address.userinfo == ""
    assert job()["spec"]["backoffLimit"] > 0
    account = resource("rayjob.yaml", "ServiceAccount")["metadata"]["name"]
    assert {pod["serviceAccountName"] for pod in pods(job()["spec"]["rayClusterSpec"])} == {account}


def test_every_grace_has_room_for_the_save_before_it() -> None:
    """The job's own < what Ray waits for < what Kubernetes waits for."""
    head, worker = pods(job()["spec"]["rayClusterSpec"])
    waits_s = {each["name"]: float(each["value"]) for each in head["containers"][0]["env"]}["RAY_JOB_STOP_WAIT_TIME_S"]
    assert options_of_the_entrypoint()["grace_s"] < waits_s < head["terminationGracePeriodSeconds"]
    stop = shlex.split(head["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert stop[:3] == ["ray", "job", "stop"]
    assert stop[-1] == job()["spec"]["jobId"]
    drain = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    told = re.search(r"^ray drain-node .*--deadline-remaining-seconds (\d+)", drain)
    assert told is not None
    assert int(told[1]) < worker["terminationGracePeriodSeconds"]


def test_the_volume_is_mounted_by_all() -> None:
    cluster = resource("raycluster-autoscaler.yaml", "RayCluster")["spec"]
    claim = resource("raycluster-autoscaler.yaml", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(cluster):
        [volume] = [each for each in pod["volumes"] if "persistentVolumeClaim" in each]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        mounted = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted[volume["name"]] == "/mnt/shared"


def test_the_pages_example_for_kueue_fits_the_job() -> None:
    [block] = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    change, whole = yaml.safe_load(block), job()
    whole["metadata"] |= change["metadata"]
    whole["spec"] |= {name: value for name, value in change["spec"].items() if name != "rayClusterSpec"}
    cluster = whole["spec"]["rayClusterSpec"]
    cluster |= {name: v for name, v in change["spec"]["rayClusterSpec"].items() if name != "workerGroupSpecs"}
    cluster["workerGroupSpecs"][0] |= change["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    check(whole)
    assert whole["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "gpu"}
    assert (whole["spec"]["suspend"], whole["spec"]["shutdownAfterJobFinishes"]) == (True, True)
