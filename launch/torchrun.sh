#!/usr/bin/env bash
# Train on all GPUs of one machine, or on several machines of a kind.
#
#   launch/torchrun.sh RECIPE [OVERRIDE...]
#
# One machine: PROCESSES limits the number of GPUs (on a CPU it is the number of processes).
# Several: run it on each with the same MACHINES and MASTER (host:port of one of them) in the environment.
# A run that fails, also with a non-finite loss, is restarted from its last checkpoint, three times (RESTARTS), unless its
# recipe or data are invalid. On SIGTERM all processes save a checkpoint, for which torchrun allows 30 seconds, and the exit
# code is 75: run the same command again to resume.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,10s/^# \?//p' "$0" >&2; exit 2; }
processes=${PROCESSES:-gpu}
if [ "$processes" = gpu ] && ! compgen -G '/dev/nvidia[0-9]*' >/dev/null && ! [ -e /dev/kfd ] && ! [ -e /dev/dxg ]; then
    echo "torchrun.sh: no GPU found; PROCESSES=2 trains on the CPU in two processes" >&2
    exit 2
fi
if [ "${MACHINES:-1}" -gt 1 ]; then
    where=(--nnodes "$MACHINES" --rdzv-backend c10d --rdzv-endpoint "${MASTER:?set MASTER=host:port of one machine}" --rdzv-id "${RUN_ID:-likeness}")
else
    where=(--standalone)
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# torchrun restarts after every failure. Exit code 2 means invalid input, which a restart does not fix: the code is stored,
# and torchrun gets a success. Signals are forwarded, and the script waits for their effect.
code_file=$(mktemp)
set -m # so that it can be interrupted
torchrun "${where[@]}" --nproc-per-node "$processes" --max-restarts "${RESTARTS:-3}" --no-python \
    bash -c 'trap : TERM; likeness train "$@" || { code=$?; echo $code >"$0"; [ $code -eq 2 ] || exit $code; }' "$code_file" "$@" &
child=$! status=0
set +m
trap 'kill -TERM $child' TERM
trap 'kill -INT $child' INT
while kill -0 $child 2>/dev/null; do wait $child || true; done
wait $child || status=$?
code=$(cat "$code_file")
rm "$code_file"
case $status/$code in
    0/2 | [1-9]*/75) exit "$code" ;;
    *) exit "$status" ;;
esac
