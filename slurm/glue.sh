#!/usr/bin/env bash
# GLUE: an array of one-GPU jobs over tasks and seeds, then a table of all results. Prints the id of the last job.
#    CHECKPOINT=runs/cluster/pretrain_large/phase2 slurm/glue.sh [sbatch options of the array]
#SBATCH --job-name=glue
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
here=$(dirname "$0")
[ -e "$here/job.sh" ] || here=$SLURM_SUBMIT_DIR/slurm # Slurm runs a copy of this file
# shellcheck source=slurm/job.sh
. "$here/job.sh"
: "${GLUE_TASKS:=CoLA SST-2 MRPC STS-B QQP MNLI QNLI RTE}"
: "${GLUE_OPTIONS:=}" # further options of evaluation.finetune: --epochs 3 --learning-rate 3e-5
. slurm/finetune.sh

data_dir() { echo "$GLUE/${1%-mm}"; } # MNLI-mm reads MNLI's folder
finetune_all glue "$GLUE_TASKS" "$GLUE_OPTIONS" "$@"
