#!/usr/bin/env bash
# Everything that needs a GPU, in one call: tests, kernel table, training throughput, real jobs on
# real questions.
#
#   tests/bench/on_gpu.sh OUT DATA MODEL
#
# OUT: a folder for what is measured. DATA: the folder with squadshifts_new_wiki_v1.0.json and
# xquad_en_v1.1.json. MODEL: a folder or package:NAME/SUBFOLDER with MiniLM's weights. Installs nothing;
# PYTHON (default python3) must have torch with CUDA, triton, transformers, datasets, deepspeed, pytest.
# A part that fails does not keep the next from running; the exit code counts the parts that failed.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=$(mkdir -p "$1" && cd "$1" && pwd) data=$(cd "$2" && pwd) model=$3
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=0
part() { # name, then a command; its output goes to OUT/name.txt
    local name=$1
    shift
    echo "== $name"
    "$@" >"$out/$name.txt" 2>&1 || { failed=$((failed + 1)); echo "   failed:"; tail -n 15 "$out/$name.txt"; }
    tail -n 5 "$out/$name.txt"
}
job() { # name, then overrides
    local name=$1
    shift
    part "$name" "$python" -m deepspeed.launcher.runner --num_gpus 1 --log_level error runner/main.py \
        tests/bench/new_wiki.toml --run-dir "$out/run-$name" --set "model.name=$model" \
        --set "data.train=$data/squadshifts_new_wiki_v1.0.json" \
        --set "data.validation=$data/xquad_en_v1.1.json" "$@"
    cp "$out/run-$name/result.json" "$out/$name.json" 2>/dev/null
}

part versions "$python" -c 'import torch, triton, transformers, deepspeed
print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, transformers.__version__, deepspeed.__version__)'
part gpu_tests "$python" -m pytest -m gpu tests
part kernel_bench "$python" -m span_kernels.bench --sweep
part span_search "$python" tests/bench/span_search.py --device cuda
# Throughput with random weights and the real questions' lengths; the tables collect in tables.md.
lengths=(--data "$data/squadshifts_new_wiki_v1.0.json" --tokenizer "$model" --table "$out/tables.md")
part training_base "$python" tests/bench/training.py --shape base "${lengths[@]}"
part training_large "$python" tests/bench/training.py --shape large "${lengths[@]}"
# The same job several ways: what they change must be speed alone.
for seed in 1 2 3; do
    job "bf16-fused-$seed" --set "seed=$seed" --set model.precision=bf16 --set model.span_loss=fused
    job "bf16-reference-$seed" --set "seed=$seed" --set model.precision=bf16 --set model.span_loss=reference
done
job fp32-reference-1 --set model.span_loss=reference
job bf16-padded-1 --set model.precision=bf16 --set model.packing=off
job bf16-compiled-1 --set model.precision=bf16 --set model.compile=on
job bf16-deepspeed-1 --set model.precision=bf16 --set zero.optimizer=deepspeed
bottom='["embeddings", "encoder.layer.0-2"]'
job bf16-frozen-1 --set model.precision=bf16 --set train.epochs=3 --set "model.freeze=$bottom"
job bf16-kept-1 --set model.precision=bf16 --set train.epochs=3 --set "model.freeze=$bottom" \
    --set model.cache_frozen=true
echo "$failed part(s) failed"
exit "$failed"
