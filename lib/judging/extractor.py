"""The feature extractor behind every score: a small classifier trained on the study's own data.

Inception's weights cannot be assumed to be at hand, and Inception has never seen digits of 16 x 16 pixels. So a small
classifier gives the features, registered with torch-fidelity under a name that holds a hash of its weights; that name
stands beside every number, and only Inception's distance is ever called FID.
"""

import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from lib.teachers.data import DataSet, to_uint8
from lib.teachers.training import own_share, train

LAYER = "embedding"
WIDTH = 64  # features

_registered: set[str] = set()


class Classifier(nn.Module):
    """Three convolutions, an embedding of 64 features, one linear layer on top.

    The features are scaled by one number so that their mean variance over the training images is 1: then distances mean
    about the same from one extractor to the next.
    """

    def __init__(self, channels: int, resolution: int, classes: int):
        super().__init__()
        self.shape = {"channels": channels, "resolution": resolution, "classes": classes}
        self.body = nn.Sequential(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(),
                                  nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
                                  nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten())
        self.embedding = nn.Linear(64 * (-(-resolution // 4)) ** 2, WIDTH)
        self.head = nn.Linear(WIDTH, classes)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (n, C, H, W) in [-1, 1] to features (n, 64) and logits (n, classes)."""
        raw = self.embedding(self.body(images))
        return raw * self.scale, self.head(F.relu(raw))

    @property
    def name(self) -> str:
        """Its name in torch-fidelity and beside every number."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self.state_dict().items()):
            digest.update(key.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return f"classifier-{digest.hexdigest()[:8]}"


def fit(data: DataSet, *, steps: int, seed: int, device: str, precision: str, work: Path) -> Classifier:
    """Train a classifier on the training part of `data`, each batch moved by up to a pixel.

    Where all images have one label it learns to tell how they were turned (Gidaris et al. 2018).
    """
    images, labels = data.images[data.train], data.labels[data.train]
    if not data.labels.any():
        images = torch.cat([images.rot90(quarters, (2, 3)) for quarters in range(4)])
        labels = torch.arange(4).repeat_interleave(len(data.train))
    torch.manual_seed(seed)
    classifier = Classifier(data.shape[0], data.shape[1], int(labels.max()) + 1).to(device)

    def loss(model: nn.Module, generator: torch.Generator, _: float) -> Tensor:
        rows = own_share(torch.randint(len(images), (128,), generator=generator))
        down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
        moved = torch.roll(images[rows], (down, right), dims=(2, 3)).to(device)
        return F.cross_entropy(model(moved)[1].float(), labels[rows].to(device), label_smoothing=0.05)

    train(classifier, loss, steps=steps, lr=2e-3, ema_decay=0.99, weight_decay=1e-2, seed=seed, device=device,
          precision=precision, work=work, title="extractor")
    classifier.eval().requires_grad_(False)
    spread = embed(classifier, images).var(dim=0).sum()
    classifier.scale.copy_((WIDTH / spread).sqrt())
    return classifier


def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """Give the fraction of images whose label is right, in [0, 1]."""
    return float((read(classifier, images) == labels).float().mean())


@torch.inference_mode()
def read(classifier: Classifier, images: Tensor) -> Tensor:
    """Give the label that the classifier reads in each image, (n,), int64, on the CPU."""
    return classifier(images.to(classifier.head.weight.device))[1].argmax(1).cpu()


def save(folder: Path, classifier: Classifier) -> None:
    """Write weights and shape."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in classifier.state_dict().items()},
              folder / "classifier.safetensors")
    (folder / "classifier.json").write_text(json.dumps(classifier.shape))


def load(folder: Path, device: str = "cpu") -> Classifier:
    """Read what `save` wrote, and register it with torch-fidelity."""
    if not (folder / "classifier.json").exists():
        raise FileNotFoundError(f"no extractor in {folder}. Notebook 00_teacher_training makes it.")
    classifier = Classifier(**json.loads((folder / "classifier.json").read_text()))
    classifier.load_state_dict(load_file(folder / "classifier.safetensors"))
    classifier.eval().requires_grad_(False).to(device)
    _register(classifier)
    return classifier


def _register(classifier: Classifier) -> None:
    class Registered(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)
            self.classifier = classifier

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
            shape = classifier.shape
            return torch.zeros(1, shape["channels"], shape["resolution"], shape["resolution"], dtype=torch.uint8)

        def forward(self, images: Tensor) -> tuple[Tensor]:
            return (embed(self.classifier, images),)

    if classifier.name not in _registered:  # torch-fidelity takes a name once a process
        register_feature_extractor(classifier.name, Registered)
        _registered.add(classifier.name)


@torch.inference_mode()
def embed(classifier: Classifier, images: Tensor) -> Tensor:
    """Give the features of images, as stored pixels would give them.

    Parameters
    ----------
    images : Tensor, (n, C, H, W), uint8, or float in [-1, 1], which is rounded to 256 levels first

    Returns
    -------
    features : Tensor, (n, 64), float32, on the CPU
    """
    pixels = images if images.dtype == torch.uint8 else to_uint8(images)
    device = classifier.head.weight.device
    return torch.cat([classifier(part.to(device).float() / 127.5 - 1)[0].cpu() for part in pixels.split(1000)])
