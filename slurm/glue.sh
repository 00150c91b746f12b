#!/usr/bin/env bash
# GLUE: an array of jobs with one GPU, task x seed, then a table of all. Prints the id of the last job.
#    CHECKPOINT=runs/cluster/pretrain_large/phase2 slurm/glue.sh [sbatch options of the array]
#SBATCH --job-name=glue
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
here=$(dirname "$0")
[ -e "$here/job.sh" ] || here=$SLURM_SUBMIT_DIR/slurm # Slurm runs a copy of this file
# shellcheck source=slurm/job.sh
. "$here/job.sh"
: "${CHECKPOINT:=$WORK/pretrain_large/phase2}" # a run, one of its checkpoints, or a Hugging Face folder
: "${TASKS:=CoLA SST-2 MRPC STS-B QQP MNLI QNLI RTE}"
: "${SEEDS:=0 1 2 3 4}"
: "${FINETUNE_OPTIONS:=}" # more for evaluation.finetune: --epochs 3 --learning-rate 3e-5
output=$WORK/glue_results
read -ra tasks <<<"$TASKS"
read -ra seeds <<<"$SEEDS"

# finetune TASK SEEDS: those that are not finished; MNLI-mm reads MNLI's folder. Options are words.
# shellcheck disable=SC2086
finetune() {
    alone evaluation.finetune --task "$1" --data-dir "$GLUE/${1%-mm}" --checkpoint "$CHECKPOINT" --output "$output/$1" \
        $FINETUNE_OPTIONS --seeds "${@:2}" || leave $?
}

if ! in_job; then
    array=0-$((${#tasks[@]} * ${#seeds[@]} - 1))
    id=$(submit 1 --array="$array" --cpus-per-task="$CPUS_PER_TASK" "$@" slurm/glue.sh) &&
        STEP=table submit 1 --job-name=glue_table --dependency="afterok:$id" slurm/glue.sh
elif [ "${STEP-}" = table ]; then
    for task in "${tasks[@]}"; do finetune "$task" "${seeds[@]}"; done
    alone evaluation.report "${tasks[@]/#/$output/}" --output "$output/report.html" || leave $?
else
    i=${SLURM_ARRAY_TASK_ID:?run slurm/glue.sh itself, it submits its jobs}
    finetune "${tasks[i / ${#seeds[@]}]}" "${seeds[i % ${#seeds[@]}]}"
fi
