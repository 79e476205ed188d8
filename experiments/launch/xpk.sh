#!/bin/bash
# One run on TPU slices of a GKE cluster, by xpk, which goes on by itself after each interruption:
#
#   CLUSTER=my-cluster TPU=v5litepod-16 SLICES=2 experiments/launch/xpk.sh NAME \
#       --config=configs/digits.py --workdir=/runs/digits
#
# NAME is the workload's; the rest are flags of experiments.train. docs/launching.md explains it.
set -euo pipefail

if (( $# < 2 )); then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
name=$1
shift
# The container's shell gets one string: each flag quoted, so that it is split as it was here.
printf -v flags ' %q' "$@"

xpk workload create \
    --cluster="${CLUSTER:?the GKE cluster}" \
    --workload="$name" \
    --tpu-type="${TPU:?as v5litepod-16}" \
    --num-slices="${SLICES:-1}" \
    --base-docker-image="${IMAGE:-python:3.12}" \
    --script-dir=. \
    --max-restarts="${MOST_RESTARTS:-100}" \
    --restart-on-exit-codes=75 \
    --termination-grace-period-seconds=180 \
    --command="pip install --quiet '.[tpu]' && exec python -m experiments.train --distributed$flags"
