#!/usr/bin/env bash
# Goes past the report: networks of the same blocks, trained as networks are now.
#
#   bash recipe.sh quick                      # the smaller one
#   bash recipe.sh best -- --seed 1           # the larger one; beside seed 0, as best-seed1
#   bash recipe.sh quick-k1 best-k1           # both without gates, a single convolution a block
#   bash recipe.sh base without-smoothing     # what a part of the recipe is worth
#
# The parts, and other gates, are tried in `base`, which has half of quick's widths and no gates.
# It and its variants leave the test images unseen. The rest is as in ablations.sh.
recipe="--fc 1 --norm batch --downsample 1 3 5 --init default --batch-size 1024"
recipe+=" --optimizer sgd --lr 1.5 --momentum 0.85 --nesterov"
parts=( # of the recipe, by name, that can be left out
    "whitening --whiten"
    "identity --init dirac"
    "max-pool --pool max"
    "logit-scale --logit-scale 0.111"
    "augment --augment crop flip"
    "smoothing --label-smoothing 0.2"
    "onecycle --schedule onecycle"
    "decay --weight-decay 1.33e-3"
)
recipe+=" ${parts[*]#* }"
best="$recipe --arch 128 128 384 384 384 384 --lr 1.3 --weight-decay 1.5e-3 --epochs 32"
quick="$recipe --arch 64 64 256 256 256 256 --epochs 20"
base="$recipe --arch 32 32 128 128 128 128 --epochs 12 --holdout 5000"
rows=("best $best --k 2" "best-k1 $best --k 1" "quick $quick --k 2" "quick-k1 $quick --k 1")
rows+=("base $base --k 1" "k2 $base --k 2" "k3 $base --k 3")
rows+=("gate-mean $base --k 2 --gate mean" "gate-sigmoid $base --k 2 --gate sigmoid")
for part in "${parts[@]}"; do
    rows+=("without-${part%% *} ${base/"${part#* }"/} --k 1")
done
. "$(dirname "$(readlink -f "$0")")/ablations.sh"
