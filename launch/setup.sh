#!/bin/sh
# Makes .venv with the pinned packages and turbolm itself. Quick when nothing changed; `make setup` calls it.
#
#   PYTHON               which Python to use (3.11 or newer); otherwise the first suitable one on PATH
#   TURBOLM_TORCH        which torch to install, from 2.11 to 2.13 (default 2.13.0)
#   TURBOLM_TORCH_BUILD  cpu or cuda, when the machine that sets up is not the one that trains (a login node)
set -eu

cd "$(dirname "$0")/.."
started=$(date +%s)
venv=.venv
stamp=$venv/.turbolm-setup
torch_version=${TURBOLM_TORCH:-2.13.0}

say() { printf '[%3ds] %s\n' "$(($(date +%s) - started))" "$*"; }
complain() { printf 'setup: %s\n' "$*" >&2; }

case $torch_version in
    2.1[123].*) ;;
    *) complain "TURBOLM_TORCH=$torch_version is not supported: expected 2.11.x, 2.12.x or 2.13.x"; exit 2 ;;
esac

torch_build=${TURBOLM_TORCH_BUILD:-}
if [ -z "$torch_build" ]; then
    torch_build=cpu
    if [ -e /dev/nvidia0 ] || command -v nvidia-smi >/dev/null 2>&1; then torch_build=cuda; fi
fi
case $torch_build in
    cpu | cuda) ;;
    *) complain "TURBOLM_TORCH_BUILD=$torch_build is not supported: expected cpu or cuda"; exit 2 ;;
esac

# The virtual environment holds absolute paths, so a moved checkout counts as changed.
# A CUDA build serves a machine without a GPU too: nodes that share one checkout must not reinstall in turns.
key="$(cat requirements.lock pyproject.toml launch/setup.sh | cksum) $PWD $torch_version"
up_to_date() {
    [ -x "$venv/bin/python" ] && [ -f "$stamp" ] || return 1
    { IFS= read -r made_key && IFS= read -r made_build; } <"$stamp" || return 1
    [ "$made_key" = "$key" ] || return 1
    [ "$made_build" = cuda ] || [ "$torch_build" = cpu ] || return 1
    [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$(version_of "$venv/bin/python")" ]
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

if up_to_date; then
    say "setup is up to date"
    exit 0
fi

# Everything that is missing is named at once, each with the Debian package that brings it.
missing=0
need() {
    complain "$1 is missing: apt-get install $2"
    missing=1
}
python=
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if is_recent "$candidate"; then
        python=$candidate
        break
    fi
done
if [ -n "$python" ]; then
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        need "Python's venv module" "python$(version_of "$python")-venv"
    "$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
        complain "note: Python.h is not there; offloading and torch.compile need it:" \
            "apt-get install python$(version_of "$python")-dev"
elif [ -n "${PYTHON:-}" ]; then
    need "Python 3.11 or newer (PYTHON=$PYTHON is not)" "python3 python3-venv"
else
    need "Python 3.11 or newer" "python3 python3-venv"
fi
command -v cc >/dev/null 2>&1 || need "a C compiler (cc), with which DeepSpeed builds its operators," gcc
command -v c++ >/dev/null 2>&1 || need "a C++ compiler (c++), with which DeepSpeed builds its operators," g++
command -v make >/dev/null 2>&1 || need "make" make
[ "$missing" = 0 ] || exit 2

if ! is_recent "$venv/bin/python" ||
    { [ -n "${PYTHON:-}" ] && [ "$(version_of "$PYTHON")" != "$(version_of "$venv/bin/python")" ]; }; then
    say "making $venv with Python $(version_of "$python")"
    "$python" -m venv --clear "$venv"
fi
rm -f "$stamp"

# requirements.lock is complete, so nothing is resolved here. Byte-compiling everything would cost more than it saves:
# modules are compiled when they are first imported.
pip() { "$venv/bin/python" -m pip -qq --disable-pip-version-check "$@"; }
install() { pip install --no-compile "$@"; }

# DeepSpeed comes as source and looks at the installed torch when it is built: it goes in after torch.
deepspeed_lock=$venv/.deepspeed.lock
others_lock=$venv/.others.lock
awk '/^[a-z]/ {keep = /^deepspeed==/} keep' requirements.lock >"$deepspeed_lock"
awk '/^[a-z]/ {keep = !/^deepspeed==/} keep' requirements.lock >"$others_lock"
say "installing $(grep -c '^[a-z]' "$others_lock") pinned packages"
install --no-deps --require-hashes -r "$others_lock"

installed_torch=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || :)
case $installed_torch/$torch_build in
    "$torch_version"/cpu | "$torch_version"+*/cpu) ;;
    "$torch_version+cpu"/cuda) installed_torch= ;;
    "$torch_version"/cuda | "$torch_version"+*/cuda) ;;
    *) installed_torch= ;;
esac
if [ -n "$installed_torch" ]; then
    say "keeping torch $installed_torch"
elif [ "$torch_build" = cuda ]; then
    say "installing torch $torch_version for CUDA"
    # The lock holds what torch needs in plain Python; this adds the CUDA libraries that this build of torch pins.
    install --force-reinstall --no-deps "torch==$torch_version"
    install "torch==$torch_version"
else
    say "installing torch $torch_version for CPU"
    install --no-deps "torch==$torch_version+cpu" 2>/dev/null ||
        install --no-deps --index-url https://download.pytorch.org/whl/cpu "torch==$torch_version"
fi

say "building deepspeed"
install --no-deps --require-hashes --no-build-isolation --use-pep517 -r "$deepspeed_lock"
say "installing turbolm"
install --no-deps --no-build-isolation --editable .

printf '%s\n%s\n' "$key" "$torch_build" >"$stamp"
say "setup is done: $venv/bin/turbolm"
