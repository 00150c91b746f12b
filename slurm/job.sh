# shellcheck shell=bash
# What all jobs share: how they are submitted, how their ranks start, and how they end. Sourced by the other scripts.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
. slurm/env.sh

say() { echo "$(date +%T) [job $SLURM_JOB_ID, try ${SLURM_RESTART_COUNT:-0}] $*"; }
in_job() { [ "${0##*/}" = slurm_script ]; } # the name that Slurm gives to its copy of a batch script

# submit GPUS SBATCH-OPTIONS SCRIPT: submits a job with that many GPUs per node, if nodes have any. Prints its id.
submit() {
    local options=(--parsable --kill-on-invalid-dep=yes --output="$WORK/logs/%x-%j.out") id
    [ "$1" = 0 ] || [ "$GPUS_PER_NODE" = 0 ] || options+=(--gres="gpu:$1")
    mkdir -p "$WORK/logs"
    id=$(sbatch "${options[@]}" "${@:2}") || exit
    echo "${id%%;*}"
}

# ranks MODULE ARGUMENTS: starts one process per GPU of the allocation. Returns the exit code of srun.
ranks() {
    local head
    # Slurm's address of the first node is used, because the node's name may not resolve.
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_ADDR=$(scontrol -o show node "$head" | grep -oP '\bNodeAddr=\K\S+')
    export MASTER_ADDR MASTER_PORT=$((30000 + SLURM_JOB_ID % 2700)) OMP_NUM_THREADS=$CPUS_PER_TASK
    say "$((SLURM_JOB_NUM_NODES * TASKS_PER_NODE)) ranks on $SLURM_JOB_NODELIST, first at $MASTER_ADDR:$MASTER_PORT"
    launch --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * TASKS_PER_NODE))" \
        --ntasks-per-node="$TASKS_PER_NODE" --cpus-per-task="$CPUS_PER_TASK" --kill-on-bad-exit=1 -- "$@"
}

# alone MODULE ARGUMENTS: starts one process. Returns its exit code.
alone() { launch --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" -- "$@"; }

# launch SRUN-OPTIONS -- MODULE ARGUMENTS: runs srun in the background and waits, so that this shell can handle signals.
launch() {
    local options=() code
    while [ "$1" != -- ]; do options+=("$1") && shift; done
    shift
    srun "${options[@]}" "${container[@]}" "$PYTHON" -u -m "$@" &
    srun_pid=$!
    wait "$srun_pid"
    code=$?
    while kill -0 "$srun_pid" 2>/dev/null; do # a signal ends `wait` early
        wait "$srun_pid"
        code=$?
    done
    srun_pid=
    return "$code"
}

# leave CODE: ends a job whose work is unfinished after its ranks ended with CODE. The exit code is never 0, because
# `afterok` would take that for success. The job is requeued if Slurm sent the warning signal or if a node was lost,
# unless Slurm is already ending it.
leave() {
    local why=
    [ "$warned" = 0 ] || why="the time limit or a preemption is near"
    [ "$1" = 0 ] || all_nodes_answer || why="a node does not answer"
    if [ -n "$why" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_RESTARTS" ] &&
        [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
        say "not finished because $why: requeued"
        scontrol requeue "$SLURM_JOB_ID" && trap - TERM USR1 && exec sleep infinity # until Slurm ends it
    fi
    if [ "$1" != 0 ]; then
        say "failed with code $1: $(reason)"
    elif [ "$warned" = 1 ]; then
        say "not finished because $why: Slurm decides whether it runs again"
    else
        say "stopped before the end: submit again to resume"
    fi
    exit $(($1 ? $1 : 75))
}

all_nodes_answer() {
    timeout 60 srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 true 2>/dev/null
}

# reason: prints the line of this attempt's log that says why a rank failed: the first Python error that is not merely a
# lost connection to another rank. Without one, it is the first rank that was killed, or else the first error of srun.
reason() {
    local said
    said=$(tail -n "+$first_line" "$log" | tr '\r' '\n')
    grep -aE '^(\[rank[0-9]+\]: )?([A-Za-z_.]*(Error|Exception)|error): ' <<<"$said" |
        grep -avEm 1 'Connection|Broken pipe|Socket|recv|[Tt]imed out|remote process exited' ||
        grep -aEm 1 '^srun: error: .*(Killed|fault|Aborted|Memory)' <<<"$said" ||
        grep -aEm 1 '^srun: error: ' <<<"$said"
}

if in_job; then
    warned=0 srun_pid='' container=()
    trap 'warned=1; say "received the warning signal: saving"; [ -z "$srun_pid" ] || kill -USR1 "$srun_pid"' USR1
    trap 'warned=1; say "received SIGTERM"' TERM # the ranks get their own from Slurm
    export TQDM_MININTERVAL=${TQDM_MININTERVAL:-30} # seconds between lines of a progress bar
    log=$(readlink "/proc/$$/fd/1") || exit
    first_line=$(($(wc -l <"$log") + 1))
    # shellcheck disable=SC2086  # modules are words
    [ -z "$MODULES" ] || module load $MODULES || exit
    [ -z "$NETWORK_INTERFACE" ] || export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE
    case $CONTAINER in
    none) ;;
    pyxis) container=(--container-image="$IMAGE" --container-mounts="$MOUNTS" --container-workdir="$PWD") ;;
    apptainer) container=(apptainer exec --nv --bind "$MOUNTS" --pwd "$PWD" "$IMAGE") ;;
    *) say "CONTAINER=$CONTAINER: choose none, pyxis or apptainer" && exit 2 ;;
    esac
fi
