"""A network that EDM publishes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tasks.checkpoint import file_digest
from tasks.edm import convert
from tasks.edm.network import precondition
from tasks.image_data import JudgedByPictures
from tasks.processes import EDM, Time
from tasks.registry import models


@models.register("edm")
@dataclass(frozen=True)
class EDMNetwork(JudgedByPictures):
    """A network of EDM (DDPM++, NCSN++ or ADM) from its pickle, read as data, or from the safetensors made of it.

    Pickles run code when they are opened in the ordinary way. This one is only read when ``sha256`` pins its content,
    by a reader that imports and runs nothing, and converted once to a file below ``$SOLVUS_WEIGHTS``. Networks run in
    float32, those trained in half precision too. A label after the last is the all-zero one, which only networks
    trained with label dropout know. Published files were not available where this was tested.

    Args:
        path: the pickle (edm-….pkl), or a converted file (.safetensors).
        sha256: of the pickle, 64 hexadecimal digits.
        sigma_min: smallest noise level of grids that are laid by noise level.
        sigma_max: noise level at t=1.
        data: pictures that samples are compared with: a folder, .npz, .npy or .parquet (``tasks/image_data.py``).

    Reference: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", table 1.
    """

    path: str
    sha256: str = ""
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    data: str | None = None

    kind = "image"
    unkeyed = ("path", "sha256", "data")  # the revision holds the content; data changes no row

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < float("inf"):
            raise ValueError(
                f"model.sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, got {self.sigma_min} and "
                f"{self.sigma_max}."
            )
        _ = self.config

    @cached_property
    def file(self) -> Path:
        """The converted file."""
        return convert.located(self.path, self.sha256)

    @cached_property
    def config(self) -> dict[str, Any]:
        """What it says of its network."""
        return convert.settings(self.file)

    @property
    def noising(self) -> EDM:
        """The process object."""
        return EDM(self.sigma_min, self.sigma_max)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        design = convert.design(self.config)
        return (design.channels, design.size, design.size)

    @property
    def num_classes(self) -> int:
        """Number of labels, 0 when unconditional."""
        return convert.design(self.config).label_dim

    @property
    def needs_labels(self) -> bool:
        """Whether it never saw a sample without its label."""
        return self.num_classes > 0 and not self.config["label_dropout"]

    @property
    def revision(self) -> str:
        """Hash of weights and settings."""
        return file_digest(self.file)[:16]

    def load(self, device: str) -> EDMDenoiser:
        """The denoiser on a device."""
        return EDMDenoiser(self, device)


class EDMDenoiser:
    """The posterior mean of the preconditioned network."""

    def __init__(self, spec: EDMNetwork, device: str) -> None:
        self.process, self.shape, self.num_classes = spec.noising, spec.shape, spec.num_classes
        self._sigma_data = spec.config["sigma_data"]
        self.network = convert.load(spec.file, device)

    def denoise(self, x: Tensor, t: Time, cond: Tensor | None = None) -> Tensor:
        """E[x_0 | x_t = x], (B, C, H, W). ``cond`` holds labels; ``num_classes`` or None means none."""
        sigma = (torch.zeros(len(x), dtype=torch.float64, device=x.device) + self.process.model_time(t)).float()
        skip, out, scale, level = precondition(sigma, self._sigma_data)
        label = None
        if self.num_classes:
            none = torch.full((len(x),), self.num_classes, device=x.device)
            label = one_hot(none if cond is None else cond, self.num_classes + 1)[:, :-1].float()
        skip, out, scale = (c[:, None, None, None] for c in (skip, out, scale))
        return (skip * x.float() + out * self.network(scale * x.float(), level, label)).to(x.dtype)

    def decode(self, x0: Tensor, cond: Tensor | None = None) -> Tensor:
        """Images in [-1, 1]."""
        return x0.clamp(-1, 1)
