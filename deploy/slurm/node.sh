#!/usr/bin/env bash
# Runs the launcher of one node, with one process per GPU; started by train.sbatch. The arguments are those of
# `tracereward train`.
set -euo pipefail

# SIGTERM goes to the processes, not to the launcher, which would kill them after 30 seconds: a step and a checkpoint
# may take longer.
launcher='' signalled=false
forward_signal() {
    signalled=true
    # The launcher has no processes yet during startup and while it waits for the other nodes.
    if [ -n "$launcher" ]; then pkill -TERM -P "$launcher" || kill -TERM "$launcher" 2> /dev/null || true; fi
}
trap forward_signal TERM

accelerate launch --config_file "$ACCELERATE_CONFIG" \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * GPUS))" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$FIRST_NODE" --main_process_port "$PORT" \
    -m tracereward train "$@" &
launcher=$!
if "$signalled"; then forward_signal; fi

signalled=true
while "$signalled"; do # a signal interrupts `wait`, not the launcher
    signalled=false status=0
    wait "$launcher" || status=$?
done
exit "$status"
