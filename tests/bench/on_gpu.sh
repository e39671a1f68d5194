#!/usr/bin/env bash
# Everything that needs a GPU, by parts: tests, kernel table, training throughput, the peer beside
# ours on real questions, the same job several ways, and what repeats to the bit.
#
#   tests/bench/on_gpu.sh OUT DATA MODEL [PART ...]
#
# OUT: where each call makes a new folder for what it measures. DATA: the folder with
# squadshifts_new_wiki_v1.0.json and xquad_en_v1.1.json. MODEL: a folder, or package:NAME/SUBFOLDER,
# with MiniLM's weights. PART: some of the names below, without any all of them; each is a few
# minutes and needs no other, so that a machine lent for ten minutes gets through one or two.
#
#   tests kernels search                    GPU tests; kernels; span search
#   base-throughput base-zero base-layout base-frozen, and large-...
#                                           BERT's two shapes, random weights, real lengths
#   pair-1 pair-2 pair-3                    the peer (Trainer, bf16) and ours, a seed each: time and F1
#   bf16 losses padded compiled deepspeed   what these choices change must be speed alone: F1 of one
#                                           seed, beside the spread of `bf16` over three
#   frozen kept                             lower half frozen, its outputs kept or not
#   strict                                  train.deterministic on and off, 3 runs each, and a run that
#                                           is stopped and resumed: hashes, and the price in seconds
#
# Installs nothing. PYTHON (default python3) must have spantune's ".[dev]" with a CUDA build of torch;
# PEER_PYTHON (default PYTHON) needs accelerate besides (".[bench]").
# A part that fails does not keep the next from running; the exit code counts the parts that failed.
set -uo pipefail
ALL="tests kernels search
base-throughput base-zero base-layout base-frozen
large-throughput large-zero large-layout large-frozen
pair-1 pair-2 pair-3 bf16 losses padded compiled deepspeed frozen kept strict"
[ $# -ge 3 ] || { sed -n '2,/^set/{/^#/p}' "$0" >&2; exit 64; }
# Before the change of folder: what is given may be relative to where the caller stands.
mkdir -p "$1" || exit
top=$(cd "$1" && pwd) && DATA=$(cd "$2" && pwd) || exit
MODEL=$3
[ -d "$MODEL" ] && MODEL=$(cd "$MODEL" && pwd)
PYTHON=${PYTHON:-python3} PEER_PYTHON=${PEER_PYTHON:-${PYTHON:-python3}}
for name in PYTHON PEER_PYTHON; do # not the file behind a link: it would leave its environment
    [[ ${!name} != */* ]] || printf -v "$name" %s "$(cd "$(dirname "${!name}")" && pwd)/$(basename "${!name}")"
done
shift 3
parts=("$@")
[ $# -gt 0 ] || read -ra parts <<<"${ALL//$'\n'/ }"
for name in "${parts[@]}"; do
    case " ${ALL//$'\n'/ } " in *" $name "*) ;; *) echo "no part $name; there are: $ALL" >&2; exit 64 ;; esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
# A folder of the call's own: nothing of an earlier one is taken for a result of this.
out=$(mktemp -d "$top/$(date -u +%Y%m%dT%H%M%S)-XXXX") || exit
export DATA MODEL PYTHON PEER_PYTHON
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=0
step() { # name, then a command; its output goes to OUT/name.txt
    local name=$1
    shift
    echo "== $name"
    if ! "$@" >"$out/$name.txt" 2>&1; then
        failed=$((failed + 1))
        echo "   failed:"
        tail -n 15 "$out/$name.txt"
        return 1
    fi
    tail -n 5 "$out/$name.txt"
}
settings() { # overrides of the comparison's job
    printf '%s\n' --set "model.name=$MODEL" --set "data.train=$DATA/squadshifts_new_wiki_v1.0.json" \
        --set "data.validation=$DATA/xquad_en_v1.1.json" --set model.precision=bf16
    for value in "$@"; do printf '%s\n' --set "$value"; done
}
job() { # name, then overrides; the result goes to OUT/name.json
    local name=$1 options
    shift
    mapfile -t options < <(settings "$@")
    step "$name" "$PYTHON" -m runner run tests/bench/new_wiki.toml --ranks 1 --run-dir "$out/run-$name" \
        "${options[@]}" && cp "$out/run-$name/result.json" "$out/$name.json"
}
training() { # shape, part
    step "$1-$2" "$PYTHON" tests/bench/training.py --shape "$1" --parts "$2" --table "$out/tables.md" \
        --data "$DATA/squadshifts_new_wiki_v1.0.json" --tokenizer "$MODEL"
}
pair() { # seed; the driver fills in $NAME, {seed} and {out}, and prints the command as it is written
    # shellcheck disable=SC2016
    step "pair-$1" "$PYTHON" tests/bench/compare_training.py --pairs 1 --first-seed "$1" \
        --table "$out/pair-$1.md" --work "$out/pair-$1" \
        --peer '$PEER_PYTHON tests/bench/peer_trainer.py --train $DATA/squadshifts_new_wiki_v1.0.json
                --sample 3000 --seed {seed} --validation $DATA/xquad_en_v1.1.json --model $MODEL
                --bf16 --out {out}' \
        --ours 'env SPANTUNE_CACHE={out}-cache $PYTHON -m runner run tests/bench/new_wiki.toml --ranks 1
                --run-dir {out} --set seed={seed} --set model.name=$MODEL --set model.precision=bf16
                --set data.train=$DATA/squadshifts_new_wiki_v1.0.json
                --set data.validation=$DATA/xquad_en_v1.1.json'
}
# shellcheck disable=SC2329  # `step` calls it
stopped() { # as job, but stopped by a signal after its first rows, then started again
    local name=$1 run=$out/run-$1 options
    shift
    mapfile -t options < <(settings "$@")
    local command=("$PYTHON" -m runner run tests/bench/new_wiki.toml --ranks 1 --run-dir "$run" "${options[@]}")
    "${command[@]}" &
    local child=$!
    while kill -0 "$child" 2>/dev/null && [ "$(cat "$run/train.csv" 2>/dev/null | wc -l)" -lt 5 ]; do sleep 0.1; done
    kill -USR2 "$child"
    wait "$child"
    [ $? = 75 ] || { echo "the run was not stopped in time"; return 1; }
    "${command[@]}" && cp "$run/result.json" "$out/$name.json"
}
# shellcheck disable=SC2329
hashes() { # results: what is the same, and what it costs
    "$PYTHON" - "$@" <<'END'
import json, pathlib, sys
print("| run | weights, sha256 | F1 | training, s |\n|---|---|---|---|")
for path in map(pathlib.Path, sys.argv[1:]):
    found = json.loads(path.read_text())
    seconds = found["seconds"]["training"]
    print(f"| {path.stem} | {found['weights_sha256'][:16]} | {found['metrics']['f1']:.2f} | {seconds:.1f} |")
END
}

bottom='model.freeze=["embeddings", "encoder.layer.0-2"]'
step versions "$PYTHON" -c 'import torch, triton, transformers, deepspeed
print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, transformers.__version__, deepspeed.__version__)'
for name in "${parts[@]}"; do
    case $name in
        tests) step tests "$PYTHON" -m pytest -m gpu tests ;;
        kernels) step kernels "$PYTHON" -m span_kernels.bench --sweep ;;
        search) step search "$PYTHON" tests/bench/span_search.py --device cuda ;;
        base-* | large-*) training "${name%%-*}" "${name#*-}" ;;
        pair-*) pair "${name#*-}" ;;
        bf16) for seed in 1 2 3; do job "bf16-$seed" "seed=$seed"; done ;;
        losses) for kind in fused reference; do job "loss-$kind" "model.span_loss=$kind"; done ;;
        padded) job padded model.packing=off ;;
        compiled) job compiled model.compile=on ;;
        deepspeed) job deepspeed zero.optimizer=deepspeed ;;
        frozen) job frozen train.epochs=3 "$bottom" ;;
        kept) job kept train.epochs=3 "$bottom" model.cache_frozen=true ;;
        strict)
            for number in 1 2 3; do # one seed three times: what differs is not the job
                job "strict-$number" train.deterministic=true train.epochs=2
                job "loose-$number" train.epochs=2
            done
            step strict-resumed stopped strict-resumed train.deterministic=true train.epochs=2
            step hashes hashes "$out"/{strict-{1,2,3,resumed},loose-{1,2,3}}.json
            ;;
    esac
done
echo "$failed part(s) failed; $out"
exit "$failed"
