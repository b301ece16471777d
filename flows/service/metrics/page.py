"""The page of metrics: all sources at once, in Prometheus's text format."""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lewis_flows.service.metrics import of_prefect, of_registry, of_store
from lewis_flows.service.metrics.source import Source


def default_sources() -> list[Source]:
    """Prefect's server, the registry, and the store of this machine."""
    runs = of_prefect.Steps()
    return [
        Source("prefect", lambda: of_prefect.read(runs), 15.0),
        Source("mlflow", of_registry.read, 60.0),
        Source("store", of_store.read, 300.0),
    ]


class Page(Collector):
    """Makes the page; threads may share it."""

    def __init__(self, sources: Sequence[Source]) -> None:
        """Make pages of the numbers of some sources."""
        self._sources = sources
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> bytes:
        """The page, in the text format 0.0.4."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing: registering must not ask the sources."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Ask all sources at once, and give what they say."""
        for source in self._sources:
            source.ask()
        answers = GaugeMetricFamily("lewis_source_up", "Whether what the numbers come from answers.", labels=["source"])
        for source in self._sources:
            yield from source.latest()
            answers.add_metric([source.name], float(source.up))
        yield answers
