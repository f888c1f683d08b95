import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from infra.errors import PipelineError
from models import create_model
from pipelines.training.metrics import Sums
from pipelines.training.run import set_up
from pipelines.training.step import any_rank, forward, take_step

CPU = torch.device("cpu")


def plain_net(tiny):
    return tiny.make_tiny_net(with_norm=False, dropout=0.0)


def make_run(tiny, loader, **changes):
    return set_up(plain_net(tiny), loader, tiny.tiny_settings(**changes), CPU, None, {})


def parameters_after(tiny, num_steps, loader, **changes):
    run = make_run(tiny, loader, **changes)
    sums = Sums(CPU)
    for step, batch in zip(range(num_steps), loader, strict=False):
        take_step(run, batch, step, sums)
    return run.state.model.state_dict(), sums.means()


@pytest.mark.parametrize(("num_clips", "micro"), [(40, 2), (40, 4), (38, 3), (33, 5)])
def test_micro_batches_equal_one_big_batch(tiny, num_clips, micro):
    big, big_means = parameters_after(tiny, 4, tiny.MemoryLoader(num_clips, batch_size=8), batch_size=8)
    small, means = parameters_after(tiny, 4, tiny.MemoryLoader(num_clips, batch_size=8), batch_size=micro)
    for name, tensor in big.items():
        torch.testing.assert_close(small[name], tensor, rtol=0, atol=1e-6)
    assert means.loss == pytest.approx(big_means.loss, abs=1e-6)
    assert (means.top1, means.num_clips) == (big_means.top1, big_means.num_clips)


def test_a_step_of_two_micro_batches_by_hand(tiny):
    """With the published clipping after each micro batch, and with ours."""
    batch = next(iter(tiny.MemoryLoader(8, batch_size=8)))
    for each in (True, False):
        run = make_run(
            tiny,
            tiny.MemoryLoader(8, batch_size=8),
            gradient_clip=0.05,
            compat={"clip_each_micro_batch": each},
            warmup_epochs=0,
        )
        take_step(run, batch, 0, Sums(CPU))
        model = plain_net(tiny)
        for part in (slice(0, 4), slice(4, 8)):
            losses = cross_entropy(model(model.prepare(batch.clips[part])), batch.labels[part], reduction="sum") / 8
            losses.backward()
            if each or part.stop == 8:
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        for name, parameter in run.state.model.named_parameters():
            torch.testing.assert_close(parameter.grad, model.get_parameter(name).grad)
        assert sum(parameter.grad.square().sum() for parameter in model.parameters()).sqrt() == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize(("num_micro", "share"), [(1, 1.0), (2, 0.75), (4, 0.625)])
def test_the_published_loss_is_that_of_what_has_been_accumulated(tiny, num_micro, share):
    """Equal clips have equal losses, so that the mean of the partial sums is (k + 1) / 2k of the truth."""
    loader = tiny.MemoryLoader(8, batch_size=8)
    loader.clips[:], loader.labels[:] = loader.clips[0].clone(), 0
    options = {"batch_size": 8 // num_micro}
    published = parameters_after(tiny, 1, loader, **options, compat={"logged_loss": True})[1]
    truth = parameters_after(tiny, 1, loader, **options)[1]
    assert published.loss == pytest.approx(share * truth.loss)
    assert published.top1 == truth.top1


@pytest.mark.parametrize("changes", [{"mixup_alpha": 0.5}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 0.5, "cutmix_alpha": 1.0}])
def test_mixing_depends_on_seed_and_step_only_and_changes_the_loss(tiny, changes):
    batch = next(iter(tiny.MemoryLoader(4)))

    def losses(step, seed=0, **changes):
        torch.manual_seed(123)
        return take_step(make_run(tiny, tiny.MemoryLoader(4), seed=seed, **changes), batch, step, Sums(CPU))

    assert torch.equal(losses(3, **changes), losses(3, **changes))
    assert not torch.equal(losses(3, **changes), losses(4, **changes))
    assert not torch.equal(losses(3, **changes), losses(3, seed=1, **changes))
    assert not torch.equal(losses(3, **changes), losses(3))


@pytest.mark.parametrize("changes", [{"mixup_alpha": 0.5}, {"cutmix_alpha": 1.0}])
def test_mixed_frames_stay_in_channels_last_memory(tiny, changes):
    model = create_model("tsn_resnet18", num_classes=3, num_segments=2)
    layouts = []
    model.base_model.register_forward_pre_hook(
        lambda module, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    loader = tiny.LargeLoader(4)
    run = set_up(model, loader, tiny.tiny_settings(**changes), CPU, None, {})
    take_step(run, next(iter(loader)), 0, Sums(CPU))
    assert layouts == [True]


def test_a_step_in_fp16_whose_gradient_overflows_is_left_out_and_scales_less(tiny):
    run = make_run(tiny, tiny.MemoryLoader(4), precision="fp16", epochs=20)
    batch, scaler, weight = next(iter(tiny.MemoryLoader(4))), run.state.scaler, run.state.model.linear.weight
    weight.register_hook(lambda gradient: gradient * (float("inf") if scaler.get_scale() > 2**14 else 1))
    scales, moved = [], []
    for step in range(5):
        before = weight.detach().clone()
        assert take_step(run, batch, step, Sums(CPU)).isfinite().all()
        scales.append(scaler.get_scale())
        moved.append(not torch.equal(weight, before))
    assert scales == [2**15, 2**14, 2**14, 2**14, 2**14]
    assert moved == [False, False, True, True, True]


def test_a_gradient_in_fp16_that_no_scale_helps_stops_the_training(tiny):
    run = make_run(tiny, tiny.MemoryLoader(4), precision="fp16", epochs=60)
    run.state.model.linear.weight.register_hook(lambda gradient: gradient * float("inf"))
    batch, sums = next(iter(tiny.MemoryLoader(4))), Sums(CPU)
    for step in range(16):  # 65536 = 2 ** 16 is the first scale
        take_step(run, batch, step, sums)
    with pytest.raises(PipelineError, match=r"the gradient \(norm (nan|inf)\) is not finite in step 16"):
        take_step(run, batch, 16, sums)


def test_logits_are_float32_and_one_process_votes_for_itself(tiny):
    run = make_run(tiny, tiny.MemoryLoader(4), precision="bf16")
    logits = forward(run, run.network, run.state.model.prepare(tiny.MemoryLoader(4).clips))
    assert logits.dtype == torch.float32
    assert (any_rank(True, CPU), any_rank(False, CPU)) == (True, False)
