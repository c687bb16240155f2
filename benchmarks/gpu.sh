#!/bin/sh
# Everything benchmarks/gpu.py measures, on one GPU, in under 9 minutes. PYTHON chooses the interpreter; packages that
# are only unpacked wheels can be put on PYTHONPATH.
set -eu
cd "$(dirname "$0")/.."
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
python=${PYTHON:-python3}
[ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ] && python=.venv/bin/python
PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" exec "$python" benchmarks/gpu.py "$@"
