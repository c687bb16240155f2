#!/bin/sh
# sh benchmarks/gpu_wheels.sh FOLDER [PYTHON_VERSION]: what a machine with torch, Transformers and Accelerate still needs
# for benchmarks/gpu.sh, without pip or a network there. Fetches wheels for Linux x86-64 and unpacks them into FOLDER:
# copy it there and set TURBOLM_WHEELS to it. Needs pip and a network here.
set -eu
folder=${1:?usage: gpu_wheels.sh FOLDER [PYTHON_VERSION]}
version=${2:-3.12}
python=${PYTHON:-python3}
abi=cp$(echo "$version" | tr -d .)
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
fetch() {
    "$python" -m pip download --quiet --dest "$wheels" --only-binary=:all: --python-version "$version" \
        --implementation cp --abi "$abi" --abi abi3 --abi none --platform manylinux2014_x86_64 \
        --platform manylinux_2_28_x86_64 --platform any "$@"
}
fetch pydantic pytest hypothesis  # with what they need
fetch --no-deps hjson msgpack py-cpuinfo einops ninja psutil zstandard torchao liger-kernel
# DeepSpeed is published as source only: without its kernels, which it builds when they are used, the wheel is pure Python
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --wheel-dir "$wheels" "deepspeed>=0.19.8,<0.20"
mkdir -p "$folder"
for wheel in "$wheels"/*.whl; do
    "$python" -m zipfile -e "$wheel" "$folder"
done
chmod +x "$folder"/*.data/scripts/*
ls "$wheels"
