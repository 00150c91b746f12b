# shellcheck shell=bash disable=SC2154
# Fine-tuning as an array of one-GPU jobs over tasks and seeds, followed by a table of all results. Sourced after job.sh by
# glue.sh and squad.sh.
: "${CHECKPOINT:=$WORK/pretrain_large/phase2}" # a run, one of its checkpoints, or a Hugging Face folder
: "${SEEDS:=0 1 2 3 4}"

# finetune_all NAME TASKS OPTIONS SBATCH-OPTIONS: for slurm/NAME.sh, whose function data_dir prints the folder of a task.
finetune_all() {
    local name=$1 output=$WORK/${1}_results tasks options seeds i id
    read -ra tasks <<<"$2"
    read -ra options <<<"$3"
    read -ra seeds <<<"$SEEDS"
    if ! in_job; then
        i=0-$((${#tasks[@]} * ${#seeds[@]} - 1))
        id=$(submit 1 --array="$i" --cpus-per-task="$CPUS_PER_TASK" "${@:4}" "slurm/$name.sh") &&
            STEP=table submit 1 --job-name="${name}_table" --dependency="afterok:$id" "slurm/$name.sh"
    elif [ "${STEP-}" = table ]; then
        for i in "${tasks[@]}"; do finetune "$i" "${seeds[@]}"; done
        alone evaluation.report "${tasks[@]/#/$output/}" --output "$output/report.html" || leave $?
    else
        i=${SLURM_ARRAY_TASK_ID:?run slurm/$name.sh directly, it submits its jobs}
        finetune "${tasks[i / ${#seeds[@]}]}" "${seeds[i % ${#seeds[@]}]}"
    fi
}

# finetune TASK SEEDS: runs the seeds that are not finished.
finetune() {
    alone evaluation.finetune --task "$1" --data-dir "$(data_dir "$1")" --checkpoint "$CHECKPOINT" \
        --output "$output/$1" "${options[@]}" --seeds "${@:2}" || leave $?
}
