#!/usr/bin/env bash
# The whole test suite, on a CPU. Makes .venv in the checkout if there is none.
#   bash tests/run.sh                 everything
#   bash tests/run.sh tests/loss -x   what pytest is told instead
#   bash tests/run.sh --oldest        the tests of the loss, the data and the checkpoints, and the kernels compiled, with
#                                     the oldest releases that setup.py admits; arguments for pytest may follow
#   bash tests/run.sh --checkout …    with the checkout MEGATRON_LM in the place of the installed megatron-core
# MEGATRON_LM=/path/to/Megatron-LM (core_v0.19.x, or its main with --checkout) adds its own pretrain_gpt.py and
# pretrain_hybrid.py. MEGATRON_IDFT_MODEL_CLASS=hybrid makes HybridModel of every --hf-model.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/python.sh
source launch/python.sh
export PIP_DISABLE_PIP_VERSION_CHECK=1
# Without bytecode every interpreter that a test starts would compile torch, transformers and this package anew.
unset PYTHONDONTWRITEBYTECODE

# install ENVIRONMENT EXTRAS [PIP FLAGS]: makes the environment, and makes it anew where setup.py changed
install() {
    local environment=$1 extras=$2 python
    shift 2
    if [ ! -x "$environment/bin/python" ]; then
        python=$(find_python)
        "$python" -m venv "$environment"
    fi
    if ! cmp -s setup.py "$environment/installed-setup.py"; then
        # Most of what is installed is never imported: it need not be compiled.
        "$environment/bin/pip" install --quiet --no-compile "$@" -e ".[$extras]"
        cp setup.py "$environment/installed-setup.py"
    fi
}

print_versions() {
    "$1/bin/python" - <<'EOF'
import platform
from importlib.metadata import version

names = ("torch", "triton", "megatron-core", "transformers", "numpy", "pyarrow", "math-verify")
print("python", platform.python_version(), *(f"| {name} {version(name)}" for name in names))
EOF
}

install .venv train,examples,real,dev
environment=.venv
if [ "${1:-}" = --oldest ]; then
    shift
    environment=.cache/oldest
    mkdir -p .cache
    .venv/bin/python tests/oldest.py >.cache/oldest.txt
    install "$environment" train,examples,dev --constraint .cache/oldest.txt
fi
# Other people's cross-entropy kernels, oracles for ours: beside the environment, never in it. Most of them cannot be
# imported whole without packages that are not here: plain files of theirs are read.
if [ ! -d .cache/peers/trl ]; then
    .venv/bin/pip install --quiet --no-compile --no-deps --target .cache/peers --upgrade \
        'liger-kernel>=0.8' 'transformer-engine>=2.20' 'trl>=1.16' 'cut-cross-entropy>=25.1'
fi
# Triton kernels run interpreted here, also where there is a GPU; `pytest -m gpu` runs them compiled.
export TRITON_INTERPRET=1
# What a test starts imports this checkout too, and can fork from a process that has imported it.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ "${1:-}" = --checkout ]; then
    shift
    mkdir -p .cache/checkout
    # Not the whole checkout: it has a package `tests` as well. Its helpers are compiled, which `make` does by python3.
    ln -sfn "$(realpath "${MEGATRON_LM:?set it to a checkout of Megatron-LM}")/megatron" .cache/checkout/megatron
    [ -d .cache/pybind11 ] || .venv/bin/pip install --quiet --no-deps --target .cache/pybind11 pybind11
    suffix=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
    PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD/.cache/pybind11" \
        make --quiet -C .cache/checkout/megatron/core/datasets LIBEXT="$suffix"
    export PYTHONPATH="$PYTHONPATH:$PWD/.cache/checkout"
fi
print_versions "$environment"
# Tests that need a GPU are left out by name here. Two at a time; a file's tests share fixtures that take long. In the
# order of conftest.py, where pytest-xdist would begin with the files of most tests and end with those of one long test.
all=(-m "not gpu" -n 2 --dist loadfile --no-loadscope-reorder)
if [ "$environment" != .venv ]; then
    compiled="tests/benchmarks/test_loss.py::test_every_case_compiles_without_spills"
    [ $# -gt 0 ] || set -- "${all[@]}" tests/loss tests/data tests/checkpoint "$compiled"
    exec "$environment/bin/python" -m pytest -q --durations=5 "$@"
fi
# Older versions of megatron-core, for the hook only.
for version in 0.17 0.18; do
    folder=.cache/megatron-core-$version
    if [ ! -d "$folder/megatron" ]; then
        .venv/bin/pip install --quiet --no-compile --no-deps --target "$folder" "megatron-core==$version.*"
    fi
done
# The model of tests/real, once: 93 MB. Where it cannot be had, tests/real skips if a part of the tests was asked for.
.venv/bin/python examples/real_model/fetch.py || [ $# -gt 0 ]
[ -x "${TRANSFORMER_ENGINE_PYTHON:-.cache/transformer-engine/bin/python}" ] ||
    echo "tests/te is skipped: bash tests/te/environment.sh makes the environment with Transformer Engine that it needs"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
[ $# -gt 0 ] || set -- "${all[@]}"
exec .venv/bin/python -m pytest -q --durations=15 "$@"
