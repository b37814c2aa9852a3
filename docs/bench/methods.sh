#!/usr/bin/env bash
# The comparison of the methods on CIFAR-10 in docs/methods.md, on one machine, about six hours on two cores:
#   docs/bench/methods.sh CIFAR10 RUNS
# CIFAR10: folder with train/ and test/. RUNS: folder for all runs. Started again it goes on; finished runs are kept.
#
# Every method has the same tuning: three learning rates, one more beyond the best if that is the first or the last,
# then at the best of them a second value of the setting that the method is known to depend on most, two epochs each.
# The best by kNN runs for 24 epochs. As many runs at once as there are cores, each on one thread: with networks
# this small that does twice the work.
set -euo pipefail
cd "$(dirname "$0")/../.."
data=$1 runs=$2
cores=$(nproc) # before OMP_NUM_THREADS is set: nproc heeds it
export OMP_NUM_THREADS=1
mkdir -p "$runs"

# Narrower than the recipes' network, to fit two cores, and the same head, batches and crops for all, which MoCo's recipe
# would change; else as in the recipes.
common=(data.batch_size=256 data.views='[{size: 32}, {size: 32}]' model.head_layers=2 method.bn_group=null
    data.train="$data/train" data.val="$data/test" data.workers=0 run.precision=bf16 model.stem_stride=2
    model.backbone_args='{channels: [16, 64, 128, 256], layers: [1, 1, 1, 1]}')
methods=(adco caco acssl moco simclr byol)
rates=(0.06 0.12 0.24)
declare -A values=( # of each method's own setting, the first for the learning rates' tuning
    [adco]='bank.temperature=0.1,bank.lr=0.3 bank.temperature=0.02,bank.lr=3'
    [caco]='bank.temperature=0.1,bank.lr=0.3 bank.temperature=0.08,bank.lr=3'
    [acssl]='method.hardest=64 method.hardest=16'
    [moco]='method.temperature=0.1 method.temperature=0.2'
    [simclr]='method.temperature=0.2 method.temperature=0.5'
    [byol]='method.teacher_momentum=0.99 method.teacher_momentum=0.996'
)

pretrain() { # NAME METHOD RATE VALUES KEY=VALUE…
    local name=$1 method=$2 rate=$3 own
    IFS=, read -ra own <<<"$4"
    shift 4
    [[ -f $runs/$name/results.json ]] ||
        python -m trainer pretrain "configs/${method}_cifar10.yaml" run.dir="$runs/$name" "${common[@]}" \
            optim.lr="$rate" "${own[@]}" "$@" | sed -u "s|^|$name  |"
}

linear() { # NAME STEP
    local folder=$runs/$1/linear-fast-step$2
    [[ -f $folder/results.json ]] || python -m trainer linear "$runs/$1" --fast --step "$2" | sed -u "s|^|$1  |"
}

few_labels() { # NAME KEY=VALUE…
    local name=$1
    shift
    python -m trainer finetune "$runs/$name" "$@" | sed -u "s|^|$name  |"
}

start() { # COMMAND…, in the background as soon as a core is free
    while (($(jobs -rp | wc -l) >= cores)); do wait -n; done
    "$@" &
}

finish() { while [[ $(jobs -p) ]]; do wait -n; done; }

tune() { # METHOD RATE VALUES
    start pretrain "tune/$1-$2-$3" "$1" "$2" "$3" run.epochs=2 eval.knn_every=2
}

best() { # METHOD: of its tuning so far the best learning rate and values
    sort -rn "$runs/tuning.txt" | awk -v method="$1" '$2 == method { print $3, $4; exit }'
}

record() { # all of the tuning, one line each: kNN, method, learning rate, values
    local run method rate own
    for run in "$runs"/tune/*; do
        IFS=- read -r method rate own <<<"${run##*/}"
        echo "$(sed -n 's/^  "knn": \([0-9.]*\).*/\1/p' "$run/results.json") $method $rate $own"
    done | sort -k2,2 -k1,1rn >"$runs/tuning.txt"
}

for method in "${methods[@]}"; do
    for rate in "${rates[@]}"; do tune "$method" "$rate" "${values[$method]% *}"; done
done
finish
record
for method in "${methods[@]}"; do
    read -r rate _ < <(best "$method")
    case $rate in
        0.06) tune "$method" 0.03 "${values[$method]% *}" ;;
        0.24) tune "$method" 0.48 "${values[$method]% *}" ;;
    esac
done
finish
record
for method in "${methods[@]}"; do
    read -r rate _ < <(best "$method")
    tune "$method" "$rate" "${values[$method]#* }"
done
finish
record
cat "$runs/tuning.txt"

for method in "${methods[@]}"; do
    read -r rate own < <(best "$method")
    start pretrain "$method" "$method" "$rate" "$own" run.epochs=24 run.keep=1 run.keep_every=6 eval.knn_every=3
done
# Of the second method: as it is; without mining; mining without the pairs' own term; no guard; fewer and more mined.
read -r rate own < <(best acssl)
for part in method.name=acssl method.hardest=0 method.pair_weight=0 method.guard_top=0 method.hardest=8 \
    method.hardest=32 method.hardest=100; do
    start pretrain "parts/$part" acssl "$rate" "$own" run.epochs=6 eval.knn_every=3 "$part"
done
for part in method.name=acssl method.hardest=0; do # what a seed changes
    start pretrain "parts/$part-seed1" acssl "$rate" "$own" run.epochs=6 eval.knn_every=3 "$part" run.seed=1
done
for method in adco moco; do # whose heads have no BatchNorm, as the others' have
    read -r rate own < <(best "$method")
    for norm in false true; do
        start pretrain "heads/$method-$norm" "$method" "$rate" "$own" run.epochs=6 eval.knn_every=3 \
            model.head_norm="$norm"
    done
done
finish
for method in "${methods[@]}"; do
    for saved in "$runs/$method"/checkpoints/step-*; do
        start linear "$method" "$((10#${saved##*-}))"
    done
done
# Few labels; also of a network that has learned nothing. 1 % are 500 images, two steps of 256.
start pretrain untrained adco 1e-9 '' run.epochs=1
finish
for name in untrained "${methods[@]}"; do
    start few_labels "$name" finetune.labels=0.01 finetune.batch_size=32
    start few_labels "$name" finetune.labels=0.1
done
for run in "$runs"/parts/*; do start few_labels "parts/${run##*/}" finetune.labels=0.01 finetune.batch_size=32; done
finish

python -m trainer compare "${methods[@]/#/$runs/}" --out "$runs/methods.html"
python -m trainer compare "$runs"/parts/* --out "$runs/parts.html"
python -m trainer compare "$runs"/heads/* --out "$runs/heads.html"
