"""The page and its tables, from results made by hand."""

import json
import re

import pytest

from wsbcn_d2.benchmark import page, report
from wsbcn_d2.benchmark.__main__ import COMMANDS, PAGE, RESULTS


def spread(median):
    return {"median": median, "q1": 0.9 * median, "q3": 1.2 * median}


def norms_row(contender, total, saved, shape=(1, 64, 400, 672), memory_format="nchw"):
    return {
        "layer": "stem",
        "shape": list(shape),
        "dtype": "float32",
        "memory_format": memory_format,
        "contender": contender,
        "forward": spread(total / 4),
        "backward": spread(total * 3 / 4),
        "total": spread(total),
        "host": spread(0.1),
        "saved_bytes": saved,
        "peak_bytes": 2 * saved,
    }


def results(kind, device, rows, **changes):
    settings = {"repetitions": 15, "warmup": 3, "copy_mebibytes": 512, "size": [256, 320]}
    settings.update({"amp": None, "channels_last": False, "memory_gib": None})
    return {
        "kind": kind,
        "device": device,
        "machine": {"CPU": "a CPU", "memory": "8 GiB"},
        "settings": settings,
        "copy_bandwidth": 64e9,
        "skipped": {},
        "command": f"tools/benchmark_{kind}.py",
        "date": "2026-01-02",
        "rows": rows,
        **changes,
    }


X = 64 * 400 * 672 * 4  # bytes of the activation
TABLE = 64 * 4


def norms(device="cuda", ours=8.0, tables=5, **changes):
    rows = [
        norms_row("BCN", ours, X + tables * TABLE, **changes),
        norms_row("GroupNorm", 10.0, X + TABLE, **changes),
        norms_row("reference", 40.0, 3 * X, **changes),
    ]
    return results("norms", device, rows)


def train(device="cuda", step=102.0, peak=100, standardization=0.5):
    def row(norm, step, peak, **more):
        return {
            "norm": norm,
            "images": 2,
            "step": spread(step),
            "peak_bytes": peak * 2**20,
            "saved_bytes": 2**20,
            "inference": spread(50.0),
            **more,
        }

    rows = [
        row("GN", 100.0, 100),
        row("BCN+WS", step, peak, standardization=spread(standardization)),
    ]
    return results("train", device, rows)


def bars(*contents):
    text = page.render([(f"file{i}", content) for i, content in enumerate(contents)], "benchmarks")
    lines = text.split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {bar: (measured, met) for bar, measured, met in cells}


NCHW, LAST, FLOOR, SAVED, TIME, MEMORY, WS, CPU, CPU_SAVED, CPU_STEP = [b.text for b in page.BARS]


def test_bars_without_results():
    measured = bars()
    assert list(measured) == [bar.text for bar in page.BARS] and len(measured) == 10
    gpu = "not measured: no GPU at hand. `python -m wsbcn_d2.benchmark --device cuda` does it."
    assert measured[NCHW] == (gpu, "")
    assert "--device cpu" in measured[CPU][0]


def test_bars_that_are_met():
    measured = bars(norms(), norms("cpu"), train(), norms(ours=7.9, memory_format="channels_last"))
    assert measured[NCHW] == ("0.80 to 0.80 (most: 1×64×400×672 float32 nchw)", "yes")
    assert measured[LAST] == ("0.79 to 0.79 (most: 1×64×400×672 float32 channels_last)", "yes")
    assert measured[TIME] == ("1.02 to 1.02 (most: 2×256×320, float32)", "yes")
    assert measured[MEMORY][1] == "yes"
    assert measured[WS][0].startswith("0.49% to 0.49%") and measured[WS][1] == "yes"
    assert measured[CPU][0].startswith("0.20 to 0.20")  # 8 / 40
    assert measured[SAVED][0].startswith("1.00 to 1.00") and measured[SAVED][1] == "yes"
    assert measured[SAVED][0].endswith("the rest tables")
    # 8 passes of 68.8 MB at 64 GB/s are 8.6 ms
    assert measured[FLOOR] == ("108% to 109% (least: 1×64×400×672 float32 nchw)", "yes")


def test_bars_that_are_not():
    small = norms(ours=5.0)
    slow = norms(ours=14.0, tables=40)
    cpu = norms("cpu", ours=14.0)
    measured = bars(small, slow, cpu, train(step=103.0, peak=101, standardization=1.1))
    assert measured[NCHW] == ("0.50 to 1.40 (most: 1×64×400×672 float32 nchw)", "**no**")
    assert measured[SAVED][1] == "**no**" and "tables" not in measured[SAVED][0]
    assert measured[FLOOR] == ("61% to 172% (least: 1×64×400×672 float32 nchw)", "**no**")
    assert [measured[bar][1] for bar in (TIME, MEMORY, WS, CPU)] == ["**no**"] * 4
    assert measured[CPU_SAVED][1] == "yes"
    assert "not run" in measured[CPU_STEP][0]


def test_small_activations_do_not_count_on_a_gpu():
    tiny = dict(shape=(1, 64, 100, 100), ours=20.0)
    measured = bars(norms(**tiny), norms("cpu", **tiny))
    assert measured[NCHW][0].startswith("not measured")
    assert measured[CPU] == ("0.50 to 0.50 (most: 1×64×100×100 float32 nchw)", "**no**")


