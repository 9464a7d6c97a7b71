"""A training run on the nodes of a Ray cluster: one launcher a node, on GPUs that Ray sets aside for it.

On a machine of the cluster, in a folder that all nodes see, with tracereward and Ray installed on each::

    python deploy/ray_train.py --nodes 2 --processes 8 recipe.yaml [--option value ...]

or from elsewhere, with absolute paths in the recipe: ``ray job submit --working-dir . -- python deploy/ray_train.py``
and the rest. Ctrl-C and SIGTERM let the processes finish their step and save a checkpoint; so does ``ray job stop``,
which kills after ``RAY_JOB_STOP_WAIT_TIME_S``, 3 seconds by default. When a node is lost, the run goes on from the last
whole checkpoint as soon as Ray has as many nodes again.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

FSDP2 = Path(__file__).resolve().parents[1] / "configs" / "accelerate" / "fsdp2.yaml"


class Node:
    """One node's launcher; an actor of two threads, so that it can be stopped while it runs."""

    def __init__(self) -> None:
        self.launcher: subprocess.Popen[bytes] | None = None

    def address(self) -> tuple[str, int]:
        """Where the processes of all nodes can meet on this one."""
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def run(self, command: list[str], folder: str) -> int:
        """Exit status of the launcher; it runs in `folder`, or in Ray's copy of it."""
        self.launcher = subprocess.Popen(command, cwd=folder if Path(folder).is_dir() else None)
        return self.launcher.wait()

    def stop(self, number: int) -> None:
        """Send a signal to the processes: the launcher itself would give them 30 seconds and no more.

        To the launcher while it has none, because it is starting or waits for the other nodes.
        """
        if self.launcher is not None and self.launcher.poll() is None:
            launcher = psutil.Process(self.launcher.pid)
            for process in launcher.children() or [launcher]:
                process.send_signal(number)


def launcher(
    config: str, nodes: int, processes: int, rank: int, address: tuple[str, int], training: Sequence[str]
) -> list[str]:
    """The command of one node."""
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", config),
        *("--num_machines", str(nodes), "--num_processes", str(nodes * processes), "--machine_rank", str(rank)),
        *("--main_process_ip", address[0], "--main_process_port", str(address[1])),
        *("-m", "tracereward", "train", *training),
    ]


def attempt(actors: list, given: argparse.Namespace, told: list[int]) -> tuple[int, bool]:
    """Run until all nodes have ended.

    Args:
        actors: a `Node` on each node.
        given: options of the script.
        told: signals that have come, which a handler adds to.

    Returns:
        The first exit status other than 0, and whether a node was lost.
    """
    status, lost, stopped = 0, False, 0
    meeting = [actor.address.remote() for actor in actors]
    while len(ray.wait(meeting, num_returns=len(meeting), timeout=1)[0]) < len(meeting):  # until Ray has all nodes
        if told:
            return 1, False
    try:
        address = ray.get(meeting)[0]
    except RayActorError:
        return 1, True
    training = ["--config", given.recipe, "--resume", *given.options]
    config = str(Path(given.accelerate_config).resolve())
    running = {
        actor.run.remote(launcher(config, given.nodes, given.processes, rank, address, training), os.getcwd()): actor
        for rank, actor in enumerate(actors)
    }
    while running:
        ended, _ = ray.wait(list(running), timeout=1)
        for task in ended:
            del running[task]
            try:
                code = ray.get(task)
            except RayActorError as error:
                print(f"a node is lost: {type(error).__name__}", file=sys.stderr)
                code, lost = 1, True
            if code and not status:
                status = code
                for actor in running.values():  # their processes would wait for one that is gone
                    actor.stop.remote(signal.SIGKILL)
        if len(told) > stopped and not status:
            stopped = len(told)
            for actor in running.values():
                actor.stop.remote(signal.SIGTERM)
    return status, lost


def main() -> int:
    """Parse the options, reserve the nodes and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--processes", type=int, default=8, help="of each node, one for each GPU (default 8)")
    parser.add_argument("--gpus", type=int, help="of each node (default: as many as processes)")
    parser.add_argument("--cpus", type=int, default=1, help="of each node that Ray sets aside")
    parser.add_argument("--accelerate-config", default=str(FSDP2))
    parser.add_argument("--restarts", type=int, default=20, help="after lost nodes (default 20)")
    parser.add_argument("recipe", help="a YAML file for tracereward train")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of tracereward train")
    given = parser.parse_args()

    told: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: told.append(number))
    ray.init(log_to_driver=True)
    gpus = given.processes if given.gpus is None else given.gpus
    bundle = {"CPU": given.cpus, **({"GPU": gpus} if gpus else {})}
    group = placement_group([bundle] * given.nodes, strategy="STRICT_SPREAD")
    for restart in range(given.restarts + 1):
        print(f"waiting for {given.nodes} nodes, each with {bundle}", file=sys.stderr)
        actors = [
            ray.remote(Node)
            .options(
                num_cpus=given.cpus,
                num_gpus=gpus,
                max_concurrency=2,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            )
            .remote()
            for rank in range(given.nodes)
        ]
        status, lost = attempt(actors, given, told)
        for actor in actors:
            ray.kill(actor)
        if not lost or told or restart == given.restarts:
            return status
        print("going on from the last whole checkpoint", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
