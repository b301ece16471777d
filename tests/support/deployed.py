"""Deployments on the tests' Prefect server, for as long as a test needs them."""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from lewis_flows.service import deploy, recipe_deployments


@contextmanager
def deploying(url: str) -> Iterator[SyncPrefectClient]:
    """A client of a server with our work pool; without our deployments and their automations at the end."""
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        deploy._put_pool(client, deploy.POOL)
        yield client
        recipe_deployments.remove_stale(client, [])
        for each in client.read_automations():  # a test that deletes a deployment itself leaves them
            client.delete_automation(each.id)
        client.delete_work_pool(deploy.POOL)
