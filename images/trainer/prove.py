"""Imports everything stages use while the trainer's image is built: a missing module fails the build, and Python writes
the bytecode, which pods could not, because their root file system is read-only.

The packages come first, so that their layers stay the same when the code changes; then the code, which must not import
further packages.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from importlib.util import find_spec
from pathlib import Path

CODE = ("stagecoach_api", "stagecoach_trainer")
PACKAGES = (
    "torch.distributed.run",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "peft",
    "sentencepiece.sentencepiece_model_pb2",
    "google.protobuf.text_format",
    "pydantic.alias_generators",
    "tokenizers",
    "lm_eval",
    "boto3.s3.transfer",
    "openai",
    "safetensors.numpy",
)
"""Modules that the code imports, most of them lazily."""
UNWANTED = ("kopf", "kubernetes", "stagecoach_core", "stagecoach_operator", "stagecoach_cli")


def prove_packages(wanted: str) -> None:
    """Import the packages. `wanted`: the variant of PyTorch, `cuda` or `cpu`."""
    for name in PACKAGES:
        importlib.import_module(name)
    import torch

    got = "cpu" if torch.version.cuda is None else "cuda"
    if got != wanted:
        sys.exit(f"the image must have PyTorch for {wanted}, but has {torch.__version__}")
    prove_deepspeed()


def prove_code() -> None:
    before = compiled()
    for name in CODE:
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, prefix=f"{name}."):
            importlib.import_module(module.name)
    found = [name for name in UNWANTED if find_spec(name) is not None]
    if found:
        sys.exit(f"the trainer's image must not contain {', '.join(found)}")
    new = {path.split("site-packages/")[-1].split(".")[0] for path in compiled() - before if "site-packages/" in path}
    if new:
        sys.exit(f"{', '.join(sorted(new))}: imported by the code but not by PACKAGES; add the modules there")


def compiled() -> set[str]:
    """Return the paths of all bytecode files."""
    return {str(path) for path in Path(os.environ["PYTHONPYCACHEPREFIX"]).rglob("*.pyc")}


def prove_deepspeed() -> None:
    """Check that DeepSpeed's operators are built: pods have no compiler."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # images are built without a GPU
    import deepspeed
    from deepspeed.git_version_info import installed_ops

    if not installed_ops["deepspeed_shm_comm"]:
        sys.exit(f"DeepSpeed {deepspeed.__version__} was installed without its shared-memory operator")
    importlib.import_module("deepspeed.ops.comm.deepspeed_shm_comm_op")
    importlib.import_module("deepspeed.runtime.zero.stage_1_and_2")
    importlib.import_module("deepspeed.runtime.zero.stage3")


if __name__ == "__main__":
    if sys.argv[1] == "packages":
        prove_packages(os.environ["TORCH"])
    else:
        prove_code()
