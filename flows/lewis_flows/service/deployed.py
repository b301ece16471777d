"""Keep the deployments equal to the folder of recipes, while `lewis up` runs."""

from collections.abc import Callable
from pathlib import Path

import httpx

from lewis.errors import LewisError
from lewis_flows import polls, recipes_folder
from lewis_flows.service import deploy, orphaned_runs, worker
from lewis_flows.service.schedules import Folder
from lewis_flows.turn import crash_dead_runs
from lewis_tasks.support import moves


class Deployed:
    """What was deployed last, and the folder that it follows."""

    def __init__(self, say: Callable[[str], None], prefect_file: Path | None = None) -> None:
        """Deploy nothing yet.

        Args:
            say: called with what is done.
            prefect_file: what to deploy; by default, the `prefect.yaml` that comes with the project.
        """
        self._say, self._file = say, prefect_file or deploy.PREFECT_YAML
        self._folder, self._recipes, self._told = Folder(), list[str](), ""

    def begin(self) -> None:
        """Bring the server up to date after a start of the service: deployments, runs that died, missed polls.

        Raises:
            InputError, LewisError: as `deploy.deploy`.
        """
        self._say("deploying")
        crash_dead_runs()
        polls.drop_missed()
        recipes_folder.make()
        self._deploy(self._folder.runnable())
        self.worker_died()  # if there was one, it is not there now
        moves.tell()

    def worker_died(self) -> None:
        """Bring the server up to date after the worker of `lewis up` has died: what it had not begun is to be run."""
        orphaned_runs.give_back(worker.name_of_up())

    def follow(self) -> None:
        """Deploy again if other recipes can run than those that were deployed.

        What does not succeed is told, and done at a later call: the folder or the server may be away for a moment.
        """
        try:
            if (now := self._folder.runnable()) != self._recipes:
                self._deploy(now)
            self._told = ""
        except (LewisError, httpx.HTTPError) as error:
            if (told := f"the recipes could not be deployed; trying again: {error}") != self._told:
                self._say(told)
            self._told = told

    def _deploy(self, recipes: list[str]) -> None:
        deploy.deploy(self._file, recipes)
        self._recipes = recipes
        self._say(f"recipes in {recipes_folder.folder()}: {', '.join(recipes) or 'none'}")
