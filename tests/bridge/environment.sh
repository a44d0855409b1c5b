#!/usr/bin/env bash
# Makes .cache/megatron-bridge: an environment with Megatron-Bridge, for test_megatron_bridge.py. It imports Transformer
# Engine, so .cache/transformer-engine must be there (bash tests/te/environment.sh), whose torch and Megatron it shares.
# BRIDGE (0.6.2) is the version. 750 MB; no package of CUDA kernels that it names but does not import here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PIP_DISABLE_PIP_VERSION_CHECK=1
engine=$PWD/.cache/transformer-engine environment=$PWD/.cache/megatron-bridge
[ -x "$engine/bin/python" ] || { echo "there is no $engine: bash tests/te/environment.sh makes it" >&2 && exit 1; }
purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
shared=$("$engine/bin/python" -c "$purelib")

[ -x "$environment/bin/python" ] || "$engine/bin/python" -m venv "$environment"
own=$("$environment/bin/python" -c "$purelib")
# site.addsitedir and not a path alone: packages there have such files of their own.
echo "import site; site.addsitedir('$shared')" >"$own/zz-transformer-engine.pth"
ln -sfn "$shared/nvidia" "$own/nvidia" # Transformer Engine looks for NVIDIA's libraries beside the interpreter
pip=("$environment/bin/python" -m pip install --quiet --no-compile)
"${pip[@]}" --no-deps "megatron-bridge==${BRIDGE:-0.6.2}" 'transformers==5.12.1' 'tokenizers==0.22.2' 'huggingface-hub<2' \
    hydra-core flash-linear-attention peft accelerate datasets qwen-vl-utils mistral-common multiprocess dill xxhash pandas \
    python-dateutil pytz tzdata defusedxml
# Compiled for a newer glibc than many machines have; what is imported of it here is Python.
"${pip[@]}" --no-deps --platform manylinux_2_39_x86_64 --only-binary=:all: --upgrade --target "$own" nvidia-resiliency-ext
"$engine/bin/python" -m pip list --format freeze | grep -E '^(torch|triton|megatron-core|numpy)==' >"$environment/constraints.txt"
"${pip[@]}" --constraint "$environment/constraints.txt" 'megatron-energon~=7.0' multi-storage-client torchvision cffi \
    nvidia-modelopt
"$environment/bin/python" - <<'EOF'
from importlib.metadata import version

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.training.finetune import finetune

print("torch", torch.__version__, "| megatron-bridge", version("megatron-bridge"), AutoBridge.__name__, finetune.__name__)
EOF
