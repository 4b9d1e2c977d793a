"""Tries a study of a published checkpoint without it: ``python tests/rehearse.py sd15``.

A tiny checkpoint of the same class stands in for the hub's, a folder of small pictures for its data, a tiny CLIP model
for CLIP; sizes are those of `smoke`. What says how the study works (notebooks, guidance, solvers, judges) stays. So
nearly all its code runs, in minutes on a CPU (but for Inception, CUDA and bf16), and no number means anything.
"""

import argparse
import csv
import tempfile
from pathlib import Path

import lib  # noqa: F401  # isort: skip  (it mends torchvision before diffusers wants it)
import tiny
import torch
from ruamel.yaml import YAML

from lib.study import params, paths, run
from lib.teachers import data


def coloured():
    """A DDPM of coloured pixels."""
    return tiny.DDPMPipeline(tiny.plain_unet(in_channels=3, out_channels=3), tiny.ddpm()[0].scheduler), {}


STAND_INS = {"ddpm_cifar10": coloured, "dit_xl": tiny.dit, "sd15": tiny.stable_diffusion, "sdxl": tiny.double_text}
"""Of each study a pipeline of its checkpoint's class."""
KEPT = ("only", "guidance", "second_task", "claim_solvers", "claim_guidance", "guidance_scales", "plms_keeps")
"""What is not made small."""


def pictures(folder: Path, side: int) -> None:
    """Write digits in colour, by class, each with a prompt that tiny.text_parts' tokenizer knows."""
    images, labels = data.digits(side)
    pixels = data.to_uint8(images[:400]).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    rows = []
    for number, (image, label) in enumerate(zip(pixels, labels[:400].tolist())):
        name = f"{label}/{number}.png"
        (folder / str(label)).mkdir(exist_ok=True)
        tiny.Image.fromarray(image.numpy()).save(folder / name)
        rows.append({"file_name": name, "text": "a digit" if label % 2 else "digit"})
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["file_name", "text"])
        table.writeheader()
        table.writerows(rows)


def small(study: str, folder: Path) -> dict:
    """Give a study's parameters with stand-ins and the sizes of `smoke`."""
    yaml = YAML(typ="safe", pure=True)
    wanted, sizes = (yaml.load((paths.PARAMS / f"{name}.yaml").read_text()) for name in (study, "smoke"))
    made = {"only": wanted["only"]} | {section: {
        name: value if name in KEPT else sizes[section][name] for name, value in wanted[section].items()}
        for section in wanted if section != "only"}
    made["common"]["data"] = str(folder / "pictures")
    if made["common"]["second_task"].startswith("clip:"):
        made["common"]["second_task"] = f"clip:{folder / 'clip'}"
    elif made["common"]["second_task"].startswith("torch-fidelity:"):
        made["common"]["second_task"] = "denoising"  # Inception's weights are as far away as the checkpoint
    made["teacher_training"]["checkpoint"] = str(folder / "checkpoint")
    if "schedule_search" in made:
        made["schedule_search"]["claim_steps"] = [30] * len(made["schedule_search"]["claim_solvers"])
    return made


def rehearse(study: str, folder: Path) -> None:
    """Run the notebooks of a study on stand-ins; their results lie in data/smoke_<study>."""
    torch.manual_seed(0)
    pipe, _ = STAND_INS[study]()
    pipe.save_pretrained(folder / "checkpoint")
    tiny.clip(folder / "clip")
    (folder / "pictures").mkdir()
    pictures(folder / "pictures", 16 if hasattr(pipe, "vae") else 8)
    made, file = small(study, folder), paths.PARAMS / f"smoke_{study}.yaml"
    made["common"]["resolution"] = 16 if hasattr(pipe, "vae") else 8
    try:
        with file.open("w") as content:
            YAML().dump(made, content)
        for name in params.notebooks(file.stem):
            run.notebook(name, file.stem)
    finally:
        file.unlink()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("study", choices=STAND_INS)
    with tempfile.TemporaryDirectory() as name:
        rehearse(parser.parse_args().study, Path(name))
