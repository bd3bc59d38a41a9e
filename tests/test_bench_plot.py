"""bench.py's pictures and its table of several machines, from results made up by hand."""

from __future__ import annotations

import builtins
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from r1 import InputError
from r1.bench import merge
from r1.bench.plot import curves, figure, select, style
from r1.bench.plot.labels import Curve, Labels

CONFIG = {"hidden_size": 2048, "num_hidden_layers": 27}


def row(
    arm: str,
    kind: str,
    tpot: float,
    *,
    base: float = 41.0,
    floor: float | None = 1.71,
    **fields: Any,
) -> dict[str, Any]:
    """A row as report.row makes it, as far as anybody here reads it."""
    sizes = {
        name: fields.pop(name, default)
        for name, default in (("batch", 1), ("prompt", 128), ("new", 128), ("depth", 0))
    }
    parity = fields.pop("parity", True)
    return {
        "arm": arm, "kind": kind, **sizes, "refused": None, "tpot_ms": tpot,
        "decode_tok_s": sizes["batch"] / tpot * 1e3,
        "speedup": base / tpot if parity and kind != "baseline" else None, "parity": parity,
        "floor_ms": floor, "mbu": floor / tpot if floor else None,
        "bottleneck": fields.pop("bottleneck", "launches" if tpot > 6 else "memory"),
        "backend": {"dtype": "bf16", "amp": "off"}, "repetitions": [{"ttft": 0.1,
        "total": 0.1 + tpot * (1 + 0.01 * i) * 0.127} for i in range(5)], **fields,
    }  # fmt: skip


def refused(arm: str, kind: str, why: str, **sizes: int) -> dict[str, Any]:
    return {
        "arm": arm,
        "kind": kind,
        "batch": 1,
        "prompt": 128,
        "new": 128,
        "depth": 0,
        **sizes,
        "refused": why,
    }


def result(
    rows: list[dict[str, Any]], name: str = "NVIDIA H100 80GB HBM3", **fields: Any
) -> dict[str, Any]:
    machine = {
        "name": name,
        "torch": "2.11.0+cu130",
        "python": "3.12.3",
        "system": "Linux",
        "memory_gb": 80.0,
    }
    return {
        "schema": 1, "machine": machine, "workload": "moonlight, 27 layers, random weights",
        "config": CONFIG, "repetitions": 5, "rows": rows, "notes": [], **fields,
    }  # fmt: skip


def h100() -> dict[str, Any]:
    """A ladder at batch 1, more batches, more depths."""
    rows = [
        row("baseline", "baseline", 41.0),
        row("cuda_graphs", "alone", 8.0),
        row("compile", "alone", 18.0),
        row("compile + cuda_graphs + kernels=triton", "together", 3.6),
        row("+ cuda_graphs", "ladder", 8.0),
        row("+ compile", "ladder", 3.6),
        row("+ kernels=triton", "ladder", 3.3, parity=False),
        refused("+ quant=fp8", "ladder", "--quant fp8 isn't built yet: leave it out"),
    ]
    for batch, slow, fast, floor in (
        (8, 43.0, 6.1, 4.4),
        (32, 46.5, 11.8, 8.9),
        (128, 52.0, 17.0, 11.6),
    ):
        rows += [
            row("baseline", "baseline", slow, batch=batch, floor=floor),
            row(
                "compile + cuda_graphs + kernels=triton", "together", fast, batch=batch, floor=floor
            ),
        ]
    for depth, slow, fast, floor in (
        (2048, 41.2, 3.75, 1.76),
        (8192, 41.9, 4.1, 1.83),
        (32768, 44.0, 5.6, 2.3),
    ):
        rows += [
            row("baseline", "baseline", slow, depth=depth, floor=floor),
            row(
                "compile + cuda_graphs + kernels=triton", "together", fast, depth=depth, floor=floor
            ),
        ]
    return result(rows)


