#!/usr/bin/env bash
# One node's part of a run, started by train.sbatch: a launcher with a process for each GPU. The arguments are those of
# `tracereward train`.
set -euo pipefail

accelerate launch --config_file "$ACCELERATE_CONFIG" \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * GPUS))" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$FIRST_NODE" --main_process_port "$PORT" \
    -m tracereward train "$@" &
launcher=$!

# SIGTERM goes to the processes and not to the launcher, which would kill them after 30 seconds: a step and a checkpoint
# may take longer.
trap 'pkill -TERM -P "$launcher" || true' TERM
status=0
wait "$launcher" || status=$?
while kill -0 "$launcher" 2> /dev/null; do # a signal ended the wait, not the launcher
    status=0
    wait "$launcher" || status=$?
done
exit "$status"
