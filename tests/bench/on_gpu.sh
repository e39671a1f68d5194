#!/usr/bin/env bash
# Everything that needs a GPU, for a machine that is lent for minutes and reaches nothing.
#
#   tests/bench/on_gpu.sh OUT PACKED smoke         at most 90 s: does it run at all
#   tests/bench/on_gpu.sh OUT PACKED measure       at most 400 s, what is worth most first
#   tests/bench/on_gpu.sh OUT PACKED PART ...      these parts, each within its limit
#
# OUT: where each call makes a folder with summary.md and results.tgz, written anew before and after
# each part: a call that is killed leaves what was finished. PACKED: the folder that carry.py made.
# All else (weights, run folders) goes to WORK, by default a new temporary folder.
#
# smoke:    versions, then side by side `smoke-kernels` (the kernels' tests) and `smoke-job` (20 steps
#           of MiniLM, bf16, ZeRO-2, scores, and the export opened by a fresh process)
# measure:  versions base-32 base-64 kernels pair-1 large-32 base-zero
# parts:    tests kernels sweep search      GPU tests; kernels; other plans of them; span search
#           base-32 base-64 large-32        BERT's shapes beside the recipe, windows a batch
#           base-zero base-layout base-frozen, and large-...
#           pair-1 pair-2 pair-3            the peer (Trainer, bf16) and ours, a seed each: time and F1
#           bf16 losses padded compiled deepspeed     what these choices change must be speed alone:
#                                           F1 of one seed, beside the spread of `bf16` over three
#           frozen kept                     lower half frozen, its outputs kept or not
#           memory                          gradient checkpointing: peak memory, time; ModernBERT packed
#           strict                          train.deterministic on and off, 3 runs each, and a run that
#                                           is stopped and resumed: hashes, and the price in seconds
#
# PYTHON (default python3) needs a CUDA build of torch, transformers and accelerate; the rest is in
# PACKED. BASE and LARGE (default base, large) are training.py's shapes: tiny to rehearse on a CPU.
# A part that fails or is cut short keeps no other from running; the exit code counts those parts.
set -uo pipefail
declare -A LIMIT=( # seconds; 90 where none is said
    [unpack]=30 [versions]=25 [smoke-kernels]=75 [smoke-job]=75 [base-32]=65 [base-64]=55 [kernels]=70
    [pair-1]=90 [large-32]=60 [base-zero]=45 [sweep]=300 [tests]=200
)
ALL="versions smoke-kernels smoke-job tests kernels sweep search base-32 base-64 large-32
base-zero base-layout base-frozen large-zero large-layout large-frozen
pair-1 pair-2 pair-3 bf16 losses padded compiled deepspeed frozen kept memory strict"
[ $# -ge 3 ] || { sed -n '2,/^set/{/^#/p}' "$0" >&2; exit 64; }
# Before the change of folder: what is given may be relative to where the caller stands.
mkdir -p "$1" || exit
top=$(cd "$1" && pwd) && packed=$(cd "$2" && pwd) || exit
PYTHON=${PYTHON:-python3}
# Not the file behind a link: it would leave its environment.
[[ $PYTHON != */* ]] || PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")
shift 2
called="$*" total=3600
case $called in
    smoke) total=85 && set -- versions smoke-kernels smoke-job ;;
    measure) total=395 && set -- versions base-32 base-64 kernels pair-1 large-32 base-zero ;;
esac
for name in "$@"; do
    case " ${ALL//$'\n'/ } " in *" $name "*) ;; *) echo "no part $name; there are: $ALL" >&2; exit 64 ;; esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
# A folder of the call's own: nothing of an earlier one is taken for a result of this.
out=$(mktemp -d "$top/$(date -u +%Y%m%dT%H%M%S)-XXXX") || exit
work=$(mktemp -d "${WORK:-${TMPDIR:-/tmp}}/on-gpu-XXXX") || exit
mkdir "$work/results" && touch "$work/status"
DATA=$packed/data MODEL=$work/model PEER_PYTHON=$PYTHON
export DATA MODEL PYTHON PEER_PYTHON PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRITON_CACHE_DIR=$work/triton
export SPANTUNE_CACHE=$work/cache PYTHONPATH=$work/site:$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}

save() { # summary.md and results.tgz anew, whole or not at all
    (
        flock 9
        {
            echo "# on_gpu.sh $called, $(date -u '+%F %T') UTC, commit $(git rev-parse --short=12 HEAD 2>/dev/null)"
            printf '\n'
            cat "$work/results/versions.txt" 2>/dev/null
            printf '\n| part | seconds | limit | outcome |\n|---|---:|---:|---|\n'
            cat "$work/status"
            printf '\n'
            cat "$work"/results/*.md 2>/dev/null
            while IFS='|' read -r _ name _ _ outcome _; do
                [[ $outcome = *done* ]] && continue
                printf '\n## %s:%s\n\n```\n' "${name// /}" "$outcome"
                tail -n 30 "$work/results/${name// /}.txt" 2>/dev/null
                printf '```\n'
            done <"$work/status"
        } >"$work/summary.md"
        tar -czf "$work/results.tgz" -C "$work" results status
        mv "$work/summary.md" "$work/results.tgz" "$out"
    ) 9>"$work/lock"
}
note() { # part, seconds, limit, outcome: its only row
    (
        flock 9
        grep -v "^| $1 |" "$work/status" >"$work/status.new"
        printf '| %s | %s | %s | %s |\n' "$@" >>"$work/status.new"
        mv "$work/status.new" "$work/status"
    ) 9>"$work/lock"
    save
}
step() { # name, then a command: within its limit and the call's; its output goes to results/NAME.txt
    local name=$1 began=$SECONDS code
    local limit=${LIMIT[$name]:-90} left=$((total - SECONDS))
    shift
    limit=$((limit < left ? limit : left))
    if [ "$limit" -lt 5 ]; then note "$name" 0 "$limit" "no time left"; return 1; fi
    note "$name" - "$limit" running
    timeout -k 5 "$limit" bash -c '"$@"' _ "$@" >"$work/log-$name" 2>&1 # a function of ours, too
    code=$?
    tail -c 1000000 "$work/log-$name" >"$work/results/$name.txt"
    case $code in
        0) note "$name" $((SECONDS - began)) "$limit" 'done' ;;
        124 | 137) note "$name" $((SECONDS - began)) "$limit" "cut short at its limit" ;;
        *) note "$name" $((SECONDS - began)) "$limit" "failed ($code)" ;;
    esac
    echo "== $(tail -n 1 "$work/status")" && tail -n 5 "$work/results/$name.txt"
    return "$code"
}
settings() { # overrides of the comparison's job
    printf '%s\n' --set "model.name=$MODEL" --set "data.train=$DATA/squadshifts_new_wiki_v1.0.json" \
        --set "data.validation=$DATA/xquad_en_v1.1.json" --set model.precision=bf16
    for value in "$@"; do printf '%s\n' --set "$value"; done
}
job() { # name, then overrides; the result goes to results/NAME.json
    local name=$1 run=$work/run-$1 options code
    shift
    mapfile -t options < <(settings "$@")
    step "$name" "$PYTHON" -m runner run tests/bench/new_wiki.toml --ranks 1 --run-dir "$run" "${options[@]}"
    code=$?
    cp "$run/result.json" "$work/results/$name.json" 2>/dev/null
    cp "$run/train.csv" "$work/results/$name.csv" 2>/dev/null
    return $code
}
training() { # name, shape, part, then more options
    local name=$1 shape=$2 kind=$3
    shift 3
    step "$name" "$PYTHON" tests/bench/training.py --shape "$shape" --parts "$kind" \
        --table "$work/results/$name.md" --data "$DATA/squadshifts_new_wiki_v1.0.json" \
        --tokenizer "$MODEL" --windows 1024 --steps "${STEPS:-20}" --warmup "${WARMUP:-5}" \
        --rounds "${ROUNDS:-3}" "$@"
}
pair() { # seed; the driver fills in $NAME, {seed} and {out}, and prints the command as it is written
    # shellcheck disable=SC2016
    step "pair-$1" "$PYTHON" tests/bench/compare_training.py --pairs 1 --first-seed "$1" \
        --table "$work/results/pair-$1.md" --work "$work/pair-$1" \
        --peer '$PEER_PYTHON tests/bench/peer_trainer.py --train $DATA/squadshifts_new_wiki_v1.0.json
                --sample 3000 --seed {seed} --validation $DATA/xquad_en_v1.1.json --model $MODEL
                --bf16 --out {out}' \
        --ours 'env SPANTUNE_CACHE={out}-cache $PYTHON -m runner run tests/bench/new_wiki.toml --ranks 1
                --run-dir {out} --set seed={seed} --set model.name=$MODEL --set model.precision=bf16
                --set data.train=$DATA/squadshifts_new_wiki_v1.0.json
                --set data.validation=$DATA/xquad_en_v1.1.json'
}
# shellcheck disable=SC2329  # `step` calls it
stopped() { # run folder, then overrides: a job stopped by a signal after its first rows, started again
    local run=$1 options
    shift
    mapfile -t options < <(settings "$@")
    local command=("$PYTHON" -m runner run tests/bench/new_wiki.toml --ranks 1 --run-dir "$run" "${options[@]}")
    "${command[@]}" &
    local child=$!
    while kill -0 "$child" 2>/dev/null && [ "$(cat "$run/train.csv" 2>/dev/null | wc -l)" -lt 5 ]; do sleep 0.1; done
    kill -USR2 "$child"
    wait "$child"
    [ $? = 75 ] || { echo "the run was not stopped in time"; return 1; }
    "${command[@]}"
}
# shellcheck disable=SC2329  # `step` calls it
hashes() { # results: what is the same, and what it costs
    "$PYTHON" - "$@" <<'END_OF_PYTHON'
import json, pathlib, sys
print("| run | weights, sha256 | F1 | training, s |\n|---|---|---|---|")
for path in map(pathlib.Path, sys.argv[1:]):
    found = json.loads(path.read_text())
    seconds = found["seconds"]["training"]
    print(f"| {path.stem} | {found['weights_sha256'][:16]} | {found['metrics']['f1']:.2f} | {seconds:.1f} |")
END_OF_PYTHON
}
export -f settings stopped hashes

bottom='model.freeze=["embeddings", "encoder.layer.0-2"]' few='data.sample=320' # 20 steps of 16
base=${BASE:-base} large=${LARGE:-large} data=data.validation=$DATA/xquad_en_v1.1.json
step unpack "$PYTHON" tests/bench/carry.py unpack "$packed" "$work"
for part in "$@"; do
    case $part in
        versions) step versions "$PYTHON" tests/bench/where.py ;;
        smoke-kernels) # beside smoke-job, each on its share of the cores; all are waited for below
            step smoke-kernels "$PYTHON" -m pytest -p no:cacheprovider -n 4 -m gpu tests/kernels & ;;
        smoke-job) job smoke-job "$few" "${data}[:64]" ;;
        tests)
            step tests "$PYTHON" -m pytest -p no:cacheprovider -n 4 -m gpu \
                tests/kernels tests/eval/test_answers.py tests/train/test_gpu_training.py ;;
        kernels) step kernels "$PYTHON" -m span_kernels.bench --rounds 20 ;;
        sweep) step sweep "$PYTHON" -m span_kernels.bench --rounds 20 --sweep ;;
        search) step search "$PYTHON" tests/bench/span_search.py --device cuda ;;
        base-[0-9]*) training "$part" "$base" throughput --batch-size "${part#*-}" ;;
        large-[0-9]*) training "$part" "$large" throughput --batch-size "${part#*-}" ;;
        base-*) training "$part" "$base" "${part#*-}" ;;
        large-*) training "$part" "$large" "${part#*-}" ;;
        pair-*) pair "${part#*-}" ;;
        bf16) for seed in 1 2 3; do job "bf16-$seed" "seed=$seed"; done ;;
        losses) for kind in fused reference; do job "loss-$kind" "model.span_loss=$kind"; done ;;
        padded) job padded model.packing=off ;;
        compiled) job compiled model.compile=on ;;
        deepspeed) job deepspeed zero.optimizer=deepspeed ;;
        frozen) job frozen train.epochs=3 "$bottom" ;;
        memory)
            step memory "$PYTHON" tests/bench/step_memory.py --model "$MODEL" --table "$work/results/memory.md"
            step memory-modernbert "$PYTHON" tests/bench/step_memory.py --family modernbert \
                --lengths 512 4096 --batch-size 8 --table "$work/results/memory-modernbert.md"
            ;;
        kept) job kept train.epochs=3 "$bottom" model.cache_frozen=true ;;
        strict)
            for number in 1 2 3; do # one seed three times: what differs is not the job
                job "strict-$number" train.deterministic=true train.epochs=2
                job "loose-$number" train.epochs=2
            done
            step strict-resumed stopped "$work/run-strict-resumed" train.deterministic=true train.epochs=2 &&
                cp "$work/run-strict-resumed/result.json" "$work/results/strict-resumed.json"
            step hashes hashes "$work"/results/{strict-{1,2,3,resumed},loose-{1,2,3}}.json
            ;;
    esac
done
wait
failed=$(grep -vc '| done |$' "$work/status")
echo "$failed part(s) failed; $out/summary.md"
exit "$failed"