def cpu() -> dict[str, Any]:
    """Two switches alone and together, none of much use; no rates are known."""
    rows = [
        row("baseline", "baseline", 3.1, base=3.1, floor=None, bottleneck=None),
        row("compile", "alone", 2.2, base=3.1, floor=None, bottleneck=None),
        row("amp=bf16", "alone", 4.4, base=3.1, floor=None, bottleneck=None),
        row("compile + amp=bf16", "together", 3.0, base=3.1, floor=None, bottleneck=None),
        refused(
            "cuda_graphs",
            "alone",
            "--cuda-graphs needs a GPU, and torch sees none here: leave it out",
        ),
    ]
    rows[3]["repetitions"] = [
        {"ttft": 0.1, "total": 0.1 + t} for t in (0.38, 0.40, 0.39, 0.37, 0.41)
    ]
    rows[3] |= {"within_noise": True, "speedup_low": 0.97, "speedup_high": 1.08}
    return result(
        rows,
        "AMD EPYC 9R14, 2 threads",
        workload="/home/a/r1/weights/tiny-r1: batch 1, prompt 128, new 128",
    )


def wide() -> dict[str, Any]:
    """More than 20x from end to end, and a step that costs."""
    names = (
        ("+ cuda_graphs", 60.0),
        ("+ compile", 9.0),
        ("+ attention=absorbed", 11.0),
        ("+ moe=grouped + prefill_moe=grouped", 2.1),
    )
    rows = [row("baseline", "baseline", 410.0, base=410)] + [
        row(name, "ladder", t, base=410) for name, t in names
    ]
    for batch in (2, 4, 8, 16, 32, 64, 128, 256):
        rows += [row("baseline", "baseline", 410.0 + batch, batch=batch, floor=1.71 + batch / 50)]
        rows += [
            row(
                "all",
                "together",
                2.1 + batch / 40,
                batch=batch,
                floor=1.71 + batch / 50,
                parity=batch != 64,
            )
        ]
    return result(rows)


def close() -> dict[str, Any]:
    """Curves that nearly touch."""
    rows = []
    for batch, depth in [(b, 0) for b in (1, 2, 4, 8)] + [(1, d) for d in (64, 128, 256, 512)]:
        t = 3.0 + 0.2 * batch + depth / 1000
        rows += [row("baseline", "baseline", t, batch=batch, depth=depth, floor=0.3)]
        rows += [row("compile", "alone", 0.97 * t, base=t, batch=batch, depth=depth, floor=0.3)]
    return result(rows, "Apple M2 Pro, 10 threads")


def ugly() -> dict[str, Any]:
    """The baseline out of memory here and wrong there, long names, a $, a measurement below its
    floor.
    """
    long = (
        "compile + cuda_graphs + attention=absorbed + moe=grouped + prefill_moe=grouped + "
        "kernels=triton + quant=fp8"
    )
    rows = [
        refused(
            "baseline",
            "baseline",
            "out of memory on cuda: use a smaller batch, dtype or model " * 3,
        )
    ]
    rows += [row("amp=$x$ $", "alone", 5.0, parity=False), row(long, "together", 1.6)]
    rows += [
        row("baseline", "baseline", 1234.5, batch=4, parity=False),
        row(long, "together", 3.0, batch=4),
    ]
    rows += [
        row("baseline", "baseline", 1300.0, depth=100_000),
        refused(long, "together", "out of memory", depth=100_000),
    ]
    return result(
        rows,
        "A machine with $1 and $2 whose name is so long that no line of any title can hold it, "
        "128 threads",
    )


def lone() -> dict[str, Any]:
    """The baseline alone, in microseconds."""
    return result([row("baseline", "baseline", 0.012, floor=0.001)])


EXAMPLES = {"h100": h100, "cpu": cpu, "wide": wide, "close": close, "ugly": ugly, "lone": lone}


