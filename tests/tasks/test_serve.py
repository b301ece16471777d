"""The task that puts the champion into service."""

from lewis.recipe.serve import HaproxyTarget
from lewis_tasks.serve import serve


def test_a_canary_has_the_time_that_its_steps_may_take() -> None:
    servers = {"blue": "http://127.0.0.1:1", "green": "http://127.0.0.1:2"}
    target = HaproxyTarget(kind="haproxy", socket="/s", backend="b", servers=servers, prometheus="http://127.0.0.1:3")
    longest = 60 * target.patience_minutes * len(target.steps)  # by default two days
    assert serve.timeout_seconds is None or serve.timeout_seconds > longest
