# shellcheck shell=bash disable=SC2034 # some variables are for the scripts that source this
# Sourced by the scripts of this folder after `set -euo pipefail`: options, interpreter, layout, environment, plan,
# start.

launch_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    echo "$(basename "$0"): error: $*" >&2
    exit 2
}

# options ARGUMENT…: sets `dry_run`; what is not --help or --dry-run goes into the array `flags`, after -- all of it.
options() {
    dry_run='' flags=()
    while [ $# -gt 0 ]; do
        case $1 in
            --dry-run) dry_run=yes ;;
            -h | --help) awk '/^#( |$)/ { text = 1; sub(/^# ?/, ""); print; next } text { exit }' "$0"; exit 0 ;;
            --) shift; flags+=("$@"); break ;;
            *) flags+=("$1") ;;
        esac
        shift
    done
}

# need NAME WHY…: refuse to go on without a variable.
need() {
    if [ -z "${!1:-}" ]; then fail "$1 is not set: ${*:2}"; fi
}

# PYTHON, else that of the virtual environment VENV, else of the checkout's .venv, else python3.
find_interpreter() {
    local checkout
    checkout=$(dirname "$launch_dir")
    if [ -n "${VENV:-}" ]; then
        PYTHON=${PYTHON:-$VENV/bin/python}
    elif [ -x "$checkout/.venv/bin/python" ]; then
        PYTHON=${PYTHON:-$checkout/.venv/bin/python}
    fi
    PYTHON=${PYTHON:-python3}
    # A checkout that is not installed works too.
    if [ -f "$checkout/megatron_idft/__init__.py" ]; then
        case ":${PYTHONPATH:-}:" in
            *":$checkout:"*) ;;
            *) export PYTHONPATH="$checkout${PYTHONPATH:+:$PYTHONPATH}" ;;
        esac
        environment+=(PYTHONPATH)
    fi
    if [ -z "$dry_run" ] && ! "$PYTHON" -c 'import megatron_idft' 2>/dev/null; then
        fail "$PYTHON cannot import megatron_idft: set VENV or PYTHON, or pip install megatron-idft"
    fi
}

# ------------------------------------------------------------------------------------------------------- environment

environment=() # the names that the plan prints

# default NAME VALUE: export NAME, with VALUE unless it is set.
default() {
    export "$1=${!1:-$2}"
    environment+=("$1")
}

# The variables of ENVIRONMENT.md that are set here. SIGTERM leaves GRACE seconds to save.
set_environment() {
    GRACE=${GRACE:-300}
    default CUDA_DEVICE_MAX_CONNECTIONS 1
    default PYTORCH_CUDA_ALLOC_CONF expandable_segments:True
    default NCCL_GRAPH_REGISTER 0
    default TOKENIZERS_PARALLELISM false
    default OMP_NUM_THREADS 1
    default PYTHONUNBUFFERED 1
    default TORCH_ELASTIC_SHUTDOWN_TIMEOUT "$GRACE"
    default TORCH_DISABLE_SHARE_RDZV_TCP_STORE 1
}

# one_wandb_run SAVE: every start on this folder continues one run, whichever job or node it is.
one_wandb_run() {
    if [ -n "$dry_run" ]; then
        default WANDB_RUN_ID "$(cat "$1/wandb_run_id" 2>/dev/null || echo "of-the-first-start")"
    elif [ -z "${WANDB_RUN_ID:-}" ]; then
        mkdir -p "$1"
        # The nodes start together, and the first to link its file wins.
        local mine
        mine=$(mktemp "$1/.wandb_run_id.XXXXXX")
        od -An -N6 -tx1 /dev/urandom | tr -d ' \n' >"$mine"
        ln "$mine" "$1/wandb_run_id" 2>/dev/null || true
        rm -f "$mine"
        default WANDB_RUN_ID "$(cat "$1/wandb_run_id")"
    fi
    default WANDB_RESUME allow
}

