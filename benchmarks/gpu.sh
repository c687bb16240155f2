#!/bin/sh
# Everything benchmarks/gpu.py measures, on one GPU, in under 9 minutes; with --check first, tests of 3 minutes instead.
# PYTHON chooses the interpreter, TURBOLM_WHEELS a folder of unpacked wheels (benchmarks/gpu_wheels.sh).
set -eu
cd "$(dirname "$0")/.."
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
python=${PYTHON:-python3}
[ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ] && python=.venv/bin/python
PYTHONPATH="src:.${TURBOLM_WHEELS:+:$TURBOLM_WHEELS}${PYTHONPATH:+:$PYTHONPATH}"
for scripts in ${TURBOLM_WHEELS:+"$TURBOLM_WHEELS"/*.data/scripts}; do PATH="$(cd "$scripts" && pwd):$PATH"; done
export PYTHONPATH PATH
"$python" - "$@" <<'EOF'
import importlib.util, sys, sysconfig
from pathlib import Path
needed = "torch transformers accelerate deepspeed hjson msgpack cpuinfo einops ninja psutil pydantic zstandard datasets"
needed = [*needed.split(), *(["pytest", "hypothesis"] if "--check" in sys.argv else [])]
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"{sys.executable} lacks {', '.join(missing)}: benchmarks/gpu_wheels.sh fetches wheels for TURBOLM_WHEELS")
if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
    print("no Python.h (package python3-dev): Triton cannot compile, so what is compiled is left out or fails")
EOF
if [ "${1:-}" = --check ]; then
    shift
    exec "$python" -m pytest -q -p no:cacheprovider tests/gpu -k "test_check or isolated or auto or chunked" "$@"
fi
exec "$python" benchmarks/gpu.py "$@"
