#!/usr/bin/env bash
# BERT-base: phase 1 (128 tokens), then phase 2 (512), on whole nodes with one rank per GPU. A requeued job resumes.
#    NODES=8 TP=1 slurm/pretrain_base.sh [sbatch options]   or   sbatch --nodes=8 slurm/pretrain_base.sh
#SBATCH --job-name=pretrain_base
#SBATCH --nodes=1
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
: "${CONFIGS:=ds_configs/base_lamb.json ds_configs/base_lamb.json}"
: "${STEPS:=112500 12500}" # 90 % and 10 % of its steps, as Devlin et al. 2019, A.2
. slurm/pretrain.sh

if ! in_job; then
    submit "$GPUS_PER_NODE" --nodes="${NODES:-1}" "$@" slurm/pretrain_base.sh
else
    pretrain "${MODEL:-base}" "${RUN:-$WORK/pretrain_base}"
fi