# ------------------------------------------------------------------------------------------------------------ layout

# use_layout GPUS: MODEL_PARALLEL_ARGS and the data-parallel size `DP`, from MODEL's row of layouts.txt, or from TP, PP,
# CP, EP and RECOMPUTE where TP is set. GPU_ARGS: the flags of that row.
use_layout() {
    local gpus=$1
    GPU_ARGS=()
    if [ -n "${MODEL:-}" ]; then find_layout "$gpus"; fi
    if [ -z "${TP:-}" ]; then
        fail "no layout: set MODEL to a name of launch/layouts.txt, or TP (and PP, CP, EP, RECOMPUTE) yourself"
    fi
    PP=${PP:-1} CP=${CP:-1} EP=${EP:-1} RECOMPUTE=${RECOMPUTE:-none}
    if [ $((gpus % (TP * PP * CP))) -ne 0 ]; then
        fail "$gpus GPUs are no multiple of TP $TP x PP $PP x CP $CP: change NNODES, GPUS_PER_NODE or the layout"
    fi
    DP=$((gpus / (TP * PP * CP)))
    if [ $((DP * CP * TP % EP)) -ne 0 ]; then
        fail "EP $EP does not divide the $((DP * CP * TP)) GPUs of a pipeline stage: choose another EP"
    fi
    MODEL_PARALLEL_ARGS=(
        --tensor-model-parallel-size "$TP"
        --pipeline-model-parallel-size "$PP"
        --context-parallel-size "$CP"
        --use-distributed-optimizer
    )
    if [ "$TP" -gt 1 ]; then MODEL_PARALLEL_ARGS+=(--sequence-parallel); fi
    if [ "$EP" -gt 1 ]; then
        MODEL_PARALLEL_ARGS+=(--expert-model-parallel-size "$EP" --expert-tensor-parallel-size 1)
    fi
    case $RECOMPUTE in
        none) ;;
        selective) MODEL_PARALLEL_ARGS+=(--recompute-granularity selective) ;;
        full) MODEL_PARALLEL_ARGS+=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1) ;;
        *) fail "RECOMPUTE=$RECOMPUTE: none, selective or full" ;;
    esac
}

