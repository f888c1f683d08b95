"""What `cluster check` says of nodes is tested in tests/end_to_end; here a node that dies while it is asked."""

from pathlib import Path

import pytest

from infra import cluster, cluster_check
from infra.cluster_findings import Question

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),  # of Ray's nodes
]

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}


def test_a_node_that_dies_while_it_is_asked_breaks_no_run(tmp_path, monkeypatch):
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={**NODE, "node_name": "stays"})
    Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)  # else every `ray.init()` on this machine joins this cluster
    gathered = cluster_check._gathered

    def die_first(answers):  # before its process, which was asked a moment ago, is up
        made.remove_node(dying, allow_graceful=False)
        return gathered(answers)

    try:
        dying = made.add_node(**NODE, node_name="dies")
        monkeypatch.setattr(cluster_check, "_gathered", die_first)
        with cluster.session(made.address):
            found = cluster_check.require_fit(Question(folders={"store": str(tmp_path)}, raw=None), made.address)
    finally:
        ray.shutdown()
        made.shutdown()
    assert "dies: it died while it was asked; a run goes on without it" in map(str, found)
