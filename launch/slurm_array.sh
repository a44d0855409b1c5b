#!/usr/bin/env bash
#SBATCH --job-name=idft-offline
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --output=%x-%A-%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120

# score or realign as an array job: every task is a launch of its own, and all share the --output folder.
#
#   sbatch --array 0-15 launch/slurm_array.sh score --hf-model … --sft-data … --seq-length 4096 --output /shared/scores
#   bash launch/slurm_array.sh --dry-run realign …              shows the commands of one task
#
# There is no rendezvous: tasks start when they get a node, and leave at their time limit, a preemption or scancel;
# their chunks go to the others, and a task that was stopped is requeued. More tasks may join at any time. prepare is
# one launch on processors only: sbatch --array 0 --gpus-per-node 0 launch/slurm_array.sh prepare … CONTAINER_IMAGE and
# CONTAINER_MOUNTS (pyxis), VENV and MAX_REQUEUES as in slurm_train.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -n "${SLURM_JOB_ID:-}" ]; then here=${LAUNCH_DIR:-$SLURM_SUBMIT_DIR/launch}; fi
if [ ! -f "$here/common.sh" ]; then
    echo "slurm_array.sh: error: no common.sh in $here: submit from the folder above launch/, or set LAUNCH_DIR" >&2
    exit 2
fi
# shellcheck source=launch/common.sh
source "$here/common.sh"
options "$@"

in_slurm_job
srun_args
export GRACE=${GRACE:-120}

plan "one array task is one launch: srun starts this on its node"
if [ -n "$dry_run" ]; then
    print_command srun "${SRUN_ARGS[@]}" bash "$here/offline.sh" -- "${flags[@]}"
    exec bash "$here/offline.sh" --dry-run -- "${flags[@]}"
fi
status=0
run_and_pass_signals_on srun "${SRUN_ARGS[@]}" bash "$here/offline.sh" -- "${flags[@]}" || status=$?
requeue_if_stopped "$status"
exit "$status"
