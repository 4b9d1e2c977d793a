"""Every pipeline of the installed diffusers, tiny and offline: does it take plans, and are the images right?

``python tests/matrix.py`` writes ``reports/pipelines.csv`` and ``.md``; `tests/test_matrix.py` tries some. Pipelines
are built from the signatures of their constructors and calls, by what parts and arguments are called.
"""

import argparse
import contextlib
import functools
import inspect
import logging
import os
import re
import signal
import tempfile
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pandas as pd
import reference
import tiny
import tiny_transformers
import torch
from diffusers import DiffusionPipeline
from doors import full_plan, random_plan, watched
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from lib.apply import Planned
from lib.fit import fit
from lib.grid import blocks
from lib.grid.pipelines import network_of
from lib.grid.plan import FlowSchedule, Plan, PlanError
from lib.methods.fitting import Effort
from lib.study import paths

NAMES = sorted(name for name in dir(diffusers) if name.endswith("Pipeline") and "Onnx" not in name
               and isinstance(getattr(diffusers, name), type)
               and issubclass(getattr(diffusers, name), DiffusionPipeline))
WORDS = {"right": "the full plan gives stock's images (under DDIM, where the schedule is one of betas), cheaper plans "
                  "what the slow reference gives",
         "refused": "by the sentence beside it", "wrong": "images are not what they should be",
         "not built": "no tiny one could be made or called by this file"}


EFFORT = Effort(steps=12, trials=2, population=2, search_images=1, select_images=1, report_images=2, rounds=2)
"""The least with which a fit goes through all that it does."""
LONGEST = 90
"""Seconds for a pipeline: what takes longer is not tiny."""


class NotBuilt(Exception):
    """No tiny pipeline of this class could be made, or called: a limit of this file."""


def too_long(*_):
    raise NotBuilt(f"takes more than {LONGEST} s")


# ---- parts, by what they are called ----------------------------------------------------------------------------------


def image_encoder():
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                              image_size=16, patch_size=8, projection_dim=16)
    return CLIPVisionModelWithProjection(config)


def unet_of(name, annotation):
    """A UNet with the channels that a pipeline of this name feeds it."""
    if annotation == "UNet2DModel":
        return tiny.plain_unet(**({"in_channels": 6, "out_channels": 3} if "SuperResolution" in name else {}))
    if name.startswith("IF"):
        return tiny.text_unet(in_channels=3, out_channels=6)
    if name.startswith("KandinskyV22"):
        control = "Controlnet" in name
        return tiny.text_unet(in_channels=8 if control else 9 if "Inpaint" in name else 4, out_channels=8,
                              addition_embed_type="image_hint" if control else "image", encoder_hid_dim=16,
                              encoder_hid_dim_type="image_proj", cross_attention_dim=16)
    more = {"in_channels": next((channels for words, channels in (
        ("InstructPix2Pix", 8), ("LatentUpscale", 8), ("Upscale", 7), ("Depth2Img", 5), ("PaintByExample", 9),
        ("Marigold", 8)) if words in name), 4)}
    if "XL" in name or "Kolors" in name:
        more |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 4,
                 "projection_class_embeddings_input_dim": 36}
    if name.startswith("StableDiffusionUpscale"):
        more |= {"num_class_embeds": 1000}
    return tiny.text_unet(**more)


def part(name, wanted, annotation, made):
    """A tiny part of a pipeline of this name; None where a pipeline may do without."""
    parts, flow = made["parts"], made["flow"]
    makers = {
        "vae": lambda: tiny.vae(**({"shift_factor": 0.1} if flow else {})), "vqvae": tiny.codes,
        "movq": tiny.codes,
        "unet": lambda: unet_of(name, annotation), "scheduler": lambda: scheduler_of(annotation, flow),
        "tokenizer": lambda: None if embedded(name, flow) else parts["tokenizer"],
        "text_encoder": lambda: None if embedded(name, flow) else parts["text_encoder"],
        "image_encoder": image_encoder,
        "feature_extractor": lambda: CLIPImageProcessor(size=16, crop_size=16),
        "image_processor": lambda: CLIPImageProcessor(size=16, crop_size=16),
        "low_res_scheduler": lambda: diffusers.DDPMScheduler(**tiny.NOISE),
        "transformer": lambda: TRANSFORMERS[annotation](name)}
    optional = ("safety_checker", "tokenizer_2", "tokenizer_3", "text_encoder_2", "text_encoder_3", "watermarker")
    if wanted in optional or (flow and wanted in ("image_encoder", "feature_extractor", "tokenizer", "text_encoder")):
        return None
    if wanted not in makers:
        raise NotBuilt(f"has a part {wanted!r}")
    return makers[wanted]()


