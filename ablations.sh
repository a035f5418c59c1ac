#!/usr/bin/env bash
# Replays the report: trains and tests each of its rows, draws them, prints the results table.
# Then goes past it: row `best` is a deeper network of the same blocks, trained as networks are now.
#
#   bash ablations.sh                                        # all rows
#   bash ablations.sh row4 row6                              # these rows
#   bash ablations.sh best                                   # the best network
#   bash ablations.sh parts                                  # what each part of that is worth
#   bash ablations.sh row4 -- --device cpu                   # what follows -- goes to train.py
#   bash ablations.sh row4 -- --seed 1                       # beside seed 0, as row4-seed1
#   bash ablations.sh -- --dataset shapes --limit 256 --epochs 1 --out runs/trial
#   LAUNCH="torchrun --nproc-per-node=2" bash ablations.sh   # something else than python
#
# Finished rows are skipped and interrupted ones go on. A failing row does not stop the others, but
# is named at the end, and the exit code is then 1. With --holdout the test images stay unseen.
set -u
here=$(dirname "$0")

simple="--init default --schedule none --epochs 30" # what the report's first rows had
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

rows=( # name, the report's accuracy, and what differs from its final model
    "row1 52.00 --arch 64 128 256 --k 2 --no-block-relu --fc 1 --pool avg $simple"
    "row2 72.00 --arch 64 128 256 --k 2 --fc 1 $simple"
    "row3 82.01 $simple"
    "row4 61.00 --arch 16 8 4 --fc 1 $simple"
    "row5 79.34 --dropout 0 --init default --schedule none"
    "row6 82.97"
    "final 82.84" # the same training as row6, which is done once
    "sgd 10.00 --optimizer sgd"
    "adam - --optimizer adam"
    "gate-relu - --gate relu"
    "best - $network $recipe"
)
names=$(printf '%s\n' "${rows[@]}" | cut -d ' ' -f 1)

wanted=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case " ${names//$'\n'/ } parts " in
    *" $1 "*) wanted+=" $1" ;;
    *) echo "ablations.sh: error: there is no row '$1', only" $names parts >&2 && exit 2 ;;
    esac
    shift
done
shift $(($# > 0)) # the --
extra=("$@")
wanted=${wanted:-$names}

out=runs
suffix=
device=auto
resume=--resume
previous=
changed=
for argument in "$@"; do
    case $previous in
    --out) out=$argument ;;
    --seed) suffix=-seed$argument ;;
    --device) device=$argument ;;
    esac
    case $argument in
    --overwrite) resume= ;;
    --device=*) device=${argument#*=} ;;
    --out=*) out=${argument#*=} ;;
    --seed=*) suffix=-seed${argument#*=} ;;
    --out | --seed | --device | --resume) ;;
    *) [[ $previous =~ ^--(out|seed|device)$ ]] || changed=$argument ;;
    esac
    previous=$argument
done
if [ "$suffix" = -seed0 ]; then suffix=; fi # which every row has anyway

child=
stop() { # stop SIGNAL CODE: pass the signal on, and end when the script has ended
    if [ -n "$child" ]; then kill -s "$1" "$child" && wait "$child"; fi
    exit "$2"
}
trap 'stop TERM 143' TERM
trap 'stop TERM 130' INT

run() { # run SCRIPT OPTION...: with python, or as LAUNCH says
    ${LAUNCH:-python} "$here/$1" "${@:2}" &
    child=$!
    wait "$child"
}

failed=
replay() { # replay NAME OPTION...: train, then test, unless images are held out for that
    local name=$1$suffix
    echo "== $name"
    run train.py "${@:2}" ${extra[@]+"${extra[@]}"} --name "$name" $resume &&
        LAUNCH= run evaluate.py "$out/$name.pt" --once --device "$device" || failed+=" $name"
}

draw() { # draw OPTION... HISTORY...: those that exist
    local words=()
    for word in "$@"; do
        if [[ $word != *.json || -e $word ]]; then words+=("$word"); fi
    done
    if [[ " ${words[*]-} " == *.json\ * ]]; then
        LAUNCH= run plot.py "${words[@]}" || failed+=" plot"
    fi
}

copy_finished() { # copy_finished FROM TO: a finished run under another name, for --resume to find
    if [ -n "$changed" ] && [[ " $replayed " != *" $1 "* ]]; then return; fi # other options than now
    local from=$out/$1$suffix to=$out/$2$suffix end
    if [ -e "$from.pt" ] && [ ! -e "$from.state.pt" ] && [ ! -e "$to.json" ]; then
        for end in .pt .json; do # by way of .part: a full disk leaves no half of a file
            cp "$from$end" "$to.part" && mv "$to.part" "$to$end" || { rm -f "$to".{part,pt} && return; }
        done
    fi
}

replayed=
histories=()
for row in "${rows[@]}"; do
    read -r name reported options <<<"$row"
    if [[ " ${wanted//$'\n'/ } " == *" $name "* ]]; then
        case $name in
        row6) copy_finished final row6 ;;
        final) copy_finished row6 final ;;
        esac
        if [ "$reported" != - ]; then options+=" --reported $reported"; fi
        replay "$name" $options
        replayed+=" $name"
    fi
    histories+=("$out/$name.json" "$out/$name"-seed*.json)
done

# The network of `best` with none of the parts, all, one, all but one: 22 runs that leave the test
# images unseen and are therefore drawn by themselves.
if [[ " ${wanted//$'\n'/ } " == *" parts "* ]]; then
    network+=" --holdout 5000"
    replay parts-none $network
    replay parts-all $network $recipe
    for part in "${parts[@]}"; do
        options=${part#* }
        replay "parts-only-${part%% *}" $network $options
        replay "parts-without-${part%% *}" $network ${recipe/"$options"/}
    done
    draw --out "$out/parts" "$out"/parts-*.json
fi
draw "${histories[@]}"

if [ -n "$failed" ]; then
    echo "ablations.sh: error: failed:$failed" >&2
    exit 1
fi
