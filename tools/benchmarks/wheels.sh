#!/usr/bin/env bash
# Collect, on a machine with network, what tools/benchmarks/gpu.sh installs on one without.
#   bash tools/benchmarks/wheels.sh        into .cache/wheels, or the folder that WHEELS names
# For Python 3.12 on Linux x86-64. Only what a machine with PyTorch lacks: torch, Triton, matplotlib, pytest, hypothesis
# and the light libraries of setup.py are taken to be there.
set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=launch/python.sh
source "$checkout/launch/python.sh"
wheels=${WHEELS:-$checkout/.cache/wheels}
limit_mib=50

# einops is for Transformer Engine, where gpu.sh is given one.
# shellcheck disable=SC2034 # by name below
train=("megatron-core==0.19.*" einops)
# Only the Python part of transformer-engine: its cross-entropy is Triton; of verl and trl single files are read. One
# version each, so that results compare.
# shellcheck disable=SC2034
peers=("liger-kernel==0.8.5" "transformer-engine==2.20.2" "verl==0.9.1" "trl==1.16.0"
    "cut-cross-entropy==25.1.1")

python=$checkout/.venv/bin/python
[ -x "$python" ] || python=$(find_python)
platforms=()
for glibc in 2_17 2_24 2_26 2_27 2_28 2_31 2_34 2_35; do
    platforms+=(--platform "manylinux_${glibc}_x86_64")
done
for kind in train peers; do
    rm -rf "${wheels:?}/$kind"
    declare -n names=$kind
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp --abi cp312 --abi none "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$wheels/$kind" \
        "${names[@]}"
done
du -h "$wheels"/*/*.whl
mib=$(du -sm "$wheels" | cut -f1)
echo "$wheels: $mib MiB"
if [ "$mib" -ge "$limit_mib" ]; then
    echo "wheels.sh: more than $limit_mib MiB, which is meant to stay easy to carry" >&2
    exit 1
fi
