#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most 9 minutes, with one folder of results.
#   bash tools/benchmarks/gpu.sh [RESULTS_FOLDER [STAGE…]]      default: .cache/gpu-results, every stage
# Stages: environment tests compile benchmark decoding training sanitizer; and sweep, only when named.
# Needs Python 3.12 with torch, Triton and setup.py's light libraries, and no network: Megatron and the libraries that
# ours is compared with are taken from .cache/wheels (or WHEELS), which tools/benchmarks/wheels.sh fills elsewhere.
# A stage that fails or runs out of time does not stop the next one; the exit code tells.
# PYTHON names the interpreter; without it, .venv's or python3, whichever has torch.
# GPU_SH_SECONDS is the time for everything (540). GPU_SH_DRY_RUN=cpu tries the script without a GPU, on tiny shapes.
# shellcheck disable=SC2329 # the stages are called by their names
set -uo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$checkout" || exit 1
wheels=${WHEELS:-$checkout/.cache/wheels}
dry=${GPU_SH_DRY_RUN:-}

# ----------------------------------------------------------------------------- stages: one function each, run in order
# In each: $python, $results (few files, for keeping), $logs (the rest; packed at the end), $dry.

all_stages=(environment tests compile benchmark decoding training sanitizer)
declare -A seconds_at_most=(
    [environment]=60 [tests]=120 [compile]=40 [benchmark]=200 [decoding]=90 [training]=120 [sanitizer]=120
    [sweep]=400
)

environment() {
    nvidia-smi || echo "nvidia-smi: not here"
    nvcc --version || echo "nvcc: not here, nor needed"
    "$python" -m pip list 2>/dev/null || true
    "$python" -m megatron_idft doctor
}

tests() {
    local several=()
    if "$python" -c 'import xdist' 2>/dev/null; then several=(-n 4); fi
    if [ -n "$dry" ]; then several=(--collect-only); fi
    "$python" -m pytest -q -m gpu -p no:cacheprovider "${several[@]}"
}

compile() {
    "$python" tools/benchmarks/loss.py --compile-only --out "$logs/compile" || return
    cp "$logs/compile/loss.json" "$results/loss_compiled.json"
}

benchmark() {
    local form=(--time-limit 170)
    if [ -n "$dry" ]; then form=(--smoke --quick); fi
    "$python" tools/benchmarks/loss.py --out "$results" "${form[@]}"
}

decoding() {
    local form=()
    if [ -n "$dry" ]; then form=(--shape smoke); fi
    "$python" -m torch.distributed.run --standalone --nproc-per-node 1 \
        tools/benchmarks/decoding.py --out "$results" "${form[@]}"
}

training() {
    local form=()
    if [ -n "$dry" ]; then form=(--cpu --iterations 3 --losses idft); fi
    "$python" tools/benchmarks/training_steps.py --out "$logs/training" "${form[@]}"
    local code=$?
    cp "$logs/training/training_steps.json" "$results"
    return "$code"
}

sanitizer() {
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer: not here, so memory accesses were not checked"
        return 0
    fi
    # Without torch's caching allocator, so that a tensor's end is the end of its memory.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
        "$python" -m pytest -q -m gpu -p no:cacheprovider -x tests/loss/test_vocab_parallel_loss.py \
        -k "test_padding_columns_count_nowhere or test_any_strides or test_all_labels_ignored"
}

sweep() {
    "$python" tools/benchmarks/loss.py --sweep
}

# ------------------------------------------------------------------------------------------------------------- running

# Everything that training needs and this interpreter lacks, out of the wheels, into a folder of its own.
prepare() {
    "$python" - <<'CHECK' || return 1
import importlib.util, sys
needed = "torch triton numpy pytest hypothesis matplotlib"
needed += " sentencepiece pyarrow tensorboard psutil tqdm jinja2 yaml transformers"
missing = [name for name in needed.split() if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"gpu.sh: {sys.executable} lacks {', '.join(missing)}; setup.py's extras train and dev name them")
CHECK
    if ! "$python" -c 'import megatron.core' 2>/dev/null; then
        install train "$site" || return 1
    fi
    if compgen -G "$wheels/peers/*.whl" >/dev/null; then
        install peers "$checkout/.cache/peers"
    fi
}

# install KIND FOLDER
install() {
    if ! compgen -G "$wheels/$1/*.whl" >/dev/null; then
        echo "gpu.sh: there is nothing in $wheels/$1; run tools/benchmarks/wheels.sh where there is network, and bring it" >&2
        return 1
    fi
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --upgrade \
        --target "$2" "$wheels/$1"/*.whl
}

if [ "${1:-}" = --stage ]; then # one stage, in a process that `timeout` can stop
    "$2"
    exit
fi
case ${1:-} in
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac

for python in "${PYTHON:-}" .venv/bin/python python3; do
    "$python" -c 'import torch' 2>/dev/null && break
done
python=$(command -v "$python")
results=${1:-.cache/gpu-results}
mkdir -p "$results" || exit 1
results=$(cd "$results" && pwd)
stages=("${@:2}")
[ ${#stages[@]} -gt 0 ] || stages=("${all_stages[@]}")
for stage in "${stages[@]}"; do
    if [ -z "${seconds_at_most[$stage]:-}" ]; then
        echo "gpu.sh: unknown stage $stage; there are ${all_stages[*]} sweep" >&2
        exit 2
    fi
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$work/site logs=$work/logs
mkdir -p "$logs"
export python results logs dry PYTHONPATH="$checkout:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
if [ -z "$dry" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: $python sees no GPU. tests/run.sh is for machines without one; GPU_SH_DRY_RUN=cpu tries this script." >&2
    exit 1
fi
prepare || exit 1

summary=$results/summary.txt
printf '%-12s %-20s %8s\n' stage status seconds >"$summary"
failed=0
for stage in "${stages[@]}"; do
    left=$((${GPU_SH_SECONDS:-540} - SECONDS))
    limit=$((seconds_at_most[$stage] < left ? seconds_at_most[$stage] : left))
    began=$SECONDS
    if [ "$limit" -lt 5 ]; then
        status="no time left" code=1
    else
        echo "=== $stage, $limit s at most"
        timeout --kill-after=5 "$limit" bash "${BASH_SOURCE[0]}" --stage "$stage" 2>&1 | tee "$logs/$stage.log"
        code=${PIPESTATUS[0]}
        case $code in
            0) status=passed ;;
            124 | 137) status="out of time ($limit s)" ;;
            *) status="failed ($code)" ;;
        esac
    fi
    [ "$code" -eq 0 ] || failed=1
    printf '%-12s %-20s %8d\n' "$stage" "$status" $((SECONDS - began)) >>"$summary"
done
rm -rf "$logs/training/training_data"
tar -C "$logs" -czf "$results/logs.tar.gz" .
echo "=== summary, $SECONDS s in all; results in $results"
cat "$summary"
exit $failed
