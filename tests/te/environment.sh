#!/usr/bin/env bash
# Makes .cache/transformer-engine: an environment with the real Transformer Engine, which needs no GPU to be imported.
# test_transformer_engine.py runs in it, and skips where it is not. 7 GB, of which torch with CUDA is most.
#   bash tests/te/environment.sh                  from the package registry; its extension is compiled: half an hour
#   bash tests/te/environment.sh BUNDLE.tar.xz    from an archive, or a folder, of installed packages: minutes
# TORCH (2.11.0) and TRANSFORMER_ENGINE (2.20.2) are the versions. A bundle must have been built for this torch, Python
# and CUDA.
set -euo pipefail
bundle=${1:+$(realpath "$1")}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=launch/python.sh
source launch/python.sh
export PIP_DISABLE_PIP_VERSION_CHECK=1
environment=$(realpath -m .cache)/transformer-engine
torch=${TORCH:-2.11.0} engine=${TRANSFORMER_ENGINE:-2.20.2}

install() {
    "$environment/bin/python" -m pip install --quiet --no-compile "$@"
}

[ -x "$environment/bin/python" ] || "$(find_python)" -m venv "$environment"
install "torch==$torch" -e ".[train]" einops onnx onnxscript pydantic nvdlfw-inspect # the last five it imports
packages=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
rm -f "$packages/transformer-engine-bundle.pth"

if [ -n "$bundle" ]; then
    if [ -f "$bundle" ]; then
        rm -rf "$environment/bundle"
        mkdir "$environment/bundle"
        tar xf "$bundle" -C "$environment/bundle"
        bundle=$environment/bundle
    fi
    folder=$(find "$bundle" -maxdepth 2 -type d -name transformer_engine -print -quit)
    [ -n "$folder" ] || { echo "no transformer_engine in $bundle" >&2 && exit 1; }
    dirname "$folder" >"$packages/transformer-engine-bundle.pth"
else
    cuda=$("$environment/bin/python" -c 'import torch; print(torch.version.cuda)')
    major=${cuda%%.*}
    install ninja pybind11 setuptools wheel "nvidia-cudnn-frontend>=1.29"
    install "nvidia-cuda-crt==$cuda.*" "nvidia-cuda-cccl==$cuda.*"
    install --no-deps "transformer-engine==$engine" "transformer-engine-cu$major==$engine"
    # NVIDIA's wheels have the headers that nvcc would bring; cccl's stand one folder deeper.
    CPATH=$packages/nvidia/cu$major/include/cccl NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_PYTORCH_FORCE_BUILD=TRUE \
        PATH="$environment/bin:$PATH" install --no-deps --no-build-isolation "transformer-engine-torch==$engine"
fi
# torch first: it loads the libraries that the extension is linked with.
"$environment/bin/python" - <<'EOF'
import torch
import transformer_engine
import transformer_engine.pytorch

print("torch", torch.__version__, "| transformer-engine", transformer_engine.__version__)
EOF
