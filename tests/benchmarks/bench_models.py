"""How fast SA-GSM on BN-Inception trains and infers: our form against the plain one, measured side by side on the CPU.

    python tests/benchmarks/bench_models.py [--pixels 224] [--batch 4] [--rounds 5] [--curve-steps 50] [--json]

Contenders, with the same weights, clips (T = 8) and attention within frames:

    plain       eager float32 in contiguous memory; attention with its map written out; the published gate, with its permutes
    ours fp32   channels_last, our gate and attention
    ours bf16   the same under bfloat16 autocast; only where the CPU has bfloat16 instructions

A training step is forward, cross-entropy, backward and SGD. For inference, ours has its batch norms folded and, in bf16, keeps
its kernels in bfloat16. Each round measures every contender once, in another order; ratios are medians over the rounds of
ratios within a round, so that a machine that slows down for a while does not decide.

The loss curves of all forms over the same clips must agree within noise: two plain networks whose first weights differ by one
part in 10,000 give the scale, since training enlarges any such difference; the same curve in other rounding may differ from the
plain one by no more than three times that scale, or 5 % of the loss, on average over the steps.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models import create_model
from models.inference import fold_batch_norms
from models.temporal.attention import SelfAttention
from models.temporal.gate_shift import GateShift

NUM_SEGMENTS = 8
NUM_CLASSES = 174
TARGETS = {"train": {"ours fp32": 1.4, "ours bf16": 3.5}, "infer": {"ours bf16": 4.0}}


class PlainAttention(nn.Module):
    """The published attention: batched products around a written map."""

    def __init__(self, ours: SelfAttention) -> None:
        super().__init__()
        self.query_conv, self.key_conv, self.value_conv = ours.query_conv, ours.key_conv, ours.value_conv
        self.gamma = ours.gamma
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        num_frames, channels, height, width = x.shape
        query = self.query_conv(x).view(num_frames, -1, height * width).permute(0, 2, 1)
        key = self.key_conv(x).view(num_frames, -1, height * width)
        attention = self.softmax(torch.bmm(query, key))
        value = self.value_conv(x).view(num_frames, -1, height * width)
        out = torch.bmm(value, attention.permute(0, 2, 1)).view(num_frames, channels, height, width)
        return self.gamma * out + x


class PlainGateShift(nn.Module):
    """The published gate in its published order of permutes, copies and concatenations."""

    def __init__(self, ours: GateShift) -> None:
        super().__init__()
        self.num_segments = ours.num_segments
        self.conv3D = ours.conv3D
        self.bn = nn.BatchNorm3d(ours.bn.num_features)
        self.bn.load_state_dict(ours.bn.state_dict())
        self.attn = PlainAttention(ours.attn) if isinstance(ours.attn, SelfAttention) else ours.attn

    def forward(self, x: Tensor) -> Tensor:
        num_frames, channels, height, width = x.shape
        batch = num_frames // self.num_segments
        x = x.view(batch, self.num_segments, channels, height, width).permute(0, 2, 1, 3, 4).contiguous()
        gate = torch.tanh(self.conv3D(functional.relu(self.bn(x))))
        x1, x2 = x[:, : channels // 2], x[:, channels // 2 :]
        y1, y2 = gate[:, 0].unsqueeze(1) * x1, gate[:, 1].unsqueeze(1) * x2
        r1, r2 = x1 - y1, x2 - y2
        zero = x.new_zeros(batch, channels // 2, 1, height, width)
        z1 = torch.cat((y1[:, :, 1:], zero), dim=2) + r1
        z2 = torch.cat((zero, y2[:, :, :-1]), dim=2) + r2
        shape = (batch, 2, channels // 4, self.num_segments, height, width)
        z1, z2 = (z.view(shape).permute(0, 2, 1, 3, 4, 5).contiguous().view_as(x1) for z in (z1, z2))
        z = torch.cat((z1, z2), dim=1).permute(0, 2, 1, 3, 4).contiguous()
        return self.attn(z.view(num_frames, channels, height, width))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=224, help="side of the clips that are timed")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--curve-steps", type=int, default=50, help="steps of the loss curves; 0 leaves them out")
    parser.add_argument("--curve-pixels", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plain, ours = networks()
    clips = make_clips(arguments.batch, arguments.pixels)
    report: dict[str, Any] = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "bf16": bf16_flags()},
        "versions": {"torch": version("torch")},
        "settings": vars(arguments),
        "train": measure(training(plain, ours, clips), arguments.rounds),
        "infer": measure(inference(plain, ours, clips), arguments.rounds),
    }
    if arguments.curve_steps:
        report["curves"] = compare_curves(arguments.curve_steps, arguments.batch, arguments.curve_pixels)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print_table(report)


def bf16_flags() -> list[str]:
    """The CPU's instructions for bfloat16, as Linux names them."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.exists() else set()
    return sorted(words & {"avx512_bf16", "amx_bf16", "bf16"})


def networks() -> tuple[nn.Module, nn.Module]:
    """The plain form and ours with the same weights; gates and gammas are not zero."""
    torch.manual_seed(0)
    ours = create_model("sa_gsm_bn_inception", num_classes=NUM_CLASSES, num_segments=NUM_SEGMENTS, dropout=0.0)
    for name, parameter in ours.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, 0.1)
        elif name.endswith("conv3D.weight") or "query_conv" in name or "key_conv" in name:
            nn.init.normal_(parameter, std=0.01)
    plain = copy.deepcopy(ours)
    for name, module in list(plain.named_modules()):
        if isinstance(module, GateShift):
            plain.set_submodule(name, PlainGateShift(module))
    for module in ours.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return plain, ours


