"""A training run on two nodes of a Ray cluster, one of which is killed."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from types import ModuleType

import psutil
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from helpers.launch_files import FILES, ROOT, TINY_RUN, wait_for
from tracereward.synthetic.arithmetic import generate

ray = pytest.importorskip("ray", reason="ray is not installed")
SCRIPT = ROOT / "deploy" / "ray_train.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ray_train", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_launcher_arguments():
    command = load().launcher(
        "fsdp2.yaml",
        nodes=3,
        processes=8,
        rank=1,
        address=("10.0.0.7", 4321),
        training=["--config", "recipe.yaml", "--resume"],
    )
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    arguments = launch_command_parser().parse_args(command[3:])
    assert (arguments.config_file, arguments.num_machines, arguments.num_processes) == ("fsdp2.yaml", 3, 24)
    assert (arguments.machine_rank, arguments.main_process_ip, arguments.main_process_port) == (1, "10.0.0.7", 4321)
    assert (arguments.module, arguments.training_script) == (True, "tracereward")
    assert arguments.training_script_args == ["train", "--config", "recipe.yaml", "--resume"]


@pytest.mark.slow
def test_run_survives_lost_node_and_stops_on_sigterm(tmp_path, tiny_model_folder, monkeypatch):
    """Two raylets on this machine act as nodes. One is killed: the run waits for another and resumes; then SIGTERM."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")  # other programs may use the memory

    rows = generate("misconception", 60, seed=1)
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {**TINY_RUN, "model_name_or_path": str(tiny_model_folder), "save_steps": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    metrics, checkpoints = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "checkpoints"

    def steps() -> list[int]:
        found = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
        return [row["step"] for row in found if row["phase"] == "train"]

    def saved() -> list[int]:
        return sorted(int(path.parent.name.split("-")[1]) for path in checkpoints.glob("checkpoint-*/complete.json"))

    def output() -> str:
        return (tmp_path / "output.txt").read_text()

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    script = None
    try:
        other = cluster.add_node(num_cpus=1)
        options = ["--nodes", "2", "--processes", "1", "--gpus", "0", "--accelerate-config", str(FILES["ddp"])]
        variables = {"RAY_ADDRESS": cluster.address, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        with open(tmp_path / "output.txt", "wb") as file:
            script = subprocess.Popen(
                [sys.executable, SCRIPT, *options, "recipe.yaml", "--max_steps", "500"],
                cwd=tmp_path,
                env={**os.environ, **variables},
                stdout=file,
                stderr=file,
            )
        wait_for(lambda: len(saved()) > 0, script, 300, tmp_path)
        services = [psutil.Process(found.process.pid) for of in other.all_processes.values() for found in of]
        for process in [*(child for service in services for child in service.children(recursive=True)), *services]:
            process.kill()
        wait_for(lambda: "a node is lost" in output(), script, 120, tmp_path)
        reached = saved()[-1]
        cluster.add_node(num_cpus=1)
        wait_for(lambda: saved()[-1] > reached, script, 300, tmp_path)
        [left] = [path for path in checkpoints.glob("checkpoint-*") if path.name.endswith(f"-{saved()[-1]}")]
        assert (left / "rng_state_1.pth").is_file(), "only one process ran"
        script.send_signal(signal.SIGTERM)
        assert script.wait(timeout=120) != 0
    finally:
        if script is not None:
            script.kill()
        cluster.shutdown()
    assert f"resuming from run/checkpoints/checkpoint-{reached}" in output()
    assert steps() == list(range(1, len(steps()) + 1))
    assert saved()[-1] == steps()[-1], "the running step must be saved"
