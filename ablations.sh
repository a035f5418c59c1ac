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

refuse() { # refuse CODE WHY ...
    echo "$(basename "$0"): error: ${*:2}" >&2
    exit "$1"
}

wanted=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    if [[ " ${rows[*]%% *} " != *" $1 "* ]]; then
        refuse 2 "there is no row '$1', only" "${rows[@]%% *}"
    fi
    wanted+=("$1")
    shift
done
shift $(($# > 0)) # the --
out=runs previous= device=
for word in "$@"; do
    case $previous in
        --out) out=$word ;;
        --device) device="--device $word" ;; # of the test, too
    esac
    case $word in
        --out=*) out=${word#--out=} ;;
        --device=*) device=$word ;;
        --name | --name=*) refuse 2 "$word: rows have names of their own; --out takes another folder" ;;
    esac
    previous=$word
done
case $out in "~" | "~/"*) out=$HOME${out#\~} ;; esac # as train.py reads it
resume=--resume
if [[ " $* " == *" --overwrite "* ]]; then resume=; fi

python= # one for all scripts: LAUNCH's, else the first that there is
for word in ${LAUNCH:-}; do
    case ${word##*/} in python | python[0-9]*) python=${python:-$word} ;; esac
done
python=${python:-$(command -v python || command -v python3 || echo python)}
launch=(${LAUNCH:-})
if [ ${#launch[@]} = 0 ]; then launch=("$python"); fi # its path may have spaces
for program in "$python" "${launch[0]}"; do
    command -v "$program" >/dev/null || refuse 1 "there is no program '$program' (LAUNCH=${LAUNCH:-})"
done

run() { # run COMMAND ...: in the background, or a signal would have to wait for its end
    "$@" &
    wait $!
}
stop() { # stop CODE: end the script that runs, then this one
    kill $(jobs -p) 2>/dev/null && wait
    exit "$1"
}
trap 'stop 143' TERM
trap 'stop 130' INT

shopt -s nullglob # a pattern without a match is nothing; [.] makes a pattern of a name
failed=
histories=()
for row in "${rows[@]}"; do
    read -r name options <<<"$row"
    if [ ${#wanted[@]} = 0 ] || [[ " ${wanted[*]} " == *" $name "* ]]; then
        echo "== $name"
        run "${launch[@]}" "$here/train.py" $options "$@" --name "$name" $resume &&
            run "$python" "$here/evaluate.py" "$out/$name"[.]pt "$out/$name"-seed*.pt --once $device ||
            failed+=" $name"
    fi
    histories+=("$out/$name"[.]json "$out/$name"-seed*.json)
done
if [ ${#histories[@]} -gt 0 ]; then
    run "$python" "$here/plot.py" "${histories[@]}" || failed+=" plot"
fi
if [ -n "$failed" ]; then
    refuse 1 "failed:$failed"
fi
