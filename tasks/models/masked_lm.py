"""Any masked language model saved in transformers' format, from a folder or a pinned hub revision."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.checkpoint import file_digest
from tasks.processes import Masked
from tasks.registry import models
from tasks.vocabulary import check_size

FILES = ("*.safetensors", "config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model")


@models.register("masked_lm")
@dataclass(frozen=True)
class MaskedLM:
    """A transformers masked language model as a masked diffusion model over its tokenizer's tokens.

    States number the real tokens 0..V-1 without gaps, and V is the mask; special tokens (padding, separators, unknown)
    are never drawn. The tokenizer's beginning and end tokens frame every string for the network. Samples are stored as
    the tokenizer's own ids, and ``texts`` spells them.

    A network like BERT was trained with 15 % of the tokens masked, so at high noise it answers outside of its training;
    one trained as a masked diffusion model was not.

    Args:
        path: a folder written by ``save_pretrained`` (model and tokenizer), or the id of a hub model.
        revision: the commit of a hub model, 40 hexadecimal digits. Of a folder, the hash of its weights, configuration
            and tokenizer; null takes the one that it has.
        length: tokens of a string, without the frame.

    Reference: Sahoo et al. 2024, "Simple and Effective Masked Diffusion Language Models" (a masked language model is
        its denoiser); Wang and Cho 2019, "BERT has a Mouth, and It Must Speak" (text from one).
    """

    path: str
    revision: str | None = None
    length: int = 32

    ignores_time = True
    kind = "tokens"
    num_classes = 0

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"model.length must be at least 1, got {self.length}.")
        folder = Path(self.path)
        if self.path and folder.is_dir():
            found = _hash(folder)
            if self.revision not in (None, found):
                raise ValueError(
                    f"the files in {folder} have revision {found}, but model.revision is {self.revision!r}. Give the "
                    "folder that was meant, or model.revision=null."
                )
            object.__setattr__(self, "revision", found)
        elif not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", self.path):
            raise ValueError(f"model.path {self.path!r} is neither a folder nor the id of a hub model (owner/name).")
        elif not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ValueError(
                f"model.path {self.path!r} is no folder here. For a hub model, model.revision must be the full commit, "
                f"40 hexadecimal digits (a branch or tag can move), got {self.revision!r}. Copy it from its page."
            )

    @property
    def _source(self) -> tuple[str, str | None]:
        """What transformers is given: name and commit."""
        return self.path, None if Path(self.path).is_dir() else self.revision

    @property
    def _alphabet(self) -> _Alphabet:
        found = _read_alphabet(*self._source, self.revision or "")
        longest = found.longest - len(found.before) - len(found.after)
        if self.length > longest:
            raise ValueError(
                f"model.length must be at most {longest} for {self.path}, which knows {found.longest} places, got "
                f"{self.length}."
            )
        return found

    @property
    def stored_vocabulary(self) -> int:
        """Number of the tokenizer's ids."""
        return self._alphabet.size

    @property
    def shape(self) -> tuple[int, ...]:
        """(L,)."""
        return (self.length,)

    @property
    def noising(self) -> Masked:
        """The process object."""
        return Masked(len(self._alphabet.real))

    def reference(self, count: int = 0) -> tuple[Any, Any]:
        """A language model brings no data."""
        raise ValueError("model masked_lm has no reference data. Leave out metrics that compare with data.")

    def load(self, device: str) -> MaskedLMDenoiser:
        """The denoiser on a device."""
        return MaskedLMDenoiser(self, device)


@dataclass(frozen=True)
class _Alphabet:
    """What of a tokenizer and a configuration matters here: ids of tokens."""

    size: int
    real: tuple[int, ...]
    mask: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    longest: int


