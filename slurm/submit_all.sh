#!/usr/bin/env bash
# All stages in one call: text -> shards -> phase 1 -> phase 2 -> the tables of GLUE and SQuAD, if their files exist.
# Each job waits for the one before it and does not run if that failed. Prints the job ids. Run it on a login node.
#    NODES=8 slurm/submit_all.sh
# shellcheck source=slurm/job.sh
. "$(dirname "$0")/job.sh"
set -e
: "${PRETRAIN:=pretrain_large}" # or pretrain_base
export RUN=${RUN:-$WORK/$PRETRAIN}

data=$(slurm/data_prep.sh)
phase1=$(PHASES=1 "slurm/$PRETRAIN.sh" --dependency="afterok:$data" --job-name="${PRETRAIN}_1")
phase2=$(PHASES=2 "slurm/$PRETRAIN.sh" --dependency="afterok:$phase1" --job-name="${PRETRAIN}_2")
echo "data $data, phase 1 $phase1, phase 2 $phase2"

# table NAME FILES
table() {
    local id
    [ -d "$2" ] || { echo "no $2: no $1 table" && return; }
    id=$(CHECKPOINT=$RUN/phase2 "slurm/$1.sh" --dependency="afterok:$phase2")
    echo "$1 table $id"
}
table glue "$GLUE"
table squad "$SQUAD"
