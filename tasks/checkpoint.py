"""A diffusers network kept in a folder: its configuration, schedule and weights, and the denoiser that they make."""

from __future__ import annotations

import hashlib
import inspect
import json
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.layer_skip import Blocks, skipping, survey
from tasks.processes import VP, Flow, GaussianProcess, Time, expand, to_x0
from tasks.registry import unknown

WEIGHTS = Path(__file__).resolve().parent / "weights"
KNOWN = ("_class_name", "prediction_type", "num_train_timesteps")  # what is read of any scheduler's configuration


@lru_cache(maxsize=256)
def _digest(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read once for as long as size and time of change stay."""
    stat = path.stat()
    return _digest(str(path), stat.st_size, stat.st_mtime_ns)


def check_weights(path: Path, again: str) -> None:
    """Refuse a file of weights that was cut short or overwritten, by its header and its end; no tensor is read.

    Args:
        path: the file.
        again: what to do then, for the message.

    Raises:
        ValueError: safetensors whose header is wrong or promises more than there is, or a torch file without its end.
    """
    stat = path.stat()
    if found := _damage(str(path), stat.st_size, stat.st_mtime_ns):
        raise ValueError(f"{path} is damaged ({stat.st_size} bytes): {found}. {again}")


@lru_cache(maxsize=256)
def _damage(path: str, size: int, mtime_ns: int) -> str:
    from safetensors import SafetensorError, safe_open

    if path.endswith(".safetensors"):
        try:
            with safe_open(path, framework="pt"):
                return ""
        except (SafetensorError, OSError) as error:
            return str(error)
    with open(path, "rb") as file:
        begins_as_zip = file.read(2) == b"PK"  # torch's format since 1.6; the one before has no end to look for
    return "its end is missing" if not size or begins_as_zip and not zipfile.is_zipfile(path) else ""


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The fields in a configuration file.

    Raises:
        ValueError: no such file, or it cannot be read as ``what``.
    """
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not fields")
        return found
    except FileNotFoundError:
        raise ValueError(
            f"{path.parent} has no {path.name}, so it is not {what}. Give a folder made by save_pretrained."
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as {what}: {error}. Save the model again.") from None


def prediction(scheduler: dict[str, Any]) -> str:
    """What the network predicts, by a scheduler configuration: a name that :func:`to_x0` knows."""
    named = scheduler.get("prediction_type", "epsilon")
    if named in ("flow_prediction", "flow"):
        return "flow"
    flows = "FlowMatch" in scheduler.get("_class_name", "")
    return "flow" if flows and named != "reversed_flow" else named


def noising(scheduler: dict[str, Any]) -> GaussianProcess:
    """The noising process that a scheduler configuration describes."""
    steps = scheduler.get("num_train_timesteps", 1000)
    if prediction(scheduler) in ("flow", "reversed_flow"):
        return Flow(steps)
    return VP(
        scheduler.get("beta_schedule", "linear"),
        scheduler.get("beta_start", 0.0001),
        scheduler.get("beta_end", 0.02),
        steps,
    )


def check_scheduler(scheduler: dict[str, Any]) -> None:
    """Refuse a schedule that is not one of ours: sampling with another one gives numbers that look right.

    Raises:
        ValueError: no beta schedule and no flow, or betas that are not supported.
    """
    name = scheduler.get("_class_name", "DDPMScheduler")
    if name.startswith(("EDM", "ScoreSde", "CMStochastic", "KarrasVe", "Cosine")):
        raise ValueError(f"model.scheduler is a {name}, which has no beta schedule and is not a flow.")
    for field in ("trained_betas", "rescale_betas_zero_snr"):
        if scheduler.get(field):
            raise ValueError(f"model.scheduler sets {field}, which changes the betas in a way not supported here.")
    process = noising(scheduler)
    if isinstance(process, VP):
        process.alpha(0.5)
    to_x0(prediction(scheduler), torch.zeros(1), torch.zeros(1), 0.5, 0.5)


def check_fields(given: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuse fields that a scheduler's configuration has no use for: they would change nothing but the key.

    Args:
        given: the fields, by name.
        saved: the configuration in the folder.

    Raises:
        ValueError: neither that configuration nor its scheduler's class has one of that name.
    """
    import diffusers

    name = (dict(saved) | dict(given)).get("_class_name")
    cls: Any = getattr(diffusers, str(name), diffusers.DDPMScheduler)
    known = {*inspect.signature(cls.__init__).parameters, *saved, *KNOWN} - {"self"}
    for field in given:
        if field not in known:
            raise unknown("field of model.scheduler:", field, sorted(known), "Fields")


def check_embedding(config: Mapping[str, Any]) -> None:
    """Refuse a UNet2DModel that embeds anything else than labels beside the time.

    Raises:
        ValueError: says what is allowed.
    """
    if (kind := config.get("class_embed_type")) is not None:
        raise ValueError(
            f"the UNet embeds classes by {kind!r}, which is told more than a label. Allowed: a table "
            "(num_class_embeds) or nothing."
        )


class Checkpoint:
    """A folder with a diffusers network: its configuration, its schedule and its weights, each read once.

    Args:
        folder: a pipeline folder (``unet/`` or ``transformer/``, and ``scheduler/``) or a network's own.
        scheduler: the scheduler configuration to use when the folder has none.
        kind: the network's class, UNet2DModel or DiTTransformer2DModel.

    Raises:
        ValueError: the folder is not such a checkpoint, or the weights are damaged or of another shape.
    """

    def __init__(self, folder: Path, scheduler: dict[str, Any] | None = None, kind: str = "UNet2DModel") -> None:
        if not folder.is_dir():
            raise ValueError(f"model.path {str(folder)!r} is not a folder. Give one made by save_pretrained.")
        part = "unet" if kind == "UNet2DModel" else "transformer"
        self.unet = folder / part if (folder / part).is_dir() else folder
        self.config = read_json(self.unet / "config.json", "a diffusers UNet")
        if self.config.get("_class_name") != kind:
            raise ValueError(
                f"{self.unet / 'config.json'} describes a {self.config.get('_class_name')!r}, not a {kind}."
            )
        saved = folder / "scheduler" / "scheduler_config.json"
        if scheduler is None and not saved.exists():
            raise ValueError(
                f"{folder} has no scheduler/scheduler_config.json; set model.scheduler, for example "
                "{beta_schedule: linear, prediction_type: epsilon}."
            )
        check_fields(scheduler or {}, {})
        self.scheduler = scheduler if scheduler is not None else read_json(saved, "a scheduler configuration")
        for field in ("sample_size", "in_channels"):
            if not self.config.get(field):
                raise ValueError(f"{self.unet / 'config.json'} has no {field}. Save the model again.")
        check_embedding(self.config)
        check_scheduler(self.scheduler)
        self.weights = self.unet / "diffusion_pytorch_model.safetensors"
        if not self.weights.is_file():
            raise ValueError(f"{self.unet} has no diffusion_pytorch_model.safetensors; pickled weights are not loaded.")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        size = self.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return (self.config["in_channels"], height, width)

    @property
    def num_classes(self) -> int:
        """Labels besides the last embedding, which means "no label"; 0 for an unconditional network."""
        if self.config["_class_name"] == "DiTTransformer2DModel":
            return self.config["num_embeds_ada_norm"]  # diffusers adds the last one itself
        return max((self.config.get("num_class_embeds") or 0) - 1, 0)

    @property
    def process(self) -> GaussianProcess:
        """The noising process that the scheduler configuration describes."""
        return noising(self.scheduler)

    @property
    def prediction(self) -> str:
        """What the network predicts: epsilon, sample, v_prediction, flow or reversed_flow."""
        return prediction(self.scheduler)

    @property
    def revision(self) -> str:
        """SHA-256 over the weights and both configurations."""
        digest = file_digest(self.weights)
        return hashlib.sha256(json.dumps([digest, self.config, self.scheduler], sort_keys=True).encode()).hexdigest()[
            :16
        ]

    @property
    def skeleton(self) -> torch.nn.Module:
        """The network without weights or numbers, on the meta device: what it is made of."""
        return skeleton(json.dumps(self.config, sort_keys=True))

    @property
    def blocks(self) -> Blocks:
        """The blocks of the network that steps may leave out."""
        return _blocks(json.dumps(self.config, sort_keys=True), self.shape, self.num_classes)

    def network(self, device: str) -> torch.nn.Module:
        """The network with its weights, in evaluation mode."""
        import diffusers
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        net = getattr(diffusers, self.config["_class_name"]).from_config(self.config)
        try:
            net.load_state_dict(load_file(self.weights))
        except SafetensorError as error:
            raise ValueError(f"{self.weights} is damaged: {error}. Save or copy the model again.") from None
        except RuntimeError as error:
            first = str(error).strip().splitlines()[1:2] or [str(error)]
            raise ValueError(f"{self.weights} does not fit {self.unet / 'config.json'}: {first[0].strip()}") from None
        return net.eval().requires_grad_(False).to(device)


@lru_cache(maxsize=64)
def skeleton(config: str) -> torch.nn.Module:
    """A diffusers network without weights, on the meta device, from its configuration as canonical JSON."""
    import diffusers

    found = json.loads(config)
    with torch.device("meta"):
        return getattr(diffusers, found["_class_name"]).from_config(found).eval()


@lru_cache(maxsize=64)
def _blocks(config: str, shape: tuple[int, ...], num_classes: int) -> Blocks:
    with torch.device("meta"):
        labels = torch.zeros(1, dtype=torch.int64) if num_classes else None
        network, x, time = skeleton(config), torch.zeros(1, *shape), torch.zeros(1)
        return survey(network, lambda: network(x, time, labels))


class UNetDenoiser:
    """A UNet2DModel or DiTTransformer2DModel as a denoiser: turns its prediction into the posterior mean."""

    def __init__(self, checkpoint: Checkpoint, device: str) -> None:
        self.process, self.prediction = checkpoint.process, checkpoint.prediction
        self.shape, self.num_classes = checkpoint.shape, checkpoint.num_classes
        self.network = checkpoint.network(device)
        self._checkpoint = checkpoint

    @property
    def skeleton(self) -> torch.nn.Module:
        """The network without weights, on the meta device: where work is counted."""
        return self._checkpoint.skeleton

    def skipping(self, mask: int) -> AbstractContextManager[float]:
        """Within, the network runs without the blocks of a mask; gives the share of multiply-adds that is left."""
        return skipping(self.network, self._checkpoint.blocks, mask)

    def denoise(self, x: Tensor, t: Time, cond: Tensor | None = None) -> Tensor:
        """E[x_0 | x_t = x], (B, C, H, W). ``cond`` holds labels; ``num_classes`` or None means none."""
        if self.num_classes and cond is None:
            cond = torch.full((len(x),), self.num_classes, dtype=torch.int64, device=x.device)
        time = torch.zeros(len(x), dtype=torch.float32, device=x.device) + self.process.model_time(t)
        output = self.network(x.float(), time.float(), cond if self.num_classes else None).sample.to(x.dtype)
        alpha, sigma = expand(self.process.alpha(t), x), expand(self.process.sigma(t), x)
        return to_x0(self.prediction, x, output, alpha, sigma)

    def decode(self, x0: Tensor, cond: Tensor | None = None) -> Tensor:
        """Images in [-1, 1]."""
        return x0.clamp(-1, 1)


class FolderModel:
    """What every model kept in a folder answers without loading its weights."""

    kind = "image"

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The folder, checked."""
        raise AssertionError

    @property
    def noising(self) -> GaussianProcess:
        """The process object."""
        return self.checkpoint.process

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self.checkpoint.shape

    @property
    def num_classes(self) -> int:
        """Number of labels, 0 when unconditional."""
        return self.checkpoint.num_classes

    @property
    def revision(self) -> str:
        """Hash of weights and configuration."""
        return self.checkpoint.revision

    @property
    def skeleton(self) -> torch.nn.Module:
        """The network without weights, on the meta device: what guidance may look for in it."""
        return self.checkpoint.skeleton

    @property
    def blocks(self) -> Blocks:
        """The blocks of the network that steps may leave out."""
        return self.checkpoint.blocks

    def load(self, device: str) -> UNetDenoiser:
        """The denoiser on a device."""
        return UNetDenoiser(self.checkpoint, device)


def digits_reference() -> tuple[Any, Any]:
    """The digits in [-1, 1], (1797, 1, 8, 8), and their labels."""
    from tasks.data import digits

    return digits.images(), digits.labels()