def scheduler_of(annotation, flow):
    """DDIM or flow matching, where a pipeline takes any; else the kind that it names."""
    if flow:
        return tiny.flow(shift=3.0)
    kinds = re.findall(r"\w+Scheduler\b", annotation)
    own = getattr(diffusers, kinds[0], None) if len(kinds) == 1 else None
    return own() if own and own.__name__ not in ANY else tiny.ddim()


ANY = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "KarrasDiffusionSchedulers")
"""Schedulers that pipelines name and that others can stand in for."""


def embedded(name, flow):
    """Whether a pipeline is given its prompts as embeddings: those with more than one text encoder, or a large one."""
    return flow or any(word in name for word in ("XL", "Kolors", "PixArt")) or name.startswith("IF")


TRANSFORMERS = {"SD3Transformer2DModel": lambda name: tiny.stable_diffusion_3()[0].transformer,
                "FluxTransformer2DModel": lambda name: tiny.flux_transformer(flux_channels(name)),
                "PixArtTransformer2DModel": lambda name: tiny.pixart()[0].transformer,
                "DiTTransformer2DModel": lambda name: tiny.dit()[0].transformer}


def flux_channels(name):
    return 48 if "Fill" in name else 32 if "Control" in name and "ControlNet" not in name else 16


@functools.cache
def known():
    """The pipelines that the tests have anyway, by their classes' names."""
    return {type(tiny.made(make)[0]).__name__: make for make in (*tiny.ALL, *tiny.FLOWS)}


def build(name):
    """A tiny pipeline of a class, and what it is called with."""
    kind = getattr(diffusers, name)
    if name in known():
        return tiny.made(known()[name])
    wanted = {key: value for key, value in inspect.signature(kind.__init__).parameters.items() if key != "self"}
    annotations = {key: str(value.annotation).split(".")[-1].split(" |")[0].rstrip("'>") if key != "scheduler" else
                   str(value.annotation) for key, value in wanted.items()}
    for key in {"transformer", "unet"} & set(wanted):
        if not buildable(annotations[key]):
            raise unknown(annotations[key])
    if annotations.get("transformer") in tiny_transformers.CONFIGS:
        return tiny.made(lambda: tiny_transformers.pipeline(kind, annotations["transformer"], wanted))
    made = {"parts": tiny.text_parts(), "flow": "FlowMatch" in str(wanted.get("scheduler", ""))}
    chosen = {}
    for key, value in wanted.items():
        if value.default is not inspect.Parameter.empty and key not in ("image_encoder", "feature_extractor"):
            chosen[key] = False if key == "requires_safety_checker" else value.default
        elif key == "controlnet":
            continue
        else:
            chosen[key] = part(name, key, annotations[key], made)
    if "controlnet" in wanted:
        chosen["controlnet"] = control(name, chosen)

    def make():
        return kind(**chosen), call_options(kind, name, made["flow"])

    return tiny.made(make)


def unknown(annotation):
    """What to raise at a network that is not built here: the sentence by which its class is refused, if it is one."""
    kind = getattr(diffusers, annotation, None)
    if kind is not None:
        try:
            blocks.describe(object.__new__(kind))
        except TypeError as error:
            return error
    return NotBuilt(f"has a {annotation}")


def buildable(annotation):
    return (annotation in TRANSFORMERS or annotation in tiny_transformers.CONFIGS
            or annotation in ("UNet2DModel", "UNet2DConditionModel"))


def control(name, chosen):
    if "Flux" in name:
        return diffusers.FluxControlNetModel.from_transformer(chosen["transformer"], num_layers=1, num_single_layers=1,
                                                              attention_head_dim=16, num_attention_heads=2)
    if "StableDiffusion3" in name:
        extra = 1 if "Inpaint" in name else 0
        return diffusers.SD3ControlNetModel.from_transformer(chosen["transformer"], num_layers=2,
                                                             num_extra_conditioning_channels=extra)
    if "Union" in name:
        return diffusers.ControlNetUnionModel.from_unet(chosen["unet"])
    if "unet" not in chosen:
        raise NotBuilt("has a controlnet of a kind that is not built here")
    return diffusers.ControlNetModel.from_unet(chosen["unet"], conditioning_embedding_out_channels=(4, 8))