def cells(markdown, start):
    """The first table after ``start``: its header and rows."""
    lines = markdown[markdown.index(start) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line[1:-1].split(" | ")])
    return [dict(zip(table[0], row)) for row in table[2:]]


def test_tables_are_made_of_the_json(tmp_path):
    content = norms()
    report.write_json(content, str(tmp_path / "results.json"))
    loaded = json.loads((tmp_path / "results.json").read_text())
    assert report.markdown(loaded) == report.markdown(content)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]

    text = report.markdown(loaded)
    (times,) = cells(text, "**float32, nchw**")
    assert times["layer"] == "stem" and times["input"] == "1×64×400×672"
    assert (times["BCN"], times["GroupNorm"], times["reference"]) == ("8.00", "10.0", "40.0")
    assert (times["BCN / GroupNorm"], times["BCN / reference"]) == ("0.80", "0.20")
    (details,) = cells(text, "BCN in detail, float32, nchw")
    assert details["forward ms (quartiles)"] == "2.00 (1.80–2.40)"
    # forward 3 and backward 5 passes of X bytes
    assert details["of the floor: forward"] == f"{100 * 3 * X / 64e9 / 2e-3:.0f} %"
    assert details["of the floor: backward"] == f"{100 * 5 * X / 64e9 / 6e-3:.0f} %"
    assert details["of the floor: both"] == f"{100 * 8 * X / 64e9 / 8e-3:.0f} %"
    assert details["saved MiB: reference"] == f"{3 * X / 2**20:.2f}"
    assert "- copy bandwidth: 64 GB/s" in text and "`tools/benchmark_norms.py`" in text


def test_table_of_training():
    content = train(step=125.0, peak=150)
    for row in content["rows"]:
        row["largest_batch"] = 7
    content["rows"][1]["inference_folded"] = spread(40.0)
    content["settings"]["memory_gib"] = 16.0
    gn, ours = cells(report.markdown(content), "**2×256×320, float32**")
    assert (gn["norm"], gn["WS, ms"], gn["folded images/s"]) == ("GN", "", "")
    assert ours["step ms (quartiles)"] == "125 (112–150)"
    assert ours["/ GN"] == "1.50"  # of memory, the second column of that name
    assert ours["WS, % of step"] == "0.40"
    assert ours["inference images/s"] == "40.00" and ours["folded images/s"] == "50.00"
    assert ours["largest batch in 16 GiB"] == "7"


@pytest.mark.parametrize(
    "content", [norms(), norms("cpu"), train()], ids=["norms-cuda", "norms-cpu", "train"]
)
def test_plot(content, tmp_path):
    report.write_plot(content, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_contender_that_was_not_measured():
    content = norms()
    content["rows"] = [row for row in content["rows"] if row["contender"] != "GroupNorm"]
    content["skipped"] = {"GroupNorm": "no reason"}
    text = report.markdown(content)
    (times,) = cells(text, "**float32, nchw**")
    assert "BCN / GroupNorm" not in times and times["BCN / reference"] == "0.20"
    assert "- not measured: GroupNorm: no reason" in text
    report.figure(content)
    assert bars(content)[NCHW][0].startswith("not measured")


def test_rewriting_keeps_what_is_written_by_hand(tmp_path):
    document, folder = tmp_path / "page.md", tmp_path / "results"
    folder.mkdir()
    document.write_text(f"# Title\n\n{page.BEGIN}\nold\n{page.END}\n\nText.\n")
    report.write_json(norms("cpu"), str(folder / "norms-cpu.json"))
    picture = tmp_path / "page-norms-cpu.png"
    for _ in range(2):
        assert page.rewrite(document, folder) == [picture, document]
        text = document.read_text()
        assert text.startswith(f"# Title\n\n{page.BEGIN}\n") and text.endswith(
            f"\n{page.END}\n\nText.\n"
        )
        assert "old" not in text and f"({picture.name})" in text and picture.exists()
        assert text.count("## CPU") == text.count("## GPU") == 1


@pytest.mark.parametrize(
    "file,content,message",
    [
        ("page.md", "no marks", "must have the lines '<!-- begin"),
        ("results/a.json", "{", "a.json is not the output of a benchmark .JSONDecodeError"),
        ("results/a.json", "[]", "a.json is not the output of a benchmark .TypeError"),
        ("results/a.json", '{"kind": "other"}', "kind must be 'norms' or 'train', found 'other'"),
    ],
)
def test_errors(tmp_path, file, content, message):
    (tmp_path / "results").mkdir()
    (tmp_path / "page.md").write_text(f"{page.BEGIN}\n{page.END}\n")
    (tmp_path / file).write_text(content)
    before = (tmp_path / "page.md").read_text()
    with pytest.raises(ValueError, match=message):
        page.rewrite(tmp_path / "page.md", tmp_path / "results")
    assert (tmp_path / "page.md").read_text() == before


def test_the_page_shows_the_results_of_the_repository():
    text = PAGE.read_text()
    written = text.partition(page.BEGIN + "\n")[2].partition(page.END)[0].strip()
    measured = page.load_results(RESULTS)
    assert written == page.render(measured, PAGE.stem).strip()
    for picture in re.findall(r"\]\(([^)]*\.png)\)", written):
        assert (PAGE.parent / picture).exists()
    assert {name for name, _ in measured} <= {name for names in COMMANDS.values() for name in names}
