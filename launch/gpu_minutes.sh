#!/usr/bin/env bash
# Ten minutes of one GPU: train the bundled model further at a large batch, then measure the full-size networks.
#
#   launch/gpu_minutes.sh pack FACES...      # before, anywhere: archives gpu/faces-*.zip of at most 14 MB, and gpu/wheels (60 MB)
#   launch/gpu_minutes.sh add ARCHIVE        # on the GPU machine, for each archive: unpack, extract sketches, encode
#   launch/gpu_minutes.sh run OUT [KEY=VALUE...]  # on the GPU machine: train with these overrides, pack and measure
#
# FACES are prepared folders, of which 10,000 faces are packed. The GPU machine has Python 3.12, torch, transformers and
# accelerate. OUT gets the packed model (11 MB), metrics.jsonl, and numbers.json with latency and memory. To use the model,
# link src/likeness/bundled/common to OUT/common.
# The archives may arrive one by one: what `add` has encoded stays in WORK (default: /tmp/likeness-gpu). SECONDS_TO_TRAIN
# (default: 360) limits the training; it is stopped with SIGTERM, published at every checkpoint, and resumes if `run` is
# repeated. BATCH (default: 1024) and MODEL (default: mmface_mini; or mditface_mini, mask_mini) select what is trained.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,15s/^# \?//p' "$0" >&2; exit 2; }
root=$(realpath "$(dirname "$0")/..")
work=${WORK:-/tmp/likeness-gpu} model=${MODEL:-mmface_mini}
bundled=$root/src/likeness/bundled
export PYTHONPATH=$root/src:$work/site
likeness() { python3 -m likeness.cli "$@"; }
case $1 in
pack)
    python3 "$root/tools/pack_faces.py" gpu "${@:2}"
    # what an image with torch, transformers and accelerate lacks
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 -d gpu/wheels \
        $(grep -oE '^(diffusers|tyro|docstring-parser|typeguard|scipy|matplotlib|contourpy|cycler|fonttools|kiwisolver|pyparsing|python-dateutil)==[^ ;\\]+' \
            "$root/requirements/core.txt" | awk -F== '{pin[$1] = $0} END {for (name in pin) print pin[name]}') # the last: of Python 3.12
    du -sh gpu
    ;;
add)
    mkdir -p "$work"
    wheels=$(dirname "$2")/wheels
    [ -d "$work/site" ] || [ ! -d "$wheels" ] || \
        python3 -m pip install -q --no-index --no-deps --target "$work/site" "$wheels"/*.whl
    name=$(basename "$2" .zip)
    python3 -m zipfile -e "$2" "$work/$name"
    likeness prepare annotate "$work/$name"
    likeness prepare encode "$work/$name" "$work/shards/$name" --augmentations 2 --precision auto
    rm -r "${work:?}/$name"
    ;;
run)
    out=$(realpath -m "$2") run=$work/run
    mkdir -p "$out"
    shards=$(printf '"%s",' "$work"/shards/*)
    # a constant rate: the EMA is the annealed model at any time
    timeout -s TERM "${SECONDS_TO_TRAIN:-360}" python3 -m likeness.cli train "$root/recipes/$model.toml" --out "$run" \
        "init_from=${model//_/-}" "data.components=$bundled/common" "data.shards=[${shards%,}]" "preview=[]" \
        "optimizer.batch=${BATCH:-1024}" "optimizer.images=$((${BATCH:-1024} * 100000))" "optimizer.decay=constant" \
        "optimizer.warmup=$((${BATCH:-1024} * 50))" "checkpoint_every=$((${BATCH:-1024} * ${STEPS_PER_CHECKPOINT:-500}))" "${@:3}" || \
        { code=$?; [ $code -eq 124 ] || [ $code -eq 75 ] || exit $code; } # stopped by timeout or by a signal
    cp "$run/metrics.jsonl" "$out"
    ln -sfn "$bundled/common" "$work/common"
    [ ! -d "$run/model" ] || { likeness prepare pack "$run/model" "$work/packed" && rm -rf "$out/model" && cp -r "$work/packed" "$out/model"; }
    python3 "$root/benchmarks/full_size.py" --out "$out/numbers.json" ${BENCHMARK:-}
    ;;
*) sed -n '2,15s/^# \?//p' "$0" >&2; exit 2 ;;
esac
