"""Where a pipeline's files lie: a folder, or a revision of the Hugging Face hub that is pinned by its commit."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>.*))?")
COMMIT = re.compile(r"[0-9a-f]{40}")


def locate(path: str, what: str = "model.path") -> Path:
    """The folder of ``FOLDER`` or of ``OWNER/NAME@COMMIT``; the latter is fetched once, and then read from disk.

    Args:
        path: as the user gave it.
        what: where, for messages.

    Raises:
        ValueError: neither; a hub name without its commit; or the hub refuses it or cannot be reached.
    """
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    if path.endswith((".pkl", ".pickle", ".pt", ".ckpt", ".bin")):
        raise ValueError(
            f"{what} {path!r} is a pickle, which runs code when it is read; none is loaded. Have its maker's tools "
            "write a diffusers folder with safetensors (save_pretrained), and give that. For a network pickle of EDM, "
            "use model=edm."
        )
    found = HUB.fullmatch(path)
    if found is None or path.startswith((".", "/", "~")):
        raise ValueError(
            f"{what} {path!r} is not a folder. Give one made by save_pretrained, or OWNER/NAME@COMMIT with the 40 "
            "hexadecimal digits of a commit on the Hugging Face hub."
        )
    name, revision = found["name"], found["revision"] or ""
    if not COMMIT.fullmatch(revision):
        raise ValueError(
            f"{what} {path!r} is not pinned, so its weights may change under the study. Write {name}@COMMIT with the "
            f"commit's 40 hexadecimal digits (https://huggingface.co/{name}/commits/main)."
        )
    return Path(_fetch(name, revision, what))


@lru_cache(maxsize=32)
def _fetch(name: str, revision: str, what: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = ["*.json", "*.txt", "*.model", "*.safetensors"]  # no pickles, no code
    where = f"{what} {name}@{revision}"
    try:
        try:
            return snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=True)
        except LocalEntryNotFoundError:
            return snapshot_download(name, revision=revision, allow_patterns=wanted)
    except GatedRepoError:
        raise ValueError(
            f"{where} is gated: its owner lets in only those who asked. Accept the terms at "
            f"https://huggingface.co/{name}, then run `hf auth login` or set HF_TOKEN."
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{where}: the hub has {name}, but no such commit. Copy it from its page again.") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{where}: the hub has no such model, or it is private. Check the name, or set HF_TOKEN."
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{where} is not in the local cache, and the hub cannot be reached ({first}). Download it where there is a "
            f"network (hf download {name} --revision {revision}), or give model.path a folder."
        ) from None
