#!/usr/bin/env bash
# SQuAD 1.1 and 2.0: an array of one-GPU jobs over tasks and seeds, then a table of all results. Prints the id of the
# last job.
#    CHECKPOINT=runs/cluster/pretrain_large/phase2 slurm/squad.sh [sbatch options of the array]
#SBATCH --job-name=squad
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
here=$(dirname "$0")
[ -e "$here/job.sh" ] || here=$SLURM_SUBMIT_DIR/slurm # Slurm runs a copy of this file
# shellcheck source=slurm/job.sh
. "$here/job.sh"
: "${SQUAD_TASKS:=squad1 squad2}"
: "${SQUAD_OPTIONS:=--epochs 2 --learning-rate 3e-5}" # options of evaluation.finetune
. slurm/finetune.sh

data_dir() { echo "$SQUAD"; }
finetune_all squad "$SQUAD_TASKS" "$SQUAD_OPTIONS" "$@"
