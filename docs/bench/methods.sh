#!/usr/bin/env bash
# The comparison of the methods on CIFAR-10 in docs/methods.md, on one machine, hours on two cores:
#   docs/bench/methods.sh CIFAR10 RUNS
# CIFAR10: folder with train/ and test/. RUNS: folder for all runs. Started again it goes on; finished runs are kept.
#
# Every method has the same tuning: three learning rates times two values of the setting that it is known to depend on
# most, three epochs each; the best by kNN runs for twenty epochs.
set -euo pipefail
cd "$(dirname "$0")/../.."
data=$1 runs=$2
mkdir -p "$runs"

# Narrower than the recipes' network, to fit two cores; else as in the recipes.
common=(data.train="$data/train" data.val="$data/test" data.workers=0 model.stem_stride=2
    model.backbone_args='{channels: [16, 64, 128, 256], layers: [1, 1, 1, 1]}')
rates=(0.03 0.06 0.12)
declare -A setting=(
    [adco]='bank.temperature=0.1,bank.lr=0.3 bank.temperature=0.02,bank.lr=3'
    [acssl]='method.hardest=16 method.hardest=64'
    [moco]='method.temperature=0.1 method.temperature=0.2'
    [simclr]='method.temperature=0.2 method.temperature=0.5'
    [byol]='method.teacher_momentum=0.99 method.teacher_momentum=0.996'
)
methods=(adco acssl moco simclr byol)

pretrain() { # NAME METHOD RATE VALUES KEY=VALUE…
    local name=$1 method=$2 rate=$3 values
    IFS=, read -ra values <<<"$4"
    shift 4
    [[ -f $runs/$name/results.json ]] ||
        python -m trainer pretrain "configs/${method}_cifar10.yaml" run.dir="$runs/$name" "${common[@]}" \
            optim.lr="$rate" "${values[@]}" "$@"
}

knn() { sed -n 's/^  "knn": \([0-9.]*\).*/\1/p' "$runs/$1/results.json"; }

for method in "${methods[@]}"; do
    for rate in "${rates[@]}"; do
        for values in ${setting[$method]}; do
            name=tune/$method-$rate-$values
            pretrain "$name" "$method" "$rate" "$values" run.epochs=3 eval.knn_every=3 >&2
            echo "$(knn "$name") $method $rate $values"
        done
    done
done | sort -k2,2 -k1,1gr | tee "$runs/tuning.txt"

best() { grep " $1 " "$runs/tuning.txt" | head -n 1; } # its line: kNN, method, rate, values

for method in "${methods[@]}"; do
    read -r _ _ rate values < <(best "$method")
    pretrain "$method" "$method" "$rate" "$values" run.epochs=20 eval.knn_every=4
done

# Of the second method: as it is; without mining; mining without the pairs' own term; no guard; fewer and more mined.
read -r _ _ rate values < <(best acssl)
for part in method.name=acssl method.hardest=0 method.pair_weight=0 method.guard_top=0 method.hardest=8 \
    method.hardest=32; do
    pretrain "parts/$part" acssl "$rate" "$values" run.epochs=10 eval.knn_every=5 "$part"
done

python -m trainer compare "${methods[@]/#/$runs/}" --out "$runs/methods.html"
python -m trainer compare "$runs"/parts/* --out "$runs/parts.html"
