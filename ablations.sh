#!/usr/bin/env bash
# Replays the report: trains and tests each of its rows, draws them, prints the results table.
#
#   bash ablations.sh                                        # all rows
#   bash ablations.sh row4 final                             # these rows
#   bash ablations.sh row4 -- --device cpu                   # what follows -- goes to train.py
#   bash ablations.sh row4 -- --seed 1                       # beside seed 0, as row4-seed1
#   bash ablations.sh -- --dataset shapes --limit 256 --epochs 1 --out runs/trial
#   LAUNCH="torchrun --standalone --nproc-per-node=2" bash ablations.sh   # something else than python
#
# Finished rows are skipped and interrupted ones go on. A failing row does not stop the others, but
# is named at the end, and the exit code is then 1. With --holdout the test images stay unseen.
set -u
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

simple="--init default --schedule none --epochs 30" # what the report's first rows had
if [ "${BASH_SOURCE[0]}" = "$0" ]; then             # recipe.sh has rows of its own
    rows=( # name, and what differs from the report's final model
        "row1 --reported 52 --arch 64 128 256 --k 2 --no-block-relu --fc 1 --pool avg $simple"
        "row2 --reported 72 --arch 64 128 256 --k 2 --fc 1 $simple"
        "row3 --reported 82.01 $simple"
        "row4 --reported 61 --arch 16 8 4 --fc 1 $simple"
        "row5 --reported 79.34 --dropout 0 --init default --schedule none"
        "final --reported 82.97 82.84" # row 6 of the report, and the model that it tests at the end
        "sgd --reported 10 --optimizer sgd"
        "adam --optimizer adam"
        "gate-relu --gate relu"
    )
fi

wanted=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    if [[ " ${rows[*]%% *} " != *" $1 "* ]]; then
        echo "$(basename "$0"): error: there is no row '$1', only" "${rows[@]%% *}" >&2
        exit 2
    fi
    wanted+=("$1")
    shift
done
shift $(($# > 0)) # the --
out=runs
for ((i = 1; i <= $#; i++)); do
    case ${!i} in
    --out) j=$((i + 1)) && out=${!j-} ;;
    --out=*) out=${!i#--out=} ;;
    esac
done
case $out in "~" | "~/"*) out=$HOME${out#\~} ;; esac # as train.py reads it
resume=--resume
if [[ " $* " == *" --overwrite "* ]]; then resume=; fi

child=
stop() { # stop SIGNAL CODE: pass the signal on, and end when the script has ended
    if [ -n "$child" ]; then kill -s "$1" "$child" && wait "$child"; fi
    exit "$2"
}
trap 'stop TERM 143' TERM
trap 'stop TERM 130' INT

run() { # run COMMAND ...: as a child that signals reach
    "$@" &
    child=$!
    wait "$child"
}

failed=
histories=()
for row in "${rows[@]}"; do
    read -r name options <<<"$row"
    if [ ${#wanted[@]} = 0 ] || [[ " ${wanted[*]} " == *" $name "* ]]; then
        echo "== $name"
        if run ${LAUNCH:-python} "$here/train.py" $options "$@" --name "$name" $resume; then
            tested=()
            for file in "$out/$name.pt" "$out/$name"-seed*.pt; do
                if [ -e "$file" ]; then tested+=("$file"); fi
            done
            run python "$here/evaluate.py" "${tested[@]}" --once || failed+=" $name"
        else
            failed+=" $name"
        fi
    fi
    for file in "$out/$name.json" "$out/$name"-seed*.json; do
        if [ -e "$file" ]; then histories+=("$file"); fi
    done
done
if [ ${#histories[@]} -gt 0 ]; then
    run python "$here/plot.py" "${histories[@]}" || failed+=" plot"
fi
if [ -n "$failed" ]; then
    echo "$(basename "$0"): error: failed:$failed" >&2
    exit 1
fi