def call_options(kind, name, flow):
    takes = inspect.signature(kind.__call__).parameters
    draw = torch.Generator().manual_seed(0)
    texts, pooled = torch.randn(2, 1, 5, 16, generator=draw), torch.randn(2, 1, 12, generator=draw)
    mask = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 8, 1).repeat(16, 0))
    given = {"prompt": None if embedded(name, flow) else "a digit", "image": tiny.picture(), "mask_image": mask,
             "height": 16, "width": 16, "control_image": tiny.picture(), "strength": 1.0, "output_type": "np",
             "example_image": tiny.picture(), "_auto_resize": False, "source_prompt": "digit", "max_area": 256,
             "token_indices": [1], "use_resolution_binning": False, "control_mask": mask}
    if embedded(name, flow):
        given |= {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1], "pooled_prompt_embeds": pooled[0],
                  "negative_pooled_prompt_embeds": pooled[1], "prompt_attention_mask": torch.ones(1, 5),
                  "negative_prompt_attention_mask": torch.ones(1, 5)}
        if "PixArt" in name:
            given |= {"prompt_embeds": texts[0, :, :, :12], "negative_prompt_embeds": texts[1, :, :, :12]}
    if name.startswith("KandinskyV22"):
        given |= {"image_embeds": texts[0, :, 0], "negative_image_embeds": texts[1, :, 0],
                  "hint": torch.rand(1, 3, 256, 256, generator=draw), "height": 64, "width": 64}
    options = {key: value for key, value in given.items() if key in takes and value is not None}
    if "Union" in name:
        options |= {"control_image": [tiny.picture()], "control_mode": [0]}
    if "PixArt" in name:
        options["negative_prompt"] = None
    return {key: value for key, value in options.items() if not (flow and "negative" in key and "Flux" in name)}


# ---- the checks ------------------------------------------------------------------------------------------------------


def call(pipe, options):
    """Images, or latents, of a call; some pipelines draw from torch's own generator too."""
    torch.manual_seed(0)
    made = tiny.call(pipe, options)
    return made.numpy() if isinstance(made, torch.Tensor) else made


def refusal(pipe):
    """The sentence by which a pipeline's scheduler is refused, before anything runs."""
    try:
        full_plan(pipe)
    except PlanError as error:
        return str(error)


def own_steps(pipe, options):
    """The full plan that walks as the pipeline does, by its own scheduler's timesteps."""
    full = full_plan(pipe)
    if isinstance(full.schedule, FlowSchedule):
        call(pipe, options)
        full = full.replace(abscissa="timestep").at(list(dict.fromkeys(pipe.scheduler.timesteps.tolist()))[:tiny.STEPS])
        full = full.replace(grid=full.timesteps)
    return full


