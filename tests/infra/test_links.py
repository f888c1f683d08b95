from infra.links import compare_url, run_url, runs_url


def test_addresses() -> None:
    base = "http://127.0.0.1:5000/"
    assert runs_url(base, "1") == "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning"
    assert runs_url(base, "1", stage="trial", order_by="val/top1", charts=True) == (
        "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning"
        "&searchFilter=tags.stage%3D%22trial%22&orderByKey=metrics.%60val%2Ftop1%60&orderByAsc=false&compareRunsMode=CHART"
    )
    assert (
        run_url(base, "1", "r", "report/index.html")
        == "http://127.0.0.1:5000/#/experiments/1/runs/r/artifacts/report/index.html"
    )
    assert compare_url(base, "1", ["a", "b"]) == (
        "http://127.0.0.1:5000/#/compare-runs?runs=%5B%22a%22%2C%20%22b%22%5D&experiments=%5B%221%22%5D"
    )
