"""`lewis up`, `lewis deploy` and `lewis status`: the service that keeps merged models up to date."""

import argparse
import shutil
from datetime import UTC, datetime

from lewis.redact import redacted


def up(options: argparse.Namespace) -> None:
    """Run the service, and print what its parts say."""
    from rich.console import Console
    from rich.text import Text

    from lewis_flows.service.up import up

    console, colours = Console(), {"lewis": "bold", "prefect": "blue", "mlflow": "cyan", "worker": "green"}

    def say(part: str, line: str) -> None:
        console.print(Text(f"{part:<8}", colours.get(part, "magenta")), Text.from_ansi(line), soft_wrap=True)

    def ready(urls: dict[str, str]) -> None:
        named = {"Prefect": urls["prefect"].removesuffix("/api"), "MLflow": urls["mlflow"], "Webhook": urls["webhook"]}
        print(
            "\n".join(f"{name:<8} {redacted(url)}" for name, url in named.items()) + "\nCtrl-C stops all of it",
            flush=True,
        )

    up(say, ready, options.prefect_file)


def deploy(options: argparse.Namespace) -> None:
    """Bring a Prefect server up to date."""
    from lewis_flows.service.api_key import connected
    from lewis_flows.service.servers import prefect_server

    with prefect_server() as url, connected(url):
        from lewis_flows.service import deploy

        recipes = deploy.deploy(options.prefect_file or deploy.PREFECT_YAML)
    print(f"deployed to {redacted(url)}, nightly merges of: {', '.join(recipes) or 'nothing, there are no recipes'}")


def status(options: argparse.Namespace) -> None:
    """Print the status."""
    from lewis_flows.service.status import status
    from lewis_flows.service.status_text import as_text

    found, width = status(), shutil.get_terminal_size((120, 40)).columns
    print(found.model_dump_json(indent=2) if options.json else as_text(found, datetime.now(UTC), width), end="")
