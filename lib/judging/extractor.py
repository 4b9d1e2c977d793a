"""The feature extractors behind every score: two small networks trained on the study's own data, for different tasks.

Inception's weights cannot be assumed to be at hand, and Inception has never seen digits of 16 x 16 pixels. So a small
classifier gives the features, and a second network, which learned without any label to take noise out of images, says
whether the first is to be believed. Each is registered with torch-fidelity under a name that holds a hash of its
weights; that name stands beside every number, and only Inception's distance is ever called FID. Where weights can be
had, any of torch-fidelity's own extractors, or a CLIP model, may be the second judge.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor
from transformers import AutoTokenizer, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from lib.teachers.data import DataSet, to_uint8
from lib.teachers.files import where
from lib.teachers.training import own_share, train

LAYER = "embedding"
WIDTH = 64  # features
LARGE = 32
"""Pixels a side from which on an extractor is larger, looks at patches of 2 x 2 pixels, and normalises: without norms
it learns the letters' styles far too slowly."""

TASKS = {"classes": "classifier", "rotation": "turns", "denoising": "denoiser"}
"""What an extractor may learn, and how the names of such extractors begin."""
FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""The variable by which torch is told to load nothing but weights."""
PIXELS = 2**24
"""Numbers of pixels, of all channels, that an extractor looks at in one batch, of 1,000 images at most."""
FIDELITY, CLIP = "torch-fidelity:", "clip:"
"""So begin second judges that are not trained here: one of torch-fidelity's own extractors, such as
torch-fidelity:dinov2-vit-s-14, or a CLIP model, such as clip:hub:openai/clip-vit-base-patch16."""


class Extractor(nn.Module):
    """Some convolutions, an embedding of 64 features, one linear layer on top for the task.

    The features are scaled by one number so that their mean variance over the training images is 1: then distances mean
    about the same from one extractor to the next.

    Parameters
    ----------
    task : of `TASKS`
    channels, resolution : of images
    outputs : list of int, (H,): of each thing to tell, such as a letter's style, how many there are; (1,) for pixels
    """

    def __init__(self, task: str, channels: int, resolution: int, outputs: list[int]):
        super().__init__()
        self.made_of = {"task": task, "channels": channels, "resolution": resolution, "outputs": outputs}
        if resolution >= LARGE:
            layers, given = [nn.PixelUnshuffle(2)], 4 * channels
            for made, stride in ((64, 1), (64, 1), (96, 2), (96, 2)):
                layers += [nn.Conv2d(given, made, 3, stride, 1), nn.GroupNorm(8, made), nn.ReLU()]
                given = made
            self.body = nn.Sequential(*layers, nn.Flatten())
            self.embedding = nn.Linear(given * (-(-resolution // 8)) ** 2, WIDTH)
        else:
            self.body = nn.Sequential(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(),
                                      nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
                                      nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten())
            self.embedding = nn.Linear(64 * (-(-resolution // 4)) ** 2, WIDTH)
        self.head = nn.Linear(WIDTH, sum(outputs))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (n, C, H, W) in [-1, 1] to features (n, 64) and the task's outputs (n, sum of outputs)."""
        raw = self.embedding(self.body(images))
        return raw * self.scale, self.head(F.relu(raw))

    @torch.inference_mode()
    def told(self, features: Tensor) -> Tensor:
        """Tell from features, (n, 64), what a classifier reads in their images, (n, H), int64."""
        outputs = self.head(F.relu(features.to(self.scale.device) / self.scale))
        return torch.stack([part.argmax(1) for part in outputs.split(self.made_of["outputs"], dim=1)], dim=1).cpu()

    @property
    def name(self) -> str:
        """Its name in torch-fidelity and beside every number."""
        return f"{TASKS[self.made_of['task']]}-{_digest(self)}"


