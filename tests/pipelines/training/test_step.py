import doctest
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from infra.errors import PipelineError
from models import attention_slots, create_model
from pipelines.training import step as step_module
from pipelines.training.metrics import Sums
from pipelines.training.run import set_up
from pipelines.training.step import any_rank, forward, placement_of_step, take_step

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


SLOTS = tuple("abcdefghij")


def test_every_subset_of_the_slots_is_equally_likely_and_only_seed_and_step_decide():
    drawn = Counter(placement_of_step(3, step, SLOTS[:3]) for step in range(8000))
    assert len(drawn) == 8
    assert max(abs(count - 1000) for count in drawn.values()) < 150  # five standard deviations
    assert [placement_of_step(3, step, SLOTS) for step in range(50)] == [
        placement_of_step(3, step, SLOTS) for step in range(50)
    ]
    assert [placement_of_step(4, step, SLOTS) for step in range(50)] != [
        placement_of_step(3, step, SLOTS) for step in range(50)
    ]
    both = Counter(("a" in found, "j" in found) for found in (placement_of_step(0, step, SLOTS) for step in range(4000)))
    assert max(abs(count - 1000) for count in both.values()) < 150
    assert doctest.testmod(step_module).failed == 0


def test_a_step_trains_the_attention_of_its_own_slots_only(tiny):
    """Neither momentum nor decay touches the others."""
    torch.manual_seed(0)
    model = create_model("sa_gsm_resnet18", num_classes=3, num_segments=2)
    slots = attention_slots(model)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)
    run = set_up(model, tiny.LargeLoader(12), tiny.tiny_settings(random_placement=True, weight_decay=0.1), CPU, None, {})
    seen = []
    for step, batch in enumerate(run.train_loader):
        before = {name: values.clone() for name, values in model.state_dict().items()}
        take_step(run, batch, step, Sums(CPU))
        moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        chosen = placement_of_step(run.settings.seed, step, slots).split(",")
        owners = {name: name.removeprefix("base_model.").split(".gsm.attn.")[0] for name in moved if ".attn." in name}
        assert set(owners.values()) == set(chosen)
        for slot in chosen:
            attention = f"base_model.{slot}.gsm.attn"
            assert {f"{attention}.{name}" for name in ("gamma", "query_conv.weight", "value_conv.weight")} <= moved
        seen.append(chosen)
    assert seen[0] != seen[1]


def test_ranks_agree_on_the_placement_and_on_the_weights(tiny, tmp_path):
    """Of two ranks, each with half of the clips, and of one, with the norms frozen; though each step leaves out other slots."""
    script = """
        from models import create_model
        from pipelines.training.metrics import Sums
        from pipelines.training.run import set_up
        from pipelines.training.step import take_step
        folder = Path(sys.argv[1])

        def work(rank, world_size=2):
            torch.manual_seed(0)
            model = create_model("sa_gsm_resnet18", num_classes=3, num_segments=2, dropout=0.0)
            loader = tiny.LargeLoader(12, batch_size=4 // world_size, rank=rank, world_size=world_size)
            settings = tiny.tiny_settings(random_placement=True, batch_norm="frozen", learning_rate=0.01)
            run = set_up(model, loader, settings, torch.device("cpu"), None, {})
            run.network.eval()
            for step, batch in enumerate(loader):
                take_step(run, batch, step, Sums(run.device))
            torch.save(model.state_dict(), folder / f"{world_size}-{rank}.pt")

        tiny.on_ranks(folder / "group", 2, work)
        work(0, world_size=1)
    """
    tiny.run_script(script, tmp_path)
    first, second, alone = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("2-0", "2-1", "1-0"))
    assert all(torch.equal(values, second[name]) for name, values in first.items())
    assert any(values.item() for name, values in alone.items() if name.endswith("gamma"))
    for name, values in alone.items():
        torch.testing.assert_close(first[name], values, rtol=1e-3, atol=1e-5)
