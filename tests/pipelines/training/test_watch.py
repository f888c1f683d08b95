import time

import pytest
import torch
from torch import nn

from models import create_model
from pipelines.training.watch import (
    Stopwatch,
    attention_gammas,
    dead_gates,
    gate_norms,
    gates_of,
    mean_gates,
    peak_memory_bytes,
    slot_of,
)


def test_gammas_and_gates_are_named_by_slot():
    model = create_model("sa_gsm_bn_inception", num_classes=3, num_segments=2, placement="3c,4e")
    assert attention_gammas(model) == {"3c": 0.0, "4e": 0.0}
    slots = ("3a", "3b", "3c", "4a", "4b", "4c", "4d", "4e", "5a", "5b")
    assert gate_norms(model) == {f"{slot}_weight_norm": 0.0 for slot in slots}
    divided = create_model("sa_gsm_resnet18", num_classes=3, num_segments=2, placement="layer1.0", scope="divided")
    assert set(attention_gammas(divided)) == {"layer1.0", "layer1.0_temporal"}
    assert slot_of("base_model.gsm_mixed_3_tower_conv_Conv2D") == "mixed_3"
    assert slot_of("gamma") == "gamma"


def test_the_mean_of_a_gate_is_that_of_its_output():
    model = create_model("gsm_bn_inception", num_classes=3, num_segments=2).eval()
    gate = model.base_model.gsm_inception_3a_1x1
    nn.init.constant_(gate.conv3D.bias, 0.5)
    found = {}
    with torch.no_grad(), mean_gates(model, found):
        for scale in (1.0, 9.0):  # only the first pass counts
            model(scale * torch.ones(1, 2, 3, 32, 32))
    assert found.pop("3a_mean_abs") == pytest.approx(torch.tanh(torch.tensor(0.5)).item())
    assert set(found.values()) == {0.0}
    assert len(found) == 9
    assert not gate._forward_pre_hooks


def trained_state(tiny):
    state = tiny.tiny_state(tiny.make_tiny_net())
    start = {name: gate.detach().clone() for name, gate in gates_of(state.model).items()}
    batch = next(iter(tiny.MemoryLoader()))
    state.model(state.model.prepare(batch.clips)).square().sum().backward()
    state.optimizer.step()
    return state, start


def test_a_gate_that_training_moves_is_no_cause_for_alarm(tiny):
    state, start = trained_state(tiny)
    assert dead_gates(state.model, state.optimizer, start, gamma_is_frozen=False) == []


def test_every_way_of_being_dead_is_named(tiny):
    state, start = trained_state(tiny)
    model, optimizer = state.model, state.optimizer

    def alarm(**options):
        return dead_gates(model, optimizer, start, **{"gamma_is_frozen": False} | options)

    start["gamma"] = model.gamma.detach().clone()
    assert alarm() == ["gamma has not moved since training began"]
    model.gamma.grad.zero_()
    assert alarm() == ["gamma has no gradient"]
    model.gamma.grad = None
    assert alarm() == ["gamma has no gradient"]
    del optimizer.state[model.gamma]
    assert alarm() == ["gamma has no optimiser state"]
    for group in optimizer.param_groups:  # the published fault, by hand
        group["params"] = [parameter for parameter in group["params"] if parameter is not model.gamma]
    assert alarm() == ["gamma is in no optimiser group"]
    assert alarm(gamma_is_frozen=True) == []


def test_training_warns_of_a_gamma_that_it_does_not_move(tiny, caplog, monkeypatch):
    """The published fault in the whole loop: gamma taken out of the optimiser before the first step."""

    def without_gamma(model, settings):
        optimizer = build(model, settings)
        optimizer.param_groups = [group for group in optimizer.param_groups if group["role"] != "gamma"]
        return optimizer

    from pipelines.training.optim import build_optimizer as build

    assert tiny.train_tiny(None).history[-1].dead_gates == []
    assert "dead gate" not in caplog.text
    monkeypatch.setattr("pipelines.training.run.build_optimizer", without_gamma)
    result = tiny.train_tiny(None)
    assert [epoch.dead_gates for epoch in result.history] == [["gamma is in no optimiser group"]] * 2
    assert result.history[0].to_dict()["weights/dead_gates"] == 1
    assert "dead gate after epoch 0: gamma is in no optimiser group; it adds nothing to the network" in caplog.text


def test_a_gamma_that_is_frozen_on_purpose_is_not_warned_of(tiny):
    result = tiny.train_tiny(None, settings={"compat": {"freeze_gamma": True}})
    assert result.history[-1].dead_gates == []
    assert result.history[-1].gammas == {"gamma": 0.0}


def test_waiting_is_told_from_working():
    def slow():
        for number in range(3):
            time.sleep(0.02)
            yield number

    watch = Stopwatch(seconds=10.0, waited=1.0)
    for _ in watch.waiting_for(slow()):
        time.sleep(0.04)
    assert watch.waited >= 1.06
    assert watch.seconds - 10.0 >= watch.waited - 1.0 + 0.12


def test_peak_memory_is_that_of_a_process_with_torch():
    assert 50e6 < peak_memory_bytes() < 1e12
