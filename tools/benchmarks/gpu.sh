#!/usr/bin/env bash
# Everything that needs a GPU, in two commands of 13 minutes together, each with a folder of at most 8 files of results.
#   bash tools/benchmarks/gpu.sh [RESULTS_FOLDER [STAGE…]]      default: .cache/gpu-results, first
# Stages, most valuable first. first: environment values benchmark overhead decoding; second: output_head steps
# sanitizer sweep. Only by name: study, examples/study at size gpu, with .cache/real_model brought along.
# Needs Python 3.12 with torch, Triton and setup.py's light libraries, and no network: Megatron and the libraries that
# ours is compared with are taken from .cache/wheels (or WHEELS), which tools/benchmarks/wheels.sh fills elsewhere.
# Used where they are there: .cache/triton-sm90 (kernels that tools/benchmarks/triton_cache.py has compiled) and
# .cache/transformer-engine/*.tar.xz (or TE_ARCHIVE: a folder of packages, one of them transformer_engine).
# A stage that fails or runs out of time does not stop the next one; the exit code tells. Results are written as they
# come, logs.tar.gz anew every minute: whatever ends this, what was measured stays.
# PYTHON names the interpreter; without it, .venv's or python3, whichever has torch.
# GPU_SH_SECONDS is the time for everything (first 475, second 300). GPU_SH_DRY_RUN=cpu tries the script without a GPU,
# small, and fails where what must travel to such a machine, or comes back from it, is larger than its limits.
# shellcheck disable=SC2329 # the stages are called by their names
set -uo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$checkout" || exit 1
wheels=${WHEELS:-$checkout/.cache/wheels}
dry=${GPU_SH_DRY_RUN:-}

# ----------------------------------------------------------------------------- stages: one function each, run in order
# In each: $python, $results (few files, for keeping), $logs (the rest; packed), $engine (Transformer Engine), $dry.

first=(environment values benchmark overhead decoding)
second=(output_head steps sanitizer sweep)
declare -A seconds_at_most=(
    [environment]=25 [values]=85 [benchmark]=155 [overhead]=25 [decoding]=165
    [output_head]=90 [steps]=70 [sanitizer]=70 [sweep]=70 [study]=640
)

environment() {
    nvidia-smi || echo "nvidia-smi: not here"
    if [ -n "$engine" ]; then
        PYTHONPATH="$PYTHONPATH:$engine" "$python" -c "import torch, transformer_engine.pytorch as te
print('Transformer Engine imports from', te.__file__)" || echo "Transformer Engine does not import"
    fi
    "$python" -m megatron_idft doctor
    "$python" -m pip list >"$logs/packages.txt" 2>/dev/null || true
}

# Whatever is right or wrong rather than fast or slow, side by side: tests, and trainings of a few steps.
values() {
    local selection=(-m gpu) workers=(-n 4) form=(--limit 78) failed=0 job jobs=()
    if ! "$python" -c 'import xdist' 2>/dev/null; then workers=(); fi
    if [ -n "$engine" ]; then form+=(--engine "$engine"); fi
    if [ -n "$dry" ]; then
        selection+=(--collect-only)
        form=(--cpu --iterations 3 --at-once 2)
    fi
    # Not those that run the reference backend: its name in the brackets of a test's parameters.
    tests loss "${selection[@]}" -k "not [reference and not -reference" "${workers[@]}" tests/loss & jobs+=($!)
    tests engine "${selection[@]}" tests/inference/test_paged_attention.py tests/inference/test_engine_gpu.py & jobs+=($!)
    "$python" tools/benchmarks/training_steps.py --values --out "$logs/values" "${form[@]}" & jobs+=($!)
    keep_up_to_date "$logs/values/training_values.json" & local keeper=$!
    for job in "${jobs[@]}"; do wait "$job" || failed=1; done
    kill "$keeper"
    cp "$logs/values/training_values.json" "$results" || failed=1
    return "$failed"
}

# tests NAME ARGUMENT…: every result on a line of its own in the log when it is known, the failed ones here too.
tests() {
    local log=$logs/tests_$1.log code
    "$python" -m pytest -v -p no:cacheprovider "${@:2}" >"$log" 2>&1 & local pytest=$!
    tail -n +1 -f --pid "$pytest" "$log" 2>/dev/null | grep --line-buffered -E '(FAILED|ERROR) ' | cut -c 1-200
    wait "$pytest"
    code=$?
    echo "tests of $1: $(tail -n 1 "$log")"
    return "$code"
}

