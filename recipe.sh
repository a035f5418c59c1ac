#!/usr/bin/env bash
# Goes past the report: `best` is a deeper network of the same blocks, trained as networks are now.
# The other rows are what each part of that is worth: the network with none of the parts, with all,
# with each alone, and with all but one. They leave the test images unseen.
#
#   bash recipe.sh best                                      # the network past the report
#   bash recipe.sh parts-none parts-all                      # two of the others
#   bash recipe.sh -- --arch 8 16 16 32 32 --epochs 4        # all, at a size for two CPU cores
#
# The rest is as in ablations.sh.
network="--arch 64 64 128 128 256 256 512 512 --fc 1 --pool avg --batch-size 256 --epochs 30"
parts=( # of the recipe, by name
    "norm --norm batch"
    "downsample --downsample"
    "residual --residual"
    "crop-flip --augment crop flip"
    "cutout --augment cutout"
    "smoothing --label-smoothing 0.1"
    "onecycle --schedule onecycle"
    "sgd --optimizer sgd --lr 0.4 --momentum 0.9 --nesterov --weight-decay 5e-4"
    "decay --no-bias-decay"
    "ema --ema 0.99"
)
recipe=
for part in "${parts[@]}"; do recipe+=" ${part#* }"; done

rows=("best $network $recipe" "parts-none $network --holdout 5000")
rows+=("parts-all $network $recipe --holdout 5000")
for part in "${parts[@]}"; do
    name=${part%% *} options=${part#* }
    rows+=("parts-only-$name $network $options --holdout 5000")
    rows+=("parts-without-$name $network ${recipe/"$options"/} --holdout 5000")
done
. "$(dirname "$(readlink -f "$0")")/ablations.sh"
