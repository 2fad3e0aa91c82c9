#!/usr/bin/env bash
# Train the bundled models from two datasets: data, face parser, autoencoder, text encoder, transformers.
#
#   launch/minis.sh DATA [OUT]
#
# DATA contains celeba/ and celebamask-hq/ in their official formats (docs/minis.md); data/ and runs/ are written to OUT
# (default: here). To resume, run the same command again. LANDMARKER is the path of MediaPipe's face_landmarker.task, for
# keypoints. HELD_OUT is the number of test faces of celeba/ (default: 1000). SQUEEZENET is the path of SqueezeNet's
# weights (docs/minis.md), and SQUEEZENET_INPUT, torchvision (default) or caffe, their input; without SQUEEZENET, the decoder
# is trained without perceptual loss.
set -euo pipefail
data=$(realpath "$1")
recipes=$(realpath "$(dirname "$0")/../recipes")
examples=$(realpath "$(dirname "$0")/../examples")
[ -z "${SQUEEZENET:-}" ] || SQUEEZENET=$(realpath "$SQUEEZENET")
[ -z "${LANDMARKER:-}" ] || LANDMARKER=$(realpath "$LANDMARKER")
mkdir -p "${2:-.}" && cd "${2:-.}"
[ -e examples ] || ln -s "$examples" examples # the recipes' previews name files in it
landmarks=(${LANDMARKER:+--landmarker "$LANDMARKER"})
perceptual=(${SQUEEZENET:+"perceptual=$SQUEEZENET" "perceptual_input=${SQUEEZENET_INPUT:-torchvision}"})
conditions=() rendered=() # with keypoints: those of the recipes
[ -n "${LANDMARKER:-}" ] || conditions=('data.condition_probabilities={mask=0.45, sketch=0.35, none=0.2}')
[ -n "${LANDMARKER:-}" ] || rendered=('probabilities={image=0.7, mask=0.18, sketch=0.12}')
train() { likeness train "$recipes/$1.toml" "${@:2}" --out "runs/$1"; }

# 1. Faces: aligned, split by identity, with captions and manual masks
[ -f data/celeba/test/metadata.jsonl ] || \
    likeness prepare ingest "$data/celeba" data/celeba --format celeba --size 128 --held-out "${HELD_OUT:-1000}"
[ -f data/celebamask/test/metadata.jsonl ] || \
    likeness prepare ingest "$data/celebamask-hq" data/celebamask --format celebamask --size 512 --held-out 80
[ -f data/synthetic/train/metadata.jsonl ] || likeness prepare synthetic data/synthetic --count 8000

# 2. Face parser; masks, sketches and keypoints of all faces
train face_parser
for part in celeba/train celeba/test; do
    likeness prepare annotate "data/$part" --parser runs/face_parser/model "${landmarks[@]}"
done
for part in celebamask/train celebamask/test; do
    likeness prepare annotate "data/$part" "${landmarks[@]}"
done

# 3. Components
train autoencoder_mini
train decoder_mini "${perceptual[@]}" "${rendered[@]}"
train text_image_mini
likeness prepare components runs/decoder_mini runs/text_image_mini data/common \
    --data data/celeba --face-parser runs/face_parser

# 4. Shards: two augmentations of training faces, one of test faces
likeness prepare encode data/celeba/train data/shards/celeba --components data/common --augmentations 2 --precision auto
likeness prepare encode data/celebamask/train data/shards/celebamask --components data/common --augmentations 2 --precision auto
likeness prepare encode data/celeba/test data/shards/test --components data/common

# 5. Transformers, packed
for model in mmface mditface; do
    train "${model}_mini" face_parser=data/common/face_parser "${conditions[@]}"
    likeness prepare pack "runs/${model}_mini/model" "data/$model-mini"
done

# 6. The few-step student of mmface-mini, packed as the difference from it
train mmface_mini_fast teacher=data/mmface-mini "${conditions[@]}"
likeness prepare pack runs/mmface_mini_fast/model data/mmface-mini-fast --base data/mmface-mini

# 7. Masks from text
train mask_mini
train label_decoder_mini
likeness prepare pack runs/mask_mini/model data/mask-mini --label-decoder runs/label_decoder_mini
