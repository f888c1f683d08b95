from infra.links import run_url, runs_url, trials_url

BASE = "http://127.0.0.1:5000/"


def test_addresses() -> None:
    table = "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning&searchFilter=tags.stage%20"
    assert runs_url(BASE, "1") == f"{table}%21%3D%20%22trial%22"
    assert trials_url(BASE, "1", "val/top1") == (
        f"{table}%3D%20%22trial%22&orderByKey=metrics.%60val%2Ftop1%60&orderByAsc=false"
    )
    page = "http://127.0.0.1:5000/#/experiments/1/runs/r"
    assert run_url(BASE, "1", "r") == f"{page}?workflowType=machine_learning"
    assert run_url(BASE, "1", "r", "report/index.html") == f"{page}/artifacts/report/index.html?workflowType=machine_learning"
