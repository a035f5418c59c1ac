#!/usr/bin/env bash
# Replays the report: trains and evaluates each of its rows, draws them, prints the results table.
#
#   bash ablations.sh                                        # all rows
#   bash ablations.sh row4 row6                              # these rows
#   bash ablations.sh row4 -- --device cpu                   # what follows -- goes to train.py
#   bash ablations.sh row4 -- --seed 1                       # beside seed 0, as row4-seed1
#   bash ablations.sh -- --dataset shapes --limit 256 --epochs 1 --out runs/trial
#   LAUNCH="torchrun --nproc-per-node=2" bash ablations.sh   # something else than python train.py
#
# Finished rows are skipped and interrupted ones go on. A failing row does not stop the others, but
# is named at the end, and the exit code is then 1.
set -u
rows=$(sed -n 's/^row \([^ ]*\).*/\1/p' ablations.sh)
wanted=" "
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case " ${rows//$'\n'/ } " in
    *" $1 "*) wanted+="$1 " ;;
    *) echo "ablations.sh: error: there is no row '$1', only" $rows >&2 && exit 2 ;;
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
    previous=$argument
done
extra=("$@")
failed=

row() { # row NAME REPORTED OPTION...: the report's figure, and what differs from its final model
    local name=$1$suffix reported=$2
    if [ "$wanted" != " " ] && [[ $wanted != *" $1 "* ]]; then return; fi
    shift 2
    if [ "$reported" != - ]; then set -- "$@" --reported "$reported"; fi
    echo "== $name"
    ${LAUNCH:-python} train.py "$@" --name "$name" --resume ${extra[@]+"${extra[@]}"} &&
        { grep -q '^ "test":' "$out/$name.json" || python evaluate.py "$out/$name.pt"; } ||
        failed+=" $name"
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

histories=()
for name in $rows; do
    for history in "$out/$name.json" "$out/$name"-seed*.json; do
        if [ -e "$history" ]; then histories+=("$history"); fi
    done
done
if [ ${#histories[@]} -gt 0 ]; then python plot.py "${histories[@]}" || failed+=" plot"; fi
if [ -n "$failed" ]; then
    echo "ablations.sh: error: failed:$failed" >&2
    exit 1
fi
