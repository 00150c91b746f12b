# shellcheck shell=bash disable=SC2034
# The only file that a site has to edit. Relative paths start at the repository, which all nodes must see. Variables
# that are already set in the environment take precedence:  NODES=8 TP=2 slurm/pretrain_large.sh

# The cluster. These are sbatch's own variables, so `. slurm/env.sh; sbatch slurm/pretrain_large.sh` works as well.
# export SBATCH_PARTITION=${SBATCH_PARTITION:-gpu}
# export SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-project}
export SBATCH_TIMELIMIT=${SBATCH_TIMELIMIT:-24:00:00} # per job; a run that needs longer is requeued until it is finished
export SBATCH_SIGNAL=${SBATCH_SIGNAL:-B:USR1@300}     # the job saves this many seconds before the limit; more for slow disks
: "${DATA_OPTIONS:=}"                                 # sbatch options of jobs without a GPU: --partition=cpu
: "${GPUS_PER_NODE:=8}"                               # 0 on a cluster without GPUs
: "${TASKS_PER_NODE:=$((GPUS_PER_NODE ? GPUS_PER_NODE : 2))}" # ranks per node, one per GPU
: "${CPUS_PER_TASK:=8}"
: "${NETWORK_INTERFACE:=}" # interface between nodes, such as ib0 or bond0; if empty, NCCL and gloo choose
: "${MAX_RESTARTS:=100}"   # a job that was requeued this often gives up

# The software: modules to load, then a Python that has this project installed, or a container with one.
: "${MODULES:=}"               # module load ...
: "${CONTAINER:=none}"         # none, pyxis (enroot) or apptainer
: "${IMAGE:=}"                 # pyxis: an image or .sqsh; apptainer: a .sif
: "${MOUNTS:=$PWD:$PWD}"       # bind mounts of the container: FROM:TO,FROM:TO
: "${PYTHON:=.venv/bin/python}" # in a container: python3

# The data. All output goes to WORK.
: "${WORK:=runs/cluster}"
: "${TEXT:=$WORK/text}"       # files and folders to pretrain on, separated by spaces
: "${HELDOUT_TEXT:=}"         # held-out text to evaluate on during pretraining, if any
: "${VOCAB:=$WORK/vocab}"     # a vocabulary; if missing, one is trained on TEXT
: "${SHARDS:=$WORK/shards}"   # masked shards, one folder per sequence length
: "${GLUE:=$WORK/glue}"       # made by `python -m data_prep.download glue`
: "${SQUAD:=$WORK/squad}"     # made by `python -m data_prep.download squad`