def _digest(module: nn.Module) -> str:
    """Hash a module's weights."""
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(key.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


@contextmanager
def weights_alone() -> Iterator[None]:
    """Let torch load nothing but weights, whoever asks it: what torch-fidelity fetches are pickles."""
    before = os.environ.get(FORCED)
    os.environ[FORCED] = "1"
    try:
        yield
    finally:
        os.environ.pop(FORCED)
        if before is not None:
            os.environ[FORCED] = before


class Borrowed(nn.Module):
    """One of torch-fidelity's own extractors, with its weights as torch-fidelity finds or fetches them.

    Raises
    ------
    ValueError
        If torch-fidelity has none of this name, or its weights cannot be had.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        if name not in FEATURE_EXTRACTORS_REGISTRY:
            raise ValueError(f"judge: torch-fidelity has no extractor {name!r}; it has: "
                             f"{', '.join(FEATURE_EXTRACTORS_REGISTRY)}")
        layer = FEATURE_EXTRACTORS_REGISTRY[name].get_default_feature_layer_for_metric("fid")
        try:
            with weights_alone():
                self.net = create_feature_extractor(name, [layer], cuda=False, verbose=False)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"judge: the weights of {name} cannot be had ({error}). Fetch them where there is a "
                             "network, or take the judge denoising or rotation.") from None
        self.colours = self.net.get_dummy_input_for_compile().shape[1]

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Map images (n, C, H, W) in [-1, 1] to features (n, D)."""
        pixels = to_uint8(images).expand(-1, max(self.colours, images.shape[1]), -1, -1)
        return self.net(pixels)[0].float().flatten(1),


class Clip(nn.Module):
    """A CLIP model (Radford et al. 2021): features of images and of prompts, of length 1.

    Parameters
    ----------
    source : folder of a CLIPModel that transformers saved, hub:OWNER/NAME or hub:OWNER/NAME@REVISION

    Raises
    ------
    ValueError
        If it cannot be had.
    """

    def __init__(self, source: str):
        super().__init__()
        try:
            self.model = CLIPModel.from_pretrained(**where(source), use_safetensors=True).float()
            self.words = AutoTokenizer.from_pretrained(**where(source), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"judge: no CLIP model can be had from {source} ({error}). Fetch it where there is a "
                             "network, or take the judge denoising or rotation.") from None
        self.side = self.model.config.vision_config.image_size
        self.register_buffer("mean", torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1), persistent=False)

    @cached_property
    def name(self) -> str:
        """Its name beside every number."""
        return f"clip-{_digest(self)}"

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Map images (n, C, H, W) in [-1, 1] to features (n, D)."""
        pixels = F.interpolate(images / 2 + 0.5, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 1)
        seen = self.model.vision_model(pixel_values=(pixels.expand(-1, 3, -1, -1) - self.mean) / self.std)
        return F.normalize(self.model.visual_projection(seen.pooler_output), dim=1),

    @torch.inference_mode()
    def read(self, prompts: Sequence[str]) -> Tensor:
        """Give the features of prompts, (n, D), on the CPU; what is too long is cut, as is usual."""
        read = []
        for begin in range(0, len(prompts), 256):
            tokens = self.words(list(prompts[begin:begin + 256]), padding=True, truncation=True, return_tensors="pt",
                                max_length=self.model.config.text_config.max_position_embeddings)
            said = self.model.text_model(**tokens.to(self.mean.device))
            read.append(F.normalize(self.model.text_projection(said.pooler_output), dim=1).cpu())
        return torch.cat(read)


def borrowed(task: str) -> Borrowed | Clip | None:
    """Give the second judge that is not trained here; None where it is trained.

    Raises
    ------
    ValueError
        If it cannot be had.
    """
    if task.startswith(CLIP):
        return Clip(task.removeprefix(CLIP))
    return Borrowed(task.removeprefix(FIDELITY)) if task.startswith(FIDELITY) else None


def fit(data: DataSet, task: str, *, steps: int, seed: int, device: str, precision: str, work: Path) -> Extractor:
    """Train an extractor on the training part of `data`, each batch moved by up to a pixel.

    Parameters
    ----------
    task : of `TASKS`
        Tell the classes, or all attributes where the data have some; or how images were turned (Gidaris et al. 2018);
        or what they were before noise of up to 1 was added (Vincent et al. 2008). Where all images have one label,
        classes become turns.
    """
    images, answers = data.images[data.train], data.answers[data.train]
    if task == "classes" and _alike(answers):
        task = "rotation"
    if task == "rotation":
        answers = torch.arange(4).repeat_interleave(len(images))[:, None]
    torch.manual_seed(seed)
    outputs = [images[0].numel()] if task == "denoising" else (answers.amax(dim=0) + 1).tolist()
    made = Extractor(task, data.shape[0], data.shape[1], outputs).to(device)

    def loss(model: nn.Module, generator: torch.Generator, _: float) -> Tensor:
        rows = own_share(torch.randint(len(answers), (128,), generator=generator))
        down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
        batch, quarters = images[rows % len(images)], rows // len(images)
        if task == "rotation":
            batch = torch.stack([image.rot90(turns, (1, 2)) for image, turns in zip(batch, quarters.tolist())])
        moved = torch.roll(batch, (down, right), dims=(2, 3))
        if task == "denoising":
            strength = torch.rand(len(moved), 1, 1, 1, generator=generator)
            noisy = moved + strength * torch.randn(moved.shape, generator=generator)
            return F.mse_loss(model(noisy.to(device))[1].float(), moved.flatten(1).to(device))
        guesses = model(moved.to(device))[1].float().split(outputs, dim=1)
        return torch.stack([F.cross_entropy(guess, answer, label_smoothing=0.05)
                            for guess, answer in zip(guesses, answers[rows].to(device).T)]).sum()

    train(made, loss, steps=steps, lr=2e-3, ema_decay=0.99, weight_decay=1e-2, seed=seed, device=device,
          precision=precision, work=work, title=f"extractor, {task}")
    made.eval().requires_grad_(False)
    spread = embed(made, images).var(dim=0).sum()
    made.scale.copy_((WIDTH / spread).sqrt())
    return made


def _alike(labels: Tensor) -> bool:
    """Whether all images have the same labels, so that these tell nothing."""
    return bool((labels == labels[0]).all())


def check_judge(judge: str, data: DataSet) -> None:
    """Refuse a second judge that cannot be had, or that would be the first again.

    Raises
    ------
    ValueError
        Saying what to take instead.
    """
    if judge == "rotation" and _alike(data.labels):
        raise ValueError("judge: the first judge learns rotation already, as the data have no labels: take denoising")
    borrowed(judge)


def read(classifier: Extractor, images: Tensor) -> Tensor:
    """Give what the classifier reads in images, (n, H), int64, on the CPU: the label, or each attribute."""
    return classifier.told(embed(classifier, images))


def save(folder: Path, first: Extractor, second: Extractor | str) -> None:
    """Write weights and shape of both judges' extractors; of a borrowed one its task."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, one in (("first", first), ("second", second)):
        if isinstance(one, Extractor):
            save_file({name: tensor.contiguous() for name, tensor in one.state_dict().items()},
                      folder / f"{place}.safetensors")
        about = one.made_of if isinstance(one, Extractor) else {"borrowed": one}
        (folder / f"{place}.json").write_text(json.dumps(about))


