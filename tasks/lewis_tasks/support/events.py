"""Send events to Prefect's server."""

from collections.abc import Mapping
from typing import Any

from lewis.errors import InputError, LewisError, TransientError

_PATIENCE = 10.0  # seconds for one request; the caller tries again, so the client does not


def post(event: Mapping[str, Any]) -> None:
    """Send an event; returns when the server has taken it, which does not mean that it has stored it.

    Raises:
        TransientError: the server is unreachable or busy.
        LewisError: the server refuses it.
        InputError: there is no server to ask.
    """
    # Not Prefect's emit_event: it sends from a thread, and an event that is lost there raises no error.
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    url = PREFECT_API_URL.value()
    if not url:
        raise InputError("PREFECT_API_URL is not set: there is no server to tell of a release; start `lewis up`")
    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client(sync_client=True, httpx_settings={"timeout": _PATIENCE}) as client,
        ):
            client.request("POST", "/events", json=[dict(event)])
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise LewisError(
                f"Prefect refuses the event ({status}): check PREFECT_API_AUTH_STRING or its key"
            ) from None
        kind = TransientError if status >= 500 or status in (408, 429) else LewisError
        raise kind(f"Prefect did not take the event: it answered {status}; look at its server's log") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise TransientError(f"Prefect did not take the event ({type(error).__name__}); is its server up?") from None
