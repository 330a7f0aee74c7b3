"""The page and its tables, from results made by hand."""

import itertools
import re

import pytest

from benchmarks import page
from benchmarks.page import DOCS, FOR_THE_PAGE, ROOT, Measured
from benchmarks.results import write

X = 64 * 400 * 672 * 4  # bytes of the activation
TEXTS = [target.text for target in page.TARGETS]


def spread(median):
    return {"median": median, "q1": 0.9 * median, "q3": 1.2 * median}


def measured(kind, device, rows, earlier=False, **settings):
    settings.update(repetitions=15, warmup=3)
    results = {
        "kind": kind,
        "device": device,
        "machine": {"CPU": "a CPU", "memory": "8 GiB"},
        "command": f"python -m benchmarks.{kind}",
        "date": "2026-01-02",
        "commit": "abc1234",
        "settings": settings,
        "rows": rows,
    }
    if kind == "layers":
        results["copy_bandwidth"] = 64e9
    return Measured(f"{kind}-{device}", earlier, results)


def layers(device="cpu", ours=8.0, shape=(1, 64, 400, 672), form="nchw", dtype="float32", **more):
    rows = []
    for contender, total, saved in (
        ("BCN", ours, X + 5 * 256),
        ("GroupNorm", 10.0, X),
        ("reference", 40.0, 3 * X),
        ("no longer measured", 1.0, X),
    ):
        row = {"layer": "stem", "shape": list(shape), "dtype": dtype, "memory_format": form}
        row.update(contender=contender, total=spread(total), saved_bytes=saved)
        rows.append(row)
    return measured("layers", device, rows, **more)


def steps(device="cpu", time=95.0, peak=90, kernels=None, model="R-50-FPN", size=256, **more):
    rows = []
    for contender, ms, mebibytes in (("GN", 100.0, 100), ("BCN+WS", time, peak)):
        row = {"contender": contender, "images": 1, "step": spread(ms)}
        row.update(peak_bytes=mebibytes * 2**20, saved_bytes=mebibytes * 2**19)
        if kernels is not None:
            row["kernels_ms"] = kernels if "BCN" in contender else 50.0
        rows.append(row)
    settings = {"model": model, "amp": None, "channels_last": False}
    return measured("train", device, rows, sizes=[[size, size]], **settings, **more)


def memory(peaks, times=None, model="Mask R-CNN", dtype="float32", norms=("GN", "BCN+WS"), **more):
    """``peaks`` in GiB by norm, of images and what is checkpointed."""
    rows = []
    for norm in norms:
        for images, what in itertools.product((1, 2), ("", "backbone", "all")):
            row = {"model": model, "dtype": dtype, "images": images, "norm": norm}
            row.update(checkpointed=what, peak_bytes=peaks(norm, images, what) * 2**30)
            if times:
                row["step"] = spread(times(norm, what))
            rows.append(row)
    settings = {"size": [800, 1333], "bitmasks": False, **more}
    made = measured("memory", "cpu", rows, **settings)
    made.results["settings"]["repetitions"] = 3 if times else 0
    return made


def peaks(norm, images, what):
    own = {"": 2.0, "backbone": 1.0, "all": 0.5}[what] * (0.9 if "BCN" in norm else 1.0)
    return 0.5 + images * own


def times(norm, what):
    return {"": 100.0, "backbone": 120.0, "all": 130.0}[what] * (0.9 if "BCN" in norm else 1.0)


def cells(markdown, start):
    """The first table after ``start``: its rows, by the header."""
    lines = markdown[markdown.index(start) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line[1:-1].split(" | ")])
    return [list(zip(table[0], row)) for row in table[2:]]


def targets(*everything):
    """By the beginning of the text: figures and verdict."""
    found = {}
    for (_, text), _, (_, figures), (_, verdict), _ in cells(page.render(everything, "x"), "## T"):
        found[text] = (figures, verdict)
    return lambda *words: next(v for t, v in found.items() if all(word in t for word in words))


