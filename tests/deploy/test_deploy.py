"""Container, compose and Kubernetes files: schemas, linters, command-line options, and hardening."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from accelerate.commands.launch import launch_command_parser

from helpers.paths import ROOT
from tracereward.cli.serve import server
from tracereward.cli.training_options import parse

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
MANIFESTS = sorted(DEPLOY.glob("kubernetes*.yaml"))


def documents(path: Path) -> dict[str, dict[str, Any]]:
    """Documents of a manifest by kind."""
    return {document["kind"]: document for document in yaml.safe_load_all(path.read_text())}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifest_matches_schema(path):
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for document in documents(path).values():
        validator.validate(document, validator.latest_version(), strict=True)


def test_compose_matches_schema():
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed")
    words = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*words, DEPLOY / "compose.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_dockerfile_passes_hadolint():
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# The server


def options(words: list[str]) -> dict[str, Any]:
    """Options of `tracereward serve` parsed from its arguments; an unknown one is an error."""
    return typer.main.get_command(server).make_context("serve", list(words)).params


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


def instruction(name: str) -> str:
    """The last instruction of this name in the Dockerfile, the effective one."""
    return re.findall(rf"^{name} ((?:.*\\\n)*.*)$", DOCKERFILE, flags=re.MULTILINE)[-1].replace("\\\n", "")


def test_image():
    """Non-root, pinned base image, no secrets, and a health check on the port of the server."""
    user, _, group = instruction("USER").partition(":")
    assert int(user) > 0
    assert int(group) > 0
    assert re.search(r"^ARG BASE=\S+:\d\S*$", DOCKERFILE, flags=re.MULTILINE)
    assert not re.search(r"key|secret|token|password", DOCKERFILE, flags=re.IGNORECASE)
    given = options(yaml.safe_load(instruction("CMD")))
    assert yaml.safe_load(instruction("ENTRYPOINT")) == ["tracereward", "serve"]
    assert given["host"] == "0.0.0.0"
    assert f"http://127.0.0.1:{given['port']}/ready" in instruction("HEALTHCHECK")
    assert instruction("EXPOSE") == str(given["port"])
    [stop] = re.findall(r"docker stop --timeout (\d+)", DOCKERFILE)
    assert int(stop) > given["drain_seconds"]


def test_compose():
    """Only the server publishes a port, on the loopback address; it is hardened, and its key is a secret file."""
    policy, served = COMPOSE["services"]["policy"], COMPOSE["services"]["tracereward"]
    given = options(served["command"])
    assert "ports" not in policy
    assert served["ports"] == [f"127.0.0.1:{given['port']}:{given['port']}"]
    assert given["upstream"].startswith("http://policy:8000/")
    assert served["depends_on"]["policy"]["condition"] == "service_healthy"
    assert (served["read_only"], served["cap_drop"]) == (True, ["ALL"])
    assert served["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in served
    assert "user" not in served  # set by the image
    assert not [name for service in (policy, served) for name in service.get("environment", {}) if "KEY" in name]
    assert [str(given["api_key_file"])] == [f"/run/secrets/{name}" for name in served["secrets"]]
    assert COMPOSE["secrets"].keys() == set(served["secrets"])
    assert all(volume.endswith(":ro") for volume in served["volumes"])
    assert seconds(served["stop_grace_period"]) > given["drain_seconds"]
    assert re.search(r":\$\{VLLM_TAG:\?", policy["image"])  # the version is required


def test_server_pods():
    kinds = documents(DEPLOY / "kubernetes.yaml")
    template = kinds["Deployment"]["spec"]["template"]
    pod = template["spec"]
    [container] = pod["containers"]
    given = options(container["args"])
    port = container["ports"][0]
    assert port["containerPort"] == given["port"]
    assert template["metadata"]["annotations"] == {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(given["port"]),
        "prometheus.io/path": "/metrics",
    }
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > pause + given["drain_seconds"]
    assert kinds["Service"]["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert kinds["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert given["model"] == mounts["model"]
    assert given["api_key_file"].parent == Path(mounts["key"])
    assert_locked_down(pod, container)


def assert_locked_down(pod: dict[str, Any], container: dict[str, Any]) -> None:
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


# Training


def test_training_pods_rendezvous():
    kinds = documents(DEPLOY / "kubernetes-train.yaml")
    assert kinds.keys() == {"Service", "Job"}
    service, job = kinds["Service"], kinds["Job"]
    pod = job["spec"]["template"]
    [container] = pod["spec"]["containers"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert (service["spec"]["clusterIP"], service["spec"]["publishNotReadyAddresses"]) == ("None", True)
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert job["spec"]["completionMode"] == "Indexed"

    assert container["command"][:2] == ["accelerate", "launch"]
    rank = {variable["name"]: variable for variable in container["env"]}["NODE_RANK"]
    assert "job-completion-index" in rank["valueFrom"]["fieldRef"]["fieldPath"]
    words = [word.replace("$(NODE_RANK)", "1") for word in container["command"][2:] + container["args"]]
    arguments = launch_command_parser().parse_args(words)
    pods, gpus = job["spec"]["completions"], container["resources"]["limits"]["nvidia.com/gpu"]
    assert arguments.num_machines == job["spec"]["parallelism"] == pods
    assert arguments.num_processes == pods * gpus
    assert arguments.machine_rank == 1
    assert arguments.main_process_ip == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    ports = {service["spec"]["ports"][0]["port"], container["ports"][0]["containerPort"]}
    assert ports == {arguments.main_process_port}
    assert arguments.training_script == "tracereward"
    kind, *options = arguments.training_script_args
    options = [word for word in options if not word.startswith("--config")]
    assert parse(kind, [*options, "--model_name_or_path", "policy"])[3], "it must resume"


def test_training_volumes():
    pod = documents(DEPLOY / "kubernetes-train.yaml")["Job"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    created = re.findall(r"--from-file=([\w.]+)=", (DEPLOY / "kubernetes-train.yaml").read_text())
    read = [word.split("=/config/")[1] for word in container["command"] + container["args"] if "=/config/" in word]
    assert sorted(created) == sorted(read)
    assert_locked_down(pod, container)
