#!/usr/bin/env bash
# Replays the report: trains and evaluates each of its rows, draws them, prints the results table.
# Then goes past it: row `best` is a deeper network of the same blocks, trained as networks are now.
#
#   bash ablations.sh                                        # all rows
#   bash ablations.sh row4 row6                              # these rows
#   bash ablations.sh best                                   # the best network
#   bash ablations.sh parts                                  # what each part of that is worth
#   bash ablations.sh row4 -- --device cpu                   # what follows -- goes to train.py
#   bash ablations.sh row4 -- --seed 1                       # beside seed 0, as row4-seed1
#   bash ablations.sh -- --dataset shapes --limit 256 --epochs 1 --out runs/trial
#   LAUNCH="torchrun --nproc-per-node=2" bash ablations.sh   # something else than python train.py
#
# Finished rows are skipped and interrupted ones go on. A failing row does not stop the others, but
# is named at the end, and the exit code is then 1. With --holdout the test images stay unseen.
set -u
trap 'exit 130' INT
rows=$(sed -n 's/^row \([^ ]*\).*/\1/p' ablations.sh)
wanted=" "
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case " ${rows//$'\n'/ } parts " in
    *" $1 "*) wanted+="$1 " ;;
    *) echo "ablations.sh: error: there is no row '$1', only" $rows parts >&2 && exit 2 ;;
    esac
    shift
done
shift $(($# > 0)) # the --

out=runs
suffix=
previous=
for argument in "$@"; do
    case $previous in
    --out) out=$argument ;;
    --seed) suffix=-seed$argument ;;
    esac
    case $argument in
    --out=*) out=${argument#*=} ;;
    --seed=*) suffix=-seed${argument#*=} ;;
    esac
    previous=$argument
done
extra=("$@")
failed=

replay() { # replay NAME OPTION...: train, then test, unless images are held out for that
    local name=$1$suffix
    shift
    set -- "$@" ${extra[@]+"${extra[@]}"}
    echo "== $name"
    ${LAUNCH:-python} train.py "$@" --name "$name" --resume &&
        { [[ " $* " == *" --holdout"[=\ ]* ]] || grep -q '^ "test":' "$out/$name.json" ||
            python evaluate.py "$out/$name.pt"; } ||
        failed+=" $name"
}

row() { # row NAME REPORTED OPTION...: the report's figure, and what differs from its final model
    local name=$1 reported=$2
    if [ "$wanted" != " " ] && [[ $wanted != *" $name "* ]]; then return; fi
    shift 2
    if [ "$reported" != - ]; then set -- "$@" --reported "$reported"; fi
    replay "$name" "$@"
}

simple="--init default --schedule none --epochs 30" # what the report's first rows had
row row1 52.00 --arch 64 128 256 --k 2 --no-block-relu --fc 1 --pool avg $simple
row row2 72.00 --arch 64 128 256 --k 2 --fc 1 $simple
row row3 82.01 $simple
row row4 61.00 --arch 16 8 4 --fc 1 $simple
row row5 79.34 --dropout 0 --init default --schedule none
row row6 82.97
row final 82.84
row sgd 10.00 --optimizer sgd
row adam - --optimizer adam
row gate-relu - --gate relu

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
row best - $network $recipe

# The network of `best` with none of the parts, all, one, all but one: 22 runs that leave the test
# images unseen and are therefore drawn by themselves.
if [[ $wanted == *" parts "* ]]; then
    rows="parts-*"
    network+=" --holdout 5000"
    replay parts-none $network
    replay parts-all $network $recipe
    for part in "${parts[@]}"; do
        options=${part#* }
        replay "parts-only-${part%% *}" $network $options
        replay "parts-without-${part%% *}" $network ${recipe/"$options"/}
    done
fi

histories=()
for name in $rows; do
    for history in "$out"/$name.json "$out"/$name-seed*.json; do
        if [ -e "$history" ]; then histories+=("$history"); fi
    done
done
if [ ${#histories[@]} -gt 0 ]; then python plot.py "${histories[@]}" || failed+=" plot"; fi
if [ -n "$failed" ]; then
    echo "ablations.sh: error: failed:$failed" >&2
    exit 1
fi
