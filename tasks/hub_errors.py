"""What the Hugging Face hub refuses, in the words of someone who has to do something about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def explained(where: str, name: str, revision: str) -> Iterator[None]:
    """Within, what the hub raises becomes an error that says what to do.

    Args:
        where: what asks, with the name and the commit, for messages.
        name: OWNER/NAME.
        revision: the commit.

    Raises:
        ValueError: gated, not there, no such commit, or no way to the hub.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
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
            f"network (hf download {name} --revision {revision}), or give a folder."
        ) from None