def test_targets_without_results():
    rows = cells(page.render([], "x"), "## Targets")
    assert [row[0][1] for row in rows] == TEXTS
    assert {(row[2][1], row[3][1], row[4][1]) for row in rows} == {("", "not measured", "")}
    assert [row[1][1] for row in rows] == [
        *("≤ 1.10", "≤ 0.33", "≤ 2.00", "≤ 1.10", "≤ 1.00", "≤ 0.86", "≤ 0.92"),
        *("≤ 0.50", "≤ 1.00", "≤ 1.35"),
        *("≤ 1.00", "≤ 0.80", "≥ 0.75", "≤ 1.00", "≤ 1.10", "≤ 0.95"),
    ]


def test_targets_of_layers():
    of = targets(
        layers(ours=11.0), layers(ours=12.0, dtype="bfloat16"), layers(ours=21.0, form="l")
    )
    assert of("CPU", "float32 nchw, 1 M") == ("1.10 (stem, float32, nchw)", "met")
    # 11 / 40; the others are of other dtypes and formats
    assert of("CPU", "reference") == ("0.28 (stem, float32, nchw)", "met")
    of = targets(layers(ours=14.0), layers(ours=21.0, form="channels_last"))
    assert of("CPU", "float32 nchw, 1 M") == ("1.40 (stem, float32, nchw)", "**missed**")
    assert of("CPU", "reference")[1] == "**missed**"
    assert of("CPU", "and bfloat16") == ("2.10 (stem, float32, channels_last)", "**missed**")
    assert of("GPU", "nchw")[1] == "not measured"


def test_targets_of_layers_on_a_gpu():
    # 8 passes of 68.8 MB at 64 GB/s are 8.6 ms
    of = targets(layers("cuda", ours=9.0), layers("cuda", ours=14.0, dtype="float16"))
    assert of("GPU", "nchw") == (
        "0.90 to 1.40, worst stem, float16, nchw; 1 of 2 miss it",
        "**missed**",
    )
    assert of("GPU", "floor") == (
        "0.31 to 0.96, worst stem, float16, nchw; 1 of 2 miss it",
        "**missed**",
    )
    assert targets(layers("cuda", ours=9.0))("floor") == ("0.96 (stem, float32, nchw)", "met")
    assert targets(layers("cuda", form="channels_last"))("GPU", "channels_last")[1] == "met"  # 0.80
    assert targets(layers("cuda", shape=(1, 64, 100, 100)))("GPU", "nchw")[1] == "not measured"


def test_targets_of_steps():
    of = targets(
        steps(),
        steps(time=120.0, model="R-18-FPN", size=192),
        steps(size=800, time=96.0, peak=91),
        steps("cuda", kernels=40.0, time=105.0, size=800),
    )
    assert of("CPU", "R-18-FPN") == ("1.20 (R-18-FPN, 1×192×192, float32)", "**missed**")
    assert of("CPU", "time", "256 pixels") == ("0.95 (R-50-FPN, 1×256×256, float32)", "met")
    both = "0.90 to 0.91, worst R-50-FPN, 1×800×800, float32"
    assert of("CPU", "saved") == (f"{both}; 2 of 2 miss it", "**missed**")
    assert of("CPU", "peak", "BCN+WS / GN") == (both, "met")
    assert [of("GPU", "kernels")[1], of("GPU", "time")[1], of("GPU", "peak")[1]] == ["met"] * 3
    assert of("GPU", "kernels")[0].startswith("0.80 ")


def test_targets_of_checkpointing():
    # 0.95 and 1.4 of 2.5 GiB, 117 of 100 ms
    of = targets(memory(peaks), memory(peaks, times), memory(peaks, dtype="bfloat16"))
    one, two = of("CPU", "1×800×1333"), of("CPU", "2 images")
    assert one == ("0.38 to 0.38, worst Mask R-CNN, float32", "met")
    assert two == ("0.56 to 0.56, worst Mask R-CNN, float32", "met")
    assert of("time, the same") == ("1.17 (Mask R-CNN, float32)", "met")
    of = targets(memory(lambda norm, images, what: images, model="RetinaNet"))
    assert of("1×800×1333") == ("1.00 (RetinaNet, float32)", "**missed**")
    assert of("time, the same")[1] == "not measured"
    for other in ({"bitmasks": True}, {"size": [64, 96]}):
        assert targets(memory(peaks, **other))("1×800×1333")[1] == "not measured"
    assert targets(memory(peaks, norms=("GN",)))("1×800×1333")[1] == "not measured"


