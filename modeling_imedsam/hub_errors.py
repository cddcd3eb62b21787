"""What keeps a model from the Hub, and what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled


def check_token(token: str | None = None) -> None:
    """Raises ValueError without a token, neither this one nor the user's own."""
    if (token or get_token()) is None:
        raise ValueError("Expected a token to write to the Hub with, got none: `hf auth login`, or set HF_TOKEN.")


@contextmanager
def explain_hub_errors(repo_id: str) -> Iterator[None]:
    """What happened and what to do about it, as OSError, instead of a traceback out of the client."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise OSError("Expected the Hub to be reached, got HF_HUB_OFFLINE=1: unset it to publish.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        reasons = {
            401: "the token is not known: `hf auth login`, or set HF_TOKEN to one that can write",
            403: "the token may not write there: take one with write access, or a name of your own",
            412: "something else was committed there meanwhile: look at it, and try again",
            413: "a file is too large: publish an adapter, or a smaller picture",
        }
        again = "try again" if status is None or status >= 500 else "it does not take what was asked for"
        reason = reasons.get(status, f"{again} ({error})")
        raise OSError(f"Expected the Hub to take {repo_id}, got status {status}: {reason}.") from error
    except (HTTPError, RuntimeError) as error:  # of the connection, and of a large file on its way
        raise OSError(f"Expected to reach the Hub, got {error}: look to the network, and try again.") from error
