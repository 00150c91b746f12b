#!/usr/bin/env bash
# A short pretraining on one GPU, which makes its own data. It shows whether this site's env.sh works, and the speed.
#    slurm/smoke_single_gpu.sh [sbatch options]
#SBATCH --job-name=smoke_single_gpu
#SBATCH --ntasks=1
here=$(dirname "$0")
[ -e "$here/job.sh" ] || here=$SLURM_SUBMIT_DIR/slurm # Slurm runs a copy of this file
# shellcheck source=slurm/job.sh
. "$here/job.sh"

if ! in_job; then
    submit 1 --cpus-per-task="$CPUS_PER_TASK" "$@" slurm/smoke_single_gpu.sh
else
    alone examples.smoke --output "$WORK/smoke" --data "$WORK/smoke_data" || leave $?
fi
