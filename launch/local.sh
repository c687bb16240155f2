#!/bin/sh
# Prepares a recipe's data and trains on this machine, without `turbolm train`: what that command does, by hand.
#
#   launch/local.sh RECIPE [key=value ...]
#
#   ACCELERATE_CONFIG  launch/accelerate/cpu.yaml by default, gpu.yaml where there is an NVIDIA GPU
#   NUM_PROCESSES      overrides that file
set -eu

[ $# -ge 1 ] || { echo "usage: $0 RECIPE [key=value ...]" >&2; exit 2; }
recipe=$1
shift

here=$(cd "$(dirname "$0")" && pwd)
# What another launcher exported describes another world, which torchrun would wait for.
for name in $(env | sed -n 's/^\(PET_[A-Z_]*\|MASTER_ADDR\|MASTER_PORT\|RANK\|LOCAL_RANK\|WORLD_SIZE\)=.*/\1/p'); do
    echo "launch/local.sh: not passed on: $name" >&2
    unset "$name"
done
# DeepSpeed looks for ninja on PATH.
PATH=$here/../.venv/bin:$PATH
export PATH

config=$here/accelerate/cpu.yaml
if [ -e /dev/nvidia0 ]; then config=$here/accelerate/gpu.yaml; fi
# One thread a process: two processes with two threads each fight for two cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

turbolm prepare "$recipe" "$@"
exec accelerate launch --config_file "${ACCELERATE_CONFIG:-$config}" ${NUM_PROCESSES:+--num_processes "$NUM_PROCESSES"} \
    --mixed_precision no --dynamo_backend no --main_process_port "${MAIN_PROCESS_PORT:-0}" \
    -m turbolm.train --recipe "$recipe" "$@"
