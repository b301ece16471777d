import json, os, sys, time
import pytest
from tests.flows.conftest import *
from tests.conftest import *

NO = ("--set", "evaluate=null", "--set", "register.gate=null")
PU = []


@pytest.fixture(autouse=True)
def pu(prefect_url):
    PU[:] = [prefect_url]


@pytest.mark.parametrize("name", os.environ.get("R", "thread,process,dask,ray").split(","))
def test_r(name, lewis, recipe, home):
    t = time.time()
    p = lewis("run", recipe, "--json", *NO, LEWIS_TASK_RUNNER=name, LEWIS_DEVICE_SLOTS="2")
    out, err = p.communicate(timeout=200)
    open(f"/tmp/sc/out-{name}.log", "w").write(out + "\n=====\n" + err)
    print(name, round(time.time() - t, 1), p.returncode, out[:300])
    from prefect.settings import PREFECT_API_URL, temporary_settings
    import httpx, collections

    url = os.environ.get("X")
    runs = httpx.post(
        lewis.__closure__ and PU[0] + "/task_runs/filter", json={"sort": "EXPECTED_START_TIME_DESC", "limit": 200}
    ).json()
    fr = runs[0]["flow_run_id"]
    runs = [r for r in runs if r["flow_run_id"] == fr]
    names = {r["id"]: r["name"] for r in runs}
    for r in sorted(runs, key=lambda r: r["name"]):
        print(
            "   ",
            r["name"].replace("/tmp/pytest-of-root", ""),
            r["state_name"],
            (r["start_time"] or "")[14:23],
            (r["end_time"] or "")[14:23],
            sorted({names.get(x.get("id"), "?").split("/")[-1] for v in r["task_inputs"].values() for x in v}),
        )
    assert p.returncode == 0, err[-3000:]
