"""Numbers of the store of this machine."""

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from lewis import store
from lewis.store import size


def read() -> Iterator[Metric]:
    """Size by folder, what is free, and the quota if there is one."""
    folders = GaugeMetricFamily("lewis_store_bytes", "Bytes on disk in the store, by folder.", labels=["folder"])
    for name, count in size.by_folder().items():
        folders.add_metric([name], count)
    yield folders
    free = GaugeMetricFamily("lewis_store_free_bytes", "Bytes that may still be written to the store.")
    free.add_metric([], store.free_space(store.home()))
    yield free
    if (quota := size.quota()) is not None:
        limit = GaugeMetricFamily("lewis_store_quota_bytes", "How large the store may be, LEWIS_QUOTA.")
        limit.add_metric([], quota)
        yield limit
