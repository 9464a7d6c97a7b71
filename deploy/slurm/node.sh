#!/usr/bin/env bash
# One node's part of a run, started by train.sbatch: a launcher with a process for each GPU. The arguments are those of
# `tracereward train`.
set -euo pipefail

# SIGTERM goes to the processes and not to the launcher, which would kill them after 30 seconds: a step and a checkpoint
# may take longer.
launcher='' told=false
pass_on() {
    told=true
    # It has no processes yet while it starts and while it waits for the other nodes.
    if [ -n "$launcher" ]; then pkill -TERM -P "$launcher" || kill -TERM "$launcher" 2> /dev/null || true; fi
}
trap pass_on TERM

accelerate launch --config_file "$ACCELERATE_CONFIG" \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * GPUS))" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$FIRST_NODE" --main_process_port "$PORT" \
    -m tracereward train "$@" &
launcher=$!
if "$told"; then pass_on; fi

told=true
while "$told"; do # a signal ends a wait, not the launcher
    told=false status=0
    wait "$launcher" || status=$?
done
exit "$status"
