#!/usr/bin/env bash
# Text to masked shards for both phases, in five jobs, of which two are arrays over slices. The output has the same
# bytes as that of one process. After a failure, run it again: it does only what is missing. Prints the last job's id.
#    SLICES=64 slurm/data_prep.sh [sbatch options of the first job]
#SBATCH --job-name=data_prep
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
here=$(dirname "$0")
[ -e "$here/job.sh" ] || here=$SLURM_SUBMIT_DIR/slurm # Slurm runs a copy of this file
# shellcheck source=slurm/job.sh
. "$here/job.sh"
: "${SLICES:=16}"
: "${WORKERS:=8}" # processes per job
: "${LENGTHS:=128 512}"
: "${PREDICTIONS:=20 80}" # most masked tokens per sequence
: "${VOCAB_OPTIONS:=--type wordpiece --size 30522}"
: "${CORPUS_OPTIONS:=}" # further options of data_prep.corpus: --near-duplicates 0.8
: "${BUILD_OPTIONS:=}"  # further options of data_prep.build: --whole-word

# The options are split into words on purpose.
# shellcheck disable=SC2086
corpus() { alone data_prep.corpus --input $TEXT --vocab "$VOCAB" --output "$WORK/corpus" $CORPUS_OPTIONS "$@" || leave $?; }

# build CORPUS SHARDS OPTIONS: builds the shards of every length.
build() {
    local from=$1 to=$2 lengths predictions i
    read -ra lengths <<<"$LENGTHS"
    read -ra predictions <<<"$PREDICTIONS"
    for i in "${!lengths[@]}"; do
        # shellcheck disable=SC2086
        alone data_prep.build --corpus "$from" --output "$to/${lengths[i]}" --seq-length "${lengths[i]}" \
            --max-predictions "${predictions[i]}" --workers "$WORKERS" $BUILD_OPTIONS "${@:3}" || leave $?
    done
}

# step NAME AFTER OPTIONS: submits a step of this script that starts after job AFTER.
# shellcheck disable=SC2086
step() {
    STEP=$1 submit 0 --job-name="data_$1" --cpus-per-task="$WORKERS" $DATA_OPTIONS ${2:+--dependency="afterok:$2"} \
        "${@:3}" slurm/data_prep.sh
}

in_job || STEP=submit
# shellcheck disable=SC2086
case ${STEP:?run slurm/data_prep.sh directly, it submits its jobs} in
submit)
    array=--array=0-$((SLICES - 1))
    id=$(step prepare "" "$@") && id=$(step tokenise "$id" "$array") && id=$(step plan "$id") &&
        id=$(step write "$id" "$array") && step finish "$id"
    ;;
prepare)
    [ -e "$VOCAB" ] || alone data_prep.vocab --input $TEXT --output "$VOCAB" $VOCAB_OPTIONS || leave $?
    corpus --prepare
    ;;
tokenise) corpus --workers "$WORKERS" --slice "$SLURM_ARRAY_TASK_ID/$SLICES" ;;
plan)
    corpus --workers "$WORKERS" --finish
    build "$WORK/corpus" "$SHARDS" --prepare
    ;;
write) build "$WORK/corpus" "$SHARDS" --slice "$SLURM_ARRAY_TASK_ID/$SLICES" ;;
finish)
    build "$WORK/corpus" "$SHARDS" --finish
    if [ -n "$HELDOUT_TEXT" ]; then
        alone data_prep.corpus --input $HELDOUT_TEXT --vocab "$VOCAB" --output "$WORK/corpus_heldout" || leave $?
        build "$WORK/corpus_heldout" "$SHARDS/heldout" --duplicates 1
    fi
    ;;
esac
