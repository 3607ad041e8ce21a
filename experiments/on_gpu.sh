#!/usr/bin/env bash
# What docs/performance.md wants measured on an NVIDIA GPU, in about ten minutes:
#   bash experiments/on_gpu.sh [DIRECTORY_OF_GTSRBS_ARCHIVES]
# Needs requirements-cuda.txt and a PyTorch that sees the GPU. Figures go to runs/gpu/, or to $OUT.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v nvidia-smi > /dev/null || ! nvidia-smi -L; then
  echo "Expected an NVIDIA GPU, there is none here: nothing was measured." >&2
  exit 2
fi
out="${OUT:-runs/gpu}"
# 64 purifications as one program beside as many in PyTorch, one after another: 20 times as many a
# second are aimed at, which is a ratio of .05.
python -m experiments.benchmark --device gpu --job sweep --seeds 64 --reps 2 --out "$out/sweep"
# An epoch of ResNet-18 on as many images as GTSRB has, beside PyTorch's.
python -m experiments.benchmark --device gpu --job train --arch resnet18 --batch 128 --images 39209 \
  --reps 2 --out "$out/train"
# A backdoored ResNet-18 on the real images: 98% in under two minutes are aimed at.
if [ $# -gt 0 ]; then
  time python -m experiments.backdoor --dataset gtsrb --data_dir "$1" --arch resnet18 \
    --attack badnets --epochs 8 --out "$out/backdoor"
fi
