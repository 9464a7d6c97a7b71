"""Run training on the nodes of a Ray cluster: one launcher per node, on GPUs reserved by Ray.

On a machine of the cluster, in a folder shared by all nodes, with tracereward and Ray installed on each::

    python deploy/ray_train.py --nodes 2 --processes 8 recipe.yaml [--option value ...]

or from elsewhere, with absolute paths in the recipe: ``ray job submit --working-dir . -- python deploy/ray_train.py``
with the same arguments. Ctrl-C and SIGTERM let the processes finish their step and save a checkpoint; so does ``ray job
stop``, which kills them after ``RAY_JOB_STOP_WAIT_TIME_S``, 3 seconds by default. When a node is lost, the run resumes
from the last complete checkpoint as soon as Ray has enough nodes again.
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
    """The launcher of one node; an actor with two threads, so that it can be stopped while it runs."""

    def __init__(self) -> None:
        self.launcher: subprocess.Popen[bytes] | None = None

    def address(self) -> tuple[str, int]:
        """Rendezvous address on this node."""
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def run(self, command: list[str], folder: str) -> int:
        """Run the launcher in `folder`, or in Ray's copy of it, and return its exit status."""
        self.launcher = subprocess.Popen(command, cwd=folder if Path(folder).is_dir() else None)
        return self.launcher.wait()

    def stop(self, number: int) -> None:
        """Send a signal to the training processes; the launcher would kill them after 30 seconds.

        While the launcher has no processes yet (startup, waiting for other nodes), the signal goes to the launcher.
        """
        if self.launcher is not None and self.launcher.poll() is None:
            launcher = psutil.Process(self.launcher.pid)
            for process in launcher.children() or [launcher]:
                process.send_signal(number)


def launcher(
    config: str, *, nodes: int, processes: int, rank: int, address: tuple[str, int], training: Sequence[str]
) -> list[str]:
    """Launch command of one node."""
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", config),
        *("--num_machines", str(nodes), "--num_processes", str(nodes * processes), "--machine_rank", str(rank)),
        *("--main_process_ip", address[0], "--main_process_port", str(address[1])),
        *("-m", "tracereward", "train", *training),
    ]


def attempt(actors: list, args: argparse.Namespace, signals: list[int]) -> tuple[int, bool]:
    """Run until the launchers of all nodes have exited.

    Args:
        actors: one `Node` per node.
        args: options of the script.
        signals: received signals, appended by a handler.

    Returns:
        The first exit status other than 0, and whether a node was lost.
    """
    status, lost, stopped = 0, False, 0
    addresses = [actor.address.remote() for actor in actors]
    while len(ray.wait(addresses, num_returns=len(actors), timeout=1)[0]) < len(actors):  # until Ray has all nodes
        if signals:
            return 1, False
    try:
        address = ray.get(addresses)[0]
    except RayActorError:
        return 1, True
    training = ["--config", args.recipe, "--resume", *args.options]
    config = str(Path(args.accelerate_config).resolve())
    running = {}
    for rank, actor in enumerate(actors):
        command = launcher(
            config, nodes=args.nodes, processes=args.processes, rank=rank, address=address, training=training
        )
        running[actor.run.remote(command, os.getcwd())] = actor
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
                for actor in running.values():  # their processes would wait for the lost one
                    actor.stop.remote(signal.SIGKILL)
        if len(signals) > stopped and not status:
            stopped = len(signals)
            for actor in running.values():
                actor.stop.remote(signal.SIGTERM)
    return status, lost


def main() -> int:
    """Parse the options, reserve the nodes and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--processes", type=int, default=8, help="per node, one for each GPU (default 8)")
    parser.add_argument("--gpus", type=int, help="per node (default: the number of processes)")
    parser.add_argument("--cpus", type=int, default=1, help="per node, reserved by Ray")
    parser.add_argument("--accelerate-config", default=str(FSDP2))
    parser.add_argument("--restarts", type=int, default=20, help="after lost nodes (default 20)")
    parser.add_argument("recipe", help="a YAML file for tracereward train")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="further options of tracereward train")
    args = parser.parse_args()

    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    ray.init(log_to_driver=True)
    gpus = args.processes if args.gpus is None else args.gpus
    bundle = {"CPU": args.cpus, **({"GPU": gpus} if gpus else {})}
    group = placement_group([bundle] * args.nodes, strategy="STRICT_SPREAD")
    for restart in range(args.restarts + 1):
        print(f"waiting for {args.nodes} nodes, each with {bundle}", file=sys.stderr)
        actors = [
            ray.remote(Node)
            .options(
                num_cpus=args.cpus,
                num_gpus=gpus,
                max_concurrency=2,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            )
            .remote()
            for rank in range(args.nodes)
        ]
        status, lost = attempt(actors, args, signals)
        for actor in actors:
            ray.kill(actor)
        if not lost or signals or restart == args.restarts:
            return status
        print("resuming from the last complete checkpoint", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
