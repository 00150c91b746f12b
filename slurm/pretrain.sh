# shellcheck shell=bash disable=SC2154
# The two phases of a pretraining, for pretrain_large.sh and pretrain_base.sh. Sourced after job.sh.
: "${TP:=1}"                                               # ranks that share one copy of the model
: "${PHASES:=1 2}"                                         # phases to run; finished ones are skipped
: "${LENGTHS:=128 512}"                                    # tokens per sequence of each phase
: "${CONFIGS:=ds_configs/large_lamb_phase1.json ds_configs/large_lamb_phase2.json}"
: "${STEPS:=}"                                             # steps of each phase; if empty, as in the configs
: "${TRAIN_OPTIONS:=}"                                     # further options of pretrain.train: --recompute full

# pretrain MODEL OUTPUT: runs phase 1 in OUTPUT/phase1, then continues with phase 2 in OUTPUT/phase2. Resumes either.
pretrain() {
    local model=$1 output=$2 phase length configs steps options extra
    read -ra length <<<"$LENGTHS"
    read -ra configs <<<"$CONFIGS"
    read -ra steps <<<"$STEPS"
    read -ra extra <<<"$TRAIN_OPTIONS"
    for phase in $PHASES; do
        [ ! -e "$output/phase$phase/finished.json" ] || continue
        [ "$warned" = 0 ] || leave 0
        options=(--model "$model" --tensor-parallel "$TP" --data "$SHARDS/${length[phase - 1]}"
            --deepspeed_config "${configs[phase - 1]}" --output "$output/phase$phase")
        [ ! -d "$SHARDS/heldout/${length[phase - 1]}" ] || options+=(--eval-data "$SHARDS/heldout/${length[phase - 1]}")
        [ -z "${steps[phase - 1]-}" ] || options+=(--steps "${steps[phase - 1]}")
        if [ "$phase" = 2 ]; then
            [ -e "$output/phase1/finished.json" ] || { say "phase 1 in $output/phase1 is not finished" && exit 2; }
            options+=(--continue-from "$output/phase1")
        fi
        say "phase $phase of $model to $output/phase$phase"
        ranks pretrain.train "${options[@]}" "${extra[@]}" || leave $?
        [ -e "$output/phase$phase/finished.json" ] || leave 0
    done
    say "finished: phases $PHASES in $output"
}
