"""Saves a small engine and loads it into another one, for every ZeRO stage, precision and number of
micro-batches that one rank has; prints what came back as JSON. Argument: a folder."""

import json
import os
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(CHECKOUT), str(CHECKOUT / "kernels")]
os.environ |= {"DS_ACCELERATOR": "cpu", "DEEPSPEED_LOG_LEVEL": "error"}

import torch

from runner.checkpoint.deepspeed_io import StoreCheckpointEngine
from runner.checkpoint.store import CheckpointStore
from runner.distributed.engine import deepspeed_config, start_engine
from runner.distributed.process_group import start_distributed
from runner.errors import DataError
from runner.job.schema import Train, Zero, batch_layout
from runner.utils.ranks import Rank

NAME = "step-000005-a0001"
PATTERNS = ("lr[3e-5]", "what?", "**", "[!a]{b}")
KINDS = (".pt", ".json")  # of a checkpoint's files
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(seed: int, stage: int, precision: str, several: int, device: torch.device):
    """An engine over a model with frozen and trained parameters and a buffer."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 32),
        torch.nn.LayerNorm(32),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(32, 8),
    )
    model.register_buffer("counts", torch.arange(3) * seed)
    model[0].weight.requires_grad_(False)
    train = Train(
        epochs=1, batch_size=8, micro_batch_size=8 // several, learning_rate=1e-2, warmup=0.1
    )
    config = deepspeed_config(Zero(stage=stage), train, batch_layout(train, 1), precision, 600)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return start_engine(model, device, groups, train, config, 100)


def steps(engine, count: int, several: int, precision: str) -> None:
    for _ in range(count * several):
        inputs = torch.randn(8 // several, 16).to(DTYPES[precision])
        engine.backward(engine(inputs).float().square().mean())
        engine.step()


def weights(engine) -> dict[str, torch.Tensor]:
    import deepspeed

    found = {name: b.clone() for name, b in engine.module.named_buffers()}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    return found


def same(one, other) -> bool:
    theirs = weights(other)
    return all(torch.equal(tensor, theirs[name]) for name, tensor in weights(one).items())


def cell(folder: Path, stage: int, precision: str, several: int, device) -> dict[str, object]:
    engine = build(1, stage, precision, several, device)
    steps(engine, 5, several, precision)
    store = CheckpointStore(folder, 0)
    shards = StoreCheckpointEngine(store)
    engine.checkpoint_engine = shards
    store.begin(NAME)
    stage_folder = store.stage(NAME)
    shards.prepare()
    shards.write(engine, stage_folder)
    store.check_staged(stage_folder)
    store.commit(NAME, stage_folder.entries, {})

    other = build(2, stage, precision, several, device)  # other weights, frozen ones too
    before = same(engine, other)
    reader = StoreCheckpointEngine(store)
    other.checkpoint_engine = reader
    reader.read(other, store.manifest(NAME))
    loaded = same(engine, other)
    state = torch.get_rng_state()
    steps(engine, 3, several, precision)
    torch.set_rng_state(state)
    steps(other, 3, several, precision)
    found = {
        "before": before,
        "loaded": loaded,
        "after": same(engine, other),
        "rates": engine.get_lr() == other.get_lr(),
        "steps": other.global_steps,
        "files": sorted(stage_folder.entries),
        "strange": [p.name for p in (folder / NAME).iterdir() if p.suffix not in KINDS],
    }
    # DeepSpeed that loads another state than it saved is found out.
    parameter = next(p for p in other.module.parameters() if p.requires_grad)
    load = other.load_checkpoint

    def forgetful(*arguments, **options):
        answer = load(*arguments, **options)
        share = getattr(parameter, "ds_tensor", parameter)
        with torch.no_grad():
            share.add_(1.0)
        for group in other.optimizer.param_groups:
            group["betas"] = (0.5, 0.5)
        return answer

    other.load_checkpoint = forgetful
    try:
        reader.read(other, store.manifest(NAME))
        found["caught"] = ""
    except DataError as error:
        found["caught"] = str(error)
    return found


def main() -> None:
    device = start_distributed(Rank(0, 1, 0, 1), 1)
    found = {}
    for stage in (0, 1, 2, 3):
        for precision in ("fp32", "bf16"):
            for several in (1, 2):
                key = f"{stage}-{precision}-{several}"
                # A name that means another one, or several, where it is taken for a pattern.
                folder = Path(sys.argv[1]) / f"{PATTERNS[stage]} {key}"
                folder.mkdir()
                found[key] = cell(folder, stage, precision, several, device)
    os.write(1, f"{json.dumps(found)}\n".encode())  # one write: ranks share a file
    os._exit(0)


main()