def test_table_of_checkpointing():
    rows = cells(page.render([memory(peaks, times)], "x"), "**Mask R-CNN, 2×800×1333, float32**")
    assert [value for _, value in rows[0]][::2] == ["GN", "4.50", "100.0 (90.0–120.0)"]
    assert rows[5] == [
        ("", "BCN+WS"),
        ("checkpointed", '`"all"`'),
        ("peak, GiB", "1.40"),
        ("/ GN", "0.31"),
        ("step, ms", "117.0 (105.3–140.4)"),
        ("/ GN", "1.17"),
    ]
    (*_, last) = cells(page.render([memory(peaks, bitmasks=True)], "x"), "float32, bitmaps**")
    assert [title for title, _ in last] == ["", "checkpointed", "peak, GiB", "/ GN"]


def test_how_many_images_fit():
    gn, ours = cells(page.memory_part([memory(peaks)]), "| **float32** |")
    assert gn[:4] == [
        ("**float32**", "Mask R-CNN"),
        ("", "GN"),
        # 5 and 7 of them can be used: 0.5 + 2 n, 0.5 + n and 0.5 + 0.5 n
        ("6 GiB", "2 · 4 · 9"),
        ("8 GiB", "3 · 6 · 13"),
    ]
    assert ours[-1] == ("GiB for 1 image", "2.30 · 1.40 · 0.95")
    none = page.memory_part([memory(lambda norm, images, what: 6 * images)])
    assert ("6 GiB", "0 · 0 · 0") in cells(none, "|")[0] and "png" not in none
    # nothing but what is measured with both numbers of images, on a CPU
    partly = memory(peaks)
    partly.results["rows"] = [row for row in partly.results["rows"] if row["images"] == 1]
    assert page.memory_part([partly]) == page.memory_part([layers()]) == ""


def test_picture_of_checkpointing():
    timed = page._timed([memory(peaks), memory(peaks, times)])
    figure = page.memory_figure(timed)
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    of_settings = [line.get_marker() for line in axes.lines if line.get_marker() != "None"]
    assert of_settings[:3] == of_settings[3:] and len(set(of_settings)) == 3
    assert lines["GN"] == [[1.0, 2.5], [1.2, 1.5], [1.3, 1.0]]
    assert lines["BCN+WS"] == [pytest.approx(p) for p in ([0.9, 2.3], [1.08, 1.4], [1.17, 0.95])]
    assert "memory.png" in page.memory_part([memory(peaks, times)])


def test_old_results_count_only_where_there_are_no_others():
    earlier, new = layers("cuda", ours=5.0, earlier=True), layers("cuda", ours=9.0)
    assert targets(earlier)("GPU", "nchw") == (
        "0.50 (stem, float32, nchw)",
        "met, version 0.1.0",
    )
    assert targets(new, earlier)("GPU", "nchw") == ("0.90 (stem, float32, nchw)", "met")
    text = page.render([earlier], "x")
    now, then = text.index("## GPU\n\nNot measured."), text.index("## GPU, version 0.1.0")
    assert now < then < text.index("(x/version-0.1.0/layers-cuda.png)")
    assert "- 2026-01-02, commit abc1234\n" in text
    assert "- 2026-01-02, commit abc1234: `python -m benchmarks.layers`\n" in page.render(
        [new], "x"
    )


def test_table_of_layers():
    (row,) = cells(page.render([layers()], "x"), "**float32, nchw**")
    assert row == [
        ("layer", "stem"),
        ("input", "1×64×400×672"),
        ("BCN, ms", "8.00 (7.20–9.60)"),
        ("GroupNorm, ms", "10.0 (9.00–12.0)"),
        ("reference, ms", "40.0 (36.0–48.0)"),
        ("BCN / GroupNorm", "0.80"),
        ("BCN / reference", "0.20"),
        ("floor / BCN", "108%"),
        ("BCN, saved MiB", "65.63"),
        ("GroupNorm, saved MiB", "65.62"),
        ("reference, saved MiB", "196.88"),
    ]


