#!/usr/bin/env bash
# The example of "Continue from released weights" in docs/ecosystem.md, about six minutes of processor time on one thread:
#   docs/bench/continue.sh CIFAR10 PHOTOS RUNS
# CIFAR10: folder with train/ and test/. PHOTOS: folder of class/image.jpg. RUNS: new folder for images and runs.
set -euo pipefail
cd "$(dirname "$0")/../.."
cifar=$1 photos=$2 runs=$3
export OMP_NUM_THREADS=1 LC_ALL=C

choose() { # SOURCE TARGET CONDITION: copy the images whose number in their class, from 1, fulfils awk's condition
    local class
    for class in "$1"/*/; do
        mkdir -p "$2/$(basename "$class")"
        find "$class" -type f | sort | awk "$3" | xargs -d '\n' cp -t "$2/$(basename "$class")"
    done
}
choose "$cifar/train" "$runs/images/cifar" 'NR <= 500'
choose "$cifar/test" "$runs/images/cifar-val" 'NR <= 100'
choose "$photos" "$runs/images/photos" 'NR % 5 != 0'
choose "$photos" "$runs/images/photos-val" 'NR % 5 == 0'

cat >"$runs/small.yaml" <<END
run: {dir: $runs/cifar, epochs: 8, device: cpu, log_every: 10}
data:
  train: $runs/images/cifar
  val: $runs/images/cifar-val
  workers: 0
  batch_size: 256
  views: [{size: 32}, {size: 32}]
model:
  backbone: resnet18
  backbone_args: {channels: [16, 32, 64, 128], layers: [1, 1, 1, 1]}
  small_images: true
  stem_stride: 2
  head_norm: true
method: {name: simclr, temperature: 0.2, bn: local}
optim: {name: adamw, lr: 2.0e-3, warmup: 0.5}
eval: {knn_every: 0, k: 20, temperature: 0.07}
END

# The photographs are of garments, which fill them: one run has larger crops, and colours that change little.
own=(data.train="$runs/images/photos" data.val="$runs/images/photos-val" data.batch_size=64
    model.weights="$runs/cifar")
large=('data.views=[{size: 64, scale: [0.5, 1]}, {size: 64, scale: [0.5, 1]}]' data.augment.saturation=0.2
    data.augment.hue=0.03 data.augment.gray=0.1 data.augment.blur=0.2)
usual=('data.views=[{size: 64}, {size: 64}]')

python -m trainer pretrain "$runs/small.yaml"
python -m trainer pretrain "$runs/small.yaml" run.dir="$runs/large-crops" "${own[@]}" "${large[@]}" run.epochs=30 \
    optim.lr=4e-3 optim.frozen_epochs=2 optim.layer_decay=0.9
python -m trainer pretrain "$runs/small.yaml" run.dir="$runs/usual-crops" "${own[@]}" "${usual[@]}" run.epochs=10 \
    optim.frozen_epochs=2 optim.layer_decay=0.7
python -m trainer pretrain "$runs/small.yaml" run.dir="$runs/high-rate" "${own[@]}" "${usual[@]}" run.epochs=3 \
    optim.lr=1
