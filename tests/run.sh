#!/usr/bin/env bash
# The whole test suite, on a CPU. Makes .venv in the checkout if there is none.
#   bash tests/run.sh                 everything
#   bash tests/run.sh tests/loss -x   what pytest is told instead
# MEGATRON_LM=/path/to/Megatron-LM at core_v0.19.x adds its own pretrain_gpt.py and pretrain_hybrid.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/python.sh
source launch/python.sh

if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    "$python" -m venv .venv
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1
if ! cmp -s setup.py .venv/installed-setup.py; then
    # Most of what is installed is never imported: it need not be compiled.
    .venv/bin/pip install --quiet --no-compile -e '.[train,examples,dev]'
    cp setup.py .venv/installed-setup.py
fi
# Older versions of megatron-core, for the hook only: beside the environment, never in it.
for version in 0.17 0.18; do
    folder=.cache/megatron-core-$version
    if [ ! -d "$folder/megatron" ]; then
        .venv/bin/pip install --quiet --no-compile --no-deps --target "$folder" "megatron-core==$version.*"
    fi
done
# Other people's cross-entropy kernels, oracles for ours: beside the environment as well. Transformer Engine's are plain
# files of its Python package, which cannot be imported without its compiled one.
if [ ! -d .cache/peers/transformer_engine ]; then
    .venv/bin/pip install --quiet --no-compile --no-deps --target .cache/peers 'liger-kernel>=0.8' 'transformer-engine>=2.20'
fi

# Triton kernels run interpreted here, also where there is a GPU; `pytest -m gpu` runs them compiled.
export TRITON_INTERPRET=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
if [ $# -eq 0 ]; then
    # Tests that need a GPU are left out by name here. Two at a time; a file's tests share fixtures that take long.
    set -- -m "not gpu" -n 2 --dist loadfile
fi
exec .venv/bin/python -m pytest -q --durations=15 "$@"
