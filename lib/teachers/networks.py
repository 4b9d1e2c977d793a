"""Teachers: a DDPM UNet trained here, or any diffusers pipeline; saved and loaded as diffusers does."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    ModelMixin,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.normalization import AdaLayerNormZero
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

from lib.grid import sampling
from lib.grid.blocks import example_conditions, input_shape
from lib.grid.model import Conditions, Model
from lib.grid.plan import NoiseSchedule
from lib.teachers import files
from lib.teachers.data import DataSet
from lib.teachers.files import HUB
from lib.teachers.latents import Coder, PatchAutoencoder
from lib.teachers.text import Text, TwoTexts, encoder, tokenizer
from lib.teachers.training import own_share, train

UNSAID = 0.1
"""The share of prompts or labels that a network does not see in training."""
HEADS, TEXT_LAYERS = 4, 2
"""Heads of attention to a prompt, and layers of a text encoder."""


def noise_schedule(betas: str = "linear") -> DDIMScheduler:
    """Give the noise schedule of teachers here: epsilon prediction, no clipping.

    Betas are "linear" (DDPM's), or "scaled_linear" for latents (Stable Diffusion's).

    Only so are a dropped step and a reused epsilon the same under DDIM (design: one grid), and only so can one ask
    whether a pruned pattern is more than a schedule.
    """
    start, end = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}[betas]
    return DDIMScheduler(num_train_timesteps=1000, beta_start=start, beta_end=end, beta_schedule=betas,
                         prediction_type="epsilon", clip_sample=False, set_alpha_to_one=True,
                         timestep_spacing="trailing")


def unet(shape: tuple[int, int, int], widths: list[int], layers: int, norm_groups: int, text_width: int = 0
         ) -> UNet2DModel | UNet2DConditionModel:
    """Build a DDPM UNet with one level a width and attention in the middle.

    Parameters
    ----------
    shape : (C, H, W) of an image or of latents; H = W
    widths : channels of each level, from full resolution down
    layers : residual blocks a level
    norm_groups : groups of each GroupNorm; divides every width
    text_width : of what it reads of each word of a prompt, by attention in all levels but the first; 0 for no prompts
    """
    channels, height, _ = shape
    about = {"sample_size": height, "in_channels": channels, "out_channels": channels, "layers_per_block": layers,
             "block_out_channels": tuple(widths), "norm_num_groups": norm_groups}
    deeper = len(widths) - 1
    if text_width:
        return UNet2DConditionModel(**about, cross_attention_dim=text_width, attention_head_dim=HEADS,
                                    down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * deeper),
                                    up_block_types=(*("CrossAttnUpBlock2D",) * deeper, "UpBlock2D"))
    return UNet2DModel(**about, down_block_types=("DownBlock2D",) * len(widths),
                       up_block_types=("UpBlock2D",) * len(widths))


def transformer(shape: tuple[int, int, int], width: int, layers: int, heads: int, patch: int, classes: int
                ) -> DiTTransformer2DModel:
    """Build a class-conditional DiT (Peebles and Xie 2023); label number `classes` stands for none.

    Parameters
    ----------
    shape : (C, H, W) of an image; H = W, a multiple of `patch`
    width : channels of a token; a multiple of `heads`
    layers : transformer blocks
    """
    channels, height, _ = shape
    model = DiTTransformer2DModel(num_attention_heads=heads, attention_head_dim=width // heads, in_channels=channels,
                                  out_channels=channels, num_layers=layers, sample_size=height, patch_size=patch,
                                  num_embeds_ada_norm=classes)
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0  # each block would drop labels by itself; `denoising_loss` drops an image's for all
        if isinstance(module, AdaLayerNormZero):  # the paper's initialisation, which diffusers leaves out:
            nn.init.zeros_(module.linear.weight)  # each block begins as the identity
            nn.init.zeros_(module.linear.bias)
    for last in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return model


@dataclass(frozen=True)
class Samples:
    """What a network trains on.

    Attributes
    ----------
    x_0 : Tensor, (n, C, H, W), images in [-1, 1] or latents
    conditions : Conditions of each, with `null`; empty where the network reads nothing
    """

    x_0: Tensor
    conditions: Conditions = field(default_factory=Conditions)

    @classmethod
    @torch.no_grad()
    def of(cls, model: Model, data: DataSet, rows: Tensor) -> Self:
        """Give some images of a data set as a model's network trains on them: encoded, with their prompts or labels."""
        conditions = Conditions()
        if model.text is not None and data.prompts:
            said = [data.prompts[row] for row in rows.tolist()]
            conditions = Conditions(model.text(said), model.text([""] * len(said)))
        elif model.classes:
            labels = data.labels[rows]
            conditions = Conditions({"class_labels": labels}, {"class_labels": torch.full_like(labels, model.classes)})
        return cls(model.encode(data.images[rows]).cpu(), conditions)

    def noisy(self, schedule: DDIMScheduler, size: int, generator: torch.Generator, device: torch.device
              ) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        r"""Draw some and noise them: x_t = sqrt(\bar\alpha_t) x_0 + sqrt(1 - \bar\alpha_t) \epsilon.

        Timesteps come in antithetic pairs t, T-1-t, which lowers the variance. Of one in ten the condition goes unsaid,
        so that the network can be guided (Ho and Salimans 2022).

        Returns
        -------
        x_t, t, noise, given : Tensor, (size, C, H, W), (size,) and (size, C, H, W), and what else the network reads, on
            the device; where several processes train together, this one's share of them
        """
        last = schedule.config.num_train_timesteps - 1
        rows = torch.randint(len(self.x_0), (size,), generator=generator)
        half = torch.randint(last + 1, ((size + 1) // 2,), generator=generator)
        t = torch.cat([half, last - half])[:size].to(device)
        noise = torch.randn(size, *self.x_0.shape[1:], generator=generator).to(device)
        given = {}
        if self.conditions.given:
            unsaid = own_share(torch.rand(size, generator=generator) < UNSAID)
            own = self.conditions.rows(own_share(rows))
            given = tree_map(lambda said, null: torch.where(unsaid.view(-1, *(1,) * (said.ndim - 1)), null, said)
                             .to(device), own.given, own.null)
        rows, t, noise = own_share(rows), own_share(t), own_share(noise)
        return schedule.add_noise(self.x_0[rows].to(device), noise, t), t, noise, given


def denoising_loss(samples: Samples, schedule: DDIMScheduler, batch_size: int):
    """Give the loss of DDPM training (Ho et al. 2020, eq. 14): the mean squared error of the predicted noise.

    Parameters
    ----------
    batch_size : int, of `Samples.noisy`

    Returns
    -------
    loss : callable(network, generator, way) -> scalar Tensor, as `lib.teachers.training.train` wants it
    """

    def loss(network: nn.Module, generator: torch.Generator, _: float) -> Tensor:
        x_t, t, noise, given = samples.noisy(schedule, batch_size, generator, next(network.parameters()).device)
        return F.mse_loss(network(x_t, t, **given).sample.float(), noise)

    return loss


def untrained(data: DataSet, *, widths: list[int], layers: int, norm_groups: int, latent_channels: int,
              text_width: int, seed: int, device: str) -> Model:
    """Build a teacher for a data set, with fresh weights.

    Parameters
    ----------
    widths, layers, norm_groups : of `unet`
    latent_channels : of an autoencoder's latents; 0 for a network that draws the images themselves
    text_width : of what the network reads of each word of the data's prompts; 0 for one that reads none

    Raises
    ------
    ValueError
        If it is to read prompts and the data have none.
    """
    torch.manual_seed(seed)
    coder, text, shape = None, None, data.shape
    if latent_channels:
        vae = PatchAutoencoder(data.shape[0], latent_channels)
        coder, shape = Coder(vae.to(device)), (latent_channels, *(side // vae.patch for side in data.shape[1:]))
    if text_width:
        if not data.prompts:
            raise ValueError(f"text_width: {data.name} has no prompts; set it to 0, or take data with prompts")
        words = tokenizer(data.words, max(len(prompt.split()) for prompt in data.prompts))
        text = Text(encoder(words, text_width, TEXT_LAYERS).to(device), words)
    network = unet(shape, widths, layers, norm_groups, text_width).to(device)
    return Model(network, noise_schedule("scaled_linear" if latent_channels else "linear"), coder, text, data.prompts)


class Taught(nn.Module):
    """A network and the text encoder that learns with it."""

    def __init__(self, network: UNet2DConditionModel, text: Text):
        super().__init__()
        self.network, self.text = network, text

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Any:
        """Predict, of images that prompts of these tokens, (n, L), ask for."""
        return self.network(x_t, t, encoder_hidden_states=self.text.read(tokens))


def fit(model: Model, data: DataSet, *, training_steps: int, batch_size: int, learning_rate: float, ema_decay: float,
        save_every: int, seed: int, device: str, precision: str, work: Path) -> list[dict]:
    """Train a teacher's network, and its text encoder, on the training part of a data set, in place.

    Its autoencoder is trained before (`lib.teachers.latents.fit`).

    Parameters
    ----------
    training_steps : int, and the others as `lib.teachers.training.train` takes them
    work : Path, of the training state

    Returns
    -------
    history : what `lib.teachers.training.train` gives
    """
    pupil, samples = model.network, Samples.of(model.replace(text=None), data, data.train)
    if model.text is not None:
        tokens = model.text.tokens([data.prompts[row] for row in data.train.tolist()])
        unsaid = model.text.tokens([""]).expand_as(tokens)
        pupil, samples = Taught(model.network, model.text), Samples(samples.x_0, Conditions({"tokens": tokens},
                                                                                            {"tokens": unsaid}))
    history = train(pupil, denoising_loss(samples, model.schedule, batch_size), steps=training_steps, lr=learning_rate,
                    ema_decay=ema_decay, seed=seed, device=device, precision=precision, work=work,
                    save_every=save_every, compiled=True, title="teacher")
    pupil.eval().requires_grad_(False)
    return history


@torch.no_grad()
def check_draws(model: Model, shape: tuple[int, int, int]) -> None:
    """Refuse a model that draws other images than the data's, (C, H, W).

    Raises
    ------
    ValueError
        Saying which resolution or data it needs.
    """
    drawn = tuple(model.decode(torch.zeros(1, *model.shape)).shape[1:])
    if drawn != shape:
        raise ValueError(f"the checkpoint draws images of {drawn}, the data's are {shape} (channels, height, width): "
                         f"set resolution to {drawn[1]}, or take data with {drawn[0]} channels")


def save(folder: Path, model: Model, dtype: torch.dtype = torch.float32) -> None:
    """Save a model as a diffusers pipeline (safetensors, JSON): one that reads prompts as Stable Diffusion or SDXL.

    Parameters
    ----------
    dtype : of the weights in the files; a narrower one than float32 rounds them. A text encoder's stay as they are:
        stock pipelines load it in the type in which it was stored
    """
    parts = {"unet" if hasattr(model.network, "down_blocks") else "transformer": model.network,
             "scheduler": model.schedule}
    kind, more = "DDIMPipeline" if isinstance(model.network, UNet2DModel) else "DiffusionPipeline", {}
    if model.latents is not None:
        parts["vae"], kind = model.latents.vae, "DiffusionPipeline"
    if model.text is not None:
        parts |= model.text.parts
        two = isinstance(model.text, TwoTexts)
        kind = "StableDiffusionXLPipeline" if two else "StableDiffusionPipeline"
        more = {"force_zeros_for_empty_prompt": model.text.zeros} if two else {
            "requires_safety_checker": False, "safety_checker": [None, None]}
        more |= {absent: [None, None] for absent in ("feature_extractor", "image_encoder")}
    for name, part in parts.items():
        if isinstance(part, ModelMixin):
            part = copy.deepcopy(part).to(dtype)
            part.register_to_config(_name_or_path="")  # files say nothing of where it was loaded from
        part.save_pretrained(folder / name)
    kinds = {name: [_library(type(part)), type(part).__name__] for name, part in parts.items()}
    index = {"_class_name": kind, "_diffusers_version": version("diffusers"), **kinds, **more}
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))


def _library(kind: type) -> str:
    """Give the name under which a pipeline's index finds a class: a library of its own, a module of ours."""
    library = kind.__module__.partition(".")[0]
    return kind.__module__ if library == "lib" else library


def pipeline(source: str, device: str = "cpu", precision: str = "fp32") -> DiffusionPipeline:
    """Load a diffusers pipeline as it is: safetensors and JSON only, no code from elsewhere.

    Parameters
    ----------
    source : folder, "hub:OWNER/NAME" or "hub:OWNER/NAME@REVISION"
    precision : of `lib.grid.sampling.PRECISIONS`, of the weights

    Raises
    ------
    FileNotFoundError
        If the folder holds none.
    """
    where, _ = _index(source)
    return DiffusionPipeline.from_pretrained(**where, use_safetensors=True, trust_remote_code=False,
                                             dtype=sampling.PRECISIONS[precision]).to(device)


def load(source: Path | str, device: str = "cpu", prompts: Sequence[str] = (), guidance: float = 1.0) -> Model:
    """Load a pipeline's network, noise schedule, autoencoder and text encoder, ready for sampling.

    Parameters
    ----------
    source : Path or str
        A folder that `save` or any diffusers pipeline wrote (a teacher's or a student's), or "hub:OWNER/NAME", or
        "hub:OWNER/NAME@REVISION".
    prompts : those of which each image gets one
    guidance : scale of classifier-free guidance; 1 is none

    Raises
    ------
    FileNotFoundError
        If the folder holds no diffusers pipeline.
    ValueError
        If the pipeline has neither a UNet nor a transformer, or one of a library that is not trusted here; if its
        scheduler walks in a way that no plan knows; if it is to be guided and reads nothing.
    """
    name, parts = _index(source)
    part = next((part for part in ("unet", "transformer") if part in parts), None)
    if part is None:
        raise ValueError(f"{source} is a {parts.get('_class_name')} without unet and transformer: no plan fits it.")
    network = _part(source, part, device)
    saved = _class(source, parts, "scheduler", SchedulerMixin).from_pretrained(**name, subfolder="scheduler")
    NoiseSchedule.check_kind(saved)
    schedule = saved
    if "beta_start" in saved.config and not isinstance(saved, DDIMScheduler):  # some add noise in units of their own
        unsaid = {option: saved.config.get(option, False) for option in ("clip_sample", "thresholding")}
        schedule = DDIMScheduler.from_config(saved.config, **unsaid)
    if network.device.type == "cuda":
        network.to(memory_format=torch.channels_last)
    coder = next((part for part in ("vae", "vqvae") if part in parts), None)
    coder = coder and Coder(_part(source, coder, device))
    text, reads = None, example_conditions(network, 0, "cpu")
    if set(reads) == {"encoder_hidden_states"} and "CLIPTextModel" in parts.get("text_encoder", ()):
        text = _text(source, device)
    elif (set(reads.get("added_cond_kwargs", ())) == {"text_embeds", "time_ids"}
          and "CLIPTextModel" in parts.get("text_encoder", ()) and "text_encoder_2" in parts):
        side = input_shape(network)[-1] * 2 ** (len(coder.vae.config.block_out_channels) - 1)
        text = TwoTexts(_text(source, device), _text(source, device, "_2"), side,
                        bool(parts.get("force_zeros_for_empty_prompt")))
    return Model(network, schedule, coder, text, tuple(prompts), guidance)


def _text(source: Path | str, device: str, which: str = "") -> Text:
    """Load a text encoder of a pipeline, frozen, in float32, with its tokenizer."""
    where, _ = _index(source)
    kind = CLIPTextModelWithProjection if which else CLIPTextModel
    reader = kind.from_pretrained(**where, subfolder=f"text_encoder{which}", use_safetensors=True).float()
    words = AutoTokenizer.from_pretrained(**where, subfolder=f"tokenizer{which}", trust_remote_code=False)
    return Text(reader.eval().requires_grad_(False).to(device), words)


def _part(source: Path | str, part: str, device: str) -> ModelMixin:
    """Load a part of a pipeline, frozen, in float32."""
    where, parts = _index(source)
    made = _class(source, parts, part, ModelMixin).from_pretrained(**where, subfolder=part, use_safetensors=True)
    return made.float().eval().requires_grad_(False).to(device)


def _index(source: Path | str) -> tuple[dict, dict]:
    """Give where a pipeline lies, as `from_pretrained` takes it, and its index: the classes of its parts."""
    if not str(source).startswith(HUB) and not (Path(source) / "model_index.json").exists():
        raise FileNotFoundError(f"no teacher in {source}. Notebook 00_teacher_training makes it; a pipeline of the "
                                f"Hugging Face hub is written {HUB}OWNER/NAME.")
    where = files.where(str(source))
    return where, DiffusionPipeline.load_config(**where)


def _class(source: Path | str, parts: dict, part: str, base: type) -> type:
    """Give the class that a pipeline's index names for a part, if it is one to be trusted."""
    library, kind = parts.get(part) or (None, None)
    known = library in ("diffusers", "lib.methods.diffnas.students", "lib.teachers.latents")
    found = getattr(import_module(library), str(kind), None) if known else None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{source}: its {part} is a {kind} of {library}; only models and schedulers of diffusers, and "
                         "students and autoencoders of ours, are loaded here.")
    return found
