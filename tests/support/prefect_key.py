"""The key of the Prefect servers that tests start, and the header that a request shows it, or MLflow's password, in."""

import base64

KEY = "tests:the key of every Prefect server that the tests start"


def credentials(key: str = KEY) -> dict[str, str]:
    """The header that Prefect's API asks for; MLflow's, of `user:password`."""
    return {"Authorization": f"Basic {base64.b64encode(key.encode()).decode()}"}