@pytest.mark.parametrize("name", EXAMPLES)
def test_pictures(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both files are written; every text is inside the picture, and none covers another."""
    pytest.importorskip("matplotlib")
    real, kept = figure.picture, []

    def keep(result: dict[str, Any]) -> Any:
        kept.append(real(result))
        return kept[-1]

    monkeypatch.setattr(figure, "picture", keep)
    files = figure.draw(EXAMPLES[name](), tmp_path / "a.png")
    assert files == [tmp_path / "a.png", tmp_path / "a.svg"]
    assert files[0].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert b"</svg>" in files[1].read_bytes()
    drawn = kept[0]
    drawn.draw_without_rendering()
    texts = [(t.get_text(), t.get_window_extent()) for t in _texts(drawn)]
    width, height = drawn.bbox.width, drawn.bbox.height
    for text, box in texts:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, (
            f"{text!r} leaves the picture"
        )
    for (a, one), (b, other) in itertools.combinations(texts, 2):
        assert not one.overlaps(other), f"{a!r} covers {b!r}"


def _texts(drawn: Any) -> list[Any]:
    """All texts that are drawn: ticks outside an axis' limits are not."""
    from matplotlib.text import Text

    ticks, shown = set(), []
    for axes in drawn.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks() + axis.get_minor_ticks():
                ticks |= {tick.label1, tick.label2}
                if low <= tick.get_loc() <= high:
                    shown.append(tick.label1)
    shown += [t for t in drawn.findobj(Text) if t not in ticks]
    return [t for t in shown if t.get_visible() and t.get_text()]


def test_svg_is_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second = (
        figure.draw(cpu(), tmp_path / name)[1].read_bytes() for name in ("a.png", "b.svg")
    )
    assert first == second


def test_no_baseline_no_saving() -> None:
    """Where the baseline fails or can't be had, no arm takes its place."""
    pytest.importorskip("matplotlib")
    words = [t.get_text() for t in _texts(figure.picture(ugly()))]
    assert not any("saves" in text and " ms" in text for text in words)
    rows = [
        row("baseline", "baseline", 9.0, parity=False),
        row("a", "alone", 8.0),
        row("b", "alone", 4.0),
    ]
    assert not any(
        "saves" in text and " ms" in text
        for text in [t.get_text() for t in _texts(figure.picture(result(rows)))]
    )


def test_what_is_drawn() -> None:
    rows = h100()["rows"]
    assert [r["arm"] for r in select.steps(rows)] == [
        "baseline",
        "+ cuda_graphs",
        "+ compile",
        "+ kernels=triton",
        "+ quant=fp8",
    ]
    assert [[r["batch"] for r in line] for line in select.over_batches(rows)] == [
        [1, 8, 32, 128]
    ] * 2
    assert [[select.context(r) for r in line] for line in select.over_context(rows)] == [
        [192, 2240, 8384, 32960]
    ] * 2
    rows = cpu()["rows"]
    assert [r["arm"] for r in select.steps(rows)] == [
        "baseline",
        "compile",
        "amp=bf16",
        "cuda_graphs",
        "compile + amp=bf16",
    ]
    assert select.over_batches(rows) == select.over_context(rows) == []


def test_no_win_without_parity() -> None:
    """An arm that fails parity shows no rate and no saving, and the next step isn't measured
    against it.
    """
    pytest.importorskip("matplotlib")
    rows = [
        row("baseline", "baseline", 40.0, base=40),
        row("+ fast", "ladder", 1.0, parity=False),
        row("+ good", "ladder", 30.0, base=40),
    ]
    words = [t.get_text() for t in _texts(figure.picture(result(rows)))]
    assert "parity fails" in words and not any("1.00 ms ·" in text for text in words)
    assert any("saves 10.0 ms" in text for text in words)


def words(rows: list[dict[str, Any]]) -> list[str]:
    """All texts of these rows' picture."""
    return [t.get_text() for t in _texts(figure.picture(result(rows)))]


def test_the_fullest_arm() -> None:
    """All switches together, else the ladder's end, else the last single switch."""
    alone = [row("a", "alone", 3.0), row("b", "alone", 2.0)]
    ladder = [row("+ a", "ladder", 3.0), row("+ b", "ladder", 2.5)]
    together = [row("a + b", "together", 4.0)]
    for rows in (together + ladder + alone, ladder + alone, alone):
        wanted = {"together": "a + b", "ladder": "+ b", "alone": "b"}[rows[0]["kind"]]
        assert (select.fullest(rows) or {})["arm"] == wanted
    assert select.fullest([row("baseline", "baseline", 4.0)]) is None


def test_which_series_is_drawn() -> None:
    """Of two sizes or more, the longest one; a refused row with a time has none."""
    rows = [row("baseline", "baseline", 9.0 + b, batch=b, prompt=p)
            for p, b in ((64, 1), (64, 2), (32, 1), (32, 2), (32, 4))]  # fmt: skip
    (line,) = select.over_batches(rows)
    assert [(r["prompt"], r["batch"]) for r in line] == [(32, 1), (32, 2), (32, 4)]
    assert len(select.over_batches(rows[:2])) == 1 and not select.over_batches(rows[:1])
    assert not select.is_timed(rows[0] | {"refused": "why"}) and select.is_timed(rows[0])
    assert select.context(row("a", "alone", 1.0, depth=100, prompt=20, new=10)) == 125


def test_numbers_have_about_three_digits() -> None:
    times = {0.0123: "0.012 ms", 1.234: "1.23 ms", 12.34: "12.3 ms", 123.4: "123 ms"}
    rates = {0.1234: "0.12 tok/s", 1.234: "1.2 tok/s", 12.34: "12 tok/s", 12345: "12,345 tok/s"}
    assert {value: style.milliseconds(value) for value in times} == times
    assert {value: style.rate(value) for value in rates} == rates
    assert style.sizes_text(row("a", "alone", 1.0, batch=2, prompt=1000, depth=2000)) == (
        "batch 2, 1,000 prompt + 128 new tokens behind 2,000 in the cache"
    )


def test_what_a_dot_says() -> None:
    """Savings are against the step before; the floor is the fastest right arm's, for all rows."""
    pytest.importorskip("matplotlib")
    rows = [
        row("baseline", "baseline", 40.0, base=40, batch=4, floor=8.0),
        row("+ a", "ladder", 10.0, base=40, batch=4, floor=2.0),
        row("+ b", "ladder", 12.0, base=40, batch=4, floor=4.0),
        row("+ c", "ladder", 1.0, base=40, batch=4, floor=0.5, parity=False),
    ]
    said = words(rows)
    assert any(text.startswith("saves 30.0 ms · 4") for text in said)
    assert any(text.startswith("costs 2.00 ms · ") for text in said)
    assert "2.00 ms · 2,000 tok/s" in said
    assert any("the fastest arm reaches 20% of it" in text for text in said)


def test_switches_alone_are_measured_against_the_baseline() -> None:
    pytest.importorskip("matplotlib")
    alone = [row("baseline", "baseline", 40.0), row("a", "alone", 20.0), row("b", "alone", 30.0)]
    said = words(alone)
    assert any("saves 20.0 ms" in text for text in said)
    assert any("saves 10.0 ms" in text for text in said)


def test_colours_of_what_is_saved_and_of_what_it_costs() -> None:
    """A pale bar leads from a dot to the step before it; where that was faster, it is not pale."""
    pytest.importorskip("matplotlib")
    rows = [row("baseline", "baseline", 40.0), row("+ a", "ladder", 10.0)]
    rows += [row("+ b", "ladder", 1.0, parity=False), row("+ c", "ladder", 12.0)]
    (axes,) = figure.picture(result(rows)).axes
    lines: list[Any] = list(axes.lines)
    ways = {
        tuple(line.get_xdata()): line.get_color() for line in lines if line.get_linewidth() == 9
    }
    assert ways == {(10.0, 40.0): style.GHOST, (12.0, 10.0): style.COSTS}
    dots = {line.get_xdata()[0]: line.get_color() for line in lines if line.get_marker() == "o"}
    assert (dots[40.0], dots[10.0], dots[12.0]) == (style.BASELINE, style.FASTER, style.FASTER)
    crosses = [line.get_xdata()[0] for line in lines if line.get_marker() == "X"]
    assert crosses == [1.0]


def test_curves_over_batches() -> None:
    """The floor's rate is of all rows, and a row that fails parity has none."""
    pytest.importorskip("matplotlib")
    rows = [row("baseline", "baseline", 4.0 + b, batch=b, floor=1.0 + b) for b in (1, 2, 4)]
    rows += [row("compile", "alone", 3.0 + b, batch=b, floor=1.0 + b, parity=b != 2)
             for b in (1, 2, 4)]  # fmt: skip
    drawn = figure.picture(result(rows))
    (axes,) = [each for each in drawn.axes if "per second" in each.get_xlabel()]
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    xs: list[Any] = [line.get_xdata() for line in dashed]
    points = [list(x) for x in xs if len(x)]
    assert points == [pytest.approx([1 / 2 * 1e3, 4 / 5 * 1e3])]
    crosses: list[Any] = [line.get_xdata() for line in axes.lines if line.get_marker() == "X"]
    assert sum(map(len, crosses)) == 1, "the arm's own point alone"
    assert axes.get_ylim()[0] == axes.get_xlim()[0] == 0
    said = [t.get_text() for t in _texts(drawn)]
    assert "compile" in said and "every switch on" not in said
    ladder = [r | {"kind": "ladder"} if r["kind"] == "alone" else r for r in rows]
    assert "every switch on" in words(ladder)


def test_a_label_belongs_to_the_nearest_curve() -> None:
    """The same place costs more for the other curve's label."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.set(xlim=(0, 3), ylim=(0, 9))
    lines = [Curve(f"y = {y}", "black", [], [1.0, 2.0], [y, y]) for y in (2.0, 7.0)]
    x, y = axes.transData.transform((1.5, 2.0))
    box, labels = (x - 5, y + 3, x + 5, y + 9), Labels(axes, lines)
    assert labels._cost(box, 0) < labels._cost(box, 1)


def test_sizes_in_a_title_are_of_all_points() -> None:
    pytest.importorskip("matplotlib")
    rows = [row("baseline", "baseline", 9.0, batch=b) for b in (1, 2)]
    title = "128 prompt + 128 new tokens"
    assert title in words(rows)
    lines = [[rows[0], rows[1] | {"prompt": 64}]]
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    curves.draw_batches(axes, lines)
    assert title not in [text.get_text() for text in axes.texts]


def test_a_picture_of_too_many_arms_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row("baseline", "baseline", 9.0)]
    rows += [row(f"a{i}", "alone", 8.0) for i in range(figure.MOST_ARMS)]
    with pytest.raises(InputError, match="a picture has room for 300 arms"):
        figure.draw(result(rows), tmp_path / "a.png")


def test_a_picture_is_not_the_users_style(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    plain = figure.draw(lone(), tmp_path / "a.png")[1].read_bytes()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert figure.draw(lone(), tmp_path / "b.png")[1].read_bytes() == plain


def test_noise_is_said() -> None:
    """An arm within the noise has no speed-up; so has no rung whose range the last one's meets."""
    pytest.importorskip("matplotlib")
    words = [t.get_text() for t in _texts(figure.picture(cpu()))]
    assert words.count("no difference beyond the noise") == 1
    rows = [
        row("baseline", "baseline", 40.0, base=40),
        row("+ a", "ladder", 10.0, base=40),
        row("+ b", "ladder", 9.8, base=40),
        row("+ c", "ladder", 8.0, base=40),
        row("+ d", "ladder", 7.99, base=40),
    ]
    for each in rows[4:]:
        each["repetitions"] = each["repetitions"][:1]
    words = [t.get_text().split(" · ")[0] for t in _texts(figure.picture(result(rows)))]
    assert [w for w in words if w[:5] in ("saves", "no di", "withi")] == [
        "saves 30.0 ms",
        "no difference beyond the noise",
        "saves 1.80 ms",
        "within 1% of the step before",
    ]


def test_times_are_dots_with_ranges_on_a_logarithmic_axis() -> None:
    """A dot at each median, a line over the repetitions, and no line for a single one."""
    pytest.importorskip("matplotlib")
    rows = cpu()["rows"]
    rows[1]["repetitions"] = rows[1]["repetitions"][:1]
    axes: Any = figure.picture(result(rows)).axes[0]
    assert axes.get_xscale() == "log" and 2.2 / 1.3 < axes.get_xlim()[0] < 2.2
    dots = {int(y[0]): x[0] for x, y in (e.get_data() for e in axes.lines if e.get_marker() == "o")}
    assert dots == {0: 3.1, 1: 2.2, 2: 4.4, 4: 3.0}
    thin = [line.get_data() for line in axes.lines if line.get_linewidth() == 2]
    ranges = {int(y[0]): tuple(x) for x, y in thin}
    assert sorted(ranges) == [0, 2, 4]
    assert ranges[4] == pytest.approx((0.37 / 0.127, 0.41 / 0.127))


def test_a_floor_far_below_is_told_and_not_drawn() -> None:
    """It would press the dots together."""
    pytest.importorskip("matplotlib")
    for floor, low, share in ((1.0, 1.0, "33%"), (0.01, 3.0, "0.3%")):
        rows = [
            row("baseline", "baseline", 4.0, base=4, floor=floor),
            row("compile", "alone", 3.0, base=4, floor=floor),
        ]
        drawn = figure.picture(result(rows))
        assert drawn.axes[0].get_xlim()[0] == pytest.approx(low, rel=0.15)
        words = " ".join(t.get_text() for t in _texts(drawn))
        assert "the hardware's floor" in words and f"reaches {share} of it" in words


@pytest.mark.parametrize(
    ("name", "rows", "says"),
    [
        ("a.jpg", None, "png"),
        ("none/a.png", None, "no folder"),
        ("a.png", [refused("baseline", "baseline", "out of memory")], "nothing to draw"),
    ],
)
def test_plot_refuses(
    name: str, rows: list[dict[str, Any]] | None, says: str, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(InputError, match=says):
        figure.draw(result(rows) if rows else h100(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install -e '\.\[plot\]'"):
        figure.draw(h100(), tmp_path / "a.png")


def save(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def cells(table: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    ][2:]


def test_compare(tmp_path: Path) -> None:
    """Baseline and fastest passing arm of each machine; what only one file did is left out and
    named.
    """
    small = [
        row("baseline", "baseline", 50.0),
        refused("+ cuda_graphs", "ladder", "no GPU"),
        row("+ compile", "ladder", 20.0),
    ]
    small.append(row("amp=bf16", "alone", 1.0, parity=False))
    files = [
        save(tmp_path / "h100.json", h100()),
        save(tmp_path / "l4.json", result(small, "NVIDIA L4")),
    ]
    table = merge.compare(files, [3.6, 0.36])
    assert cells(table) == [
        ["NVIDIA H100 80GB HBM3", "80", "baseline", "bf16", "1", "41.00", "24.4", "4%", "41.00"],
        [
            "NVIDIA H100 80GB HBM3",
            "80",
            "compile + cuda_graphs + kernels=triton",
            "bf16",
            "1",
            "3.60",
            "277.8",
            "48%",
            "3.60",
        ],
        ["NVIDIA L4", "80", "baseline", "bf16", "1", "50.00", "20.0", "3%", "5.00"],
        ["NVIDIA L4", "80", "cuda_graphs + compile", "bf16", "1", "20.00", "50.0", "9%", "2.00"],
    ]
    assert (
        f"Left out of {files[0]}: cuda_graphs; compile; cuda_graphs + compile; "
        "cuda_graphs + compile + kernels=triton; "
        "ladder up to quant=fp8." in table.splitlines()
    )
    assert f"Left out of {files[1]}: cuda_graphs; amp=bf16." in table.splitlines()
    note = next(line for line in table.splitlines() if line.startswith("Note"))
    assert "h100.json" in note and "batch 32" in note and "depth 8192" in note and "l4" not in note
    assert "price" not in merge.compare(files, None).lower()


def test_compare_all_arms(tmp_path: Path) -> None:
    files = [save(tmp_path / f"{name}.json", cpu()) for name in "ab"]
    table = merge.compare(files, None, wide=True)
    assert [line[2] for line in cells(table)] == [r["arm"] for r in cpu()["rows"]] * 2
    assert "Left out" not in table and "--wide" not in table


def test_compare_tells_machines_apart_by_their_threads(tmp_path: Path) -> None:
    """And says which of them was busy."""
    results = [cpu(), cpu()]
    for number, each in enumerate(results, 1):
        each["machine"] |= {"name": "a CPU, 2 CPUs", "cpus": 2, "threads": number, "load": 1.0}
    files = [
        save(tmp_path / f"{name}.json", each) for name, each in zip("ab", results, strict=True)
    ]
    table = merge.compare(files)
    names = list(dict.fromkeys(line[0] for line in cells(table)))
    assert names == ["a CPU, 2 CPUs, 1 thread", "a CPU, 2 CPUs, 2 threads"]
    busy = [line for line in table.splitlines() if "BUSY" in line]
    assert busy == [f"{files[1]}: BUSY: load 1.0 on 2 CPUs: timings mean little."]


def test_compare_one_price_and_one_name(tmp_path: Path) -> None:
    files = [save(tmp_path / "old.json", cpu()), save(tmp_path / "new.json", cpu())]
    table = cells(merge.compare(files, [1.0]))
    assert [line[0] for line in table] == ["AMD EPYC 9R14, 2 threads (old)"] * 2 + [
        "AMD EPYC 9R14, 2 threads (new)"
    ] * 2
    assert table[1][-1] == table[3][-1] == f"{1 / (1e3 / 2.2 * 3600) * 1e6:.2f}"


def test_a_small_price_has_two_digits(tmp_path: Path) -> None:
    """2.2 ms a token and 0.1 an hour: 0.0611 for a million."""
    file = save(tmp_path / "a.json", cpu())
    prices = {price: cells(merge.compare([file], [price]))[1][-1] for price in (0.0, 0.1, 10.0)}
    assert prices == {0.0: "0.00", 0.1: "0.061", 10.0: "6.11"}


def test_compare_only_what_matches(tmp_path: Path) -> None:
    other = result([row("baseline", "baseline", 9.0)], config={"hidden_size": 64})
    with pytest.raises(InputError, match="nothing to compare"):
        merge.compare([save(tmp_path / "a.json", h100()), save(tmp_path / "b.json", other)], None)
    assert len(cells(merge.compare([tmp_path / "b.json"], None))) == 1


def test_compare_baseline_without_parity(tmp_path: Path) -> None:
    rows = [
        row("baseline", "baseline", 9.0, parity=False),
        refused("compile", "alone", "no compiler"),
    ]
    table = merge.compare([save(tmp_path / "a.json", result(rows))], [1.0])
    assert cells(table) == [
        ["NVIDIA H100 80GB HBM3", "80", "baseline", "bf16", "1", "parity fails", "", "", ""]
    ]


BAD: dict[str, tuple[Any, str]] = {
    "text": ("| arm | batch |", "is no JSON"),
    "lines": ('{"arm": 1}\n{"arm": 2}', "is no JSON"),
    "deep": ("[" * 100_000, "is no JSON"),
    "list": ([], "schema none"),
    "schema": ({**result([row("baseline", "baseline", 1.0)]), "schema": 2}, "schema 2"),
    "empty": (result([]), "no rows"),
    "machine": ({**result([row("baseline", "baseline", 1.0)]), "machine": None}, "which machine"),
    "row": (result([[]]), "row 1"),  # type: ignore[list-item]
    "kind": (result([{**row("baseline", "baseline", 1.0), "kind": None}]), "kind is None"),
    "sizes": (result([{**row("b", "baseline", 1.0), "batch": "8"}]), "batch is '8'"),
    "nan": (result([{**row("b", "baseline", 1.0), "tpot_ms": float("nan")}]), "tpot_ms is nan"),
    "parity": (result([{**row("b", "baseline", 1.0), "parity": None}]), "parity is None"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_compare_refuses(name: str, tmp_path: Path) -> None:
    content, says = BAD[name]
    good, bad = save(tmp_path / "good.json", h100()), save(tmp_path / f"{name}.json", content)
    with pytest.raises(InputError, match=says) as error:
        merge.compare([good, bad], None)
    assert str(bad) in str(error.value) and "\n" not in str(error.value)


def test_compare_refuses_missing(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match="can't be read"):
            merge.compare([path], None)
    with pytest.raises(InputError, match="UTF|utf"):
        (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
        merge.compare([tmp_path / "b.json"], None)


@pytest.mark.parametrize("price", [[1.0, 2.0, 3.0], [-1.0], [float("nan")]])
def test_compare_refuses_price(price: list[float], tmp_path: Path) -> None:
    files = [save(tmp_path / "a.json", h100()), save(tmp_path / "b.json", h100())]
    with pytest.raises(InputError, match="--price"):
        merge.compare(files, price)
