#!/usr/bin/env bash
# Goes past the report: `best` and `quick` are networks of the same blocks, trained as networks are
# now, and `quick-k1` is quick without gates. The other rows say what the parts of best are worth:
# the recipe without each of them, and other gates. They leave the test images unseen.
#
#   bash recipe.sh quick                                  # the network past the report
#   bash recipe.sh quick -- --seed 1                      # beside seed 0, as quick-seed1
#   bash recipe.sh gate-mean gate-sigmoid                 # two of the others
#   bash recipe.sh -- --arch 16 32 32 64 64 128 128 --epochs 6     # all, at a size for two CPU cores
#
# The rest is as in ablations.sh.
network="--arch 32 64 64 256 256 256 256 --downsample 2 4 6 --k 2 --fc 1 --norm batch"
network+=" --init default --optimizer sgd --lr 0.4 --momentum 0.9 --nesterov --batch-size 512"
network+=" --epochs 21"
parts=( # of the recipe, by name, that can be left out
    "residual --residual"
    "max-pool --pool max"
    "logit-scale --logit-scale 0.125"
    "whitening --init whiten"
    "augment --augment crop flip"
    "smoothing --label-smoothing 0.1"
    "onecycle --schedule onecycle"
    "bias-lr --bias-lr 16"
    "decay --weight-decay 2e-3"
)
best="$network ${parts[*]#* }"
all="$best --holdout 5000"
quick="--arch 64 64 256 256 256 256 --downsample 1 3 5 --fc 1 --norm batch --pool max"
quick+=" --logit-scale 0.111 --whiten --init dirac --augment crop flip --label-smoothing 0.2"
quick+=" --optimizer sgd --lr 1.5 --momentum 0.85 --nesterov --batch-size 1024"
quick+=" --weight-decay 1.33e-3 --schedule onecycle --epochs 20"
rows=("best $best" "quick $quick --k 2" "quick-k1 $quick --k 1" "all $all")
for part in "${parts[@]}"; do
    rows+=("without-${part%% *} ${all/"${part#* }"/}")
done
rows+=("k1 $all --k 1" "k3 $all --k 3")
rows+=("gate-mean $all --gate mean" "gate-sigmoid $all --gate sigmoid")
. "$(dirname "$(readlink -f "$0")")/ablations.sh"
