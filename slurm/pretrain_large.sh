#!/usr/bin/env bash
# BERT-large: phase 1 (128 tokens), then phase 2 (512), on whole nodes with one rank per GPU. A requeued job resumes.
#    NODES=8 TP=1 slurm/pretrain_large.sh [sbatch options]   or   sbatch --nodes=8 slurm/pretrain_large.sh
#SBATCH --job-name=pretrain_large
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.out
here=$(dirname "$0")
[ -e "$here/job.sh" ] || here=$SLURM_SUBMIT_DIR/slurm # Slurm runs a copy of this file
# shellcheck source=slurm/job.sh
. "$here/job.sh"
. slurm/pretrain.sh

if ! in_job; then
    submit "$GPUS_PER_NODE" --nodes="${NODES:-2}" "$@" slurm/pretrain_large.sh
else
    pretrain "${MODEL:-large}" "${RUN:-$WORK/pretrain_large}"
fi
