#!/bin/bash
# One run over several nodes of a Slurm cluster, which goes on by itself after each interruption:
#
#   sbatch --nodes=2 --gpus-per-node=8 experiments/launch/slurm.sh \
#       --config=configs/digits.py --workdir=/shared/runs/digits
#
# What follows the script's name are flags of experiments.train. docs/launching.md explains the rest.
#SBATCH --job-name=diffjax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@180

set -u
most_restarts=${MOST_RESTARTS:-100}

if (( $# == 0 )); then
    echo "usage: sbatch $0 --config=FILE --workdir=SHARED_FOLDER [flags of experiments.train]" >&2
    exit 2
fi

srun --kill-on-bad-exit=0 python -m experiments.train --distributed "$@"
status=$?

# 75: a process was lost, or hung. 143, 130: SIGTERM or SIGINT came, and the step is saved.
# 134: JAX ended the processes that waited for a lost one. 137: one was killed (srun gives the
# highest status), perhaps for want of memory.
case $status in
    75 | 130 | 134 | 137 | 143) ;;
    *) exit "$status" ;;
esac
# A job that somebody cancels gets SIGTERM as well, but is not RUNNING any more.
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
restarts=${SLURM_RESTART_COUNT:-0}
if [[ $state == RUNNING ]] && (( restarts < most_restarts )); then
    echo "status $status: queued again, for the $((restarts + 1)). time"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$status"