# keep_up_to_date FILE: a copy of it in the results, every few seconds.
keep_up_to_date() {
    while sleep 3; do cp "$1" "$results"; done >/dev/null 2>&1
}

benchmark() {
    local form=(--time-limit 140)
    if [ -n "$dry" ]; then form=(--smoke --quick); fi
    "$python" tools/benchmarks/loss.py --out "$results" "${form[@]}"
}

overhead() {
    local form=()
    if [ -n "$dry" ]; then form=(--smoke); fi
    "$python" tools/benchmarks/hook_overhead.py --out "$results" "${form[@]}"
}

decoding() {
    local form=(--pairs 64 32 1 8) # 32 also as one stream, beside which two are measured
    if [ -n "$dry" ]; then form=(--shape smoke); fi
    "$python" -m torch.distributed.run --standalone --nproc-per-node 1 \
        tools/benchmarks/decoding.py --out "$results" "${form[@]}"
}

output_head() {
    local form=(--time-limit 70) # after which no further case starts
    if [ -n "$dry" ]; then form=(--smoke --quick); fi
    "$python" tools/benchmarks/head.py --out "$results" "${form[@]}"
}

steps() {
    local form=(--iterations 20 --limit 66) code
    if [ -n "$dry" ]; then form=(--cpu --iterations 3); fi
    "$python" tools/benchmarks/training_steps.py --out "$logs/steps" --losses ce idft --backends triton "${form[@]}" &
    local steps=$!
    keep_up_to_date "$logs/steps/training_steps.json" & local keeper=$!
    wait "$steps"
    code=$?
    kill "$keeper"
    cp "$logs/steps/training_steps.json" "$results"
    return "$code"
}

sanitizer() {
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer: not here, so memory accesses were not checked"
        return 0
    fi
    # Without torch's caching allocator, so that a tensor's end is the end of its memory.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
        "$python" -m pytest -v -m gpu -p no:cacheprovider -x tests/loss/test_vocab_parallel_loss.py \
        -k "not [reference and not -reference and (test_any_strides or test_padding_columns_count_nowhere)"
}

sweep() {
    local form=(--sweep narrow)
    if [ -n "$dry" ]; then form+=(--smoke); fi
    "$python" tools/benchmarks/loss.py "${form[@]}" | tee "$results/sweep.txt"
}

study() {
    local size=gpu out=$checkout/.cache/study-gpu model=${MODEL:-$checkout/.cache/real_model/SmolLM2-135M-Instruct} code
    if [ -n "$dry" ]; then size=smoke out=$checkout/.cache/study-smoke; fi
    if [ ! -e "$model" ]; then
        echo "study: $model is not here; examples/real_model/fetch.py writes it where there is network. Bring it, or set MODEL" >&2
        return 1
    fi
    if ! "$python" -c 'import reasoning_gym' 2>/dev/null; then
        echo "study: $python lacks reasoning_gym, which makes the problems: pip install 'reasoning-gym>=0.1.25'" >&2
        return 1
    fi
    # After ten minutes what is finished is reported, if learning rates have been chosen; started again it goes on.
    PYTHON=$python MODEL=$model timeout 600 bash examples/study/run.sh --size "$size" --out "$out"
    code=$?
    if [ -e "$out/choice.json" ]; then
        "$python" examples/study/report/make.py "$out" --size "$size"
        cp "$out"/report.json "$out"/study.md "$out"/study.svg "$results" || code=1
    fi
    return "$code"
}

# ------------------------------------------------------------------------------------------------------------- running

# Everything that training needs and this interpreter lacks, into folders of their own, which a second command finds.
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
    if compgen -G "$wheels/peers/*.whl" >/dev/null && [ ! -d "$checkout/.cache/peers" ]; then
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

# The folder of Transformer Engine's packages, unpacked where it is not yet; nothing where there is none.
unpack_engine() {
    local archive=${TE_ARCHIVE:-} folder=$checkout/.cache/gpu-engine found
    if [ -z "$archive" ]; then archive=$(compgen -G "$checkout/.cache/transformer-engine/*.tar.xz" | head -n 1); fi
    if [ ! -d "$folder" ] && [ -n "$archive" ]; then
        mkdir -p "$folder.new" && tar -C "$folder.new" -xJf "$archive" && mv "$folder.new" "$folder"
    fi
    found=$(find "$folder" -maxdepth 2 -type d -name transformer_engine 2>/dev/null | head -n 1)
    if [ -n "$found" ]; then dirname "$found"; fi
}