def test_table_of_steps():
    gn, ours = cells(
        page.render([steps("cuda", kernels=40.0, time=125.0, peak=150)], "x"),
        "**R-50-FPN, 1×256×256, float32**",
    )
    assert [value for _, value in gn][::2] == ["GN", "1.00", "1.00", "1.00", "1.00"]
    assert ours == [
        ("", "BCN+WS"),
        ("step, ms", "125.0 (112.5–150.0)"),
        ("/ GN", "1.25"),
        ("peak, GiB", "0.15"),
        ("/ GN", "1.50"),
        ("saved, GiB", "0.07"),
        ("/ GN", "1.50"),
        ("kernels, ms", "40.0"),
        ("/ GN", "0.80"),
    ]


def pages(tmp_path, text):
    (tmp_path / "docs").mkdir()
    for name in ("benchmarks.md", "memory.md"):
        (tmp_path / "docs" / name).write_text(text)
    return tmp_path / "docs"


def test_rewriting_keeps_what_is_written_by_hand(tmp_path):
    docs = pages(tmp_path, f"# Title\n\n{page.BEGIN}\nto go\n{page.END}\n\nText.\n")
    folder = tmp_path / "benchmarks" / "results"
    (folder / page._EARLIER_FOLDER).mkdir(parents=True)
    write(layers().results, str(folder / "layers-a.json"))
    write(memory(peaks, times).results, str(folder / "memory-a.json"))
    write(steps("cuda").results, str(folder / page._EARLIER_FOLDER / "train-b.json"))
    (folder / "other.json").write_text("of another program")
    pictures = [folder / "layers-a.png", docs / "memory.png"]
    for _ in range(2):
        assert page.rewrite(docs, folder) == [*pictures, docs / "benchmarks.md", docs / "memory.md"]
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
        for name, picture in (
            ("benchmarks.md", "../benchmarks/results/layers-a.png"),
            ("memory.md", "memory.png"),
        ):
            text = (docs / name).read_text()
            assert text.startswith(f"# Title\n\n{page.BEGIN}\n")
            assert text.endswith(f"\n{page.END}\n\nText.\n")
            assert "to go" not in text and f"({picture})" in text
        assert [m.earlier for m in page.load(folder)] == [False, False, True]


@pytest.mark.parametrize(
    "file,content,message",
    [
        ("docs/benchmarks.md", "no marks", "must have the lines '<!-- begin"),
        ("docs/memory.md", "no marks", "must have the lines '<!-- begin"),
        ("results/layers-a.json", "{", "a.json is not the output of a benchmark .JSONDecodeError"),
        ("results/train-a.json", "[]", "a.json is not the output of a benchmark .TypeError"),
        (
            "results/version-0.1.0/layers-a.json",
            '{"kind": "norms"}',
            "kind must be of layers, .*, found 'norms'",
        ),
    ],
)
def test_errors(tmp_path, file, content, message):
    (tmp_path / "results" / "version-0.1.0").mkdir(parents=True)
    docs = pages(tmp_path, f"{page.BEGIN}\n{page.END}\n")
    (tmp_path / file).write_text(content)
    before = [path.read_text() for path in docs.iterdir()]
    with pytest.raises(ValueError, match=message):
        page.rewrite(docs, tmp_path / "results")
    assert [path.read_text() for path in docs.iterdir()] == before


@pytest.mark.parametrize("name", ["benchmarks", "memory"])
def test_the_pages_show_the_results_of_the_repository(name):
    measured = page.load(ROOT / FOR_THE_PAGE)
    text = (DOCS / f"{name}.md").read_text()
    written = text.partition(page.BEGIN + "\n")[2].partition(page.END)[0].strip()
    expected = {
        "benchmarks": page.render(measured, f"../{FOR_THE_PAGE}"),
        "memory": page.memory_part(measured),
    }
    assert written == expected[name].strip()
    for picture in re.findall(r"\]\(([^)]*\.png)\)", written):
        assert (DOCS / picture).exists()
