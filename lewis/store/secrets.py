"""Secrets in the store: each is made when it is first needed, in a file that only its owner may read."""

from dataclasses import dataclass
from pathlib import Path
from secrets import token_urlsafe

from lewis import settings
from lewis.errors import InputError
from lewis.settings import ONE_LINE, Setting
from lewis.store.files import lock, written_beside
from lewis.store.folders import home


@dataclass(frozen=True)
class Secret:
    """A secret, which is read from an environment variable or from a file in the store.

    Attributes:
        name: the file's name in the store.
        variable: the environment variable, which overrides the file.
        fix: what to do about a file that cannot be used, for error messages.
        prefix: what a new secret begins with.
    """

    name: str
    variable: Setting[str]
    fix: str
    prefix: str = ""

    def path(self) -> Path:
        """The path of the secret's file, whether or not it exists."""
        return home() / self.name

    def read(self) -> str:
        """Return the secret from the environment variable or the file; make the file if both are missing.

        Raises:
            InputError: if others may read the file, it is another user's, or it is empty.
        """
        if given := self.variable.get():
            return given
        file = self.path()
        if not file.exists():  # else the store may be read-only
            with lock(self.name):
                if not file.exists():
                    with written_beside(file, private=True) as beside:
                        beside.write_text(f"{self.prefix}{token_urlsafe(32)}\n")
        if file.stat().st_mode & 0o077:
            raise InputError(f"{file}: others may read it: expected mode 0600; {self.fix}")
        try:
            found = file.read_text().strip()
        except PermissionError as error:
            raise InputError(
                f"{file}: it is another user's; set {self.variable.name} to the same secret, or LEWIS_HOME to a store "
                "of your own"
            ) from error
        if not found:
            raise InputError(f"{file}: it is empty; {self.fix}")
        return found


PREFECT_KEY = Secret(
    "prefect-api-key",
    Setting("PREFECT_SERVER_API_AUTH_STRING", ONE_LINE, "", "What Prefect's server asks for.", secret=True),
    "remove it, and start `lewis up` again",
    prefix="lewis:",
)
MLFLOW_PASSWORD = Secret(
    "mlflow-password",
    Setting("MLFLOW_AUTH_ADMIN_PASSWORD", ONE_LINE, "", "What MLflow's server asks for.", secret=True),
    "remove it, and start `lewis up` again",
)
WEBHOOK_SECRET = Secret(
    "webhook-secret", settings.WEBHOOK_SECRET, "remove it, and enter the new secret at the webhook on the Hub"
)
METRICS_KEY = Secret("metrics-key", settings.METRICS_KEY, "remove it, and give Prometheus the new key")
SERVE_SECRET = Secret("serve-secret", settings.SERVE_SECRET, "remove it, and give the new one to the receiver")

UP_SERVE_KEY = Secret("champion-key", settings.UP_SERVE_KEY, "remove it, and start `lewis up --serve` again")


def files() -> list[Path]:
    """Return the paths of the secret files that exist in the store."""
    known = (PREFECT_KEY, MLFLOW_PASSWORD, WEBHOOK_SECRET, METRICS_KEY, SERVE_SECRET, UP_SERVE_KEY)
    return [each.path() for each in known if each.path().exists()]
