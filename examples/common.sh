# shellcheck shell=bash
# Sourced by each example's run.sh, after `set -euo pipefail`: its arguments, its folder, and the parts of a stage.
# run.sh may define `option FLAG VALUE` for flags of its own; it returns 1 for one that it does not know.

here=$(cd "$(dirname "$0")" && pwd)
checkout=$(cd "$here/../.." && pwd)
python=${PYTHON:-$checkout/.venv/bin/python}

# arguments DEFAULT_FOLDER ARGUMENT…: sets `out` and `fresh`; --help prints the comment at the top of run.sh.
arguments() {
    out=$1 fresh=
    shift
    while [ $# -gt 0 ]; do
        case $1 in
            --out) out=${2:?--out needs a folder}; shift 2 ;;
            --fresh) fresh=yes; shift ;;
            -h | --help) sed -n '2,${/^#/!q;s/^# \{0,1\}//p}' "$0"; exit 0 ;;
            *)
                if ! declare -F option >/dev/null || ! option "$1" "${2-}"; then
                    echo "run.sh: unknown argument $1; --help lists what there is" >&2
                    exit 2
                fi
                shift 2
                ;;
        esac
    done
    if ! command -v "$python" >/dev/null; then
        echo "run.sh: there is no $python: bash tests/run.sh or bash launch/quickstart.sh makes it, or set PYTHON" >&2
        exit 1
    fi
    case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
    export OMP_NUM_THREADS=1 PYTHONPATH="$checkout:$checkout/examples${PYTHONPATH:+:$PYTHONPATH}"
}

# enter_folder SIZES [FILE…]: into `out`, which must be new or hold what this version of the example began with these
# sizes. FILE: what the results in it depend on; by default every program of the example.
enter_folder() {
    local version files=("${@:2}")
    if [ ${#files[@]} -eq 0 ]; then files=("$here"/run.sh "$here"/../common.sh "$here"/*.py "$here"/../*.py); fi
    version="$(cat "${files[@]}" | cksum) $1"
    if [ -d "$out" ] && [ ! -e "$out/version" ] && [ -n "$(ls -A "$out")" ]; then
        echo "run.sh: $out holds something else; choose another folder with --out" >&2
        exit 1
    fi
    if [ -n "$fresh" ]; then rm -rf "$out"; fi
    if [ -e "$out/version" ] && [ "$version" != "$(cat "$out/version")" ]; then
        echo "run.sh: $out was begun by another version or size of this example: --fresh starts over," \
            "--out FOLDER keeps both" >&2
        exit 1
    fi
    mkdir -p "$out"
    out=$(cd "$out" && pwd)
    echo "$version" >"$out/version"
    cd "$out" || exit
}

# After what torchrun says when it is stopped.
trap 'echo "run.sh: stopped by Ctrl-C; the same command goes on from here" >&2; exit 130' INT

started=$SECONDS
say() { printf '[%3d s] %s\n' $((SECONDS - started)) "$*"; }

# logged LOG FILTER COMMAND…: all output goes to LOG; the terminal gets the lines that the sed script FILTER prints, or
# a training's progress where FILTER is `progress`.
logged() {
    local log=$1 filter=$2
    shift 2
    if ! "$@" 2>&1 | tee "$log" | shown "$filter"; then
        # Without what torchrun says at the end about processes that were stopped: the reason stands before it.
        sed '/torch.distributed.elastic/,$d' "$log" | tail -n 15 >&2
        echo "run.sh: this stage failed; all its output is in $PWD/$log. Start again to go on from here." >&2
        exit 1
    fi
}

shown() {
    if [ "$1" = progress ]; then "$python" "$checkout/examples/progress.py"; else sed -unE "$1"; fi
}

# both PID PID: wait for two stages that run side by side, and fail if one of them did.
both() {
    local failed=
    wait "$1" || failed=yes
    wait "$2" || failed=yes
    if [ -n "$failed" ]; then exit 1; fi
}

idft() { "$python" -m megatron_idft "$@"; }

# launch PROCESSES ARGUMENT…: under torchrun.
launch() { "$python" -m torch.distributed.run --standalone --nproc-per-node "$1" "${@:2}"; }

# train PROCESSES NAME FLAG…: Megatron's trainer into the folder NAME. A checkpoint there is continued.
train() {
    local processes=$1 name=$2
    shift 2
    if [ -e "$name/done" ]; then return; fi
    logged "$name.log" progress launch "$processes" -m megatron_idft train --cpu --save "$name" --load "$name" \
        --save-interval 100 --lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.01 "$@"
    touch "$name/done"
}