def load(folder: Path, device: str = "cpu") -> tuple[Extractor, Extractor | Borrowed | Clip]:
    """Read what `save` wrote, the first judge's extractor and the second's, and register them with torch-fidelity."""
    found = []
    for place in ("first", "second"):
        if not (folder / f"{place}.json").exists():
            raise FileNotFoundError(f"no extractor in {folder}. Notebook 00_teacher_training makes it.")
        about = json.loads((folder / f"{place}.json").read_text())
        one = borrowed(about["borrowed"]) if "borrowed" in about else Extractor(**about)
        if isinstance(one, Extractor):
            one.load_state_dict(load_file(folder / f"{place}.safetensors"))
            _register(one)
        found.append(one.eval().requires_grad_(False).to(device))
    return tuple(found)


def _register(extractor: Extractor) -> None:
    class Registered(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)
            self.extractor = extractor

        @staticmethod
        def get_provided_features_list():
            return (LAYER,)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return LAYER

        @staticmethod
        def can_be_compiled():
            return False

        @staticmethod
        def get_dummy_input_for_compile():
            shape = extractor.made_of
            return torch.zeros(1, shape["channels"], shape["resolution"], shape["resolution"], dtype=torch.uint8)

        def forward(self, images: Tensor) -> tuple[Tensor]:
            return (embed(self.extractor, images),)

    if extractor.name not in FEATURE_EXTRACTORS_REGISTRY:  # torch-fidelity takes a name once a process
        register_feature_extractor(extractor.name, Registered)


@torch.inference_mode()
def embed(extractor: Extractor | Borrowed | Clip, images: Tensor) -> Tensor:
    """Give the features of images, as stored pixels would give them.

    Parameters
    ----------
    images : Tensor, (n, C, H, W), uint8, or float in [-1, 1], which is rounded to 256 levels first

    Returns
    -------
    features : Tensor, (n, D), float32, on the CPU
    """
    pixels = images if images.dtype == torch.uint8 else to_uint8(images)
    device = next(extractor.parameters()).device
    some = max(1, min(1000, PIXELS // pixels[0].numel()))
    return torch.cat([extractor(part.to(device).float() / 127.5 - 1)[0].cpu() for part in pixels.split(some)])