def check(name):
    """A row of the matrix."""
    row = {"pipeline": name, "network": "", "word": "not built", "said": "", "fit": ""}
    try:
        pipe, options = build(name)
        with contextlib.suppress(TypeError):  # of an unknown network: told below, once it is seen to run
            if sentence := refusal(pipe):
                return row | {"network": type(network_of(pipe)[1]).__name__, "word": "refused", "said": sentence}
        if "beta_start" in pipe.scheduler.config:  # some add noise at every step, or walk some steps twice
            pipe.scheduler = tiny.ddim()
        _, network = network_of(pipe)
        row["network"] = type(network).__name__
        plain = call(pipe, options)
        if not isinstance(plain, np.ndarray):
            raise NotBuilt(f"gives a {type(plain).__name__}")
        if not np.array_equal(call(pipe, options), plain):
            raise NotBuilt("does not repeat itself")
    except Exception as error:
        if isinstance(error, TypeError) and "is not supported. Supported:" in str(error):
            return row | {"network": str(error).split()[0], "word": "refused", "said": str(error)}
        return row | {"said": f"{type(error).__name__}: {error}".splitlines()[0][:150]}
    try:
        return row | compared(pipe, options, plain)
    except PlanError as error:
        return row | {"word": "refused", "said": str(error)}
    except Exception as error:
        return row | {"word": "wrong", "said": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def compared(pipe, options, plain):
    full = own_steps(pipe, options)
    with Planned(pipe, full):
        images = call(pipe, options)
    if not np.allclose(images, plain, atol=2e-4):
        return {"word": "wrong", "said": f"the full plan differs from stock by {np.abs(images - plain).max():.2g}"}
    said = ""
    try:
        with Planned(pipe, full.guided()):
            if not np.allclose(call(pipe, options), plain, atol=2e-4):
                return {"word": "wrong", "said": "the full plan of two passes differs from stock"}
    except PlanError as error:  # most have one pass, or passes that cannot be told apart
        if "null pass's side" in str(error):
            said = f"plans of one pass; of two: {error}"
    described = blocks.describe(tiny.network(pipe))
    for plan in (Plan.deepcache(3, described.branch(0), full), random_plan(full, 0)):
        with reference.Watched(tiny.network(pipe), plan) as watch:
            call(pipe, options)
        with Planned(pipe, plan), watched(tiny.network(pipe)) as outputs:
            call(pipe, options)
        if len(outputs) != len(watch.outputs):
            return {"word": "wrong", "said": f"{len(outputs)} calls instead of {len(watch.outputs)}"}
        for one, other in zip(outputs, watch.outputs):
            if not torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max())):
                return {"word": "wrong", "said": f"a cheaper plan differs by {float((one - other).abs().max()):.2g}"}
    return {"word": "right", "said": said}


def fitted(pipe, options):
    """What a fit of the least effort says: that it runs, or the sentence with which it is refused."""
    if getattr(pipe, "vae", True) is None:
        return "not tried: the tiny one has no decoder"
    prompts = options.get("class_labels", [options["prompt"]] if options.get("prompt") else [])
    options = {name: value for name, value in options.items() if name not in ("prompt", "class_labels", "output_type")}
    with tempfile.TemporaryDirectory() as folder:
        try:
            fit(pipe, "0.7", Path(folder) / "plan.json", prompts=prompts, options=options, effort=EFFORT)
        except (PlanError, ValueError) as error:
            return f"refused: {error}"
        except Exception as error:
            return f"fails: {type(error).__name__}: {error}".splitlines()[0][:200]
    return "runs"


def main():
    os.environ["TQDM_DISABLE"] = "1"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a regular expression of pipelines' names")
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    rows = []
    signal.signal(signal.SIGALRM, too_long)
    for name in NAMES:
        if re.search(chosen.only, name):
            signal.alarm(LONGEST)
            rows.append(check(name))
            signal.alarm(0)
            if rows[-1]["word"] == "right":
                rows[-1]["fit"] = fitted(*build(name))
            print(*rows[-1].values(), sep=" | ", flush=True)
    table = pd.DataFrame(rows)
    print(table["word"].value_counts().to_string())
    if not chosen.only:
        write(table)


def write(table):
    """The matrix as a file for programs and one for people."""
    table.to_csv(paths.REPORTS / "pipelines.csv", index=False)
    right = table[table["word"] == "right"]
    lines = ["# Every pipeline of diffusers", "",
             f"diffusers {diffusers.__version__}, {len(table)} pipelines, each tiny, with random weights, on a CPU. "
             "`python tests/matrix.py` makes this page.", ""]
    lines += [f"* **{word}** ({(table['word'] == word).sum()}): {meaning}" for word, meaning in WORDS.items()]
    runs = (right["fit"] == "runs").sum()
    lines += ["", f"`lib.fit` was tried with the least effort on those that are right: it runs on {runs}.",
              "", f"Networks that take plans: {', '.join(sorted(right['network'].unique()))}.", "",
              "| pipeline | network | | | `lib.fit` |", "|---|---|---|---|---|"]
    rank = {word: number for number, word in enumerate(WORDS)}
    for row in table.sort_values("word", key=lambda words: words.map(rank), kind="stable").itertuples():
        said = row.said.replace("|", "/").replace("\n", " ")
        lines.append(f"| {row.pipeline} | {row.network} | {row.word} | {said} | {row.fit.replace('|', '/')} |")
    (paths.REPORTS / "pipelines.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
