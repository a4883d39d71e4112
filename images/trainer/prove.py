"""Imports all that stages use, once, while the trainer's image is built: what fails here fails there, and Python leaves
the bytecode that pods cannot write.

First the packages, whose layers stay while the code changes; then the code, which must bring nothing else along.
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
"""What the code imports, most of it only when it is needed."""
UNWANTED = ("kopf", "kubernetes", "stagecoach_core", "stagecoach_operator", "stagecoach_cli")


def prove_packages(wanted: str) -> None:
    """`wanted`: which PyTorch the image is built with, `cuda` or `cpu`."""
    for name in PACKAGES:
        importlib.import_module(name)
    import torch

    got = "cpu" if torch.version.cuda is None else "cuda"
    if got != wanted:
        sys.exit(f"the image is to have PyTorch for {wanted}, and has {torch.__version__}")
    prove_deepspeed()


def prove_code() -> None:
    before = compiled()
    for name in CODE:
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, prefix=f"{name}."):
            importlib.import_module(module.name)
    found = [name for name in UNWANTED if find_spec(name) is not None]
    if found:
        sys.exit(f"the trainer's image must not hold {', '.join(found)}")
    new = {path.split("site-packages/")[-1].split(".")[0] for path in compiled() - before if "site-packages/" in path}
    if new:
        sys.exit(f"{', '.join(sorted(new))}: only the code imports them; name what it imports in PACKAGES here")


def compiled() -> set[str]:
    """Return all bytecode there is."""
    return {str(path) for path in Path(os.environ["PYTHONPYCACHEPREFIX"]).rglob("*.pyc")}


def prove_deepspeed() -> None:
    """Check that nothing is left to compile in a pod."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # there is no GPU where images are built
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
