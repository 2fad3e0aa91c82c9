#!/usr/bin/env bash
# Train on all GPUs of one machine, or on several machines of a kind.
#
#   launch/torchrun.sh RECIPE [OVERRIDE...]
#
# One machine: nothing else is needed; PROCESSES limits the number of GPUs (on a CPU it says how many processes).
# Several: run it on each with the same MACHINES and MASTER (host:port of one of them) in the environment.
# A run that stops, also by a loss that is no number, is started again from its last checkpoint, three times.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,8s/^# \?//p' "$0" >&2; exit 2; }
processes=${PROCESSES:-gpu}
if [ "${MACHINES:-1}" -gt 1 ]; then
    where=(--nnodes "$MACHINES" --rdzv-backend c10d --rdzv-endpoint "${MASTER:?set MASTER=host:port of one machine}" --rdzv-id "${RUN_ID:-likeness}")
else
    where=(--standalone)
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
exec torchrun "${where[@]}" --nproc-per-node "$processes" --max-restarts "${RESTARTS:-3}" -m likeness.cli train "$@"