# converted_model_flags DIR: appends to MODEL_ARGS what `convert to-megatron` has recorded in DIR/conversion.json, the same
# flags as in its model_flags.sh; nothing of a checkpoint's folder is sourced.
converted_model_flags() {
    local found line
    if ! found=$("$PYTHON" -c 'import json, sys
print(*json.load(open(sys.argv[1]))["megatron_flags"], sep="\n")' "$1/conversion.json" 2>/dev/null); then
        fail "PRETRAINED=$1 has no conversion.json with the model's flags, as convert to-megatron writes it: add the flags" \
            "to this command, --num-layers and so on. Those of a model that was converted stand in model_flags.sh beside" \
            "its checkpoint: source it and add \"\${MODEL_FLAGS[@]}\""
    fi
    while IFS= read -r line; do MODEL_ARGS+=("$line"); done <<<"$found"
}

# find_layout GPUS: what is unset of TP, PP, CP, EP and RECOMPUTE, and GPU_ARGS, from MODEL's row of layouts.txt. Where TP
# is set, the others stay as they are.
find_layout() {
    local gpus=$1 table=$launch_dir/layouts.txt known='' name range tp pp cp ep recompute flags_on_gpus count
    if [ ! -f "$table" ]; then
        fail "MODEL=$MODEL is looked up in $table, which is not there: copy it, or unset MODEL and set TP"
    fi
    while read -r name range tp pp cp ep recompute flags_on_gpus; do
        if [ "$name" != "$MODEL" ]; then continue; fi
        read -ra GPU_ARGS <<<"$flags_on_gpus"
        for ((count = ${range%-*}; count <= ${range#*-}; count *= 2)); do
            known+=" $count"
            if [ "$count" -eq "$gpus" ] && [ -z "${TP:-}" ]; then
                TP=$tp PP=${PP:-$pp} CP=${CP:-$cp} EP=${EP:-$ep} RECOMPUTE=${RECOMPUTE:-$recompute}
            fi
        done
    done <"$table"
    if [ -z "$known" ]; then
        fail "MODEL=$MODEL is none of $(awk '!/^#/ && !seen[$1]++ { printf "%s ", $1 }' "$table")in $table: take that of" \
            "the same size, or unset MODEL and set TP (and PP, CP, EP, RECOMPUTE) yourself"
    fi
    if [ -z "${TP:-}" ]; then
        fail "$table has no layout for $gpus GPUs of $MODEL, but for$known: take one of them, or set TP (and PP, CP, EP," \
            "RECOMPUTE) yourself"
    fi
}

# ------------------------------------------------------------------------------------------------------------- start

# plan LINE…: what --dry-run prints above the environment, as comments: all of it together can be pasted into a shell.
plan() {
    if [ -n "$dry_run" ]; then printf '# %s\n' "$@"; fi
}

# check_inputs FLAG…: refuse a model, data or layout that is seen to be wrong, before anything is packed or started.
check_inputs() {
    local report line
    if [ "${CHECK_INPUTS:-yes}" = no ]; then return; fi
    if report=$("$PYTHON" -m megatron_idft convert check "$@" 2>&1); then
        while IFS= read -r line; do if [ -n "$line" ]; then plan "checked  $line"; fi; done <<<"$report"
    elif [ -n "$dry_run" ] && ! "$PYTHON" -c 'import megatron_idft' 2>/dev/null; then
        plan "checked  nothing: $PYTHON cannot import megatron_idft here"
    else
        fail "${report#megatron-idft convert: error: }"
    fi
}

# start COMMAND…: under --dry-run print environment and command. Else run it and wait for its end. Its status is then
# 143 if SIGTERM stopped it, 130 if Ctrl-C did: the offline tools go on where they were, however they ended.
start() {
    if [ -n "$dry_run" ]; then
        print_environment
        print_command "$@"
        return 0
    fi
    local status=0
    run_and_pass_signals_on "$@" || status=$?
    if [ -n "$stopped_by" ]; then status=$([ "$stopped_by" = INT ] && echo 130 || echo 143); fi
    return "$status"
}

# start_training COMMAND…: as `start`, but the last line and the status are those that a rank on this node has reported
# (megatron_idft/integration/platform/outcome.py). torchrun's last line is not ours, and its status is 1 whatever happened. 143
# and 130 come from a rank alone, which has seen that a checkpoint holds all that was trained.
start_training() {
    if [ -n "$dry_run" ]; then
        start "$@"
        return
    fi
    local status=0 report='' folder
    folder=$(mktemp -d)
    export MEGATRON_IDFT_OUTCOME=$folder/outcome
    run_and_pass_signals_on "$@" || status=$?
    if [ "$status" -ne 0 ] && [ -s "$MEGATRON_IDFT_OUTCOME" ]; then
        { read -r status && report=$(cat); } <"$MEGATRON_IDFT_OUTCOME"
    elif [ "$status" -ne 0 ] && [ -n "$stopped_by" ]; then
        status=1 report="SIG$stopped_by: stopped before training had begun, nothing is lost"
    elif [ "$status" -ne 0 ]; then
        if [ "$status" -eq 143 ] || [ "$status" -eq 130 ]; then status=1; fi
        report="ended with exit code $status, and no process of this node has said why: see the lines above"
    fi
    rm -rf "$folder"
    if [ -n "$report" ]; then echo "$(basename "$0"): $report" >&2; fi
    return "$status"
}

# run_and_pass_signals_on COMMAND…: its status; `stopped_by` is the signal that came, TERM, INT or HUP.
# The command is a process group of its own (set -m), so that Ctrl-C, which a terminal sends to a whole group, reaches
# torchrun once: a second signal would make it give up. Of the other signals only the first is passed on, as Slurm sends
# them to every process by itself.
run_and_pass_signals_on() {
    local status=0 child=''
    stopped_by=''
    trap 'pass_on INT' INT
    trap 'pass_on TERM' TERM
    trap 'pass_on HUP' HUP
    set -m
    "$@" &
    child=$!
    set +m
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ends `wait`, not the command
        status=0
        wait "$child" || status=$?
    done
    trap - INT TERM HUP
    return "$status"
}

pass_on() {
    if [ "$1" = INT ] || [ -z "$stopped_by" ]; then kill "-$1" "$child" 2>/dev/null || true; fi
    stopped_by=${stopped_by:-$1}
}

print_environment() {
    local name
    for name in "${environment[@]}"; do printf 'export %s=%q\n' "$name" "${!name}"; done
}

# One flag with its values on each line.
print_command() {
    local line word
    line=$(printf '%q' "$1")
    for word in "${@:2}"; do
        if [[ $word == -* ]]; then
            printf '%s \\\n' "$line"
            line="   "
        fi
        line+=" $(printf '%q' "$word")"
    done
    printf '%s\n' "$line"
}

# ------------------------------------------------------------------------------------------------------------- Slurm

# in_slurm_job: the folder of the scripts and the first node, inside a job and, for --dry-run, outside of one.
in_slurm_job() {
    NNODES=${SLURM_NNODES:-${NNODES:-1}}
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        local hosts
        hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
        MASTER_ADDR=${MASTER_ADDR:-${hosts%%$'\n'*}}
        # Another port for each job, another rendezvous for each start of a job.
        MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
        RDZV_ID=${RDZV_ID:-$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}}
    elif [ -z "$dry_run" ]; then
        fail "this is a batch script: sbatch $0, or bash $0 --dry-run to see the plan"
    else
        MASTER_ADDR=${MASTER_ADDR:-first-node} MASTER_PORT=${MASTER_PORT:-29500} RDZV_ID=${RDZV_ID:-job}
    fi
    export NNODES MASTER_ADDR MASTER_PORT RDZV_ID
}

# srun_args: SRUN_ARGS for one task on each node with all its processors, in CONTAINER_IMAGE (pyxis) where that is set.
srun_args() {
    SRUN_ARGS=(--nodes "$NNODES" --ntasks "$NNODES" --ntasks-per-node 1 --kill-on-bad-exit=1)
    # Since Slurm 22.05 a step no longer takes the job's processors by itself.
    if [ -n "${SLURM_CPUS_ON_NODE:-}" ]; then SRUN_ARGS+=(--cpus-per-task "$SLURM_CPUS_ON_NODE"); fi
    if [ -n "${CONTAINER_IMAGE:-}" ]; then
        need CONTAINER_MOUNTS "the shared folders of models, data, checkpoints and these scripts, as /shared:/shared,…"
        SRUN_ARGS+=(--container-image "$CONTAINER_IMAGE" --container-mounts "$CONTAINER_MOUNTS")
        SRUN_ARGS+=(--no-container-mount-home --container-workdir "$PWD")
        export PYTHON=${PYTHON:-python3} # the container's, not a virtual environment's of this machine
    fi
}

# requeue_if_stopped STATUS: back into the queue after the time limit or a preemption, not after scancel or a fault.
requeue_if_stopped() {
    if [ "$1" -ne 143 ] || [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" != RUNNING ]; then
        return 0 # done, failed, cancelled, or requeued by Slurm itself
    fi
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_REQUEUES:-100}" ]; then
        echo "not requeued: this was start ${SLURM_RESTART_COUNT:-0} and MAX_REQUEUES is ${MAX_REQUEUES:-100}"
        return 0
    fi
    echo "stopped by a signal, and saved: requeueing job $SLURM_JOB_ID, which will continue from its last checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
}