class MaskedLMDenoiser:
    """A masked language model as a denoiser."""

    def __init__(self, spec: MaskedLM, device: str) -> None:
        from transformers import AutoModelForMaskedLM

        alphabet, (name, commit) = spec._alphabet, spec._source
        self.process, self.shape, self.num_classes = spec.noising, spec.shape, 0
        self.tokenizer = _tokenizer(name, commit, spec.revision or "")
        with _plainly(name):
            network: Any = AutoModelForMaskedLM.from_pretrained(
                name, revision=commit, use_safetensors=True, dtype=torch.float32
            )
        self.network = network.eval().requires_grad_(False).to(device)
        self._ids = torch.tensor([*alphabet.real, alphabet.mask], device=device)  # of states 0..V
        self._before, self._after = (torch.tensor(ids, device=device) for ids in (alphabet.before, alphabet.after))
        self._states = torch.full((alphabet.size,), -1, device=device)
        self._states[self._ids] = torch.arange(len(self._ids), device=device)

    def denoise(self, x: Tensor, t: Any, cond: Tensor | None = None) -> Tensor:
        """Probabilities of the real tokens, (B, L) -> (B, L, V) float64; visible tokens have probability 1."""
        before, after = (frame.expand(len(x), -1) for frame in (self._before, self._after))
        ids = torch.cat([before, self._ids[x], after], dim=1)
        logits = self.network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        start = self._before.numel()
        p = logits[:, start : start + x.shape[1], self._ids[:-1]].double().softmax(-1)
        known = torch.nn.functional.one_hot(x.clamp(max=self.process.mask - 1), self.process.vocabulary)
        return torch.where((x == self.process.mask)[..., None], p, known.to(p.dtype))

    def decode(self, x0: Tensor, cond: Tensor | None = None) -> Tensor:
        """The tokenizer's ids, (B, L) int64."""
        return self._ids[x0]

    def encode(self, samples: Tensor) -> Tensor:
        """States of the tokenizer's ids, (B, L) int64; the mask becomes V.

        Raises:
            ValueError: special tokens, which no state has.
        """
        states = self._states[samples.long()]
        if (states < 0).any():
            place = int(samples[states < 0][0])
            raise ValueError(
                f"token {place} ({self.tokenizer.decode([place])!r}) is special and no state of the model."
            )
        return states

    def texts(self, samples: Tensor) -> list[str]:
        """The spelling of stored samples, (B, L) ids."""
        return self.tokenizer.batch_decode(samples.tolist())


class _plainly:
    """Turn what transformers raises about a missing or damaged model into the error of a user's mistake."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from safetensors import SafetensorError

        if isinstance(error, OSError | ValueError | KeyError | RuntimeError | SafetensorError):
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"model.path {self._name!r} cannot be read as a masked language model: {first} Give a folder that "
                "save_pretrained wrote for a model and its tokenizer, or a hub model that can be reached."
            ) from error


def _hash(folder: Path) -> str:
    """Hash of weights, configuration and tokenizer, 40 hexadecimal digits.

    Raises:
        ValueError: the folder holds no model that is read here.
    """
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"model.path {str(folder)!r} has no config.json with safetensors weights beside it (pickled weights are "
            "not loaded). Give a folder made by save_pretrained."
        )
    files = sorted({path for pattern in FILES for path in folder.glob(pattern) if path.is_file()})
    lines = [f"{path.name} {file_digest(path)}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:40]


@lru_cache(maxsize=4)
def _tokenizer(name: str, commit: str | None, _revision: str) -> Any:
    from transformers import AutoTokenizer

    with _plainly(name):
        return AutoTokenizer.from_pretrained(name, revision=commit)


@lru_cache(maxsize=16)
def _read_alphabet(name: str, commit: str | None, revision: str) -> _Alphabet:
    from transformers import AutoConfig

    with _plainly(name):
        config = AutoConfig.from_pretrained(name, revision=commit)
    kinds = config.architectures or []
    if not any(kind.endswith("ForMaskedLM") for kind in kinds):
        raise ValueError(
            f"model.path {name!r} holds {', '.join(kinds) or 'no architecture'}, not a model for masked language "
            "modelling. Give one that was saved as ...ForMaskedLM."
        )
    tokenizer = _tokenizer(name, commit, revision)
    check_size(tokenizer, config.vocab_size, name)
    if tokenizer.mask_token_id is None:
        raise ValueError(
            f"the tokenizer of {name!r} has no mask token, which masked diffusion needs. Add the one that the model "
            "was trained with, tokenizer.add_special_tokens({'mask_token': ...}), and save the tokenizer again."
        )
    size, special = len(tokenizer), set(tokenizer.all_special_ids)
    if size > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {name!r} has {size} tokens, but the model knows {config.vocab_size}. Give the tokenizer "
            "that belongs to the model."
        )
    first = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    last = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    places = getattr(config, "max_position_embeddings", None) or size
    return _Alphabet(
        size=size,
        real=tuple(i for i in range(size) if i not in special),
        mask=tokenizer.mask_token_id,
        before=() if first is None else (first,),
        after=() if last is None else (last,),
        longest=int(min(places, tokenizer.model_max_length)),
    )
