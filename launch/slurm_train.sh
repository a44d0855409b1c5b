#!/usr/bin/env bash
#SBATCH --job-name=idft
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300

# train.sh on every node of a Slurm job, one task and one torchrun on each; back into the queue when time is up.
#
#   export HF_MODEL=… MODEL=qwen2.5-7b DATA=… SAVE=…           the settings of train.sh
#   bash launch/slurm_train.sh --dry-run                        shows srun's command and train.sh's plan
#   sbatch --nodes 4 launch/slurm_train.sh [FLAG…]              from the folder that holds launch/
#
# CONTAINER_IMAGE and CONTAINER_MOUNTS run it in a container (pyxis), VENV=/path in a virtual environment. 300 seconds
# before the time limit (--signal above; GRACE if you change it) and at a preemption the processes get SIGTERM, save and
# end, and the job is requeued, at most MAX_REQUEUES (100) times; it continues from SAVE.
set -euo pipefail
# sbatch runs a copy of this file: the folder is that of the submission.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -n "${SLURM_JOB_ID:-}" ]; then here=${LAUNCH_DIR:-$SLURM_SUBMIT_DIR/launch}; fi
if [ ! -f "$here/common.sh" ]; then
    echo "slurm_train.sh: error: no common.sh in $here: submit from the folder above launch/, or set LAUNCH_DIR" >&2
    exit 2
fi
# shellcheck source=launch/common.sh
source "$here/common.sh"
options "$@"

in_slurm_job
srun_args

plan "srun starts this once on each of $NNODES nodes; job ${SLURM_JOB_ID:-not submitted}"
if [ -n "$dry_run" ]; then
    print_command srun "${SRUN_ARGS[@]}" bash "$here/train.sh" -- "${flags[@]}"
    exec bash "$here/train.sh" --dry-run -- "${flags[@]}"
fi
status=0
run_and_pass_signals_on srun "${SRUN_ARGS[@]}" bash "$here/train.sh" -- "${flags[@]}" || status=$?
requeue_if_stopped "$status"
exit "$status"
