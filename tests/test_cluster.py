"""The deployment files hold what they promise, and the doctor asks every node of a cluster."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from methods.parts.errors import ConfigError
from pipeline.config import DataConfig, RunConfig, TrainConfig
from pipeline.data import ray_data
from pipeline.doctor import cluster, report
from pipeline.machine import Check
from pipeline.recipes import load_recipe

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RAY = next(r for r in map(Requirement, PROJECT["project"]["dependencies"]) if r.name == "ray")
SHARDS = DataConfig().num_shards


def find(checks: list[Check], name: str) -> Check:
    (check,) = [c for c in checks if c.name == name]
    return check


# ---------------------------------------------------------------------------- cluster.yaml


@pytest.fixture(scope="module")
def launcher() -> dict[str, Any]:
    """cluster.yaml as it is; no cloud is asked."""
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_the_launcher_accepts_the_file(launcher: dict[str, Any]) -> None:
    """By the schema that Ray's launcher checks files with, which has no dry run; it finds an unknown key."""
    import jsonschema
    import ray

    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(launcher, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(launcher | {"max_worker": 3}, schema)


def test_pools_and_their_roles(launcher: dict[str, Any]) -> None:
    types = launcher["available_node_types"]
    assert set(types) == {"head", "cpu", "gpu"} and launcher["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0}, "no training and no tasks on the head"
    assert "InstanceMarketOptions" not in types["head"]["node_config"], "a head on a spot instance takes the cluster with it"
    assert types["cpu"]["resources"]["CPU"] >= 8 and "GPU" not in types["cpu"]["resources"]
    assert types["gpu"]["resources"]["GPU"] >= 1
    assert types["gpu"]["resources"]["CPU"] > types["gpu"]["resources"]["GPU"], "whole CPUs are left for Ray Data"
    assert types["gpu"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    for name in ("cpu", "gpu"):
        assert types[name]["min_workers"] == 0 < types[name]["max_workers"], "an idle cluster costs its head only"
    assert launcher["max_workers"] == sum(types[name]["max_workers"] for name in ("cpu", "gpu"))
    assert types["gpu"]["max_workers"] * types["gpu"]["resources"]["GPU"] == SHARDS, "more workers than shards cannot share a batch"
    assert launcher["idle_timeout_minutes"] <= 30


def test_set_up_installs_this_project_with_one_ray_on_every_machine(launcher: dict[str, Any]) -> None:
    (install,) = [line for line in launcher["setup_commands"] if "manyviews[cluster]" in line]
    pinned = re.search(r'"ray==([\d.]+)"', install)
    assert pinned and RAY.specifier.contains(pinned[1])
    assert "-c /shared/constraints.txt" in install, "machines that join later install the same versions"
    python = re.search(r"python(3\.\d+) -m venv", " ".join(launcher["setup_commands"]))
    assert python and SpecifierSet(PROJECT["project"]["requires-python"]).contains(f"{python[1]}.0")
    (extra,) = map(Requirement, PROJECT["project"]["optional-dependencies"]["cluster"])
    assert extra.extras == {"default"} and extra.specifier == RAY.specifier
    for kind in ("head", "worker"):
        (start,) = [line for line in launcher[f"{kind}_start_ray_commands"] if " start " in line]
        assert "RAY_AUTH_MODE=token RAY_JOB_STOP_WAIT_TIME_S=60 ~/venv/bin/ray start" in start


def test_the_files_sent_are_those_that_an_installation_needs_and_no_more(launcher: dict[str, Any]) -> None:
    mounts = {remote: local for remote, local in launcher["file_mounts"].items() if remote.startswith("~/manyviews/")}
    assert all((ROOT / local).exists() and remote == f"~/manyviews/{local}" for remote, local in mounts.items())
    project, settings = PROJECT["project"], PROJECT["tool"]["setuptools"]
    rooms = {pattern.rstrip("*") for pattern in settings["packages"]["find"]["include"]}
    modules = {f"{name}.py" for name in settings["py-modules"]}
    assert set(mounts.values()) == rooms | modules | {"pyproject.toml", project["readme"], *project["license-files"]}
    assert launcher["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("__pycache__" in pattern for pattern in launcher["rsync_exclude"])


def test_storage_is_mounted_on_every_machine_and_used_by_the_commands_of_the_page(launcher: dict[str, Any]) -> None:
    (mount,) = [line for line in launcher["setup_commands"] if "mount -t nfs4" in line]
    region = launcher["provider"]["region"]
    assert f".efs.{region}.amazonaws.com:/ /shared" in mount and "mountpoint -q /shared ||" in mount
    assert all(zone.startswith(region) for zone in launcher["provider"]["availability_zone"].split(","))
    page = (ROOT / "docs" / "cluster.md").read_text()
    commands = re.findall(r"manyviews\.py (?:pretrain|resume|evaluate|embed)[^\n]*(?:\\\n[^\n]*)*", page)
    assert len(commands) >= 4
    for command in commands:
        assert "--runs-dir /shared/runs" in command, command


def test_lines_to_edit_are_marked_and_counted() -> None:
    text = (ROOT / "cluster.yaml").read_text()
    marked = [line for line in text.splitlines() if "EDIT" in line and "marked EDIT" not in line]
    assert len(marked) == 4 and "there are four" in text
    for placeholder in ("ami-0", "fs-0"):
        assert placeholder in text


# ---------------------------------------------------------------------------- deploy/rayjob.yaml


@pytest.fixture(scope="module")
def manifests() -> tuple[dict[str, Any], dict[str, Any]]:
    claim, job = yaml.safe_load_all((ROOT / "deploy" / "rayjob.yaml").read_text())
    return claim, job


def pods(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    spec = job["spec"]["rayClusterSpec"]
    return {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def test_the_ray_job_runs_a_verb_of_ours_from_the_image(manifests: tuple[dict[str, Any], dict[str, Any]]) -> None:
    import manyviews
    from pipeline.cli.verb import read

    _, job = manifests
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    program, script, *words = job["spec"]["entrypoint"].split()
    recipe = (ROOT / "deploy" / "Dockerfile").read_text()
    assert (program, script) == ("python", "/manyviews/manyviews.py") and "WORKDIR /manyviews" in recipe
    asked = read(manyviews.VERBS, words)
    assert asked is not None
    verb, settings = asked
    assert isinstance(verb, manyviews.Pretrain)
    assert (str(verb.runs_dir), verb.recipe) == ("/shared/runs", "swav")
    assert {setting.split("=")[0] for setting in settings} == {"--data.path", "--train.workers"}
    environment = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert environment["MLFLOW_TRACKING_URI"].startswith("http")
    assert job["spec"]["shutdownAfterJobFinishes"] is True and job["spec"]["backoffLimit"] == 0


def test_the_ray_job_has_an_idle_head_and_two_scaled_groups(manifests: tuple[dict[str, Any], dict[str, Any]]) -> None:
    claim, job = manifests
    spec, groups = job["spec"]["rayClusterSpec"], pods(job)
    assert set(groups) == {"head", "cpu", "gpu"} and spec["enableInTreeAutoscaling"] is True
    assert spec["authOptions"] == {"mode": "token"} and RAY.specifier.contains(spec["rayVersion"])
    assert groups["head"]["rayStartParams"]["num-cpus"] == "0"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for name, group in groups.items():
        (container,) = group["template"]["spec"]["containers"]
        resources = container["resources"]
        assert resources["requests"] == resources["limits"], "Ray counts what the pod may use"
        assert ("nvidia.com/gpu" in resources["limits"]) == (name == "gpu")
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
        (volume,) = group["template"]["spec"]["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert container["image"] == "REGISTRY/manyviews:" + PROJECT["project"]["version"]
        if name != "head":
            assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
    assert groups["gpu"]["maxReplicas"] == SHARDS
    assert groups["gpu"]["template"]["spec"]["tolerations"]


def test_image_launcher_and_manifest_agree_on_ray_and_python(launcher: dict[str, Any], manifests: tuple[Any, dict[str, Any]]) -> None:
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    image = re.search(r"FROM rayproject/ray:([\d.]+)-py3(\d+)-gpu", text)
    assert image and f'"ray=={image[1]}"' in text and image[1] == manifests[1]["spec"]["rayClusterSpec"]["rayVersion"]
    assert f'"ray=={image[1]}"' in " ".join(launcher["setup_commands"])
    assert f"python3.{image[2]} -m venv" in " ".join(launcher["setup_commands"])
    for line in text.splitlines():
        if line.startswith("COPY"):
            assert all((ROOT / source).exists() for source in line.split()[2:-1])


# ---------------------------------------------------------------------------- joining


def test_workers_of_a_cluster_get_code_but_no_path_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "somewhere"))
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    environment = ray_data.cluster_environment()
    assert environment["working_dir"] == str(ROOT)
    assert "PYTHONPATH" not in environment["env_vars"] and environment["env_vars"]["OMP_NUM_THREADS"] == "1"
    job = '{"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip", "env_vars": {"OMP_NUM_THREADS": "4"}}}'
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", job)
    environment = ray_data.cluster_environment()
    assert "working_dir" not in environment and "OMP_NUM_THREADS" not in environment["env_vars"]


def test_an_installed_package_is_not_uploaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.setattr(ray_data, "ROOT", tmp_path)
    assert "working_dir" not in ray_data.cluster_environment()


def test_the_address_of_a_dashboard_is_explained_and_a_row_of_the_doctors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import ray

    ray.shutdown()  # another test's: where a Ray is there, no address is looked at
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ConfigError, match=r"^RAY_ADDRESS=http.*ray job submit --working-dir \. --"):
        ray_data.start_ray()
    check = find(report.diagnose(runs_dir=tmp_path), "cluster")
    assert (check.ok, check.found) == ("fail", "RAY_ADDRESS=http://127.0.0.1:8265") and "ray job submit" in check.remedy


def test_results_are_not_left_in_the_copy_of_a_job(tmp_path: Path) -> None:
    from pipeline.run_folder import create_run

    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1" / "runs"
    with pytest.raises(ConfigError, match=r"runs_dir=.*give a shared folder"):
        create_run(copy, "first", "swav-small")
    assert not copy.exists()


# ---------------------------------------------------------------------------- the doctor's findings


def test_versions_that_differ_are_told_with_their_nodes() -> None:
    same = {"Python": "3.12.3", "ray": "2.60.0", "Manyviews": "0a1b"}
    good = cluster.check_versions({"a": same, "b": same | {"Python": "3.12.9"}})
    assert good.ok == "ok" and "2 nodes" in good.found and "Python 3.12," in good.found
    bad = cluster.check_versions({"a": same, "b": same | {"ray": "2.61.0"}, "c": same})
    assert bad.ok == "fail" and bad.found == "ray: 2.60.0 on a, c; 2.61.0 on b"


def test_storage_that_a_node_does_not_see_fails_with_its_name(tmp_path: Path) -> None:
    seen = cluster.Node(versions={"ray": "2.60.0"})
    nodes = {"10.0.0.1": seen, "10.0.0.2": cluster.Node(versions=seen.versions, storage="No such file or directory")}
    check = find(list(cluster.check_nodes(nodes, tmp_path, None)), "shared runs")
    assert check.ok == "fail" and "10.0.0.2: No such file" in check.found and "10.0.0.1" not in check.found
    broken = list(cluster.check_nodes({"10.0.0.1": cluster.Node(error="ModuleNotFoundError: No module named 'torch'")}, tmp_path, None))
    assert [c.name for c in broken] == ["nodes"] and "torch" in broken[0].found


@pytest.mark.parametrize(
    ("workers", "nodes", "verdict"),
    [
        (4, [{"CPU": 8, "GPU": 1}] * 4, "ok"),
        (5, [{"CPU": 8, "GPU": 1}] * 4, "warn"),  # the pool may grow
        ("2:8", [{"CPU": 8, "GPU": 1}] * 2, "ok"),
        (2, [{"CPU": 2}, {"CPU": 2}], "ok"),
        (16, [{"CPU": 2}, {"CPU": 2}], "warn"),  # no CPU for Ray Data
        (0, [{"CPU": 0}, {"CPU": 8, "GPU": 1}], "warn"),  # would train in the job's own process
    ],
)
def test_resources_against_the_plan(workers: int | str, nodes: list[dict[str, float]], verdict: str) -> None:
    config = RunConfig(train=TrainConfig(workers=workers))
    have = {key: sum(node.get(key, 0) for node in nodes) for key in ("CPU", "GPU")}
    (check,) = cluster.check_workers(config, have, nodes)
    assert check.name == "workers" and check.ok == verdict


# ---------------------------------------------------------------------------- a cluster of two nodes


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()  # another test's; a cluster can be joined by one Ray at a time
    it = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100_000_000})
    try:
        it.add_node(wait=False, num_cpus=2, object_store_memory=100_000_000)
        it.wait_for_nodes(timeout=120)
        monkeypatch.setenv("RAY_ADDRESS", it.address)
        yield it.address
    finally:
        ray.shutdown()
        it.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_doctor_asks_both_nodes_of_a_cluster(two_nodes: str, tmp_path: Path) -> None:
    import ray

    checks = report.diagnose(runs_dir=tmp_path / "shared" / "runs", config=load_recipe("swav-small"))
    assert [check.name for check in checks if check.ok == "fail"] == []
    assert find(checks, "cluster").found.startswith("2 nodes, 2 CPUs, 0 GPUs")
    assert "2 nodes write and read" in find(checks, "shared runs").found
    assert f"ray {ray.__version__}" in find(checks, "versions").found and "2 nodes" in find(checks, "versions").found
    assert find(checks, "workers").ok == "warn"
    assert not list(tmp_path.rglob(".doctor-*")), "the probe is gone"
    assert not ray.is_initialized(), "left as it was found"
    assert not [check for check in checks if check.name == "Ray"], "nothing is asked twice"
