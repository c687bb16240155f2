#!/bin/bash
# Trains on several machines over plain ssh, without Slurm; torchrun brings the processes together.
#
#   launch/ssh.sh HOSTFILE RECIPE [key=value ...]
#
# HOSTFILE has one host a line; the first is the head, and every machine must reach it under that name. All machines
# see this folder, the data and the run directory under the same paths (a shared file system), and accept your ssh key.
#
#   NUM_PROCESSES  processes of each machine (default 8: one for each GPU)
#   PORT           a free port of the head (default 29500)
#
# Ctrl-C, like `turbolm stop RUN`, asks the run to save and stop. The same command resumes it.
set -euo pipefail

[ $# -ge 2 ] || { echo "usage: $0 HOSTFILE RECIPE [key=value ...]" >&2; exit 2; }
hostfile=$1 recipe=$2
shift 2
mapfile -t hosts < <(grep -v '^[[:space:]]*\(#\|$\)' -- "$hostfile")
[ ${#hosts[@]} -ge 1 ] || { echo "$hostfile names no host" >&2; exit 2; }
for host in "${hosts[@]}"; do
    # ssh takes what starts with a dash for an option, and some options run commands.
    [[ $host =~ ^[A-Za-z0-9][A-Za-z0-9._@:-]*$ ]] || { printf '%s: not a host: %q\n' "$hostfile" "$host" >&2; exit 2; }
done

here=$(cd "$(dirname "$0")" && pwd)
bin=$(cd "$here/../.venv/bin" && pwd)
PATH=$bin:$PATH
overrides=("$@" "cluster.num_nodes=${#hosts[@]}")
head=${hosts[0]#*@}

turbolm prepare "$recipe" "${overrides[@]}"

where='import sys
from turbolm.recipe.load import load_recipe
from turbolm.train.run_directory import run_directory
print(run_directory(load_recipe(sys.argv[1], sys.argv[2:])).path)'
run=$(python -c "$where" "$recipe" "${overrides[@]}")
pids=()
# Refused while no rank has opened the run yet: asked again until one has, or all have ended.
trap 'until turbolm stop "$run" || ! kill -0 "${pids[@]}" 2>/dev/null; do sleep 1; done' INT TERM

for rank in "${!hosts[@]}"; do
    command=(env "PATH=$PATH" "OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}" PET_SIGNALS_TO_HANDLE=SIGQUIT
        "$bin/torchrun" "--nnodes=${#hosts[@]}" "--node-rank=$rank" "--nproc-per-node=${NUM_PROCESSES:-8}"
        --rdzv-backend=static "--master-addr=$head" "--master-port=${PORT:-29500}"
        -m turbolm.train --recipe "$recipe" "${overrides[@]}")
    # ssh joins its arguments with blanks and hands them to a shell there: each is quoted for that shell.
    ssh -- "${hosts[rank]}" "cd $(printf '%q' "$PWD") && exec$(printf ' %q' "${command[@]}")" &
    pids+=("$!")
done

code=0
for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do
        wait "$pid" && status=0 || status=$?
    done
    wait "$pid" 2>/dev/null && status=0 || status=$?
    [ "$status" -le "$code" ] || code=$status
done
exit "$code"
