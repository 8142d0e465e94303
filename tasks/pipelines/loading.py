"""Loading a saved pipeline with diffusers, and setting it up as the plug-in's options say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tasks.pipelines.folder import IGNORED
from tasks.pipelines.memory import is_out_of_memory
from tasks.pipelines.whole import check_whole, first_line
from tasks.vocabulary import check_known, check_size


def load(spec: Any, without: Sequence[str] = (), given: Mapping[str, Any] | None = None) -> Any:
    """The pipeline of a plug-in in main memory, in evaluation mode and without gradients of its weights.

    Args:
        spec: the plug-in.
        without: components that are left out.
        given: components that were loaded already.

    Raises:
        ValueError: weights that are damaged or do not fit, a vocabulary or an adapter that does not.
    """
    import diffusers

    _be_quiet(spec)
    check_whole(spec.folder)
    index = spec.folder.index
    absent = [name for name in (*without, *IGNORED) if name in index]
    absent += [name for name in spec.folder.family.components if name not in spec.folder.components]
    options: dict[str, Any] = dict.fromkeys(absent)
    if "requires_safety_checker" in index:
        options["requires_safety_checker"] = False
    if spec.variant:
        options["variant"] = spec.variant
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            str(spec.folder.root),
            dtype=getattr(torch, spec.dtype),
            use_safetensors=True,
            local_files_only=True,
            **(options | dict(given or {})),
        )
    except Exception as error:  # whatever one of a dozen loaders raises on files that it cannot use
        raise ValueError(
            f"{spec.folder.root} cannot be loaded: {first_line(error)}. Save or download it again."
        ) from None
    pipe.set_progress_bar_config(disable=True)
    _check_tokenizers(pipe, spec)
    _adapt(pipe, spec)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return pipe


def _be_quiet(spec: Any) -> None:
    """No progress bars of the libraries: a study has one of its own."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    if spec.folder.family.text:
        import transformers

        transformers.utils.logging.disable_progress_bar()


def _check_tokenizers(pipe: Any, spec: Any) -> None:
    """Refuse tokenizers that do not belong to their encoders, and prompts that none of them can read."""
    names = [n for n in spec.folder.family.text if "tokenizer" in n and getattr(pipe, n, None) is not None]
    for name in names:
        encoder = getattr(pipe, name.replace("tokenizer", "text_encoder"))
        check_size(getattr(pipe, name), encoder.config.vocab_size, str(spec.folder.root / name))
    if names:
        texts = (*spec.prompt_table.texts, spec.negative_prompt or "")
        check_known([getattr(pipe, name) for name in names], texts, str(spec.folder.root))


def _adapt(pipe: Any, spec: Any) -> None:
    """Load the LoRA adapters with their scales."""
    if not spec.lora:
        return
    names = []
    for i, (file, _) in enumerate(spec.adapters):
        names.append(f"lora_{i}")
        try:
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=names[-1])
            loaded = pipe.get_list_adapters()
        except Exception as error:  # peft and diffusers raise many kinds
            raise ValueError(f"model.lora.{i} {file} does not fit {spec.folder.root}: {error!r}.") from None
        if not any(names[-1] in adapters for adapters in loaded.values()):
            raise ValueError(f"model.lora.{i} {file} fits no layer of {spec.folder.root}. Give another adapter.")
    pipe.set_adapters(names, [scale for _, scale in spec.adapters])


def prepare(pipe: Any, spec: Any, device: str) -> Any:
    """The network that denoises, on its device, after the options that concern its speed and memory.

    Raises:
        ValueError: the device has no room for the weights.
    """
    try:
        if spec.offload == "none":
            pipe.to(device)
        elif spec.offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        else:
            pipe.enable_sequential_cpu_offload(device=device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"the weights of {spec.folder.root} do not fit on {device} as {spec.dtype}: {first_line(error)}. Set "
            "model.dtype=bfloat16 or model.offload=model, or use a larger device."
        ) from None
    network = getattr(pipe, spec.folder.family.network)
    if spec.channels_last:
        network.to(memory_format=torch.channels_last)
    if spec.compile:
        network.compile()
    return network