def make_clips(batch: int, pixels: int) -> Tensor:
    """Bytes of moving noise."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, NUM_SEGMENTS, 3, pixels, pixels), dtype=torch.uint8, generator=generator)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, clips: Tensor, labels: Tensor, bf16: bool) -> float:
    """One update; its loss."""
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(clips)
    loss = functional.cross_entropy(logits.float(), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def training(plain: nn.Module, ours: nn.Module, clips: Tensor) -> dict[str, Callable[[], object]]:
    """A training step of each contender."""
    labels = torch.arange(len(clips)) % NUM_CLASSES

    def run(model: nn.Module, inputs: Tensor, bf16: bool) -> Callable[[], object]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        return lambda: step(model, optimizer, inputs, labels, bf16)

    prepared = ours.prepare(clips)
    contenders = {"plain": run(plain, prepared.contiguous(), False), "ours fp32": run(ours, prepared, False)}
    return contenders | ({"ours bf16": run(ours, prepared, True)} if bf16_flags() else {})


def inference(plain: nn.Module, ours: nn.Module, clips: Tensor) -> dict[str, Callable[[], object]]:
    """A forward pass of each contender in eval mode."""
    folded = fold_batch_norms(ours)
    plain = copy.deepcopy(plain).eval()

    def run(model: nn.Module, inputs: Tensor, bf16: bool) -> Callable[[], object]:
        def forward() -> None:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                model(inputs)

        return forward

    prepared = ours.prepare(clips)
    contenders = {"plain": run(plain, prepared.contiguous(), False), "ours fp32": run(folded, prepared, False)}
    if bf16_flags():
        contenders["ours bf16"] = run(fold_batch_norms(ours, kernel_dtype=torch.bfloat16), prepared, True)
    return contenders


def measure(contenders: dict[str, Callable[[], object]], num_rounds: int) -> dict[str, Any]:
    """Seconds of each contender in each round, their medians, and the median ratio of the plain form's to each."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for contender in contenders.values():
        contender()
    for number in range(num_rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - start)
    return {
        "seconds": {name: statistics.median(seconds[name]) for name in names},
        "times_plain": {
            name: statistics.median(other / mine for mine, other in zip(seconds[name], seconds["plain"], strict=True))
            for name in names[1:]
        },
        "rounds": seconds,
    }


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers that leave others as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def compare_curves(num_steps: int, batch: int, pixels: int) -> dict[str, Any]:
    """Mean distance of each loss curve to the plain one, over the mean loss; "noise" is a plain network that was nudged."""
    clips = make_clips(2 * batch, pixels)
    labels = torch.arange(2 * batch) % NUM_CLASSES

    def curve(model: nn.Module, inputs: Tensor, bf16: bool) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        halves = [(inputs[:batch], labels[:batch]), (inputs[batch:], labels[batch:])]
        return [step(model, optimizer, *halves[number % 2], bf16) for number in range(num_steps)]

    plain, ours = networks()
    nudged = copy.deepcopy(plain)
    with seeded(2), torch.no_grad():
        for parameter in nudged.parameters():
            parameter.mul_(1 + 1e-4 * torch.randn_like(parameter))
    prepared = ours.prepare(clips)
    runs = {"plain": (plain, prepared.contiguous(), False), "noise": (nudged, prepared.contiguous(), False)}
    runs["ours fp32"] = (copy.deepcopy(ours), prepared, False)
    if bf16_flags():
        runs["ours bf16"] = (ours, prepared, True)
    curves = {name: curve(*run) for name, run in runs.items()}
    scale = statistics.mean(curves["plain"])
    distances = {
        name: statistics.mean(abs(a - b) for a, b in zip(losses, curves["plain"], strict=True)) / scale
        for name, losses in curves.items()
        if name != "plain"
    }
    allowed = max(3 * distances["noise"], 0.05)
    agree = {name: distance <= allowed for name, distance in distances.items() if name != "noise"}
    return {"distances": distances, "allowed": allowed, "agree": agree, "losses": curves}


def print_table(report: dict[str, Any]) -> None:
    """Print medians, ratios and whether the targets are reached, a line a contender."""
    settings, machine = report["settings"], report["machine"]
    bf16 = ", ".join(machine["bf16"]) or "none"
    print(
        f"SA-GSM, BN-Inception, {settings['batch']} clips of {NUM_SEGMENTS} x {settings['pixels']} px, "
        f"{settings['rounds']} rounds, {settings['threads']} threads of {machine['cores']} cores, bfloat16: {bf16}"
    )
    for kind in ("train", "infer"):
        for name, seconds in report[kind]["seconds"].items():
            ratio, target = report[kind]["times_plain"].get(name), TARGETS[kind].get(name)
            against = f"{ratio:5.2f} x plain" if ratio else ""
            goal = f"  target {target} x: {'reached' if ratio >= target else 'missed'}" if ratio and target else ""
            print(f"{kind:<6} {name:<10} {seconds:7.3f} s  {against}{goal}")
    if "curves" in report:
        curves = report["curves"]
        for name, losses in curves["losses"].items():
            distance = f", {curves['distances'][name]:.2%} from plain" if name in curves["distances"] else ""
            print(f"loss   {name:<10} {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps{distance}")
        print(f"loss curves agree within {curves['allowed']:.2%}: {all(curves['agree'].values())}")


if __name__ == "__main__":
    main()