# mib PATH…: their size, rounded up; 0 for what is not there.
mib() {
    du -cbm --apparent-size "$@" 2>/dev/null | tail -n 1 | cut -f1
}

# What machines that are lent by the minute take and give: 64 MiB there, 8 files of at most 16 MiB each back.
check_sizes() {
    local carried files largest
    carried=$(($(git ls-files -z --cached --others --exclude-standard | xargs -0 du -cbm --apparent-size | tail -n 1 | cut -f1)
        + $(mib "$wheels") + $(mib .cache/triton-sm90) + $(mib .cache/transformer-engine/*.tar.xz)))
    files=$(find "$results" -type f | wc -l)
    largest=$(find "$results" -type f -printf '%s\n' | sort -n | tail -n 1)
    echo "sizes: $carried MiB there (at most 64), $files files back (at most 8), the largest $((largest / 1024)) KiB (at most 16384)"
    [ "$carried" -le 64 ] && [ "$files" -le 8 ] && [ "$largest" -le $((16 * 1024 * 1024)) ]
}

# The logs of all stages so far, in one file that is whole at any moment.
pack_logs() {
    tar -C "$logs" --exclude=training_data -czf "$work/logs.tar.gz" . 2>/dev/null
    mv "$work/logs.tar.gz" "$results/logs.tar.gz"
}

if [ "${1:-}" = --stage ]; then # one stage, in a process that `timeout` can stop
    "$2"
    exit
fi
case ${1:-} in
    -h | --help) sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac

for python in "${PYTHON:-}" .venv/bin/python python3; do
    "$python" -c 'import torch' 2>/dev/null && break
done
python=$(command -v "$python")
results=${1:-.cache/gpu-results}
mkdir -p "$results" || exit 1
results=$(cd "$results" && pwd)
named=("${@:2}")
[ ${#named[@]} -gt 0 ] || named=(first)
stages=() seconds=0
for stage in "${named[@]}"; do
    case $stage in
        first) stages+=("${first[@]}") seconds=$((seconds + 475)) ;; # with 20 s for unpacking
        second) stages+=("${second[@]}") seconds=$((seconds + 300)) ;;
        *)
            if [ -z "${seconds_at_most[$stage]:-}" ]; then
                echo "gpu.sh: unknown stage $stage; there are first (${first[*]}), second (${second[*]}) and study" >&2
                exit 2
            fi
            stages+=("$stage") seconds=$((seconds + seconds_at_most[$stage] + 20))
            ;;
    esac
done
work=$(mktemp -d)
site=$checkout/.cache/gpu-site logs=$work/logs
mkdir -p "$logs"
export python results logs dry PYTHONPATH="$checkout:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$checkout/.cache/triton-sm90}" NCCL_GRAPH_REGISTER=0
unset TRITON_INTERPRET
if [ -z "$dry" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: $python sees no GPU. tests/run.sh is for machines without one; GPU_SH_DRY_RUN=cpu tries this script." >&2
    exit 1
fi
prepare || exit 1
engine=''
if [ -z "$dry" ]; then engine=$(unpack_engine); fi
export engine

while sleep "${GPU_SH_PACK_SECONDS:-60}" && kill -0 $$; do pack_logs; done >/dev/null 2>&1 & packer=$!
trap 'kill "$packer" 2>/dev/null; pack_logs; rm -rf "$work"' EXIT
trap 'exit 143' TERM INT
summary=$results/summary.txt
printf '%-12s %-20s %8s\n' stage status seconds >"$summary"
failed=0
for stage in "${stages[@]}"; do
    left=$((${GPU_SH_SECONDS:-$seconds} - SECONDS))
    limit=$((seconds_at_most[$stage] < left ? seconds_at_most[$stage] : left))
    if [ -n "$dry" ] && [ -z "${GPU_SH_SECONDS:-}" ]; then limit=3600; fi # how fast a CPU is says nothing
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
echo "=== summary, $SECONDS s in all; results in $results"
cat "$summary"
if [ -n "$dry" ]; then
    pack_logs
    check_sizes || failed=1
fi
exit $failed
