"""What goes on inside a network, as parts of the page: where attention looks, how far gates open, what raised an answer."""

from collections.abc import Sequence

import numpy as np

from pipelines.evaluation.films import FilmClip, save_film
from pipelines.evaluation.gate_figures import draw_gates
from pipelines.evaluation.grad_cam import Strip, draw_grad_cam
from pipelines.insight.inside import ClipInside, Inside
from pipelines.insight.section import Column, Film, Picture, Section, Table
from pipelines.insight.subject import Subject
from pipelines.reports.page import percent


def inside_sections(subject: Subject, inside: Inside) -> list[Section]:
    """Where attention looks, how far gates open, what raised the answers; the first two of networks that have them."""
    sections = []
    if inside.attention:
        sections.append(_attention_section(subject, inside))
    if inside.gates:
        sections.append(_gates_section(subject, inside))
    if inside.pairs:
        sections.append(_grad_cam_section(subject, inside))
    return sections


def _attention_section(subject: Subject, inside: Inside) -> Section:
    strongest = max(inside.attention, key=lambda name: abs(inside.attention[name][0]))
    gamma, spread = inside.attention[strongest]
    if gamma == 0:
        sentence = f"Every gamma is 0: attention, at {', '.join(inside.attention)}, adds nothing."
    else:
        sentence = (
            f"Attention at {strongest} counts most (gamma {gamma:+.3g}); its looks are spread over {percent(spread)} of the "
            "places of a clip, where 100 % is all alike."
        )
    rows = [{"slot": name, "gamma": gamma, "spread": spread} for name, (gamma, spread) in inside.attention.items()]
    columns = (Column("slot", "slot"), Column("gamma", "gamma", "number"), Column("spread", "looks are spread over", "percent"))
    return Section(
        title="Where attention looks",
        sentence=sentence,
        text=(
            "Each place of a film is covered as much as it is looked at, times |gamma|, on one scale for all films. "
            f"How far looks are spread is the mean over {inside.num_measured:,} clips."
        ),
        films=[_film(subject, number, pair) for number, pair in enumerate(inside.pairs, start=1)],
        tables=[
            Table("attention", f"gamma and spread of {len(rows)}, in the order in which a frame passes them", columns, rows)
        ],
        metrics={"insight/attention_spread": spread},
        doubts=["Attention shows from where a slot takes what it adds, not what decided the answer."],
    )


def _film(subject: Subject, number: int, pair: Sequence[ClipInside]) -> Film:
    names = subject.split.label_names
    clips = [
        FilmClip(f"clip {clip.key}", clip.frames, names[clip.answer], clip.probability, names[clip.label], clip.slots)
        for clip in pair
    ]
    gif, mp4 = (save_film(subject.figures / f"attention_{number}.{kind}", clips) for kind in ("gif", "mp4"))
    alt = "; ".join(f"{names[clip.label]}, answered {names[clip.answer]} at {percent(clip.probability)}" for clip in pair)
    return Film(gif, mp4, alt, f"The centre view of {len(pair)} clips, segment by segment; also figures/{mp4.name}.")


def _gates_section(subject: Subject, inside: Inside) -> Section:
    means = {slot: float(values.mean()) for slot, values in inside.gates.items()}
    widest, narrowest = max(means, key=lambda slot: means[slot]), min(means, key=lambda slot: means[slot])
    clips = f"{inside.num_measured:,} clips"
    if means[widest] == 0:
        sentence = f"All gates are closed on {clips}: nothing moves between segments."
    else:
        sentence = (
            f"The gate at {widest} opens farthest (mean of |tanh gate| {means[widest]:.3g} over {clips}), that at {narrowest} "
            f"least ({means[narrowest]:.3g})."
        )
    path = draw_gates(subject.figures / "gates.png", {s: v.tolist() for s, v in inside.gates.items()}, inside.num_measured)
    segments = [f"segment_{number + 1}" for number in range(subject.num_segments)]
    rows = [
        {"slot": slot, "mean": means[slot], **dict(zip(segments, values.tolist(), strict=True))}
        for slot, values in inside.gates.items()
    ]
    columns = [Column(name, name.replace("_", " "), "number") for name in ("mean", *segments)]
    return Section(
        title="How far gates open",
        sentence=sentence,
        text="What a gate lets pass moves to the segment before or after; 0 moves nothing, 1 everything.",
        pictures=[Picture(path, "gates/activity", sentence, "A row a slot, a column a segment.")],
        tables=[Table("gates", f"{len(rows)} gates, the first on top", [Column("slot", "slot"), *columns], rows)],
        metrics={f"insight/gate/{slot}": mean for slot, mean in means.items()},
    )


def _grad_cam_section(subject: Subject, inside: Inside) -> Section:
    names = subject.split.label_names
    clips = [clip for pair in inside.pairs for clip in pair]
    strips: list[Strip] = []
    for clip in clips:
        strips.append((f"{clip.key}: {names[clip.label]}, answered {names[clip.answer]}", clip.frames, None))
        strips.append(
            (f"what raised the answer, {names[clip.answer]} ({percent(clip.probability)})", clip.frames, clip.raised_answer)
        )
        if clip.answer != clip.label:
            strips.append((f"what raised the true class, {names[clip.label]}", clip.frames, clip.raised_label))
    path = draw_grad_cam(subject.figures / "grad_cam.png", strips)
    shares = np.mean([clip.raised_answer.sum(axis=(1, 2)) / max(clip.raised_answer.sum(), 1e-9) for clip in clips], axis=0)
    part = int(shares.argmax())
    sentence = (
        f"Of what raised the answers in {len(clips)} clips, {percent(float(shares[part]))} lies in part {part + 1} of "
        f"{len(shares)} of the clip."
    )
    return Section(
        title="What raised the answer",
        sentence=sentence,
        text=(
            "Grad-CAM on the last map: the places whose features raised the score of a class, on one scale for a clip, whose "
            "greatest is the brightest. Maps are small, so that borders mean little."
        ),
        pictures=[Picture(path, "grad_cam/pairs", sentence, "For each clip its frames and what raised a class, in colours.")],
    )
