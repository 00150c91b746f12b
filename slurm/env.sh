# shellcheck shell=bash disable=SC2034
# The only file a site edits. Paths may be relative to the repository, which all nodes must see. What is already set in
# the environment wins:  NODES=8 TP=2 slurm/pretrain_large.sh

# The cluster, in sbatch's own variables, so that `. slurm/env.sh; sbatch slurm/pretrain_large.sh` means the same.
# export SBATCH_PARTITION=${SBATCH_PARTITION:-gpu}
# export SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-project}
export SBATCH_TIMELIMIT=${SBATCH_TIMELIMIT:-24:00:00} # of one job; a longer run is requeued until it is finished
export SBATCH_SIGNAL=${SBATCH_SIGNAL:-B:USR1@300}     # so many seconds before that it saves; more for slow disks
: "${DATA_OPTIONS:=}"                                 # sbatch options of jobs without a GPU: --partition=cpu
: "${GPUS_PER_NODE:=8}"                               # 0: a cluster without GPUs
: "${TASKS_PER_NODE:=$((GPUS_PER_NODE ? GPUS_PER_NODE : 2))}" # ranks on a node, one for each GPU
: "${CPUS_PER_TASK:=8}"
: "${NETWORK_INTERFACE:=}" # between nodes, such as ib0 or bond0; empty: NCCL and gloo choose
: "${MAX_RESTARTS:=100}"   # a job that was requeued so often gives up

# The software: modules to load, then a Python with this project, or a container with one.
: "${MODULES:=}"               # module load ...
: "${CONTAINER:=none}"         # none, pyxis (enroot) or apptainer
: "${IMAGE:=}"                 # pyxis: an image or .sqsh; apptainer: a .sif
: "${MOUNTS:=$PWD:$PWD}"       # what the container sees: FROM:TO,FROM:TO
: "${PYTHON:=.venv/bin/python}" # in a container: python3

# The data. Everything that is made goes to WORK.
: "${WORK:=runs/cluster}"
: "${TEXT:=$WORK/text}"       # files and folders to pretrain on, separated by spaces
: "${HELDOUT_TEXT:=}"         # text to evaluate on during pretraining, if any
: "${VOCAB:=$WORK/vocab}"     # a vocabulary; if missing, one is trained on TEXT
: "${SHARDS:=$WORK/shards}"   # masked shards, a folder for each sequence length
: "${GLUE:=$WORK/glue}"       # of `python -m data_prep.download glue`
: "${SQUAD:=$WORK/squad}"     # of `python -m data_prep.download squad`
