#!/usr/bin/env bash
# Train on all GPUs of one machine, or on several machines of a kind.
#
#   launch/torchrun.sh RECIPE [OVERRIDE...]
#
# One machine: nothing else is needed; PROCESSES limits the number of GPUs (on a CPU it says how many processes).
# Several: run it on each with the same MACHINES and MASTER (host:port of one of them) in the environment.
# A run that stops, also by a loss that is no number, is started again from its last checkpoint, three times (RESTARTS);
# one whose recipe or data are refused is not. Told to end (SIGTERM), all processes write a state, for which torchrun
# gives them 30 seconds; the exit code is then 75: the same command goes on.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,10s/^# \?//p' "$0" >&2; exit 2; }
processes=${PROCESSES:-gpu}
if [ "$processes" = gpu ] && ! compgen -G '/dev/nvidia[0-9]*' >/dev/null && ! [ -e /dev/kfd ] && ! [ -e /dev/dxg ]; then
    echo "torchrun.sh: there is no GPU here; PROCESSES=2 trains on the CPU in two processes" >&2
    exit 2
fi
if [ "${MACHINES:-1}" -gt 1 ]; then
    where=(--nnodes "$MACHINES" --rdzv-backend c10d --rdzv-endpoint "${MASTER:?set MASTER=host:port of one machine}" --rdzv-id "${RUN_ID:-likeness}")
else
    where=(--standalone)
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# torchrun restarts after every failure. Exit code 2 is a refusal, which all processes meet alike and no restart mends:
# it is noted, and to torchrun it is an end like any other. Signals are handed on, and their effect is waited for.
said=$(mktemp)
set -m # or it could not be interrupted
torchrun "${where[@]}" --nproc-per-node "$processes" --max-restarts "${RESTARTS:-3}" --no-python \
    bash -c 'trap : TERM; likeness train "$@" || { code=$?; echo $code >"$0"; [ $code -eq 2 ] || exit $code; }' "$said" "$@" &
child=$! status=0
set +m
trap 'kill -TERM $child' TERM
trap 'kill -INT $child' INT
while kill -0 $child 2>/dev/null; do wait $child || true; done
wait $child || status=$?
code=$(cat "$said")
rm "$said"
case $status/$code in
    0/2 | [1-9]*/75) exit "$code" ;;
    *) exit "$status" ;;
esac
