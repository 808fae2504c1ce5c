"""cluster.yaml is a file that Ray's own cluster launcher accepts, and is the cluster that the README promises."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.conftest import REPOSITORY


@pytest.fixture
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())
    return loaded


def test_it_keeps_rays_schema(config: dict[str, Any]) -> None:
    validate_config(prepare_config(config))


def test_the_schema_check_can_fail(config: dict[str, Any]) -> None:
    config["available_node_types"]["gpu"]["replicas"] = 4
    with pytest.raises(Exception, match="replicas"):
        validate_config(prepare_config(config))


def test_it_scales_one_gpu_workers_from_zero_to_four(config: dict[str, Any]) -> None:
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    gpu = config["available_node_types"]["gpu"]
    assert (gpu["min_workers"], gpu["max_workers"], gpu["resources"]["GPU"]) == (0, 4, 1)
    assert config["max_workers"] == 4


def test_it_installs_this_project_and_starts_ray_from_there(config: dict[str, Any]) -> None:
    setup = "\n".join(config["setup_commands"])
    assert "pip install -q -c ~/ray-ckpt/constraints.txt -e ~/ray-ckpt" in setup
    assert config["file_mounts"]["~/ray-ckpt"] == "."
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert "venv/bin" in commands[-1]
        assert "RAY_AUTH_MODE=token" in commands[-1]
