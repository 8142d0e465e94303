"""Vocabularies of saved tokenizers: transformers makes one of two words up where files are missing, without a word."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BLANK = "▁"  # a space, which T5 knows even of words that it does not


@lru_cache(maxsize=16)
def _files(name: str) -> tuple[str, tuple[str, ...]]:
    """The one file that a class of transformers reads, and those from which it can be made; empty where not known."""
    import transformers

    found = dict(getattr(getattr(transformers, name, None), "vocab_files_names", {}))
    return found.pop("tokenizer_file", ""), tuple(found.values())


def lacking(folder: Path, name: str) -> str:
    """What is missing of a tokenizer's files, in words; empty where nothing is.

    Args:
        folder: where they should lie.
        name: the tokenizer's class in transformers.
    """
    whole, parts = _files(name)

    def is_there(file: str) -> bool:
        return (folder / file).is_file() and (folder / file).stat().st_size > 0

    if not whole or is_there(whole):
        return ""
    missing = [file for file in parts if not is_there(file)]
    if missing or not parts:
        return " and ".join(missing) + (f" (or {whole})" if missing else whole)
    if any(file.endswith(".model") for file in parts) and find_spec("sentencepiece") is None:
        return f"{whole}, and {parts[0]} cannot be read without a package: pip install sentencepiece protobuf"
    return ""


def check_size(tokenizer: Any, embedded: int, where: str) -> None:
    """Refuse a vocabulary that cannot be the one that a network was trained with.

    Args:
        tokenizer: of transformers.
        embedded: tokens that the network has an embedding of.
        where: the tokenizer's folder, for messages.

    Raises:
        ValueError: fewer than half of the embeddings have a token.
    """
    size = len(tokenizer)
    if size < embedded / 2:
        raise ValueError(
            f"the tokenizer of {where} has {size} tokens, but its network was trained with {embedded}, so texts would "
            "not be understood. Fetch the tokenizer's files again, of the same model."
        )


def check_known(tokenizers: Sequence[Any], texts: Iterable[str], where: str) -> None:
    """Refuse texts of which no tokenizer knows any part: what is made from them would not depend on them.

    Args:
        tokenizers: of transformers.
        texts: the texts; empty ones are passed over.
        where: the tokenizers' folder, for messages.

    Raises:
        ValueError: names the first such text.
    """
    left = [text for text in dict.fromkeys(texts) if text.strip()]
    for tokenizer in tokenizers:
        if left:
            ids = tokenizer(left, add_special_tokens=False)["input_ids"]
            unknown = {tokenizer.unk_token_id, *tokenizer.convert_tokens_to_ids([BLANK])}
            left = [text for text, found in zip(left, ids, strict=True) if set(found) <= unknown]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise ValueError(
            f"the tokenizer of {where} knows no part of the prompt {left[0][:80]!r}{more}, so it would be ignored. Use "
            "words that the model was trained with, or fetch the tokenizer's files again."
        )
